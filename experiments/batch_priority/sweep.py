"""Riquelme et al. 2021 (V-MoE), section 4; Zoph et al. 2022 (ST-MoE), appendix: where buffers are small, the tokens with the
highest gates fill them first.

Who finds a place then depends on later tokens: these decoders are not causal. Their loss is told twice, with the buffers
they were trained with and as they would write (nothing dropped: ``…-causal``).
"""

from experiments.base import SCALES, get_config
from moe_jax.sweeps import Evaluate, Sweep, equal, falls, minus, reported

FACTORS = ("0.25", "0.75", "1.25")
PRIORITY = {"moe.fill_order": "batch_prioritized", "moe.allow_noncausal_routing": True}
EVALUATED_AT = "0.25"  # of the models trained with 1.25


def factor(value: str) -> dict:
    """Training and evaluation with the same buffers."""
    return {"moe.dispatch": "gather", "moe.capacity_factor": float(value), "moe.eval_dispatch": "gather",
            "moe.eval_capacity_factor": float(value)}


def arms() -> dict:
    found = {}
    for value in FACTORS:
        found[f"in-order-{value}"] = factor(value)
        found[f"priority-{value}"] = {**factor(value), **PRIORITY}
    for name in list(found):
        found[f"{name}-causal"] = Evaluate(name, causal=True)
    smaller = {"moe.eval_capacity_factor": float(EVALUATED_AT)}
    found["in-order-1.25-then-in-order"] = Evaluate("in-order-1.25", smaller)
    found["in-order-1.25-then-priority"] = Evaluate("in-order-1.25", {**smaller, **PRIORITY})
    found["priority-1.25-then-priority"] = Evaluate("priority-1.25", smaller)
    return found


SWEEP = Sweep(
    number=4,
    title="Batch-prioritised routing",
    question="Does it help to give the places in small buffers to the tokens with the highest gates?",
    paper="Zoph et al. 2022 (ST-MoE), batch-prioritised routing, top-1; Riquelme et al. 2021 (V-MoE)",
    config=get_config,
    # All layers: what is dropped has no feed-forward network then, so that it counts who is.
    settings={"moe.every": 1},
    arms=arms(),
    expected=(
        *(falls("ce", f"in-order-{value}", f"priority-{value}") for value in FACTORS[:-1]),
        equal("ce", "in-order-1.25", "priority-1.25", within=0.03),
        falls("ce", minus("in-order-0.25", "priority-0.25"), minus("in-order-1.25", "priority-1.25")),
        falls("ce", "in-order-1.25-then-in-order", "in-order-1.25-then-priority", paper="V-MoE: in evaluation alone"),
        reported("ce", "in-order-1.25-then-priority", "priority-1.25-then-priority"),
        *(reported("ce", f"in-order-{value}-causal", f"priority-{value}-causal") for value in FACTORS),
    ),
    metrics=("ce", "drop_fraction", "train/ce"),
    published={"in-order-0.75": -1.428, "priority-0.75": -1.409, "in-order-1.25": -1.378,
               "priority-1.25": -1.376},
    published_metric="negative log-perplexity (higher is better)",
    scales=SCALES,
)
