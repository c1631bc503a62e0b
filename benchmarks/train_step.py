"""The training step of a config beside that of its dense twin, timed alternately in one process. Prints JSON lines.

    python -m benchmarks.train_step                              # configs/openmoe_tiny.py on one device
    python -m benchmarks.train_step --dispatch=dropless --config.moe.num_experts=32
    python -m benchmarks.train_step --startup --devices=8        # seconds from the command to the first step

The dense twin is the same model without experts: every layer has one FFN, whose width makes the floating-point
operations per token equal (benchmarks/README.md). What the fields mean is written there too.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.command_line import load_average, parsed, parser_of, versions
from moe_jax import environment

WARM_UP_STEPS = 3
STEPS = 20  # of each model; a median of fewer is not worth quoting
# The widths that run fastest first; one that misses the operations by more is not a twin.
ROUND_WIDTHS, LARGEST_DIFFERENCE = (128, 64, 32, 16, 8, 1), 0.01


def main(argv: list[str] | None = None) -> int:
    arguments, overrides = parsed(_parser(), argv, steps=1, devices=1)
    if arguments.dispatch:
        overrides.append(f"--config.moe.dispatch={arguments.dispatch}")
    if arguments.startup:
        for line in measure_startup(arguments.config, arguments.devices, overrides):
            _print(line)
        return 0
    environment.prepare_process(arguments.devices)  # what `moe-jax train` does before JAX starts
    from moe_jax.config import ConfigError, load_config
    from moe_jax.errors import UserError

    try:
        config = load_config(arguments.config, overrides)
        if not config.moe_layers:
            raise ConfigError("moe.num_experts=0: a dense model has no dense twin.")
        for line in measure_steps(config, arguments.steps):
            _print({"config": arguments.config, "overrides": overrides, **line})
    except UserError as error:
        print(f"train_step: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("train_step", __doc__)
    parser.add_argument("--steps", type=int, default=STEPS, help="timed steps of each model (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices to pretend to have (default: %(default)s)")
    parser.add_argument("--dispatch", default="", help="moe.dispatch (default: the config's)")
    parser.add_argument("--startup", action="store_true", help="time the start of a real run instead: empty caches, "
                        "then filled ones")
    return parser


def _print(line: dict) -> None:
    print(json.dumps(line), flush=True)


# Steps.


def dense_twin(config, vocab_size: int):
    """``config`` without experts, every FFN of one width, so that the forward FLOPs per token agree.

    Raises:
      ConfigError: no width comes within 1 %.
    """
    from moe_jax.config import ConfigError
    from moe_jax.training.flops import forward_flops_per_token

    def flops(candidate):
        return forward_flops_per_token(candidate, vocab_size, config.data.sequence_length)

    def dense(width):
        return dataclasses.replace(config, model=dataclasses.replace(config.model, d_ff=width),
                                   moe=dataclasses.replace(config.moe, num_experts=0))

    without, slope = flops(dense(1)), flops(dense(2)) - flops(dense(1))
    exact = 1 + (flops(config) - without) / slope
    for multiple in ROUND_WIDTHS:
        twin = dense(max(1, round(exact / multiple)) * multiple)
        if abs(flops(twin) / flops(config) - 1) <= LARGEST_DIFFERENCE:
            return twin
    raise ConfigError(f"no dense width comes within {LARGEST_DIFFERENCE:.0%} of this config's operations (the exact one "
                      f"is {exact:.2f}).")


def measure_steps(config, steps: int):
    """Yields one dict per model, then one that compares them."""
    import jax

    from moe_jax.training.run import check_config_matches_mesh, open_run

    check_config_matches_mesh(config, jax.device_count())
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(config, pathlib.Path(folder))
        # Both are compiled from nothing; open_run's cache would serve the second run of this benchmark.
        jax.config.update("jax_enable_compilation_cache", False)
        load = load_average()
        moe = CompiledStep("moe", config, run)
        dense = CompiledStep("dense", dense_twin(config, run.vocab_size), run)
        for _ in range(WARM_UP_STEPS):
            moe.timed_step(), dense.timed_step()
        for _ in range(steps):  # A B A B …: what slows the machine down slows both
            moe.timed_step(keep=True), dense.timed_step(keep=True)
        yield moe.result()
        yield dense.result()
        yield {**compare(moe, dense), **data_wait(moe, steps), "load_average_before": load,
               "peak_rss_bytes": peak_rss_bytes(), **versions()}


class CompiledStep:
    """A training step as ``moe-jax train`` compiles it, with its state and a few batches on the devices."""

    def __init__(self, name: str, config, run):
        import jax

        from moe_jax.sharding import make_mesh, resolve_mesh
        from moe_jax.training.evaluate import put_batch
        from moe_jax.training.state import new_state
        from moe_jax.training.step import jitted_train_step

        self.name, self.config, self.run, self.seconds = name, config, run, []
        self.mesh = make_mesh(resolve_mesh(config, jax.device_count()))
        with jax.set_mesh(self.mesh):
            self.state = jax.block_until_ready(new_state(config, run.vocab_size, self.mesh))
            batches = [put_batch(run.data.train.batch(step), self.mesh) for step in range(4)]
            started = time.perf_counter()
            lowered = jitted_train_step(config, run.vocab_size).lower(self.state, batches[0])
            traced = time.perf_counter()
            self.step = lowered.compile()
        self.trace_seconds, self.compile_seconds = traced - started, time.perf_counter() - traced
        self._batches = itertools.cycle(jax.block_until_ready(batches))

    def timed_step(self, keep: bool = False) -> None:
        """One step, waited for."""
        import jax

        batch = next(self._batches)
        started = time.perf_counter()
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.step(self.state, batch)
        jax.block_until_ready((self.state, metrics))
        if keep:
            self.seconds.append(time.perf_counter() - started)
        assert bool(metrics["applied"]), "the step was not finite"

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def flops(self) -> float:
        """Forward, per token."""
        from moe_jax.training.flops import forward_flops_per_token

        return forward_flops_per_token(self.config, self.run.vocab_size, self.config.data.sequence_length)

    def result(self) -> dict:
        from moe_jax.training.flops import count_parameters

        config, parameters = self.config, count_parameters(self.config, self.run.vocab_size)
        return {
            "benchmark": "train_step", "model": self.name,
            "tokens_per_second": config.tokens_per_step / self.median,
            "step_seconds": self.median, "step_seconds_quartiles": quartiles(self.seconds), "steps": len(self.seconds),
            "trace_seconds": self.trace_seconds, "compile_seconds": self.compile_seconds,
            **memory(self.step),
            "forward_flops_per_token": self.flops,
            "parameters": parameters.total, "active_parameters": parameters.active,
            "tokens_per_step": config.tokens_per_step, "d_ff": config.model.d_ff,
            "experts": config.moe.num_experts, "dispatch": config.moe.dispatch if config.moe_layers else None,
            "mesh": dict(self.mesh.shape),
        }


def quartiles(values: list[float]) -> list[float]:
    """Lower and upper quartile."""
    return [values[0]] * 2 if len(values) == 1 else [statistics.quantiles(values, n=4)[i] for i in (0, 2)]


def memory(compiled) -> dict:
    """Bytes of one device that the compiled program needs: arguments (state and batch) and temporaries."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {"temp_bytes": None, "argument_bytes": None, "peak_bytes": None}
    temporary, argument = analysis.temp_size_in_bytes, analysis.argument_size_in_bytes
    return {"temp_bytes": temporary, "argument_bytes": argument, "peak_bytes": temporary + argument}


