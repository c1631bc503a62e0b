"""A small DeepSeekMoE (Dai et al. 2024): a dense first layer, then four of 16 narrow experts and two shared ones.

    moe-jax train --config=configs/deepseek_moe_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("deepseek_moe")
