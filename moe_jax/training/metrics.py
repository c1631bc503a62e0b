"""What a run writes down: metrics.jsonl, TensorBoard, one progress line, routing statistics, versions.

metrics.jsonl has one JSON object per line: "step", "kind" ("train" or "eval"), "time" (seconds since 1970), then
names such as "loss/ce", and nested lists such as "expert_load". A value that is not finite is written as null.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax import files
from moe_jax.errors import UserError
from moe_jax.training.tensorboard import EventFile

DEAD_EXPERT_LOAD = 0.01  # an expert with less than 1 % of the fair share


class MetricsError(UserError, RuntimeError):
    """Metrics could not be written or a writer is not installed; the message is one line for people."""


# Writing.


class MetricsWriter:
    """Writes metrics.jsonl always, TensorBoard by default, Weights & Biases when asked for.

    With several JAX processes only process 0 writes; the others may call everything.

    Args:
      workdir: the run directory; metrics.jsonl and tensorboard/ lie in it.
      tensorboard: also write scalars as TensorBoard events.
      wandb: also log to Weights & Biases (the package must be installed).
      restored_step: the step of the checkpoint this run continues from. Later lines are cut off, so that one clean
        curve remains. None: the run starts from nothing, and the lines of an earlier attempt (killed before its first
        checkpoint) move to metrics.jsonl.previous.
      config: shown by Weights & Biases beside the run; not used otherwise.

    Raises:
      MetricsError: a file cannot be written, or a requested writer is not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        tensorboard: bool = True,
        wandb: bool = False,
        restored_step: int | None = None,
        config: Mapping[str, Any] | None = None,
    ):
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        self._file = self._events = self._wandb = None
        if _process_index() != 0:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                if restored_step is None:
                    self.path.replace(self.path.with_name(self.path.name + ".previous"))
                else:
                    cut_after(self.path, restored_step)
            self._file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise _write_error(self.path, error) from error
        first_step = 0 if restored_step is None else restored_step + 1
        if tensorboard:
            _require_package("tensorboardX", "training.tensorboard=False")
            folder = self.path.parent / "tensorboard"
            try:
                self._events = EventFile(folder, first_step)
            except OSError as error:
                raise _write_error(folder, error) from error
        if wandb:
            self._wandb = _start_wandb(self.path.parent, config)

    def write(self, step: int, values: Mapping[str, Any], kind: str = "train") -> None:
        """Writes one line.

        Args:
          step: the training step the values belong to.
          values: name -> number, array (any rank; written as nested lists), text or None. Arrays go to metrics.jsonl
            only, numbers also to TensorBoard and W&B as "<kind>/<name>".
          kind: "train" or "eval".

        Raises:
          MetricsError: the line could not be written, for instance because the disk is full.
          ValueError: unknown kind, or a value uses a reserved name.
        """
        if kind not in ("train", "eval"):
            raise ValueError(f"kind={kind!r}: allowed are 'train', 'eval'")
        reserved = {"step", "kind", "time"} & values.keys()
        if reserved:
            raise ValueError(f"metric name {min(reserved)!r} is reserved; choose another")
        if self._file is None:
            return
        now = time.time()
        plain = {name: to_json(value) for name, value in values.items()}
        line = {"step": int(step), "kind": kind, "time": round(now, 3), **plain}
        self._append(json.dumps(line, allow_nan=False).encode() + b"\n")
        numbers = {name: value for name, value in values.items() if value is not None and not isinstance(value, str)}
        scalars = {f"{kind}/{name}": float(value) for name, value in numbers.items() if np.ndim(value) == 0}
        if self._events is not None:
            try:
                self._events.add(int(step), scalars, now)
            except OSError as error:
                raise _write_error(self.path.parent / "tensorboard", error) from error
        if self._wandb is not None:
            self._wandb.log({**scalars, "step": int(step)})

    def _append(self, line: bytes) -> None:
        try:
            while line:
                line = line[self._file.write(line) :]  # a disk that fills up takes part of a line, then refuses
        except OSError as error:
            raise _write_error(self.path, error) from error

    def close(self) -> None:
        """Closes every writer; may be called twice."""
        for writer, close in ((self._file, "close"), (self._events, "close"), (self._wandb, "finish")):
            if writer is not None:
                with contextlib.suppress(OSError):  # a full disk was reported when it was met
                    getattr(writer, close)()
        self._file = self._events = self._wandb = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception_details) -> None:
        self.close()