def compare(moe: CompiledStep, dense: CompiledStep) -> dict:
    """The MoE step over the dense one: medians, and the quartiles of the ratios of neighbouring steps."""
    ratios = [a / b for a, b in zip(moe.seconds, dense.seconds)]
    return {"benchmark": "train_step", "model": "moe / dense", "step_ratio": moe.median / dense.median,
            "step_ratio_quartiles": quartiles(ratios), "flops_ratio": moe.flops / dense.flops,
            "compile_ratio": moe.compile_seconds / dense.compile_seconds}


def data_wait(moe: CompiledStep, steps: int) -> dict:
    """A short loop as the run's own: batches come from the Prefetcher, metrics are read one step late.

    The first two waits are left out: nothing has been prepared yet.
    """
    import jax

    from moe_jax.data.batches import Prefetcher
    from moe_jax.training.evaluate import put_batch

    waits, pending = [], None
    with jax.set_mesh(moe.mesh), Prefetcher(
            moe.run.data.train.batch, 0, lambda batch: put_batch(batch, moe.mesh)) as prefetcher:
        started = time.perf_counter()
        for _ in range(steps + 2):
            _, batch, waited = prefetcher.next()
            moe.state, metrics = moe.step(moe.state, batch)
            if pending is not None:
                jax.device_get(pending)
            pending = metrics
            waits.append(waited)
        jax.block_until_ready(moe.state)
        seconds = (time.perf_counter() - started) / len(waits)
    return {"data_wait_seconds": statistics.mean(waits[2:]), "data_wait_seconds_longest": max(waits[2:]),
            "loop_step_seconds": seconds}


def peak_rss_bytes() -> int | None:
    """The most memory this process has held, both models together; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# Start-up.


def measure_startup(config: str, devices: int, overrides: list[str]):
    """Yields the seconds from starting ``moe-jax train`` to its first finished step: nothing cached, then everything.

    The caches are the compiled programs and the tokenised corpus. Each run is stopped after its first step.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "MOE_JAX_CACHE": f"{folder}/data", "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled"}
        for name in ("cold", "warm"):
            command = [sys.executable, "-m", "moe_jax", "train", f"--config={config}", f"--workdir={folder}/{name}",
                       f"--devices={devices}", *overrides]
            yield {"benchmark": "startup", "caches": name, "config": config, "overrides": overrides, "devices": devices,
                   "cpu_count": os.cpu_count(), **_time_first_step(command, environment)}


def _time_first_step(command: list[str], environment: dict[str, str]) -> dict:
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    seen, wall, said = [], None, {}
    for line in process.stderr:
        seen.append(line)
        if match := re.search(r"prepared in ([\d.]+) s", line):
            said["prepare_corpus_seconds"] = float(match.group(1))
        if match := re.search(r"First step after ([\d.]+) s", line):
            wall = time.perf_counter() - started
            said["first_step_seconds_in_loop"] = float(match.group(1))
            process.send_signal(signal.SIGTERM)  # the run saves itself and ends
    process.wait()
    if wall is None:
        raise SystemExit(f"train_step: error: {' '.join(command)} ended before its first step:\n{''.join(seen[-5:])}")
    return {"first_step_seconds": wall, **said}


if __name__ == "__main__":
    sys.exit(main())
