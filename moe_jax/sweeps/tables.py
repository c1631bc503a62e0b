"""A sweep's results as a table: for people on a terminal, and as Markdown between marks in a README."""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.files import write_text
from moe_jax.sweeps.definition import Sweep, SweepError
from moe_jax.sweeps.statistics import CONFIDENCE, HOLDS, Comparison, Metrics

Rows = list[list[str]]


def number(value: float | None, digits: int = 4) -> str:
    """Fixed digits where that says something, few significant ones elsewhere: '3.9120', '12.3', '0.00045'."""
    if value is None or not np.isfinite(value):
        return "–"
    size = abs(value)
    return f"{value:.{digits}f}" if 0.01 <= size < 10 or value == 0 else f"{value:,.1f}" if size >= 10 else f"{value:.2g}"


def difference(value: float) -> str:
    return f"{value:+.4f}" if abs(value) < 10 else f"{value:+,.1f}"


def arms_table(sweep: Sweep, found: Metrics) -> Rows:
    """Header and one row per arm: mean over seeds ± standard deviation of each metric, and the paper's figure."""
    header = ["arm", *sweep.metrics, *([sweep.published_metric] if sweep.published else []), "seeds"]
    rows = []
    for arm in sweep.arms:
        seeds = found.get(arm, {})
        cells = [_cell([metrics.get(name) for metrics in seeds.values()]) for name in sweep.metrics]
        paper = [str(sweep.published.get(arm, "–"))] if sweep.published else []
        rows.append([arm, *cells, *paper, str(len(seeds))])
    return [header, *rows]


def _cell(values: Sequence[float | None]) -> str:
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    spread = f" ± {number(float(np.std(values, ddof=1)))}" if len(values) > 1 else ""
    return number(float(np.mean(values))) + spread


def comparisons_table(comparisons: Sequence[Comparison]) -> Rows:
    """Header and one row per comparison."""
    header = ["comparison", "expected", "difference", f"{CONFIDENCE:.0%} interval", "seeds", "verdict"]
    return [header, *([each.claim, each.expected, difference(each.interval.mean), interval_text(each), str(each.interval.n),
                       each.verdict] for each in comparisons)]


def interval_text(comparison: Comparison) -> str:
    interval = comparison.interval
    return "–" if interval.low is None else f"{difference(interval.low)} … {difference(interval.high)}"


def about_comparisons(comparisons: Sequence[Comparison]) -> str:
    """What to know about so many intervals."""
    expected = [each for each in comparisons if each.order.direction != "reported"]
    if not expected:
        return ""
    text = "Differences are later minus earlier, paired by seed; intervals by Student's t."
    holding = [each for each in expected if each.verdict == HOLDS]
    if len(expected) == 1:
        return text
    text += f" {len(expected)} expected orders: of so many intervals at {CONFIDENCE:.0%} one may miss by chance."
    strict = sum(each.strict == HOLDS for each in holding)
    level = f"{1 - (1 - CONFIDENCE) / len(expected):.2%}"
    return f"{text} Of the {len(holding)} that hold {strict} would also hold at {level} (Bonferroni)." if holding else text


def show(sweep: Sweep, scale: str, found: Metrics, comparisons: Sequence[Comparison], console: Any) -> None:
    """Prints both tables."""
    from rich.table import Table
    for title, (header, *rows) in ((f"{sweep.title}, {scale}", arms_table(sweep, found)), ("", comparisons_table(comparisons))):
        table = Table(title=title or None, title_justify="left")
        for name in header:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*row)
        if rows:
            console.print(table, markup=False)
    console.print(about_comparisons(comparisons), markup=False)


def markdown(rows: Rows) -> str:
    header, *rest = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    return "\n".join(["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rest]])


def results_section(sweep: Sweep, scale: str, found: Metrics, comparisons: Sequence[Comparison], about: str) -> str:
    """What a README says of one scale."""
    parts = [f"### Results at scale `{scale}`", about, markdown(arms_table(sweep, found)),
             markdown(comparisons_table(comparisons)), about_comparisons(comparisons), f"![{sweep.title}](results/{scale}.png)"]
    return "\n\n".join(part for part in parts if part)


def put_between_marks(path: pathlib.Path, name: str, text: str) -> None:
    """Replaces what a Markdown file has between ``<!-- name -->`` and ``<!-- end of name -->``.

    Raises:
      SweepError: the file or the marks are not there.
    """
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    try:
        old = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SweepError(f"{path}: {error.strerror or error}; write one, with the lines {start} and {end} where the results "
                         f"belong.") from error
    pattern = re.compile(re.escape(start) + r".*?" + re.escape(end), re.DOTALL)
    if len(pattern.findall(old)) != 1:
        raise SweepError(f"{path}: needs the line {start} and, after it, {end}, once each; the results are written between them.")
    new = pattern.sub(lambda _: f"{start}\n\n{text}\n\n{end}" if text else f"{start}\n{end}", old)
    if new != old:
        write_text(path, new)
