"""A small ST-MoE (Zoph et al. 2022): T5's encoder and decoder of two layers, every second a mixture of 8 experts with a
dense network after them, the second choice at random below 0.2, router z loss.

    moe-jax train --config=configs/st_moe_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("st_moe")
