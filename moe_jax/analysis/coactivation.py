"""Which experts are chosen together: OLMoE's co-activation, within a layer and from one MoE layer to the next."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.analysis.bootstrap import interval_around, resamples
from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.report_figures import INK, panel_title
from moe_jax.analysis.routing_counts import chosen_TK, count, ratio, ratios
from moe_jax.analysis.routing_figures import panels, shown
from moe_jax.analysis.tables import Headline, MissingArray, Table, latest

_BLOCKS = 128  # of documents, which are resampled
_SAMPLES = 100


def coactivation(records: Sequence[RoutingRecord]) -> Table:
    """Co-activation of experts i and j of a layer (OLMoE): N_ij / N_i, of the tokens that choose i the share that
    choose j too. All pairs of a token's experts are counted; OLMoE's own code counts pairs that are adjacent in rank only.

    Returns:
      Columns layer, expert, other, together (N_ij), ratio (NaN if nobody chooses i), uniform ((k-1)/(E-1): uniform sets;
      where tokens have different numbers of experts, k - 1 is how many others those of an expert have on average).

    Raises:
      MissingArray: every token chooses one expert.
    """
    record = latest(records)
    if record.experts_per_token < 2:
        raise MissingArray("Every token chooses one expert, so that no two are chosen together; needs moe.experts_per_token "
                           "of 2 or more")
    pairs = [(layer, layer) for layer in range(len(record.layers))]
    return _table(record, pairs, "of the same layer")


def coactivation_across_layers(records: Sequence[RoutingRecord]) -> Table:
    """:func:`coactivation` of expert i of a layer with expert j of the next MoE layer: N_ij / N_i, of the tokens that choose
    i the share that choose j there. Uniform: k/E.

    Raises:
      MissingArray: the record has one layer.
    """
    record = latest(records)
    if len(record.layers) < 2:
        raise MissingArray("The record has one MoE layer; needs two or more")
    pairs = [(layer, layer + 1) for layer in range(len(record.layers) - 1)]
    return _table(record, pairs, "of the next MoE layer")


def _table(record: RoutingRecord, pairs: list[tuple[int, int]], where: str) -> Table:
    experts, rows, partners, closest = record.num_experts, [], [], []
    within = pairs[0][0] == pairs[0][1]
    block_T, random = _blocks(record), np.random.default_rng(0)
    one, other = (index.ravel() for index in np.indices((experts, experts)))
    kept = one != other if within else np.ones(len(one), bool)
    for first, second in pairs:
        a_TK, b_TK = chosen_TK(record, first), chosen_TK(record, second)
        pairs_BEE = pair_counts(a_TK, b_TK, experts, block_T)
        unlinked_1EE = pair_counts(*_unlinked(a_TK, b_TK, within, random), experts)
        together, chosen = pairs_BEE.sum(axis=0).ravel()[kept], count(a_TK, experts)[one[kept]]
        partners.append(_partners(a_TK, b_TK, within))
        # One layer at a time: the blocks of all layers of a large model would take many gigabytes.
        closest.append([partners[-1] * found_R for found_R in _closest(pairs_BEE, unlinked_1EE, within)])
        rows.append((np.full(len(chosen), record.layers[first]), one[kept], other[kept], together, ratio(together, chosen),
                     np.full(len(chosen), partners[-1] / (experts - within))))
    columns = dict(zip(("layer", "expert", "other", "together", "ratio", "uniform"), map(np.concatenate, zip(*rows))))
    name = f"share of an expert's tokens that its closest expert {where} has too, mean over experts and layers"
    value_1, reference_1, found_R = (np.mean(each, axis=0) for each in zip(*closest))
    value = Headline(name, float(value_1[0]), float(reference_1[0]), *map(float, interval_around(value_1[0], found_R)))
    caption = (
        f"Of the tokens that choose an expert (row) the share that also choose each expert {where} (column); "
        f"{record.num_tokens:,} tokens. White: {100 * columns['uniform'].mean():.3g} %, uniform routing; a row adds up to "
        f"{100 * np.mean(partners):.0f} %. Specialisation: single dark cells, experts that work together. A red column is "
        "an expert that all tokens choose often.")
    return Table(columns, caption, (value,), {"across": not within})


def pair_counts(a_TK: np.ndarray, b_TK: np.ndarray, experts: int, block_T: np.ndarray | None = None) -> np.ndarray:
    """How many tokens choose expert i in `a_TK` and j in `b_TK`, for each block of tokens, int64 ``[blocks, E, E]``."""
    blocks = 1 if block_T is None else int(block_T.max()) + 1
    start_T = 0 if block_T is None else block_T * experts**2
    sums = np.zeros(blocks * experts**2, np.int64)
    for a_T in a_TK.T:
        for b_T in b_TK.T:
            sums += count(np.where((a_T >= 0) & (b_T >= 0), start_T + a_T * experts + b_T, -1), len(sums))
    return sums.reshape(blocks, experts, experts)


def _partners(a_TK: np.ndarray, b_TK: np.ndarray, within: bool) -> float:
    """How many experts in `b_TK`, other than itself, an expert's tokens in `a_TK` have on average: what a row adds up to."""
    own_T, other_T = ((experts_TK >= 0).sum(axis=1) for experts_TK in (a_TK, b_TK))
    return float(own_T @ (other_T - within) / max(own_T.sum(), 1))


