"""Do domains, turns or other categories of text have experts of their own?

T recorded tokens, L MoE layers, E experts, C categories. See docs/analysis.md for how to read the figures.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse

from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.report_figures import MUTED, domains_by_expert, panel_title, plain
from moe_jax.analysis.routing_counts import (
    chosen_TK, count, counts_LCE, domain_codes, drop_note, headline, pair_codes, ratios, uniform_std, variation)
from moe_jax.analysis.routing_figures import bars, grid, legend_above, panels, row_height, row_names, share_bounds, shown, strips
from moe_jax.analysis.tables import Headline, MissingArray, Table, latest

MOST_TURNS = 8


# OpenMoE: routing ratio by category.


def routing_by_category(record: RoutingRecord, code_T: np.ndarray, names: Sequence[str], kind: str = "category") -> Table:
    """Routing ratio (OpenMoE, figures 5 to 8): of the dispatched choices of a category's tokens, the share that goes to each
    expert, N_{c,e} / Σ_e N_{c,e}. A choice that found no place is not dispatched.

    Args:
      code_T: category of each token, index into `names`; -1 = none.
      kind: what a category is, in one word.

    Returns:
      Columns layer, <kind>, expert, choices, ratio, uniform_std (the spread of `ratio` over experts that uniform routing of
      so many choices would show).
    """
    counts = counts_LCE(record, code_T, len(names), dispatched=True)
    ratio = ratios(counts)
    noise_LC = uniform_std(record, code_T, len(names), dispatched=True)
    layer, category, expert = _indices(counts.shape)
    columns = {"layer": np.array(record.layers)[layer], kind: np.array(names)[category], "expert": expert,
               "choices": counts.ravel(), "ratio": ratio.ravel(),
               "uniform_std": np.repeat(noise_LC.ravel(), record.num_experts)}
    tokens_C = count(code_T, len(names))
    caption = (
        f"Share of each {kind}'s dispatched choices that goes to each expert, relative to the fair share "
        f"1/{record.num_experts} (1.0, white); {tokens_C.sum():,} tokens, {tokens_C.min():,} to {tokens_C.max():,} "
        f"per {kind}. Specialisation: rows of a layer differ from each other by more than uniform routing of so few "
        f"tokens would (± {record.num_experts * np.nanmedian(noise_LC):.2f} in these units). Rows that are alike, "
        f"even if unequal, are an imbalance that all text shares.{drop_note(record)}")
    return Table(columns, caption, (variation_headline(record, code_T, len(names), kind),), {"kind": kind})


def routing_by_domain(records: Sequence[RoutingRecord]) -> Table:
    """:func:`routing_by_category` for the domains of the record: topics, programming or natural languages, tasks."""
    record = latest(records, "domains_T")
    return routing_by_category(record, *domain_codes(record), kind="domain")


def draw_routing_by_category(table: Table) -> Any:
    kind, layers = table.facts["kind"], shown(table["layer"])
    found = [grid(table.where(layer=layer), "ratio", kind, "expert") for layer in layers]
    return domains_by_expert(np.stack([matrix for matrix, *_ in found], axis=1), found[0][1].tolist(), layers, kind)


def _indices(shape: tuple[int, ...]) -> list[np.ndarray]:
    return [index.ravel() for index in np.indices(shape)]


# OLMoE: domain specialisation.


def domain_specialisation(records: Sequence[RoutingRecord]) -> Table:
    """Domain specialisation of expert i on domain D (OLMoE): N_{i,D} / N_D, the share of the domain's tokens for
    which i is among the chosen; k/E if routing were uniform. Counts choices whether or not they found a place.

    Returns:
      Columns layer, domain, tokens, expert, share, uniform (k/E), uniform_std.
    """
    record = latest(records, "domains_T")
    code_T, names = domain_codes(record)
    counts, tokens_C = counts_LCE(record, code_T, len(names)), count(code_T, len(names))
    layer, domain, expert = _indices(counts.shape)
    made_LC = counts.sum(axis=-1) / tokens_C  # choices per token: K, unless tokens may choose fewer
    noise_LC = uniform_std(record, code_T, len(names)) * made_LC
    uniform = made_LC / record.num_experts
    columns = {"layer": np.array(record.layers)[layer], "domain": np.array(names)[domain], "tokens": tokens_C[domain],
               "expert": expert, "share": (counts / tokens_C[:, None]).ravel(),
               "uniform": uniform[layer, domain], "uniform_std": noise_LC[layer, domain]}
    per_token = made_LC.mean()

    def statistic(counts_RCE: np.ndarray) -> np.ndarray:
        return per_token * np.nanmean(ratios(counts_RCE).max(axis=-1), axis=-1)

    top = _category_headline("share of a domain's tokens that choose its favourite expert, mean over domains and layers",
                             record, code_T, len(names), False, statistic)
    caption = (
        f"For each domain one point per expert: the share of the domain's {tokens_C.min():,} to {tokens_C.max():,} "
        f"tokens ({tokens_C.sum():,} in all) that choose the expert; the largest has a ring. The line is k/E = "
        f"{100 * uniform.mean():.3g} %, uniform routing; the band is ± 2 standard deviations of it for the smallest "
        "domain. Specialisation: experts far above the line for one domain and not for the others.")
    return Table(columns, caption, (top,))


def draw_domain_specialisation(table: Table) -> Any:
    layers = shown(table["layer"])
    domains = len(np.unique(table["domain"]))
    figure, axes = panels(len(layers), 0.75 + row_height(domains) * domains, sharex=True, sharey=True)
    for index, (axis, layer) in enumerate(zip(axes, layers)):
        rows = table.where(layer=layer)
        share_CE, names, _ = grid(rows, "share", "domain", "expert")
        strips(axis, range(len(names)), 100 * share_CE)
        middle, noise = 100 * rows["uniform"].mean(), 100 * rows["uniform_std"].max()
        axis.axvspan(middle - 2 * noise, middle + 2 * noise, color=MUTED, alpha=0.18, linewidth=0)
        axis.axvline(middle, color=MUTED, linestyle=(0, (5, 3)), linewidth=1.3)
        row_names(axis, [plain(name) for name in names], "domain" if index % 2 == 0 else "")
        axis.set_xlabel("tokens that choose the expert (%)")
        share_bounds(axis, 100 * table["share"])
        panel_title(axis, f"layer {layer}")
    return figure


# OpenMoE: single- and multi-turn.


def routing_by_turn(records: Sequence[RoutingRecord]) -> Table:
    """Routing of conversations of a single turn, and of the turns 1, 2, … of those that have several (OpenMoE: multi-turn conversations).

    `distance` is the total variation distance of a group's routing ratio (over dispatched choices) from that of all groups
    together; `uniform_distance` what uniform routing of so many choices would show: the mean of E normal deviations,
    E·σ·√(2/π)/2, less what the group itself has in all groups, √(1 - n_g/n).

    Returns:
      Columns layer, group, tokens, distance, uniform_distance.

    Raises:
      MissingArray: no token is in a turn.
    """
    record = latest(records, "turns_T", "documents_T")
    code_T, names = turn_codes(record)
    size, tokens_C = len(names), count(code_T, len(names))
    went = counts_LCE(record, code_T, size, dispatched=True)
    layer, group = _indices(went.shape[:2])
    alone_LC = np.sqrt(1 - went.sum(axis=-1) / np.maximum(went.sum(axis=(1, 2)), 1)[:, None])
    noise_LC = uniform_std(record, code_T, size, dispatched=True) * record.num_experts * np.sqrt(2 / np.pi) / 2 * alone_LC
    columns = {"layer": np.array(record.layers)[layer], "group": np.array(names)[group], "tokens": tokens_C[group],
               "distance": variation(ratios(went), ratios(went.sum(axis=1))[:, None]).ravel(),
               "uniform_distance": noise_LC.ravel()}
    caption = (
        "How far each turn's routing lies from that of all turns (total variation distance: the share of choices "
        f"that would have to go elsewhere); {tokens_C.sum():,} tokens in conversations. One point per layer, the bar "
        "is their mean. Grey marks: uniform routing of so few tokens. Specialisation: distances well above the marks "
        f"and above the reference, which has the noise of documents.{drop_note(record)}")
    return Table(columns, caption, (variation_headline(record, code_T, size, "turn"),))


def turn_codes(record: RoutingRecord) -> tuple[np.ndarray, list[str]]:
    """Groups of tokens by turn: codes ``[T]`` (-1: in no conversation) and names of those that there are.

    Raises:
      MissingArray: no token is in a turn.
    """
    turns_T = record.turns_T
    if not (turns_T > 0).any():
        raise MissingArray("The record holds no turns; record conversations (docs/analysis.md tells how)")
    number_T = np.unique(record.documents_T, return_inverse=True)[1]
    last_D = np.zeros(number_T.max() + 1, int)
    np.maximum.at(last_D, number_T, turns_T)
    code_T = np.where(turns_T < 1, -1, np.where(last_D[number_T] == 1, 0, np.minimum(turns_T, MOST_TURNS)))
    names = ["single turn", *(f"turn {turn}" for turn in range(1, MOST_TURNS)), f"turn {MOST_TURNS} and later"]
    present = np.unique(code_T[code_T >= 0])
    renumber = np.full(len(names) + 1, -1)
    renumber[present] = np.arange(len(present))
    return renumber[code_T], [names[code] for code in present]


def draw_routing_by_turn(table: Table) -> Any:
    distance_GL, groups, _ = grid(table.columns, "distance", "group", "layer")
    uniform_G = grid(table.columns, "uniform_distance", "group", "layer")[0].mean(axis=1)
    figure, (axis,) = panels(1, 0.9 + 0.3 * len(groups))
    bars(axis, groups, distance_GL)
    axis.plot(100 * uniform_G, range(len(groups)), "|", color=MUTED, markersize=14, markeredgewidth=2, label="uniform routing")
    axis.set_xlabel("distance from all turns (% of choices)")
    legend_above(figure, axis)
    return figure


# How far categories lie apart.


def variation_headline(record: RoutingRecord, code_T: np.ndarray, size: int, kind: str) -> Headline:
    """Mean over categories and layers of the total variation distance between a category's routing ratio and that of all.
    The reference: :func:`without_link`."""

    def statistic(counts_RCE: np.ndarray) -> np.ndarray:
        whole_R1E = ratios(counts_RCE.sum(axis=1))[:, None]
        return np.nanmean(variation(ratios(counts_RCE), whole_R1E), axis=-1)

    name = f"distance of a {kind}'s routing from that of all, share of choices; mean over {kind}s and layers"
    return _category_headline(name, record, code_T, size, True, statistic)


def _category_headline(name: str, record: RoutingRecord, code_T: np.ndarray, size: int, dispatched: bool,
                       statistic: Callable[[np.ndarray], np.ndarray]) -> Headline:
    """`statistic`: counts ``[R, C, E]`` -> ``[R]``; averaged over layers."""
    experts = record.num_experts
    codes = [pair_codes(code_T, chosen_TK(record, layer, dispatched), experts) for layer in range(len(record.layers))]
    value = np.mean([statistic(count(code, size * experts).reshape(1, size, experts))[0] for code in codes])
    reference = without_link(record, code_T, size, dispatched, statistic)
    return headline(name, value, reference, record, codes, size * experts,
                    lambda counts: statistic(counts.reshape(-1, size, experts)))


def without_link(record: RoutingRecord, code_T: np.ndarray, size: int, dispatched: bool,
                 statistic: Callable[[np.ndarray], np.ndarray], times: int = 100, seed: int = 0) -> float | None:
    """What a statistic would be, mean over layers, if category and routing had nothing to do with each other.

    Every category is given the routing ratio of all of them, and the noise that its documents really have: the deviation
    of each of its documents from the category's own ratio, with one random sign for each document (the wild bootstrap of
    Wu 1986, for documents of unequal length). Documents of a category differ by more than their tokens' number explains,
    so this is more than the noise of uniform routing. Categories of a single document are left out; None if fewer than two
    others are left.
    """
    if record.documents_T is None:
        return None
    counted_T = code_T >= 0
    document_T = np.unique(record.documents_T, return_inverse=True)[1]
    parts, part_T = np.unique(document_T[counted_T] * size + code_T[counted_T], return_inverse=True)
    label_U = parts % size
    documents_C = np.bincount(label_U, minlength=size)
    several_C = documents_C > 1
    if several_C.sum() < 2:
        return None
    sign_RU = np.random.default_rng(seed).choice([-1.0, 1.0], (times, document_T.max() + 1))[:, parts // size]
    place_RU = label_U + size * np.arange(times)[:, None]
    signs = scipy.sparse.coo_array((sign_RU.ravel(), (place_RU.ravel(), np.tile(np.arange(len(parts)), times))),
                                   shape=(times * size, len(parts))).tocsr()
    grow_C = np.sqrt(documents_C / np.maximum(documents_C - 1, 1))  # deviations from a mean that was fitted to them
    found = []
    for layer in range(len(record.layers)):
        codes = pair_codes(part_T, chosen_TK(record, layer, dispatched)[counted_T], record.num_experts)
        counts_UE = count(codes, len(parts) * record.num_experts).reshape(len(parts), record.num_experts)
        total_CE = np.zeros((size, record.num_experts))
        for category in np.flatnonzero(several_C):
            total_CE[category] = counts_UE[label_U == category].sum(axis=0)
        own_UE = np.nan_to_num(ratios(total_CE))[label_U] * counts_UE.sum(axis=1, keepdims=True)
        noise_RCE = (signs @ ((counts_UE - own_UE) * grow_C[label_U, None])).reshape(times, size, -1)
        alike_CE = total_CE.sum(axis=1, keepdims=True) * ratios(total_CE.sum(axis=0))
        found.append(np.mean(statistic((alike_CE + noise_RCE)[:, several_C])))
    return float(np.mean(found))
