"""Xue et al. 2024 (OpenMoE): the choices of its recipe, one changed at a time. All are evaluated on the same held-out causal text."""

from experiments.base import SCALES, get_config
from moe_jax.sweeps import Sweep, falls, reported


def code_share(percent: int) -> dict:
    """So much of the training rows is code, the rest documentation."""
    return {"data.domain_weights": f"code={percent},docs={100 - percent}"}


SWEEP = Sweep(
    number=16,
    title="OpenMoE's recipe: objective, distance of MoE layers, share of code",
    question="What do UL2, more layers of experts, and code in the training text give?",
    paper="Xue et al. 2024 (OpenMoE), ablation of the recipe",
    config=get_config,
    settings={"moe.num_experts": 16, "moe.experts_per_token": 2},
    arms={
        "every-2": {},
        "ul2": {"data.objective": "openmoe"},
        "dense": {"moe.num_experts": 0},
        "every-4": {"moe.every": {"smoke": 2, "quick": 4, "full": 4}},
        "every-1": {"moe.every": 1},
        "code-0": code_share(0),
        "code-10": code_share(10),
        "code-50": code_share(50),
    },
    expected=(
        falls("ce", "every-2", "ul2", paper="OpenMoE: TriviaQA, F1 from 0 to 4.5"),
        falls("ce", "dense", "every-4", "every-2", "every-1"),
        reported("seconds_per_step", "every-4", "every-2", "every-1"),
        falls("ce/code", "code-0", "code-10", "code-50"),
        falls("ce/docs", "code-0", "code-50", paper="OpenMoE: TriviaQA, F1 from 1.1 to 4.5"),
    ),
    metrics=("ce", "ce/code", "ce/docs", "ce/tests", "seconds_per_step"),
    scales={
        # The smoke test's usual text has no domain of code; rows of bytes are too short for the spans of UL2.
        "smoke": SCALES["smoke"].but({"data.source": "standard_library", "data.max_bytes": 1_000_000, "data.sequence_length": 64, "data.validation_fraction": 0.3,
                                      "data.batch_size": 16, "training.eval_batches": 40}),
        "quick": SCALES["quick"].but({"moe.d_ff": 64}),
        "full": SCALES["full"].but({"moe.d_ff": 64}),
    },
)
