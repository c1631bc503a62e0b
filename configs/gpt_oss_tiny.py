"""A small GPT-OSS (OpenAI 2025): sinks, alternating windows, biases everywhere, clamped SwiGLU, YaRN; four of 8 experts.

    moe-jax train --config=configs/gpt_oss_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("gpt_oss")
