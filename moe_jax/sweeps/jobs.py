"""What one worker does for one trained arm and one seed: train, evaluate it every way that is asked for, write the results."""

import dataclasses
import os
import pathlib
import platform
import shutil
import time
import traceback
from typing import Any

import jax

from moe_jax.config import Config
from moe_jax.files import source_fingerprint
from moe_jax.sweeps.definition import Continue, Evaluate, Sweep, SweepError, Upcycle
from moe_jax.sweeps.model import TrainedModel, curve, evaluation_metrics, open_trained, training_metrics, under_other_settings
from moe_jax.sweeps.results import Key, config_hash, finished, identity, write_result
from moe_jax.training.loop import train
from moe_jax.training.metrics import read_metrics, versions
from moe_jax.training.upcycle import Upcycling, write_upcycled_run


@dataclasses.dataclass(frozen=True)
class Job:
    """A trained arm and seed. wanted: the arms to write results of: itself, evaluations of it; none: others start from it."""

    arm: str
    scale: str
    seed: int
    wanted: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.arm}_seed{self.seed}"


def workdir_of(scratch: pathlib.Path, sweep: Sweep, arm: str, scale: str, seed: int) -> pathlib.Path:
    """Named by what decides the training, so that a changed arm begins anew and an interrupted one goes on."""
    key = Key(sweep.trained_arm(arm), scale, seed)
    return scratch / f"{key.arm}_seed{seed}_{config_hash({**identity(sweep, key), 'measure': ''})}"


def run_job(sweep: Sweep, job: Job, results: pathlib.Path, scratch: pathlib.Path, extra: dict[str, Any]) -> None:
    """Trains if that is not done, and writes one result for each arm that is wanted. ``extra``: for the results.

    Raises:
      UserError: as training and evaluation do. Interrupted: training was asked to stop, and saved itself.
    """
    workdir = workdir_of(scratch, sweep, job.arm, job.scale, job.seed)
    config = sweep.config_of(job.arm, job.scale, job.seed)
    started = time.monotonic()
    _start_from(sweep, job, config, workdir, scratch)
    train(config, str(workdir), finish=False)
    if not job.wanted:
        return
    trained = open_trained(job.arm, job.seed, config, workdir)
    extra = {**extra, "seconds": {"training": time.monotonic() - started}, "parameters": _parameters(trained)}
    errors = []
    for arm in job.wanted:
        key = Key(arm, job.scale, job.seed)
        try:
            if finished(sweep, results, key) is None:
                model = trained if arm == job.arm else _evaluated_otherwise(sweep, trained, key)
                write_result(results, key, _result(sweep, key, model, extra))
        except Exception as error:  # the other arms' results are worth having
            traceback.print_exc()
            errors.append(f"{arm}: {' '.join(str(error).split()) or type(error).__name__}")
    if errors:
        raise SweepError("; ".join(errors))
    # The functions compiled for one config are of no use to the next, and each keeps memory mappings.
    jax.clear_caches()


def _start_from(sweep: Sweep, job: Job, config: Config, workdir: pathlib.Path, scratch: pathlib.Path) -> None:
    """Puts the checkpoint in place that a continued arm starts from."""
    arm = sweep.arms[job.arm]
    if not isinstance(arm, (Continue, Upcycle)) or (workdir / "checkpoints").exists():
        return
    source = workdir_of(scratch, sweep, arm.start, job.scale, job.seed)
    if isinstance(arm, Upcycle):
        write_upcycled_run(source, config, workdir, Upcycling(**arm.how))
        return
    partial = workdir.with_name(workdir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source / "checkpoints", partial / "checkpoints")
    partial.rename(workdir)


def _evaluated_otherwise(sweep: Sweep, trained: TrainedModel, key: Key) -> TrainedModel:
    arm = sweep.arms[key.arm]
    assert isinstance(arm, Evaluate)
    return under_other_settings(trained, key.arm, sweep.config_of(key.arm, key.scale, key.seed), arm.causal)


def _result(sweep: Sweep, key: Key, model: TrainedModel, extra: dict[str, Any]) -> dict[str, Any]:
    started = time.monotonic()
    is_trained = not isinstance(sweep.arms[key.arm], Evaluate)
    metrics = evaluation_metrics(model) | (training_metrics(model.lines) if is_trained else {})
    if sweep.measure is not None:
        measured = {name: float(value) for name, value in sweep.measure(model).items()}
        if both := sorted(metrics.keys() & measured):
            raise SweepError(f"measure: gives {', '.join(both)}, which every run has anyway; choose another name.")
        metrics |= measured
    which = identity(sweep, key)
    seconds = {**extra["seconds"], "evaluation": time.monotonic() - started}
    return {"arm": key.arm, "scale": key.scale, "seed": key.seed, "config_hash": config_hash(which), "metrics": metrics,
            "curve": curve(model.lines) if is_trained else {}, "step": model.step, "parameters": extra["parameters"],
            "seconds": {name: round(value, 1) for name, value in seconds.items()}, "identity": which,
            "code": {"git_commit": versions()["git_commit"], "source_hash": source_fingerprint()[:16]},
            "machine": {**machine(), "jobs": extra["jobs"], "threads": extra["threads"]},
            "versions": {name: value for name, value in versions().items()
                         if name in ("python", "jax", "jaxlib", "flax", "optax", "numpy")}}


def _parameters(trained: TrainedModel) -> dict[str, float]:
    from moe_jax.training.flops import count_parameters, training_flops_per_token
    count = count_parameters(trained.config, trained.run.vocab_size)
    return {"total": count.total, "active": count.active,
            "training_flops_per_token": training_flops_per_token(trained.config, trained.run.vocab_size)}


def machine() -> dict[str, Any]:
    """What timings depend on; no names."""
    return {"processor": _processor(), "cpu_count": os.cpu_count(), "system": platform.system(),
            "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def steps_done(workdir: pathlib.Path) -> int:
    """How far a run is by its metrics.jsonl; 0 if it has none yet."""
    try:
        lines = read_metrics(workdir / "metrics.jsonl")
    except OSError:
        return 0
    return lines[-1]["step"] if lines else 0
