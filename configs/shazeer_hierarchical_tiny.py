"""configs/shazeer_tiny.py with its 16 experts at two levels: a token keeps two of four groups, and two experts of each.

    moe-jax train --config=configs/shazeer_hierarchical_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.shazeer_tiny import get_config as flat


def get_config() -> ConfigDict:
    config = flat()
    config.moe.update(router="hierarchical", num_groups=4, groups_per_token=2, gate_order="softmax_then_top_k")
    return config
