"""How evenly the experts are used: over all tokens, batch by batch, along the context, under a shift of the data.

Counts are of all K choices before anything is dropped, as in ``training/metrics.py``, and a load of 1.0 is the fair
share. Even a router that draws K of E experts at random is not balanced on finitely many tokens, so every measure comes
with its value for such a router on as many tokens (:func:`uniform_counts`).

N batches, P domains, L MoE layers, E experts; R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from moe_jax.analysis.bootstrap import Interval, bootstrap, document_counts, mean_over_documents
from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.routing_counts import choices_per_token, common_experts, counts_LCE, domain_codes, ratio
from moe_jax.analysis.tables import Headline, MissingArray, Table, latest, over_steps
from moe_jax.training.metrics import DEAD_EXPERT_LOAD, expert_load

BATCH_TOKENS = 4096  # tokens of one batch where nothing else is said
_UNIFORM_DRAWS = 200
_FEW = 50  # choices of an expert, below which random loads are drawn and not taken as normal (there within 3 %)
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


# Measures of counts [..., E]; all of them [...].


def load(counts_E: np.ndarray) -> np.ndarray:
    """Load relative to the fair share, ``[..., E]``; 0 where nothing was counted."""
    counts_E = np.asarray(counts_E, np.float64)
    return expert_load(counts_E.reshape(-1, counts_E.shape[-1])).reshape(counts_E.shape)


def max_violation(counts_E: np.ndarray) -> np.ndarray:
    """MaxVio = (largest load - mean) / mean (Wang et al. 2024, section 4.1). Balanced: 0; all on one expert: E - 1."""
    return load(counts_E).max(axis=-1) - 1


def load_variation(counts_E: np.ndarray) -> np.ndarray:
    """Coefficient of variation of the load: standard deviation / mean. Balanced: 0."""
    return load(counts_E).std(axis=-1)


def load_entropy(counts_E: np.ndarray) -> np.ndarray:
    """Entropy of the experts' shares / ln E. Balanced: 1; all on one expert: 0."""
    share_E = load(counts_E) / np.shape(counts_E)[-1]
    logarithm_E = np.log(share_E, out=np.zeros_like(share_E), where=share_E > 0)
    return -np.sum(share_E * logarithm_E, axis=-1) / math.log(max(np.shape(counts_E)[-1], 2))


def dead_experts(counts_E: np.ndarray) -> np.ndarray:
    """How many experts have less than 1 % of the fair share."""
    return (load(counts_E) < DEAD_EXPERT_LOAD).sum(axis=-1).astype(np.float64)


MEASURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "MaxVio": max_violation,
    "load CV": load_variation,
    "load entropy / ln E": load_entropy,
    "dead experts": dead_experts,
}


def uniform_counts(tokens: int, num_experts: int, experts_per_token: float, draws: int = _UNIFORM_DRAWS,
                   seed: int = 0) -> np.ndarray:
    """Counts ``[draws, E]`` of tokens that each choose K different experts of E at random.

    Normal with the exact mean and covariance: n v E / (E - 1) · (1 - J / E) with v = K/E · (1 - K/E), J all ones. Where an
    expert has fewer than ``_FEW`` choices on average, whose counts are not normal, sets are drawn. K may be a mean number.
    """
    share, random = min(experts_per_token / num_experts, 1.0), np.random.default_rng(seed)
    if tokens * share < _FEW:
        return np.stack([_drawn_counts(random, tokens, num_experts, share * num_experts) for _ in range(draws)])
    noise_RE = random.standard_normal((draws, num_experts))
    noise_RE -= noise_RE.mean(axis=1, keepdims=True)
    variance = tokens * share * (1 - share) * num_experts / max(num_experts - 1, 1)
    return np.maximum(tokens * share + math.sqrt(variance) * noise_RE, 0.0)


