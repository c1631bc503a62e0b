"""ST-MoE-32B (Zoph et al. 2022, arXiv:2202.08906): 269 B parameters, 35 B active per token.

As published: T5's encoder and decoder of 24 layers each with 64 heads and relative positions (flaxformer's st_moe_32b; the
paper's "27 layers" count the six more networks of a stack as three), width 5,120, GEGLU of 20,480, 64 experts in every fourth
layer with one more dense network after them, top-2 renormalised, the second kept at random below 0.2, capacity 1.25·T/E (2.0
in evaluation) in groups of 4,096 tokens of the encoder, balancing 0.01, router z loss 1e-3, initialisation 0.1, Adafactor
with 1/√step, 1 M tokens per batch, 1.5 T tokens. A later token can push an earlier one's second choice out of a buffer
(moe.allow_noncausal_routing). The mixture it was trained on, span corruption and causal text, is span corruption here.

    moe-jax plan --config=configs/st_moe_32b.py --slice=v5p-512
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    config = of_family("st_moe", "32b")
    config.model.update(dtype="bfloat16", remat="block")
    config.moe.group_size = 4096
    config.data.update(batch_size=2048)
    config.mesh.update(fsdp=4, expert_limit=64, tensor=4)
    config.optimizer.update(name="adafactor", learning_rate=0.01, schedule="rsqrt", warmup_steps=10_000, weight_decay=0.0,
                            clip_norm=0.0)
    config.training.update(num_steps=1_430_000, output_z_weight=1e-4)
    return config
