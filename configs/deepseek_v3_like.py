"""A decoder of the size of DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437): 671 B parameters, 37.6 B active per token.

As published: 61 layers, width 7,168, the first three dense (18,432), then one shared and 256 routed experts of width
2,048; top-8 of sigmoid scores inside the best 4 of 8 groups of experts, gates renormalised and times 2.5; balancing by
bias (0.001) and a sequence-wise loss (1e-4); vocabulary, untied output layer, AdamW, batch and length of the main phase.

The nearest decoder, not the model: multi-head latent attention is missing. In its place stands grouped-query attention
with 100 query and 2 key/value heads of width 128, which has as many parameters (187.2 M against 187.1 M per layer) and
caches about as many numbers per token (512 against 576). Multi-token prediction is left out; so is training in fp8. The
published schedule has a constant and three lower stages; here the last quarter decays linearly. DeepSeek-V3 drops no
token; training here fills buffers of 1.25 times the balanced load (moe.dispatch), evaluation is dropless.

    moe-jax plan --config=configs/deepseek_v3_like.py --slice=v5p-2048
"""

from ml_collections import ConfigDict

from configs.base import get_config as base


def get_config() -> ConfigDict:
    config = base()
    config.model.update(num_layers=61, d_model=7168, num_heads=100, num_kv_heads=2, head_dim=128, d_ff=18_432,
                        activation="swiglu", vocab_size=129_280, dtype="bfloat16", remat="block")
    config.moe.update(num_experts=256, experts_per_token=8, every=1, first_dense_layers=3, d_ff=2048, activation="swiglu",
                      num_shared_experts=1, score="sigmoid", renormalize=True, route_scale=2.5, num_groups=8,
                      groups_per_token=4, group_score="top_sum", bias_update_rate=1e-3, balance_scope="sequence",
                      balance_weight=1e-4, router_z_weight=0.0)
    config.data.update(batch_size=15_360, sequence_length=4096)
    config.mesh.update(fsdp=16, expert_limit=64)
    config.optimizer.update(name="adamw", learning_rate=2.2e-4, schedule="wsd", warmup_steps=2000, decay_steps=60_000,
                            weight_decay=0.1, beta1=0.9, beta2=0.95, clip_norm=1.0)
    # 14.8 T tokens; 3,072 sequences at a time, the batch that training began with.
    config.training.update(num_steps=235_000, microbatches=5, output_z_weight=0.0)
    return config
