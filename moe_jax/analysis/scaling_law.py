"""The law of routed models (Clark et al. 2022): loss by the size of the dense model and the number of experts.

    log10 L = a·log10 N + b·log10 Ê + c·log10 N·log10 Ê + d,  1/Ê = 1/(E − 1 + 1/(1/E_start − 1/E_max)) + 1/E_max

N: parameters of the model with one expert. Ê is E_start at E = 1, about E in between, and never more than E_max. c > 0: a
larger model gains less from experts.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class ScalingLaw:
    """The six coefficients. ``start``, ``most``: E_start and E_max."""

    a: float
    b: float
    c: float
    d: float
    start: float
    most: float

    def loss(self, parameters: np.ndarray | float, experts: np.ndarray | float) -> np.ndarray:
        """Nats per token of models of N parameters with E experts."""
        log_n, log_e = np.log10(parameters), np.log10(saturated(experts, self.start, self.most))
        return 10 ** (self.a * log_n + self.b * log_e + self.c * log_n * log_e + self.d)

    def equivalent_parameters(self, parameters: np.ndarray | float, experts: np.ndarray | float) -> np.ndarray:
        """N̄: parameters of the model with one expert that has the same loss."""
        log_n, log_e = np.log10(parameters), np.log10(saturated(experts, self.start, self.most))
        log_one = np.log10(self.start)
        return 10 ** (((self.a + self.c * log_e) * log_n + self.b * (log_e - log_one)) / (self.a + self.c * log_one))


# Of Clark et al. 2022.
PUBLISHED = {
    "S-BASE": ScalingLaw(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
    "RL-R": ScalingLaw(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
    "Hash": ScalingLaw(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
}


def saturated(experts: np.ndarray | float, start: float, most: float) -> np.ndarray:
    """Ê of E experts."""
    return 1 / (1 / (np.asarray(experts, np.float64) - 1 + 1 / (1 / start - 1 / most)) + 1 / most)


def fit(parameters_R: np.ndarray, experts_R: np.ndarray, loss_R: np.ndarray) -> tuple[ScalingLaw, float]:
    """The law with the least squares of log10 L over R runs, and the root mean square of what remains (in log10 L).

    Given E_start and E_max the rest is linear; these two are searched for, 1 ≤ E_start < E_max ≤ 10⁴, from several starts.

    Raises:
      ValueError: fewer than two sizes, fewer than three numbers of experts, or fewer runs than coefficients.
    """
    from scipy.optimize import least_squares
    sizes, counts = len(np.unique(parameters_R)), len(np.unique(experts_R))
    if sizes < 2 or counts < 3 or len(loss_R) < 6:
        raise ValueError(f"{len(loss_R)} runs of {sizes} sizes and {counts} numbers of experts: the law has six coefficients; it takes "
                         f"two sizes, three numbers of experts and six runs at least")
    log_n, log_l = np.log10(parameters_R), np.log10(loss_R)

    def linear(shape):
        """(a, b, c, d) and what remains, at E_start = 10^shape[0] and E_max = E_start · 10^shape[1]."""
        log_e = np.log10(saturated(experts_R, 10 ** shape[0], 10 ** (shape[0] + shape[1])))
        columns = np.stack([log_n, log_e, log_n * log_e, np.ones_like(log_n)], axis=1)
        coefficients = np.linalg.lstsq(columns, log_l, rcond=None)[0]
        return coefficients, columns @ coefficients - log_l

    starts = [(start, ratio) for start in (0.1, 0.5) for ratio in (1.0, 2.5)]
    found = min((least_squares(lambda shape: linear(shape)[1], start, bounds=([0.0, 0.05], [1.5, 2.5 + 1e-9]), xtol=1e-14, ftol=1e-14,
                               gtol=1e-14) for start in starts), key=lambda result: result.cost)
    coefficients, rest = linear(found.x)
    start = 10 ** found.x[0]
    return ScalingLaw(*map(float, coefficients), float(start), float(start * 10 ** found.x[1])), float(np.sqrt(np.mean(rest**2)))
