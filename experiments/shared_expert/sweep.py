"""Dai et al. 2024 (DeepSeekMoE), section 4.5: the shared expert switched off, one more routed expert in its place."""

from experiments.base import SCALES, get_config
from moe_jax.sweeps import Evaluate, Sweep, Train, minus, reported, rises

WIDTH = {"moe.d_ff": {"smoke": 8, "quick": 64, "full": 64}}

SWEEP = Sweep(
    number=12,
    title="Shared expert removed",
    question="Can routed experts stand in for the shared one?",
    paper="Dai et al. 2024, section 4.5",
    config=get_config,
    settings={"moe.dispatch": "dropless"},
    arms={
        "shared": Train({**WIDTH, "moe.num_experts": 15, "moe.num_shared_experts": 1, "moe.experts_per_token": 3}),
        "shared-removed": Evaluate("shared", {"moe.num_shared_experts": 0, "moe.experts_per_token": 4}),
        "one-more-routed": Evaluate("shared", {"moe.experts_per_token": 4}),
        "routed": Train({**WIDTH, "moe.num_experts": 16, "moe.experts_per_token": 4}),
        "one-routed-removed": Evaluate("routed", {"moe.experts_per_token": 3}),
    },
    expected=(
        rises("ce", "shared", "shared-removed"),
        rises("ce", minus("one-routed-removed", "routed"), minus("shared-removed", "shared")),
        reported("ce", "shared", "one-more-routed"),
        reported("ce", "routed", "shared"),
    ),
    metrics=("ce",),
    published={"shared": 1.808, "shared-removed": 2.414},
    published_metric="Pile loss",
    scales=SCALES,
)
