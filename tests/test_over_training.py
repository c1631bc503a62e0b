"""Saturation and tokens over training: by hand, planted, and absent."""

import dataclasses

import numpy as np
import pytest
import records

from moe_jax.analysis.over_training import cosine, divergence, overlap, saturation, token_over_training, token_stability
from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.tables import MissingArray

LAST = RoutingRecord(step=20, layers=(1,), num_experts=4, token_ids_T=np.array([3, 3, 5]), documents_T=np.array([0, 0, 1]),
                     experts_LTK=np.array([[[0, 1], [2, 3], [1, -1]]]))
FIRST = dataclasses.replace(LAST, step=10, experts_LTK=np.array([[[1, 2], [3, 2], [0, -1]]]))


def test_saturation_by_hand():
    assert [part.tolist() for part in overlap(FIRST.experts_LTK[0].astype(int), LAST.experts_LTK[0].astype(int))] == [[1, 2, 0], [2, 2, 1]]
    table = saturation([FIRST, LAST])
    assert table["step"].tolist() == [10, 20]
    np.testing.assert_allclose(table["saturation"], [(1 / 2 + 2 / 2 + 0) / 3, 1])
    np.testing.assert_allclose(table["random"], 5 / 3 / 4)
    # Shares of the tokens that choose each expert: (1, 1, 2, 1) / 3 before, (1, 2, 1, 1) / 3 at the end; k = 5/3.
    np.testing.assert_allclose(table["independent"][0], (1 + 2 + 2 + 1) / 9 / (5 / 3))


def between(early, late, share, seed):
    """A record in which this share of the tokens, in each layer, has the experts of `late` already."""
    taken_LT1 = np.random.default_rng(seed).random((*late.experts_LTK.shape[:2], 1)) < share
    return dataclasses.replace(late, step=early.step, experts_LTK=np.where(taken_LT1, late.experts_LTK, early.experts_LTK))


def test_planted_saturation_is_found_and_random_routing_shows_none():
    late = records.make(experts=16, step=300)
    early = [records.make(experts=16, step=step, seed=step) for step in (100, 200)]
    table = saturation([between(early[0], late, 0.3, 0), between(early[1], late, 0.7, 1), late])
    by_step = table["saturation"].reshape(3, 2).mean(axis=1)
    np.testing.assert_allclose(by_step, [0.3 + 0.7 * 2 / 16, 0.7 + 0.3 * 2 / 16, 1.0], atol=0.02)
    found, = saturation([between(early[0], late, 0.0, 0), late]).headlines
    assert found.low < 2 / 16 < found.high and abs(found.reference - 2 / 16) < 0.002


def test_one_tokens_experts_over_training_by_hand():
    table = token_over_training([FIRST, LAST], ids=[3])
    assert table["step"].tolist() == [10] * 4 + [20] * 4 and table["choices"].tolist() == [0, 1, 2, 1, 1, 1, 1, 1]
    np.testing.assert_allclose(table["ratio"][:4], [0, 1 / 4, 2 / 4, 1 / 4])
    assert token_over_training([FIRST, LAST])["token_id"].tolist() == ([3] * 4 + [5] * 4) * 2


def test_cosine_and_divergence_by_hand():
    a, b, c = np.array([1.0, 0, 0]), np.array([0, 1.0, 0]), np.array([0.5, 0.5, 0])
    assert cosine(a, a) == 1 and cosine(a, b) == 0 and cosine(a, 0 * a) == 0
    np.testing.assert_allclose(cosine(a, c), np.sqrt(0.5))
    assert divergence(a, a) == 0 and divergence(a, b) == 1
    # Between (1, 0) and (1/2, 1/2): H(3/4, 1/4) - (0 + 1) / 2 = 0.8113 - 0.5.
    np.testing.assert_allclose(divergence(a, c), 0.75 * np.log2(4 / 3) + 0.25 * 2 - 0.5)


def test_tokens_that_found_their_experts_early_are_told_from_those_that_did_not():
    late, other = (records.make(by="token", step=step, seed=step, vocabulary=12) for step in (300, 100))
    late = dataclasses.replace(late, token_ids_T=other.token_ids_T)
    favourites = records.make(by="token", step=200, seed=100, vocabulary=12)  # the same favourites as `other`
    settled = token_stability([other, favourites])
    assert settled.headlines[0].value > 0.99 > settled.headlines[0].reference + 0.3
    # Favourites dealt out anew between the steps: a token is as unlike itself as unlike others.
    moved, = token_stability([other, dataclasses.replace(late, experts_LTK=records.make(
        by="token", seed=100, vocabulary=12).experts_LTK[::-1])]).headlines
    assert moved.value < 0.75
    uniform, = token_stability([records.make(step=1), dataclasses.replace(records.make(step=2), experts_LTK=records.make(seed=9).experts_LTK)]).headlines
    assert abs(uniform.value - uniform.reference) < 0.01  # all are alike: nothing of their own


def test_rare_tokens_are_said():
    with pytest.raises(MissingArray, match="Fewer than two token ids"):
        token_stability([FIRST, LAST])
