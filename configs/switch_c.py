"""Switch-C (Fedus et al. 2022, JMLR 23, table 9): 1,571 B parameters, 2,048 experts in every layer, 1.8 B active per token.

As published: width, experts (ReLU), vocabulary (T5's), top-1 by softmax, capacity 1.25, jitter 0.01, balancing 0.01,
initialisation 0.1, Adafactor with 1/√step, 2^20 tokens per batch for 550,000 steps.

The nearest decoder: Switch is an encoder-decoder, 15 + 15 layers with 32 heads and relative positions. A decoder of all
30 layers with half again as many heads (48) has the same parameters: the decoder's cross-attention is a third of all
attention. Positions are rotary, sequences packed to 512. Two sequences compete for slots, one slot per expert at least:
with one sequence and the usual minimum of four, 16 times as many slots as tokens would be computed.

    moe-jax plan --config=configs/switch_c.py --slice=v5p-2048
"""

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config() -> ConfigDict:
    config = base()
    config.model.update(num_layers=30, d_model=2080, num_heads=48, num_kv_heads=48, head_dim=64, d_ff=6144,
                        activation="relu", scaled_attention=False, vocab_size=32_128, init_scale=0.1, dtype="bfloat16",
                        remat="block")
    config.moe.update(num_experts=2048, experts_per_token=1, every=1, d_ff=6144, activation="relu",
                      fill_order="choice_major", router_init=0.00693, router_jitter=0.01, capacity_factor=1.25,
                      min_capacity=1, group_size=1024, balance_weight=0.01, router_z_weight=0.0)
    config.data.update(batch_size=2048, sequence_length=512)
    config.mesh.update(fsdp=4, expert_limit=256)
    config.optimizer.update(name="adafactor", learning_rate=0.01, schedule="rsqrt", warmup_steps=10_000, weight_decay=0.0,
                            clip_norm=0.0)
    config.training.update(num_steps=550_000, output_z_weight=1e-4)
    return config
