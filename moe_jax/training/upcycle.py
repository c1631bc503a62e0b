"""Sparse upcycling (Komatsuzaki et al. 2023): a dense run goes on as a mixture of experts.

Every dense weight is copied; each expert of a layer that becomes a mixture is a copy of that layer's feed-forward
network; the routers are new and random. Where a token's gates sum to 1 and nothing is dropped, the new model computes what
the dense one did; where they sum to s, the feed-forward part of every MoE layer is s times as large.
"""

import dataclasses
import pathlib
import re
import zlib
from typing import Any

import jax
import numpy as np
import optax

from moe_jax.config import Config, ConfigError, resolve
from moe_jax.data.batches import open_data
from moe_jax.models.decoder import is_stacked, layer_paths
from moe_jax.nn.activations import CLAMP
from moe_jax.sharding import AXES, make_mesh
from moe_jax.training.checkpoint import Checkpointer, CheckpointError
from moe_jax.training.named_arrays import flatten
from moe_jax.training.new_run import new_run_directory, require_absent, restore_on_host
from moe_jax.training.run import read_config, write_json
from moe_jax.training.state import TrainState, initial_state, table_size

# In a run that was upcycled: from what, and how.
UPCYCLING_FILE = "upcycling.json"

# What may differ between the dense model and the mixture: how it is computed, and how what is new is drawn.
_FREE = ("attention", "dtype", "remat", "scan_layers", "init_scale", "embedding_init")
# Moments that mirror the parameters can be copied like them.
_WITH_MIRRORED_MOMENTS = ("adamw", "sgd")


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """How a dense run is upcycled.

    Attributes:
      expert_noise: standard deviation of Gaussian noise, in units of the weights, added to every expert's copy; 0: the
        experts are equal, and what the router sends them makes them differ (the paper's choice).
      carry_optimizer: the moments of the dense run go on, an expert's being copies of its network's; otherwise they start
        at 0. (The paper found them of use in vision, not in language.)
      restart: count steps, schedule and data from 0; otherwise all three go on where the dense run ended, as in the paper.
    """

    expert_noise: float = 0.0
    carry_optimizer: bool = False
    restart: bool = False

    def __post_init__(self):
        if not 0 <= self.expert_noise < float("inf"):
            raise ConfigError(f"expert_noise={self.expert_noise!r}: a standard deviation; must be at least 0 and finite.")


def check_upcyclable(dense: Config, config: Config) -> None:
    """Refuses a config whose experts cannot be copies of the dense model's feed-forward networks.

    Raises:
      ConfigError: with the setting and the reason.
    """
    model, moe = dense.model, config.moe
    for name, one in (("the dense run's", dense), ("the new", config)):
        if one.model.architecture == "lstm":
            raise ConfigError(f"model.architecture='lstm': {name} model is an LSTM, whose layers have no feed-forward network that "
                              f"experts could be copies of; upcycling is for transformers.")
    if dense.moe_layers:
        raise ConfigError(f"moe.num_experts={dense.moe.num_experts}: the run to start from is a mixture of experts already; "
                          f"upcycling starts from a dense one (moe.num_experts=0).")
    if not config.moe_layers:
        raise ConfigError("moe.num_experts=0: the new config is dense; set it to the number of copies of each "
                          "feed-forward network.")
    # Where all networks become experts, biases are theirs alone.
    free = _FREE if config.has_dense_networks else (*_FREE, "mlp_bias")
    for section, before, after in (("model", model, config.model), ("attention", dense.attention, config.attention)):
        for field in dataclasses.fields(before):
            old, new = getattr(before, field.name), getattr(after, field.name)
            if old != new and (section != "model" or field.name not in free):
                raise ConfigError(f"{section}.{field.name}={new!r}: the dense run was trained with {old!r}, and its weights are "
                                  f"copied; set it to that.")
    if model.mlp_bias and not moe.expert_bias:
        raise ConfigError("moe.expert_bias=False: the copied networks have biases (model.mlp_bias); set it to True.")
    if moe.expert_widths:
        raise ConfigError(f"moe.expert_widths={moe.expert_widths!r}: each expert is a copy of a dense feed-forward network, so all "
                          f"are as wide as it; set it to '' and moe.d_ff={model.d_ff}.")
    if moe.d_ff != model.d_ff:
        raise ConfigError(f"moe.d_ff={moe.d_ff}: each expert is a copy of a dense feed-forward network, which is {model.d_ff} "
                          f"wide; set it to that. (Slices of it, for finer experts, compute another function at any gates "
                          f"but equal ones, and are not made.)")
    if moe.activation != model.activation:
        raise ConfigError(f"moe.activation={moe.activation!r}: the copied networks were trained with {model.activation!r}; set "
                          f"it to that.")
    if moe.activation == "swiglu_clamped" and (moe.activation_limit, moe.activation_alpha) != CLAMP:
        raise ConfigError(f"moe.activation_limit={moe.activation_limit}, moe.activation_alpha={moe.activation_alpha}: the copied "
                          f"networks were trained with {CLAMP[0]} and {CLAMP[1]}; set them to that.")
    if moe.gate_on == "input":
        raise ConfigError("moe.gate_on='input': networks are not linear, so that copies of one on a token times its gates do not "
                          "add up to it on the token; set it to 'output'.")
    if moe.router == "hash" and moe.experts_per_token > 1:
        raise ConfigError(f"moe.experts_per_token={moe.experts_per_token}: moe.router='hash' gives each choice a gate of 1, so that "
                          f"the copies would add up to {moe.experts_per_token} times the dense network; set it to 1.")
    beside = {"num_shared_experts": 0, "residual_ffn": "none", "num_identity_experts": 0, "num_zero_experts": 0,
              "num_constant_experts": 0, "expert_copies": 0}
    for name, none in beside.items():
        if getattr(moe, name) != none:
            raise ConfigError(f"moe.{name}={getattr(moe, name)!r}: the dense network has nothing to start it from: the "
                              f"experts are its copies already, and what stands beside them would change or double the output; "
                              f"set it to {none!r}.")


