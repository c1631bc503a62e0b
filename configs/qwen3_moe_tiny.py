"""A small Qwen3-MoE (Yang et al. 2025): norms of queries and keys head by head, four of 16 experts, renormalised, balanced
over the global batch.

    moe-jax train --config=configs/qwen3_moe_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("qwen3_moe")
