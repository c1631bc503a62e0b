"""``moe-jax place``: from the loads that a run measured to a placement of its experts, as a file, a table and a figure."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax import files
from moe_jax.analysis.report_figures import device_loads
from moe_jax.config import Config, differences, resolve, with_defaults
from moe_jax.dispatch.placement import Placement, imbalance, in_order, per_device_sums, place, renumber
from moe_jax.errors import UserError
from moe_jax.training.metrics import read_metrics
from moe_jax.training.rearrange import check_placeable, read_order
from moe_jax.training.run import read_config, write_json

FORMAT = 1
# Training steps whose loads count where the run was not evaluated yet: the last lines of metrics.jsonl.
_LINES = 10


class PlacementError(UserError, ValueError):
    """Loads or a placement that cannot be used; the message is one line for people."""


@dataclasses.dataclass(frozen=True)
class PlacedRun:
    """A placement, and what it was made from.

    Attributes:
      run: what :func:`_identity` says of the run.
      loads_of: where the loads were measured, in words.
      layers: indices of the MoE layers in the model.
      load_LE: choices of each expert, or shares of them.
      nodes: into which the devices fall.
    """

    placement: Placement
    run: Mapping[str, Any]
    loads_of: str
    layers: tuple[int, ...]
    load_LE: np.ndarray
    nodes: int = 1

    def load_LX(self) -> np.ndarray:
        """Loads of the devices, as measured on experts and spread evenly over their copies."""
        return self.placement.load_LX(self.load_LE)

    def load_before_LX(self) -> np.ndarray | None:
        """The same for experts in order of their numbers; None where they do not divide over the devices."""
        before = in_order(*self.load_LE.shape, self.placement.devices)
        return None if before is None else before.load_LX(self.load_LE)


# Measured loads.


def measured_loads(workdir: pathlib.Path, config: Config) -> tuple[np.ndarray, str]:
    """Loads ``[L, E]`` of the experts that have weights, and where they were measured: on the held-out text of
    ``routing/evaluation.npz``, or, before a run is evaluated, in its last written training steps.

    Raises:
      PlacementError: neither is there, or it is damaged.
    """
    path, experts = workdir / "routing" / "evaluation.npz", config.moe.num_experts
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as arrays:
                counts_LE = arrays["counts_LE"] if "counts_LE" in arrays.files else None
        except Exception as error:  # whatever a damaged archive makes NumPy raise
            raise PlacementError(f"Cannot read {path} ({(str(error).splitlines() or [type(error).__name__])[0]}); remove "
                                 f"{workdir / 'complete.json'} and train again, which evaluates.") from error
        if counts_LE is not None:
            load_LE = _loads_of(counts_LE, config, path)
            return load_LE[:, :experts], f"{int(load_LE[0].sum()):,} choices per layer on held-out text"
    lines = [line for line in _metrics(workdir) if line.get("kind") == "train" and line.get("expert_load")][-_LINES:]
    if not lines:
        raise PlacementError(f"{workdir} has no recorded routing: neither routing/evaluation.npz, written when training ends, "
                             f"nor expert_load in metrics.jsonl; train it further: moe-jax train --workdir={workdir} …")
    load_NLE = [_loads_of(line["expert_load"], config, workdir / "metrics.jsonl") for line in lines]
    steps = f"step {lines[0]['step']}" + (f" to {lines[-1]['step']}" if len(lines) > 1 else "")
    return np.mean(load_NLE, axis=0)[:, :experts], f"the training batches of {steps}, {len(lines)} of them"


def _metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    path = workdir / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def _loads_of(value: Any, config: Config, path: pathlib.Path) -> np.ndarray:
    wanted = (len(config.moe_layers), config.moe.num_routed_experts)
    try:
        load_LE = np.array(value, np.float64)
    except (TypeError, ValueError):
        load_LE = np.array(np.nan)
    if load_LE.shape != wanted or not np.isfinite(load_LE).all() or (load_LE < 0).any():
        raise PlacementError(f"{path} does not hold the loads of {wanted[1]} experts in {wanted[0]} layers; it is damaged, "
                             f"or of another run.")
    return load_LE


# Placing.


def place_run(workdir: pathlib.Path, devices: int, nodes: int = 1, redundant: int = 0) -> PlacedRun:
    """The placement of a run's experts over ``devices`` devices, by the loads it measured.

    With redundant copies by :func:`moe_jax.dispatch.placement.place`, without by ``renumber``.

    Raises:
      PlacementError, RunError, ConfigError: each with one line for people.
    """
    values = read_config(workdir)
    config = resolve(values)
    check_placeable(config)
    groups = config.moe.num_groups
    if nodes < 1 or groups % nodes:
        legal = [str(n) for n in range(1, groups + 1) if groups % n == 0]
        raise PlacementError(f"--nodes={nodes}: nodes get whole groups of experts, so it must divide moe.num_groups={groups}; "
                             f"legal values: {', '.join(legal)}.")
    if redundant < 0:
        raise PlacementError(f"--redundant={redundant}: must be at least 0.")
    load_LE, loads_of = measured_loads(workdir, config)
    if redundant:
        placement = place(load_LE, config.moe.num_experts + redundant, devices, nodes, groups)
    else:
        placement = renumber(load_LE, devices, nodes, groups)
    return PlacedRun(placement, _identity(values, workdir), loads_of, config.moe_layers, load_LE, nodes)


def _identity(values: Mapping[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
    """What makes a run the one it is: what it learns and how, and the order that its experts are in."""
    order_LE = read_order(workdir)
    return {"config": {section: values.get(section, {}) for section in ("model", "attention", "moe", "data", "optimizer")},
            "seed": values.get("training", {}).get("seed"),
            "expert_order": None if order_LE is None else order_LE.tolist()}


# The file.


def to_json(placed: PlacedRun) -> dict[str, Any]:
    before = placed.load_before_LX()
    return {
        "format": FORMAT, "loads_of": placed.loads_of, "layers": list(placed.layers),
        "devices": placed.placement.devices, "nodes": placed.nodes,
        "expert_of_copy": placed.placement.expert_LP.tolist(),
        "load": placed.load_LE.tolist(),
        "imbalance_before": None if before is None else imbalance(before).tolist(),
        "imbalance_after": imbalance(placed.load_LX()).tolist(),
        "run": placed.run,
    }


def write_placement(path: pathlib.Path, placed: PlacedRun) -> None:
    """Writes placement.json, whole or not at all; raises RunError."""
    write_json(path, to_json(placed))


def read_placement(path: pathlib.Path, workdir: pathlib.Path) -> PlacedRun:
    """Reads a file of :func:`write_placement` for the run in ``workdir``.

    Raises:
      PlacementError: it cannot be read, holds no placement, or is of another run.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise PlacementError(f"--placement={path}: {error.strerror or error}. Make one: moe-jax place --workdir={workdir} "
                             f"--devices=8 --out={path}") from error
    except ValueError as error:
        raise PlacementError(f"--placement={path}: is no JSON ({error}); make it again with moe-jax place.") from error
    _check_run(value, path, workdir)
    try:
        expert_LP, load_LE = np.array(value["expert_of_copy"]), np.array(value["load"], np.float64)
        placement = Placement(expert_LP, int(value["devices"]))
        layers, nodes = tuple(map(int, value["layers"])), int(value["nodes"])
    except (TypeError, ValueError, KeyError) as error:
        raise PlacementError(f"--placement={path}: is damaged ({type(error).__name__}: {error}); make it again with moe-jax "
                             f"place.") from error
    problem = _problem(placement, load_LE, resolve(read_config(workdir)))
    if problem:
        raise PlacementError(f"--placement={path}: is damaged ({problem}); make it again with moe-jax place.")
    return PlacedRun(placement, value["run"], str(value.get("loads_of", "")), layers, load_LE, nodes)


