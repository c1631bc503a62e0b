"""The figures of the report: arrays in, Matplotlib Figure out. No files, no HTML, no pyplot state.

Every function takes plain arrays with the shapes in its docstring and can be called from a notebook. Loads are
relative to the fair share: 1.0 means that an expert gets exactly its part of the choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WIDTH = 9.6  # inches; shown 960 CSS pixels wide
INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
TRAIN, EVALUATION, ACCENT = "#3e7cb1", "#c8553d", "#2a9d8f"
BASELINES = {"unigram": "#9aa5b1", "bigram": "#52606d"}
MOST_POSITIONS = 64  # points along a sequence; longer ones are binned


def new_figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, np.ndarray]:
    """A figure of the report's width and its axes [rows, columns], styled."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for axis in axes.flat:
        style_axis(axis)
    return figure, axes


def style_axis(axis: Any) -> None:
    axis.tick_params(labelcolor=INK, labelsize=9, length=3, color=MUTED)
    axis.xaxis.label.set_color(INK)
    axis.yaxis.label.set_color(INK)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.margins(x=0.015)


def plain(text: Any) -> str:
    """Text for a label: Matplotlib would read dollar signs as mathematics."""
    return str(text).replace("$", r"\$")


def panel_title(axis: Any, text: str) -> None:
    axis.set_title(plain(text), fontsize=10, color=INK, loc="left", pad=6)


def legend(axis: Any, **options: Any) -> None:
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8.5, frameon=False, labelcolor=INK, **options)


def reference_line(axis: Any, value: float, label: str, colour: str = MUTED, style: Any = (0, (5, 3))) -> None:
    axis.axhline(value, color=colour, linestyle=style, linewidth=1.3, label=plain(label), zorder=2)


def layer_lines(layers: Sequence[int]) -> list[dict[str, Any]]:
    """Line style of each layer, dark to light with depth; at most about six of many layers get into the legend."""
    from matplotlib import colormaps

    count = len(layers)
    named = set(np.linspace(0, count - 1, min(count, 6)).round().astype(int)) if count else set()
    shades = colormaps["viridis"](np.linspace(0.05, 0.85, max(count, 1)))
    return [
        {"color": shades[index], "linewidth": 1.6, "label": f"layer {layer}" if index in named else None}
        for index, layer in enumerate(layers)
    ]


def _load_colours(load: np.ndarray) -> dict[str, Any]:
    """Blue below the fair share, white at 1.0, red above; the same white in every figure."""
    from matplotlib.colors import TwoSlopeNorm

    finite = load[np.isfinite(load)]
    top = max(2.0, float(np.percentile(finite, 99.5))) if finite.size else 2.0
    return {"cmap": "RdBu_r", "norm": TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=top)}


