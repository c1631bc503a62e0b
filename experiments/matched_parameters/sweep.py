"""DeepSeekMoE, table 1: dense, hash, Switch, GShard, and fine-grained experts with a shared one."""

from experiments.base import SCALES, get_config
from moe_jax.sweeps import Sweep, falls

# All mixtures hold 16 experts of width 128 per layer, in all layers. Dense, hash and Switch compute one per token, GShard and
# the fine-grained one (63 of a quarter of the width and one shared, 7 + 1 chosen) two.
SWEEP = Sweep(
    number=2,
    title="Matched total parameters",
    question="Of models with equally many parameters, which routing gives the lowest loss?",
    paper="Dai et al. 2024 (DeepSeekMoE), table 1",
    config=get_config,
    settings={"moe.every": 1, "moe.num_experts": 16, "moe.d_ff": 128, "moe.dispatch": "dropless"},
    arms={
        "dense": {"moe.num_experts": 0},
        "hash": {"moe.router": "hash", "moe.experts_per_token": 1, "moe.balance_weight": 0.0, "moe.router_z_weight": 0.0},
        "switch": {"moe.experts_per_token": 1},
        "gshard": {"moe.experts_per_token": 2, "moe.renormalize": True},
        "fine_shared": {"moe.num_experts": 63, "moe.experts_per_token": 7, "moe.num_shared_experts": 1, "moe.d_ff": 32},
    },
    expected=(falls("ce", "dense", "hash", "switch", "gshard", "fine_shared"),),
    metrics=("ce", "load_max", "seconds_per_step"),
    published={"dense": 2.060, "hash": 1.932, "switch": 1.881, "gshard": 1.867, "fine_shared": 1.808},
    published_metric="Pile loss",
    scales=SCALES | {"smoke": SCALES["smoke"].but({"moe.d_ff": 16})},
)