def cut_after(path: str | os.PathLike, step: int) -> None:
    """Removes, atomically, the lines of a metrics.jsonl past `step` and any line that a crash left half-written."""
    path = pathlib.Path(path)
    kept = [line for line, record in _read_lines(path) if record["step"] <= step]
    with files.whole(path, durable=True) as file:
        file.writelines(line + b"\n" for line in kept)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl as dicts, in the order of the file; half-written lines are left out."""
    return [record for _, record in _read_lines(pathlib.Path(path))]


def _read_lines(path: pathlib.Path) -> list[tuple[bytes, dict]]:
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            lines.append((line, record))
    return lines


def to_json(value: Any) -> Any:
    """A number, array or text as JSON: arrays as nested lists, float32 by its shortest digits, not finite as null."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    array = np.asarray(value)
    if array.dtype == object:
        raise ValueError(f"a metric must be a number, an array or text, not {type(value).__name__}")
    if array.ndim:
        return [to_json(part) for part in array]
    if array.dtype.kind in "biu":
        return array.item()
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32)  # bfloat16 and its relatives
    return float(str(array[()])) if np.isfinite(array) else None  # 0.1, not 0.10000000149011612; exact all the same


def _process_index() -> int:
    import jax

    return jax.process_index()


def _require_package(name: str, otherwise: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MetricsError(f"{name} is not installed: pip install {name}, or set {otherwise}") from error


def _start_wandb(workdir: pathlib.Path, config: Mapping[str, Any] | None) -> Any:
    wandb = _require_package("wandb", "training.wandb=False")
    identity = workdir / "wandb_id.txt"  # the same curve goes on after a restart
    if not identity.exists():
        identity.write_text(wandb.util.generate_id())
    run = wandb.init(dir=str(workdir), id=identity.read_text().strip(), resume="allow", config=dict(config or {}))
    # W&B's own step may only rise, also across a resume that went back a little (wandb#6728): ours is the x axis.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _write_error(path: pathlib.Path, error: OSError) -> MetricsError:
    return MetricsError(
        f"Cannot write {path}: {error.strerror or error}. Free some space or choose a workdir that you may write to, "
        "then run the same command again (it resumes from the last checkpoint)"
    )


# The progress line.


class Progress:
    """One line that says how training goes: a bar on a terminal, one plain line per update otherwise.

    Args:
      total_steps: the step at which training ends.
      start_step: the step it starts from (a resumed run does not start at 0).
      enabled: False prints nothing, for the processes of a pod other than the first.
      stream: where to write; stderr by default.
    """

    def __init__(self, total_steps: int, start_step: int = 0, enabled: bool = True, stream: Any = None):
        self.total_steps, self.enabled = total_steps, enabled
        self._stream = stream or sys.stderr
        self._first: tuple[int, float] | None = None  # the first update: compilation lies before it, not in the eta
        self._bar = None
        if enabled and self._stream.isatty():
            try:
                import tqdm
            except ImportError:
                return  # plain lines do as well
            look = {"dynamic_ncols": True, "bar_format": "{percentage:3.0f}%|{bar}| {desc}"}
            self._bar = tqdm.tqdm(total=total_steps, initial=start_step, file=self._stream, **look)

    def update(
        self,
        step: int,
        loss: float,
        tokens_per_second: float | None = None,
        drop_fraction: float | None = None,
        load_imbalance: float | None = None,
    ) -> None:
        """Shows one logged step; None leaves that part out.

        Args:
          step: steps done so far.
          loss: cross-entropy in nats per token.
          tokens_per_second: of the whole run, not per device.
          drop_fraction: 0..1, choices that found no room.
          load_imbalance: load of the busiest expert over the mean load; 1.0 = balanced.
        """
        if not self.enabled:
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        done, seconds = step - self._first[0], now - self._first[1]
        remaining = (self.total_steps - step) * seconds / done if done > 0 else None
        fields = [f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}", f"loss {float(loss):.4f}"]
        if tokens_per_second is not None:
            fields.append(f"{tokens_per_second:,.0f} tokens/s")
        if drop_fraction is not None:
            fields.append(f"drop {100 * float(drop_fraction):.1f} %")
        if load_imbalance is not None:
            fields.append(f"imbalance {float(load_imbalance):.2f}")
        fields.append(f"eta {duration(remaining)}")
        text = "  ".join(fields)
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.n = step
            self._bar.set_description_str(text)

    def say(self, text: str) -> None:
        """Prints a line of its own without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self.enabled:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def duration(seconds: float | None) -> str:
    """``'2 min 05 s'``; ``'?'`` where it is not known."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


# Speed against the hardware's peak.

# Dense bf16 peak in TFLOP/s and the vendor's page. On v2, v3 and TPU7x a JAX device is one of a chip's two TensorCores
# and has half of the chip's figure; v4 and v5p run both cores as one device.
_TPU_DOCS = "docs.cloud.google.com/tpu/docs/"
_TPU_PEAK: dict[str, tuple[float, str]] = {
    "tpu v2": (45 / 2, "v2"),
    "tpu v3": (123 / 2, "v3"),
    "tpu v4": (275, "v4"),
    "tpu v5 lite": (197, "v5e"),
    "tpu v5e": (197, "v5e"),
    "tpu v5": (459, "v5p"),
    "tpu v5p": (459, "v5p"),
    "tpu v6 lite": (918, "v6e"),
    "tpu v6e": (918, "v6e"),
    "tpu7x": (2307 / 2, "tpu7x"),
    "tpu v7x": (2307 / 2, "tpu7x"),
}

# NVIDIA prints the figures of H100 and later with 2:4 sparsity; the dense ones are half. The first row whose words all
# occur in the device's name counts.
_GPU_PEAK: tuple[tuple[set[str], float, str], ...] = (
    ({"a100"}, 312, "A100 Tensor Core GPU"),
    ({"h100", "pcie"}, 756, "H100 Tensor Core GPU, PCIe"),
    ({"h100", "nvl"}, 835, "H100 Tensor Core GPU, NVL"),
    ({"h100"}, 989, "H100 Tensor Core GPU, SXM"),
    ({"h200", "nvl"}, 835, "H200 Tensor Core GPU, NVL"),
    ({"h200"}, 989, "H200 Tensor Core GPU, SXM"),
    ({"gh200"}, 989, "GH200 Grace Hopper Superchip"),
    ({"gb200"}, 2500, "GB200 NVL72"),
    ({"b200"}, 2250, "HGX B200"),
    ({"l40s"}, 362, "L40S"),
    ({"l4"}, 121, "L4 Tensor Core GPU"),
)


def peak_flops_per_device(device_kind: str) -> tuple[float, str] | None:
    """Dense bf16 peak of one JAX device in FLOP/s and where the figure is published; None for CPUs and the unknown.

    Args:
      device_kind: `jax.devices()[0].device_kind`, say "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
    """
    kind = device_kind.lower()
    if kind in _TPU_PEAK:
        teraflops, page = _TPU_PEAK[kind]
        return teraflops * 1e12, _TPU_DOCS + page
    words = set(kind.replace("-", " ").split())
    for names, teraflops, product in _GPU_PEAK:
        if names <= words:
            return teraflops * 1e12, f"NVIDIA data sheet: {product}"
    return None


def mfu(model_flops_per_second: float, devices: Sequence[Any]) -> float | None:
    """Model FLOPs utilisation, 0..1: FLOPs of the active parameters per second over the peak of all devices.

    Args:
      model_flops_per_second: of the whole run, by the formula for active parameters (no capacity padding, no remat).
      devices: the JAX devices of the run's mesh.

    Returns:
      None when any device's peak is not known: no figure rather than a wrong one.
    """
    peaks = [peak_flops_per_device(device.device_kind) for device in devices]
    if not peaks or None in peaks:
        return None
    return model_flops_per_second / sum(peak for peak, _ in peaks)


# Routing.


def expert_load(counts_LE: Any) -> np.ndarray:
    """Load of each expert relative to the fair share of its layer: [L, E] fp64, 1.0 = fair; 0 where no token came."""
    counts_LE = np.asarray(counts_LE, np.float64)
    fair_L1 = counts_LE.mean(axis=1, keepdims=True)
    return np.divide(counts_LE, fair_L1, out=np.zeros_like(counts_LE), where=fair_L1 > 0)


def routing_metrics(statistics: Mapping[str, Any], experts_per_token: int | None = None) -> dict[str, Any]:
    """Names and numbers for one step's routing statistics.

    Args:
      statistics: arrays that NumPy can read,
        counts_LE: choices per expert over valid tokens, before anything is dropped; all K choices, not only the first;
        kept_LE: those that found room;
        valid_tokens: tokens that were routed (padding is not): of all layers alike, or [L] (multi-token prediction);
        entropy_L: mean entropy of the router's distribution, nats;
        confidence_L: mean over tokens of the largest router score, whether or not that expert was chosen;
        logit_max_L: largest router logit in absolute value;
        layers: index in the model of each of the L MoE layers;
        advantage_L, advantage_squared_L: of a router that is a policy, means over tokens of reward less baseline.
      experts_per_token: K of a token-choice router; checked against the counts when given. Leave it out for routers
        without a fixed K (expert choice).

    Returns:
      {"moe/layer_<i>/<name>": float} and aggregates {"moe/<name>": float} over layers: load_max (max), load_min (min),
      load_cv (mean), max_violation (max; largest load - 1), dead_experts (sum; load under 1 % of fair),
      drop_fraction (mean), entropy (mean), confidence (mean), logit_max (max), choices_per_token (mean), of a policy
      baseline_error (mean; mean square of reward less baseline) and advantage_variance (mean); and "expert_load": [L, E]
      loads relative to fair share.

    Raises:
      ValueError: shapes disagree, more was kept than chosen, or counts do not sum to K x valid tokens (B55).
    """
    counts_LE, kept_LE = (np.asarray(statistics[name], np.float64) for name in ("counts_LE", "kept_LE"))
    layers = [int(layer) for layer in np.asarray(statistics["layers"])]
    tokens_L = np.broadcast_to(np.asarray(statistics["valid_tokens"], np.float64), len(layers))
    _check_statistics(counts_LE, kept_LE, tokens_L, layers, experts_per_token)
    load_LE = expert_load(counts_LE)
    chosen_L = counts_LE.sum(axis=1)
    dropped_L = chosen_L - kept_LE.sum(axis=1)
    nothing_L = np.zeros_like(chosen_L)
    per_layer = {
        "load_max": (load_LE.max(axis=1), np.max),
        "load_min": (load_LE.min(axis=1), np.min),
        "load_cv": (load_LE.std(axis=1), np.mean),  # the mean load is 1, so the deviation is the variation
        "max_violation": (load_LE.max(axis=1) - 1.0, np.max),
        "dead_experts": ((load_LE < DEAD_EXPERT_LOAD).sum(axis=1), np.sum),
        "drop_fraction": (np.divide(dropped_L, chosen_L, out=nothing_L.copy(), where=chosen_L > 0), np.mean),
        "entropy": (statistics["entropy_L"], np.mean),
        "confidence": (statistics["confidence_L"], np.mean),
        "logit_max": (statistics["logit_max_L"], np.max),
        "choices_per_token": (np.divide(chosen_L, tokens_L, out=nothing_L.copy(), where=tokens_L > 0), np.mean),
    }
    if "advantage_L" in statistics:
        squared_L = np.asarray(statistics["advantage_squared_L"], np.float64)
        mean_L = np.asarray(statistics["advantage_L"], np.float64)
        per_layer["baseline_error"] = (squared_L, np.mean)
        per_layer["advantage_variance"] = (np.maximum(squared_L - mean_L**2, 0.0), np.mean)
    metrics: dict[str, Any] = {}
    for name, (values, over_layers) in per_layer.items():
        values_L = np.asarray(values, np.float64)
        metrics[f"moe/{name}"] = float(over_layers(values_L))
        metrics.update({f"moe/layer_{layer}/{name}": float(value) for layer, value in zip(layers, values_L)})
    metrics["expert_load"] = load_LE.astype(np.float32)
    return metrics


def _check_statistics(counts_LE, kept_LE, tokens_L, layers, experts_per_token) -> None:
    if counts_LE.ndim != 2 or kept_LE.shape != counts_LE.shape or len(layers) != len(counts_LE):
        raise ValueError(
            f"routing statistics disagree: counts_LE {counts_LE.shape}, kept_LE {kept_LE.shape}, {len(layers)} layers; "
            "the first two must be [layers, experts]"
        )
    if (kept_LE > counts_LE).any():
        raise ValueError("routing statistics disagree: an expert kept more choices than it was given")
    if experts_per_token is not None and not np.allclose(counts_LE.sum(axis=1), experts_per_token * tokens_L, rtol=1e-6):
        raise ValueError(
            f"routing statistics disagree: each layer must count experts_per_token={experts_per_token} x "
            f"{tokens_L} valid tokens = {experts_per_token * tokens_L} choices, got {counts_LE.sum(axis=1)}"
        )


# Versions.


def versions() -> dict[str, Any]:
    """What versions.json holds: packages (None if absent), git commit of a checkout, devices, platform."""
    import jax

    devices = jax.devices()
    packages = {"orbax": "orbax-checkpoint"}
    names = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax", "numpy", "moe_jax")
    return {
        "python": platform.python_version(),
        **{name: _installed(packages.get(name, name)) for name in names},
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        "process_count": jax.process_count(),
    }


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout this file is tracked in, with "+changes" if tracked files differ; None elsewhere."""
    here = pathlib.Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # not somebody's repository that happens to hold a .venv
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
