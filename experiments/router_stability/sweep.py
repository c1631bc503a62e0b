"""What keeps routers stable: the z loss (ST-MoE, table 4), fp32 in the router (Switch, table 2), small initial weights
(Switch, table 3). The learning rate is 1.7 times that of the other experiments: what is stable anyway shows nothing."""

from experiments.base import SCALES, get_config
from moe_jax.sweeps import Sweep, equal, falls, reported, rises

SWEEP = Sweep(
    number=13,
    title="z loss, router precision, initial scale",
    question="Which of the published remedies for instability can be seen in a small model?",
    paper="Zoph et al. 2022 (ST-MoE), table 4; Fedus et al. 2022 (Switch), tables 2 and 3",
    config=get_config,
    settings={"optimizer.learning_rate": 1e-2, "moe.num_experts": 16, "moe.router_z_weight": 0.0},
    arms={
        "none": {},
        "z-loss": {"moe.router_z_weight": 1e-3},
        "strong-z-loss": {"moe.router_z_weight": 1e-1},
        "bfloat16-router": {"moe.router_dtype": "bfloat16"},
        "bfloat16-router-z-loss": {"moe.router_dtype": "bfloat16", "moe.router_z_weight": 1e-3},
        "small-init": {"model.init_scale": 0.1},
    },
    expected=(
        falls("logit_max", "none", "z-loss", paper="ST-MoE"),
        falls("logit_max", "z-loss", "strong-z-loss", paper="ST-MoE"),
        equal("ce", "none", "z-loss", within=0.03, paper="ST-MoE table 4"),
        rises("ce", "none", "bfloat16-router", paper="Switch table 2 (there the whole model is bfloat16)"),
        falls("ce", "none", "small-init", paper="Switch table 3"),
        reported("ce", "bfloat16-router", "bfloat16-router-z-loss"),
        reported("train/grad_norm", "none", "z-loss"),
    ),
    metrics=("ce", "logit_max", "confidence", "train/grad_norm"),
    scales=SCALES,
)
