"""Mixtral-8x7B (Jiang et al. 2024, arXiv:2401.04088): 46.7 B parameters, 12.9 B of them active per token.

As published: every dimension, the vocabulary's size, grouped-query attention, rotary base, untied output layer, 8 experts
in every layer, top-2, softmax over the two chosen logits; the balancing coefficient is that of the released config.json.
Not published, and chosen here: batch, length, optimizer, number of steps (about 1 T tokens) and capacity. The released
code drops nothing; training here fills buffers of 1.25 times the balanced load (moe.dispatch), evaluation is dropless.

    moe-jax plan --config=configs/mixtral_8x7b.py --slice=v5p-128

To train it, name a corpus and its SentencePiece model: --config.data.source=…, --config.data.vocabulary=….
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    config = of_family("mixtral", "8x7b")
    config.model.update(dtype="bfloat16", remat="block")
    config.data.update(batch_size=512, sequence_length=4096)
    config.mesh.update(fsdp=8, expert_limit=8)
    config.optimizer.update(name="adamw", learning_rate=3e-4, schedule="cosine", warmup_steps=2000, weight_decay=0.1,
                            beta1=0.9, beta2=0.95, clip_norm=1.0)
    config.training.update(num_steps=480_000, output_z_weight=0.0)
    return config
