"""ST-MoE, table on capacity factors in training and evaluation; MegaBlocks: dropless is best."""

from experiments.base import SCALES, get_config
from moe_jax.sweeps import Evaluate, Sweep, falls, reported

FACTORS = ("0.5", "0.75", "1", "1.25", "2")


def _arms():
    """Each factor in training; each model evaluated with the same buffers, with buffers for twice the load, and dropless."""
    arms = {}
    for factor in FACTORS:
        arms[f"train_{factor}"] = {"moe.dispatch": "gather", "moe.capacity_factor": float(factor)}
        for other in dict.fromkeys((factor, "2")):
            arms[f"train_{factor}_eval_{other}"] = Evaluate(
                f"train_{factor}", {"moe.eval_dispatch": "gather", "moe.eval_capacity_factor": float(other)})
    return {**arms, "dropless": {"moe.dispatch": "dropless"}}


SWEEP = Sweep(
    number=3,
    title="Capacity factor in training and evaluation, and dropless",
    question="What do larger expert buffers give, in training and in evaluation?",
    paper="Zoph et al. 2022 (ST-MoE), top-1; Gale et al. 2023 (MegaBlocks)",
    config=get_config,
    # All layers: what is dropped has no feed-forward network then.
    settings={"moe.num_experts": 16, "moe.every": 1},
    arms=_arms(),
    expected=(
        falls("ce", "train_0.75_eval_0.75", "train_1_eval_1", "train_1.25_eval_1.25", "train_2_eval_2"),
        falls("ce", "train_0.5_eval_0.5", "train_0.5_eval_2"),
        falls("ce", "train_0.75_eval_0.75", "train_0.75_eval_2"),
        falls("ce", "train_1_eval_1", "train_1_eval_2"),
        falls("ce", "train_0.75_eval_2", "train_1_eval_2", "train_1.25_eval_2"),
        falls("ce", "train_1", "dropless", paper="MegaBlocks, figure 2: cf 1 is worse than dropless"),
        reported("ce", "train_2", "dropless"),
    ),
    metrics=("ce", "drop_fraction", "train/drop_fraction"),
    published={"train_0.75_eval_0.75": -1.428, "train_0.75_eval_2": -1.404, "train_1_eval_1": -1.397, "train_1_eval_2": -1.384,
               "train_1.25_eval_1.25": -1.378, "train_1.25_eval_2": -1.373},
    published_metric="negative log-perplexity (higher is better)",
    scales=SCALES,
)
