"""The report on recorded routing: every analysis that the records allow, as CSV, PNG, one .npz and one HTML page.

    write_report(records_of_run("workdir"), "report")

The page holds its figures and opens without a network. Analyses: ``catalogue.ANALYSES``.
"""

import dataclasses
import logging
import os
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from moe_jax import files
from moe_jax.analysis.catalogue import ANALYSES
from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.report_page import escape, figure_block, page, png_of, table_block
from moe_jax.analysis.tables import Analysis, Headline, MissingArray, Table, to_csv
from moe_jax.errors import UserError

log = logging.getLogger("moe_jax")

PAGE, ARRAYS = "report.html", "tables.npz"


class RoutingReportError(UserError, ValueError):
    """The report cannot be written where it should be; one line for people."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one analysis: a table and its picture, or the reason why not.

    Attributes:
      failed: the reason is a fault of the analysis, not of the records.
    """

    analysis: Analysis
    table: Table | None = None
    png: bytes = b""
    reason: str = ""
    failed: bool = False


def run_analyses(records: Sequence[RoutingRecord], analyses: Iterable[Analysis] = ANALYSES,
                 drops: RoutingRecord | None = None) -> list[Outcome]:
    """Every analysis on the records (ascending steps): computed and drawn, or why that cannot be.

    Args:
      drops: a record of a pass with buffers, for the analyses of dropped choices, where ``records`` has none.
    """
    analyses, outcomes = tuple(analyses), []
    with_buffers = records if drops is None else [drops]
    for number, analysis in enumerate(analyses, 1):
        started = time.monotonic()
        try:
            table = analysis.compute(with_buffers if analysis.needs == "buffers" else records)
            outcomes.append(Outcome(analysis, table, png_of(analysis.draw(table))))
            said = f"{len(table):,} rows"
        except MissingArray as error:
            outcomes.append(Outcome(analysis, reason=str(error)))
            said = "not possible with these records"
        except Exception as error:  # one faulty analysis must not cost the others
            log.exception("%s failed", analysis.name)
            outcomes.append(Outcome(analysis, reason=f"{type(error).__name__}: {error}", failed=True))
            said = "failed"
        log.info("analysis %d/%d, %s: %s, %.1f s", number, len(analyses), analysis.name, said, time.monotonic() - started)
    return outcomes


def write_report(records: Sequence[RoutingRecord], out: str | os.PathLike, name: str = "",
                 analyses: Iterable[Analysis] = ANALYSES, drops: RoutingRecord | None = None) -> list[Outcome]:
    """Runs the analyses and writes ``out/report.html``, ``out/tables.npz`` and for each ``out/<name>.csv`` and ``.png``.

    Files of an earlier report there are replaced; those of analyses that are not possible now are removed.

    Args:
      name: heading of the page; default: what was recorded.
      drops: see :func:`run_analyses`.

    Raises:
      RoutingReportError: ``out`` is not a folder or cannot be written. MissingArray: there is no record.
    """
    out = pathlib.Path(out)
    check_out(out)
    if not records:
        raise MissingArray("There is no record of routing: make one with moe-jax analyze --checkpoint=…")
    outcomes, arrays = run_analyses(records, analyses, drops), {}
    for outcome in outcomes:
        csv, png = (out / f"{outcome.analysis.name}{ending}" for ending in (".csv", ".png"))
        if outcome.table is None:
            csv.unlink(missing_ok=True)
            png.unlink(missing_ok=True)
            continue
        files.write_text(csv, to_csv(outcome.table))
        with files.whole(png) as file:
            file.write(outcome.png)
        arrays |= {f"{outcome.analysis.name}/{column}": values for column, values in outcome.table.columns.items()}
    files.write_arrays(out / ARRAYS, {column: _plain(values) for column, values in arrays.items()})
    files.write_text(out / PAGE, render(records, outcomes, name))
    return outcomes


def check_out(out: pathlib.Path) -> None:
    """Refuses a place where no report can be written, before any work is done; makes nothing.

    Raises:
      RoutingReportError: it is a file, or the folder (or the first one above it that exists) may not be written to.
    """
    if out.exists() and not out.is_dir():
        raise RoutingReportError(f"--out={out}: is a file; the report is a folder of several. Give another name")
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is not a folder" if not there.is_dir() else "may not be written to"
        raise RoutingReportError(f"--out={out}: {there} {what}. Give a folder of your own: --out=…")


