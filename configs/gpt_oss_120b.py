"""GPT-OSS-120B (OpenAI 2025): 117 B parameters, 5.7 B active per token.

As released: every dimension, sinks, windows of 128 in every second layer, biases, 128 experts in every layer, top-4, clamped
SwiGLU. Batch, optimizer and number of steps are not published; they are chosen here, for planning.

    moe-jax plan --config=configs/gpt_oss_120b.py --slice=v5p-256
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    config = of_family("gpt_oss", "120b")
    config.model.update(dtype="bfloat16", remat="block")
    config.data.update(batch_size=1024, sequence_length=4096)
    config.mesh.update(fsdp=8, expert_limit=16)
    config.optimizer.update(learning_rate=2e-4, warmup_steps=2000)
    config.training.update(num_steps=500_000, output_z_weight=0.0)
    return config