def _drawn_counts(random: np.random.Generator, tokens: int, num_experts: int, experts_per_token: float) -> np.ndarray:
    """Choices of each expert ``[E]``, where each token draws a set of K; of a K between two numbers, either."""
    sure = int(experts_per_token)
    width = min(sure + 1, num_experts)
    if width**2 > 2 * num_experts:
        order_TK = random.random((tokens, num_experts)).argpartition(min(sure, num_experts - 1), axis=1)[:, :width]
    else:  # the same, sooner: draw again where two are alike
        order_TK, again_A = np.zeros((tokens, width), np.int64), np.arange(tokens)
        while len(again_A):
            order_TK[again_A] = random.integers(0, num_experts, (len(again_A), width))
            again_A = again_A[(np.diff(np.sort(order_TK[again_A], axis=1), axis=1) == 0).any(axis=1)]
    size_T1 = sure + (random.random((tokens, 1)) < experts_per_token - sure)
    return np.bincount(order_TK[np.arange(width) < size_T1], minlength=num_experts).astype(np.float64)


def uniform_value(measure: Callable[[np.ndarray], np.ndarray], tokens: float, record: RoutingRecord) -> float:
    """What the measure is on average if the tokens choose at random."""
    return float(measure(uniform_counts(int(tokens), record.num_experts, choices_per_token(record))).mean())


# Counts of a record.


def expert_counts(record: RoutingRecord) -> np.ndarray:
    """Choices of each expert, int64 ``[L, E]``."""
    return counts_LCE(record, np.zeros(record.num_tokens, np.int64), 1)[:, 0]


def document_expert_counts(record: RoutingRecord) -> np.ndarray:
    """Choices of each expert in each document, fp64 ``[documents, L, E]``; what :func:`bootstrap` resamples."""
    documents_T = latest([record], "documents_T").documents_T
    return np.stack([document_counts(documents_T, experts_TK, record.num_experts) for experts_TK in record.experts_LTK],
                    axis=1)


