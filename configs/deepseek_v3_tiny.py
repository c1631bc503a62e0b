"""A small DeepSeek-V3 (DeepSeek-AI 2024): latent attention with YaRN; sigmoid scores, four of 16 experts inside two of four
groups, balanced by bias; one further token predicted in training.

    moe-jax train --config=configs/deepseek_v3_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("deepseek_v3")
