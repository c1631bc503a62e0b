"""Confidence intervals by resampling whole documents: neighbouring tokens are not independent, documents nearly are.

Every figure of an analysis is a function of sums over tokens (a ratio of counts, the spread of loads, …). So each
document is reduced to its sums once, a resample is a sum of documents, and all resamples are one matrix product:
tokens are read once, whatever the number of resamples.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import scipy.sparse

_MOST_DRAWS = 1 << 23  # document numbers drawn at once: 64 MiB


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure with its confidence interval; arrays of one shape.

    Attributes:
      value: the figure of all documents.
      low, high: ends of the interval; NaN where it is not known.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def document_counts(document_T: np.ndarray, code_T: np.ndarray, size: int,
                    weight_T: np.ndarray | None = None) -> np.ndarray:
    """How often each code occurs in each document, fp64 ``[documents, size]``; documents by rising number.

    Args:
      document_T: the document of each token (any integers).
      code_T: 0 … size - 1 (a domain, an expert, domain · E + expert, …); below 0: not counted. ``[T, …]``: a token
        with several codes (its K experts) counts for each.
      weight_T: what is added up instead of 1, shaped as ``code_T``.

    Raises:
      ValueError: a code is not below ``size``, or the lengths differ.
    """
    document_T, code_T = np.asarray(document_T), np.asarray(code_T)
    if document_T.ndim != 1 or code_T.shape[:1] != document_T.shape:
        raise ValueError(f"document_T {document_T.shape} must be [T] and code_T {code_T.shape} [T, …]")
    if code_T.size and code_T.max() >= size:
        raise ValueError(f"code_T has {code_T.max()}; with size={size} the largest is {size - 1}")
    numbers, document_T = np.unique(document_T, return_inverse=True)
    document_T = np.broadcast_to(document_T.reshape((-1,) + (1,) * (code_T.ndim - 1)), code_T.shape)
    counted_T = code_T >= 0
    flat = document_T[counted_T] * size + code_T[counted_T]
    weights = None if weight_T is None else np.asarray(weight_T, np.float64)[counted_T]
    return np.bincount(flat, weights, minlength=len(numbers) * size).reshape(len(numbers), size).astype(np.float64)


def bootstrap(sums: np.ndarray | Sequence[np.ndarray], statistic: Callable[..., np.ndarray], samples: int = 1000,
              confidence: float = 0.95, seed: int = 0, centred: bool = False) -> Interval:
    """Percentile bootstrap over documents (Efron 1979): as many documents are drawn, with replacement, as there are.

    Args:
      sums: sums over each document, led by its number: ``[D, …]``, or a list of such arrays (say, counts and tokens).
      statistic: (one array of totals per array of sums, each ``[R, …]``) -> ``[R, …]``: R results at once.
      samples: resamples.
      confidence: share of repetitions of the experiment in which the interval should hold the truth.
      seed: of the resampling; the same seed gives the same interval.
      centred: for a maximum or a spread over experts, :func:`interval_around` the value. With few tokens chance alone
        raises those, and drawing documents raises them once more: the percentiles lie above the value.

    Returns:
      An :class:`Interval` without R. The ends are NaN where they cannot be told: with fewer than two documents, and
      where more than 1 - ``confidence`` of the resamples give no finite value (a category of two or three documents).

    Raises:
      ValueError: no document, arrays of unequal length, or a confidence outside (0, 1).
    """
    sums = [np.asarray(array, np.float64) for array in (sums if isinstance(sums, (list, tuple)) else [sums])]
    documents = len(sums[0])
    if not documents or any(len(array) != documents for array in sums):
        raise ValueError(f"sums need one row per document, and one at least; got {[array.shape for array in sums]}")
    if not 0 < confidence < 1 or samples < 2:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, samples={samples} be 2 or more")
    value = np.asarray(statistic(*[array.sum(axis=0, keepdims=True) for array in sums]), np.float64)[0]
    if documents < 2:
        return Interval(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
    found_R = resamples(sums, statistic, samples, seed)
    return Interval(value, *(interval_around(value, found_R, confidence) if centred else _percentiles(found_R, confidence)))


def resamples(sums: Sequence[np.ndarray], statistic: Callable[..., np.ndarray], samples: int, seed: int = 0) -> np.ndarray:
    """The statistic of each resample, ``[samples, …]``; arguments as for :func:`bootstrap`, `sums` a list of fp64 arrays.

    The same seed and number of documents draw the same documents, so that results of several layers can be averaged.
    """
    random, documents, found = np.random.default_rng(seed), len(sums[0]), []
    at_once = max(1, min(samples, _MOST_DRAWS // documents))
    for start in range(0, samples, at_once):
        times_RD = _draw(random, min(at_once, samples - start), documents)
        totals = [(times_RD @ array.reshape(documents, -1)).reshape((-1, *array.shape[1:])) for array in sums]
        found.append(np.asarray(statistic(*totals), np.float64))
    return np.concatenate(found)


def mean_over_documents(document_T: np.ndarray | None, value_LT: np.ndarray, samples: int = 500) -> Interval:
    """Mean over tokens of a value of each layer, and last the mean over layers: an Interval ``[L + 1]``.

    Without ``document_T`` the ends are not known: NaN.
    """
    # Then all tokens are of one document, of which there is no interval.
    document_T = np.zeros(value_LT.shape[1], np.int64) if document_T is None else document_T
    numbers, document_T = np.unique(document_T, return_inverse=True)
    sums_DL = np.stack([np.bincount(document_T, value_T, minlength=len(numbers)) for value_T in value_LT], axis=1)
    tokens_D1 = np.bincount(document_T)[:, None]

    def statistic(sums_RL, tokens_R1):
        mean_RL = sums_RL / tokens_R1
        return np.concatenate([mean_RL, mean_RL.mean(axis=1, keepdims=True)], axis=1)
    return bootstrap([sums_DL, tokens_D1], statistic, samples=samples)


def _draw(random: np.random.Generator, samples: int, documents: int) -> np.ndarray:
    """How often each document is in each resample, fp64 [R, D]; rows sum to D."""
    drawn_RD = random.integers(0, documents, (samples, documents)) + documents * np.arange(samples)[:, None]
    return np.bincount(drawn_RD.ravel(), minlength=samples * documents).reshape(samples, documents).astype(np.float64)


def _percentiles(found_R: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    shown_R, lost = _finite(found_R, confidence)
    low, high = np.nanquantile(shown_R, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return np.where(lost, np.nan, low), np.where(lost, np.nan, high)


def interval_around(value: np.ndarray | float, found_R: np.ndarray, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Normal interval: the value ± the standard deviation of its resamples times the normal quantile, (low, high).

    For a maximum or a spread, which resampling raises: it holds what the statistic is on average *on as many tokens*, so
    compare it with uniform routing of as many tokens, not with the limit of infinitely many.
    """
    shown_R, lost = _finite(found_R, confidence)
    margin = statistics.NormalDist().inv_cdf((1 + confidence) / 2) * np.nanstd(shown_R, axis=0, ddof=1)
    return np.where(lost, np.nan, value - margin), np.where(lost, np.nan, value + margin)


