"""Komatsuzaki et al. 2023: upcycling against going on with the dense model, and against starting anew.

``+50`` is a budget: half of the steps that the dense model had. The dense model's own steps are not counted.
"""

from experiments.base import SCALES, get_config
from moe_jax.sweeps import Continue, Sweep, Train, Upcycle, equal, falls, minus, reported

DENSE = {"smoke": 10, "quick": 300, "full": 1200}


def steps(share: float, after_dense: bool = True) -> dict[str, dict[str, int]]:
    """A budget of so many times the dense run's steps, after them or from nothing."""
    return {"training.num_steps": {scale: round((after_dense + share) * count) for scale, count in DENSE.items()}}


MIXTURE = {"moe.num_experts": 8, "moe.experts_per_token": 2, "moe.renormalize": True, "moe.dispatch": "dropless"}
SMALLER = {"moe.d_ff": {"smoke": 16, "quick": 128, "full": 128}}

SWEEP = Sweep(
    number=11,
    title="Upcycling, dense continuation, from scratch",
    question="When is it better to make a mixture of experts of a dense model than to train on, or to start anew?",
    paper="Komatsuzaki et al. 2023",
    config=get_config,
    # The learning rate goes by the step alone, so that runs can go on without an end of their schedule (the paper's is this one).
    settings={"optimizer.schedule": "rsqrt", "optimizer.warmup_steps": 50},
    arms={
        "dense": Train({"moe.num_experts": 0, **steps(0)}),
        "continued+10": Continue("dense", steps(0.1)),
        "continued+50": Continue("continued+10", steps(0.5)),
        "continued+150": Continue("continued+50", steps(1.5)),
        "upcycled+10": Upcycle("dense", {**MIXTURE, **SMALLER, **steps(0.1)}),
        "upcycled+50": Continue("upcycled+10", steps(0.5)),
        "upcycled+150": Continue("upcycled+50", steps(1.5)),
        "scratch+50": Train({**MIXTURE, **SMALLER, **steps(0.5, after_dense=False)}),
        "scratch+150": Continue("scratch+50", steps(1.5, after_dense=False)),
        "not-normalised+50": Upcycle("dense", {**MIXTURE, **SMALLER, **steps(0.5), "moe.renormalize": False}),
        "optimizer-carried+50": Upcycle("dense", {**MIXTURE, **SMALLER, **steps(0.5)}, {"carry_optimizer": True}),
    },
    expected=(
        equal("ce", "continued+10", "upcycled+10", within=0.03),
        falls("ce", "continued+50", "upcycled+50"),
        falls("ce", "continued+150", "upcycled+150"),
        falls("ce", "scratch+50", "upcycled+50"),
        falls("ce", minus("scratch+50", "upcycled+50"), minus("scratch+150", "upcycled+150")),
        falls("ce", "upcycled+150", "scratch+150", paper="Muennighoff et al. 2024 (OLMoE): scratch overtakes, at 30 to 120 % of the dense budget"),
        reported("ce", "upcycled+50", "not-normalised+50"),
        reported("ce", "upcycled+50", "optimizer-carried+50"),
    ),
    metrics=("ce", "load_max"),
    scales=SCALES,
)
