"""A small OLMoE (Muennighoff et al. 2024): norms of queries and keys over all heads, four of 16 experts in every layer,
nothing dropped.

    moe-jax train --config=configs/olmoe_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("olmoe")