def batch_tokens(record: RoutingRecord) -> int:
    """Tokens of a batch: ``BATCH_TOKENS``, or a sixteenth of what was recorded if that is less."""
    return max(1, min(BATCH_TOKENS, record.num_tokens // 16))


def batch_counts(record: RoutingRecord, tokens: int) -> np.ndarray:
    """Choices of each expert in each batch of so many consecutive tokens, ``[L, N, E]``; the rest is not counted."""
    batches = record.num_tokens // tokens
    number_T = np.arange(record.num_tokens) // tokens
    return counts_LCE(record, np.where(number_T < batches, number_T, -1), batches)


def max_violation_batch(record: RoutingRecord, tokens: int | None = None) -> np.ndarray:
    """MaxVio of a batch, mean over batches, ``[L]``; its mean is MaxVio_batch (Wang et al. 2024)."""
    return max_violation(batch_counts(record, tokens or batch_tokens(record))).mean(axis=1)


# Analyses: records -> Table.


def balance(records: Sequence[RoutingRecord]) -> Table:
    """MaxVio (global and batch, Wang et al. 2024), CV and entropy of the load, dead experts, per layer.

    Columns: measure; layer; value; low, high (95 %, over documents; NaN for the mean over batches); uniform (of a random
    choice of as many tokens). Max / mean is MaxVio + 1.
    """
    record = latest(records)
    counts_LE, tokens = expert_counts(record), batch_tokens(record)
    rows, headlines = [], []
    sums_DLE = None if record.documents_T is None else document_expert_counts(record)
    for name, measure in MEASURES.items():
        interval = _with_mean(measure, counts_LE, sums_DLE)
        uniform = uniform_value(measure, record.num_tokens, record)
        name = "MaxVio global" if name == "MaxVio" else name
        rows += [(name, layer, *values, uniform) for layer, *values in zip(record.layers, interval.value, interval.low,
                                                                         interval.high)]
        headlines.append(_headline(f"{name}, mean over layers", interval, uniform))
        if name == "MaxVio global":
            batch_L, uniform = max_violation_batch(record, tokens), uniform_value(measure, tokens, record)
            rows += [("MaxVio batch", *row, np.nan, np.nan, uniform) for row in zip(record.layers, batch_L)]
            name = f"MaxVio batch ({tokens:,} tokens), mean over layers"
            headlines.append(Headline(name, float(batch_L.mean()), uniform))
    caption = (
        f"Load of the experts over {record.num_tokens:,} tokens, all choices, before drops; MaxVio = (largest load - "
        f"mean) / mean, over everything (global) and the mean over batches of {tokens:,} consecutive tokens. Bars: 95 "
        f"% of resampled documents. Dashed: a random choice on as many tokens. Unbalanced is what lies clearly off the "
        f"dashed line; a dead expert has less than 1 % of the fair share. Wang et al. 2024 report MaxVio global 0.04 "
        f"with loss-free balancing and 0.72 with an auxiliary loss (1B parameters)."
    )
    return Table(_columns("measure layer value low high uniform", rows), caption, tuple(headlines))


def _with_mean(measure: Callable, counts_LE: np.ndarray, sums_DLE: np.ndarray | None, samples: int = 500) -> Interval:
    """The measure by layer and, last, its mean over layers: an Interval ``[L + 1]``."""
    def statistic(counts_RLE):
        value_RL = measure(counts_RLE)
        return np.concatenate([value_RL, value_RL.mean(axis=1, keepdims=True)], axis=1)
    if sums_DLE is not None:
        return bootstrap(sums_DLE, statistic, samples=samples, centred=True)
    value = statistic(counts_LE[None])[0]
    return Interval(value, np.full_like(value, np.nan), np.full_like(value, np.nan))


def _headline(name: str, interval: Interval, reference: float | None) -> Headline:
    """The last entry of the interval."""
    return Headline(name, float(interval.value[-1]), reference, float(interval.low[-1]), float(interval.high[-1]))


def _columns(names: str, rows: list[tuple]) -> dict[str, np.ndarray]:
    columns = list(zip(*rows)) or [()] * len(names.split())
    return {name: np.array(column) for name, column in zip(names.split(), columns)}


def expert_loads(records: Sequence[RoutingRecord]) -> Table:
    """The load of every expert. Columns: layer, expert, rank (0: busiest of its layer), load, low, high (95 %)."""
    record = latest(records)
    counts_LE = expert_counts(record)
    interval = Interval(load(counts_LE), *np.full((2, *counts_LE.shape), np.nan))
    if record.documents_T is not None:
        interval = bootstrap(document_expert_counts(record), load, samples=500)
    rank_LE = np.argsort(np.argsort(-interval.value, axis=1, kind="stable"), axis=1)
    layer_LE, expert_LE = np.meshgrid(record.layers, np.arange(record.num_experts), indexing="ij")
    values = (layer_LE, expert_LE, rank_LE, interval.value, interval.low, interval.high)
    columns = dict(zip(("layer", "expert", "rank", "load", "low", "high"), (value.ravel() for value in values)))
    caption = (
        f"Load of every expert relative to the fair share, busiest first, over {record.num_tokens:,} tokens; shaded: 95 % of "
        f"resampled documents. A balanced layer is flat at 1.0; below the dotted line (1 % of it) an expert counts as dead."
    )
    headlines = (Headline("largest load of any expert (1.0 = fair)", float(interval.value.max()), 1.0),
                 Headline("smallest load of any expert (1.0 = fair)", float(interval.value.min()), 1.0))
    return Table(columns, caption, headlines)


def position_buckets(positions_T: np.ndarray, shortest: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Buckets that double: 0 … 7, 8 … 15, 16 … 31, …: (bucket of each token ``[T]``, edges ``[buckets + 1]``)."""
    largest = int(np.max(positions_T, initial=0))
    edges = [0, shortest]
    while edges[-1] <= largest:
        edges.append(2 * edges[-1])
    return np.searchsorted(edges, positions_T, side="right") - 1, np.array(edges)


def balance_by_position(records: Sequence[RoutingRecord], least_tokens: int = 256) -> Table:
    """MaxVio and CV of the load by how much context a token has: its position in its document, in doubling buckets.

    Columns: measure, layer, first and last position of the bucket, tokens, value, low, high (95 %), uniform. Buckets of
    fewer tokens than ``least_tokens`` are left out.
    """
    record = latest(records, "positions_T")
    bucket_T, edges = position_buckets(record.positions_T)
    tokens_B = np.bincount(bucket_T, minlength=len(edges) - 1)
    shown = [bucket for bucket in range(len(tokens_B)) if tokens_B[bucket] >= least_tokens]
    if not shown:
        raise MissingArray(f"No range of positions has {least_tokens} tokens; record more than {record.num_tokens:,}")
    rows, headlines = [], []
    for bucket in shown:
        of_bucket = _some(record, bucket_T == bucket)
        counts_LE = expert_counts(of_bucket)
        sums_DLE = None if record.documents_T is None else document_expert_counts(of_bucket)
        for name in ("MaxVio", "load CV"):
            interval = _with_mean(MEASURES[name], counts_LE, sums_DLE, samples=200)
            uniform = uniform_value(MEASURES[name], tokens_B[bucket], record)
            rows += [(name, layer, edges[bucket], edges[bucket + 1] - 1, tokens_B[bucket], *values, uniform)
                     for layer, *values in zip(record.layers, interval.value, interval.low, interval.high)]
            where = f"{name} at positions {edges[bucket]}-{edges[bucket + 1] - 1}, mean over layers"
            headlines += [_headline(where, interval, uniform)] if name == "MaxVio" else []
    caption = (
        f"Balance of the load by the context that a token has (its position in its document, buckets that double), "
        f"over {tokens_B[shown].sum():,} tokens. Dashed: a random choice on as many tokens as the bucket has, which "
        f"rises where tokens are few. A line that leaves the dashed one with growing context means that long contexts "
        f"load the experts less evenly."
    )
    names = "measure layer first_position last_position tokens value low high uniform"
    # First what the longest context gives.
    return Table(_columns(names, rows), caption, tuple(headlines[::-1]))


def _some(record: RoutingRecord, chosen_T: np.ndarray) -> RoutingRecord:
    """The experts and documents of some of the tokens."""
    return RoutingRecord(
        step=record.step, layers=record.layers, num_experts=record.num_experts, token_ids_T=record.token_ids_T[chosen_T],
        experts_LTK=record.experts_LTK[:, chosen_T],
        documents_T=None if record.documents_T is None else record.documents_T[chosen_T])


def burst_stream(domains_T: np.ndarray, documents_T: np.ndarray, domain: int, tokens: int, calm: int = 6, burst: int = 4,
                 seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Orders documents so that a burst of one domain arrives in a stream of batches.

    Half of the domain's tokens at most make the burst; all other documents, shuffled, the batches before and after it.

    Args:
      domains_T, documents_T: of the recorded tokens.
      tokens: of one batch.
      calm: batches before and after, at most.
      burst: batches in the burst, at most.

    Returns:
      (number_T: the batch of each token, counted from the start of the burst, so that those before are negative; and
      where it is in no batch, the smallest int64. phases: names of the batches in order: "before", "burst", "after").
      Nothing in any batch where the domain has fewer than two batches of tokens.
    """
    domains_T, (_, documents_T) = np.asarray(domains_T), np.unique(documents_T, return_inverse=True)
    nowhere = np.iinfo(np.int64).min
    number_T = np.full(len(domains_T), nowhere)
    random, documents = np.random.default_rng(seed), documents_T.max(initial=0) + 1
    order_T, other_order_T = (np.argsort(random.permutation(documents)[documents_T], kind="stable") for _ in range(2))
    own_T = order_T[domains_T[order_T] == domain]
    burst = min(burst, len(own_T) // (2 * tokens))
    in_burst_T = own_T[:burst * tokens]
    taken_T = np.zeros(len(domains_T), bool)
    taken_T[in_burst_T] = True
    # Another order: in the same one the rest of the domain would come last, after all the batches.
    rest_T = other_order_T[~taken_T[other_order_T]]
    calm = min(calm, len(rest_T) // (2 * tokens))
    if not burst or not calm:
        return number_T, np.array([], "<U6")
    number_T[in_burst_T] = np.arange(len(in_burst_T)) // tokens
    number_T[rest_T[:calm * tokens]] = np.arange(calm * tokens) // tokens - calm
    number_T[rest_T[calm * tokens:2 * calm * tokens]] = np.arange(calm * tokens) // tokens + burst
    return number_T, np.array(["before"] * calm + ["burst"] * burst + ["after"] * calm)


def distribution_shift(records: Sequence[RoutingRecord]) -> Table:
    """MaxVio per batch while a burst of one domain arrives, for each domain in turn (:func:`burst_stream`).

    Columns: domain, batch (0: the first of the burst), phase, share (of the batch's tokens that are of the domain),
    value (MaxVio, mean over layers), worst (of the worst layer), uniform.
    """
    record = latest(records, "domains_T", "documents_T")
    tokens = batch_tokens(record)
    uniform = uniform_value(max_violation, tokens, record)
    rows, headlines, left_out = [], [], []
    sums_DLE = document_expert_counts(record)
    domains_T, names = domain_codes(record)
    if len(names) < 2:
        raise MissingArray(f"A shift from domain to domain needs two domains; the record has {names[0]} alone")
    for domain, name in enumerate(names):
        number_T, phases = burst_stream(domains_T, record.documents_T, domain, tokens)
        if not len(phases):
            left_out.append(name)
            continue
        calm = int((phases == "before").sum())
        part_T = np.where(number_T >= -calm, number_T + calm, -1)
        violation_LN = max_violation(counts_LCE(record, part_T, len(phases)))
        own_N = np.bincount(part_T[(part_T >= 0) & (domains_T == domain)], minlength=len(phases)) / tokens
        rows += [(name, batch - calm, *values, uniform) for batch, values in enumerate(
            zip(phases, own_N, violation_LN.mean(axis=0), violation_LN.max(axis=0)))]
        alone = _with_mean(max_violation, None, document_expert_counts(_some(record, domains_T == domain)))
        headlines.append(_headline(f"MaxVio of {name} alone, mean over layers (reference: as many tokens of everything)",
                                   alone, _of_everything(sums_DLE, (domains_T == domain).mean())))
    if not rows:
        raise MissingArray(f"No domain has two batches of {tokens:,} tokens; record more than {record.num_tokens:,}")
    without = f" Too few tokens for a burst: {', '.join(left_out)}." if left_out else ""
    caption = (
        f"A burst of one domain in a stream of batches of {tokens:,} tokens (documents of {record.num_tokens:,} tokens "
        f"put in another order; the router does not learn from it): MaxVio of each batch, mean over layers. Dashed: a "
        f"random choice. A router that specialises by domain jumps in the batches of the burst (dots, from 0 on); one "
        f"that does not stays level.{without}"
    )
    return Table(_columns("domain batch phase share value worst uniform", rows), caption, tuple(headlines))


def _of_everything(sums_DLE: np.ndarray, share: float, draws: int = 50, seed: int = 0) -> float:
    """MaxVio, mean over layers, of so large a share of all documents, drawn at random; mean over draws."""
    random, documents = np.random.default_rng(seed), max(1, round(share * len(sums_DLE)))
    drawn = (random.permutation(len(sums_DLE))[:documents] for _ in range(draws))
    return float(np.mean([max_violation(sums_DLE[some].sum(axis=0)).mean() for some in drawn]))


def router_confidence(records: Sequence[RoutingRecord]) -> Table:
    """Largest router score, entropy of the scores, and norm of the logits: their distribution over tokens by layer.

    Columns: measure, layer, mean, low, high (95 % of resampled documents), q05 … q95 (quantiles over tokens), reference (of
    a router without preference: 1/E and ln E; NaN for norms).
    """
    record = latest(records, "confidence_LT", "entropy_LT", "logit_norm_LT")
    experts = record.num_experts
    measures = (("confidence", record.confidence_LT, 1 / experts), ("entropy", record.entropy_LT, math.log(experts)),
                ("logit norm", record.logit_norm_LT, np.nan))
    rows, headlines = [], []
    for name, value_LT, reference in measures:
        mean = mean_over_documents(record.documents_T, value_LT)
        quantiles_LQ = np.quantile(value_LT, _QUANTILES, axis=1).T
        rows += [(name, *row, *quantiles_Q, reference) for *row, quantiles_Q in zip(
            record.layers, mean.value, mean.low, mean.high, quantiles_LQ)]
        headlines.append(_headline(f"{name}, mean over layers and tokens", mean, None if np.isnan(reference) else reference))
    caption = (
        f"How decided the router is, over {record.num_tokens:,} tokens: largest score of a token (1/E = "
        f"{1 / experts:.3g} means no preference, 1 certainty), entropy of its scores in nats (ln E = "
        f"{math.log(experts):.3g} means no preference), and Euclidean norm of its logits. Lines: means; bands: half of "
        f"the tokens, and nine tenths. A confident router is far from the dashed line; norms that grow without end "
        f"announce instability."
    )
    names = "measure layer mean low high q05 q25 q50 q75 q95 reference"
    return Table(_columns(names, rows), caption, tuple(headlines))


def collapse_over_training(records: Sequence[RoutingRecord]) -> Table:
    """Signs of collapse at each saved step: measures of the load, router confidence and logit norm, and how many of a
    token's experts are those of the saved step before.

    Columns: measure, step, layer, value, uniform (NaN where there is none).
    """
    records = over_steps(records)
    first, rows = records[0], []
    uniform = {name: uniform_value(measure, first.num_tokens, first) for name, measure in MEASURES.items()}
    for before, record in zip([None, *records], records):
        counts_LE = expert_counts(record)
        values = {name: (measure(counts_LE), uniform[name]) for name, measure in MEASURES.items()}
        if record.confidence_LT is not None:
            values["confidence"] = record.confidence_LT.mean(axis=1, dtype=np.float64), 1 / record.num_experts
        if record.logit_norm_LT is not None:
            values["logit norm"] = record.logit_norm_LT.mean(axis=1, dtype=np.float64), np.nan
        if before is not None:
            random = choices_per_token(record) / record.num_experts
            values["overlap"] = route_overlap(record.experts_LTK, before.experts_LTK), random
        rows += [(name, record.step, layer, value, reference) for name, (value_L, reference) in values.items()
                 for layer, value in zip(record.layers, value_L)]
    caption = (
        f"Signs of collapse at {len(records)} saved steps, of the same {first.num_tokens:,} tokens: MaxVio, entropy of "
        f"the load / ln E, dead experts (below 1 % of the fair share), router confidence, logit norm, and the share of "
        f"a token's experts that it also had at the saved step before. Dashed: a router without preference. Collapse "
        f"is MaxVio and dead experts that rise while the entropy falls; a router that has settled has an overlap near "
        f"1."
    )
    last = {name: value_L for name, (value_L, _) in values.items()}
    headlines = tuple(Headline(f"{name} at step {records[-1].step}, mean over layers", float(last[name].mean()),
                               None if np.isnan(values[name][1]) else float(values[name][1])) for name in last)
    return Table(_columns("measure step layer value uniform", rows), caption, headlines)


def route_overlap(experts_LTK: np.ndarray, other_LTM: np.ndarray) -> np.ndarray:
    """Share of a token's experts that are among its others, mean over the tokens that have any, fp64 ``[L]``."""
    shared_LT, own_LT = common_experts(experts_LTK, other_LTM), (experts_LTK >= 0).sum(axis=-1)
    return np.nanmean(ratio(shared_LT, own_LT), axis=1)
