"""OpenMoE-34B (Xue et al. 2024, arXiv:2402.01739), as its code has it: 46.3 B parameters, 10.0 B active per token.

The paper says 34 B: it counts three matrices per feed-forward network and one embedding; the code's swiglu has four, and
its output layer is a table of its own. Active without the two tables: 8.46 B (the paper: 6.0 or 6.4 B).

As configs/openmoe_8b.py, but for the dimensions, MoE in every fourth layer, groups of 8,192 tokens, a router z loss of
1e-3 (that of its last configuration; the paper: 1e-4) and 100,000 steps. The batch goes through in 4 parts (the code: 16).

    moe-jax plan --config=configs/openmoe_34b.py --slice=v5p-256
"""

from ml_collections import ConfigDict

from configs.openmoe_8b import get_config as openmoe_8b
from moe_jax import families


def get_config() -> ConfigDict:
    config = openmoe_8b()
    for section, values in families.settings("openmoe_code", "34b").items():
        config[section].update(values)
    config.mesh.update(fsdp=2, expert_limit=32, tensor=2)
    config.training.update(num_steps=100_000)
    return config
