"""Xue et al. 2024 (OpenMoE): later turns and few-shot prompts come out worse. Is it the dropped tokens? A dense model knows."""

from experiments.base import SCALES, get_config
from experiments.multi_turn.conversations import measure
from moe_jax.sweeps import Evaluate, Sweep, equal, falls, rises

# Factors of 1.25 and 2.0 counted without K, as OpenMoE trains and evaluates, are 0.625 and 1.0 counted with it.
BUFFERS = ("1.25", "1", "0.625")


def with_buffers(start: str, factor: str) -> Evaluate:
    return Evaluate(start, {"moe.eval_dispatch": "gather", "moe.eval_capacity_factor": float(factor)})


COSTS = ("cost/multi-turn", "cost/few-shot")

SWEEP = Sweep(
    number=17,
    title="Several turns and few-shot prompts, with buffers and dropless",
    question="Do answers late in a conversation suffer because experts drop their tokens?",
    paper="Xue et al. 2024 (OpenMoE), MT-Bench and figure 12",
    config=get_config,
    settings={"moe.num_experts": 16, "moe.experts_per_token": 2, "data.validation_fraction": 0.2},
    arms={
        "dense": {"moe.num_experts": 0},
        "moe": {"moe.dispatch": "gather", "moe.capacity_factor": 1.25},
        **{f"moe-buffers-{factor}": with_buffers("moe", factor) for factor in BUFFERS},
        "dropless": {"moe.dispatch": "dropless"},
        "dropless-buffers-1": with_buffers("dropless", "1"),
    },
    expected=(
        rises("drops", ("moe-buffers-1", "drops/single"), ("moe-buffers-1", "drops/multi-turn"), paper="OpenMoE, figure 12"),
        rises("drops", ("moe-buffers-1", "drops/single"), ("moe-buffers-1", "drops/few-shot"), paper="OpenMoE, figure 12"),
        *(rises(cost, "moe", "moe-buffers-1.25", "moe-buffers-1", "moe-buffers-0.625") for cost in COSTS),
        *(rises(cost, "dropless", "dropless-buffers-1") for cost in COSTS),
        *(rises(cost, "dense", "moe-buffers-1") for cost in COSTS),
        *(equal(cost, "dense", dropless, within=0.03) for cost in COSTS for dropless in ("moe", "dropless")),
        falls("ce", "dense", "moe"),
    ),
    metrics=("ce", "answers/single", "answers/second", "answers/multi-turn", "answers/few-shot", "cost/multi-turn", "cost/few-shot",
             "drops/single", "drops/second", "drops/multi-turn", "drops/few-shot"),
    published={"dense": "-1.54", "moe-buffers-1": "-1.43"},
    published_metric="MT-Bench, second turn minus first (TinyLlama; OpenMoE)",
    measure=measure,
    scales={
        # A turn is about a hundred bytes, too many for the smoke test's usual rows; its usual text has no documentation.
        "smoke": SCALES["smoke"].but({"data.source": "standard_library", "data.max_bytes": 6_000_000, "data.sequence_length": 512,
                                      "data.batch_size": 4}),
        **{scale: SCALES[scale].but({"data.sequence_length": 256, "data.batch_size": 4, "training.eval_batches": 40, "moe.d_ff": 64})
           for scale in ("quick", "full")},
    },
)
