"""Llama-4 Maverick, its text part: 401 B parameters, 17.2 B active per token.

As released: every dimension, chunked attention, every fourth layer without rotary positions, one of 128 experts beside a shared
one in every second layer, gated on its input. Batch, optimizer and number of steps are not published; they are chosen here,
for planning.

    moe-jax plan --config=configs/llama4_maverick.py --slice=v5p-1024
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    config = of_family("llama4", "maverick")
    config.model.update(dtype="bfloat16", remat="block")
    config.data.update(batch_size=2048, sequence_length=4096)
    config.mesh.update(fsdp=16, expert_limit=32)
    config.optimizer.update(learning_rate=2e-4, warmup_steps=2000)
    config.training.update(num_steps=500_000, output_z_weight=0.0)
    return config
