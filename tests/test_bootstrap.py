"""Intervals over documents: equal to a library's, hold the truth as often as they say, and know their limits."""

import numpy as np
import pytest
import scipy.stats

from moe_jax.analysis.bootstrap import (
    bootstrap, document_counts, interval_around, mean_over_documents, resample_counts)


def ratio(counts_RX, tokens_R1):
    with np.errstate(invalid="ignore"):
        return counts_RX / tokens_R1


def test_counts_by_document_by_hand():
    document_T = [7, 7, 3, 7]
    code_TK = [[0, 1], [1, -1], [2, 2], [1, 0]]
    # document 3: two of code 2; document 7: two of 0, three of 1; the -1 is not counted
    np.testing.assert_array_equal(document_counts(document_T, code_TK, 3), [[0, 0, 2], [2, 3, 0]])
    weight_TK = [[1, 10], [10, 99], [0.5, 0.25], [10, 2]]
    np.testing.assert_array_equal(document_counts(document_T, code_TK, 3, weight_TK), [[0, 0, 0.75], [3, 30, 0]])


def test_counts_refuse_codes_beyond_the_last_and_unequal_lengths():
    with pytest.raises(ValueError, match="code_T has 3; with size=3 the largest is 2"):
        document_counts([0, 0], [1, 3], 3)
    with pytest.raises(ValueError, match="must be"):
        document_counts([0, 0], [1], 3)


def test_two_documents_by_hand():
    # Resamples of {0/1, 2/1} are 0, 1 (two ways) and 2, with chances 1/4, 1/2, 1/4: the middle 40 % are 1.
    sums = [np.array([[0.0], [2.0]]), np.array([[1.0], [1.0]])]
    interval = bootstrap(sums, ratio, samples=4000, confidence=0.95)
    assert (interval.value, interval.low, interval.high) == (1.0, 0.0, 2.0)
    narrow = bootstrap(sums, ratio, samples=4000, confidence=0.4)
    assert (narrow.low, narrow.high) == (1.0, 1.0)


def test_equals_scipys_percentile_bootstrap():
    random = np.random.default_rng(0)
    tokens_D = random.integers(20, 200, 60)
    count_D = random.binomial(tokens_D, random.beta(2, 5, 60))
    ours = bootstrap([count_D[:, None], tokens_D[:, None]], ratio, samples=20000)
    statistic = lambda count, tokens, axis: count.sum(axis=axis) / tokens.sum(axis=axis)
    theirs = scipy.stats.bootstrap((count_D, tokens_D), statistic, paired=True, method="percentile", n_resamples=20000,
                                   rng=np.random.default_rng(1)).confidence_interval
    np.testing.assert_allclose([ours.low[0], ours.high[0]], [theirs.low, theirs.high], atol=0.003)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_holds_the_truth_as_often_as_it_says(confidence):
    # Documents of unequal length, each with a share of its own for three categories: tokens of one are alike. An
    # interval that takes tokens for independent is far too narrow.
    random, truth, held, by_token = np.random.default_rng(0), np.array([0.5, 0.3, 0.2]), [], []
    for trial in range(300):
        tokens_D = random.integers(50, 150, 80)
        counts_DC = np.array([random.multinomial(n, random.dirichlet(3 * truth)) for n in tokens_D])
        interval = bootstrap([counts_DC, tokens_D[:, None]], ratio, samples=400, confidence=confidence, seed=trial)
        held.append((interval.low <= truth) & (truth <= interval.high))
        share = counts_DC.sum(axis=0) / tokens_D.sum()
        half = scipy.stats.norm.ppf((1 + confidence) / 2) * np.sqrt(share * (1 - share) / tokens_D.sum())
        by_token.append(np.abs(share - truth) <= half)
    # 900 intervals, three of a trial alike: the error of the share is at most about 2 %
    np.testing.assert_allclose(np.mean(held), confidence, atol=0.04)
    assert np.mean(by_token) < confidence - 0.25


