"""A small DeepSeek-V2 (DeepSeek-AI 2024): latent attention with YaRN; four of 16 experts inside three of four groups,
balanced over experts, devices and communication.

    moe-jax train --config=configs/deepseek_v2_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("deepseek_v2")
