"""A small Qwen2-MoE (Yang et al. 2024): biases of queries, keys and values, four of 8 experts, and a wider shared one with a
gate.

    moe-jax train --config=configs/qwen2_moe_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("qwen2_moe")
