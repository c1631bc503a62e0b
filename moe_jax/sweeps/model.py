"""A trained model as sweeps look at it: its parameters, its data, its evaluation, its curve."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

from moe_jax.config import Config
from moe_jax.data.batches import open_data
from moe_jax.nn.moe import RoutingMode
from moe_jax.routing import has_fixed_choices
from moe_jax.sweeps.definition import SweepError
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.evaluate import Evaluator, loss_summary
from moe_jax.training.metrics import expert_load, read_metrics, routing_metrics
from moe_jax.training.run import Run, open_run, restore_params
from moe_jax.training.state import initial_params, table_size

CURVE_POINTS = 100
# Of the metrics of one evaluation, those over all layers; names without the leading "moe/".
_ROUTING = ("load_max", "load_min", "load_cv", "dead_experts", "drop_fraction", "entropy", "confidence", "logit_max",
            "choices_per_token")


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """What ``measure`` of a sweep is given.

    Attributes:
      arm, seed: of the sweep.
      run: with the config it is evaluated with, its data and the directory it was trained in.
      trained_config: what it was trained with.
      params, bias_LE: at the last step. step: that.
      lines: of metrics.jsonl.
      mode: how it is evaluated.
    """

    arm: str
    seed: int
    run: Run
    trained_config: Config
    params: Any
    bias_LE: jax.Array
    step: int
    lines: list[dict[str, Any]]
    mode: RoutingMode

    @property
    def config(self) -> Config:
        return self.run.config

    def batches(self, count: int | None = None):
        """Validation batches; ``training.eval_batches`` of them unless told."""
        return self.run.validation_batches(count or self.config.training.eval_batches)

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        run = self.run
        return Evaluator(run.config, run.vocab_size, run.data.vocabulary.bytes_per_token_V, run.data.domains, run.mesh)

    def sums(self, mode: RoutingMode | None = None) -> dict[str, Any]:
        """What :func:`moe_jax.training.evaluate.evaluation_sums` gives, over the validation batches."""
        return self.evaluator.sums(self.params, self.bias_LE, self.batches(), mode or self.mode)

    def at_step(self, step: int) -> "TrainedModel":
        """The same run at an earlier checkpoint (``training.keep_checkpoints`` must have kept it)."""
        abstract = dataclasses.replace(self.run, config=self.trained_config).abstract_state()
        name = "ema" if self.trained_config.training.ema_decay else "params"
        wanted = {key: value for key, value in abstract.items() if key in (name, "router_bias_LE")}
        state = Checkpointer(self.run.checkpoints, read_only=True).restore(wanted, step, only=tuple(wanted)).state
        return dataclasses.replace(self, params=params_for(self.config, self.run.vocab_size, state[name], self.arm),
                                   bias_LE=state["router_bias_LE"], step=step)

    def steps(self) -> list[int]:
        """Of the checkpoints that are kept, rising."""
        return Checkpointer(self.run.checkpoints, read_only=True).steps()


def open_trained(arm: str, seed: int, config: Config, workdir: pathlib.Path) -> TrainedModel:
    """The model that was trained in ``workdir`` with ``config``."""
    run = open_run(config, workdir)
    params, bias_LE, step = restore_params(run)
    return TrainedModel(arm, seed, run, config, params, bias_LE, step, read_metrics(workdir / "metrics.jsonl"),
                        RoutingMode.evaluation(config, record=True))


def under_other_settings(trained: TrainedModel, arm: str, config: Config, causal: bool) -> TrainedModel:
    """The model evaluated with another config: parameters without a place in it are left out, the vocabulary stays.

    Raises:
      SweepError: the config wants parameters that the model does not have, or in another shape.
    """
    run = trained.run
    data = run.data if config.data == run.config.data else _open_with_vocabulary(config, run)
    params = params_for(config, run.vocab_size, trained.params, arm)
    mode = RoutingMode.causal(config, record=True) if causal else RoutingMode.evaluation(config, record=True)
    if config.model.vocab_size not in (0, run.vocab_size):
        raise SweepError(f"arm {arm!r}: model.vocab_size={config.model.vocab_size}; the model has {run.vocab_size}.")
    return dataclasses.replace(trained, arm=arm, run=dataclasses.replace(run, config=config, data=data), params=params, mode=mode)


def _open_with_vocabulary(config: Config, run: Run):
    """Data of ``config``, in the ids that the run was trained with."""
    vocabulary = run.data.vocabulary
    data_config = config.data
    if hasattr(vocabulary, "model"):
        path = run.workdir / "vocabulary.model"
        path.write_bytes(vocabulary.model)
        data_config = dataclasses.replace(data_config, vocabulary=str(path))
    data = open_data(data_config, str(run.workdir))
    if data.vocabulary.fingerprint != vocabulary.fingerprint:
        raise SweepError(f"data.source={config.data.source!r}: brings a vocabulary of its own; the model was trained with another.")
    table_size(config, data.vocabulary.vocab_size)
    return data


def params_for(config: Config, vocab_size: int, params: Any, arm: str) -> Any:
    """Those of ``params`` that a model of this config has."""
    return _selected(params, jax.eval_shape(lambda: initial_params(config, vocab_size, jax.random.key(0))), arm)


def _selected(params: dict, wanted: dict, arm: str, path: str = "") -> dict:
    selected = {}
    for name, part in wanted.items():
        here = f"{path}/{name}" if path else str(name)
        if name not in params:
            raise SweepError(f"arm {arm!r}: its settings want the parameter {here}, which the trained model does not have.")
        if isinstance(part, dict):
            selected[name] = _selected(params[name], part, arm, here)
        elif params[name].shape != part.shape:
            raise SweepError(f"arm {arm!r}: its settings want the parameter {here} as {part.shape}, the trained model has "
                             f"{params[name].shape}.")
        else:
            selected[name] = params[name]
    return selected


# Numbers.


def evaluation_metrics(trained: TrainedModel) -> dict[str, float]:
    """``ce`` (nats per token), ``bits_per_byte``, ``ce/<domain>``, and where the model is a mixture how it routed the
    validation text; ``max_violation`` is the mean over layers (Wang et al. 2024), what else has layers as in metrics.jsonl."""
    sums = trained.sums()
    summary = loss_summary(sums, trained.run.data.domains)
    metrics = {"ce": summary["ce"]}
    if summary["bits_per_byte"] is not None:
        metrics["bits_per_byte"] = summary["bits_per_byte"]
    metrics |= {f"ce/{name}": part["ce"] for name, part in summary["domains"].items()}
    if not trained.config.moe_layers:
        return metrics
    tokens_L = np.maximum(sums["tokens_L"], 1.0)
    fixed = trained.config.moe.experts_per_token if has_fixed_choices(trained.config.moe) and not trained.mode.router else None
    routing = routing_metrics({**sums, "entropy_L": sums["entropy_L"] / tokens_L, "confidence_L": sums["confidence_L"] / tokens_L,
                               "valid_tokens": _routed_tokens(trained.config, sums, summary),
                               "layers": trained.config.moe_layers}, fixed)
    metrics |= {name: routing[f"moe/{name}"] for name in _ROUTING}
    metrics["max_violation"] = float(np.mean(expert_load(sums["counts_LE"]).max(axis=1) - 1.0))
    return metrics


def _routed_tokens(config: Config, sums: dict[str, Any], summary: dict[str, Any]) -> Any:
    """How many tokens each layer routed; an encoder's others than a decoder's, of which the loss is."""
    return sums["tokens_L"] if config.model.encoder_layers else summary["tokens"]


def training_metrics(lines: list[dict[str, Any]]) -> dict[str, float]:
    """``train/<name>``: means over the last quarter of the lines; ``train/max_violation`` also over layers (of single
    steps); ``seconds_per_step`` and ``tokens_per_second``: medians."""
    lines = [line for line in lines if line["kind"] == "train"]
    last = lines[-max(1, len(lines) // 4) :]
    metrics = {}
    for name, key in [("ce", "loss/ce"), ("balance", "loss/balance"), ("router_z", "loss/router_z"), ("grad_norm", "grad_norm"),
                      *((name, f"moe/{name}") for name in _ROUTING)]:
        values = [line[key] for line in last if line.get(key) is not None]
        if values:
            metrics[f"train/{name}"] = float(np.mean(values))
    violation = [value for line in last for key, value in line.items()
                 if key.startswith("moe/layer_") and key.endswith("/max_violation")]
    if violation:
        metrics["train/max_violation"] = float(np.mean(violation))
    for name, key in (("seconds_per_step", "step_seconds"), ("tokens_per_second", "tokens_per_second")):
        values = [line[key] for line in lines if line.get(key) is not None]
        if values:
            metrics[name] = float(np.median(values))
    return metrics


def curve(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Training loss by step, at most 100 points: means over equal runs of lines."""
    lines = [line for line in lines if line["kind"] == "train" and line.get("loss/ce") is not None]
    size = max(1, -(-len(lines) // CURVE_POINTS))
    parts = [lines[start : start + size] for start in range(0, len(lines), size)]
    return {"step": [part[-1]["step"] for part in parts],
            "train/ce": [round(float(np.mean([line["loss/ce"] for line in part])), 5) for part in parts]}