def _colour_bar(figure: Any, image: Any, axes: Any) -> None:
    height = figure.get_figheight()
    part = min(1.0, 3.5 / height)  # a bar as tall as twelve layers helps nobody
    bar = figure.colorbar(
        image, ax=axes, aspect=13 * height * part, shrink=part, anchor=(0, 1), pad=0.015, extend="max", extendfrac=0.03
    )
    bar.set_label("load (1.0 = fair share)", fontsize=9, color=INK)
    top = image.norm.vmax
    bar.set_ticks([0, 0.5, 1.0, *[1 + (top - 1) * part for part in (0.5, 1.0)]])
    bar.ax.yaxis.set_major_formatter("{x:.2g}")
    bar.ax.tick_params(labelsize=8.5, colors=INK)
    bar.outline.set_visible(False)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over 1/40 of the points; gaps (NaN) are skipped, ends use what there is."""
    window = len(values) // 40
    if window < 2:
        return values
    kernel = np.ones(2 * (window // 2) + 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def losses(
    train: tuple[np.ndarray, np.ndarray],
    evaluation: tuple[np.ndarray, np.ndarray],
    baselines: Mapping[str, float],
    extra: Mapping[str, tuple[np.ndarray, np.ndarray, float | None]],
) -> Any:
    """Cross-entropy on top, the other losses below.

    Args:
      train, evaluation: (steps [N], cross-entropy [N] in nats per token).
      baselines: name -> cross-entropy of a simpler model, drawn as a horizontal line.
      extra: name -> (steps [N], values [N], reference value or None), one panel each.
    """
    figure, axes = new_figure(
        3.9 if not extra else 6.2, 1 if not extra else 2, 1, height_ratios=[1.9, 1][: 1 + bool(extra)]
    )
    axis = axes[0, 0]
    if len(train[0]):
        axis.plot(*train, color=TRAIN, alpha=0.3, linewidth=0.9)
        label = "training" if len(train[0]) < 80 else "training, smoothed"
        axis.plot(train[0], smooth(train[1]), color=TRAIN, linewidth=1.8, label=label)
    if len(evaluation[0]):
        axis.plot(*evaluation, color=EVALUATION, marker="o", markersize=4.5, linewidth=1.6, label="validation")
    for name, value in baselines.items():
        reference_line(axis, value, f"{name} {value:.2f}", BASELINES.get(name, MUTED))
    axis.set(xlabel="step", ylabel="cross-entropy (nats per token)")
    values = [y for _, ys in (train, evaluation) for y in ys if np.isfinite(y)]
    shown = [*values, *baselines.values()]
    if shown:
        low, high = min(shown), max([np.percentile(values, 99.5) if values else 0.0, *baselines.values()])
        margin = 0.06 * (high - low) + 1e-3
        axis.set_ylim(low - margin, high + margin)  # the first steps must not squeeze the rest
    legend(axis, loc="upper right", ncols=2)
    if extra:
        panel = axes[1, 0].get_subplotspec().subgridspec(1, len(extra))
        axes[1, 0].remove()
        for index, (name, (steps, ys, reference)) in enumerate(extra.items()):
            small = figure.add_subplot(panel[0, index])
            style_axis(small)
            small.margins(y=0.12)
            small.plot(steps, ys, color=ACCENT, linewidth=1.4)
            if reference is not None:
                reference_line(small, reference, f"balanced {reference:g}")
                legend(small, loc="upper right")
            small.set(xlabel="step", ylabel=name)
    return figure


def load_over_training(steps: np.ndarray, load_NLE: np.ndarray, layers: Sequence[int]) -> Any:
    """Heat maps, one per MoE layer: steps [N] on x, experts on y, colour = load relative to fair share."""
    count, experts = load_NLE.shape[1:]
    columns = 1 if count == 1 else 2 if count <= 8 else 4
    rows = math.ceil(count / columns)
    figure, axes = new_figure(
        min(16, rows * (1.0 + min(2.4, 0.16 * experts + 0.5))), rows, columns, sharex=True, sharey=True
    )
    # Each column of cells reaches half-way to its neighbours; one lone point gets a width of one step.
    middle = (steps[1:] + steps[:-1]) / 2 if len(steps) > 1 else np.array([])
    first, last = (steps[0] - 0.5, steps[-1] + 0.5) if len(steps) == 1 else (steps[0], steps[-1])
    edges = np.concatenate([[first], middle, [last]])
    colours = _load_colours(load_NLE)
    for index, axis in enumerate(axes.flat):
        if index >= count:
            axis.set_visible(False)
            continue
        axis.grid(False)
        image = axis.pcolormesh(edges, np.arange(experts + 1) - 0.5, load_NLE[:, index].T, rasterized=True, **colours)
        panel_title(axis, f"layer {layers[index]}")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.set_ylim(experts - 0.5, -0.5)
        if index % columns == 0:
            axis.set_ylabel("expert")
        if index + columns >= count:
            axis.set_xlabel("step")
            axis.tick_params(labelbottom=True)
    _colour_bar(figure, image, axes)
    return figure


def balance_over_training(
    steps: np.ndarray,
    load_max_NL: np.ndarray,
    drop_NL: np.ndarray,
    layers: Sequence[int],
    capacity_factor: float | None,
) -> Any:
    """Left: load of the busiest expert per layer; right: dropped choices per layer in percent. Both [N, L]."""
    figure, axes = new_figure(3.5, 1, 2)
    left, right = axes[0]
    for index, line in enumerate(layer_lines(layers)):
        left.plot(steps, smooth(load_max_NL[:, index]), **line)
        right.plot(steps, 100 * smooth(drop_NL[:, index]), **line)
    reference_line(left, 1.0, "fair share 1.0")
    if capacity_factor:
        reference_line(left, capacity_factor, f"room {capacity_factor:g}", EVALUATION, (0, (1, 1.5)))
    left.set(xlabel="step", ylabel="busiest expert's load (1.0 = fair)")
    mean = float(np.nanmean(drop_NL)) if np.isfinite(drop_NL).any() else 0.0
    reference_line(right, 100 * mean, f"mean {100 * mean:.2g} %")
    right.set(xlabel="step", ylabel="dropped choices (%)")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        legend(axis, loc="upper right")
    return figure


def binned(rate_LS: np.ndarray, choices_S: np.ndarray, most: int = MOST_POSITIONS) -> tuple[np.ndarray, np.ndarray]:
    """Positions [B] (middles of bins) and rates [L, B], averaged with the number of choices as weight; NaN where a layer has
    none (a decoder's rows are shorter than its encoder's)."""
    size = math.ceil(rate_LS.shape[1] / most)
    starts = np.arange(0, rate_LS.shape[1], size)
    weight_LS = np.where(np.isnan(rate_LS), 0.0, np.asarray(choices_S, np.float64)[None])
    dropped_LB = np.add.reduceat(np.nan_to_num(rate_LS) * weight_LS, starts, axis=1)
    weight_LB = np.add.reduceat(weight_LS, starts, axis=1)
    ends = np.minimum(starts + size, rate_LS.shape[1])
    rate_LB = np.divide(dropped_LB, weight_LB, out=np.full(dropped_LB.shape, np.nan), where=weight_LB > 0)
    return (starts + ends - 1) / 2, rate_LB


def drops_by_position(rate_LS: np.ndarray, choices_S: np.ndarray, layers: Sequence[int]) -> Any:
    """Share of dropped choices by position in the sequence, one line per layer, the overall mean as reference."""
    figure, axes = new_figure(3.5)
    axis = axes[0, 0]
    positions, rate_LB = binned(rate_LS, choices_S)
    for index, line in enumerate(layer_lines(layers)):
        axis.plot(positions, 100 * rate_LB[index], **line)
    total = (np.asarray(choices_S, np.float64)[None] * ~np.isnan(rate_LS)).sum()
    mean = float((np.nan_to_num(rate_LS) * choices_S).sum() / total) if total else 0.0
    reference_line(axis, 100 * mean, f"mean {100 * mean:.2g} %")
    axis.set(xlabel="position in the sequence (tokens)", ylabel="dropped choices (%)", xlim=(0, rate_LS.shape[1] - 1))
    axis.set_ylim(bottom=0)
    legend(axis, loc="upper left", ncols=3)
    return figure


def entropy_over_training(steps: np.ndarray, entropy_NL: np.ndarray, layers: Sequence[int], experts: int | None) -> Any:
    """Mean entropy of the router's distribution per layer in nats, under its largest possible value ln E."""
    figure, axes = new_figure(3.5)
    axis = axes[0, 0]
    for index, line in enumerate(layer_lines(layers)):
        axis.plot(steps, smooth(entropy_NL[:, index]), **line)
    if experts:
        reference_line(axis, math.log(experts), f"ln {experts} = {math.log(experts):.2f}: undecided")
    axis.set(xlabel="step", ylabel="router entropy (nats)")
    axis.set_ylim(bottom=0, top=1.12 * math.log(experts) if experts and experts > 1 else None)
    legend(axis, loc="lower left", ncols=3)
    return figure


