"""Repeated choices of consecutive tokens: by hand, Mixtral's baselines, planted, and absent."""

import dataclasses
import itertools

import numpy as np
import pytest
import records

from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.repeats import consecutive, random_overlap, repeated_choices
from moe_jax.analysis.tables import MissingArray

# Document 0 has three tokens and goes on in another row, document 1 two.
TINY = RoutingRecord(
    step=1, layers=(1,), num_experts=4, token_ids_T=np.zeros(6, int), documents_T=np.array([0, 0, 0, 0, 1, 1]),
    rows_T=np.array([0, 0, 0, 1, 1, 1]), positions_T=np.array([0, 1, 2, 0, 0, 1]), domains_T=np.array([0, 0, 0, 0, 1, 1]),
    domains=("a", "b"), experts_LTK=np.array([[[0, 1], [0, 2], [1, 0], [1, 3], [2, 3], [1, 0]]]))


def test_pairs_stay_in_a_document_and_a_row():
    assert [part.tolist() for part in consecutive(TINY)] == [[0, 1, 4], [1, 2, 5]]
    with pytest.raises(MissingArray, match="no two consecutive"):
        repeated_choices([dataclasses.replace(TINY, positions_T=np.zeros(6, int))])


def test_repeats_by_hand():
    table = repeated_choices([TINY])
    assert table["domain"].tolist() == ["all", "a", "b"] and table["pairs"].tolist() == [3, 2, 1]
    np.testing.assert_allclose(table["first"], [1 / 3, 1 / 2, 0])  # 0 0; 0 1; 2 1
    np.testing.assert_allclose(table["any"], [2 / 3, 1, 0])  # {0, 1} {0, 2}; {0, 2} {1, 0}; {2, 3} {1, 0}
    np.testing.assert_allclose(table["first_independent"], (2**2 + 3**2 + 1) / 36)  # 0 twice, 1 three times, 2 once


def test_the_random_baselines():
    np.testing.assert_allclose(random_overlap(8, 2), 1 - 6 / 8 * 5 / 7)  # Mixtral's 46 %
    sets = list(itertools.combinations(range(6), 3))
    np.testing.assert_allclose(random_overlap(6, 3), np.mean([bool({*a} & {*b}) for a in sets for b in sets]))
    assert random_overlap(8, 1) == 1 / 8 and random_overlap(4, 3) == 1
    assert random_overlap(8, 2, 1) == 1 - 6 / 8 and random_overlap(8, 2, 0) == random_overlap(8, 0, 2) == 0


def test_the_baseline_knows_how_many_experts_tokens_have():
    record = records.any_number(records.make(1 << 16, choices=4, experts=16))
    table = repeated_choices([record])
    for name in ("first", "any"):
        np.testing.assert_allclose(table[name], table[f"{name}_random"], rtol=0.08)
    assert table["any_random"][0] < random_overlap(16, 4) / 2


def test_planted_repeats_are_found_and_uniform_routing_shows_none():
    # A document's favourites are taken 4 times in 5: both tokens 0.64 of the time, when the sets are the same.
    found = repeated_choices([records.make(by="document", experts=16)]).headlines
    assert found[1].low > 0.6 and found[0].low > 0.3 > 2 * found[0].reference
    for seed in range(3):
        for line in repeated_choices([records.make(seed=seed)]).headlines:
            assert line.low < line.reference < line.high