def _check_run(value: Any, path: pathlib.Path, workdir: pathlib.Path) -> None:
    if not isinstance(value, dict) or not isinstance(value.get("run"), dict) or value.get("format") != FORMAT:
        raise PlacementError(f"--placement={path}: holds no placement of this version; make it again with moe-jax place.")
    here, there = _identity(read_config(workdir), workdir), value["run"]
    # Files and runs of before a setting came have its default.
    changed = differences(with_defaults(there.get("config") or {}), with_defaults(here["config"]))
    if there.get("seed") != here["seed"]:
        changed.append(f"training.seed: {there.get('seed')!r} -> {here['seed']!r}")
    if there.get("expert_order") != here["expert_order"]:
        changed.append("the run was renumbered by moe-jax place --apply")
    if changed:
        more = f"; and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise PlacementError(f"--placement={path}: was made for another run than {workdir} ({'; '.join(changed[:4])}{more}); "
                             f"make one for this run: moe-jax place --workdir={workdir} …")


def _problem(placement: Placement, load_LE: np.ndarray, config: Config) -> str:
    """Why these arrays are no placement of the model's experts; '' if they are one."""
    layers, experts, expert_LP = len(config.moe_layers), config.moe.num_experts, placement.expert_LP
    if expert_LP.ndim != 2 or expert_LP.dtype.kind != "i" or len(expert_LP) != layers or load_LE.shape != (layers, experts):
        return f"its arrays are not of {layers} layers of {experts} experts"
    if any(set(row) != set(range(experts)) for row in expert_LP.tolist()):
        return f"a layer lacks one of the experts 0 … {experts - 1}, or has others"
    if placement.devices < 1 or expert_LP.shape[1] % placement.devices:
        return f"{expert_LP.shape[1]} copies do not divide over {placement.devices} devices"
    return ""


