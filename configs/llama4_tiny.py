"""A small Llama-4 (its text part): three layers with chunked attention, one without rotary positions; every second layer one
of 8 experts, gated on its input, beside a shared one.

    moe-jax train --config=configs/llama4_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("llama4")
