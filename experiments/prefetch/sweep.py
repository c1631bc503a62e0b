"""Which experts will the next layer want? Predictors of systems that keep experts in slow memory (HOBBIT, AdapMoE, ProMoE)."""

from moe_jax.analysis.prediction import prediction_recall
from moe_jax.analysis.recording import record_routing
from moe_jax.sweeps import Sweep, TrainedModel, reported, rises

from experiments.base import SCALES, get_config

TOKENS = 65_536


def measure(model: TrainedModel) -> dict[str, float]:
    """``recall/<predictor>``: share of a token's K experts among the K predicted, mean over layers but the first, on documents
    that the predictor was not fitted on; ``recall@2k/…``: among twice as many. ``random`` is exact."""
    batches = model.batches(-(-TOKENS // model.config.tokens_per_step))
    record = record_routing(model.run, model.params, model.bias_LE, model.step, batches, model.mode)
    metrics = {}
    for name, prefetched in (("recall", record.experts_per_token), ("recall@2k", 2 * record.experts_per_token)):
        metrics[f"{name}/random"] = prefetched / record.num_experts
        found = prediction_recall(record, prefetched)
        metrics |= {f"{name}/{predictor.replace(' ', '-')}": float(interval.value) for predictor, interval in found.items()
                    if " - " not in predictor}
    return metrics


def orders(arm: str):
    """The same claims of each arm."""
    of = lambda predictor: (arm, f"recall/{predictor}")
    return (rises("recall", of("random"), of("popularity"), of("transition"), of("next-layer-router")),
            reported("recall", of("popularity"), of("previous-token")))


SWEEP = Sweep(
    number=14,
    title="Predicting the next layer's experts",
    question="How well are the experts of the next layer known before its router has run?",
    paper="HOBBIT, AdapMoE, ProMoE, as surveyed in the literature on offloading",
    config=get_config,
    settings={"moe.every": 1},
    arms={
        "top-1": {"moe.num_experts": 16, "moe.experts_per_token": 1},
        "top-2": {"moe.num_experts": 16, "moe.experts_per_token": 2, "moe.d_ff": {"smoke": 16, "quick": 64, "full": 64}},
        "top-4": {"moe.num_experts": 32, "moe.experts_per_token": 4, "moe.d_ff": {"smoke": 8, "quick": 32, "full": 32}},
    },
    expected=(*orders("top-1"), *orders("top-2"), *orders("top-4")),
    metrics=("ce", "recall/random", "recall/popularity", "recall/previous-token", "recall/transition", "recall/next-layer-router",
             "recall@2k/next-layer-router"),
    measure=measure,
    scales={**SCALES, "smoke": SCALES["smoke"].but({"data.batch_size": 16})},  # fewer batches to record
)
