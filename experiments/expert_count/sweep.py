"""Clark et al. 2022: more experts at the same FLOPs, in models of three sizes; ``fit.py`` fits their law to the results."""

from experiments.base import SCALES, get_config
from moe_jax.sweeps import Sweep, falls, minus

WIDTHS = (32, 64, 128)
COUNTS = (1, 4, 16, 64)


def model(width: int, experts: int) -> dict:
    """One head per 32 of width, an FFN of twice the width."""
    small = lambda value: {"smoke": max(4, value // 8), "quick": value, "full": value}
    heads = {"smoke": 1, "quick": max(1, width // 32), "full": max(1, width // 32)}
    return {"model.d_model": small(width), "model.num_heads": heads, "model.num_kv_heads": heads,
            "model.head_dim": {"smoke": 8, "quick": 32, "full": 32}, "model.d_ff": small(2 * width),
            "moe.d_ff": small(2 * width), "moe.num_experts": experts}


def arm(width: int, experts: int) -> str:
    return f"d{width}-e{experts}"


# Of the paper's three ways to route the one whose experts have nothing to learn before they are of use: gates are 1.
HASH = {"moe.router": "hash", "moe.balance_weight": 0.0, "moe.router_z_weight": 0.0}


SWEEP = Sweep(
    number=6,
    title="1 to 64 experts, and the law of their scaling",
    question="How much do more experts of the same FLOPs bring, and does a larger model gain less from them?",
    paper="Clark et al. 2022",
    config=get_config,
    settings={"moe.experts_per_token": 1, "moe.dispatch": "dropless"},
    arms={arm(width, experts): model(width, experts) for width in WIDTHS for experts in COUNTS}
         | {f"hash-{arm(64, experts)}": {**model(64, experts), **HASH} for experts in COUNTS[1:]},
    expected=(
        *(falls("ce", *(arm(width, experts) for experts in COUNTS)) for width in WIDTHS),
        falls("ce", arm(64, 1), *(f"hash-{arm(64, experts)}" for experts in COUNTS[1:])),
        falls("ce", minus(arm(64, 1), arm(64, 4)), minus(arm(64, 4), arm(64, 16)), minus(arm(64, 16), arm(64, 64))),
        falls("ce", minus(arm(32, 1), arm(32, 16)), minus(arm(128, 1), arm(128, 16))),
    ),
    metrics=("ce", "load_max"),
    scales=SCALES,
)