def summary(records: Sequence[RoutingRecord], outcomes: Sequence[Outcome], out: pathlib.Path) -> dict[str, Any]:
    """The numbers of a report, for programs: headlines by analysis, and why others are missing."""
    newest = records[-1]
    numbers = lambda headline: {name: _finite(value) for name, value in dataclasses.asdict(headline).items()}
    done = {outcome.analysis.name: {"source": outcome.analysis.source,
                                    "headlines": [numbers(headline) for headline in outcome.table.headlines]}
            for outcome in outcomes if outcome.table is not None}
    return {"report": str(out / PAGE), "step": newest.step, "steps": [record.step for record in records],
            "tokens": newest.num_tokens, "data": newest.data, "dispatch": newest.dispatch, "config_hash": newest.config_hash,
            "analyses": done, "not_possible": {o.analysis.name: o.reason for o in outcomes if o.table is None}}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _plain(values: np.ndarray) -> np.ndarray:
    """Without pickles: text columns of whatever kind as NumPy text."""
    return values.astype(str) if values.dtype.kind == "O" else values


# The page.


def render(records: Sequence[RoutingRecord], outcomes: Sequence[Outcome], name: str = "") -> str:
    """The page as text."""
    newest = records[-1]
    contents, body = [], []
    for outcome in outcomes:
        if outcome.table is not None:
            title, name_of_it = escape(outcome.analysis.title), escape(outcome.analysis.name)
            contents.append(f'<a href="#{name_of_it}">{title}</a>')
            body.append(f'<section id="{name_of_it}"><h2>{title}</h2>{_section(outcome)}</section>')
    return page("Routing report", name or newest.data or "recorded routing", _facts(records), _problems(outcomes),
                _headline(outcomes), contents, body)


def _facts(records: Sequence[RoutingRecord]) -> list[str]:
    newest = records[-1]
    steps = f"step {newest.step:,}"
    if len(records) > 1:
        steps += f" and {len(records) - 1} before it, from {records[0].step:,}"
    layers, _, choices = newest.experts_LTK.shape
    buffers = f", capacity factor {newest.capacity_factor:g}" if newest.capacity_factor is not None else ""
    facts = [steps, f"{newest.num_tokens:,} tokens of {newest.data or 'unnamed data'}"]
    if newest.documents_T is not None:
        facts.append(f"{len(np.unique(newest.documents_T)):,} documents")
    facts.append(f"{layers} MoE layers of {newest.num_experts} experts, up to {choices} per token")
    if newest.dispatch:
        facts.append(f"dispatch {newest.dispatch}{buffers}")
    return facts


def _problems(outcomes: Sequence[Outcome]) -> str:
    items = "".join(f"<li><b>{escape(outcome.analysis.title)}</b> ({escape(outcome.analysis.source)}): "
                    f"{escape(outcome.reason.rstrip('.'))}.</li>" for outcome in outcomes if outcome.table is None)
    if not items:
        return ""
    return f'<aside class="problems"><strong>Not possible with these records</strong><ul>{items}</ul></aside>'


def _headline(outcomes: Sequence[Outcome]) -> str:
    rows = [(outcome.analysis.title, *_cells(outcome.table.headlines[0])) for outcome in outcomes
            if outcome.table is not None and outcome.table.headlines]
    if not rows:
        return '<p class="verdict unknown">None of the analyses came to a number.</p>'
    table = table_block(("analysis", "number", "value", "95 % interval", "reference"), rows, "numbers headlines")
    note = ("The first number of each analysis; the others stand below the figures. Intervals are by bootstrap over "
            "documents. The reference is what the number would be if routing knew nothing of the text, or the baseline that "
            "is named.")
    return f'{table}<p class="caption">{note}</p>'


def _cells(headline: Headline) -> tuple[str, str, str, str]:
    interval = "" if headline.low is None else f"{_number(headline.low)} – {_number(headline.high)}"
    return headline.name, _number(headline.value), interval, _number(headline.reference)


def _number(value: float | None) -> str:
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _section(outcome: Outcome) -> str:
    analysis, table = outcome.analysis, outcome.table
    rows = [_cells(headline) for headline in table.headlines]
    numbers = table_block(("", "value", "95 % interval", "reference"), rows) if rows else ""
    source = (f'{escape(analysis.source)}. Numbers: <a href="{analysis.name}.csv">{analysis.name}.csv</a>, '
              f"{len(table):,} rows.")
    caption = escape(table.caption)
    return f'<p class="caption">{source}</p>{figure_block(outcome.png, analysis.title, caption)}{numbers}'
