"""Muennighoff et al. 2024 (OLMoE), figure 5: the same parameters and FLOPs in fewer large or more small experts."""

from experiments.base import SCALES, get_config
from moe_jax.sweeps import Scale, Sweep, falls, minus


def experts(count: int) -> dict:
    """``count`` experts of 2048 / count hidden units (smoke: 512), of which count / 8 compute a token."""
    return {"moe.num_experts": count, "moe.experts_per_token": count // 8,
            "moe.d_ff": {"smoke": 512 // count, "quick": 2048 // count, "full": 2048 // count}}


SWEEP = Sweep(
    number=7,
    title="Granularity at fixed FLOPs",
    question="Are many small experts better than few large ones that cost the same?",
    paper="Muennighoff et al. 2024, figure 5",
    config=get_config,
    settings={"moe.every": 1, "moe.dispatch": "dropless"},
    arms={"8-top-1": experts(8), "16-top-2": experts(16), "32-top-4": experts(32), "64-top-8": experts(64)},
    expected=(
        falls("ce", "8-top-1", "32-top-4"),
        falls("ce", "32-top-4", "64-top-8"),
        falls("ce", minus("8-top-1", "32-top-4"), minus("32-top-4", "64-top-8")),
    ),
    metrics=("ce", "load_max", "entropy"),
    scales={**SCALES, "quick": Scale(3, {"training.num_steps": 600})},
)
