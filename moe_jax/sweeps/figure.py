"""The figure of a sweep: training curves, every run's metric, and the intervals with their verdicts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.analysis.report_figures import ACCENT, EVALUATION, GRID, MUTED, TRAIN, legend, new_figure, panel_title, plain
from moe_jax.sweeps.definition import Sweep
from moe_jax.sweeps.statistics import DOES_NOT_HOLD, HOLDS, Comparison, Metrics

_COLOURS = {HOLDS: ACCENT, DOES_NOT_HOLD: EVALUATION}
_UNITS = {"ce": "cross-entropy, nats per token", "bits_per_byte": "bits per byte", "train/ce": "training loss, nats per token",
          "load_max": "load of the busiest expert / mean load", "max_violation": "MaxVio (load of the busiest expert - 1)",
          "drop_fraction": "share of choices dropped", "seconds_per_step": "seconds per step"}


def draw(sweep: Sweep, scale: str, results: Mapping[str, Mapping[int, Mapping[str, Any]]], found: Metrics,
         comparisons: Sequence[Comparison]) -> Any:
    """A Matplotlib figure. ``results``: whole result files by arm and seed, for their curves."""
    curves = {arm: [result["curve"] for result in seeds.values() if result.get("curve", {}).get("step")]
              for arm, seeds in results.items()}
    curves = {arm: each for arm, each in curves.items() if each}
    height = 1.2 + 0.24 * max(len(sweep.arms), len(comparisons), 10)
    figure, axes = new_figure(height, 1, 3, width_ratios=(1.1, 1, 1.3))
    _draw_curves(axes[0, 0], curves)
    _draw_metric(axes[0, 1], sweep, found)
    _draw_intervals(axes[0, 2], comparisons)
    most = max((interval.interval.n for interval in comparisons), default=0)
    figure.suptitle(plain(f"{sweep.title} – {scale}, {most} seeds"), fontsize=11, x=0.01, ha="left")
    return figure


def _draw_curves(axis: Any, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    from matplotlib import colormaps
    colours = colormaps["tab10"](np.arange(len(curves)) % 10)
    for colour, (arm, each) in zip(colours, curves.items()):
        shortest = min(len(curve["step"]) for curve in each)
        mean = np.mean([curve["train/ce"][:shortest] for curve in each], axis=0)
        axis.plot(each[0]["step"][:shortest], mean, color=colour, linewidth=1.2, label=arm)
    last = [each[0]["train/ce"] for each in curves.values()]
    if last:
        lowest, middle = min(min(values) for values in last), max(values[len(values) // 4] for values in last)
        axis.set_ylim(lowest - 0.1, middle + 0.1)
    axis.set_xlabel("step")
    axis.set_ylabel(_UNITS["train/ce"])
    panel_title(axis, "training, mean over seeds")
    legend(axis)


def _draw_metric(axis: Any, sweep: Sweep, found: Metrics) -> None:
    name, arms = sweep.metrics[0], list(sweep.arms)
    for place, arm in enumerate(arms):
        values = [metrics[name] for metrics in found.get(arm, {}).values() if metrics.get(name) is not None]
        axis.plot(values, [place] * len(values), "o", color=TRAIN, markersize=4, alpha=0.6, markeredgewidth=0)
        if values:
            axis.plot([np.mean(values)], [place], "|", color=EVALUATION, markersize=13, markeredgewidth=2)
    axis.set_yticks(range(len(arms)), [plain(arm) for arm in arms])
    axis.set_ylim(len(arms) - 0.5, -0.5)
    axis.set_xlabel(_UNITS.get(name, name))
    panel_title(axis, "held-out text; a dot per seed, mean in red")


def _draw_intervals(axis: Any, comparisons: Sequence[Comparison]) -> None:
    """Each in units of its own half width or mean, whichever is larger: their metrics differ."""
    for place, each in enumerate(comparisons):
        interval = each.interval
        ends = [interval.mean] if interval.low is None else [interval.low, interval.high]
        unit = max(abs(end) for end in ends) or 1.0
        colour = _COLOURS.get(each.verdict, MUTED)
        axis.plot([end / unit for end in ends], [place] * len(ends), color=colour, linewidth=2.5, solid_capstyle="butt")
        axis.plot([interval.mean / unit], [place], "o", color=colour, markersize=5)
    axis.axvline(0, color=MUTED, linewidth=1.2)
    axis.set_yticks(range(len(comparisons)), [plain(f"{each.claim}\n{each.verdict}") for each in comparisons], fontsize=7)
    axis.set_ylim(len(comparisons) - 0.5, -0.5)
    axis.set_xlim(-1.15, 1.15)
    axis.set_xticks([0])
    axis.set_xlabel("difference, later - earlier; each with a scale of its own")
    axis.grid(color=GRID)
    panel_title(axis, "paired differences, 95 % intervals")
