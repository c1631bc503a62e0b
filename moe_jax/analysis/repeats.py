"""Do consecutive tokens go to the same expert? Mixtral's table 5."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.analysis.over_training import overlap
from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.report_figures import INK, MUTED, TRAIN, plain
from moe_jax.analysis.routing_counts import chosen_TK, count, domain_codes, follows_T, headline
from moe_jax.analysis.routing_figures import SERIES, grid, legend_above, panels, shown
from moe_jax.analysis.tables import Headline, MissingArray, Table, latest


def repeated_choices(records: Sequence[RoutingRecord]) -> Table:
    """How often consecutive tokens of a document share an expert (Mixtral, table 5): `first`, the share of pairs whose first
    choices are equal (random: 1/E), and `any`, the share of pairs with any expert in common (random: 1 - C(E-k, k) / C(E, k);
    for two choices this is the paper's "first or second choice", 1 - 6/8 · 5/7 = 46 % for 8 experts).

    Choices count whether or not they found a place. Where tokens have different numbers of experts, or none, `random` is the
    mean over the pairs that there are.

    Returns:
      Columns layer, domain ("all" first), pairs, first, any, first_random, any_random, first_independent (Σ_e p_e², p_e the
      share of tokens whose first choice is e: what the load alone gives).

    Raises:
      MissingArray: no two tokens are consecutive.
    """
    record = latest(records, "documents_T", "positions_T")
    before_N, after_N = consecutive(record)
    code_T, domains = _domains(record)
    groups = [("all", np.ones(len(before_N), bool))] + [(name, code_T[before_N] == code) for code, name in enumerate(domains)]
    sizes = range(record.experts_per_token + 1)
    random_KK = np.array([[random_overlap(record.num_experts, own, other) for other in sizes] for own in sizes])
    rows, codes = [], {"first": [], "any": []}
    for layer, number in enumerate(record.layers):
        chosen = chosen_TK(record, layer)
        same_N, shared_N = repeats(chosen[before_N], chosen[after_N])
        independent = float(np.sum((count(chosen[:, 0], record.num_experts) / record.num_tokens) ** 2))
        before_size_N, after_size_N = ((chosen[part_N] >= 0).sum(axis=1) for part_N in (before_N, after_N))
        random_N = random_KK[before_size_N, after_size_N]
        first_random_N = ((before_size_N > 0) & (after_size_N > 0)) / record.num_experts
        for name, hits_N in (("first", same_N), ("any", shared_N)):
            code = np.full(record.num_tokens, -1)
            code[before_N] = hits_N
            codes[name].append(code)
        for name, of_N in groups:
            shares = [value_N[of_N].mean() if of_N.any() else np.nan for value_N in (same_N, shared_N, first_random_N, random_N)]
            rows.append((number, name, of_N.sum(), *shares, independent))
    names = ("layer", "domain", "pairs", "first", "any", "first_random", "any_random", "first_independent")
    columns = dict(zip(names, map(np.array, zip(*rows))))
    everything = columns["domain"] == "all"
    random = {name: columns[f"{name}_random"][everything].mean() for name in codes}
    headlines = [_headline(record, codes[name], columns[name][everything], random[name], name) for name in codes]
    caption = (
        f"Share of {len(before_N):,} pairs of consecutive tokens of a document with the same first choice (left) and "
        f"with any chosen expert in common (right). Dashed: random, {100 * random['first']:.3g} % and "
        f"{100 * random['any']:.3g} %; dotted: independent choices with the measured load. Well above them means that text "
        "stays with its experts from token to token (good for caching, bad for expert parallelism). Mixtral finds "
        "about 14 % in its first layer and 20 to 28 % in later ones, where 12.5 % are random.")
    return Table(columns, caption, tuple(headlines))


def consecutive(record: RoutingRecord) -> tuple[np.ndarray, np.ndarray]:
    """Indices of tokens and of the token after each, for all neighbours in a document, ``[N]`` each.

    Raises:
      MissingArray: there are none.
    """
    after_N = np.flatnonzero(follows_T(record))
    if not len(after_N):
        raise MissingArray("The record holds no two consecutive tokens of a document; record text in reading order")
    return after_N - 1, after_N


def repeats(a_NK: np.ndarray, b_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether first choices are equal, and whether any expert is in both sets, bool ``[N]``; nowhere equals nothing."""
    return (a_NK[:, 0] == b_NK[:, 0]) & (a_NK[:, 0] >= 0), overlap(a_NK, b_NK)[0] > 0


def random_overlap(experts: int, choices: int, others: int | None = None) -> float:
    """Probability that two random sets, of k and m (default: k) of E experts, have one in common: 1 - C(E-k, m) / C(E, m)."""
    others = choices if others is None else others
    return 1 - math.comb(experts - choices, others) / math.comb(experts, others)


def _domains(record: RoutingRecord) -> tuple[np.ndarray, Sequence[str]]:
    try:
        return domain_codes(record)
    except MissingArray:  # not needed here
        return np.full(record.num_tokens, -1), ()


def _headline(record: RoutingRecord, codes: list[np.ndarray], value_L: np.ndarray, reference: float, name: str) -> Headline:
    words = {"first": "the same first choice", "any": "any expert in common"}[name]
    return headline(f"consecutive tokens with {words}, mean over layers", value_L.mean(), reference, record, codes, 2,
                    lambda counts: counts[:, 1] / counts.sum(axis=1))


def draw_repeated_choices(table: Table) -> Any:
    figure, axes = panels(2, 3.4)
    domains = list(dict.fromkeys(table["domain"].tolist()))[1:]
    labels = {"first": "same first choice (% of pairs)", "any": "any expert in common (% of pairs)"}
    for axis, (column, label) in zip(axes, labels.items()):
        value_DL, names, layers = grid(table.columns, column, "domain", "layer")
        for index, (name, value_L) in enumerate(zip(names, 100 * value_DL)):
            line = {"color": TRAIN, "markersize": 5, "linewidth": 2.2, "zorder": 4, "label": "all text"}
            if index:
                named = index < len(SERIES)
                line = {"color": SERIES[index] if named else MUTED, "markersize": 3, "linewidth": 1.0, "zorder": 3 if named else 2,
                        "label": plain(name) if named and len(domains) > 1 else None}
            axis.plot(layers, value_L, marker="o", **line)
        random = 100 * grid(table.columns, f"{column}_random", "domain", "layer")[0][0].mean()
        axis.axhline(random, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.3, label="random")
        if column == "first":
            load_L = 100 * grid(table.columns, "first_independent", "domain", "layer")[0][0]
            axis.plot(layers, load_L, color=INK, linestyle=":", label="independent, this load")
        axis.set(xlabel="layer", ylabel=label)
        axis.set_ylim(0, min(104, 1.1 * max(100 * np.nanmax(table[column]), random)))
        axis.set_xticks(layers if len(layers) <= 10 else shown(layers, 6))
    legend_above(figure, *axes)
    return figure
