"""When is routing decided? The same tokens at several steps of training: OLMoE's saturation, OpenMoE's figure 11."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.report_figures import INK, MUTED, domains_by_expert, layer_lines, new_figure
from moe_jax.analysis.routing_counts import (
    chosen_TK, common_experts, count, counts_LCE, drop_note, headline, pair_codes, ratios, top)
from moe_jax.analysis.routing_figures import grid, legend_above, panels
from moe_jax.analysis.tables import MissingArray, Table, over_steps
from moe_jax.analysis.vocabulary import codes_of, distinct_labels

MOST_IDS, LEAST_OCCURRENCES = 4, 128


# OLMoE: saturation.


def saturation(records: Sequence[RoutingRecord]) -> Table:
    """Router saturation (OLMoE): |E_t ∩ E_T| / k, the share of a token's experts at the last step T that were
    already among its experts at step t, mean over tokens; k the number of experts that the token has at T.

    Returns:
      Columns step, layer, saturation, random (k/E: random sets), independent (what the loads of both steps alone would
      give: Σ_e p_t(e) p_T(e) / k, p the share of tokens that choose e).
    """
    records, last = over_steps(records), records[-1]
    tokens, rows = last.num_tokens, []
    for record in records:
        for layer, number in enumerate(last.layers):
            common_T, made_T = overlap(chosen_TK(record, layer), chosen_TK(last, layer))
            share_E = [count(chosen_TK(each, layer), last.num_experts) / tokens for each in (record, last)]
            k = made_T.mean()
            rows.append((record.step, number, np.mean(common_T[made_T > 0] / made_T[made_T > 0]), k / last.num_experts,
                         float(share_E[0] @ share_E[1]) / k))
    names = ("step", "layer", "saturation", "random", "independent")
    columns = dict(zip(names, map(np.array, zip(*rows))))
    first, size = records[0], last.experts_per_token + 1
    codes = [overlap(chosen_TK(first, layer), chosen_TK(last, layer))[0] for layer in range(len(last.layers))]
    at_first = columns["step"] == first.step
    per_choice = columns["saturation"][at_first].mean() / max(np.mean([code.mean() for code in codes]), 1e-30)
    value = headline(
        f"saturation at step {first.step:,}: experts that step {last.step:,} keeps, mean over layers",
        columns["saturation"][at_first].mean(), columns["independent"][at_first].mean(), last, codes, size,
        lambda counts: per_choice * (counts @ np.arange(size)) / counts.sum(axis=1))
    caption = (
        f"Share of a token's experts at step {last.step:,} that it already had at an earlier step; {tokens:,} tokens, "
        f"the same at all {len(records)} steps. Dashed: random sets, k/E; dotted: independent choices with the "
        "measured loads (mean over layers), which is more where few experts take most tokens. Early saturation: a "
        "line that is far above both soon. The last point is 1 by definition. OLMoE finds about 60 % after 1 % of "
        "training, and later layers before earlier ones.")
    return Table(columns, caption, (value,))


def overlap(early_TK: np.ndarray, late_TK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each token the number of experts in both sets, and the number in the later one, ``[T]``."""
    return common_experts(late_TK, early_TK), (late_TK >= 0).sum(axis=1)


def draw_saturation(table: Table) -> Any:
    figure, axes = new_figure(3.5)
    axis = axes[0, 0]
    value_NL, steps, layers = grid(table.columns, "saturation", "step", "layer")
    for value_N, line in zip(value_NL.T, layer_lines(layers)):
        axis.plot(steps, 100 * value_N, marker="o", markersize=4, **line)
    for column, colour, style, label in (("random", MUTED, (0, (5, 3)), "random sets, k/E"),
                                         ("independent", INK, ":", "independent, these loads")):
        mean_N = 100 * grid(table.columns, column, "step", "layer")[0].mean(axis=1)
        axis.plot(steps, mean_N, color=colour, linestyle=style, linewidth=1.3, label=label)
    axis.set(xlabel="step", ylabel="experts of the last step\nalready chosen (%)", ylim=(0, 104))
    legend_above(figure, axis)
    return figure


