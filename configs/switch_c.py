"""Switch-C (Fedus et al. 2022, JMLR 23, table 9): 1,571 B parameters, 2,048 experts in every layer, 1.8 B active per token.

As published: T5's encoder and decoder of 15 layers each with 32 heads and relative positions, width, experts (ReLU), vocabulary,
span corruption of rows of 512, top-1 by softmax, capacity 1.25, jitter 0.01, balancing 0.01, initialisation 0.1, Adafactor
with 1/√step, 2^20 tokens per batch for 550,000 steps. Two sequences compete for slots, one slot per expert at least: with
one sequence and the usual minimum of four, 16 times as many slots as tokens would be computed.

    moe-jax plan --config=configs/switch_c.py --slice=v5p-2048
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    config = of_family("switch", "c")
    config.model.update(dtype="bfloat16", remat="block")
    config.moe.update(min_capacity=1, group_size=1024)
    config.data.update(batch_size=2048)
    config.mesh.update(fsdp=4, expert_limit=256)
    config.optimizer.update(name="adafactor", learning_rate=0.01, schedule="rsqrt", warmup_steps=10_000, weight_decay=0.0,
                            clip_norm=0.0)
    config.training.update(num_steps=550_000, output_z_weight=1e-4)
    return config
