"""The real programs of a config – training step, prefill, decode – compiled for a slice that need not exist.

Nothing is allocated and no data is opened: parameters, optimizer state and batch are shapes with shardings. What is
compiled is what a run compiles (:func:`moe_jax.training.step.jitted_train_step`, :mod:`moe_jax.inference.generate`), with
the same options.
"""

import contextlib
import dataclasses
import re
import time
import warnings
from typing import Any, Callable

from moe_jax.config import Config, ConfigError
from moe_jax.planning.hlo import Collective, collectives
from moe_jax.planning.operations import work
from moe_jax.planning.program import estimated_cycles
from moe_jax.planning.slices import PlanError, Slice, tpu_devices

STEPS = ("train", "prefill", "decode")


class OutOfMemory(PlanError):
    """The compiler refuses a program that needs more memory than a device has.

    Attributes:
      needed_bytes, available_bytes: per device, as it says; None if it does not.
    """

    def __init__(self, message: str, needed_bytes: int | None, available_bytes: int | None):
        super().__init__(message)
        self.needed_bytes, self.available_bytes = needed_bytes, available_bytes


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of one step of one config on one slice.

    Attributes:
      step: 'train', 'prefill' or 'decode'.
      arguments_bytes, output_bytes, temporary_bytes: per device; state and batch, new state and metrics, everything
        between.
      aliased_bytes: of the output, written over arguments that are no longer needed.
      peak_bytes: arguments, outputs that have a place of their own, and temporaries: what a device must have.
      flops: of products, per device and step, as compiled: with recomputation, padded buffers and replicated work
        (:mod:`moe_jax.planning.operations`).
      kernel_flops: the part of them in Pallas kernels (attention, grouped products), as declared or by formula.
      uncounted_kernels: names of kernels whose FLOPs are not known.
      bytes_accessed: per device and step, to and from memory, as compiled.
      cycles: the compiler's own estimate for one device, without kernels and most collectives; None where it makes none.
      collectives: see :mod:`moe_jax.planning.hlo`; those that only a skewed load needs are ``conditional``, and no other
        figure here counts what belongs to them.
      lower_seconds, compile_seconds: tracing and lowering; the compiler.
    """

    step: str
    arguments_bytes: int
    output_bytes: int
    temporary_bytes: int
    aliased_bytes: int
    peak_bytes: int
    flops: float
    kernel_flops: float
    uncounted_kernels: tuple[str, ...]
    bytes_accessed: float
    cycles: float | None
    collectives: tuple[Collective, ...]
    lower_seconds: float
    compile_seconds: float


def compile_step(config: Config, slice_: Slice, sizes: dict[str, int], step: str = "train",
                 say: Callable[[str], None] | None = None) -> CompiledStep:
    """Compiles one step for the slice; minutes for large models.

    Args:
      sizes: of the mesh axes (:func:`moe_jax.sharding.resolve_mesh` with ``slice_.devices``).
      step: 'train': one optimizer step on ``data.batch_size`` rows; 'prefill': prompts of ``data.sequence_length`` tokens,
        as many; 'decode': one token more for each, with a full cache of that length. An encoder–decoder's encoder reads the
        prompts, and its decoder has a cache of ``data.target_length`` tokens.
      say: told in words what is going on.

    Raises:
      PlanError: libtpu is not installed, or refuses; OutOfMemory: the program does not fit into a device's memory.
      ConfigError: the vocabulary's size is not given, or an option cannot be had on TPUs.
    """
    if step not in STEPS:
        raise ValueError(f"step={step!r}: must be one of {', '.join(STEPS)}.")
    if not config.model.vocab_size:
        raise ConfigError("model.vocab_size=0: a plan opens no data, so the size of the vocabulary must be given; e.g. "
                          "32000 for Mixtral's.")
    say = say or (lambda text: None)
    devices = tpu_devices(slice_)
    import jax

    from moe_jax.sharding import make_mesh

    mesh = make_mesh(sizes, devices, config.mesh.slice_axis)
    with jax.set_mesh(mesh), _without_cache():
        say(f"tracing the {step} step")
        start = time.monotonic()
        lowered = _lowered(config, mesh, step)
        lowering = time.monotonic() - start
        say(f"compiling the {step} step for {slice_.name}")
        start = time.monotonic()
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise _refused(error, slice_) from error
        compiling = time.monotonic() - start
    say("reading the compiled program")
    return _read(program, mesh, step, lowering, compiling)


@contextlib.contextmanager
def _without_cache():
    """JAX's persistent cache writes programs for absent devices but cannot load them, and warns at every later compile."""
    import jax

    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Error reading persistent compilation cache entry")
            yield
    finally:
        jax.config.update(name, before)


