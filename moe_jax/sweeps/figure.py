"""The figure of a sweep: where training curves part, every run's metric, and the intervals with their verdicts."""

import textwrap
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
_NAME, _CLAIM = 24, 44  # characters per line of an arm's name, and of a claim

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]


def draw(sweep: Sweep, scale: str, results: Results, comparisons: Sequence[Comparison]) -> Any:
    """A Matplotlib figure. ``results``: whole result files by arm and seed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    colours = dict(zip(sweep.arms, colormaps["tab20" if len(sweep.arms) > 10 else "tab10"](np.arange(len(sweep.arms)))))
    by_metric: dict[str, list[Comparison]] = {}
    for each in comparisons:
        by_metric.setdefault(each.order.metric, []).append(each)
    claims = {metric: [_claim(metric, one) for one in each] for metric, each in by_metric.items()}
    lines = [sum(text.count("\n") + 1.5 for text in each) for each in claims.values()]
    heights = [1.0 + _ROW * max(len(sweep.arms), 8), *(0.8 + 0.8 * _ROW * count for count in lines)]
    figure = Figure(figsize=(WIDTH, 0.4 + sum(heights)), dpi=150, layout="constrained", facecolor="white")
    # Parts of a figure are laid out each on its own: the names beside one do not narrow the others.
    parts = np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights))
    upper, lower = parts[0].subplots(1, 2), [part.subplots() for part in parts[1:]]
    for axis in (*upper, *lower):
        style_axis(axis)
    _draw_curves(upper[0], results, colours)
    _draw_runs(upper[1], sweep.metrics[0], results, colours)
    for axis, (metric, each) in zip(lower, by_metric.items()):
        _draw_intervals(axis, metric, each, claims[metric])
    seeds = max((len(each) for each in results.values()), default=0)
    figure.suptitle(plain(f"{sweep.title} – {scale}, {seeds} seed{'s' if seeds != 1 else ''}"), fontsize=11, x=0.01, ha="left")
    return figure


def _draw_curves(axis: Any, results: Results, colours: Mapping[str, Any]) -> None:
    """Training loss less that of the first arm: with the same seed they see the same batches, whose noise so cancels. Where no
    other arm has its steps, because each goes on from another one's, the losses themselves."""
    curves = {arm: {seed: result["curve"] for seed, result in each.items() if result["curve"].get("step")}
              for arm, each in results.items()}
    curves = {arm: each for arm, each in curves.items() if each}
    first = next(iter(curves), None)
    beside = {arm: {seed: np.subtract(curve["train/ce"], curves[first][seed]["train/ce"]) for seed, curve in each.items()
                    if seed in curves[first] and curve["step"] == curves[first][seed]["step"]} for arm, each in curves.items()}
    drawn, title = {arm: each for arm, each in beside.items() if each}, f"training loss less that of {first}, smoothed"
    if len(drawn) < 2 <= len(curves):
        drawn = {arm: {seed: curve["train/ce"] for seed, curve in each.items()} for arm, each in curves.items()}
        title = "training loss, smoothed"
    for arm, each in drawn.items():
        steps = curves[arm][next(iter(each))]["step"]
        alike = [values for seed, values in each.items() if curves[arm][seed]["step"] == steps]
        size = min(_SMOOTHED, len(steps))
        mean = np.convolve(np.mean(alike, axis=0), np.ones(size) / size, "valid")
        axis.plot(steps[size - 1 :], mean, color=colours[arm], linewidth=1.4)
    axis.set_xlabel("step")
    axis.set_ylabel("nats per token", fontsize=9)
    panel_title(axis, textwrap.fill(title, 40) if first else "no arm was trained")


def _draw_runs(axis: Any, metric: str, results: Results, colours: Mapping[str, Any]) -> None:
    values = {arm: [result["metrics"][metric] for result in each.values() if result["metrics"].get(metric) is not None]
              for arm, each in results.items()}
    values = {arm: each for arm, each in values.items() if each}
    for place, (arm, each) in enumerate(values.items()):
        axis.plot(each, [place] * len(each), "o", color=colours[arm], markersize=4.5, markeredgewidth=0)
        axis.plot([np.mean(each)], [place], "|", color=colours[arm], markersize=14, markeredgewidth=2)
    axis.set_yticks(range(len(values)), [plain(textwrap.fill(arm, _NAME, break_long_words=False)) for arm in values], fontsize=8)
    axis.set_ylim(max(len(values), 1) - 0.5, -0.5)
    axis.margins(x=0.05)
    axis.set_xlabel(_UNITS.get(metric, metric))
    panel_title(axis, "a dot per seed, a bar for the mean")


def _claim(metric: str, comparison: Comparison) -> str:
    """What is compared, and the verdict."""
    return textwrap.fill(comparison.claim.removeprefix(f"{metric}: "), _CLAIM, break_on_hyphens=False) + f"\n{comparison.verdict}"


def _draw_intervals(axis: Any, metric: str, comparisons: Sequence[Comparison], claims: Sequence[str]) -> None:
    for place, each in enumerate(comparisons):
        interval, colour = each.interval, _COLOURS.get(each.verdict, MUTED)
        if interval.low is not None:
            axis.plot([interval.low, interval.high], [place, place], color=colour, linewidth=3, solid_capstyle="butt")
        axis.plot([interval.mean], [place], "o", color=colour, markersize=6)
        if each.order.direction == "equal":
            axis.plot([-each.order.within, each.order.within], [place, place], "|", color=MUTED, markersize=12)
    axis.axvline(0, color=MUTED, linewidth=1.2)
    axis.set_yticks(range(len(comparisons)), [plain(text) for text in claims], fontsize=8)
    axis.set_ylim(len(comparisons) - 0.5, -0.5)
    axis.margins(x=0.05)
    axis.set_xlabel(_UNITS.get(metric, metric))
    panel_title(axis, "difference, right less left; 95 % interval of the mean")
