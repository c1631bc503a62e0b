"""One plan: what a step of a config needs and takes on a slice, by formula and, where libtpu is installed, compiled.

Bytes are of one chip, FLOPs of all chips together, seconds of one step, unless a name says otherwise. On chips with two
devices (tpu7x) a chip's bytes are those of both.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.config import Config
from moe_jax.planning.compiled import CompiledStep, OutOfMemory, compile_step
from moe_jax.planning.formulas import Estimate, estimate
from moe_jax.planning.slices import INSTALL_LIBTPU, Slice, has_libtpu
from moe_jax.planning.suggestions import Suggestion, suggestions
from moe_jax.planning.times import StepTime, collective_seconds, step_time
from moe_jax.training.metrics import versions

COMPILED, BY_FORMULA = "compiled", "by formula"

# Changes that are named where a step does not fit.
_MOST_CHANGES = 4


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip's memory.

    Attributes:
      formula_bytes: what is in it by formula, by name; together formula_peak_bytes.
      compiled_bytes: what the compiler laid out, by name; together its peak. Empty without a compiled program.
      peak_bytes: the most that is in use: the compiler's figure if there is one.
      available_bytes: what a program may use.
    """

    formula_bytes: dict[str, int]
    compiled_bytes: dict[str, int]
    peak_bytes: int
    available_bytes: int

    @property
    def formula_peak_bytes(self) -> int:
        return sum(self.formula_bytes.values())

    @property
    def headroom_bytes(self) -> int:
        """Negative: so much is missing."""
        return self.available_bytes - self.peak_bytes

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.available_bytes


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective of the step, with the time it takes.

    Attributes:
      kind, axes, dtype, shape, scope: as of :class:`moe_jax.planning.hlo.Collective`.
      bytes_sent: by one device in one execution.
      count: executions per step.
      seconds: of all of them, at the bandwidth of the links they use.
      asynchronous: started and waited for at two places of the program.
      overlapped: and something is computed in between.
      conditional: it runs only if the data ask for it, or as often as they do: ``count`` is not certain.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    shape: str
    scope: str
    bytes_sent: int
    count: int
    seconds: float
    asynchronous: bool
    overlapped: bool
    conditional: bool


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of settings with which the step would fit.

    Attributes:
      settings: as one would write them, '--config.training.microbatches=4'.
      why: what it does.
      peak_bytes: of one chip, then.
      basis: whether that was compiled or is by formula.
    """

    settings: tuple[str, ...]
    why: str
    peak_bytes: int
    basis: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """See the fields' names; units are in them.

    Attributes:
      name: of the config.
      basis: 'compiled' or 'by formula'; why: a sentence on that.
      sequences, sequence_tokens: one step's: of training or prefill, or those that decoding adds one token each to. Of an
        encoder–decoder the encoder's, and ``target_tokens`` the decoder's; 0 without an encoder.
      parameters_active: per token.
      model_flops: of the active parameters, as MFU counts. hardware_flops: those that are computed: recomputation and
        padded buffers too. compiled_flops: as the compiler counts them; None without it.
      kv_cache_bytes: of all chips; 0 in training.
      num_steps: of the configured run.
      chosen: settings that nobody gave, as one would write them ('--config.model.dtype=bfloat16', '--mesh=fsdp=8,expert=8'): of
        a model that is planned by its name.
    """

    name: str
    step: str
    slice: Slice
    mesh: dict[str, int]
    basis: str
    why: str
    sequences: int
    sequence_tokens: int
    parameters_total: int
    parameters_active: int
    memory: Memory
    changes: tuple[Change, ...]
    exchanges: tuple[Exchange, ...]
    model_flops: float
    hardware_flops: float
    compiled_flops: float | None
    time: StepTime
    kv_cache_bytes: int
    num_steps: int
    lower_seconds: float | None
    compile_seconds: float | None
    versions: dict[str, Any]
    chosen: tuple[str, ...] = ()
    target_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Of one step, all chips: one for each sequence where one is decoded; of training those of encoder and decoder."""
        length = self.sequence_tokens + (self.target_tokens if self.step == "train" else 0)
        return self.sequences * (1 if self.step == "decode" else length)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.time.seconds

    @property
    def mfu_upper_bound(self) -> float:
        """Model FLOPs over what all chips could compute in the estimated time, 0..1."""
        return self.model_flops / (self.time.seconds * self.slice.chips * self.slice.chip.peak_bf16_flops)

    @property
    def chip_hours(self) -> float | None:
        """Of the configured run, at the estimated time; None but for training."""
        return self.num_steps * self.time.seconds * self.slice.chips / 3600 if self.step == "train" else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with what follows from the rest."""
        memory = {**dataclasses.asdict(self.memory), "formula_peak_bytes": self.memory.formula_peak_bytes,
                  "headroom_bytes": self.memory.headroom_bytes, "fits": self.memory.fits}
        return {**dataclasses.asdict(self), "memory": memory, "tokens": self.tokens,
                "tokens_per_second": self.tokens_per_second, "mfu_upper_bound": self.mfu_upper_bound,
                "chip_hours": self.chip_hours}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Plan:
        """Of :meth:`to_dict`, also after it has been JSON.

        Raises:
          KeyError, TypeError: something is missing or is not what it should be.
        """
        return _read(cls, found)


def _read(kind: Any, value: Any) -> Any:
    """``value``, from JSON, as ``kind``: a dataclass, a tuple of something, or as it is."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{field.name: _read(hints[field.name], value[field.name]) for field in dataclasses.fields(kind)})
    if typing.get_origin(kind) is tuple:
        return tuple(_read(typing.get_args(kind)[0], each) for each in value)
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (typing.get_origin(kind) or kind,)
    if Any not in allowed and not isinstance(value, (*allowed, int) if float in allowed else allowed):
        raise TypeError(f"{value!r} is no {kind}")
    return value