def domains_by_expert(share_PLE: np.ndarray, domains: Sequence[str], layers: Sequence[int], kind: str = "domain",
                      titles: Sequence[str] | None = None) -> Any:
    """Heat maps, one per MoE layer: domains on y, experts on x, colour = load relative to fair share.

    Args:
      share_PLE: share of each domain's choices that goes to each expert; rows sum to 1, or are NaN and stay white.
      kind: what the rows are.
      titles: of the heat maps; None: the number of the layer.
    """
    count, experts = share_PLE.shape[1:]
    load_PLE = share_PLE * experts
    columns = 1 if count == 1 or experts > 32 else 2
    rows = math.ceil(count / columns)
    figure, axes = new_figure(
        min(20, rows * (0.9 + 0.36 * len(domains)) + 0.3), rows, columns, sharey=True, sharex=True
    )
    colours = _load_colours(load_PLE)
    for index, axis in enumerate(axes.flat):
        if index >= count:
            axis.set_visible(False)
            continue
        axis.grid(False)
        image = axis.imshow(load_PLE[:, index], aspect="auto", interpolation="nearest", **colours)
        if experts * columns <= 32:
            for (row, expert), value in np.ndenumerate(load_PLE[:, index]):
                if np.isnan(value):
                    continue
                strong = abs(colours["norm"](value) - 0.5) > 0.3
                axis.text(
                    expert,
                    row,
                    f"{value:.1f}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if strong else INK,
                )
        panel_title(axis, f"layer {layers[index]}" if titles is None else titles[index])
        axis.set_yticks(range(len(domains)), [plain(domain) for domain in domains])
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelbottom=True)
        axis.spines[["left", "bottom"]].set_visible(False)
        if index + columns >= count:
            axis.set_xlabel("expert")
        if index % columns == 0:
            axis.set_ylabel(kind)
    _colour_bar(figure, image, axes)
    return figure