class _Source:
    """The dense state by layer: where the new state's arrays come from.

    dense: arrays by path, as :func:`moe_jax.training.named_arrays.flatten` names them.
    """

    def __init__(self, dense: dict[str, Any], dense_config: Config, config: Config):
        self.dense, self.config, self.layers = dense, config, layer_paths(config)
        # Biases of experts are new, and 0, where the networks have none.
        self.copied = re.compile(rf"moe/experts/([{'wb' if dense_config.model.mlp_bias else 'w'}]_\w+)_E(\w+)")
        self.places = {layer: (where, row) for where, layers in layer_paths(dense_config).items()
                       for row, layer in enumerate(layers)}

    def array(self, path: str) -> np.ndarray | None:
        """The array of a parameter, or of what mirrors one: copied, with one copy per expert. None: it is new.

        Raises:
          KeyError: the dense state has no such array, though it has no router.
        """
        where = next((where for where in self.layers if f"/{where}/" in f"/{path}"), None)
        if where is None:
            return np.asarray(self.dense[path])
        head, name = path.split(f"{where}/", 1)
        is_expert = self.copied.fullmatch(name)
        if name.startswith("moe/") and not is_expert:
            return None
        if is_expert:
            name = f"mlp/{is_expert.group(1)}_{is_expert.group(2)}"
        rows = [self._row(head, layer, name) for layer in self.layers[where]]
        if is_expert:
            rows = [np.broadcast_to(row, (self.config.moe.num_experts, *row.shape)) for row in rows]
        return np.stack(rows) if is_stacked(where) else np.array(rows[0])

    def _row(self, head: str, layer: int, name: str) -> np.ndarray:
        where, row = self.places[layer]
        array = np.asarray(self.dense[f"{head}{where}/{name}"])
        return array[row] if is_stacked(where) else array


def upcycled(dense: TrainState, dense_config: Config, config: Config, vocab_size: int,
             how: Upcycling = Upcycling()) -> TrainState:
    """The training state of the mixture ``config`` made of a dense run's, on the host.

    Args:
      dense: the dense run's whole state. vocab_size: rows of its embedding table.

    Raises:
      ConfigError: the two do not fit (:func:`check_upcyclable`), or the optimizers do not (``how.carry_optimizer``).
    """
    check_upcyclable(dense_config, config)
    source = _Source(flatten(dense), dense_config, config)
    shapes = jax.eval_shape(lambda: initial_state(config, vocab_size))
    state = {}
    for path in flatten(shapes):
        kind = path.split("/", 1)[0]
        if kind == "params":
            array = source.array(path)
        elif kind == "ema":
            array = source.array(path if "ema" in dense else path.replace("ema/", "params/", 1))
        elif kind == "opt_state" and how.carry_optimizer:
            array = _carried(source, path, dense_config, config)
        else:
            array = None
        if array is not None and kind != "opt_state":
            array = _with_noise(array, path, config, how.expert_noise)
        if array is not None:
            state[path] = array
    state |= _drawn(config, vocab_size, [path for path in flatten(shapes) if path not in state])
    state = jax.tree.unflatten(jax.tree.structure(shapes), [state[path] for path in flatten(shapes)])
    step = np.int32(0 if how.restart else dense["step"])
    return {**state, "step": step, "opt_state": _schedule_from(state["opt_state"], step)}