# OpenMoE: the same token over training.


def token_over_training(records: Sequence[RoutingRecord], ids: Sequence[int] | None = None) -> Table:
    """Routing ratio of a token id (see :func:`specialisation.routing_by_category`) at each saved step (OpenMoE, figure 11).

    Args:
      ids: the token ids; None: the 4 most frequent ones.

    Returns:
      Columns step, layer, token_id, token, expert, choices, ratio.
    """
    records = over_steps(records)
    last, experts = records[-1], records[-1].num_experts
    ids = np.asarray(top(np.bincount(last.token_ids_T), MOST_IDS) if ids is None else ids)
    code_T, labels = codes_of(last.token_ids_T, ids), np.array(distinct_labels(last, ids))
    counts_NLVE = np.stack([counts_LCE(record, code_T, len(ids), dispatched=True) for record in records])
    step, layer, token, expert = (index.ravel() for index in np.indices(counts_NLVE.shape))
    columns = {"step": np.array([record.step for record in records])[step], "layer": np.array(last.layers)[layer],
               "token_id": ids[token], "token": labels[token], "expert": expert, "choices": counts_NLVE.ravel(),
               "ratio": ratios(counts_NLVE).ravel()}
    shown = last.layers[min(2, len(last.layers) - 1)]
    caption = (
        f"Where one token id goes at each saved step, relative to the fair share 1/{experts} (1.0, white), in MoE "
        f"layer {shown} (the third, as in the paper, or the last; the table has all); {(code_T >= 0).sum():,} tokens, "
        "the same at all steps. Early specialisation: columns that keep their colour from the first steps "
        f"on.{drop_note(last)}")
    return Table(columns, caption, facts={"layer": shown})


def draw_token_over_training(table: Table) -> Any:
    rows = table.where(layer=table.facts["layer"])
    tokens = list(dict.fromkeys(rows["token"].tolist()))
    found = []
    for token in tokens:
        chosen = rows["token"] == token
        found.append(grid({name: column[chosen] for name, column in rows.items()}, "ratio", "step", "expert"))
    return domains_by_expert(np.stack([matrix for matrix, *_ in found], axis=1), [f"{step:,}" for step in found[0][1]],
                             [table.facts["layer"]] * len(tokens), "step",
                             titles=[f"{token}   (layer {table.facts['layer']})" for token in tokens])


