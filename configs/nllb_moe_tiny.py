"""A small NLLB-MoE (NLLB Team 2022): encoder and decoder with layer norms, biases and sinusoidal positions; gates shared
among the choices that found a slot, 20 % of the outputs dropped in training. It was trained on translation; this one
restores hidden spans of the text (T5's objective).

    moe-jax train --config=configs/nllb_moe_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("nllb_moe")
