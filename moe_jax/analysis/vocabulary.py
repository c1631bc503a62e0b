"""Do token ids have experts of their own? OpenMoE's figure 10 and tables 9 and 15, OLMoE's vocabulary specialisation."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.report_figures import INK, MUTED, legend, new_figure, panel_title, plain
from moe_jax.analysis.routing_counts import (
    choices_per_token, chosen_TK, count, dealt_anew, headline, pair_codes, ratio, token_label, top, uniform_largest_share)
from moe_jax.analysis.routing_figures import SERIES, shown
from moe_jax.analysis.specialisation import routing_by_category
from moe_jax.analysis.tables import MissingArray, Table, latest

MOST_IDS, TOP = 16, 10
LEAST_OCCURRENCES = 8
KINDS = {"input": "token_ids_T", "ground truth": "target_ids_T", "prediction": "predicted_ids_T"}


# OpenMoE: where a token id goes.


def routing_by_token(records: Sequence[RoutingRecord], ids: Sequence[int] | None = None) -> Table:
    """Routing ratio (see :func:`specialisation.routing_by_category`) by token id (OpenMoE, figure 10).

    Args:
      ids: the token ids; None: the 16 most frequent ones.
    """
    record = latest(records)
    if ids is None:
        ids = top(np.bincount(record.token_ids_T), MOST_IDS)
    ids = np.asarray(ids)
    code_T = codes_of(record.token_ids_T, ids)
    table = routing_by_category(record, code_T, distinct_labels(record, ids), "token")
    ids_of_rows = np.tile(np.repeat(ids, record.num_experts), len(record.layers))
    columns = {"layer": table["layer"], "token_id": ids_of_rows, **table.columns}
    return Table(columns, table.caption, table.headlines, table.facts)


def codes_of(values_T: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The place of each value in `wanted` (different numbers in any order), -1 where it is not there."""
    order = np.argsort(wanted)
    place_T = np.minimum(np.searchsorted(wanted[order], values_T), len(wanted) - 1)
    return np.where(wanted[order][place_T] == values_T, order[place_T], -1)


def distinct_labels(record: RoutingRecord, ids: np.ndarray) -> list[str]:
    """Labels of token ids, with the id where several have the same text."""
    labels = [token_label(record, token) for token in ids.tolist()]
    return [label if labels.count(label) == 1 else f"{label} #{token}" for label, token in zip(labels, ids.tolist())]


def top_tokens(records: Sequence[RoutingRecord], most: int = TOP) -> Table:
    """The token ids that each expert gets most often (OpenMoE, tables 9 and 15): by number of dispatched choices.

    Returns:
      Columns layer, expert, rank (1 first), token_id, text, count, share_of_expert (count / all that the expert gets) and
      share_of_token (the share of the id's dispatched choices that goes to this expert).
    """
    record = latest(records)
    ids, code_T = np.unique(record.token_ids_T, return_inverse=True)
    experts, rows = record.num_experts, []
    for layer, number in enumerate(record.layers):
        codes = pair_codes(code_T, chosen_TK(record, layer, dispatched=True), experts)
        counts_VE = count(codes, len(ids) * experts).reshape(len(ids), experts)
        for expert, counts_V in enumerate(counts_VE.T):
            best = top(counts_V, most)
            found = counts_V[best]
            rows.append((np.full(len(best), number), np.full(len(best), expert), np.arange(1, len(best) + 1), ids[best],
                         found, found / max(counts_V.sum(), 1), found / counts_VE[best].sum(axis=1)))
    names = ("layer", "expert", "rank", "token_id", "count", "share_of_expert", "share_of_token")
    columns = dict(zip(names, map(np.concatenate, zip(*rows))))
    texts = {token: token_label(record, token) for token in np.unique(columns["token_id"]).tolist()}
    columns["text"] = np.array([texts[token] for token in columns["token_id"].tolist()])
    caption = (
        f"The {most} token ids that each expert gets most often, most frequent left, in the third MoE layer as in the "
        f"paper (the last, if there are fewer; the table has all layers); {record.num_tokens:,} tokens. Colour and "
        f"number: of the choices of that id, the share that goes to this expert; {100 / experts:.2g} % if it went "
        "everywhere alike. Specialisation: dark cells, of ids that belong together.")
    return Table(columns, caption, facts={"experts": experts, "layer": record.layers[min(2, len(record.layers) - 1)]})


def draw_top_tokens(table: Table) -> Any:
    rows, experts = table.where(layer=table.facts["layer"]), table.facts["experts"]
    most = int(table["rank"].max(initial=1))
    figure, axes = new_figure(0.7 + 0.25 * experts)
    axis = axes[0, 0]
    share = np.full((experts, most), np.nan)
    share[rows["expert"], rows["rank"] - 1] = rows["share_of_token"]
    axis.grid(False)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1.15, aspect="auto", interpolation="nearest")
    for expert, rank, text, part in zip(rows["expert"], rows["rank"], rows["text"], rows["share_of_token"]):
        axis.text(rank - 1, expert, f"{plain(text)} {100 * part:.0f}%", ha="center", va="center", fontsize=7,
                  color="white" if part > 0.6 else INK)
    axis.set(xlabel="rank by count", ylabel="expert")
    axis.set_xticks(range(most), range(1, most + 1))
    axis.set_yticks(range(0, experts, 1 if experts <= 32 else 2))
    panel_title(axis, f"layer {table.facts['layer']}: token and its share that goes to this expert")
    return figure


