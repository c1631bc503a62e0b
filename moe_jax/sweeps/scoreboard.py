"""``experiments/README.md``: every claim, what the paper says, our interval, the verdict."""

import collections
import pathlib
from collections.abc import Sequence

from moe_jax.sweeps.definition import Sweep, SweepError, load_sweep
from moe_jax.sweeps.results import metrics_of
from moe_jax.sweeps.statistics import FEWEST_SEEDS, Comparison, compare
from moe_jax.sweeps.tables import difference, interval_text, markdown, put_between_marks

# The largest first: of an experiment the largest scale is shown that has all it takes for verdicts; of none the largest begun.
_SCALES = ("full", "quick")
_NOT_RUN = "not run"


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
    not_run = counts.pop(_NOT_RUN, 0)
    total = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    text = f"{markdown(rows)}\n\nComparisons: {total or 'none'}. Experiments that have not been run: {not_run}."
    put_between_marks(folder / "README.md", "scoreboard", text)
    return text


def _rows(path: pathlib.Path, sweep: Sweep) -> list[list[str]]:
    head = [str(sweep.number), f"[{sweep.title}]({path.name}/README.md)"]
    found = {scale: compare(sweep, metrics_of(sweep, path / "results", scale, range(sweep.scales[scale].seeds))) for scale in _SCALES}
    begun = [scale for scale in _SCALES if found[scale]]
    if not begun:
        return [[*head, "–", sweep.paper, "–", "–", "–", _NOT_RUN]]
    scale = next((scale for scale in begun if _is_whole(sweep, found[scale])), begun[0])
    return [[*head, each.claim, each.order.paper or sweep.paper, difference(each.interval.mean), interval_text(each),
             f"{scale}, {each.interval.n}", each.verdict] for each in found[scale]]


def _is_whole(sweep: Sweep, comparisons: Sequence[Comparison]) -> bool:
    """Whether every expected comparison is there, with enough seeds for an interval."""
    wanted = sum(len(order.pairs()) for order in sweep.expected)
    return len(comparisons) == wanted and all(each.interval.n >= FEWEST_SEEDS for each in comparisons)
