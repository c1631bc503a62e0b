"""The figure of a sweep: where training curves part, every run's metric, and the intervals with their verdicts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.analysis.report_figures import ACCENT, EVALUATION, MUTED, WIDTH, panel_title, plain, style_axis
from moe_jax.sweeps.definition import Sweep
from moe_jax.sweeps.statistics import DOES_NOT_HOLD, HOLDS, Comparison

_COLOURS = {HOLDS: ACCENT, DOES_NOT_HOLD: EVALUATION}
_UNITS = {"ce": "cross-entropy, nats per token", "bits_per_byte": "bits per byte", "load_max": "busiest expert's load / mean load",
          "max_violation": "MaxVio: busiest expert's load / mean - 1", "drop_fraction": "share of choices dropped",
          "seconds_per_step": "seconds per step", "train/ce": "training loss, nats per token"}
_ROW, _SMOOTHED = 0.22, 7  # inches per line of text; lines of metrics.jsonl per point of a curve

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]


def draw(sweep: Sweep, scale: str, results: Results, comparisons: Sequence[Comparison]) -> Any:
    """A Matplotlib figure. ``results``: whole result files by arm and seed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colours = dict(zip(sweep.arms, colormaps["tab20" if len(sweep.arms) > 10 else "tab10"](np.arange(len(sweep.arms)))))
    by_metric: dict[str, list[Comparison]] = {}
    for each in comparisons:
        by_metric.setdefault(each.order.metric, []).append(each)
    heights = [1.0 + _ROW * max(len(sweep.arms), 8), *(0.75 + 1.5 * _ROW * len(each) for each in by_metric.values())]
    figure = Figure(figsize=(WIDTH, 0.4 + sum(heights)), dpi=150, layout="constrained", facecolor="white")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    upper = [figure.add_subplot(grid[0, column]) for column in (0, 1)]
    lower = [figure.add_subplot(grid[row, :]) for row in range(1, len(heights))]
    for axis in (*upper, *lower):
        style_axis(axis)
    _draw_curves(upper[0], results, colours)
    _draw_runs(upper[1], sweep.metrics[0], results, colours)
    for axis, (metric, each) in zip(lower, by_metric.items()):
        _draw_intervals(axis, metric, each)
    seeds = max((len(each) for each in results.values()), default=0)
    figure.suptitle(plain(f"{sweep.title} – {scale}, {seeds} seed{'s' if seeds != 1 else ''}"), fontsize=11, x=0.01, ha="left")
    return figure


def _draw_curves(axis: Any, results: Results, colours: Mapping[str, Any]) -> None:
    """Training loss less that of the first arm: with the same seed they see the same batches, whose noise so cancels."""
    curves = {arm: {seed: result["curve"] for seed, result in each.items() if result["curve"].get("step")}
              for arm, each in results.items()}
    first = next((arm for arm, each in curves.items() if each), None)
    for arm, each in curves.items():
        differences = [np.subtract(curve["train/ce"], curves[first][seed]["train/ce"]) for seed, curve in each.items()
                       if seed in curves[first] and curve["step"] == curves[first][seed]["step"]]
        if differences:
            steps = next(iter(each.values()))["step"]
            size = min(_SMOOTHED, len(steps))
            mean = np.convolve(np.mean(differences, axis=0), np.ones(size) / size, "valid")
            axis.plot(steps[size - 1 :], mean, color=colours[arm], linewidth=1.4)
    axis.set_xlabel("step")
    axis.set_ylabel("nats per token", fontsize=9)
    panel_title(axis, f"training loss less that of {first}, smoothed" if first else "no arm was trained")


def _draw_runs(axis: Any, metric: str, results: Results, colours: Mapping[str, Any]) -> None:
    for place, (arm, each) in enumerate(results.items()):
        values = [result["metrics"][metric] for result in each.values() if result["metrics"].get(metric) is not None]
        axis.plot(values, [place] * len(values), "o", color=colours[arm], markersize=4.5, markeredgewidth=0)
        if values:
            axis.plot([np.mean(values)], [place], "|", color=colours[arm], markersize=14, markeredgewidth=2)
    axis.set_yticks(range(len(results)), [plain(arm) for arm in results])
    axis.set_ylim(len(results) - 0.5, -0.5)
    axis.margins(x=0.05)
    axis.set_xlabel(_UNITS.get(metric, metric))
    panel_title(axis, "a dot per seed, a bar for the mean")


def _draw_intervals(axis: Any, metric: str, comparisons: Sequence[Comparison]) -> None:
    for place, each in enumerate(comparisons):
        interval, colour = each.interval, _COLOURS.get(each.verdict, MUTED)
        if interval.low is not None:
            axis.plot([interval.low, interval.high], [place, place], color=colour, linewidth=3, solid_capstyle="butt")
        axis.plot([interval.mean], [place], "o", color=colour, markersize=6)
        if each.order.direction == "equal":
            axis.plot([-each.order.within, each.order.within], [place, place], "|", color=MUTED, markersize=12)
    axis.axvline(0, color=MUTED, linewidth=1.2)
    names = [plain(f"{each.claim.removeprefix(f'{metric}: ')}   {each.verdict}") for each in comparisons]
    axis.set_yticks(range(len(comparisons)), names, fontsize=8)
    axis.set_ylim(len(comparisons) - 0.5, -0.5)
    axis.margins(x=0.05)
    axis.set_xlabel(_UNITS.get(metric, metric))
    panel_title(axis, "difference, right less left; 95 % interval of the mean")
