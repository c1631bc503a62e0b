"""Shazeer et al. 2017, table 6: with no balancing loss a few experts take everything; any weight mends it."""

from experiments.base import SCALES, get_config
from moe_jax.sweeps import Sweep, equal, falls

SWEEP = Sweep(
    number=1,
    title="Balance loss: off, weak, strong",
    question="How much balancing does a mixture of experts need?",
    paper="Shazeer et al. 2017, table 6",
    config=get_config,
    # Dropless, as in the paper: with buffers "off" would also lose the tokens that its busy experts have no room for.
    settings={"moe.num_experts": 16, "moe.experts_per_token": 2, "moe.dispatch": "dropless"},
    arms={
        "off": {"moe.balance_weight": 0.0},
        "weak": {"moe.balance_weight": 0.01},
        "strong": {"moe.balance_weight": 0.1},
    },
    expected=(
        falls("load_max", "off", "weak"),
        falls("ce", "off", "weak"),
        equal("ce", "weak", "strong", within=0.02),
    ),
    metrics=("ce", "load_max", "max_violation", "dead_experts"),
    published={"off": 39.8, "weak": 35.7, "strong": 35.7},
    published_metric="perplexity (weights 0, 0.01, 1)",
    scales=SCALES,
)
