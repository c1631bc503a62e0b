"""A placement applied to a checkpoint: experts given other numbers, or copied (:mod:`moe_jax.dispatch.placement`).

*Renumbered*, a run goes on training as the same function: everything that has experts among its dimensions changes order.
*With copies*, a model evaluates and generates: its parameters hold one set of weights per copy, and the copies' table.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from moe_jax.config import Config, ConfigError, resolve
from moe_jax.dispatch.placement import Placement
from moe_jax.models.decoder import is_stacked, moe_layer_paths
from moe_jax.routing import ROUTERS
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.metrics import read_metrics
from moe_jax.training.named_arrays import flatten, nest
from moe_jax.training.new_run import new_run_directory, require_absent, restore_on_host, state_on_host
from moe_jax.training.run import Run, RunError, read_config, restore_params, write_json

# In a run that was renumbered: the numbers that its experts had in the first run.
ORDER_FILE = "expert_order.json"


def check_renumberable(config: Config) -> None:
    """Refuses a model whose experts cannot change places.

    Raises:
      ConfigError: with the reason.
    """
    moe = config.moe
    if ROUTERS[moe.router].by_number:
        raise ConfigError(f"moe.router={moe.router!r}: sends tokens to experts by their numbers, so experts given other "
                          f"numbers would get other tokens; copies keep the numbers (--redundant, without --apply).")
    if moe.padding == "takes_slots":
        raise ConfigError("moe.padding='takes_slots': padding goes to the first experts, whichever they are; experts given "
                          "other numbers would lose other slots to it.")
    if config.model.mtp_depth:
        raise ConfigError(f"model.mtp_depth={config.model.mtp_depth}: a placement has the experts of the model's layers, not "
                          f"those of multi-token prediction; copies need no new numbers (--redundant, without --apply).")


def check_placeable(config: Config) -> None:
    """Refuses a model without experts, or whose experts are not alike, with ConfigError."""
    if config.moe.is_dense:
        raise ConfigError("moe.num_experts=0: the model has no experts to place.")
    if config.moe.expert_widths:
        raise ConfigError(f"moe.expert_widths={config.moe.expert_widths!r}: experts of unequal width cannot take each "
                          f"other's places.")


# Other numbers.


def renumbered(flat: dict[str, Any], config: Config, placement: Placement) -> dict[str, Any]:
    """The training state, as :func:`moe_jax.training.named_arrays.flatten` names its arrays, with expert
    ``placement.expert_LP[l, e]`` of layer l as number e: weights, router, bias, and what the optimizer knows of them.

    Raises:
      ConfigError: experts that cannot change places. ValueError: copies, or groups that would be torn apart.
    """
    check_placeable(config)
    check_renumberable(config)
    order, paths = _orders(config, placement), moe_layer_paths(config)
    shapes = {path.removeprefix("params/"): leaf.shape for path, leaf in flat.items() if path.startswith("params/")}
    new = {path: _renumbered_array(path, leaf, shapes, paths, order) for path, leaf in flat.items()}
    new["router_bias_LE"] = np.take_along_axis(np.asarray(flat["router_bias_LE"]), order["E"], axis=1)
    return new


def _orders(config: Config, placement: Placement) -> dict[str, np.ndarray]:
    """By dimension letter the old number of each new one: E, those without computation stay last; X, their groups."""
    moe, expert_LE = config.moe, placement.expert_LP
    layers, size = len(config.moe_layers), moe.num_experts // moe.num_groups
    if not np.array_equal(np.sort(expert_LE, axis=1), np.tile(np.arange(moe.num_experts), (layers, 1))):
        raise ValueError(f"{expert_LE.shape[1]} copies of {moe.num_experts} experts in {len(expert_LE)} layers are no new "
                         f"order of the experts of {layers} layers")
    group_LXM = (expert_LE // size).reshape(layers, moe.num_groups, size)
    if (group_LXM != group_LXM[:, :, :1]).any():
        raise ValueError(f"moe.num_groups={moe.num_groups}: the placement tears groups of experts apart")
    rest = np.tile(np.arange(moe.num_experts, moe.num_routed_experts), (layers, 1))
    return {"E": np.concatenate([expert_LE, rest], axis=1), "X": group_LXM[:, :, 0]}


def _renumbered_array(path: str, leaf: Any, shapes: dict[str, tuple[int, ...]], paths: dict[str, tuple[int, ...]],
                      order: dict[str, np.ndarray]) -> Any:
    """One array of the state; as it is, if it has no experts among its dimensions.

    Args:
      shapes: of the parameters. paths: :func:`moe_jax.models.decoder.moe_layer_paths`. order: :func:`_orders`.
    """
    where = next((where for where in paths if f"/{where}/" in f"/{path}"), None)
    if where is None:
        return leaf
    layers, name = paths[where], where + f"/{path}".split(f"/{where}", 1)[1]
    letters, shape = name.rsplit("_", 1)[-1], shapes[name]
    letter = next((letter for letter in order if letters.isupper() and letter in letters), None)
    axes = None if letter is None else _axes_left(path, leaf.shape, shape)
    axis = None if axes is None else len(shape) - len(letters) + letters.index(letter)
    if axis is None or axis not in axes:
        return leaf
    value, place = np.asarray(leaf), axes.index(axis)
    # All that the router scores, or those that have weights.
    orders = [order[letter][layer][:shape[axis]] for layer in layers]
    if not is_stacked(where):
        return np.take(value, orders[0], axis=place)
    if 0 not in axes:
        raise RunError(f"{path} is one array for all layers, whose experts would change places differently; train with "
                       f"optimizer.name='adamw', or model.scan_layers=False.")
    return np.stack([np.take(row, order_E, axis=place - 1) for row, order_E in zip(value, orders)])


def _axes_left(path: str, shape: tuple[int, ...], parameter: tuple[int, ...]) -> list[int] | None:
    """Which dimensions of a parameter an array of the state has: all, one fewer (Adafactor's moments), or None."""
    axes = list(range(len(parameter)))
    if shape == parameter:
        return axes
    if shape == (1,):  # in the place of moments that are not factored, or not there
        return None
    # As optax: v_row is the mean over the largest dimension, v_col over the second.
    second, largest = np.argsort(parameter)[-2:]
    axes.remove(int(largest if "/v_row/" in path else second))
    if shape != tuple(parameter[axis] for axis in axes):
        raise ValueError(f"{path}: shape {shape} is unknown of a parameter of shape {parameter}")
    return axes


def write_renumbered_run(workdir: pathlib.Path, target: pathlib.Path, placement: Placement) -> int:
    """A new run directory whose newest checkpoint is that of ``workdir`` with its experts renumbered: training, evaluation
    and generation go on there as in any other. The curves so far come along. Returns the step.

    Raises:
      RunError: ``target`` is there already, or cannot be written. CheckpointError, ConfigError.
    """
    require_absent(target, "a rearranged")
    config = resolve(read_config(workdir))
    restored = restore_on_host(workdir, config)
    flat = renumbered(flatten(restored.state), config, placement)
    with new_run_directory(target) as partial:
        with Checkpointer(partial / "checkpoints", keep=1) as checkpointer:
            checkpointer.save(restored.step, nest(flat), restored.metadata)
        _write_beside(workdir, partial, config, placement)
    return restored.step


def _write_beside(workdir, partial, config, placement):
    """What a run directory holds beside checkpoints, as far as it stays true."""
    for name in ("config.json", "versions.json"):
        if (workdir / name).exists():
            shutil.copyfile(workdir / name, partial / name)
    before, order = read_order(workdir), _orders(config, placement)["E"]
    write_json(partial / ORDER_FILE,
               {"expert_order": (order if before is None else np.take_along_axis(before, order, axis=1)).tolist()})
    if not (workdir / "metrics.jsonl").exists():
        return
    with (partial / "metrics.jsonl").open("w") as file:
        for line in read_metrics(workdir / "metrics.jsonl"):
            if line.get("expert_load"):
                line["expert_load"] = [[load_E[e] for e in order_E] for load_E, order_E in zip(line["expert_load"], order)]
            file.write(json.dumps(line) + "\n")


def read_order(workdir: pathlib.Path) -> np.ndarray | None:
    """The numbers that a run's experts had before they were first renumbered, ``[L, E]``; None if they never were.

    Raises:
      RunError: the file that says so cannot be read.
    """
    path = workdir / ORDER_FILE
    try:
        return np.array(json.loads(path.read_text())["expert_order"], np.int64)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"Cannot read {path}: {error}. Put a good copy back.") from error