# How a plan is made.


def make_plan(config: Config, slice_: Slice, sizes: dict[str, int], step: str = "train", compile: bool = True,
              say: Callable[[str], None] = lambda text: None, name: str = "config", alternatives: bool = True) -> Plan:
    """The plan of one step ('train', 'prefill', 'decode') on the slice, with mesh axes of ``sizes``.

    Args:
      config: with ``model.vocab_size``; batch and length are ``data.batch_size`` and ``data.sequence_length``.
      compile: the real program, which takes minutes and libtpu; False: by formula.
      say: told in words what is going on.
      name: of the config.
      alternatives: where the step does not fit, look for a change with which it would.

    Raises:
      PlanError: the compiler refuses the program for another reason than memory. ConfigError: see ``compile_step``.
    """
    guess = estimate(config, slice_, sizes, step)
    compiled, refused = None, None
    if compile:
        try:
            compiled = compile_step(config, slice_, sizes, step, say)
        except OutOfMemory as error:
            refused = error
    memory = _memory(guess, compiled, refused, slice_)
    collectives, axis = compiled.collectives if compiled else guess.collectives, config.mesh.slice_axis
    if compiled:
        time = step_time(slice_, sizes, compiled.flops, compiled.bytes_accessed, collectives, compiled.cycles,
                         compiled.kernel_flops, slice_axis=axis)
    else:
        time = step_time(slice_, sizes, guess.hardware_flops / slice_.devices, _traffic(guess), collectives,
                         slice_axis=axis)
    exchanges = tuple(
        Exchange(each.kind, each.axes, each.dtype, each.shape, each.scope, each.bytes, each.count,
                 each.count * collective_seconds(each, slice_, sizes, axis), each.asynchronous, each.overlapped,
                 each.conditional)
        for each in collectives)
    changes = ()
    if alternatives and not memory.fits:
        say("looking for a change with which it fits")
        # What the compiler needed over what the formula said.
        correction = memory.peak_bytes / memory.formula_peak_bytes if compile else 1.0
        found = itertools.islice(suggestions(config, slice_, sizes, step, correction), _MOST_CHANGES)
        changes = _changes(list(found), step, compile, correction, say)
    return Plan(
        name=name, step=step, slice=slice_, mesh=dict(sizes), basis=COMPILED if compiled else BY_FORMULA,
        why=_why(compile, refused), sequences=config.data.batch_size, sequence_tokens=config.data.sequence_length,
        parameters_total=guess.parameters_total, parameters_active=guess.parameters_active, memory=memory,
        changes=changes,
        exchanges=exchanges, model_flops=guess.model_flops, hardware_flops=guess.hardware_flops,
        compiled_flops=compiled.flops * slice_.devices if compiled else None, time=time,
        kv_cache_bytes=guess.kv_cache_bytes * slice_.devices, num_steps=config.training.num_steps,
        lower_seconds=compiled and compiled.lower_seconds, compile_seconds=compiled and compiled.compile_seconds,
        versions=versions(), target_tokens=config.data.target_length)


def _changes(found: list[Suggestion], step: str, compile: bool, correction: float,
             say: Callable[[str], None]) -> tuple[Change, ...]:
    """The suggestions, compiled from the smallest on until one is known to fit; what the compiler refuses is left out."""
    changes, known = [], not compile
    for each in found:
        if any(set(one.settings) <= set(each.settings) for one in changes):  # less would do
            continue
        peak, basis = round(each.estimate.peak_bytes * correction), BY_FORMULA
        if not known:
            try:
                compiled = compile_step(each.config, each.slice, each.sizes, step,
                                        lambda text: say(f"with {' '.join(each.settings)}: {text}"))
            except OutOfMemory:
                continue
            peak, basis, known = compiled.peak_bytes, COMPILED, True
        changes.append(Change(each.settings, each.why, peak * each.slice.chip.devices_per_chip, basis))
    return tuple(changes)


def _why(compile: bool, refused: OutOfMemory | None) -> str:
    if compile and refused is None:
        return "the real program, compiled by libtpu for this slice; no TPU ran it."
    least = "Memory traffic is what must be read and written at the least."
    if refused is not None:
        return f"the compiler refuses the program. {refused} {least}"
    if has_libtpu():
        return f"nothing was compiled. {least}"
    return f"libtpu, the compiler for TPUs, is not installed ({INSTALL_LIBTPU}). {least}"


def _memory(guess: Estimate, compiled: CompiledStep | None, refused: OutOfMemory | None, slice_: Slice) -> Memory:
    """Of a chip: all of its devices hold as much."""
    devices, chip_bytes = slice_.chip.devices_per_chip, slice_.chip.hbm_bytes
    of_chip = lambda parts: {name: count * devices for name, count in parts.items()}
    formula = of_chip(guess.memory_bytes)
    if compiled:
        parts = {"arguments": compiled.arguments_bytes,
                 "results elsewhere": compiled.output_bytes - compiled.aliased_bytes, "temporaries": compiled.temporary_bytes}
        return Memory(formula, of_chip(parts), compiled.peak_bytes * devices, chip_bytes)
    peak = guess.peak_bytes
    if refused is not None:  # what the compiler needs counts; it does not say how that is made up
        peak = refused.needed_bytes or max(peak, chip_bytes // devices + 1)
    return Memory(formula, {}, peak * devices, chip_bytes)


def _traffic(guess: Estimate) -> float:
    """Bytes to and from a device's memory, at the least: everything that lies there is written or read once; of training,
    which updates it, both."""
    held = guess.memory_bytes
    return sum(held.values()) * (2 if guess.step == "train" else 1)
