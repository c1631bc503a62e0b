"""Paired differences, their intervals, and what may be concluded from them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from moe_jax.sweeps.definition import Order, Point, Sweep, label, terms

CONFIDENCE = 0.95
FEWEST_SEEDS = 3

HOLDS, DOES_NOT_HOLD, NOT_RESOLVED, REPORTED = "holds", "does not hold", "not resolved", "reported"


@dataclasses.dataclass(frozen=True)
class Interval:
    """The mean of n paired differences and, from three on, the interval of it by Student's t; None with fewer."""

    mean: float
    low: float | None
    high: float | None
    n: int


def paired_interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """mean ± t(n - 1) · s / √n, s the standard deviation with n - 1.

    Raises:
      ValueError: no differences.
    """
    values = np.asarray(differences, np.float64)
    if not len(values):
        raise ValueError("no differences: an interval needs at least one")
    mean = float(values.mean())
    if len(values) < FEWEST_SEEDS:
        return Interval(mean, None, None, len(values))
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half, len(values))


def verdict(order: Order, interval: Interval) -> str:
    """Whether the difference, later point minus earlier, has the sign (or size) that the order expects.

    An interval that contains 0 (for 'equal': one end of the margin) resolves nothing; one wholly on the other side
    contradicts.
    """
    if order.direction == "reported":
        return REPORTED
    if interval.low is None or not math.isfinite(interval.low + interval.high):
        return NOT_RESOLVED
    low, high = interval.low, interval.high
    if order.direction == "rises":
        low, high = -high, -low
    if order.direction == "equal":
        margin = order.within
        return HOLDS if -margin < low and high < margin else DOES_NOT_HOLD if low > margin or high < -margin else NOT_RESOLVED
    return HOLDS if high < 0 else DOES_NOT_HOLD if low > 0 else NOT_RESOLVED


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One pair of an expected order. strict: its verdict at the confidence that allows for all comparisons (Bonferroni)."""

    order: Order
    earlier: str
    later: str
    interval: Interval
    verdict: str
    strict: str

    @property
    def claim(self) -> str:
        """'ce: off > weak'."""
        sign = {"falls": ">", "rises": "<", "equal": "≈", "reported": "and"}[self.order.direction]
        return f"{self.order.metric}: {self.earlier} {sign} {self.later}"

    @property
    def expected(self) -> str:
        """Of the difference later - earlier."""
        within = f"within ±{self.order.within:g}"
        return {"falls": "< 0", "rises": "> 0", "equal": within, "reported": "–"}[self.order.direction]


# Metrics of the finished runs of one scale, by arm and seed.
Metrics = Mapping[str, Mapping[int, Mapping[str, float]]]


def missing_metrics(sweep: Sweep, found: Metrics) -> list[str]:
    """Metrics that the sweep asks for and a finished run of that arm does not have: 'off has no load_max'."""
    asked = {(arm, name) for order in sweep.expected for point in order.points for arm, name, _ in terms(point, order.metric)}
    lines = []
    for arm, name in sorted(asked):
        for metrics in found.get(arm, {}).values():
            if metrics.get(name) is None:
                lines.append(f"{arm} has no metric {name!r}; it has {', '.join(sorted(metrics))}")
                break
    return lines


def compare(sweep: Sweep, found: Metrics) -> list[Comparison]:
    """Every pair of every expected order for which there is at least one seed."""
    pairs = []
    for order in sweep.expected:
        for earlier, later in order.pairs():
            differences = [b - a for a, b in zip(*_paired(order, earlier, later, found))]
            if differences:
                pairs.append((order, earlier, later, differences))
    expected = sum(order.direction != "reported" for order, *_ in pairs)
    comparisons = []
    for order, earlier, later, differences in pairs:
        interval = paired_interval(differences)
        strict = paired_interval(differences, 1 - (1 - CONFIDENCE) / max(1, expected))
        comparisons.append(Comparison(order, label(earlier, order.metric), label(later, order.metric), interval,
                                      verdict(order, interval), verdict(order, strict)))
    return comparisons


def _paired(order: Order, earlier: Point, later: Point, found: Metrics) -> tuple[list[float], list[float]]:
    """The values of both points for the seeds that have both."""
    involved = [term for point in (earlier, later) for term in terms(point, order.metric)]
    seeds = set.intersection(*(_seeds(found, arm, name) for arm, name, _ in involved)) if involved else set()
    return tuple([_value(point, order.metric, seed, found) for seed in sorted(seeds)] for point in (earlier, later))


def _seeds(found: Metrics, arm: str, name: str) -> set[int]:
    return {seed for seed, metrics in found.get(arm, {}).items() if metrics.get(name) is not None}


def _value(point: Point, metric: str, seed: int, found: Metrics) -> float:
    if isinstance(point, (int, float)):
        return float(point)
    return sum(factor * found[arm][seed][name] for arm, name, factor in terms(point, metric))
