"""A small language model in the style of Shazeer et al. 2017: embedding, LSTM, mixture of experts, LSTM, softmax.

Their 256 experts of width 1024 between two LSTMs of 512 units become 16 of width 256 between two of 128. As theirs: four
experts per token by noisy top-k gating, whose matrices start at zero; importance and load losses of weight 0.1 over the whole
batch; a sigmoid after the mixture, residual connections and dropout after every layer, no norms; nothing is dropped.
Otherwise:

    text in words                       bytes of Python's standard library
    Adam, warm-up and 1/sqrt(step)      AdamW, warm-up and cosine
    300,000 words per step              4,096 bytes

    moe-jax train --config=configs/shazeer_tiny.py --workdir=shazeer

configs/shazeer_hierarchical_tiny.py has the same experts in a hierarchy of two levels.
"""

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config() -> ConfigDict:
    config = base()
    config.model.update(architecture="lstm", num_layers=2, d_model=128, dropout=0.1, embedding_init=0.1)
    config.moe.update(num_experts=16, experts_per_token=4, every=2, first=0, d_ff=256, activation="relu", router="noisy_top_k",
                      gate_order="top_k_then_softmax", router_init=0.0, dispatch="dropless", balance_weight=0.0,
                      router_z_weight=0.0, importance_weight=0.1, load_weight=0.1, balance_scope="global")
    config.data.update(source="standard_library", vocabulary="bytes", sequence_length=128, batch_size=32)
    config.mesh.update(data=0, expert=0, expert_limit=4)  # eight devices: data 2 x expert 4
    config.optimizer.update(name="adamw", learning_rate=6e-3, schedule="cosine", warmup_steps=30, weight_decay=0.0)
    config.training.update(num_steps=250, output_z_weight=0.0, eval_every=50, checkpoint_every=50)
    return config
