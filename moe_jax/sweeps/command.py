"""``moe-jax sweep``: checks everything, runs what is missing, shows and writes what came out."""

import contextlib
import dataclasses
import io
import pathlib
import signal
import sys
from collections.abc import Iterator, Sequence

from moe_jax.files import whole
from moe_jax.sweeps import runner, tables
from moe_jax.sweeps.definition import Sweep, SweepError, folders_of, load_sweep
from moe_jax.sweeps.progress import Display
from moe_jax.sweeps.results import Key, finished
from moe_jax.sweeps.runner import Places
from moe_jax.sweeps.scoreboard import write_scoreboard
from moe_jax.sweeps.statistics import compare, missing_metrics


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for. arms, seeds: these only; () for all. scratch: '' for the user's cache. table: run nothing."""

    scale: str
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    jobs: int = 2
    devices: int = 1
    scratch: str = ""
    keep: bool = False
    table: bool = False


def run(folders: Sequence[pathlib.Path], request: Request) -> int:
    """Runs sweeps and shows their results. Returns 1 if a run failed.

    Raises:
      SweepError: a sweep cannot work; nothing has run.
    """
    cache = runner.cache_folder(request.scratch)
    sweeps = [(load_sweep(folder), Places.of(folder, request.scale, cache)) for folder in folders_of(folders)]
    tasks = []
    for sweep, places in sweeps:
        _check_arms(sweep, request)
        runner.check(sweep, request.scale, request.devices)
        jobs = runner.jobs_to_do(sweep, request.scale, request.arms or tuple(sweep.arms), _seeds(sweep, request), places.results)
        tasks += runner.tasks_of(sweep, places, jobs)
    failed = _run_tasks(tasks, request, cache) if tasks and not request.table else {}
    problems = [f"{name}: {error}" for name, error in failed.items()]
    for sweep, places in sweeps:
        problems += _show(sweep, places, request)
    for problem in problems:
        print(f"moe-jax sweep: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _check_arms(sweep: Sweep, request: Request) -> None:
    for arm in request.arms:
        if arm not in sweep.arms:
            raise SweepError(f"--arms={','.join(request.arms)}: {sweep.title} has no arm {arm!r}; it has {', '.join(sweep.arms)}.")


def _seeds(sweep: Sweep, request: Request) -> Sequence[int]:
    return request.seeds or range(sweep.scales[request.scale].seeds)


def _run_tasks(tasks: list[runner.Task], request: Request, cache: pathlib.Path) -> dict[str, str]:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"{cache}: runs cannot be trained there ({error.strerror or error}). Give another folder: "
                         f"--scratch=…") from error
    pool = runner.Pool(tasks, request.jobs, request.devices, request.keep, cache)
    with _stopped_by_sigterm(), Display({task.name: task.steps for task in tasks}) as display:
        display.console.print(f"{len(tasks)} runs to train, {pool.processes} at a time; what they say: {cache}/worker_*.log")
        pool.run(display)
    return pool.failed


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM ends a sweep as Ctrl-C does: runs save themselves. (Also where SIGINT is ignored, behind nohup.)"""
    def stop(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(sweep: Sweep, places: Places, request: Request) -> list[str]:
    """Prints the tables; writes README and figure, except at scale smoke. Returns what is wrong with the results."""
    from rich.console import Console
    # Those of the scale too: what README says of it is not to shrink to the seeds of one command.
    seeds = sorted({*range(sweep.scales[request.scale].seeds), *request.seeds})
    keys = {arm: [Key(arm, request.scale, seed) for seed in seeds] for arm in sweep.arms}
    results = {arm: {key.seed: result for key in each if (result := finished(sweep, places.results, key))}
               for arm, each in keys.items()}
    found = {arm: {seed: result["metrics"] for seed, result in each.items()} for arm, each in results.items()}
    comparisons = compare(sweep, found)
    tables.show(sweep, request.scale, found, comparisons, Console(highlight=False))
    if request.scale != "smoke" and any(results.values()):
        from moe_jax.sweeps.figure import draw
        buffer = io.BytesIO()
        draw(sweep, request.scale, results, comparisons).savefig(buffer, format="png", metadata={"Software": None})
        with whole(places.results / f"{request.scale}.png") as file:
            file.write(buffer.getvalue())
        text = tables.results_section(sweep, request.scale, found, comparisons, about(results))
        tables.put_between_marks(places.folder / "README.md", f"results of {request.scale}", text)
    return [f"{places.folder.name}: {line}" for line in missing_metrics(sweep, found)]


def about(results) -> str:
    """With what the runs were made: sizes, machine, versions, in one paragraph."""
    runs = [result for each in results.values() for result in each.values()]
    trained = [result for result in runs if result["curve"]] or runs
    seconds = sorted(sum(result["seconds"].values()) for result in trained)
    steps = sorted({result["step"] for result in trained})
    parameters = sorted({result["parameters"]["total"] for result in trained})
    machines = sorted({f"{result['machine']['processor']}, {result['machine']['devices']}" for result in trained})
    versions = sorted({f"JAX {result['versions']['jax']}, Python {result['versions']['python']}" for result in trained})
    commits = sorted({str(result["code"]["git_commit"])[:8] for result in trained})
    def span(values, unit=""):
        return f"{values[0]:,}{unit}" if values[0] == values[-1] else f"{values[0]:,} to {values[-1]:,}{unit}"
    return (f"{len(trained)} runs of {span(steps)} steps, {span(parameters)} parameters; {span([round(s) for s in seconds])} s each, "
            f"{' and '.join(machines)}; {' and '.join(versions)}; code {', '.join(commits)}.")


def scoreboard(folders: Sequence[pathlib.Path]) -> int:
    """Writes the scoreboard of one folder of experiments."""
    if len(folders) != 1:
        raise SweepError(f"--scoreboard takes one folder of experiments, not {len(folders)}.")
    print(write_scoreboard(folders[0]))
    return 0
