"""A small model with Expert Choice routing (Zhou et al. 2022): in the encoder every expert takes its best tokens, two
experts per token on average. Theirs is a decoder (families.config('expert_choice', '8b_64e')), in which that choice looks at
later tokens.

    moe-jax train --config=configs/expert_choice_tiny.py --workdir=workdir
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("expert_choice")
