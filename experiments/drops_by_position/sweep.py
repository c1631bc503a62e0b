"""Xue et al. 2024 (OpenMoE), figure 12: buffers fill from the left, so late tokens lose their experts, and on text unlike the
training data far more of them.

Trained on code alone, or on code and documentation alike; every model is evaluated on held-out rows of either kind, and on text
of made-up words (``unlike``).
"""

import dataclasses

import numpy as np

from experiments.base import SCALES, get_config
from moe_jax.analysis.positions import drops
from moe_jax.analysis.recording import RoutingRecord, record_routing
from moe_jax.sweeps import Evaluate, Sweep, TrainedModel, falls, reported, rises

DOMAINS = ("code", "docs")


def rows_of(record: RoutingRecord, domain: int) -> RoutingRecord:
    """The rows that hold text of this domain alone: what finds a place depends on the whole row. There must be one."""
    others = np.bincount(record.rows_T, record.domains_T != domain)
    kept_T = others[record.rows_T] == 0
    arrays = {}
    for field in dataclasses.fields(record):
        values = getattr(record, field.name)
        if isinstance(values, np.ndarray):
            arrays[field.name] = values[:, kept_T] if values.ndim > 1 else values[kept_T]
    return dataclasses.replace(record, **arrays)


def drops_by_quarter(record: RoutingRecord) -> dict[str, float]:
    """Dropped choices over made ones, all layers: of the whole row, of its first quarter and of its last."""
    table = drops([record])
    size = table["position"].max() + 1
    parts = {"drops": table["position"] >= 0, "first_quarter": table["position"] < size / 4,
             "last_quarter": table["position"] >= size * 3 / 4}
    return {name: float(table["dropped"][part].sum() / table["choices"][part].sum()) for name, part in parts.items()}


def by_position(trained: TrainedModel) -> dict[str, float]:
    """``<domain>/drops``, ``<domain>/first_quarter``, ``<domain>/last_quarter``; without a domain: of all text."""
    record = record_routing(trained.run, trained.params, trained.bias_LE, trained.step, trained.batches(), trained.mode)
    found = drops_by_quarter(record)
    for domain in set(DOMAINS) & set(record.domains):
        part = drops_by_quarter(rows_of(record, record.domains.index(domain)))
        found |= {f"{domain}/{name}": value for name, value in part.items()}
    return found


LONGER = {"data.sequence_length": {"smoke": 64, "quick": 512, "full": 512}, "data.batch_size": 2}
# A source with domains of its own; the weights of training would name none of them.
UNLIKE = {"data.source": "synthetic", "data.domain_weights": "", "data.max_bytes": 1_000_000}
ROOMY = {"moe.eval_capacity_factor": 2.0}


def arms() -> dict:
    buffers = {"moe.dispatch": "gather", "moe.capacity_factor": 1.25, "moe.eval_dispatch": "gather", "moe.eval_capacity_factor": 1.25}
    found = {"code": {**buffers, "data.domain_weights": "code=1"}, "both": {**buffers, "data.domain_weights": "code=1,docs=1"}}
    found["code-long"] = {**found["code"], **LONGER}
    for name in ("code", "both"):
        found[f"{name}-on-unlike"] = Evaluate(name, UNLIKE)
    found["code-roomy"] = Evaluate("code", ROOMY)
    found["code-roomy-on-unlike"] = Evaluate("code", {**ROOMY, **UNLIKE})
    found["code-on-longer"] = Evaluate("code", LONGER)
    return found


SWEEP = Sweep(
    number=9,
    title="Drops by position, on other text, in longer contexts",
    question="Which tokens find no place, and is it worse on text that the router was not balanced on?",
    paper="Xue et al. 2024 (OpenMoE), figure 12a",
    config=get_config,
    settings={"moe.experts_per_token": 2, "training.eval_batches": 150},
    arms=arms(),
    expected=(
        rises("drops", ("code", "code/first_quarter"), ("code", "code/last_quarter")),
        rises("drops", ("code", "docs/first_quarter"), ("code", "docs/last_quarter")),
        rises("drops", ("code", "code/drops"), ("code", "docs/drops")),
        rises("drops", ("code", "code/last_quarter"), ("code", "docs/last_quarter")),
        rises("drops", ("code", "code/drops"), "code-on-unlike"),
        falls("drops", ("code", "docs/drops"), ("both", "docs/drops")),
        falls("drops", "code-on-unlike", "code-roomy-on-unlike"),
        rises("drops", ("code-long", "code/first_quarter"), ("code-long", "code/last_quarter")),
        reported("drops", ("code", "code/last_quarter"), ("code-on-longer", "code/last_quarter")),
        reported("drops", ("code-long", "code/last_quarter"), ("code-on-longer", "code/last_quarter")),
    ),
    metrics=("drops", "code/first_quarter", "code/last_quarter", "docs/first_quarter", "docs/last_quarter", "ce"),
    scales={**SCALES, "smoke": SCALES["smoke"].but({"data.source": "standard_library", "data.max_bytes": 1_000_000,
                                                    "data.validation_fraction": 0.2, "training.eval_batches": 40})},
    measure=by_position,
)
