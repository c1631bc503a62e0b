"""Co-activation: by hand, against counting pair by pair, planted, and absent."""

import dataclasses
import itertools

import numpy as np
import pytest
import records

from moe_jax.analysis.coactivation import coactivation, coactivation_across_layers, pair_counts
from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.tables import MissingArray

TINY = RoutingRecord(step=1, layers=(1, 3), num_experts=3, token_ids_T=np.zeros(3, int),
                     experts_LTK=np.array([[[0, 1], [0, 1], [2, 0]], [[2, 1], [2, -1], [1, 0]]]))


def test_coactivation_by_hand():
    rows = coactivation([TINY]).where(layer=1)
    pairs = dict(zip(zip(rows["expert"].tolist(), rows["other"].tolist()), rows["ratio"].tolist()))
    # Expert 0 is chosen three times, twice with 1 and once with 2.
    assert pairs == {(0, 1): 2 / 3, (0, 2): 1 / 3, (1, 0): 1, (1, 2): 0, (2, 0): 1, (2, 1): 0}
    assert (rows["uniform"] == 1 / 2).all()


def test_coactivation_across_layers_by_hand():
    table = coactivation_across_layers([TINY])
    ratio = table["ratio"].reshape(3, 3)
    # The tokens of expert 0 go on to {2, 1}, {2} and {1, 0}; those of 1 to {2, 1} and {2}; that of 2 to {1, 0}.
    np.testing.assert_allclose(ratio, [[1 / 3, 2 / 3, 2 / 3], [0, 1 / 2, 1], [1, 1, 0]])
    # Two, one and two experts: 5/3 on average, of three.
    assert set(table["layer"]) == {1} and np.allclose(table["uniform"], 5 / 9)


def test_all_pairs_are_counted_not_only_neighbours_in_rank():
    record = records.make(600, layers=2, experts=6, choices=4, documents=6)
    a, b = record.experts_LTK.astype(int)
    b[::7, 2] = -1
    block_T = np.arange(600) % 3
    slow = np.zeros((3, 6, 6))
    for block, i_K, j_K in zip(block_T, a.tolist(), b.tolist()):
        for i, j in itertools.product(i_K, j_K):
            if j >= 0:
                slow[block, i, j] += 1
    np.testing.assert_array_equal(pair_counts(a, b, 6, block_T), slow)


@pytest.mark.parametrize("compute, planted", [
    # Sets are drawn by token id, so that experts of a set, and of the sets of two layers, go together.
    (coactivation, 0.9), (coactivation_across_layers, 0.9)])
def test_planted_pairs_are_found_and_uniform_routing_shows_none(compute, planted):
    record = records.make(by="token", strength=1.0, vocabulary=4, experts=32)
    found, = compute([record]).headlines
    assert found.value > planted and found.low > 1.5 * found.reference
    for seed in range(3):
        none, = compute([records.make(seed=seed)]).headlines
        assert none.low < none.reference < none.high


@pytest.mark.parametrize("compute", [coactivation, coactivation_across_layers])
def test_the_reference_knows_how_many_experts_tokens_have(compute):
    table = compute([records.any_number(records.make(1 << 14, choices=6))])
    np.testing.assert_allclose(table["ratio"].mean(), table["uniform"].mean(), rtol=0.01)
    assert abs(table.headlines[0].value / table.headlines[0].reference - 1) < 0.03


def test_an_expert_that_all_tokens_choose_is_no_pair():
    # Expert 0 is every token's first choice and the second is random: all experts have 0 beside them, none has a partner.
    random = records.make(layers=2, choices=1, experts=7).experts_LTK + 1
    record = dataclasses.replace(records.make(layers=2), experts_LTK=np.concatenate([np.zeros_like(random), random], axis=-1))
    for compute in (coactivation, coactivation_across_layers):
        found, = compute([record]).headlines
        assert found.value > 0.8 and abs(found.value - found.reference) < 0.01


def test_what_cannot_be_counted_is_said():
    with pytest.raises(MissingArray, match="chooses one expert"):
        coactivation([records.make(256, documents=4, choices=1)])
    with pytest.raises(MissingArray, match="one MoE layer"):
        coactivation_across_layers([records.make(256, documents=4, layers=1)])
