"""What the figures of the analyses share, in the style of ``report_figures``."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.analysis.report_figures import ACCENT, EVALUATION, INK, TRAIN, new_figure

SERIES = (TRAIN, EVALUATION, ACCENT, "#8d6a9f", "#d9a441", "#52606d", "#7fb069", "#b56576")
MOST_PANELS = 4


def shown(layers: Sequence[int], most: int = MOST_PANELS) -> list[int]:
    """Layers that get a panel: all, or `most` of them evenly spread, the first and the last among them."""
    layers = sorted(set(np.asarray(layers).tolist()))
    places = np.linspace(0, len(layers) - 1, min(most, len(layers))).round().astype(int)
    return [layers[place] for place in places]


def panels(count: int, height: float, columns: int | None = None, **options: Any) -> tuple[Any, list[Any]]:
    """A figure with so many axes, each `height` inches tall, one or two beside each other; further cells stay empty."""
    columns = columns or (1 if count == 1 else 2)
    rows = math.ceil(count / columns)
    figure, axes = new_figure(0.4 + rows * height, rows, columns, **options)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    for axis in axes.flat[:count]:
        axis.tick_params(labelbottom=True)
    return figure, list(axes.flat[:count])


def grid(table: dict[str, np.ndarray], value: str, rows: str, columns: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A tidy column as a matrix: (values [rows, columns], the rows' keys, the columns' keys), keys in their order of
    appearance; NaN where the table has no such row."""
    row_keys, row = _in_order(table[rows])
    column_keys, column = _in_order(table[columns])
    matrix = np.full((len(row_keys), len(column_keys)), np.nan)
    matrix[row, column] = table[value]
    return matrix, row_keys, column_keys


def _in_order(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keys, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return keys[order], np.argsort(order)[inverse]


def strips(axis: Any, positions: Sequence[float], values: np.ndarray, ring: bool = True) -> None:
    """For each position on y a strip of points [len(positions), N] on x; a ring around the largest."""
    spread = np.linspace(-0.22, 0.22, values.shape[1]) if values.shape[1] > 1 else np.zeros(1)
    for position, points in zip(positions, values):
        axis.plot(points, position + spread, ".", color=TRAIN, markersize=3.5, alpha=0.75, zorder=3)
        if ring and np.isfinite(points).any():
            best = int(np.nanargmax(points))
            axis.plot(points[best], position + spread[best], "o", color=EVALUATION, markersize=5, fillstyle="none", zorder=4)


def row_height(rows: int) -> float:
    """Inches for each of so many named rows."""
    return 0.3 if rows <= 12 else 0.19


def row_names(axis: Any, names: Sequence[str], kind: str = "") -> None:
    """Names on the y axis, the first on top."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    if kind:
        axis.set_ylabel(kind)


def bars(axis: Any, names: Sequence[str], share_NL: np.ndarray) -> None:
    """A bar for each name with the mean of its shares, and the shares as points, in percent."""
    axis.barh(range(len(names)), 100 * np.nanmean(share_NL, axis=1), color=TRAIN, alpha=0.35, height=0.6)
    strips(axis, range(len(names)), 100 * share_NL, ring=False)
    row_names(axis, names)
    share_bounds(axis, 100 * share_NL)


def share_bounds(axis: Any, values: np.ndarray) -> None:
    """An x axis for percentages: from 0 to a little beyond the largest, and at least to 1 %."""
    finite = values[np.isfinite(values)]
    axis.set_xlim(0, 1.06 * max(float(finite.max(initial=0.0)), 1.0))


def few_hundreds(axis: Any) -> None:
    """A logarithmic x axis whose few labels are plain numbers, 200 and not 2 · 10²."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def legend_above(figure: Any, *axes: Any) -> None:
    """One legend for all of the axes, above them; a label that several have is shown once."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    beside = max(2, min(6, 100 // (8 + max(map(len, found), default=0))))
    figure.legend(found.values(), found, loc="outside upper left", ncols=beside, fontsize=8.5, frameon=False, labelcolor=INK)