# Copies.


def with_copies(params: Any, config: Config, placement: Placement) -> Any:
    """Parameters, in NumPy, with the weights of every copy in the place of the experts', and the tables of copies: those of
    a model with ``moe.expert_copies``."""
    params = jax.tree.map(np.asarray, params)
    copies_LEJ = placement.copies_LEJ()
    for where, layers in moe_layer_paths(config).items():
        layer = params
        for part in where.split("/"):
            layer = layer[int(part) if part.isdecimal() else part]
        here = slice(None) if is_stacked(where) else 0  # stacked over layers, or of one
        expert_P, layer["copies_EJ"] = placement.expert_LP[list(layers)][here], copies_LEJ[list(layers)][here]
        take = lambda leaf, expert_P=expert_P: (
            leaf[expert_P] if expert_P.ndim == 1 else np.stack([row[order] for row, order in zip(leaf, expert_P)]))
        layer["experts"] = jax.tree.map(take, layer["experts"])
    return params


def restore_with_copies(run: Run, placement: Placement) -> tuple[Any, jax.Array, int]:
    """As :func:`moe_jax.training.run.restore_params`, with copies; ``run.config`` names ``moe.expert_copies``. The weights
    pass through this machine's memory: the experts alone need not divide over the devices."""
    if jax.process_count() > 1:
        raise RunError(f"{jax.process_count()} processes: copies of experts are made by one process that sees all devices.")
    plain = dataclasses.replace(run.config, moe=dataclasses.replace(run.config.moe, expert_copies=0))
    params, bias_LE, step = restore_params(run, state_on_host(plain, run.vocab_size))
    wanted = run.abstract_state()
    put = lambda leaf, wanted: jax.device_put(np.asarray(leaf), wanted.sharding)
    params = {name: value for name, value in params.items() if name in wanted["params"]}  # without multi-token prediction
    params = jax.tree.map(put, with_copies(params, plain, placement), wanted["params"])
    return params, put(bias_LE, wanted["router_bias_LE"]), step
