"""A small GLaM (Du et al. 2022): every second layer a mixture of 8 plain experts, top-2 renormalised, GEGLU in the dense
layers, one tied table.

    moe-jax train --config=configs/glam_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("glam")
