"""openmoe_tiny trained by OpenMoE's UL2 mixture (Xue et al. 2024): half of the rows prefix LM, the rest span corruption.

The loss is of the targets alone, attention causal as in OpenMoE's code; data.prefix_attention="bidirectional" lets the given
part see itself from both sides. Validation stays causal text, so that its loss compares with that of openmoe_tiny, and the
models are equally large: 259 bytes and marks and 31 sentinels are 290 ids, and both tables have 320 rows. `objective/ce` is
the held-out loss of the mixture itself.

    moe-jax train --config=configs/openmoe_ul2_tiny.py --workdir=runs/ul2
"""

from ml_collections import ConfigDict

from configs.openmoe_tiny import get_config as openmoe_tiny


def get_config() -> ConfigDict:
    config = openmoe_tiny()
    config.data.update(objective="openmoe")
    return config
