"""A small GShard (Lepikhin et al. 2020): encoder and decoder of two layers, every second a mixture of 8 experts, the second
choice made at random, gates renormalised, capacity 2·T/E. It was trained on translation; this one restores hidden spans of
the text (T5's objective).

    moe-jax train --config=configs/gshard_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("gshard")
