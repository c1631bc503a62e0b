"""What a sweep is: data in ``experiments/<name>/sweep.py``, checked as a whole before anything runs.

An arm is a dict of settings, ``{"moe.balance_weight": 0.0}``, which is short for :class:`Train`; or one of the other
classes below, which start from another arm's checkpoint. Every arm is run once per seed, and arms are compared seed by
seed: a seed decides the initial parameters and the order of the training rows (``training.seed``, ``data.seed``).
"""

import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_jax.config import SECTIONS, Config, ConfigError, known_keys, resolve, unknown_key
from moe_jax.errors import UserError

Settings = Mapping[str, Any]

SCALES = ("smoke", "quick", "full")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.+-]*")


class SweepError(UserError, ValueError):
    """A sweep that cannot work; the message is one line for the person who wrote it."""


# Arms.


@dataclasses.dataclass(frozen=True)
class Train:
    """A run from nothing, with these settings on top of the sweep's and the scale's."""

    settings: Settings = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Continue:
    """Training goes on from the last checkpoint of another arm: step, optimizer and data too. ``settings`` come on top of
    that arm's; ``training.num_steps`` must be larger."""

    start: str
    settings: Settings = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Upcycle:
    """Training goes on as a mixture of experts from the last checkpoint of a dense arm (moe_jax/training/upcycle.py).

    ``how``: the fields of :class:`moe_jax.training.upcycle.Upcycling` that differ from its defaults.
    """

    start: str
    settings: Settings = dataclasses.field(default_factory=dict)
    how: Settings = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Another arm's trained model, evaluated under other settings: other buffers, longer rows, other data.

    Attributes:
      start: the arm. settings: on top of that arm's. Parameters that the settings leave no place for are left out
        (``moe.num_shared_experts=0``: without the shared expert); there must be none that are missing. The vocabulary stays.
      causal: as the model routes when it writes one token at a time (:meth:`moe_jax.nn.moe.RoutingMode.causal`).
    """

    start: str
    settings: Settings = dataclasses.field(default_factory=dict)
    causal: bool = False


Arm = Train | Continue | Upcycle | Evaluate


# What is expected.

# "arm", the metric being that of the order; ("arm", "metric"); a number; or {one of the first two: factor}, their sum.
Point = str | tuple[str, str] | float | Mapping[Any, float]


@dataclasses.dataclass(frozen=True)
class Order:
    """What a paper lets expect of a metric along ``points``; each neighbouring pair is one comparison.

    Attributes:
      direction: 'falls', 'rises', 'equal' (within ``within``), or 'reported': compared, nothing expected.
      paper: where it says so, if not where the sweep's table is.
    """

    metric: str
    points: tuple[Point, ...]
    direction: str
    within: float = 0.0
    paper: str = ""

    def __post_init__(self):
        if self.direction not in ("falls", "rises", "equal", "reported"):
            raise SweepError(f"order of {self.metric!r}: direction={self.direction!r}; allowed are 'falls', 'rises', 'equal', "
                             f"'reported'.")
        if len(self.points) < 2:
            raise SweepError(f"order of {self.metric!r}: {len(self.points)} points; an order compares at least two.")
        if (self.direction == "equal") != (self.within > 0):
            raise SweepError(f"order of {self.metric!r}: within={self.within}; 'equal' needs a margin above 0, other directions "
                             f"none.")

    def pairs(self) -> list[tuple[Point, Point]]:
        return list(zip(self.points, self.points[1:]))


def falls(metric: str, *points: Point, paper: str = "") -> Order:
    """``metric`` is lower at each point than at the one before."""
    return Order(metric, points, "falls", paper=paper)


def rises(metric: str, *points: Point, paper: str = "") -> Order:
    """``metric`` is higher at each point than at the one before."""
    return Order(metric, points, "rises", paper=paper)


def equal(metric: str, *points: Point, within: float, paper: str = "") -> Order:
    """``metric`` differs by less than ``within`` from point to point."""
    return Order(metric, points, "equal", within, paper)


def reported(metric: str, *points: Point) -> Order:
    """Compared without an expectation."""
    return Order(metric, points, "reported")


def minus(first: str | tuple[str, str], second: str | tuple[str, str]) -> Point:
    """The point 'first minus second': how much one gains on the other."""
    return {first: 1.0, second: -1.0}


def terms(point: Point, metric: str) -> list[tuple[str, str, float]]:
    """(arm, metric, factor) of each summand; empty for a number."""
    if isinstance(point, str):
        return [(point, metric, 1.0)]
    if isinstance(point, tuple):
        return [(*point, 1.0)]
    if isinstance(point, Mapping):
        return [(arm, name, float(factor)) for key, factor in point.items() for arm, name, _ in terms(key, metric)]
    return []


def label(point: Point, metric: str) -> str:
    """How a table writes a point: ``'off'``, ``'off: load_max'``, ``'(off - on)'``, ``'0.25'``."""
    if isinstance(point, Mapping):
        text = ""
        for (arm, name, factor) in terms(point, metric):
            size = "" if abs(factor) == 1 else f"{abs(factor):g} "
            sign = "-" if factor < 0 else "+"
            text += f" {sign} {size}{label((arm, name), metric)}" if text or factor < 0 else f"{size}{label((arm, name), metric)}"
        return f"({text.strip()})"
    if isinstance(point, tuple):
        return point[0] if point[1] == metric else f"{point[0]}: {point[1]}"
    return point if isinstance(point, str) else f"{point:g}"


# The sweep.


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large: so many seeds, and settings on top of the sweep's."""

    seeds: int
    settings: Settings = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.seeds < 1:
            raise SweepError(f"seeds={self.seeds}: a scale has at least 1.")

    def but(self, settings: Settings = {}, seeds: int | None = None) -> "Scale":
        """This scale with other settings or seeds."""
        return Scale(self.seeds if seeds is None else seeds, {**self.settings, **settings})


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One ablation.

    Attributes:
      number: its place in the scoreboard. question: one sentence. paper: who reported it, and where.
      config: ``get_config`` of the base, a ConfigDict.
      arms: by name, in the order of the table. expected: of these arms, or of metrics of one.
      scales: 'smoke', 'quick' and 'full'.
      settings: of all arms, before those of the scale and of the arm.
      metrics: the columns of the table (experiments/README.md lists them).
      published: the paper's figures by arm, in ``published_metric``.
      measure: gives more metrics of each trained model; called after its evaluation.
    """

    number: int
    title: str
    question: str
    paper: str
    config: Callable[[], Any]
    arms: Mapping[str, Arm | Settings]
    expected: tuple[Order, ...]
    scales: Mapping[str, Scale]
    settings: Settings = dataclasses.field(default_factory=dict)
    metrics: tuple[str, ...] = ("ce",)
    published: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    published_metric: str = ""
    measure: Callable[[Any], Mapping[str, float]] | None = None

    def __post_init__(self):
        if not self.arms:
            raise SweepError("arms: a sweep has at least one.")
        arms = {name: arm if isinstance(arm, Arm) else Train(arm) for name, arm in self.arms.items()}
        object.__setattr__(self, "arms", arms)
        for name, arm in arms.items():
            if not _NAME.fullmatch(name):
                raise SweepError(f"arm {name!r}: a name is lower-case letters, digits and . _ + -: it becomes a file's.")
            if not isinstance(arm, Train) and list(arms).index(name) <= _place(arms, name, arm.start):
                raise SweepError(f"arm {name!r}: it starts from {arm.start!r}, which must stand before it.")
            if not isinstance(arm, Train) and isinstance(arms[arm.start], Evaluate):
                raise SweepError(f"arm {name!r}: it starts from {arm.start!r}, which is an evaluation and leaves no model; name the "
                                 f"arm that was trained, {arms[arm.start].start!r}.")
        if set(self.scales) != set(SCALES):
            raise SweepError(f"scales: {', '.join(self.scales)}; a sweep has {', '.join(SCALES)}.")
        for order in self.expected:
            for arm, _, _ in [term for point in order.points for term in terms(point, order.metric)]:
                _place(arms, f"an expected order of {order.metric!r}", arm)
        for name in self.published:
            _place(arms, "published", name)
        if bool(self.published) != bool(self.published_metric):
            raise SweepError("published: the paper's figures need a published_metric that says what they are, and it them.")

    def trained_arm(self, name: str) -> str:
        """The arm whose training makes the model of this one."""
        arm = self.arms[name]
        return arm.start if isinstance(arm, Evaluate) else name

    def needed(self, name: str) -> list[str]:
        """The arms that must be trained for this one, the first first; itself included if it trains."""
        arm = self.arms[name]
        before = [] if isinstance(arm, Train) else self.needed(arm.start)
        return before if isinstance(arm, Evaluate) else [*before, name]

    def config_of(self, name: str, scale: str, seed: int) -> Config:
        """The checked config of one run.

        Raises:
          SweepError: what is wrong with it, with the arm's name.
        """
        try:
            return resolve(_nested(self._settings_of(name, scale, seed), self.config()))
        except ConfigError as error:
            raise SweepError(f"arm {name!r} at scale {scale!r}: {error}") from error

    def _settings_of(self, name: str, scale: str, seed: int) -> dict[str, Any]:
        arm = self.arms[name]
        if isinstance(arm, Train):
            common = {"training.seed": seed, "data.seed": seed, **self.settings, **self.scales[scale].settings}
        else:
            common = self._settings_of(arm.start, scale, seed)
        return {**common, **_at_scale(arm.settings, scale)}

    def measure_hash(self) -> str:
        """Of ``measure`` and all that it reaches by name in its own module, functions, classes and constants; '' without one.

        What it does not reach may change – other arms, other scales – and its results stay."""
        return "" if self.measure is None else _hash_of_measure(self.measure)


@functools.cache  # asked at every look at the progress, and reading a class's source parses its whole file
def _hash_of_measure(measure: Callable[[Any], Mapping[str, float]]) -> str:
    own, parts, todo = vars(inspect.getmodule(measure)), {}, {"": measure}
    while todo:
        name, value = todo.popitem()
        code = _code_of(value)
        if code is not None and code.__module__ == own["__name__"]:
            parts[name] = inspect.getsource(code)
            todo |= {word: own[word] for word in set(re.findall(r"[A-Za-z_]\w*", parts[name])) & own.keys() - parts.keys()}
        elif isinstance(value, _CONSTANTS):
            written = sorted(map(repr, value)) if isinstance(value, (set, frozenset)) else repr(value)
            # Functions in a table are written with their addresses, which differ from process to process.
            parts[name] = re.sub(" at 0x[0-9a-f]+", "", str(written))
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:12]


_CONSTANTS = (int, float, complex, str, bytes, tuple, list, dict, set, frozenset)


def _code_of(value: Any) -> Any:
    """The function or class that a value is, or wraps (``jax.jit``, ``functools.partial``, ``functools.cache``); else None."""
    while isinstance(value, functools.partial) or hasattr(value, "__wrapped__"):
        value = value.func if isinstance(value, functools.partial) else value.__wrapped__
    return value if inspect.isfunction(value) or inspect.isclass(value) else None


def _place(arms: Mapping[str, Arm], who: str, name: str) -> int:
    if name not in arms:
        raise SweepError(f"{who}: there is no arm {name!r}; the arms are {', '.join(map(repr, arms))}.")
    return list(arms).index(name)


def _at_scale(settings: Settings, scale: str) -> dict[str, Any]:
    """A value {'smoke': …, 'quick': …, 'full': …} is that of the scale."""
    return {key: value[scale] if isinstance(value, Mapping) and set(value) == set(SCALES) else value
            for key, value in settings.items()}


def _nested(settings: Settings, config: Any) -> dict[str, dict[str, Any]]:
    """The base config as nested dicts, with dotted settings put in."""
    values = {section: dict(fields) for section, fields in config.to_dict().items()}
    for key, value in settings.items():
        if key not in known_keys():
            raise unknown_key(key)
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    return values


def flat(config: Config) -> dict[str, Any]:
    """A config by dotted key."""
    return {f"{section}.{name}": value for section, values in config.to_dict().items() for name, value in values.items()}


def default_of(key: str) -> Any:
    section, name = key.split(".")
    return getattr(SECTIONS[section](), name)


def folders_of(names: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Folders of experiments as they are; of a folder of experiments all that it holds."""
    found = []
    for name in names:
        inside = [] if (name / "sweep.py").is_file() else sorted(path.parent for path in name.glob("*/sweep.py"))
        found += inside or [name]
    return found


def load_sweep(folder: pathlib.Path) -> Sweep:
    """``SWEEP`` of ``<folder>/sweep.py``, whose folder's parent is a package that it may import (``experiments.base``).

    Raises:
      SweepError: no such file, no SWEEP in it, or one that cannot work.
    """
    path = folder / "sweep.py"
    if not path.is_file():
        raise SweepError(f"{folder}: has no sweep.py. Give the folder of an experiment, for example experiments/balance_loss.")
    root = str(folder.resolve().parents[1])
    if root not in sys.path:
        sys.path.insert(0, root)
    name = f"{folder.resolve().parent.name}.{folder.resolve().name}.sweep"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # inspect.getsource looks here
    try:
        spec.loader.exec_module(module)
    except UserError as error:
        raise SweepError(f"{path}: {error}") from error
    except Exception as error:  # whatever the user's own file raises
        raise SweepError(f"{path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    sweep = getattr(module, "SWEEP", None)
    if not isinstance(sweep, Sweep):
        raise SweepError(f"{path}: defines no SWEEP = Sweep(…); see experiments/README.md.")
    return sweep