def _carried(source: _Source, path: str, dense: Config, config: Config) -> np.ndarray | None:
    """An array of the dense run's optimizer, or None for those of new parameters."""
    if config.optimizer.name not in _WITH_MIRRORED_MOMENTS:
        raise ConfigError(f"optimizer.name={config.optimizer.name!r}: its moments are factored and have no shares to copy to "
                          f"experts; start them at 0, or train with {' or '.join(map(repr, _WITH_MIRRORED_MOMENTS))}.")
    try:
        return source.array(path)
    except KeyError:
        raise ConfigError(f"optimizer.name={config.optimizer.name!r}: the dense run ({dense.optimizer.name!r}) has no {path!r} to "
                          f"carry over; use its optimizer, with momentum, weight_decay and clip_norm on where they were on, or "
                          f"start the moments at 0.") from None


def _with_noise(array: np.ndarray, path: str, config: Config, scale: float) -> np.ndarray:
    """Experts' weights with noise, the same for the parameters and their running mean."""
    name = path.split("/", 1)[1]
    if not scale or "/moe/experts/" not in path:
        return array
    noise = np.random.default_rng([config.training.seed, zlib.crc32(name.encode())])
    return array + scale * noise.standard_normal(array.shape, np.float32)


def _drawn(config: Config, vocab_size: int, paths: list[str]) -> dict[str, np.ndarray]:
    """So much of the initial state of a new run; only this is computed."""
    with jax.set_mesh(make_mesh(dict.fromkeys(AXES, 1))):
        return jax.jit(lambda: {path: leaf for path, leaf in flatten(initial_state(config, vocab_size)).items()
                                if path in paths})()


def _schedule_from(opt_state: Any, step: np.int32) -> Any:
    """The learning rate goes by the run's steps, however many updates the moments have seen."""
    is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)
    return jax.tree.map(lambda node: node._replace(count=step) if is_schedule(node) else node, opt_state, is_leaf=is_schedule)


def write_upcycled_run(source: pathlib.Path, config: Config, target: pathlib.Path, how: Upcycling = Upcycling()) -> int:
    """A new run directory whose checkpoint is the upcycled one of ``source``; training goes on there with ``config``.

    Returns:
      The step it stands at.

    Raises:
      RunError: ``source`` is no run, ``target`` is there already, or cannot be written. CheckpointError: no checkpoint is
      good, or the vocabularies differ. ConfigError: :func:`upcycled`, or nothing would be left to train. CorpusError.
    """
    require_absent(target, "an upcycled")
    dense_config = resolve(read_config(source))
    check_upcyclable(dense_config, config)
    restored = restore_on_host(source, dense_config)
    step = 0 if how.restart else restored.step
    if step >= config.training.num_steps:
        raise ConfigError(f"training.num_steps={config.training.num_steps}: the dense run is at step {step} and the new one goes "
                          f"on from there; set it above {step}, or count from 0 with --restart.")
    metadata = restored.metadata
    data = open_data(config.data, str(source))
    if data.vocabulary.fingerprint != metadata["vocabulary"]:
        raise CheckpointError(f"The checkpoint of step {restored.step} in {source} was trained with another vocabulary than "
                              f"data.vocabulary={config.data.vocabulary!r} of the new config; token ids would mean other text.")
    vocab_size = metadata["vocab_size"]
    if table_size(config, data.vocabulary.vocab_size) != vocab_size:
        raise ConfigError(f"model.vocab_size={config.model.vocab_size}: the dense run's table has {vocab_size} rows; set it to that.")
    state = upcycled(restored.state, dense_config, config, vocab_size, how)
    with new_run_directory(target) as partial:
        with Checkpointer(partial / "checkpoints", keep=1) as checkpointer:
            checkpointer.save(step, state, {  # as the loop writes it; not evaluated yet
                **metadata, "config": config.to_dict(), "data_step": step, "data_fingerprint": data.fingerprint,
                "tokens_seen": 0 if how.restart else metadata["tokens_seen"], "evaluated_step": 0})
        write_json(partial / "config.json", config.to_dict())
        write_json(partial / UPCYCLING_FILE, {"from": str(source), "from_step": restored.step, **dataclasses.asdict(how)})
    return step