def _blocks(record: RoutingRecord) -> np.ndarray:
    """A block of documents for each token, 0, 1, … ``[T]``."""
    if record.documents_T is None:
        return np.zeros(record.num_tokens, int)
    return np.unique(record.documents_T, return_inverse=True)[1] % _BLOCKS


def _unlinked(a_TK: np.ndarray, b_TK: np.ndarray, within: bool, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The same choices dealt out anew among the tokens: the other layer's sets, or within a layer each rank by itself."""
    if not within:
        return a_TK, b_TK[random.permutation(len(b_TK))]
    dealt_TK = np.stack([random.permutation(a_T) for a_T in a_TK.T], axis=1)
    return dealt_TK, dealt_TK


def _closest(pairs_BEE: np.ndarray, unlinked_1EE: np.ndarray, within: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest share of a row of pairs, mean over rows: of all blocks ``[1]``, of unlinked choices ``[1]``, and of resamples
    of the blocks ``[R]``, NaN where there is one block."""
    def closest(pairs_REE: np.ndarray) -> np.ndarray:
        others_REE = pairs_REE * ~np.eye(pairs_REE.shape[-1], dtype=bool) if within else pairs_REE
        return np.nanmean(ratios(others_REE).max(axis=-1), axis=1)

    known = len(pairs_BEE) > 1
    found_R = resamples([pairs_BEE.astype(np.float64)], closest, _SAMPLES) if known else np.full(_SAMPLES, np.nan)
    return closest(pairs_BEE.sum(axis=0, keepdims=True)), closest(unlinked_1EE), found_R


def draw_coactivation(table: Table) -> Any:
    from matplotlib.colors import TwoSlopeNorm

    layers = shown(table["layer"])
    experts, uniform = len(np.unique(table["expert"])), max(100 * table["uniform"].mean(), 1e-6)
    figure, axes = panels(len(layers), 3.6, sharex=True, sharey=True)
    highest = max(100 * float(np.nanmax(table["ratio"])), 1.5 * uniform)
    norm = TwoSlopeNorm(vcenter=uniform, vmin=0.0, vmax=highest)
    for axis, layer in zip(axes, layers):
        rows = table.where(layer=layer)
        ratio_EE = np.full((experts, experts), np.nan)
        ratio_EE[rows["expert"], rows["other"]] = 100 * rows["ratio"]
        axis.grid(False)
        axis.set_facecolor("#c9ced6")  # an expert with itself, or that nobody chooses
        image = axis.imshow(ratio_EE, cmap="RdBu_r", norm=norm, interpolation="nearest", aspect="auto")
        if experts <= 8:
            for (row, column), value in np.ndenumerate(ratio_EE):
                if np.isfinite(value):
                    axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7.5,
                              color="white" if abs(norm(value) - 0.5) > 0.3 else INK)
        for side in (axis.xaxis, axis.yaxis):
            side.get_major_locator().set_params(integer=True)
        across = f"layer {layer} (rows) and the next MoE layer (columns)" if table.facts["across"] else f"layer {layer}"
        panel_title(axis, across)
        axis.set(xlabel="other expert", ylabel="expert")
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=40)
    bar.set_label("tokens that choose both (% of the row's expert)", fontsize=9, color=INK)
    bar.set_ticks([0, uniform / 2, uniform, (uniform + highest) / 2, highest])
    bar.ax.yaxis.set_major_formatter("{x:.3g}")
    bar.outline.set_visible(False)
    return figure
