"""A small language model in the style of Shazeer et al. 2017: embedding, LSTM, mixture of experts, LSTM, softmax.

Their 256 experts of width 1024 between two LSTMs of 512 units become 16 of width 128 between two of 64. As theirs: four experts
per token by noisy top-k gating, whose matrices start at zero; importance and load losses of weight 0.1 over the whole batch; a
sigmoid after the mixture, residual connections and dropout after every layer, no norms; nothing is dropped. Otherwise:

    text in words                       bytes of Python's standard library
    Adam, warm-up and 1/sqrt(step)      AdamW, warm-up and cosine
    300,000 words per step              2,048 bytes

    moe-jax train --config=configs/shazeer_tiny.py --workdir=workdir

configs/shazeer_hierarchical_tiny.py has the same experts in a hierarchy of two levels.
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    return of_family("shazeer")
