"""DeepSeekMoE-16B (Dai et al. 2024, arXiv:2401.06066): 16.4 B parameters, 2.8 B active per token.

As published: every dimension, the first layer dense (10,944), 2 shared and 64 routed experts of width 1,408, top-6 by
softmax without renormalisation, balancing 0.001 per sequence, nothing dropped, vocabulary, untied output layer, standard
deviation 0.006 at the start (of the kernels that read the residual stream), AdamW, 4,608 sequences of 4,096 tokens,
2 T tokens. The published learning rate falls to 0.316 of itself at 80 % and again at 90 %; here it decays linearly over
the last fifth.

    moe-jax plan --config=configs/deepseek_moe_16b.py --slice=v5p-128
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    config = of_family("deepseek_moe", "16b")
    config.model.update(init_scale=0.0737, embedding_init=0.006, dtype="bfloat16", remat="block")
    config.moe.router_init = 0.006
    config.data.update(batch_size=4608, sequence_length=4096)
    config.mesh.update(fsdp=8, expert_limit=8)
    config.optimizer.update(name="adamw", learning_rate=4.2e-4, schedule="wsd", warmup_steps=2000, decay_steps=21_000,
                            weight_decay=0.1, beta1=0.9, beta2=0.95, clip_norm=1.0)
    config.training.update(num_steps=106_000, microbatches=9, output_z_weight=0.0)
    return config
