"""Runs what is missing of a sweep: in order, in parallel processes, never twice; what is done stays done."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from moe_jax.config import ConfigError
from moe_jax.data.token_store import users_cache
from moe_jax.sweeps.definition import Continue, Evaluate, Sweep, SweepError, Upcycle
from moe_jax.sweeps.jobs import Job, steps_done, workdir_of
from moe_jax.sweeps.progress import Display
from moe_jax.sweeps.results import Key, finished
from moe_jax.sharding import resolve_mesh
from moe_jax.training.step import check_trainable
from moe_jax.training.upcycle import Upcycling, check_upcyclable

_SECONDS_TO_STOP = 120


def check(sweep: Sweep, scale: str, devices: int) -> None:
    """Every arm's config, and what it starts from, before anything runs.

    Raises:
      SweepError: the first arm that cannot work.
    """
    for name, arm in sweep.arms.items():
        config = sweep.config_of(name, scale, 0)
        try:
            resolve_mesh(config, devices)
            if not isinstance(arm, Evaluate):
                check_trainable(config)
            if isinstance(arm, Upcycle):
                Upcycling(**arm.how)
                check_upcyclable(sweep.config_of(arm.start, scale, 0), config)
            if isinstance(arm, Continue) and config.training.num_steps <= sweep.config_of(arm.start, scale, 0).training.num_steps:
                raise ConfigError(f"training.num_steps={config.training.num_steps}: the arm {arm.start!r} has as many already; "
                                  f"set it higher.")
        except (ConfigError, TypeError) as error:
            raise SweepError(f"arm {name!r} at scale {scale!r}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Places:
    """folder: of the experiment. results: of its finished runs. scratch: where runs are trained."""

    folder: pathlib.Path
    results: pathlib.Path
    scratch: pathlib.Path

    @classmethod
    def of(cls, folder: pathlib.Path, scale: str, cache: pathlib.Path) -> "Places":
        """Results lie beside the sweep, to be committed; those of scale smoke, and the runs themselves, below ``cache``."""
        runs = cache / folder.resolve().name
        return cls(folder.resolve(), runs / "results" if scale == "smoke" else folder.resolve() / "results", runs / scale)


def cache_folder(chosen: str) -> pathlib.Path:
    """Where runs are trained, programs kept, and what workers say is written.

    Raises:
      SweepError: there is no home folder for it.
    """
    cache = users_cache()
    if not chosen and cache is None:
        raise SweepError("this user has no home folder to train in: set MOE_JAX_CACHE, or give --scratch.")
    return pathlib.Path(chosen).absolute() if chosen else pathlib.Path(cache) / "sweeps"


def jobs_to_do(sweep: Sweep, scale: str, arms: Sequence[str], seeds: Sequence[int], results: pathlib.Path) -> list[Job]:
    """Jobs for the runs without a result, seed by seed, so that pairs are whole early; arms that others start from come first."""
    wanted: dict[tuple[str, int], list[str]] = {}
    for seed in seeds:
        for arm in arms:
            if finished(sweep, results, Key(arm, scale, seed)) is not None:
                continue
            for trained in sweep.needed(arm):
                wanted.setdefault((trained, seed), [])
            wanted[sweep.trained_arm(arm), seed].append(arm)
    return [Job(arm, scale, seed, tuple(names)) for (arm, seed), names in wanted.items()]


@dataclasses.dataclass(frozen=True)
class Task:
    """A job of one of the sweeps at hand. before: the tasks here that must be done first."""

    sweep: Sweep
    places: Places
    job: Job
    before: tuple["Task", ...] = ()

    @property
    def name(self) -> str:
        return f"{self.places.folder.name}/{self.job.name}"

    @property
    def workdir(self) -> pathlib.Path:
        return workdir_of(self.places.scratch, self.sweep, self.job.arm, self.job.scale, self.job.seed)

    @property
    def steps(self) -> int:
        return self.sweep.config_of(self.job.arm, self.job.scale, self.job.seed).training.num_steps

    def words(self) -> str:
        """What a worker is told."""
        return json.dumps({"folder": str(self.places.folder), "results": str(self.places.results),
                           "scratch": str(self.places.scratch), **dataclasses.asdict(self.job)})


def tasks_of(sweep: Sweep, places: Places, jobs: Sequence[Job]) -> list[Task]:
    """The jobs of one sweep, each knowing those that it starts from."""
    tasks: dict[tuple[str, int], Task] = {}
    for job in jobs:
        before = tuple(tasks[arm, job.seed] for arm in sweep.needed(job.arm) if (arm, job.seed) in tasks)
        tasks[job.arm, job.seed] = Task(sweep, places, job, before)
    return list(tasks.values())


class Pool:
    """Worker processes that take tasks from one list.

    Attributes:
      failed: the error of each task that failed, by its name.
    """

    def __init__(self, tasks: Sequence[Task], processes: int, devices: int, keep: bool, folder: pathlib.Path):
        self.keep, self.devices, self.folder = keep, devices, folder
        self.tasks = tuple(tasks)
        self.waiting, self.running, self.done = list(tasks), [], set()
        self.failed: dict[str, str] = {}
        self.processes = max(1, min(processes, len(tasks)))
        self.threads = max(1, (os.cpu_count() or 1) // self.processes)
        self.stopping = False
        self._changed = threading.Condition()
        self._workers: list[subprocess.Popen] = []

    def run(self, display: Display) -> None:
        """Until every task is done or failed. KeyboardInterrupt goes through after the runs have saved themselves."""
        threads = [threading.Thread(target=self._serve, args=(number, display), daemon=True) for number in range(self.processes)]
        for thread in threads:
            thread.start()
        try:
            while any(thread.is_alive() for thread in threads):
                with self._changed:
                    self._changed.wait(timeout=1.0)
                display.update({task.name: steps_done(task.workdir) for task in list(self.running)})
        except BaseException:
            self._stop(threads)
            raise

    def _stop(self, threads: list[threading.Thread]) -> None:
        """Workers see the end of their stdin; a training run then saves itself."""
        self.stopping = True
        with self._changed:
            self._changed.notify_all()
        for worker in self._workers:
            worker.stdin.close()
        deadline = time.monotonic() + _SECONDS_TO_STOP
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for worker in self._workers:
            if worker.poll() is None:
                worker.kill()

    def _serve(self, number: int, display: Display) -> None:
        """One worker's share: takes tasks until none is left, and starts the process anew if it died."""
        process = None
        while (task := self._take(display)) is not None:
            try:
                if process is None or process.poll() is not None:
                    process = self._start(number)
            except OSError as reason:
                error = f"no process could be started for it: {reason}"
            else:
                error = self._ask(process, task)
            if self.stopping:
                return
            self._finish(task, error)
            display.finished(task.name, error)
        if process is not None and not self.stopping:
            process.stdin.close()
            process.wait()

    def _ask(self, process: subprocess.Popen, task: Task) -> str | None:
        """Has the task done; what went wrong, or None."""
        try:
            process.stdin.write(task.words() + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except (OSError, ValueError):  # it died, or was told to stop
            answer = ""
        if not answer:
            return f"its process ended with exit code {process.wait()}; what it said last is in {self._log(process.number)}"
        return json.loads(answer).get("error")

    def _take(self, display: Display) -> Task | None:
        """The first task whose predecessors are done; waits for one; None when there will be none."""
        with self._changed:
            while True:
                for task in list(self.waiting):
                    if blame := next((other.name for other in task.before if other.name in self.failed), None):
                        self.waiting.remove(task)
                        self.failed[task.name] = f"{blame} failed, from which it starts"
                        display.finished(task.name, self.failed[task.name])
                if not self.waiting or self.stopping:
                    return None
                ready = next((task for task in self.waiting if all(other.name in self.done for other in task.before)), None)
                if ready is not None:
                    self.waiting.remove(ready)
                    self.running.append(ready)
                    return ready
                self._changed.wait()

    def _finish(self, task: Task, error: str | None) -> None:
        with self._changed:
            self.running.remove(task)
            if error is None:
                self.done.add(task.name)
            else:
                self.failed[task.name] = error
            self._changed.notify_all()
            if error is None and not self.keep:
                self._clean(task)

    def _clean(self, task: Task) -> None:
        """Removes the directories that this task and those before it were trained in, unless another starts from one."""
        needed = {before.name for other in (*self.waiting, *self.running) for before in other.before}
        for each in (*task.before, task):
            if each.name in self.done and each.name not in needed:
                shutil.rmtree(each.workdir, ignore_errors=True)

    def _log(self, number: int) -> pathlib.Path:
        return self.folder / f"worker_{number}.log"

    def _start(self, number: int) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {"JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"), **os.environ}
        if self.processes > 1:
            environment.setdefault("NPROC", str(self.threads))  # XLA's number of threads on a CPU
        if all(task.job.scale == "smoke" for task in self.tasks):
            # A few steps of tiny models: compiling is nearly all of it.
            environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
        words = [sys.executable, "-m", "moe_jax.sweeps.worker", str(self.devices),
                 json.dumps({"jobs": self.processes, "threads": self.threads})]
        with self._log(number).open("w") as log:
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                                       env=environment, start_new_session=True)
        process.number = number
        self._workers.append(process)
        return process
