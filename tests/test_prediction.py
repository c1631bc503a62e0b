"""Predicting experts: ranks and shares by hand, a slow fit, planted structure found and nothing found in uniform routing."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import records

from moe_jax.analysis import prediction
from moe_jax.analysis.prediction import (
    Fitted, expert_prediction, first_half, fit, prediction_recall, random_exact, ranks,
    token_overlap)
from moe_jax.analysis.routing_counts import common_experts, follows_T
from moe_jax.analysis.tables import MissingArray


def tiny(experts_LTK, num_experts=4, **fields):
    """One document per two tokens unless said otherwise."""
    experts_LTK = np.array(experts_LTK, np.int16)
    tokens = experts_LTK.shape[1]
    values = {"documents_T": np.arange(tokens) // 2, "rows_T": np.zeros(tokens, int)} | fields
    return records.make(tokens=tokens, layers=len(experts_LTK), experts=num_experts, choices=experts_LTK.shape[2], documents=1,
                        positions_T=None, turns_T=None, domains_T=None, gates_LTK=None, kept_LTK=None,
                        experts_LTK=experts_LTK, **values)


def test_common_experts_by_hand():
    assert common_experts(np.array([[0, 1], [2, -1], [3, 2]]), np.array([[1, 0, 5], [-1, 2, 0], [0, 1, -1]])).tolist() == [2, 1, 0]


def test_fit_by_hand():
    # Layer 0: expert 0 twice, 1 once. Of the two tokens with 0 one has 2 and one 3 in layer 1; the one with 1 has 3.
    record = tiny([[[0], [0], [1], [2]], [[2], [3], [3], [0]]])
    fitted = fit(record, np.array([True, True, True, False]))
    np.testing.assert_allclose(fitted.popularity_LE, [[2 / 3, 1 / 3, 0, 0], [0, 0, 1 / 3, 2 / 3]])
    np.testing.assert_allclose(fitted.transition_LEE[1], [[0, 0, 0.5, 0.5], [0, 0, 0, 1], [0] * 4, [0] * 4])


def test_ranks_by_hand():
    # Two choices of five experts. Token 1 is the only one with a token before.
    record = tiny([[[0, 1], [1, 2]], [[3, 4], [2, 3]]], 5, next_experts_LTK=[[[4, 0], [3, -1]], [[-1, -1], [-1, -1]]])
    popularity_E = [0.3, 0.1, 0.5, 0.6, 0.5]  # in order: 3, 2, 4 (as popular as 2), 0, 1
    transition_EE = np.zeros((5, 5))
    transition_EE[1] = [0.1, 0, 0.2, 0.3, 0.4]
    transition_EE[2] = [0.2, 0, 0.1, 0.3, 0.4]
    fitted = Fitted(np.array([popularity_E] * 2), np.stack([np.zeros((5, 5)), transition_EE]))
    rank = lambda name: ranks(name, fitted, record, 1, np.array([1]))[0].tolist()
    assert rank("popularity") == [1, 0]                # 2 and 3 in 3 2 4 0 1
    assert rank("previous token") == [2, 0]            # 3 4, then 2 0 1 by popularity
    assert rank("next-layer router") == [1, 0]         # 3, then 2 4 0 1
    assert rank("transition") == [2, 1]                # sums 0.3 0 0.3 0.6 0.8: 4 3 2 0 1, 2 before 0 by popularity
    # Token 0 has no token before: by popularity 3 2 4 0 1
    assert ranks("previous token", fitted, record, 1, np.array([0]))[0].tolist() == [0, 2]


def test_experts_that_go_nowhere_have_no_rank_and_do_not_count():
    record = tiny([[[0, 1]] * 2, [[2, -1], [-1, -1]]])
    fitted = fit(record, np.array([True, True]))
    rank_NK = ranks("popularity", fitted, record, 1, np.array([0, 1]))
    assert rank_NK.tolist() == [[0, 4], [4, 4]]
    values_NM4, known_N = prediction._measured(rank_NK, [1, 2], 4)
    assert known_N.tolist() == [True, False] and values_NM4[0].tolist() == [[1, 1, 1, 1]] * 2 and not values_NM4[1].any()


def test_measures_by_hand():
    # Three tokens' experts at places (0, 3), (1, 2) and (5, 4) of a prediction, for 2, 3 and 4 fetched of 6.
    values_NM4, _ = prediction._measured(np.array([[0, 3], [1, 2], [5, 4]]), [2, 3, 4], 6)
    recall, exact, half, top_1 = np.moveaxis(values_NM4, 2, 0)
    assert recall.tolist() == [[0.5, 0.5, 1], [0.5, 1, 1], [0, 0, 0]]
    assert exact.tolist() == [[0, 0, 1], [0, 1, 1], [0, 0, 0]] and half.tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert top_1.tolist() == [[1] * 3, [0] * 3, [0] * 3]


def test_chance_of_all_by_counting():
    for experts, choices, fetched in itertools.product([5], [1, 2, 3], range(1, 6)):
        sets = list(itertools.combinations(range(experts), fetched))
        counted = np.mean([set(range(choices)) <= set(drawn) for drawn in sets])
        assert random_exact(experts, choices, fetched) == pytest.approx(counted)


def test_documents_are_halved_and_what_is_tested_is_not_learned():
    documents_T = np.repeat(np.arange(50), np.random.default_rng(0).integers(5, 40, 50))
    half_T = first_half(documents_T)
    assert len(documents_T) / 2 <= half_T.sum() <= len(documents_T) / 2 + 40
    assert all(len(set(half_T[documents_T == document])) == 1 for document in range(50))
    assert (first_half(documents_T, seed=1) != half_T).any()
    record = records.make(tokens=2048, documents=32)
    fitted_T, tested_N = prediction.tested_tokens(record)
    assert not fitted_T[tested_N].any() and follows_T(record)[tested_N].all()
    changed = record.experts_LTK.copy()
    changed[:, tested_N] = (changed[:, tested_N] + 1) % 8
    before, after = fit(record, fitted_T), fit(dataclasses.replace(record, experts_LTK=changed), fitted_T)
    np.testing.assert_array_equal(before.transition_LEE, after.transition_LEE)


def test_a_token_before_is_of_the_same_document_and_row():
    record = tiny([[[0]] * 6], documents_T=[0, 0, 1, 1, 1, 1], rows_T=[0, 0, 0, 0, 1, 1])
    assert follows_T(record).tolist() == [False, True, False, True, False, True]
    again = dataclasses.replace(record, positions_T=[0, 1, 0, 1, 2, 0])  # the last begins the document anew
    assert follows_T(again).tolist() == [False, True, False, True, False, False]


def slow_recall(record, fetched):
    """Every predictor with loops and dictionaries."""
    fitted_T, tested_N = prediction.tested_tokens(record)
    sets = record.experts_LTK.tolist()
    layers, experts = len(record.layers), range(record.num_experts)
    found = {name: [] for name in prediction.PREDICTORS}
    for layer in range(1, layers):
        learned = np.flatnonzero(fitted_T)
        popularity = {e: sum(e in sets[layer][t] for t in learned) for e in experts}
        times = {i: sum(i in sets[layer - 1][t] for t in learned) for i in experts}
        both = {(i, j): sum(i in sets[layer - 1][t] and j in sets[layer][t] for t in learned) for i in experts for j in experts}
        right = {name: [] for name in found}
        for t in tested_N:
            listed = {"popularity": [], "previous token": sets[layer][t - 1], "next-layer router": record.next_experts_LTK[layer - 1, t]}
            scores = {name: {e: 10 - list(first).index(e) if e in first else 0 for e in experts} for name, first in listed.items()}
            scores["transition"] = {j: sum(both[i, j] / times[i] for i in sets[layer - 1][t] if times[i]) for j in experts}
            for name, score in scores.items():
                order = sorted(experts, key=lambda e: (-round(score[e], 9), -popularity[e], e))
                right[name].append(np.mean([e in order[:fetched] for e in sets[layer][t]]))
        for name in found:
            found[name].append(np.mean(right[name]))
    return {name: np.mean(shares) for name, shares in found.items()}


@pytest.mark.parametrize("fetched", [2, 3])
def test_equals_a_slow_computation(fetched):
    random = np.random.default_rng(0)
    record = records.make(tokens=600, layers=3, experts=6, documents=12, by="token")
    next_LTK = np.concatenate([record.experts_LTK[1:], np.full((1, 600, 2), -1)])
    wrong_LT = random.random((3, 600)) < 0.3
    next_LTK[wrong_LT] = random.permutation(next_LTK[wrong_LT])
    record = dataclasses.replace(record, next_experts_LTK=next_LTK)
    found = prediction_recall(record, fetched)
    for name, expected in slow_recall(record, fetched).items():
        assert found[name].value == pytest.approx(expected), name


def planted(transition=0.0, sticky=0.0, router=0.0, tokens=16384):
    """Experts of 16, two per token: with the given probabilities a permutation of the layer before, those of the token before,
    and (next_experts) right; else uniform."""
    record = records.make(tokens=tokens, layers=3, experts=16, choices=2, documents=64, seed=3)
    random = np.random.default_rng(4)
    experts_LTK = record.experts_LTK.copy()
    for layer in range(1, 3):
        permutation_E = random.permutation(16)
        chosen_T = random.random(tokens) < transition
        experts_LTK[layer, chosen_T] = permutation_E[experts_LTK[layer - 1, chosen_T]]
    for layer, token in zip(*np.nonzero(random.random((3, tokens)) < sticky)):
        experts_LTK[layer, token] = experts_LTK[layer, max(token - 1, 0)]
    next_LTK = np.concatenate([experts_LTK[1:], np.full((1, tokens, 2), -1)])
    wrong_LT = random.random((3, tokens)) >= router
    next_LTK[wrong_LT] = records.make(tokens=tokens, layers=3, experts=16, choices=2, documents=64, seed=5).experts_LTK[wrong_LT]
    next_LTK[-1] = -1
    return dataclasses.replace(record, experts_LTK=experts_LTK, next_experts_LTK=next_LTK)


@pytest.mark.parametrize("what, expected", [
    ({"transition": 0.7}, {"transition": 0.7 + 0.3 / 8}), ({"sticky": 0.6}, {"previous token": 0.6 + 0.4 / 8}),
    ({"router": 0.9}, {"next-layer router": 0.9 + 0.1 / 8}), ({}, {})])
def test_planted_structure_is_found_by_whom_it_concerns_alone(what, expected):
    found = prediction_recall(planted(**what))
    for name in prediction.PREDICTORS:
        assert found[name].value == pytest.approx(expected.get(name, 2 / 16), abs=0.012), name
        if name not in expected:
            assert found[name].low - 0.006 < 2 / 16 < found[name].high + 0.006
    for best in expected:
        for name in set(prediction.PREDICTORS) - set(expected):
            key = f"{best} - {name}" if f"{best} - {name}" in found else f"{name} - {best}"
            assert min(abs(found[key].low), abs(found[key].high)) > 0.4


def test_the_table_agrees_with_the_function_and_says_what_is_lacking():
    record = planted(transition=0.5, router=0.8, tokens=4096)
    table = expert_prediction([record])
    assert sorted(set(table["prefetched"].tolist()))[:3] == [2, 3, 4] and table["prefetched"].max() == 16
    for name, interval in prediction_recall(record).items():
        if name in prediction.PREDICTORS:
            rows = table.where(predictor=name, prefetched=2)
            assert rows["layer"].tolist() == [3, 5] and rows["recall"].mean() == pytest.approx(interval.value)
            assert ((rows["low"] < rows["recall"]) & (rows["recall"] < rows["high"])).all()
    everything = table.where(prefetched=16)
    assert (everything["recall"] == 1).all() and (everything["exact"] == 1).all() and (everything["random_exact"] == 1).all()
    rows = table.where(prefetched=2, predictor="popularity")
    assert rows["random"].tolist() == [0.125] * 2 and rows["random_exact"].tolist() == [pytest.approx(1 / math.comb(16, 2))] * 2
    without = expert_prediction([dataclasses.replace(record, next_experts_LTK=None)])
    assert "next-layer router" not in without["predictor"] and "lacks next_experts_LTK" in without.caption


def test_where_tokens_have_any_number_of_experts_k_is_the_usual_one():
    table = expert_prediction([records.any_number(records.make(1 << 13, choices=6))])  # 0 to 6: three on average
    assert min(table["prefetched"]) == table.facts["experts_per_token"] == 3 and np.isnan(table["random_exact"]).all()
    rows = table.where(prefetched=3, predictor="popularity")
    np.testing.assert_allclose(rows["recall"], 3 / 8, atol=0.02)
    assert all(line.name.startswith("recall@3 of ") for line in table.headlines)


def test_more_tokens_than_are_held_at_once(monkeypatch):
    record = planted(transition=0.5, tokens=2048)
    whole = prediction_recall(record)
    monkeypatch.setattr(prediction, "_AT_ONCE", 100)
    assert {name: float(interval.value) for name, interval in prediction_recall(record).items()} == {
        name: float(interval.value) for name, interval in whole.items()}


def test_what_cannot_be_predicted_is_refused():
    record = records.make(tokens=256, documents=4)
    with pytest.raises(MissingArray, match="no documents_T"):
        expert_prediction([dataclasses.replace(record, documents_T=None)])
    with pytest.raises(MissingArray, match="two MoE layers; the record has one"):
        prediction_recall(records.make(tokens=256, documents=4, layers=1))
    with pytest.raises(MissingArray, match="No document is left"):
        prediction_recall(records.make(tokens=256, documents=1))


def test_overlap_of_consecutive_tokens_by_hand():
    # Pairs within documents: (0 1, 1 0) share two, (2 3, 3 0) one; 1 0 | 2 3 is across documents.
    table = token_overlap([tiny([[[0, 1], [1, 0], [2, 3], [3, 0]]])])
    assert table["shared"].tolist() == [1.5] and table["random"].tolist() == [1.0]
    # shares of tokens: 3/4, 2/4, 1/4, 2/4
    assert table["by_load"].tolist() == [pytest.approx((9 + 4 + 1 + 4) / 16)]


@pytest.mark.parametrize("sticky", [0.0, 0.5])
def test_overlap_of_planted_and_uniform_routing(sticky):
    table = token_overlap([planted(sticky=sticky)])
    np.testing.assert_allclose(table["shared"], sticky * 2 + (1 - sticky) * 4 / 16, atol=0.02)
    np.testing.assert_allclose(table["by_load"], 4 / 16, atol=0.005)
    assert (table["low"] <= table["shared"]).all() and (table["shared"] <= table["high"]).all()


def test_a_popular_expert_raises_the_overlap_by_load_alone():
    uniform = records.make(tokens=16384, layers=1, experts=16, choices=1, documents=64)
    popular_LT1 = np.random.default_rng(0).random((1, 16384, 1)) < 0.5
    table = token_overlap([dataclasses.replace(uniform, experts_LTK=np.where(popular_LT1, 0, uniform.experts_LTK))])
    assert table["shared"][0] == pytest.approx(table["by_load"][0], abs=0.01) and table["shared"][0] > 4 * table["random"][0]
