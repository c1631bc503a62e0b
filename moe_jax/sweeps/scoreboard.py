"""``experiments/README.md``: every claim, what the paper says, our interval, the verdict."""

import collections
import pathlib

from moe_jax.sweeps.definition import Sweep, SweepError, load_sweep
from moe_jax.sweeps.results import metrics_of
from moe_jax.sweeps.statistics import compare
from moe_jax.sweeps.tables import difference, interval_text, markdown, put_between_marks

# The largest first: of an experiment the largest scale with results is shown.
_SCALES = ("full", "quick")


def experiments(folder: pathlib.Path) -> list[tuple[pathlib.Path, Sweep]]:
    """Every ``<folder>/*/sweep.py``, by number.

    Raises:
      SweepError: there is none, one cannot be read, or two have one number.
    """
    found = [(path.parent, load_sweep(path.parent)) for path in sorted(folder.glob("*/sweep.py"))]
    if not found:
        raise SweepError(f"{folder}: holds no experiments (folders with a sweep.py).")
    twice = [number for number, count in collections.Counter(sweep.number for _, sweep in found).items() if count > 1]
    if twice:
        names = ", ".join(path.name for path, sweep in found if sweep.number == twice[0])
        raise SweepError(f"number={twice[0]}: {names} have it; every experiment has one of its own.")
    return sorted(found, key=lambda pair: pair[1].number)


def write_scoreboard(folder: pathlib.Path) -> str:
    """Writes the table into ``<folder>/README.md`` from all results that are there; returns it."""
    rows = [["#", "experiment", "claim", "paper", "difference", "95 % interval", "scale, seeds", "verdict"]]
    counts: collections.Counter = collections.Counter()
    for path, sweep in experiments(folder):
        rows += (ours := _rows(path, sweep))
        counts.update(row[-1] for row in ours)
    total = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    text = f"{markdown(rows)}\n\nOf {sum(counts.values())} comparisons: {total}."
    put_between_marks(folder / "README.md", "scoreboard", text)
    return text


def _rows(path: pathlib.Path, sweep: Sweep) -> list[list[str]]:
    head = [str(sweep.number), f"[{sweep.title}]({path.name}/README.md)"]
    for scale in _SCALES:
        found = metrics_of(sweep, path / "results", scale, range(sweep.scales[scale].seeds))
        comparisons = compare(sweep, found)
        if comparisons:
            return [[*head, each.claim, each.order.paper or sweep.paper, difference(each.interval.mean), interval_text(each),
                     f"{scale}, {each.interval.n}", each.verdict] for each in comparisons]
    return [[*head, "–", sweep.paper, "–", "–", "–", "not run"]]
