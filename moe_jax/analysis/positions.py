"""Does the place of a token decide where it goes, and whether it finds a place there? OpenMoE's figures 9 and 12."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.report_figures import MUTED, drops_by_position, legend, plain, reference_line
from moe_jax.analysis.routing_counts import chosen_TK, count, domain_codes, headline, ratio
from moe_jax.analysis.routing_figures import SERIES, bars, grid, legend_above, panels, row_height
from moe_jax.analysis.specialisation import routing_by_category, turn_codes
from moe_jax.analysis.tables import Headline, Table, latest

PAPER_POSITIONS = tuple(range(256, 1793, 256))
ADJACENT, BINS, OFTEN = 4, 16, 128


# Routing by position.


def routing_by_position(records: Sequence[RoutingRecord]) -> Table:
    """Routing ratio (see :func:`specialisation.routing_by_category`) by position in the document (OpenMoE, figure 9): seven
    positions spread over the text, and the first of them with its three neighbours.

    The paper's are 256, 512, … 1792 and 256 … 259. Where fewer than 128 documents reach 1792 the seven are spread over the
    positions that so many reach (that all reach, if no position is so frequent).
    """
    record = latest(records, "positions_T")
    tokens_S = np.bincount(record.positions_T[record.positions_T >= 0])
    often = np.flatnonzero(tokens_S >= min(OFTEN, tokens_S.max()))
    spread = PAPER_POSITIONS if often[-1] >= PAPER_POSITIONS[-1] else np.linspace(0, often[-1], 8).round().astype(int)[1:]
    chosen = sorted({*spread, *range(spread[0], spread[0] + ADJACENT)} & set(np.flatnonzero(tokens_S).tolist()))
    code_S = np.full(len(tokens_S) + 1, -1)
    code_S[chosen] = np.arange(len(chosen))
    table = routing_by_category(record, code_S[record.positions_T], [str(position) for position in chosen], "position")
    first = f" Positions {spread[0]} to {spread[0] + ADJACENT - 1} are neighbours: OpenMoE finds neighbours alike."
    return dataclasses.replace(table, caption=table.caption + first)


# Drops.


def drops(records: Sequence[RoutingRecord]) -> Table:
    """Drop ratio by position (OpenMoE, figure 12a): of the choices made by tokens at a place in the row, the share that
    found no place in the expert's buffer. Buffers fill row by row, so this is the position in the row, not in the document.

    Returns:
      Columns layer, position, choices, dropped, ratio.
    """
    record = latest(records, "kept_LTK", "row_positions_T")
    size = int(record.row_positions_T.max()) + 1
    made_LS, dropped_LS = _made_and_dropped(record, record.row_positions_T, size)
    columns = {"layer": np.repeat(record.layers, size), "position": np.tile(np.arange(size), len(record.layers)),
               "choices": made_LS.ravel(), "dropped": dropped_LS.ravel(), "ratio": ratio(dropped_LS, made_LS).ravel()}
    quarter = max(1, size // 4)
    early_T, late_T = record.row_positions_T < quarter, record.row_positions_T >= size - quarter
    early, late = (_drop_headline(record, part_T, f"dropped choices in the {name} quarter of the row")
                   for part_T, name in ((early_T, "first"), (late_T, "last")))
    capacity = f", capacity factor {record.capacity_factor:g}" if record.capacity_factor else ""
    caption = (
        f"Share of choices that found no place, by position in the row of {size:,} tokens; {record.num_tokens:,} "
        f"tokens, dispatch {record.dispatch or 'unknown'}{capacity}. The dashed line is the mean. A rise to the right "
        "means that buffers fill up before the row ends, so that late tokens lose their experts; OpenMoE reports up "
        "to 30 % on text unlike its training data.")
    return Table(columns, caption, (early, dataclasses.replace(late, reference=early.value)))


def draw_drops(table: Table) -> Any:
    ratio_LS, layers, _ = grid(table.columns, "ratio", "layer", "position")
    choices_LS = grid(table.columns, "choices", "layer", "position")[0]
    return drops_by_position(ratio_LS, choices_LS.sum(axis=0), layers.tolist())


def drops_by_source(records: Sequence[RoutingRecord]) -> Table:
    """Drop ratio by source of the text and position in the row (OpenMoE, figure 12), in 16 equal bins of the row.

    Returns:
      Columns layer, domain, position (first of the bin), choices, dropped, ratio.
    """
    record = latest(records, "kept_LTK", "row_positions_T", "domains_T")
    code_T, names = domain_codes(record)
    length = int(record.row_positions_T.max()) + 1
    width = -(-length // BINS)
    bins = -(-length // width)
    cell_T = np.where(code_T >= 0, code_T * bins + record.row_positions_T // width, -1)
    made, dropped = _made_and_dropped(record, cell_T, len(names) * bins)
    layer, domain, place = (index.ravel() for index in np.indices((len(record.layers), len(names), bins)))
    columns = {"layer": np.array(record.layers)[layer], "domain": np.array(names)[domain], "position": place * width,
               "choices": made.ravel(), "dropped": dropped.ravel(), "ratio": ratio(dropped, made).ravel()}
    caption = (
        "Left: share of choices that found no place by domain, one point per layer, the bar is their mean; right: "
        f"the same by position in the row (bins of {width} tokens), all layers; {int((code_T >= 0).sum()):,} tokens. "
        "Grey: all text. Domains that lie above it are routed to few experts, or unlike the text that the router was "
        "balanced on.")
    return Table(columns, caption, (_drop_headline(record, code_T >= 0, "dropped choices, all text"),))


def draw_drops_by_source(table: Table) -> Any:
    sums = {name: _sums(table, name) for name in ("choices", "dropped")}
    domains, layers, positions = (list(dict.fromkeys(table[name].tolist())) for name in ("domain", "layer", "position"))
    figure, (left, right) = panels(2, max(2.8, 0.9 + row_height(len(domains)) * len(domains)))
    ratio_D = 100 * ratio(sums["dropped"].sum(axis=(0, 2)), sums["choices"].sum(axis=(0, 2)))
    ratio_DL = 100 * ratio(sums["dropped"].sum(axis=2), sums["choices"].sum(axis=2)).T
    bars(left, [plain(name) for name in domains], ratio_DL / 100)
    left.set_xlabel("dropped choices (%)")
    ratio_DS = 100 * ratio(sums["dropped"].sum(axis=0), sums["choices"].sum(axis=0))
    named = np.argsort(-ratio_D, kind="stable")[:len(SERIES)]
    for domain in range(len(domains)):
        place = list(named).index(domain) if domain in named else None
        line = {"color": MUTED, "linewidth": 0.7, "zorder": 2} if place is None else {
            "color": SERIES[place], "linewidth": 1.4, "zorder": 3, "label": plain(domains[domain])}
        right.plot(positions, ratio_DS[domain], marker=".", **line)
    mean = 100 * sums["dropped"].sum() / max(sums["choices"].sum(), 1)
    left.axvline(mean, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.3)
    reference_line(right, mean, f"all text {mean:.2g} %")
    right.set(xlabel="position in the row (tokens)", ylabel="dropped choices (%)")
    right.set_ylim(0, 1.35 * max(np.nanmax(ratio_DS), 1.0))
    legend(right, loc="upper left", ncols=2)
    return figure


def drops_by_turn(records: Sequence[RoutingRecord]) -> Table:
    """Drop ratio of conversations of a single turn, and of the turns 1, 2, … of those that have several (OpenMoE:
    the later turns of a conversation lie where buffers are full).

    Returns:
      Columns layer, group, tokens, choices, dropped, ratio.

    Raises:
      MissingArray: no token is in a turn.
    """
    record = latest(records, "kept_LTK", "turns_T", "documents_T")
    code_T, names = turn_codes(record)
    made, dropped = _made_and_dropped(record, code_T, len(names))
    layer, group = (index.ravel() for index in np.indices(made.shape))
    tokens_C = count(code_T, len(names))
    columns = {"layer": np.array(record.layers)[layer], "group": np.array(names)[group], "tokens": tokens_C[group],
               "choices": made.ravel(), "dropped": dropped.ravel(), "ratio": ratio(dropped, made).ravel()}
    several_T = (code_T >= 0) & (np.append(names, "")[code_T] != "single turn")
    parts = {"a single turn": (code_T >= 0) & ~several_T, "several turns": several_T}
    headlines = [_drop_headline(record, part_T, f"dropped choices, conversations of {name}")
                 for name, part_T in parts.items() if part_T.any()]
    headlines[-1] = dataclasses.replace(headlines[-1], reference=headlines[0].value if len(headlines) > 1 else None)
    caption = (
        f"Share of choices that found no place by turn of the conversation; {tokens_C.sum():,} tokens in "
        "conversations. One point per layer, the bar is their mean; the dashed line is the mean of all turns. Bars "
        "that grow from turn to turn mean that buffers fill up before a conversation ends.")
    return Table(columns, caption, tuple(headlines))


def draw_drops_by_turn(table: Table) -> Any:
    ratio_GL, groups, _ = grid(table.columns, "ratio", "group", "layer")
    figure, (axis,) = panels(1, 0.9 + 0.3 * len(groups))
    bars(axis, groups, ratio_GL)
    mean = 100 * table["dropped"].sum() / max(table["choices"].sum(), 1)
    axis.axvline(mean, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.3, label=f"all turns {mean:.2g} %")
    axis.set_xlabel("dropped choices (%)")
    legend_above(figure, axis)
    return figure


def _sums(table: Table, column: str) -> np.ndarray:
    """A column as [L, domains, bins]."""
    sizes = [len(np.unique(table[name])) for name in ("layer", "domain", "position")]
    return table[column].reshape(sizes)


def _made_and_dropped(record: RoutingRecord, code_T: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Choices made by the tokens of each code, and those of them that found no place, int64 ``[L, size]``."""
    counted_T = code_T >= 0
    made, found = (np.stack([np.bincount(code_T[counted_T], (chosen_TK(record, layer, kept)[counted_T] >= 0).sum(axis=1),
                                         minlength=size) for layer in range(len(record.layers))]).astype(np.int64)
                   for kept in (False, True))
    return made, made - found


def _drop_headline(record: RoutingRecord, part_T: np.ndarray, name: str) -> Headline:
    """Dropped choices over made ones in a part of the tokens, all layers."""
    def dropped(layer: int) -> np.ndarray:
        chosen = part_T[:, None] & (record.experts_LTK[layer] >= 0)
        return np.where(chosen, (~record.kept_LTK[layer]).astype(int), -1)  # 0 kept, 1 dropped, -1 not made

    codes = [dropped(layer) for layer in range(len(record.layers))]
    value = np.mean([np.mean(code[code >= 0]) if (code >= 0).any() else np.nan for code in codes])
    return headline(name, value, None, record, codes, 2, lambda counts: ratio(counts[:, 1], counts.sum(axis=1)))