# What people see.


def table(placed: PlacedRun) -> str:
    """Largest over mean load of the devices, layer by layer, before and after."""
    before, after_L = placed.load_before_LX(), imbalance(placed.load_LX())
    before_L = [None] * len(after_L) if before is None else imbalance(before)
    copies, experts = placed.placement.expert_LP.shape[1], placed.load_LE.shape[1]
    lines = [f"{experts} experts, {copies} copies on {placed.placement.devices} devices; loads of {placed.loads_of}",
             "largest / mean load of the devices", *rows(placed.layers, before_L, after_L)]
    if before is None:
        lines.append(f"(before: {experts} experts do not divide over {placed.placement.devices} devices)")
    return "\n".join(lines)


def rows(layers: Sequence[int], before_L: Sequence[float | None], after_L: Sequence[float]) -> list[str]:
    """The lines of such a table; the last is the mean over layers."""
    text = lambda value: "–" if value is None else f"{value:.3f}"
    mean = lambda values: None if any(value is None for value in values) else float(np.mean(values))
    found = [(str(layer), b, a) for layer, b, a in zip(layers, before_L, after_L)]
    found.append(("mean", mean(before_L), mean(after_L)))
    return [f"{'layer':>6} {'before':>8} {'after':>8}", *(f"{name:>6} {text(b):>8} {text(a):>8}" for name, b, a in found)]


def measured(counts_LE: np.ndarray, copies_LP: np.ndarray, placed: PlacedRun) -> dict[str, Any]:
    """Imbalance of the devices in an evaluation, from what each expert was chosen and each copy really computed."""
    devices = placed.placement.devices
    before = in_order(*placed.load_LE.shape, devices)
    before_L = None if before is None else imbalance(before.load_LX(counts_LE[:, :placed.load_LE.shape[1]]))
    return {"devices": devices, "copies": copies_LP.shape[1], "layers": list(placed.layers),
            "imbalance_without": None if before_L is None else before_L.tolist(),
            "imbalance_with": imbalance(per_device_sums(copies_LP, devices)).tolist()}


def write_figure(path: pathlib.Path, placed: PlacedRun) -> None:
    """Loads of the devices before and after, as a PNG; whole or not at all. Raises FileError."""
    relative = lambda load_LX: None if load_LX is None else load_LX / np.maximum(load_LX.mean(axis=1, keepdims=True), 1e-300)
    figure = device_loads(relative(placed.load_before_LX()), relative(placed.load_LX()), placed.layers)
    with files.whole(path) as file:
        figure.savefig(file, format="png")
