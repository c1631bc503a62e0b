"""Which experts come next? Predictors of a token's experts, fitted on one half of the documents and tested on the other.

Systems that keep experts in slow memory fetch them ahead of time (HOBBIT, AdapMoE, ProMoE, Fate, …). A predictor gives
every expert of a layer a score; the best n are fetched. Recall@n is the share of the token's experts among them.

N tokens asked about, of T recorded; L MoE layers, E experts, K choices per token; D documents, Q predictors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from moe_jax.analysis.bootstrap import Interval, bootstrap, mean_over_documents
from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.routing_counts import choices_per_token, chosen_TK, common_experts, count, follows_T, pair_codes, ratio
from moe_jax.analysis.tables import Headline, MissingArray, Table, latest

MOST_TESTED = 1 << 17  # tokens that predictions are tested on; more would change the fourth digit
_AT_ONCE = 1 << 15  # tokens whose scores of all experts are held at once
_TIE = 1e-9  # what popularity adds to a score: it decides between equals only


def membership(experts_NK: np.ndarray, num_experts: int) -> np.ndarray:
    """1 where the expert is one of the token's, fp32 ``[N, E]``."""
    return _spread(experts_NK, np.ones(experts_NK.shape[1], np.float32), num_experts)


def _spread(experts_NK: np.ndarray, value_K: np.ndarray, num_experts: int) -> np.ndarray:
    """``[N, E]``: the value of the choice where the token has the expert, 0 elsewhere; nowhere (-1) is left out."""
    value_NE = np.zeros((len(experts_NK), num_experts), np.float32)
    row_A, choice_A = np.nonzero(experts_NK >= 0)
    value_NE[row_A, experts_NK[row_A, choice_A]] = value_K[choice_A]
    return value_NE


def first_half(documents_T: np.ndarray, seed: int = 0) -> np.ndarray:
    """True for the tokens of documents drawn at random until they have half of all tokens, ``[T]``."""
    numbers, document_T, tokens_D = np.unique(documents_T, return_inverse=True, return_counts=True)
    order_D = np.random.default_rng(seed).permutation(len(numbers))
    before_D = np.cumsum(tokens_D[order_D]) - tokens_D[order_D]
    drawn_D = np.zeros(len(numbers), bool)
    drawn_D[order_D[before_D < len(document_T) / 2]] = True
    return drawn_D[document_T]


