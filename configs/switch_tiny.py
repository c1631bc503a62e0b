"""A small Switch Transformer (Fedus et al. 2022): T5's encoder and decoder of two layers, every second a mixture of 8
experts, top-1, with capacity, jitter and span corruption.

    moe-jax train --config=configs/switch_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("switch")
