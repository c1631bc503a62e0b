"""A small dropless MoE (MegaBlocks: Gale et al. 2023): GPT-2's layers with one of 8 experts, nothing dropped. Any other
family is dropless with moe.dispatch="dropless". Positions are rotary here, GPT-2's are learned.

    moe-jax train --config=configs/dmoe_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("dmoe")