# Predictors.


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What predictors learn from the tokens that they are fitted on.

    Attributes:
      popularity_LE: share of the tokens that choose the expert.
      transition_LEE: ``[l, i, j]``: share of the tokens with expert i in layer l - 1 that choose j in layer l; 0 for l = 0.
    """

    popularity_LE: np.ndarray
    transition_LEE: np.ndarray


def fit(record: RoutingRecord, chosen_T: np.ndarray) -> Fitted:
    """Fits the predictors on the chosen tokens (bool ``[T]``)."""
    layers, experts = len(record.layers), record.num_experts
    times_LE, pairs_LEE = np.zeros((layers, experts)), np.zeros((layers, experts, experts))
    before_NK = np.zeros((np.count_nonzero(chosen_T), 0), np.int64)  # nothing comes before the first layer
    for layer in range(layers):
        experts_NK = chosen_TK(record, layer)[chosen_T]
        times_LE[layer] = count(experts_NK, experts)
        for before_N in before_NK.T:
            pairs_LEE[layer] += count(pair_codes(before_N, experts_NK, experts), experts**2).reshape(experts, experts)
        before_NK = experts_NK
    before_LE1 = np.roll(times_LE, 1, axis=0)[:, :, None]
    transition_LEE = np.divide(pairs_LEE, before_LE1, out=np.zeros_like(pairs_LEE), where=before_LE1 > 0)
    return Fitted(times_LE / max(np.count_nonzero(chosen_T), 1), transition_LEE)


def _popularity(fitted: Fitted, record: RoutingRecord, layer: int, tokens_N: np.ndarray) -> np.ndarray:
    return np.broadcast_to(fitted.popularity_LE[layer], (len(tokens_N), record.num_experts))


def _transition(fitted: Fitted, record: RoutingRecord, layer: int, tokens_N: np.ndarray) -> np.ndarray:
    return membership(record.experts_LTK[layer - 1][tokens_N], record.num_experts) @ fitted.transition_LEE[layer]


def _previous_token(fitted: Fitted, record: RoutingRecord, layer: int, tokens_N: np.ndarray) -> np.ndarray:
    before_NK = np.where(follows_T(record)[tokens_N, None], record.experts_LTK[layer][tokens_N - 1], -1)
    return _by_rank(before_NK, record.num_experts)


def _next_layer_router(fitted: Fitted, record: RoutingRecord, layer: int, tokens_N: np.ndarray) -> np.ndarray:
    return _by_rank(record.next_experts_LTK[layer - 1][tokens_N], record.num_experts)


def _by_rank(experts_NK: np.ndarray, num_experts: int) -> np.ndarray:
    """Scores K, K - 1, … of a list of experts, best first; 0 of all others."""
    return _spread(experts_NK, np.arange(experts_NK.shape[1], 0, -1, dtype=np.float32), num_experts)


# name -> (fitted, record, layer ≥ 1, tokens [N]) -> scores [N, E] of the experts of that layer. The four do not know the
# token's experts in it: popularity knows nothing of the token; the transition table its experts in the layer before (score:
# sum over them of P(j | i)); the previous token its predecessor's experts; the last what this layer's router makes of the
# hidden state that enters the router before it (residual similarity).
PREDICTORS: dict[str, Callable] = {
    "popularity": _popularity,
    "previous token": _previous_token,
    "transition": _transition,
    "next-layer router": _next_layer_router,
}


def available(record: RoutingRecord) -> list[str]:
    """The predictors that the record has the arrays for."""
    return [name for name in PREDICTORS if name != "next-layer router" or record.next_experts_LTK is not None]


def scores(name: str, fitted: Fitted, record: RoutingRecord, layer: int, tokens_N: np.ndarray) -> np.ndarray:
    """Scores of the experts of a layer, fp64 ``[N, E]``, no two of a token alike: popularity decides between equals."""
    order_E = np.argsort(-fitted.popularity_LE[layer], kind="stable")
    tie_E = np.empty(record.num_experts)
    tie_E[order_E] = _TIE * np.arange(record.num_experts, 0, -1)
    return PREDICTORS[name](fitted, record, layer, tokens_N) + tie_E


def ranks(name: str, fitted: Fitted, record: RoutingRecord, layer: int, tokens_N: np.ndarray) -> np.ndarray:
    """Where each of the token's experts stands in the prediction (0: first), int32 ``[N, K]``; E where it has none."""
    rank_NK = np.full((len(tokens_N), record.experts_per_token), record.num_experts, np.int32)
    for start in range(0, len(tokens_N), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        score_NE = scores(name, fitted, record, layer, tokens_N[part])
        true_NK = record.experts_LTK[layer][tokens_N[part]]
        for choice in range(true_NK.shape[1]):
            true_N1 = true_NK[:, choice, None].astype(np.int64)
            own_N1 = np.take_along_axis(score_NE, np.maximum(true_N1, 0), axis=1)
            above_N = (score_NE > own_N1).sum(axis=1)
            rank_NK[part, choice] = np.where(true_N1[:, 0] >= 0, above_N, record.num_experts)
    return rank_NK


def tested_tokens(record: RoutingRecord, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(tokens to fit on, bool ``[T]``; tokens to test on, ``[N]``: of the other half, with a token before in the document,
    ``MOST_TESTED`` at most).

    Raises:
      MissingArray: fewer than two documents or two layers, or nothing left to test on.
    """
    record = latest([record], "documents_T")
    if len(record.layers) < 2:
        raise MissingArray("Prediction from layer to layer needs two MoE layers; the record has one")
    fitted_T = first_half(record.documents_T, seed)
    tested_N = np.flatnonzero(~fitted_T & follows_T(record))[:MOST_TESTED]
    if not len(tested_N):
        raise MissingArray("No document is left to test predictions on; record two or more, of several tokens each")
    return fitted_T, tested_N


def usual_choices(record: RoutingRecord) -> int:
    """K; the mean, rounded, where tokens have different numbers of experts."""
    return min(max(1, round(choices_per_token(record))), record.num_experts)


def prefetch_counts(record: RoutingRecord) -> list[int]:
    """How many experts are fetched: K (:func:`usual_choices`), K + 1, 2K and some up to E."""
    most, least = record.num_experts, usual_choices(record)
    spread = np.geomspace(least, most, 7).round().astype(int).tolist()
    return sorted({min(size, most) for size in (least, least + 1, 2 * least, *spread)})


def random_exact(num_experts: int, experts_per_token: int, prefetched: int) -> float:
    """Chance that n experts drawn at random hold all K: C(E - K, n - K) / C(E, n)."""
    if prefetched < experts_per_token:
        return 0.0
    return math.comb(num_experts - experts_per_token, prefetched - experts_per_token) / math.comb(num_experts, prefetched)


# Analyses: records -> Table.


_MEASURES = ("recall", "exact", "half", "top_1")


def _measured(rank_NK: np.ndarray, counts: Sequence[int], num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """(recall, exact set, half or more, first expert first: ``[N, counts, 4]``; whether the token has experts, ``[N]``)."""
    known_NK = rank_NK < num_experts
    known_N = known_NK.sum(axis=1)
    found_NM = np.stack([(rank_NK < most).sum(axis=1, where=known_NK) for most in counts], axis=1)
    recall_NM = found_NM / np.maximum(known_N, 1)[:, None]
    first_NM = np.broadcast_to((rank_NK[:, :1] == 0), recall_NM.shape)
    values_NM4 = np.stack([recall_NM, recall_NM == 1, recall_NM >= 0.5, first_NM], axis=2)
    return values_NM4 * (known_N > 0)[:, None, None], known_N > 0


def _document_sums(record: RoutingRecord, names: Sequence[str], counts: Sequence[int],
                   seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Sums over tested documents: (measures ``[D, Q, L - 1, counts, 4]``, tokens ``[D, 1, L - 1, 1, 1]``, tested tokens)."""
    fitted_T, tested_N = tested_tokens(record, seed)
    fitted = fit(record, fitted_T)
    numbers, document_N = np.unique(record.documents_T[tested_N], return_inverse=True)
    sums, tokens = [], []
    for layer in range(1, len(record.layers)):
        for name in names:
            values_NM4, known_N = _measured(ranks(name, fitted, record, layer, tested_N), counts, record.num_experts)
            flat = values_NM4.reshape(len(tested_N), -1)
            sums.append(np.stack([np.bincount(document_N, column, minlength=len(numbers)) for column in flat.T], axis=1))
        tokens.append(np.bincount(document_N, known_N, minlength=len(numbers)))
    shape = (len(numbers), len(record.layers) - 1, len(names), len(counts), len(_MEASURES))
    return (np.stack(sums, axis=1).reshape(shape).swapaxes(1, 2), np.stack(tokens, axis=1)[:, None, :, None, None],
            len(tested_N))


def prediction_recall(record: RoutingRecord, prefetched: int | None = None, seed: int = 0) -> dict[str, Interval]:
    """Recall@n of each predictor, mean over layers, with 95 % intervals over documents; n is K (:func:`usual_choices`) unless
    given.

    Returns:
      predictor -> Interval of one number; also "<predictor> - <predictor before it in ``PREDICTORS``>" of every pair: how
      much better, on the same documents.

    Raises:
      MissingArray: as :func:`tested_tokens`.
    """
    names = available(record)
    sums, tokens, _ = _document_sums(record, names, [prefetched or usual_choices(record)], seed)
    return _mean_recall(names, sums[..., 0, 0], tokens[..., 0, 0])


def _mean_recall(names: Sequence[str], sums_DQL: np.ndarray, tokens_D1L: np.ndarray) -> dict[str, Interval]:
    pairs = [(late, early) for late in range(len(names)) for early in range(late)]

    def statistic(sums_RQL, tokens_R1L):
        recall_RQ = ratio(sums_RQL, tokens_R1L).mean(axis=2)
        differences = [recall_RQ[:, late] - recall_RQ[:, early] for late, early in pairs]
        return np.concatenate([recall_RQ, np.stack(differences, axis=1)], axis=1)
    found = bootstrap([sums_DQL, tokens_D1L], statistic)
    keys = [*names, *(f"{names[late]} - {names[early]}" for late, early in pairs)]
    return {key: Interval(found.value[i], found.low[i], found.high[i]) for i, key in enumerate(keys)}


def expert_prediction(records: Sequence[RoutingRecord]) -> Table:
    """Recall@k, recall@(k+m), exact-set, half-or-more and top-1 accuracy of each predictor, by layer.

    Columns: predictor; layer (that is predicted); prefetched (n); recall (share of the token's experts among the first n),
    low, high (95 %, over documents); exact (all of them are); half (half of them or more); top_1 (the token's first expert is
    predicted first); random, random_exact (recall, and chance of all, of n experts drawn at random; the latter NaN where tokens
    have different numbers of experts). K is :func:`usual_choices`.
    """
    record = latest(records, "documents_T")
    names, counts, experts = available(record), prefetch_counts(record), usual_choices(record)
    alike = ((record.experts_LTK >= 0).sum(axis=-1) == experts).all()
    sums, tokens, tested = _document_sums(record, names, counts, seed=0)
    value = ratio(sums.sum(axis=0), tokens.sum(axis=0))
    recall = bootstrap([sums[..., 0], tokens[..., 0]], ratio, samples=500)
    rows = [(name, record.layers[layer + 1], prefetched, value[q, layer, m, 0], recall.low[q, layer, m],
             recall.high[q, layer, m], *value[q, layer, m, 1:], prefetched / record.num_experts,
             random_exact(record.num_experts, experts, prefetched) if alike else np.nan)
            for q, name in enumerate(names) for layer in range(value.shape[1]) for m, prefetched in enumerate(counts)]
    columns = "predictor layer prefetched recall low high exact half top_1 random random_exact".split()
    mean = _mean_recall(names, sums[..., 0, 0], tokens[..., 0, 0])  # counts[0] is K
    headlines = [Headline(f"recall@{experts} of {name}, mean over layers", float(mean[name].value),
                          experts / record.num_experts, float(mean[name].low), float(mean[name].high)) for name in names[::-1]]
    lacking = "" if "next-layer router" in names else " The record lacks next_experts_LTK: no next-layer router."
    caption = (
        f"Predicting the experts of the next MoE layer before its router has run: fitted on half of the documents, "
        f"tested on {tested:,} tokens of the other half. Left: recall@{experts} by layer; right: recall when more "
        f"experts are fetched, mean over layers. Dashed: experts drawn at random, n/E. Beyond the {experts} that a "
        f"predictor lists, the most popular are fetched. Above the line of popularity routing depends on what the "
        f"predictor knows; for the next layer's router 0.67 (as ProMoE measures it) to 0.97 (Fate) are published.{lacking}"
    )
    return Table(dict(zip(columns, map(np.array, zip(*rows)))), caption, tuple(headlines), {"experts_per_token": experts})


def token_overlap(records: Sequence[RoutingRecord]) -> Table:
    """Experts that consecutive tokens of a document share, by layer. Random: k²/E; observed in published models about twice.

    Columns: layer; shared (experts, mean over tokens), low, high (95 %, over documents); random (k²/E); by_load (of tokens that
    are independent but loaded as these: Σ_e of the squared share of tokens that choose e).
    """
    record = latest(records, "documents_T")
    tokens_N = np.flatnonzero(follows_T(record))
    if not len(tokens_N):
        raise MissingArray("No two consecutive tokens of one document were recorded")
    shared_LN = common_experts(record.experts_LTK[:, tokens_N], record.experts_LTK[:, tokens_N - 1])
    mean, rows = mean_over_documents(record.documents_T[tokens_N], shared_LN), []
    random = choices_per_token(record) ** 2 / record.num_experts
    for layer, experts_TK, *values in zip(record.layers, record.experts_LTK, mean.value, mean.low, mean.high):
        share_E = count(experts_TK, record.num_experts) / record.num_tokens
        rows.append((layer, *values, random, float(np.sum(share_E**2))))
    table = dict(zip("layer shared low high random by_load".split(), map(np.array, zip(*rows))))
    caption = (
        f"Experts that a token shares with the token before it in the document, of {record.experts_per_token}, over "
        f"{len(tokens_N):,} pairs; bars: 95 % of resampled documents. Dashed: independent random choices, k²/E = "
        f"{rows[0][4]:.3g}. Dotted: independent choices with the loads that the experts have. Above both, neighbours "
        f"go to the same experts, and a cache of experts pays."
    )
    top = Headline("experts that consecutive tokens share, mean over layers", float(mean.value[-1]), rows[0][4],
                   float(mean.low[-1]), float(mean.high[-1]))
    return Table(table, caption, (top,))
