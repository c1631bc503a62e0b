"""Zhou et al. 2022: experts choose their tokens. Among the tokens of one text each choice tells of later tokens.

``…-causal``: the same model as it would write, a token at a time: tokens choose, nothing is dropped.
"""

from experiments.base import SCALES, get_config
from moe_jax.analysis.leakage import future_leakage
from moe_jax.sweeps import Evaluate, Sweep, TrainedModel, equal, falls, minus, reported, rises

EXPERT_CHOICE = {"moe.router": "expert_choice", "moe.balance_weight": 0.0}
LOOKS_AHEAD = {**EXPERT_CHOICE, "moe.allow_noncausal_routing": True}
BATCHES, CUTS = 16, 8


def leakage(trained: TrainedModel) -> dict[str, float]:
    """``leakage``: see :func:`moe_jax.analysis.leakage.future_leakage`; routed as the arm is evaluated."""
    return {"leakage": future_leakage(trained.run, trained.params, trained.bias_LE, trained.batches(BATCHES), trained.mode, CUTS)}


TRAINED = {
    "token-choice": {},
    "expert-choice": LOOKS_AHEAD,
    "expert-choice-of-8": {**LOOKS_AHEAD, "moe.group_size": 8},
    "expert-choice-batch": {**EXPERT_CHOICE, "moe.group_over": "batch"},
}

SWEEP = Sweep(
    number=8,
    title="Expert choice in a decoder",
    question="How much does a decoder whose experts choose see of the future, and what is left of it when it writes?",
    paper="Zhou et al. 2022 (Expert Choice); Wang et al. 2024 on what leaks",
    config=get_config,
    # 16 rows of 64: over the batch each expert takes two of them at a position.
    settings={"moe.num_experts": 16, "moe.experts_per_token": 2, "moe.every": 1, "moe.dispatch": "dropless",
              "data.sequence_length": 64, "data.batch_size": 16},
    arms={**TRAINED, **{f"{name}-causal": Evaluate(name, causal=True) for name in TRAINED}},
    expected=(
        falls("train/ce", "token-choice", "expert-choice-of-8"),
        rises("ce", "token-choice-causal", "expert-choice-causal"),
        rises("ce", "expert-choice", "expert-choice-causal"),
        rises("ce", "expert-choice-of-8", "expert-choice-of-8-causal"),
        falls("ce", minus("expert-choice-of-8-causal", "expert-choice-of-8"),
              minus("expert-choice-batch-causal", "expert-choice-batch")),
        rises("leakage", "token-choice", "expert-choice", "expert-choice-of-8"),
        equal("leakage", "token-choice", "expert-choice-batch", within=1e-3),
        reported("ce", "token-choice-causal", "expert-choice-batch-causal"),
        reported("train/ce", "token-choice", "expert-choice"),
    ),
    metrics=("train/ce", "ce", "leakage"),
    scales=SCALES,
    measure=leakage,
)
