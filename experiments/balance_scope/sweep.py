"""DeepSeek-V3, section 4.5; Wang et al. 2024: over what the load is balanced, and whether by a loss or by a bias of the choice.

The balancing loss asks each sequence for an even load, or the batch as a whole. The bias asks nothing of the loss: after every
step it is moved towards the experts that had too few tokens.
"""

import numpy as np

from experiments.base import SCALES, get_config
from moe_jax.sweeps import Sweep, TrainedModel, falls, reported, rises
from moe_jax.training.metrics import expert_load

# In 500 steps the bias gets as far at this rate as at the papers' 0.001 in five thousand.
RATE = 0.01


def by_domain(trained: TrainedModel) -> dict[str, float]:
    """``domain_distance``: half the sum over experts of the difference between a domain's shares and those of all text; the
    mean over domains and layers. 0: all domains use the experts alike; 1: each has experts of its own."""
    counts_LPE = trained.sums()["domain_counts_LPE"]
    counts_LPE = counts_LPE[:, counts_LPE.sum(axis=(0, 2)) > 0]
    share_LPE = expert_load(counts_LPE.reshape(-1, counts_LPE.shape[-1])).reshape(counts_LPE.shape) / counts_LPE.shape[-1]
    all_LE = counts_LPE.sum(axis=1) / counts_LPE.sum(axis=(1, 2))[:, None]
    return {"domain_distance": float(np.mean(np.abs(share_LPE - all_LE[:, None]).sum(axis=-1) / 2))}


SWEEP = Sweep(
    number=5,
    title="Balance by sequence, by batch, by a bias",
    question="Does it matter over what the load is balanced, and whether a loss or a bias does it?",
    paper="DeepSeek-V3 (2024), section 4.5; Wang et al. 2024, table 2",
    config=get_config,
    # Sigmoid gates that sum to 1, and no drops, as DeepSeek-V3. A balanced sequence of 64 brings each expert 16 choices.
    settings={"moe.num_experts": 16, "moe.experts_per_token": 4, "moe.d_ff": 64, "moe.score": "sigmoid", "moe.renormalize": True,
              "moe.dispatch": "dropless", "data.sequence_length": 64, "data.batch_size": 16},
    arms={
        "sequence": {"moe.balance_scope": "sequence", "moe.balance_weight": 0.01},
        "batch": {"moe.balance_scope": "global", "moe.balance_weight": 0.01},
        "strong-sequence": {"moe.balance_scope": "sequence", "moe.balance_weight": 0.1},
        "strong-batch": {"moe.balance_scope": "global", "moe.balance_weight": 0.1},
        "bias": {"moe.balance_weight": 0.0, "moe.bias_update_rate": RATE},
        "slow-bias": {"moe.balance_weight": 0.0, "moe.bias_update_rate": 0.001},
    },
    expected=(
        falls("ce", "sequence", "batch"),
        falls("ce", "strong-sequence", "strong-batch"),
        falls("ce", "sequence", "bias"),
        falls("max_violation", "sequence", "bias"),
        falls("max_violation", "batch", "bias"),
        falls("max_violation", "slow-bias", "bias", paper="Wang et al. 2024, figure on update rates: a small rate takes long"),
        rises("domain_distance", "sequence", "batch", "bias", paper="DeepSeek-V3, figure 9"),
        reported("ce", "batch", "bias"),
    ),
    metrics=("ce", "max_violation", "train/max_violation", "domain_distance"),
    published={"sequence": 2.258, "batch": 2.253, "bias": 2.253},
    published_metric="validation loss, 1B",
    scales=SCALES,
    measure=by_domain,
)
