"""DeepSeek-V2 (DeepSeek-AI 2024): 236 B parameters, 21.4 B active per token.

As published: 60 layers, latent attention, 160 experts and two shared ones, top-6 inside the best three of eight devices,
three balancing losses, AdamW, 9,216 sequences of 4,096 tokens, 8.1 T tokens. Its dropping of tokens beyond a device's budget
is moe.device_capacity_factor, with moe.dispatch="dropless"; off here. The schedule is a cosine instead of steps.

    moe-jax plan --config=configs/deepseek_v2.py --slice=v5p-512
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    config = of_family("deepseek_v2", "236b")
    config.model.update(dtype="bfloat16", remat="block")
    config.data.update(batch_size=9216, sequence_length=4096)
    config.mesh.update(fsdp=16, expert_limit=16)
    config.optimizer.update(learning_rate=2.4e-4, warmup_steps=2000)
    config.training.update(num_steps=215_000, microbatches=9, output_z_weight=0.0)
    return config