def token_stability(records: Sequence[RoutingRecord], least: int = LEAST_OCCURRENCES) -> Table:
    """How alike a token id's routing at a step and at the last one are: cosine of the two routing ratios [E], and their
    Jensen-Shannon divergence in bits (0 the same, 1 no expert in common). A score of what OpenMoE's figure 11 shows,
    for every id with at least `least` occurrences.

    Returns:
      Columns step, layer, token_id, tokens, cosine, divergence, cosine_before (with the step before; NaN at the first),
      other_cosine, other_divergence (mean over pairs of *different* ids, one at this step and one at the last: what ids
      without experts of their own would have).

    Raises:
      MissingArray: fewer than two ids are so frequent, or the records do not fit together.
    """
    records = over_steps(records)
    last, experts = records[-1], records[-1].num_experts
    ids, number_T, tokens_V = np.unique(last.token_ids_T, return_inverse=True, return_counts=True)
    kept = np.flatnonzero(tokens_V >= least)
    if len(kept) < 2:
        raise MissingArray(f"Fewer than two token ids have {least} tokens in this record of {last.num_tokens:,}; record more")
    code_V = np.full(len(ids), -1)
    code_V[kept] = np.arange(len(kept))
    code_T, size, rows, before = code_V[number_T], len(kept), [], None
    ratio_NLVE = np.nan_to_num([ratios(counts_LCE(record, code_T, size, dispatched=True)) for record in records])
    for record, ratio_LVE in zip(records, ratio_NLVE):
        for layer, number in enumerate(last.layers):
            now_VE, end_VE = ratio_LVE[layer], ratio_NLVE[-1][layer]
            other = [_of_others(measure, now_VE, end_VE) for measure in (cosine, divergence)]
            rows.append({
                "step": np.full(size, record.step), "layer": np.full(size, number), "token_id": ids[kept],
                "tokens": tokens_V[kept],
                "cosine": cosine(now_VE, end_VE), "divergence": divergence(now_VE, end_VE),
                "cosine_before": np.full(size, np.nan) if before is None else cosine(now_VE, before[layer]),
                "other_cosine": np.full(size, other[0]), "other_divergence": np.full(size, other[1])})
        before = ratio_LVE
    columns = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def first_with_last(counts: np.ndarray) -> np.ndarray:
        ratio_RSVE = np.nan_to_num(ratios(counts.reshape(-1, 2, size, experts)))
        return cosine(ratio_RSVE[:, 0], ratio_RSVE[:, 1]).mean(axis=-1)

    codes = [np.concatenate([pair_codes(code_T, chosen_TK(records[0], layer, True), experts),
                             pair_codes(np.where(code_T >= 0, code_T + size, -1), chosen_TK(last, layer, True), experts)], axis=1)
             for layer in range(len(last.layers))]
    at_first = columns["step"] == records[0].step
    value = headline(f"cosine of a token id's routing at step {records[0].step:,} and step {last.step:,}, mean over {size} "
                     f"ids and layers", columns["cosine"][at_first].mean(), columns["other_cosine"][at_first].mean(), last, codes,
                     2 * size * experts, first_with_last)
    caption = (
        f"How alike the routing of a token id at a step and at the last step is, mean over {size} ids with at least "
        f"{least} tokens ({tokens_V[kept].sum():,} tokens): left cosine, right Jensen-Shannon divergence. Dashed: the "
        "same for two different ids, mean over layers. Early specialisation: solid lines far from the dashed one at "
        f"the first steps already.{drop_note(last)}")
    return Table(columns, caption, (value,))


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of vectors along the last axis; 0 where one is 0."""
    length = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    product = (a * b).sum(axis=-1)
    return np.divide(product, length, out=np.zeros(np.shape(product)), where=length > 0)


def divergence(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence in bits of distributions along the last axis, from 0 to 1."""
    def entropy(p: np.ndarray) -> np.ndarray:
        return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis=-1)

    return np.maximum(entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2, 0.0)


def _of_others(measure, now_VE: np.ndarray, end_VE: np.ndarray, most: int = 32) -> float:
    """Mean of a measure over pairs of different ids; each id with at most `most` others, at even distances."""
    size = len(now_VE)
    shifts = np.unique(np.linspace(1, size - 1, min(most, size - 1)).round().astype(int))
    return float(np.mean([measure(now_VE, np.roll(end_VE, shift, axis=0)).mean() for shift in shifts]))


def draw_token_stability(table: Table) -> Any:
    steps, layers = np.unique(table["step"]), np.unique(table["layer"])
    figure, axes = panels(2, 3.1)
    labels = {"cosine": "cosine with the last step", "divergence": "JS divergence from the last step (bits)"}
    for axis, (column, label) in zip(axes, labels.items()):
        def mean(name: str, layer: int) -> list[float]:
            return [table.where(layer=layer, step=step)[name].mean() for step in steps]

        for layer, line in zip(layers, layer_lines(layers)):
            axis.plot(steps, mean(column, layer), marker="o", markersize=4, **line)
        others_N = np.mean([mean(f"other_{column}", layer) for layer in layers], axis=0)
        axis.plot(steps, others_N, color=MUTED, linestyle=(0, (5, 3)), label="two different ids")
        axis.set(xlabel="step", ylabel=label, ylim=(0, 1.04))
    legend_above(figure, *axes)
    return figure
