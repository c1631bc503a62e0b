"""Figures of the analyses of balance, prediction and caching: a Table in, a Matplotlib Figure out."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_jax.analysis.report_figures import (
    EVALUATION, INK, MUTED, TRAIN, layer_lines, legend, new_figure, panel_title, plain, reference_line)
from moe_jax.analysis.routing_figures import SERIES, panels
from moe_jax.analysis.tables import Table

_DASHED, _DOTTED = (0, (5, 3)), (0, (1, 1.5))


def _layers(table: Table) -> np.ndarray:
    return np.unique(table["layer"])


def _whole_layers(axis: Any, layers: np.ndarray) -> None:
    axis.set_xticks(layers if len(layers) <= 16 else layers[:: -(-len(layers) // 16)])
    axis.set_xlabel("layer")


def _headroom(axis: Any, part: float) -> None:
    """Room for a legend above the lines."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + part * (high - low))


def _error_bars(axis: Any, xs: np.ndarray, rows: dict[str, np.ndarray], value: str, **look: Any) -> None:
    """Points with bars from low to high; no bar where the interval is not known."""
    ends = np.abs(np.nan_to_num([rows[value] - rows["low"], rows["high"] - rows[value]]))
    axis.errorbar(xs, rows[value], yerr=ends, capsize=2.5, elinewidth=1.2, **look)


def balance(table: Table) -> Any:
    figure, axes = panels(4, 2.6)
    layers = _layers(table)
    both = (("MaxVio global", TRAIN), ("MaxVio batch", EVALUATION))
    for name, colour in both:
        rows = table.where(measure=name)
        _error_bars(axes[0], layers, rows, "value", color=colour, marker="o", markersize=4, linewidth=1.5,
                    label=name.replace("MaxVio ", ""))
        reference_line(axes[0], rows["uniform"][0], f"random choice, {name.replace('MaxVio ', '')}", colour)
    axes[0].set(ylabel="MaxVio (1.0 = one fair share)")
    axes[0].set_ylim(bottom=0)
    for axis, name, label in zip(axes[1:], ("load CV", "load entropy / ln E", "dead experts"),
                                 ("CV of the load", "entropy of the load / ln E", "dead experts")):
        rows = table.where(measure=name)
        _error_bars(axis, layers, rows, "value", color=TRAIN, marker="o", markersize=4, linewidth=1.5)
        reference_line(axis, rows["uniform"][0], "random choice")
        axis.set(ylabel=label)
        low = min(rows["value"].min(), np.nanmin([*rows["low"], np.inf]))
        if name == "load entropy / ln E":
            axis.set_ylim(low - 0.25 * (1.002 - low), 1 + 0.15 * (1.002 - low))
        else:
            axis.set_ylim(bottom=0, top=None if rows["value"].any() else 1)
    _headroom(axes[0], 0.35)
    legend(axes[0], loc="upper right", ncols=2)
    for axis in axes:
        _whole_layers(axis, layers)
    for axis in axes[1:]:
        legend(axis, loc="best")
    return figure


def expert_loads(table: Table) -> Any:
    figure, axes = new_figure(3.6)
    axis, layers = axes[0, 0], _layers(table)
    for layer, line in zip(layers, layer_lines(layers)):
        rows = table.where(layer=layer)
        order = np.argsort(rows["rank"])
        axis.plot(rows["rank"][order], rows["load"][order], marker="o", markersize=3, **line)
        axis.fill_between(rows["rank"][order], rows["low"][order], rows["high"][order], color=line["color"], alpha=0.12,
                          linewidth=0)
    reference_line(axis, 1.0, "fair share 1.0")
    reference_line(axis, 0.01, "dead below 0.01", EVALUATION, _DOTTED)
    axis.set(xlabel="experts, busiest first (rank)", ylabel="load (1.0 = fair share)")
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    legend(axis, loc="upper right", ncols=2)
    return figure


