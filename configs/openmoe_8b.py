"""OpenMoE-8B (Xue et al. 2024, arXiv:2402.01739), as its code has it: 11.9 B parameters, 3.8 B active per token.

The paper says 8.7 B: it counts three matrices per feed-forward network and one embedding; the code's swiglu has four, and
its output layer is a table of its own. Active without the two tables: 2.75 B (the paper: 2.1 B).

As the code: every dimension, 32 experts in every sixth layer with a dense network after them, top-2 without
renormalisation, first choices before second ones (moe.allow_noncausal_routing), capacity 1.25·T/E (2.0 in evaluation) in
groups of 4,096 tokens, padding routed like text, queries that start small instead of a division by √d, all loss weights,
Adafactor with 1/√step, 1,024 sequences of 2,048 tokens, 500,000 steps. The objective, UL2 for most of them, is not here:
this config trains causal language modelling. The batch goes through in 4 parts (the code: 8).

    moe-jax plan --config=configs/openmoe_8b.py --slice=v5p-128
"""

from ml_collections import ConfigDict

from configs.base import of_family


def get_config() -> ConfigDict:
    config = of_family("openmoe_code", "8b")
    config.model.update(dtype="bfloat16", remat="block")
    config.data.update(batch_size=1024, sequence_length=2048)
    config.mesh.update(fsdp=2, expert_limit=32)
    config.optimizer.update(name="adafactor", learning_rate=0.01, schedule="rsqrt", warmup_steps=10_000, weight_decay=0.0,
                            clip_norm=0.0)
    config.training.update(num_steps=500_000, microbatches=4, output_z_weight=1e-4)
    return config
