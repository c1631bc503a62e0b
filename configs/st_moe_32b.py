"""ST-MoE-32B (Zoph et al. 2022, arXiv:2202.08906): 269 B parameters, 35 B active per token.

As published: width 5,120, GEGLU of 20,480, 64 experts in every fourth layer with one more dense network after them,
top-2 renormalised, the second kept at random below 0.2, capacity 1.25·T/E (2.0 in evaluation) in groups of 4,096 tokens,
balancing 0.01, router z loss 1e-3, initialisation 0.1, Adafactor with 1/√step, 1 M tokens per batch, 1.5 T tokens.

The nearest decoder: ST-MoE is an encoder-decoder of 24 + 24 layers with 64 heads (flaxformer's st_moe_32b; the paper's
"27 layers" count its six more networks per stack as three). A decoder of all 48 layers with half again as many heads (96)
has the same parameters: the decoder's cross-attention is a third of all attention. Positions are rotary instead of
relative, sequences packed to 512, the vocabulary is T5's. A later token can push an earlier one's second choice out of a
buffer (moe.allow_noncausal_routing).

    moe-jax plan --config=configs/st_moe_32b.py --slice=v5p-512
"""

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config() -> ConfigDict:
    config = base()
    config.model.update(num_layers=48, d_model=5120, num_heads=96, num_kv_heads=96, head_dim=128, d_ff=20_480,
                        activation="geglu", scaled_attention=False, vocab_size=32_128, init_scale=0.1, dtype="bfloat16",
                        remat="block")
    config.moe.update(num_experts=64, experts_per_token=2, every=4, d_ff=20_480, activation="geglu",
                      residual_ffn="sequential", renormalize=True, second_policy="random", second_threshold=0.2,
                      fill_order="choice_major", allow_noncausal_routing=True, eval_dispatch="gather",
                      capacity_factor=1.25, eval_capacity_factor=2.0, capacity_counts="tokens", group_size=4096,
                      balance_loss="first_choice", balance_weight=0.01, router_z_weight=1e-3)
    config.data.update(batch_size=2048, sequence_length=512)
    config.mesh.update(fsdp=4, expert_limit=64, tensor=4)
    config.optimizer.update(name="adafactor", learning_rate=0.01, schedule="rsqrt", warmup_steps=10_000, weight_decay=0.0,
                            clip_norm=0.0)
    config.training.update(num_steps=1_430_000, output_z_weight=1e-4)
    return config