def device_loads(before_LX: np.ndarray | None, after_LX: np.ndarray, layers: Sequence[int]) -> Any:
    """Bars, one row of axes per MoE layer: what each device gets before a placement of the experts (left; None: they cannot
    lie so) and after it. 1.0 is the mean; the line is the largest."""
    columns = [("before", before_LX), ("after", after_LX)]
    figure, axes = new_figure(min(20, 0.5 + 1.35 * len(layers)), len(layers), 2, sharex=True, sharey=True)
    for (row, column), axis in np.ndenumerate(axes):
        name, load_LX = columns[column]
        if load_LX is None:
            axis.text(0.5, 0.5, "experts do not divide over the devices", transform=axis.transAxes, ha="center", color=MUTED)
            load_X = np.full(after_LX.shape[1], np.nan)
        else:
            load_X = load_LX[row]
            axis.axhline(load_X.max(), color=EVALUATION, linewidth=1.3)
        axis.bar(np.arange(len(load_X)), load_X, color=TRAIN, width=0.8)
        reference_line(axis, 1.0, "mean")
        largest = "" if load_LX is None else f": largest / mean {load_X.max():.2f}"
        panel_title(axis, f"layer {layers[row]}, {name}{largest}")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if row == len(layers) - 1:
            axis.set_xlabel("device")
        if column == 0:
            axis.set_ylabel("load")
    return figure


def throughput(steps: np.ndarray, tokens_per_second: np.ndarray) -> Any:
    """Tokens per second [N] over training with the median as reference."""
    figure, axes = new_figure(2.7)
    axis = axes[0, 0]
    axis.plot(steps, tokens_per_second, color=TRAIN, linewidth=1.5)
    median = float(np.nanmedian(tokens_per_second))
    reference_line(axis, median, f"median {median:,.0f}")
    axis.set(xlabel="step", ylabel="tokens per second")
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.set_ylim(bottom=0)
    legend(axis, loc="lower right")
    return figure
