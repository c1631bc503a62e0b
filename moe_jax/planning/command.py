"""``moe-jax plan``: from the words of the command line to a table, a picture or JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from moe_jax.config import Config, ConfigError
from moe_jax.data.vocabularies import VocabularyError, load_vocabulary, sentencepiece_size
from moe_jax.models import families
from moe_jax.planning import plan_cache
from moe_jax.planning.compiled import STEPS
from moe_jax.planning.plan import Plan, make_plan
from moe_jax.planning.plan_table import text_of, text_of_search
from moe_jax.planning.search import Found, chosen_mesh, search
from moe_jax.planning.slices import INSTALL_LIBTPU, Slice, has_libtpu, parse_slice
from moe_jax.planning.waiting import Waiting
from moe_jax.sharding import AXES, resolve_mesh
from moe_jax.training.metrics import versions
from moe_jax.training.state import table_size

# Meshes that a search compiles unless it is told.
_COMPILED = 3


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
      name: of the config.
      slice: by name.
      mesh: 'data=8,expert=8'; '' for the config's own.
      step: train, prefill or decode.
      batch, context: instead of data.batch_size and data.sequence_length; None leaves them.
      search: compile the best so many of all legal meshes, 0: three; None: plan one mesh.
      formula: do not compile.
      cache: take and keep plans that were compiled.
      json: print JSON and nothing else.
      out: the picture; '' for the default, which JSON does not write.
      filled_in: settings that stand in the config because something must, 'model.dtype', not because anybody gave them.
      free_mesh: so does its mesh: one is chosen, and the number of microbatches if it is among ``filled_in``.
    """

    name: str
    slice: str
    mesh: str = ""
    step: str = "train"
    batch: int | None = None
    context: int | None = None
    search: int | None = None
    formula: bool = False
    cache: bool = True
    json: bool = False
    out: str = ""
    filled_in: tuple[str, ...] = ()
    free_mesh: bool = False


def check_request(request: Request) -> None:
    """Refuses what cannot be meant, before anything is loaded.

    Raises:
      ConfigError: that.
    """
    def require(condition: bool, text: str) -> None:
        if not condition:
            raise ConfigError(text)

    require(request.slice != "", "--slice is missing: name the TPUs to plan for, e.g. --slice=v5p-128, "
            "--slice=v5p:4x4x4 or --slice='2x v6e-256'.")
    require(request.step in STEPS, f"--step={request.step}: allowed are {', '.join(STEPS)}.")
    for name in ("batch", "context"):
        value = getattr(request, name)
        require(value is None or value >= 1, f"--{name}={value}: must be at least 1.")
    if request.search is not None:
        require(request.search >= 0, f"--search={request.search}: must be the number of meshes to compile, at least 1.")
        require(not request.mesh, "--search looks for a mesh and --mesh names one; leave one of them out.")
        require(not (request.search and request.formula), f"--search={request.search} compiles and --formula does not; "
                f"leave one of them out, or say --search alone.")
    require(not request.out or request.out.endswith(".png"), f"--out={request.out}: must end in .png; the picture is one.")
    require(request.cache or not request.formula,
            "--no-cache compiles again and --formula does not; leave one of them out.")


def without_a_file(request: Request, overrides: list[str]) -> Request:
    """The request for a model by its name (``request.name``), family and size: what of its settings neither the table of
    families nor ``overrides``, the words ``--config.…``, give, is filled in."""
    given = {word.removeprefix("--config.").split("=", 1)[0] for word in overrides}
    family, _, size = request.name.partition(":")
    keys = [f"{section}.{name}" for section, values in families.filled_in(family, size).items() for name in values]
    keys += ["training.microbatches", "training.num_steps"] if keys and request.step == "train" else []
    free_mesh = not request.mesh and not any(key.startswith("mesh.") for key in given)
    return dataclasses.replace(request, filled_in=tuple(key for key in keys if key not in given), free_mesh=free_mesh)


def run(config: Config, request: Request) -> int:
    """Plans, prints, draws; returns the exit code.

    Raises:
      ConfigError: slice, mesh and config do not go together.
      PlanError: the compiler refuses, or a file cannot be written.
    """
    slice_ = parse_slice(request.slice)
    config = planned_config(config, request)
    chooses = request.free_mesh and request.search is None
    if request.search is None and not chooses:
        check_mesh(config, slice_)
    compiles = not request.formula
    if compiles and not has_libtpu():
        print(f"libtpu, the compiler for TPUs, is not installed: this plan is by formula. To compile the real program: "
              f"{INSTALL_LIBTPU}", file=sys.stderr)
        compiles = False
    planner = _Planner(request, slice_)
    quietly = functools.partial(planner.plan, alternatives=False)
    with Waiting() as waiting, ended_at_once_by_ctrl_c():
        if chooses:
            waiting.say("choosing a mesh by formula")
            config = chosen_mesh(config, slice_, quietly, "training.microbatches" in request.filled_in)
        if request.search is None:
            plan, found = planner.plan(config, compiles, waiting.say), None
        else:
            found = search(config, slice_, quietly, (request.search or _COMPILED) if compiles else 0, waiting.say)
            plan = found.best
    if plan is not None:
        plan = dataclasses.replace(plan, chosen=_chosen(config, request, plan.mesh if chooses else {}))
    if request.json:
        print(json.dumps(_search_dict(found) if found else plan.to_dict(), indent=1))
    else:
        _print(plan, found)
    if request.out or not request.json:
        _draw(plan, found, pathlib.Path(request.out or "plan.png"))
    return 0


