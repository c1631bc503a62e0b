"""A small model with V-MoE's routing (Riquelme et al. 2021): noise on the logits, slots by priority over the batch,
importance and load losses, in the encoder of an encoder–decoder. Its encoder was of images; this one reads text, and sees
all of it, so that its router may look ahead.

    moe-jax train --config=configs/v_moe_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("v_moe")
