"""OLMoE-1B-7B (Muennighoff et al. 2024, arXiv:2409.02060): 6.92 B parameters, 1.28 B active per token.

As published: every dimension, norms of queries and keys, 64 experts in every layer, top-8 by softmax without renormalisation,
nothing dropped, balancing 0.01, router z loss 1e-3 (MegaBlocks divides it by 8), standard deviation 0.02 at the start,
vocabulary, untied output layer, AdamW from 4e-4 to 4e-5, about 4 M tokens per batch, 5.1 T tokens. As there, parameters
are sharded and gathered (fsdp) and no token travels: mesh.expert is 1.

Norm scales are spared weight decay here.

    moe-jax plan --config=configs/olmoe_1b_7b.py --slice=v5p-128
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    config = of_family("olmoe", "1b_7b")
    config.model.update(init_scale=0.82, embedding_init=0.02, dtype="bfloat16", remat="block")
    config.data.update(batch_size=1024, sequence_length=4096)
    config.mesh.update(fsdp=8, expert_limit=1)
    config.optimizer.update(name="adamw", learning_rate=4e-4, schedule="cosine", warmup_steps=2500, final_fraction=0.1,
                            weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8, clip_norm=1.0)
    config.training.update(num_steps=1_224_000, microbatches=2, output_z_weight=0.0)
    return config
