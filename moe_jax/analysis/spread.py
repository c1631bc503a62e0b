"""How unevenly a position or a token id spreads over the experts: the standard deviations of OpenMoE's figures 13 and 14."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.report_figures import EVALUATION, INK, MUTED, TRAIN, legend, panel_title
from moe_jax.analysis.routing_counts import (
    chosen_TK, counts_LCE, dealt_anew, drop_note, headline, pair_codes, ratios, token_label, uniform_std)
from moe_jax.analysis.routing_figures import few_hundreds, panels, shown
from moe_jax.analysis.tables import MissingArray, Table, latest

LEAST_OCCURRENCES = 128


def std_by_position(records: Sequence[RoutingRecord], least: int = LEAST_OCCURRENCES) -> Table:
    """:func:`std_over_experts` for each position in the document (OpenMoE, figure 13)."""
    record = latest(records, "positions_T")
    return std_over_experts(record, record.positions_T, "position", least)


def std_by_token(records: Sequence[RoutingRecord], least: int = LEAST_OCCURRENCES) -> Table:
    """:func:`std_over_experts` for each token id (OpenMoE, figure 14)."""
    record = latest(records)
    table = std_over_experts(record, record.token_ids_T, "token_id", least)
    texts = np.array([token_label(record, token) for token in table["token_id"].tolist()])
    return Table({**table.columns, "text": texts}, table.caption, table.headlines, table.facts)


def std_over_experts(record: RoutingRecord, value_T: np.ndarray, kind: str, least: int) -> Table:
    """For each value (a position, a token id) with at least `least` tokens: the standard deviation over experts of its
    routing ratio r_e, √(Σ_e (r_e - 1/E)² / E), r_e the share of its dispatched choices that goes to expert e.

    Returns:
      Columns layer, <kind>, tokens, std, uniform_std (what uniform routing of so many choices would give: not 0), load_std
      (that of all text, which a value without experts of its own would come to).

    Raises:
      MissingArray: no value has so many tokens.
    """
    values, number_T, tokens_V = np.unique(value_T, return_inverse=True, return_counts=True)
    kept = np.flatnonzero((tokens_V >= least) & (values >= 0))
    words = kind.replace("_", " ")
    if not len(kept):
        raise MissingArray(f"No {words} has {least} tokens or more in this record of {len(value_T):,}; record more tokens")
    code_V = np.full(len(values), -1)
    code_V[kept] = np.arange(len(kept))
    code_T, size, experts = code_V[number_T], len(kept), record.num_experts
    std_LC = ratios(counts_LCE(record, code_T, size, dispatched=True)).std(axis=-1)
    noise_LC = uniform_std(record, code_T, size, dispatched=True)
    everything = np.zeros(len(value_T), int)
    load_L = ratios(counts_LCE(record, everything, 1, dispatched=True)[:, 0]).std(axis=-1)
    layers = len(record.layers)
    columns = {"layer": np.repeat(record.layers, size), kind: np.tile(values[kept], layers),
               "tokens": np.tile(tokens_V[kept], layers), "std": std_LC.ravel(), "uniform_std": noise_LC.ravel(),
               "load_std": np.repeat(load_L, size)}
    codes = [pair_codes(code_T, chosen_TK(record, layer, True), experts) for layer in range(layers)]

    def mean_std(counts: np.ndarray) -> np.ndarray:
        return np.nanmean(ratios(counts.reshape(-1, size, experts)).std(axis=-1), axis=-1)

    mean = headline(f"std over experts of the routing ratio, mean over {size} {words}s and layers", np.nanmean(std_LC),
                    dealt_anew(record, code_T, size, True, mean_std), record, codes, size * experts, mean_std)
    caption = (
        f"One point per {words} with at least {least} tokens ({size} of them, {tokens_V[kept].sum():,} tokens): "
        f"standard deviation over the {experts} experts of its routing ratio. Grey: uniform routing of as many "
        "choices, which is above 0 for any finite number; dotted: the load of all text. Specialisation: points well "
        f"above both. OpenMoE finds token ids far above the reference and positions near it.{drop_note(record)}")
    return Table(columns, caption, (mean,), {"kind": kind})


def draw_std_over_experts(table: Table) -> Any:
    kind, layers = table.facts["kind"], shown(table["layer"])
    figure, axes = panels(len(layers), 2.5, sharex=True, sharey=True)
    # A few values, such as position 0 with its one start token, must not squeeze all others.
    usual = max(2 * np.nanpercentile(table["std"], 97), *table["uniform_std"], *table["load_std"])
    ceiling = 1.25 * min(np.nanmax([*table["std"], usual / 2]), usual)
    for index, (axis, layer) in enumerate(zip(axes, layers)):
        rows = table.where(layer=layer)
        # Token ids have no order of their own: the frequent ones right, where the reference is lowest.
        x = rows["tokens"] if kind == "token_id" else rows[kind]
        order = np.argsort(x, kind="stable")
        axis.plot(x, rows["std"], ".", color=TRAIN, markersize=4, alpha=0.7, label=f"one {kind.replace('_', ' ')}")
        above = rows["std"] > ceiling
        axis.plot(x[above], np.full(above.sum(), 0.98 * ceiling), "^", color=TRAIN, markersize=4,
                  label="above the axis" if above.any() else None)
        mean = np.nanmean(rows["std"])
        axis.axhline(mean, color=EVALUATION, linewidth=1.4, label="mean")
        axis.plot(x[order], rows["uniform_std"][order], color=MUTED, linewidth=1.8, label="uniform routing")
        axis.axhline(rows["load_std"][0], color=INK, linestyle=":", linewidth=1.2, label="all text")
        axis.set_ylim(0, ceiling)
        panel_title(axis, f"layer {layer}: mean {mean:.3g}, uniform {np.nanmean(rows['uniform_std']):.3g}")
        if index % 2 == 0:
            axis.set_ylabel("std of the routing ratio")
        if kind == "token_id":
            few_hundreds(axis)
        axis.set_xlabel("tokens of the id in the record" if kind == "token_id" else "position in the document (tokens)")
    legend(axes[0], loc="upper right", ncols=2)
    return figure
