"""Switch-Base with 128 experts (Fedus et al. 2022, JMLR 23, table 9): 7.4 B parameters, 0.25 B active per token.

As published: T5's encoder and decoder of 12 layers each with 12 heads and relative positions, width, experts (GEGLU, every other
layer), vocabulary, span corruption of rows of 512, top-1 by softmax, capacity 1.25, jitter 0.01, balancing 0.01,
initialisation 0.1, Adafactor with 1/√step, 2^20 tokens per batch for 550,000 steps. Examples are packed, as T5's.

    moe-jax plan --config=configs/switch_base.py --slice=v5e-32
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    config = of_family("switch", "base")
    config.model.update(dtype="bfloat16", remat="block")
    config.data.update(batch_size=2048)
    config.mesh.update(expert_limit=128)
    config.optimizer.update(name="adafactor", learning_rate=0.01, schedule="rsqrt", warmup_steps=10_000, weight_decay=0.0,
                            clip_norm=0.0)
    config.training.update(num_steps=550_000, output_z_weight=1e-4)
    return config