def balance_by_position(table: Table) -> Any:
    figure, axes = panels(2, 3.4)
    layers = _layers(table)
    starts = np.unique(table["first_position"])
    last = table["last_position"][[np.flatnonzero(table["first_position"] == start)[0] for start in starts]]
    names = [f"{start}-{end}" for start, end in zip(starts, last)]
    for axis, measure, label in zip(axes, ("MaxVio", "load CV"), ("MaxVio (1.0 = one fair share)", "CV of the load")):
        for layer, line in zip(layers, layer_lines(layers)):
            rows = table.where(measure=measure, layer=layer)
            places = np.searchsorted(starts, rows["first_position"])
            axis.plot(places, rows["value"], marker="o", markersize=3.5, **line)
            axis.fill_between(places, rows["low"], rows["high"], color=line["color"], alpha=0.12, linewidth=0)
        axis.plot(places, rows["uniform"], color=MUTED, linestyle=_DASHED, linewidth=1.3, label="random choice")
        axis.set_xticks(range(len(names)), names, rotation=30 if len(names) > 5 else 0)
        axis.set(xlabel="position in the document (tokens)", ylabel=label)
        axis.set_ylim(bottom=0)
        _headroom(axis, 0.25)
    legend(axes[0], loc="upper center", ncols=3)
    return figure