def test_the_seed_decides_and_parts_of_the_draw_do_not_matter(monkeypatch):
    sums_DX = np.random.default_rng(0).random((30, 4))
    mean = lambda total_RX: total_RX / 30
    first, again, other = (bootstrap(sums_DX, mean, seed=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.low, again.low)
    assert (first.low != other.low).any()
    monkeypatch.setattr("moe_jax.analysis.bootstrap._MOST_DRAWS", 30 * 7)  # 1000 resamples, seven at a time
    np.testing.assert_allclose(bootstrap(sums_DX, mean, seed=3).low, first.low, rtol=1e-12)


def test_what_cannot_be_told_is_nan():
    # Category 0 in every document, 1 in one of ten (missing from 35 % of resamples), 2 in none.
    counts_DC = np.zeros((10, 3)) + [5, 0, 0]
    counts_DC[0, 1] = 8
    share_of_first = lambda total_RC: np.divide(total_RC, total_RC, out=np.full_like(total_RC, np.nan), where=total_RC > 0)
    interval = bootstrap(counts_DC, share_of_first)
    np.testing.assert_array_equal(interval.value, [1, 1, np.nan])
    np.testing.assert_array_equal(interval.low, [1, np.nan, np.nan])
    one = bootstrap(counts_DC[:1], share_of_first)
    assert one.value[0] == 1 and np.isnan(one.low).all() and np.isnan(one.high).all()


def test_means_over_tokens_resample_documents():
    random = np.random.default_rng(0)
    document_T = np.repeat(np.arange(40), random.integers(5, 60, 40))
    value_LT = random.normal(size=(2, 40))[:, document_T] + random.normal(size=(2, len(document_T)))
    found = mean_over_documents(document_T, value_LT, samples=4000)
    np.testing.assert_allclose(found.value, [*value_LT.mean(axis=1), value_LT.mean()])
    slow = []
    for _ in range(1000):
        tokens = np.concatenate([np.flatnonzero(document_T == document) for document in random.integers(0, 40, 40)])
        slow.append([*value_LT[:, tokens].mean(axis=1), value_LT[:, tokens].mean()])
    np.testing.assert_allclose([found.low, found.high], np.quantile(slow, [0.025, 0.975], axis=0), atol=0.05)
    assert np.isnan(mean_over_documents(None, value_LT).low).all()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="one row per document"):
        bootstrap([np.ones((3, 1)), np.ones((2, 1))], ratio)
    with pytest.raises(ValueError, match="one row per document"):
        bootstrap(np.ones((0, 2)), lambda total: total)
    with pytest.raises(ValueError, match="confidence=95"):
        bootstrap(np.ones((3, 2)), lambda total: total, confidence=95)


def test_a_thousand_documents_by_two_thousand_figures_take_seconds():
    sums_DX = np.random.default_rng(0).random((1000, 8, 256))
    interval = bootstrap(sums_DX, lambda total_RLE: total_RLE / total_RLE.sum(axis=-1, keepdims=True))
    assert interval.value.shape == (8, 256) and (interval.low < interval.value).all()


# Codes too many for a table, and statistics that resampling raises.


def test_resampled_counts_are_those_of_whole_documents():
    document_T, code_TK = np.array([5, 5, 9]), np.array([[0, 2], [2, -1], [1, 2]])
    found = resample_counts(document_T, code_TK, 4, lambda counts: counts, samples=64)
    # Two documents drawn twice over: (1, 0, 2, 0) and (0, 1, 1, 0), in any combination of two.
    assert {tuple(row) for row in found.tolist()} == {(2, 0, 4, 0), (1, 1, 3, 0), (0, 2, 2, 0)}
    again = resample_counts(document_T, code_TK, 4, lambda counts: counts, samples=64)
    np.testing.assert_array_equal(found, again)
    assert np.isnan(resample_counts(np.zeros(3, int), code_TK, 4, lambda counts: counts[:, 0])).all()


def test_resampled_counts_equal_the_table_of_documents():
    random = np.random.default_rng(0)
    document_T, code_T = random.integers(0, 40, 3000), random.integers(-1, 30, 3000)
    share = lambda counts: counts.max(axis=-1) / counts.sum(axis=-1)
    interval = bootstrap(document_counts(document_T, code_T, 30), share, samples=2000)
    found = resample_counts(document_T, code_T, 30, share, samples=2000)
    np.testing.assert_allclose(np.quantile(found, [0.025, 0.975]), [interval.low, interval.high], rtol=1e-9)


def test_the_interval_around_a_value():
    low, high = interval_around(5.0, np.array([1.0, 3.0]))  # standard deviation √2
    np.testing.assert_allclose([low, high], [5 - 1.959964 * np.sqrt(2), 5 + 1.959964 * np.sqrt(2)], rtol=1e-6)
    assert np.isnan(interval_around(5.0, np.array([1.0, np.nan]))).all()
