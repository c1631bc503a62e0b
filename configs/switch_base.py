"""Switch-Base with 128 experts (Fedus et al. 2022, JMLR 23, table 9): 7.4 B parameters, 0.25 B active per token.

As published: width, experts (GEGLU, every other layer), vocabulary (T5's), top-1 by softmax, capacity 1.25, jitter 0.01,
balancing 0.01, initialisation 0.1, Adafactor with 1/√step, 2^20 tokens per batch for 550,000 steps.

The nearest decoder: Switch is an encoder-decoder, 12 + 12 layers with 12 heads and relative positions. A decoder of all
24 layers with half again as many heads (18) has the same parameters: the decoder's cross-attention is a third of all
attention. Positions are rotary, sequences packed to 512.

    moe-jax plan --config=configs/switch_base.py --slice=v5e-16
"""

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config() -> ConfigDict:
    config = base()
    config.model.update(num_layers=24, d_model=768, num_heads=18, num_kv_heads=18, head_dim=64, d_ff=2048,
                        activation="geglu", scaled_attention=False, vocab_size=32_128, init_scale=0.1, dtype="bfloat16",
                        remat="block")
    config.moe.update(num_experts=128, experts_per_token=1, every=2, d_ff=2048, activation="geglu",
                      fill_order="choice_major", router_init=0.0114, router_jitter=0.01, capacity_factor=1.25,
                      balance_weight=0.01, router_z_weight=0.0)
    config.data.update(batch_size=2048, sequence_length=512)
    config.mesh.update(expert_limit=128)
    config.optimizer.update(name="adafactor", learning_rate=0.01, schedule="rsqrt", warmup_steps=10_000, weight_decay=0.0,
                            clip_norm=0.0)
    config.training.update(num_steps=550_000, output_z_weight=1e-4)
    return config
