"""Counting recorded choices by category: the sums that most analyses are made of, and what uniform routing would give.

T recorded tokens, L MoE layers, K choices, E experts, C categories (domains, positions, token ids, …). A *code* is the
category of a token, 0 … C - 1; a token with a code below 0 is not counted.
"""

from collections.abc import Callable

import numpy as np

from moe_jax.analysis.bootstrap import interval_around, resample_counts
from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.tables import Headline, MissingArray

LABEL_LENGTH = 14
_SIMULATED_TOKENS, _SIMULATIONS = 4096, 24


# Counts.


def chosen_TK(record: RoutingRecord, layer: int, dispatched: bool = False) -> np.ndarray:
    """The experts of each token in the layer (index into the record), int64 ``[T, K]``; -1 = nowhere.

    Args:
      dispatched: choices that found no place are nowhere too. Without ``kept_LTK`` every choice found one.
    """
    experts_TK = record.experts_LTK[layer].astype(np.int64)
    if dispatched and record.kept_LTK is not None:
        experts_TK[~record.kept_LTK[layer]] = -1
    return experts_TK


def pair_codes(code_T: np.ndarray, experts_TK: np.ndarray, num_experts: int) -> np.ndarray:
    """code · E + expert of each choice, int64 ``[T, K]``; -1 where either is below 0."""
    code_T1 = np.asarray(code_T, np.int64)[:, None]
    return np.where((code_T1 >= 0) & (experts_TK >= 0), code_T1 * num_experts + experts_TK, -1)


def common_experts(experts_TK: np.ndarray, other_TM: np.ndarray) -> np.ndarray:
    """How many of a token's experts are among the others, ``[..., T]``; nowhere (-1) matches nothing."""
    found_T = np.zeros(experts_TK.shape[:-1], np.int64)
    for choice in range(experts_TK.shape[-1]):
        expert_T1 = experts_TK[..., choice, None]
        found_T += ((other_TM == expert_T1) & (expert_T1 >= 0)).any(axis=-1)
    return found_T


def follows_T(record: RoutingRecord) -> np.ndarray:
    """Whether the token before each one, in the record, is the one before it in its document (and row), bool ``[T]``."""
    follows_N = np.diff(record.documents_T) == 0
    for number_T, step in ((record.rows_T, 0), (record.positions_T, 1)):
        if number_T is not None:
            follows_N &= np.diff(number_T) == step
    return np.concatenate([[False], follows_N])


def choices_per_token(record: RoutingRecord) -> float:
    """Mean number of experts of a token in a layer: K, unless tokens may have fewer."""
    return float((record.experts_LTK >= 0).sum(axis=-1).mean())


def count(code: np.ndarray, size: int) -> np.ndarray:
    """How often each of 0 … size - 1 occurs, int64 ``[size]``; numbers below 0 are not counted."""
    code = np.asarray(code).ravel()
    return np.bincount(code[code >= 0], minlength=size)


