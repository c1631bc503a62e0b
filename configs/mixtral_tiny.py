"""A small Mixtral (Jiang et al. 2024): 8 experts in every layer, softmax over the two chosen logits, grouped-query
attention.

    moe-jax train --config=configs/mixtral_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("mixtral")
