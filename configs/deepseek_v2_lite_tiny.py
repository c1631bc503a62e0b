"""A small DeepSeek-V2-Lite (DeepSeek-AI 2024): latent attention with plain queries and YaRN; four of 16 experts and two
shared ones.

    moe-jax train --config=configs/deepseek_v2_lite_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("deepseek_v2_lite")
