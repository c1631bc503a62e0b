"""Qwen3-235B-A22B (Yang et al. 2025): 235 B parameters, 22 B active per token.

As released: every dimension, norms of queries and keys, 128 experts in every layer, top-8 renormalised, balanced over the
global batch. Batch, optimizer and number of steps are not published; they are chosen here, for planning.

    moe-jax plan --config=configs/qwen3_235b_a22b.py --slice=v5p-512
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    config = of_family("qwen3_moe", "235b_a22b")
    config.model.update(dtype="bfloat16", remat="block")
    config.data.update(batch_size=2048, sequence_length=4096)
    config.mesh.update(fsdp=16, expert_limit=16)
    config.optimizer.update(learning_rate=2e-4, warmup_steps=2000)
    config.training.update(num_steps=500_000, microbatches=2, output_z_weight=0.0)
    return config
