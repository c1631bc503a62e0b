"""One JSON file per finished run: ``results/<scale>/<arm>_seed<n>.json``."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from moe_jax.config import Config
from moe_jax.files import source_fingerprint, write_text
from moe_jax.sweeps.definition import Arm, Sweep, default_of, flat

# Settings that change nothing in what is computed.
_WITHOUT_EFFECT = ("data.cache_dir", "training.tensorboard", "training.wandb")
SIGNIFICANT_DIGITS = 7


@dataclasses.dataclass(frozen=True)
class Key:
    """One run of a sweep."""

    arm: str
    scale: str
    seed: int

    @property
    def file_name(self) -> str:
        return f"{self.arm}_seed{self.seed}.json"


def identity(sweep: Sweep, key: Key) -> dict[str, Any]:
    """What decides a run's numbers, beside the code: its settings, how it starts, what is measured.

    At scale smoke the code counts too: those results say that everything runs, and say so of one version.
    """
    found = {"config": effective(sweep.config_of(key.arm, key.scale, key.seed)), "how": _how(sweep.arms[key.arm]),
             "measure": sweep.measure_hash()}
    start = getattr(sweep.arms[key.arm], "start", None)
    if start:
        found["start"] = identity(sweep, dataclasses.replace(key, arm=start))
    if key.scale == "smoke":
        found["code"] = source_fingerprint()[:16]
    return found


def _how(arm: Arm) -> dict[str, Any]:
    """Of an arm all but its settings."""
    rest = {name: value for name, value in dataclasses.asdict(arm).items() if name != "settings"}
    return {"kind": type(arm).__name__.lower(), **rest}


def effective(config: Config) -> dict[str, Any]:
    """The settings that differ from their defaults: a setting that comes new with its default changes no run. (A default
    that changes is a change of the code, of which a result keeps the version.)"""
    return {key: value for key, value in flat(config).items() if value != default_of(key) and key not in _WITHOUT_EFFECT}


def config_hash(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def read_result(folder: pathlib.Path, key: Key) -> dict[str, Any] | None:
    """The file's content; None if there is none, or none that can be read."""
    try:
        result = json.loads((folder / key.scale / key.file_name).read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and isinstance(result.get("metrics"), dict) else None


def finished(sweep: Sweep, folder: pathlib.Path, key: Key) -> dict[str, Any] | None:
    """The result of exactly this run, or None."""
    result = read_result(folder, key)
    # By the hash: it is of all digits, and the identity is written with seven.
    return result if result is not None and result.get("config_hash") == config_hash(identity(sweep, key)) else None


def metrics_of(sweep: Sweep, folder: pathlib.Path, scale: str,
               seeds: Iterable[int]) -> dict[str, dict[int, dict[str, float]]]:
    """Of all finished runs of a scale, by arm and seed."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for arm in sweep.arms:
        for seed in seeds:
            if result := finished(sweep, folder, Key(arm, scale, seed)):
                found.setdefault(arm, {})[seed] = result["metrics"]
    return found


def write_result(folder: pathlib.Path, key: Key, result: Mapping[str, Any]) -> None:
    """Writes a result, whole or not at all: one line per entry, numbers to seven digits."""
    write_text(folder / key.scale / key.file_name, _text(result))


def _text(result: Mapping[str, Any]) -> str:
    """JSON that is pleasant to read and to compare: nested objects one entry a line, lists in one line."""
    def lines(value, indent):
        if isinstance(value, Mapping) and value:
            inner = ",\n".join(f"{indent}  {json.dumps(str(name))}: {lines(part, indent + '  ')}" for name, part in value.items())
            return "{\n" + inner + "\n" + indent + "}"
        return json.dumps(_rounded(value), default=str)

    return lines(result, "") + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    return [_rounded(part) for part in value] if isinstance(value, (list, tuple)) else value
