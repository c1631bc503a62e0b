"""Spread over experts by position and by token id: by hand, planted, and absent."""

import dataclasses

import numpy as np
import pytest
import records

from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.spread import std_by_position, std_by_token
from moe_jax.analysis.tables import MissingArray


def test_std_over_experts_by_hand():
    record = RoutingRecord(step=1, layers=(1,), num_experts=2, token_ids_T=np.array([7, 7, 7, 9]),
                           experts_LTK=np.array([[[0], [0], [1], [1]]]))
    table = std_by_token([record], least=1)
    # Id 7: ratios 2/3 and 1/3, each 1/6 from 1/2. Id 9: 1 and 0. All text: 1/2 and 1/2.
    np.testing.assert_allclose(table["std"], [1 / 6, 1 / 2])
    np.testing.assert_allclose(table["load_std"], 0)
    # Uniform: √(1/2 · 1/2 / n).
    np.testing.assert_allclose(table["uniform_std"], [0.5 / np.sqrt(3), 0.5])
    assert table["token_id"].tolist() == [7, 9] and table["tokens"].tolist() == [3, 1]
    assert std_by_token([record], least=2)["token_id"].tolist() == [7]


@pytest.mark.parametrize("by, sharp, flat", [("token", std_by_token, std_by_position), ("position", std_by_position, std_by_token)])
def test_what_is_planted_is_found_and_nothing_else(by, sharp, flat):
    record = [records.make(by=by, tokens=1 << 14, documents=256, choices=1, vocabulary=30)]
    found, = sharp(record).headlines
    assert found.low > 2 * found.reference
    # The load is uneven now; values that play no part show the load and its noise, and no more.
    none, = flat(record).headlines
    assert abs(none.value - none.reference) < 0.15 * none.reference


def test_uniform_routing_shows_its_noise_and_no_more():
    record = [records.make(tokens=1 << 14, documents=256)]
    for compute in (std_by_token, std_by_position):
        table = compute(record)
        assert table.headlines[0].low < table.headlines[0].reference < table.headlines[0].high
        np.testing.assert_allclose(table["std"].mean(), table["uniform_std"].mean(), rtol=0.1)
        assert table["std"].mean() > 0.005  # not 0, however uniform


def test_rare_values_are_left_out_and_too_few_tokens_said():
    with pytest.raises(MissingArray, match="No position has 128 tokens"):
        std_by_position([records.make(tokens=512, documents=4)])
    with pytest.raises(MissingArray, match="no positions_T"):
        std_by_position([dataclasses.replace(records.make(512, documents=4), positions_T=None)])
