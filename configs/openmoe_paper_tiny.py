"""A small OpenMoE (Xue et al. 2024) as its paper has it: a dense network beside the experts, three matrices per network, one
table. configs/openmoe_tiny.py is larger, causal, and comes with numbers; openmoe_code_tiny.py is what its code does.

    moe-jax train --config=configs/openmoe_paper_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("openmoe_paper")