def counts_LCE(record: RoutingRecord, code_T: np.ndarray, size: int, dispatched: bool = False) -> np.ndarray:
    """Choices of each expert by the tokens of each category, int64 ``[L, C, E]``."""
    experts = record.num_experts
    counted_T = np.asarray(code_T) >= 0
    code_T = np.asarray(code_T)[counted_T]
    return np.stack([count(pair_codes(code_T, chosen_TK(record, layer, dispatched)[counted_T], experts), size * experts)
                     .reshape(size, experts) for layer in range(len(record.layers))])


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, of shapes that broadcast; NaN where the whole is 0."""
    part, whole = np.broadcast_arrays(part, whole)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def ratios(counts: np.ndarray) -> np.ndarray:
    """Each row of the last axis divided by its sum; NaN where that is 0."""
    return ratio(counts, counts.sum(axis=-1, keepdims=True))


def variation(ratios_CE: np.ndarray, whole_E: np.ndarray) -> np.ndarray:
    """Total variation distance ½ Σ_e |r_ce - r_e|: the share of a category's choices that would have to go elsewhere for
    the category to be routed like the whole."""
    return 0.5 * np.abs(ratios_CE - whole_E).sum(axis=-1)


def top(counts: np.ndarray, most: int) -> np.ndarray:
    """Indices of the `most` largest counts that are above 0, largest first; ties by index."""
    order = np.argsort(-counts, kind="stable")[:most]
    return order[counts[order] > 0]


# What uniform routing gives.


def uniform_std(record: RoutingRecord, code_T: np.ndarray, size: int, dispatched: bool = False) -> np.ndarray:
    """Standard deviation over experts of a category's routing ratio if every set of experts were equally likely, ``[L, C]``.

    A token that makes c choices makes each of the E experts one of them with probability c/E, so that a category's count
    has variance Σ_t (c_t/E)(1 - c_t/E), and its ratio has that divided by n², n = Σ_t c_t. It is above 0 for any finite
    number of tokens. NaN where n is 0. (The root of the mean of the variance; the mean of the root is slightly less.)
    """
    found = []
    for layer in range(len(record.layers)):
        made_T = (chosen_TK(record, layer, dispatched) >= 0).sum(axis=1)
        counted_T = np.asarray(code_T) >= 0
        sums = [np.bincount(np.asarray(code_T)[counted_T], made_T[counted_T] ** power, minlength=size) for power in (1, 2)]
        variance_C = (sums[0] - sums[1] / record.num_experts) / record.num_experts
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(np.sqrt(variance_C) / sums[0])
    return np.stack(found)


def uniform_largest_share(tokens_C: np.ndarray, experts: int, choices: float, seed: int = 0) -> np.ndarray:
    """Expected share of a category's tokens that choose its most chosen expert, if each token chose one of all sets of K
    experts at random, ``[C]``; by simulation for n up to 4,096 tokens, and above by its excess over K/E falling with √n.

    It is K/E for very many tokens only: the best of E noisy shares is above their mean. K may be a mean number of choices.
    """
    tokens_C = np.asarray(tokens_C)
    longest = int(min(_SIMULATED_TOKENS, tokens_C.max(initial=1)))
    random = np.random.default_rng(seed)
    largest_N = np.zeros(longest)
    for _ in range(_SIMULATIONS):
        size_N1 = int(choices) + (random.random((longest, 1)) < choices - int(choices))
        rank_NE = random.random((longest, experts)).argsort(axis=1).argsort(axis=1)
        chosen_NE = (rank_NE < size_N1).astype(np.int32)
        largest_N += np.cumsum(chosen_NE, axis=0).max(axis=1) / np.arange(1, longest + 1) / _SIMULATIONS
    within_C = np.clip(tokens_C, 1, longest)
    excess_C = largest_N[within_C - 1] - choices / experts
    return np.where(tokens_C > 0, choices / experts + excess_C * np.sqrt(within_C / np.maximum(tokens_C, 1)), np.nan)


# Intervals.


def headline(name: str, value: float, reference: float | None, record: RoutingRecord, codes: list[np.ndarray], size: int,
             statistic: Callable[[np.ndarray], np.ndarray]) -> Headline:
    """A headline with its interval: the mean over layers of `statistic`, documents resampled.

    Args:
      codes: for each layer the codes ``[T]`` or ``[T, K]`` that are counted.
      statistic: counts ``[R, size]`` -> ``[R]``.
    """
    if record.documents_T is None:
        return Headline(name, float(value), reference)
    found_R = np.mean([resample_counts(record.documents_T, code_T, size, statistic) for code_T in codes], axis=0)
    return Headline(name, float(value), reference, *map(float, interval_around(value, found_R)))


def dealt_anew(record: RoutingRecord, code_T: np.ndarray, size: int, dispatched: bool,
               statistic: Callable[[np.ndarray], np.ndarray], times: int = 3, seed: int = 0) -> float:
    """Mean over layers of `statistic` (counts ``[1, size · E]`` -> ``[1]``) where the codes are dealt out anew among the tokens
    that have one: what routing that does not look at the code would give, with the load of this record and its noise."""
    random, counted_T, found = np.random.default_rng(seed), code_T >= 0, []
    for layer in range(len(record.layers)):
        experts_TK = chosen_TK(record, layer, dispatched)[counted_T]
        for _ in range(times):
            codes = pair_codes(random.permutation(code_T[counted_T]), experts_TK, record.num_experts)
            found.append(statistic(count(codes, size * record.num_experts)[None]))
    return float(np.mean(found))


# Names.


def domain_codes(record: RoutingRecord) -> tuple[np.ndarray, tuple[str, ...]]:
    """Domains that have tokens: their codes ``[T]`` (-1: unknown) and names.

    Raises:
      MissingArray: no token has a domain.
    """
    known = np.array([], int) if record.domains_T is None else np.unique(record.domains_T[record.domains_T >= 0])
    if not len(known):
        raise MissingArray("The record holds no domains; record data whose documents have one (docs/data.md)")
    code_D = np.full(len(record.domains) + 1, -1)  # the last entry is that of -1
    code_D[known] = np.arange(len(known))
    return code_D[record.domains_T], tuple(record.domains[domain] for domain in known)


def token_label(record: RoutingRecord, token_id: int) -> str:
    """A token's text for display: control characters escaped, blanks visible, long ones cut; "#7" where it is not known."""
    if not 0 <= token_id < len(record.token_texts) or not record.token_texts[token_id]:
        return f"#{token_id}"
    text = record.token_texts[token_id]
    shown = "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)
    shown = shown.replace(" ", "␣").replace("▁", "␣")
    return shown if len(shown) <= LABEL_LENGTH else shown[:LABEL_LENGTH - 1] + "…"


def drop_note(record: RoutingRecord) -> str:
    """A sentence for captions of what counts dispatched choices alone; empty where at least 99 % were dispatched."""
    made = int((record.experts_LTK >= 0).sum())
    lost = 0.0 if record.kept_LTK is None or not made else 1 - int((record.kept_LTK & (record.experts_LTK >= 0)).sum()) / made
    if lost < 0.01:
        return ""
    return (f" {100 * lost:.2g} % of the choices found no place and are left out here, most of them those of popular "
            f"experts late in the row; record with --dispatch=dropless to see the router's choices alone.")
