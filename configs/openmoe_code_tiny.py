"""A small OpenMoE (Xue et al. 2024) as its code has it: a dense network after the experts, with a norm of its own, four
matrices per network, two tables, padding routed like text. configs/openmoe_tiny.py is larger, causal, and comes with
numbers; openmoe_paper_tiny.py is what its paper says.

    moe-jax train --config=configs/openmoe_code_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("openmoe_code")
