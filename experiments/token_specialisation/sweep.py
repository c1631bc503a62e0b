"""Xue et al. 2024 (OpenMoE): routing follows the token id, hardly the position or the topic, and is settled early in training;
Muennighoff et al. 2024 (OLMoE): how early (router saturation)."""

import dataclasses

from moe_jax.analysis.over_training import saturation
from moe_jax.analysis.recording import RoutingRecord, record_routing
from moe_jax.analysis.spread import std_over_experts
from moe_jax.sweeps import Sweep, TrainedModel, reported, rises
from moe_jax.training.state import new_state

from experiments.base import SCALES, get_config

TOKENS, TOKENS_OVER_TRAINING = 65_536, 16_384
LEAST_OCCURRENCES = 128  # OpenMoE, figures 13 and 14
SHARES = (0.05, 0.1, 0.4)  # of training, at which routing is compared with that at its end


def measure(model: TrainedModel) -> dict[str, float]:
    """``std/<kind>``: standard deviation over experts of the routing ratio, mean over token ids, positions, domains and layers;
    ``std/<kind>/chance``: the same with the tokens' kinds dealt anew. ``saturation@<share>``: see :func:`saturation_metrics`."""
    last, metrics = record(model, TOKENS), {}
    for kind, value_T in (("token", last.token_ids_T), ("position", last.positions_T), ("domain", last.domains_T)):
        mean = std_over_experts(last, value_T, kind, LEAST_OCCURRENCES).headlines[0]
        metrics |= {f"std/{kind}": mean.value, f"std/{kind}/chance": mean.reference}
    return metrics | saturation_metrics(model)


def saturation_metrics(model: TrainedModel) -> dict[str, float]:
    """The share of a token's final experts that it had before training (``saturation@0%``) and after a share of it, mean over
    layers; ``…/first``, ``…/last``: of one layer; ``…/chance``: of independent choices with the loads of both steps."""
    fresh = new_state(model.config, model.run.vocab_size, model.run.mesh)
    steps = model.steps()
    found = {share: min(steps, key=lambda step: abs(step - share * model.step)) for share in SHARES}
    records = [record(dataclasses.replace(model, params=fresh["params"], bias_LE=fresh["router_bias_LE"], step=0), TOKENS_OVER_TRAINING)]
    records += [record(model.at_step(step), TOKENS_OVER_TRAINING) for step in sorted({*found.values(), model.step})]
    table, metrics = saturation(records), {}
    for share, step in {0.0: 0, **found}.items():
        rows, name = table.where(step=step), f"saturation@{share:.0%}"
        metrics |= {name: rows["saturation"].mean(), f"{name}/chance": rows["independent"].mean(),
                    f"{name}/first": rows["saturation"][0], f"{name}/last": rows["saturation"][-1]}
    return metrics


def record(model: TrainedModel, tokens: int) -> RoutingRecord:
    batches = model.batches(-(-tokens // model.config.tokens_per_step))
    return record_routing(model.run, model.params, model.bias_LE, model.step, batches, model.mode)


def orders(arm: str):
    """The same claims of each arm."""
    of = lambda metric: (arm, metric)
    return (
        rises("std/token", {of("std/token/chance"): 2.0}, of("std/token"), paper="OpenMoE, figure 14"),
        rises("std/token", {of("std/position"): 2.0}, of("std/token"), paper="OpenMoE, figures 13 and 14"),
        rises("std/token", {of("std/domain"): 2.0}, of("std/token"), paper="OpenMoE, figure 5"),
        rises("saturation", {of("saturation@10%/chance"): 2.0}, of("saturation@10%"), paper="OLMoE, figure on saturation"),
        rises("saturation", of("saturation@10%"), of("saturation@40%")),
        rises("saturation", of("saturation@10%/first"), of("saturation@10%/last"), paper="OLMoE: later layers saturate earlier"),
        reported("saturation", of("saturation@0%/chance"), of("saturation@0%")),
    )


CHECKPOINTS = {"training.checkpoint_every": {"smoke": 3, "quick": 25, "full": 50}, "training.keep_checkpoints": 20}

SWEEP = Sweep(
    number=10,
    title="Token id against position, and early saturation",
    question="Does routing follow the token id rather than its place or topic, and how early in training is it settled?",
    paper="Xue et al. 2024 (OpenMoE), figures 5 and 9 to 14; Muennighoff et al. 2024 (OLMoE), router saturation",
    config=get_config,
    settings={"moe.every": 1},
    arms={
        "openmoe": {**CHECKPOINTS, "moe.num_experts": 16, "moe.experts_per_token": 2,
                    "moe.d_ff": {"smoke": 16, "quick": 64, "full": 64}},
        "olmoe": {**CHECKPOINTS, "moe.num_experts": 32, "moe.experts_per_token": 4, "moe.d_ff": {"smoke": 8, "quick": 32, "full": 32},
                  "moe.dispatch": "dropless", "moe.router_z_weight": 1e-3},
    },
    expected=(*orders("openmoe"), *orders("olmoe")),
    metrics=("ce", "std/token", "std/token/chance", "std/position", "std/position/chance", "std/domain", "saturation@0%",
             "saturation@5%", "saturation@10%", "saturation@10%/chance", "saturation@40%"),
    measure=measure,
    scales={**SCALES, "smoke": SCALES["smoke"].but({"data.batch_size": 16})},  # fewer batches to record
)