def _lowered(config, mesh, step):
    """The step's program before compilation; ``mesh`` is in context."""
    from moe_jax.inference import generate
    from moe_jax.training.state import abstract_state
    from moe_jax.training.step import jitted_train_step

    vocab_size = config.model.vocab_size
    state = abstract_state(config, vocab_size, mesh)
    if step == "train":
        return jitted_train_step(config, vocab_size).lower(state, abstract_batch(config, mesh))
    return generate.lowered(step, config, vocab_size, state["params"], state["router_bias_LE"], config.data.batch_size,
                            config.data.sequence_length, config.data.target_length)


def abstract_batch(config: Config, mesh: Any) -> dict[str, Any]:
    """Shapes, dtypes and shardings of a training batch (:mod:`moe_jax.data.batches`)."""
    import jax
    import jax.numpy as jnp

    from moe_jax.data.batches import ENCODER, padding_of
    from moe_jax.sharding import batch_sharding

    data = config.data
    length = lambda name: data.target_length if data.target_length and not name.startswith(ENCODER) else data.sequence_length
    dtype = lambda value: jnp.bool_ if isinstance(value, bool) else jnp.int32
    return {name: jax.ShapeDtypeStruct((data.batch_size, length(name)), dtype(value), sharding=batch_sharding(mesh))
            for name, value in padding_of(data).items()}


_SIZE = r"([\d.]+)([KMGT]?)"
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _refused(error, slice_):
    """The compiler's error in one line, for people."""
    text = " ".join(str(error).split())
    if not text.startswith("RESOURCE_EXHAUSTED"):
        return PlanError(f"The compiler for {slice_.name} refuses the program: {text[:600]}")
    found = (re.search(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)", text)
             or re.search(rf"Used {_SIZE} of {_SIZE} hbm", text))
    needed, available = None, None
    if found:
        needed, available = (int(float(number) * _UNITS[unit]) for number, unit in
                             (found.group(1, 2), found.group(3, 4)))
    how = f"{needed / 2**30:.1f} GiB of {available / 2**30:.1f} GiB" if found else text[:300]
    return OutOfMemory(f"The program does not fit into the memory of one device of {slice_.name}: {how}.", needed, available)


def _read(program, mesh, step, lowering, compiling):
    memory, text = program.memory_analysis(), program.as_text()
    # What only a skewed load needs (further rounds of a dropless exchange) is left out, as in formulas.
    done = work(text, open_ended=0)
    return CompiledStep(
        step=step, arguments_bytes=memory.argument_size_in_bytes, output_bytes=memory.output_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes, aliased_bytes=memory.alias_size_in_bytes,
        peak_bytes=(memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
                    + memory.temp_size_in_bytes),
        flops=done.flops, kernel_flops=done.kernel_flops, uncounted_kernels=tuple(sorted(done.uncounted_kernels)),
        bytes_accessed=done.bytes, cycles=_usable(estimated_cycles(text, branch=min)), collectives=collectives(text, mesh),
        lower_seconds=lowering, compile_seconds=compiling)


def _usable(cycles):
    """None where one instruction's estimate is 2^64 - 1 or nearly: the compiler's way to say that it has none."""
    return None if cycles is None or cycles >= 2**60 else float(cycles)