def _finite(found_R: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """(the resamples, NaN where one is not finite; lost: where more than 1 - confidence of them are not).

    Where they are lost they are 0: of NaN alone NumPy would warn.
    """
    finite_R = np.isfinite(found_R)
    lost = (~finite_R).mean(axis=0) > 1 - confidence
    return np.where(lost, 0.0, np.where(finite_R, found_R, np.nan)), lost


def resample_counts(document_T: np.ndarray, code_T: np.ndarray, size: int, statistic: Callable[[np.ndarray], np.ndarray],
                    samples: int = 50, seed: int = 0) -> np.ndarray:
    """A statistic of resampled counts, ``[R, …]``, where codes are too many for :func:`document_counts` (token id · E +
    expert): only the counts that are not 0 are kept.

    The same seed and documents draw the same documents, so that results of several layers can be averaged.

    Args:
      document_T, code_T, size: as for :func:`document_counts`.
      statistic: counts ``[r, size]`` of r resamples -> ``[r, …]``.
      samples: R.

    Returns:
      NaN where there are fewer than two documents.
    """
    numbers, document_T = np.unique(document_T, return_inverse=True)
    documents, code_T = len(numbers), np.asarray(code_T)
    document_T = np.broadcast_to(document_T.reshape((-1,) + (1,) * (code_T.ndim - 1)), code_T.shape)
    counted_T = code_T >= 0
    ones = np.ones(int(counted_T.sum()))
    counts = scipy.sparse.coo_array((ones, (document_T[counted_T], code_T[counted_T])), shape=(documents, size)).tocsr()
    random = np.random.default_rng(seed)
    times_RD = _draw(random, samples, documents)
    at_once = max(1, _MOST_DRAWS // size)
    found = np.concatenate([np.asarray(statistic(times_RD[start:start + at_once] @ counts), np.float64)
                            for start in range(0, samples, at_once)])
    return found if documents > 1 else np.full_like(found, np.nan)