@contextlib.contextmanager
def ended_at_once_by_ctrl_c() -> Iterator[None]:
    """Python hears of Ctrl-C when the compiler returns, minutes later: meanwhile the system ends the process. Nothing is
    lost by that, since files are written whole or not at all."""
    if threading.current_thread() is not threading.main_thread():  # only there may this be changed
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def planned_config(config: Config, request: Request) -> Config:
    """The config with the mesh, batch and length that are asked for, and the size of its vocabulary.

    Raises:
      ConfigError: they do not fit together, or the vocabulary's size can only be known by reading the corpus; a model that
        plans know nothing of.
    """
    if config.model.architecture == "lstm":
        raise ConfigError("model.architecture='lstm': plans are of transformers; there are no formulas for an LSTM.")
    data = dataclasses.replace(config.data, batch_size=request.batch or config.data.batch_size,
                               sequence_length=request.context or config.data.sequence_length)
    training = config.training
    if request.step != "train":  # nothing is accumulated
        training = dataclasses.replace(training, microbatches=1)
    model = dataclasses.replace(config.model, vocab_size=_vocab_size(config))
    mesh = dataclasses.replace(config.mesh, **parse_mesh(request.mesh)) if request.mesh else config.mesh
    return dataclasses.replace(config, data=data, training=training, model=model, mesh=mesh)


def _chosen(config: Config, request: Request, mesh: dict[str, int]) -> tuple[str, ...]:
    """What nobody gave, as one would write it."""
    value = lambda key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1])
    given = {"data.batch_size": request.batch, "data.sequence_length": request.context}
    words = [f"--config.{key}={value(key)}" for key in request.filled_in if not given.get(key)]
    axes = ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "data=1"
    return (*words, *([f"--mesh={axes}"] if mesh else []))


def _vocab_size(config: Config) -> int:
    if config.model.vocab_size:
        return config.model.vocab_size
    name = config.data.vocabulary
    try:
        size = sentencepiece_size(name) or load_vocabulary(name).vocab_size
    except VocabularyError as error:
        raise ConfigError(f"model.vocab_size=0, and {error}. A plan needs no vocabulary but its size: "
                          f"--config.model.vocab_size=32000, for example.") from error
    return table_size(config, size)


def parse_mesh(text: str) -> dict[str, int]:
    """``'data=8,expert=8'``. Axes that are not named are 1, but for data, which takes what remains.

    Raises:
      ConfigError: it cannot be read.
    """
    sizes = {"data": 0, "fsdp": 1, "expert": 1, "tensor": 1}
    named = set()
    for word in text.split(","):
        axis, _, size = (part.strip() for part in word.partition("="))
        if axis not in AXES or not size.isdecimal() or int(size) < 1 or axis in named:
            raise ConfigError(f"--mesh={text}: cannot be read at {word.strip()!r}; wanted is axis=devices, separated by "
                              f"commas, of the axes {', '.join(AXES)}: --mesh=data=8,expert=8.")
        named.add(axis)
        sizes[axis] = int(size)
    return sizes


def check_mesh(config: Config, slice_: Slice) -> dict[str, int]:
    """Sizes of the mesh's axes on the slice.

    Raises:
      ConfigError: it does not fit.
    """
    try:
        return resolve_mesh(config, slice_.devices)
    except ConfigError as error:
        has = f"{slice_.chips} chips"
        if slice_.devices != slice_.chips:
            has += f" of {slice_.chip.devices_per_chip} devices"
        raise ConfigError(f"{error} {slice_.name} has {has}; --search lists the meshes that fit.") from None


@dataclasses.dataclass(frozen=True)
class _Planner:
    """Makes plans, or takes them from the cache."""

    request: Request
    slice_: Slice

    def plan(self, config: Config, compiled: bool, say=lambda text: None, alternatives: bool = True) -> Plan:
        sizes, request = check_mesh(config, self.slice_), self.request
        make = lambda: make_plan(config, self.slice_, sizes, request.step, compiled, say, name=request.name,
                                 alternatives=alternatives)
        if not (compiled and request.cache):
            return make()
        made_by = {name: versions()[name] for name in ("python", "jax", "jaxlib", "libtpu", "flax", "optax")}
        key = plan_cache.key_of(name=request.name, config=config.to_dict(), slice=dataclasses.asdict(self.slice_),
                                mesh=sizes, step=request.step, versions=made_by)
        with contextlib.suppress(KeyError, TypeError):
            kept = Plan.from_dict(plan_cache.read(key) or {})
            # A search does not look for changes with which a mesh would fit.
            if kept.memory.fits or kept.changes or not alternatives:
                return kept
        plan = make()
        plan_cache.write(key, plan.to_dict())
        return plan


def _search_dict(found: Found) -> dict[str, Any]:
    def row(plan: Plan) -> dict[str, Any]:
        return {"mesh": plan.mesh, "basis": plan.basis, "peak_bytes_per_chip": plan.memory.peak_bytes,
                "available_bytes_per_chip": plan.memory.available_bytes, "fits": plan.memory.fits,
                "step_seconds": plan.time.seconds, "bound": plan.time.bound,
                "tokens_per_second": plan.tokens_per_second, "mfu_upper_bound": plan.mfu_upper_bound}
    return {"meshes": [row(plan) for plan in found.plans], "best": found.best and found.best.to_dict()}


def _print(plan: Plan | None, found: Found | None) -> None:
    if found is not None:
        print(text_of_search(found.plans, found.best))
        if plan is None:
            return
        print()
    print(text_of(plan))


def _draw(plan: Plan | None, found: Found | None, path: pathlib.Path) -> None:
    from moe_jax.planning.plan_figures import plan_figure, search_figure, write_figure
    shown = 16  # more would be a poster
    figure = plan_figure(plan) if found is None else search_figure(found.plans[:shown], found.best)
    write_figure(figure, path)
    print(f"picture: {path}", file=sys.stderr)