def distribution_shift(table: Table) -> Any:
    figure, axes = new_figure(3.6)
    axis = axes[0, 0]
    domains = list(dict.fromkeys(table["domain"].tolist()))
    for domain, colour in zip(domains, SERIES * (1 + len(domains) // len(SERIES))):
        rows = table.where(domain=domain)
        inside = np.flatnonzero(rows["phase"] == "burst")
        # Bursts differ in length by domain, so that each line marks its own.
        axis.plot(rows["batch"], rows["value"], color=colour, marker="o", markersize=7, markevery=inside.tolist(), linewidth=1.5,
                  label=plain(f"burst of {domain}"))
    axis.axvline(-0.5, color=MUTED, linewidth=0.8)
    reference_line(axis, float(table["uniform"][0]), "random choice")
    axis.set(xlabel="batch (0 = first of the burst)", ylabel="MaxVio, mean over layers")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(bottom=0)
    legend(axis, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def router_confidence(table: Table) -> Any:
    figure, axes = new_figure(3.4, 1, 3)
    layers = _layers(table)
    labels = {"confidence": "largest router score", "entropy": "entropy of the scores (nats)",
              "logit norm": "norm of the logits"}
    for axis, (measure, label) in zip(axes[0], labels.items()):
        rows = table.where(measure=measure)
        if len(layers) == 1:  # a band needs width
            layers_wide = np.array([layers[0] - 0.2, layers[0] + 0.2])
            rows = {name: np.repeat(column, 2) for name, column in rows.items()}
        else:
            layers_wide = layers
        for low, high, alpha, name in (("q05", "q95", 0.15, "90 % of the tokens"), ("q25", "q75", 0.3, "half of the tokens")):
            axis.fill_between(layers_wide, rows[low], rows[high], color=TRAIN, alpha=alpha, linewidth=0, label=name)
        _error_bars(axis, layers_wide, rows, "mean", color=INK, marker="o", markersize=3.5, linewidth=1.5, label="mean")
        if np.isfinite(rows["reference"][0]):
            reference_line(axis, rows["reference"][0], f"no preference {rows['reference'][0]:.3g}", EVALUATION)
        axis.set(ylabel=label)
        axis.set_ylim(bottom=0, top=1 if measure == "confidence" else None)
        _whole_layers(axis, layers)
    legend(axes[0, 0], loc="best")
    legend(axes[0, 1], loc="best", handles=[line for line in axes[0, 1].lines if "no preference" in str(line.get_label())])
    return figure


def collapse_over_training(table: Table) -> Any:
    labels = {"MaxVio": "MaxVio (1.0 = one fair share)", "load entropy / ln E": "entropy of the load / ln E",
              "dead experts": "dead experts", "confidence": "largest router score", "logit norm": "norm of the logits",
              "overlap": "experts kept (share)"}
    present = [measure for measure in labels if (table["measure"] == measure).any()]
    figure, axes = panels(len(present), 2.5)
    layers = _layers(table)
    for axis, measure in zip(axes, present):
        for layer, line in zip(layers, layer_lines(layers)):
            rows = table.where(measure=measure, layer=layer)
            axis.plot(rows["step"], rows["value"], marker="o", markersize=3.5, **line)
        uniform = table.where(measure=measure)["uniform"][0]
        if np.isfinite(uniform):
            reference_line(axis, uniform, "no preference")
        axis.set(xlabel="training step", ylabel=labels[measure])
        axis.xaxis.get_major_locator().set_params(integer=True)
        if measure != "load entropy / ln E":
            none_dead = measure == "dead experts" and not table.where(measure=measure)["value"].any()
            axis.set_ylim(bottom=0, top=1 if none_dead else None)
    _headroom(axes[0], 0.4)
    legend(axes[0], loc="upper center", ncols=3)
    return figure


def _series(table: Table, column: str) -> list[tuple[str, Any]]:
    names = list(dict.fromkeys(table[column].tolist()))
    return list(zip(names, SERIES))


def expert_prediction(table: Table) -> Any:
    figure, axes = panels(2, 3.5)
    choices, layers = table.facts["experts_per_token"], _layers(table)
    for name, colour in _series(table, "predictor"):
        rows = table.where(predictor=name, prefetched=choices)
        _error_bars(axes[0], layers, rows, "recall", color=colour, marker="o", markersize=4, linewidth=1.5, label=name)
        rows = table.where(predictor=name)
        sizes = np.unique(rows["prefetched"])
        mean = [rows["recall"][rows["prefetched"] == size].mean() for size in sizes]
        axes[1].plot(sizes, mean, color=colour, marker="o", markersize=3.5, linewidth=1.5, label=name)
    random = table.where(predictor=name, layer=layers[0])
    reference_line(axes[0], table.where(prefetched=choices)["random"][0], "at random")
    axes[1].plot(random["prefetched"], random["random"], color=MUTED, linestyle=_DASHED, linewidth=1.3, label="at random")
    axes[0].set(ylabel=f"recall@{choices} (share of the token's experts)")
    _whole_layers(axes[0], layers)
    axes[1].set(xlabel="experts fetched, of a layer", ylabel="recall, mean over layers")
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    for axis in axes:
        axis.set_ylim(0, 1.04)
    legend(axes[1], loc="lower right")
    return figure


def token_overlap(table: Table) -> Any:
    figure, axes = new_figure(3.2)
    axis, layers = axes[0, 0], _layers(table)
    rows = table.where()
    _error_bars(axis, layers, rows, "shared", color=TRAIN, marker="o", markersize=4, linewidth=1.5,
                label="consecutive tokens")
    axis.plot(layers, rows["by_load"], color=EVALUATION, linestyle=_DOTTED, linewidth=1.6, marker="_",
              label="independent, same loads")
    reference_line(axis, rows["random"][0], f"independent, uniform: k²/E = {rows['random'][0]:.3g}")
    axis.set(ylabel="experts in common")
    axis.set_ylim(bottom=0)
    _whole_layers(axis, layers)
    legend(axis, loc="best")
    return figure


def expert_cache(table: Table) -> Any:
    figure, axes = new_figure(6.8, 2, 2, sharex=True)
    lru = table.where(policy="LRU", predictor="none")
    policies = [(name, table.where(policy=name, predictor="none")) for name in dict.fromkeys(table["policy"].tolist())]
    predictors = [("nothing" if name == "none" else name, table.where(policy="LRU", predictor=name))
                  for name in dict.fromkeys(table["predictor"].tolist())]
    for (left, right), series, title in zip(axes, (policies, predictors), ("what makes room", "what LRU fetches ahead")):
        for (name, rows), colour in zip(series, SERIES):
            look = {"color": colour, "marker": "o", "markersize": 4, "linewidth": 1.5, "label": name}
            _error_bars(left, rows["places"], rows, "hit_rate", **look)
            right.plot(rows["places"], rows["waited_ms"], **look)
        left.plot(lru["places"], lru["uniform"], color=MUTED, linestyle=_DASHED, linewidth=1.3, label="n/E")
        if series is policies:
            belady = table.where(policy="Belady", predictor="none")
            left.plot(belady["places"], belady["uniform"], color=MUTED, linestyle=_DOTTED, linewidth=1.5, label="Belady, uniform")
        reference_line(right, table.facts["compute_ms"], f"computing {table.facts['compute_ms']:.3g} ms")
        left.set(ylabel="hit rate (there or on their way)")
        right.set(ylabel="waiting (ms per token)")
        left.set_ylim(0, 1.04)
        right.set_ylim(bottom=0)
        panel_title(left, title)
        legend(left, loc="lower right")
        legend(right, loc="best", handles=right.lines[-1:])
    for axis in axes[1]:
        axis.set_xlabel("experts of a layer that have room")
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure
