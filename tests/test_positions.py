"""Routing and drops by position, source and turn: by hand, planted, and absent."""

import dataclasses

import numpy as np
import pytest
import records

from moe_jax.analysis.positions import drops, drops_by_source, drops_by_turn, routing_by_position
from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.tables import MissingArray

# Two rows of two tokens, one layer, two choices; one token has one choice only.
TINY = RoutingRecord(
    step=1, layers=(3,), num_experts=4, token_ids_T=np.zeros(4, int), row_positions_T=np.array([0, 1, 0, 1]),
    rows_T=np.array([0, 0, 1, 1]), documents_T=np.array([0, 0, 1, 1]), domains_T=np.array([0, 0, 1, 1]), domains=("a", "b"),
    turns_T=np.array([1, 2, 1, 1]), experts_LTK=np.array([[[0, 1], [0, 2], [3, -1], [1, 2]]]),
    kept_LTK=np.array([[[True, True], [False, True], [True, True], [False, False]]]))


def test_drop_ratios_by_hand():
    table = drops([TINY])
    assert table["choices"].tolist() == [3, 4] and table["dropped"].tolist() == [0, 3]
    np.testing.assert_allclose(table["ratio"], [0, 3 / 4])
    first, last = table.headlines
    assert (first.value, last.value, last.reference) == (0, 3 / 4, 0)


def test_drop_ratios_by_source_and_turn_by_hand():
    table = drops_by_source([TINY])  # the row's two places are two bins
    assert table["domain"].tolist() == ["a", "a", "b", "b"] and table["position"].tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(table["ratio"], [0, 1 / 2, 0, 1])
    np.testing.assert_allclose(table.headlines[0].value, 3 / 7)
    turns = drops_by_turn([TINY])  # document 1 has a single turn
    assert turns["group"].tolist() == ["single turn", "turn 1", "turn 2"]
    assert turns["choices"].tolist() == [3, 2, 2] and turns["dropped"].tolist() == [2, 0, 1]
    assert [line.value for line in turns.headlines] == [2 / 3, 1 / 4]


def test_full_buffers_drop_the_end_of_the_row():
    free = records.make(tokens=8192, row=128, turns=4, documents=64)  # one document to a row
    record = dataclasses.replace(free, kept_LTK=records.places_run_out(free, 24))  # of 128 · 2 / 8 = 32 wanted on average
    table = drops([record])
    first, last = table.headlines
    assert first.value == 0 and last.low > 0.5 and last.reference == first.value
    # Everybody who found a place is counted: 24 places, 8 experts, 64 rows, as long as all of them fill up.
    kept = table["choices"].sum() - table["dropped"].sum()
    np.testing.assert_allclose(kept, 2 * 64 * 8 * 24, rtol=0.02)
    assert (np.diff(drops_by_turn([record])["ratio"].reshape(2, 4)) >= 0).all()


def test_without_drops_there_are_none():
    found = drops([records.make()])
    assert not found["dropped"].any() and not found["ratio"].any()
    with pytest.raises(MissingArray, match="no kept_LTK"):
        drops([dataclasses.replace(records.make(), kept_LTK=None)])


def test_the_papers_positions_or_positions_spread_over_what_is_there():
    long = records.make(tokens=2000 * 128, layers=1, documents=128)
    assert list(dict.fromkeys(routing_by_position([long])["position"])) == [
        "256", "257", "258", "259", "512", "768", "1024", "1280", "1536", "1792"]
    short = records.make(tokens=64 * 15, documents=64)  # positions 0 … 14
    assert list(dict.fromkeys(routing_by_position([short])["position"])) == ["2", "3", "4", "5", "6", "8", "10", "12", "14"]


def test_planted_positions_are_found_and_uniform_routing_shows_none():
    planted, = routing_by_position([records.make(by="position")]).headlines
    assert planted.low > 3 * planted.reference
    for by in (None, "token", "document"):
        none, = routing_by_position([records.make(by=by)]).headlines
        assert none.low < none.reference < none.high