# OLMoE: vocabulary specialisation.


def vocabulary_specialisation(records: Sequence[RoutingRecord], least: int = LEAST_OCCURRENCES) -> Table:
    """Vocabulary specialisation of expert i on token id x (OLMoE): N_{x,i} / N_x, the share of the occurrences of
    x for which i is among the chosen experts; x is the input id, the ground-truth or the predicted next id. Ids with fewer
    than `least` occurrences are left out. A layer's score is the mean over ids of the largest share of any expert.

    Returns:
      Columns layer, kind, token_id, text, occurrences, expert (the favourite), share (its), uniform (what the favourite's
      share would be under uniform routing of so many occurrences), load (the most chosen expert's share of all tokens).
    """
    record = latest(records)
    rows, headlines = [], []
    for kind, array in KINDS.items():
        if getattr(record, array) is not None:
            found = _specialisation_of(record, kind, getattr(record, array), least)
            if found:
                rows.append(found[0])
                headlines.append(found[1])
    if not rows:
        raise MissingArray(f"No token id occurs {least} times in this record of {record.num_tokens:,} tokens; record more")
    columns = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    texts = {token: token_label(record, token) for token in np.unique(columns["token_id"]).tolist()}
    columns["text"] = np.array([texts[token] for token in columns["token_id"].tolist()])
    caption = (
        f"Mean over token ids with at least {least} occurrences of the share of occurrences that choose the id's "
        f"favourite expert; {record.num_tokens:,} tokens. Dashed: uniform routing of the same ids as often, which "
        f"lies above k/E because the best of {record.num_experts} noisy shares is taken; dotted: the most chosen "
        "expert's share of all tokens, which an id without an expert of its own would come to. Specialisation: lines "
        "well above both. In OLMoE it grows with depth, and late layers follow the predicted id more than the input "
        "id.")
    return Table(columns, caption, tuple(headlines))


def _specialisation_of(record: RoutingRecord, kind: str, ids_T: np.ndarray, least: int) -> tuple | None:
    """Columns and headline of one kind of id; None if none is frequent enough."""
    ids, code_T, tokens_V = np.unique(ids_T, return_inverse=True, return_counts=True)
    kept = np.flatnonzero((tokens_V >= least) & (ids >= 0))
    if not len(kept):
        return None
    code_V = np.full(len(ids), -1)
    code_V[kept] = np.arange(len(kept))
    code_T, tokens_C, size, experts = code_V[code_T], tokens_V[kept], len(kept), record.num_experts
    codes, columns = [], []
    per_token = choices_per_token(record)
    uniform_C = uniform_largest_share(tokens_C, experts, per_token)
    for layer, number in enumerate(record.layers):
        chosen = chosen_TK(record, layer)
        codes.append(pair_codes(code_T, chosen, experts))
        share_CE = count(codes[-1], size * experts).reshape(size, experts) / tokens_C[:, None]
        load = count(chosen, experts).max() / len(ids_T)
        columns.append({"layer": np.full(size, number), "kind": np.full(size, kind), "token_id": ids[kept],
                        "occurrences": tokens_C, "expert": share_CE.argmax(axis=1), "share": share_CE.max(axis=1), "uniform": uniform_C,
                        "load": np.full(size, load)})
    columns = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}

    def statistic(counts: np.ndarray) -> np.ndarray:
        counts_RCE = counts.reshape(-1, size, experts)
        return per_token * np.nanmean(ratio(counts_RCE.max(axis=-1), counts_RCE.sum(axis=-1)), axis=-1)

    name = f"vocabulary specialisation, {kind}: share of the favourite expert, mean over {size} ids and layers"
    reference = dealt_anew(record, code_T, size, False, statistic)
    return columns, headline(name, columns["share"].mean(), reference, record, codes, size * experts, statistic)


def draw_vocabulary_specialisation(table: Table) -> Any:
    kinds, layers = list(dict.fromkeys(table["kind"].tolist())), np.unique(table["layer"])
    figure, axes = new_figure(3.6)
    axis, largest = axes[0, 0], 0.0
    for kind, colour in zip(kinds, SERIES):
        rows = [table.where(kind=kind, layer=layer) for layer in layers]
        score, uniform, load = (100 * np.array([row[name].mean() for row in rows]) for name in ("share", "uniform", "load"))
        ids = len(rows[0]["token_id"])
        axis.plot(layers, score, marker="o", markersize=5, color=colour, label=f"{kind} ({ids:,} ids)", zorder=3)
        axis.plot(layers, uniform, color=colour, linestyle=(0, (5, 3)), linewidth=1.1)
        largest = max(largest, score.max(), uniform.max(), load.max())
    axis.plot([], [], color=MUTED, linestyle=(0, (5, 3)), label="uniform routing")
    axis.plot(layers, load, color=INK, linestyle=":", label="most chosen expert, all text")
    axis.set(xlabel="layer", ylabel="tokens of an id that choose\nits favourite expert (%)", ylim=(0, min(1.35 * largest, 135)))
    axis.set_xticks(layers if len(layers) <= 16 else shown(layers, 8))
    legend(axis, loc="upper left", ncols=3)
    return figure
