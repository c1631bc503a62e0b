"""Specialisation of domains and turns: by hand, planted, and absent."""

import dataclasses

import numpy as np
import pytest
import records

from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.specialisation import (
    domain_specialisation, routing_by_category, routing_by_domain, routing_by_turn, turn_codes)
from moe_jax.analysis.tables import MissingArray

# Two domains of two and one tokens, one layer, 3 experts.
TINY = RoutingRecord(
    step=1, layers=(5,), num_experts=3, token_ids_T=np.zeros(3, int), experts_LTK=np.array([[[0, 1], [0, 2], [2, 1]]]),
    kept_LTK=np.array([[[True, True], [True, False], [True, True]]]), domains_T=np.array([0, 0, 1]),
    documents_T=np.array([0, 1, 2]), domains=("code", "docs"))


def test_routing_ratio_by_hand():
    table = routing_by_domain([TINY])
    # code: four choices, one dropped: two to expert 0, one to expert 1. docs: one each to experts 1 and 2.
    assert table["choices"].tolist() == [2, 1, 0, 0, 1, 1]
    np.testing.assert_allclose(table["ratio"], [2 / 3, 1 / 3, 0, 0, 1 / 2, 1 / 2])
    assert table["domain"].tolist() == ["code"] * 3 + ["docs"] * 3 and set(table["layer"]) == {5}
    # All text: (2, 2, 1) / 5. code is (4/15 + 1/15 + 1/5) / 2 = 4/15 away, docs (2/5 + 1/10 + 3/10) / 2 = 2/5.
    np.testing.assert_allclose(table.headlines[0].value, (4 / 15 + 2 / 5) / 2)
    assert table.headlines[0].reference is None  # docs is one document, whose noise nobody knows


def test_domain_specialisation_by_hand():
    table = domain_specialisation([TINY])
    # Both tokens of code choose expert 0, one each 1 and 2; choices count although one was dropped.
    np.testing.assert_allclose(table["share"], [1, 1 / 2, 1 / 2, 0, 1, 1])
    np.testing.assert_allclose(table["uniform"], 2 / 3)
    np.testing.assert_allclose(table.headlines[0].value, 1.0)


@pytest.mark.parametrize("compute", [routing_by_domain, domain_specialisation])
def test_planted_domains_are_found_and_uniform_routing_shows_none(compute):
    planted, = compute([records.make(by="domain", domains=4, experts=16)]).headlines
    assert planted.low > 1.5 * planted.reference
    for seed in range(3):
        none, = compute([records.make(domains=4, experts=16, seed=seed)]).headlines
        assert none.low < none.reference < none.high


def test_a_load_that_all_domains_share_is_no_specialisation():
    found, = routing_by_domain([records.make(by="token", domains=4, strength=1.0, vocabulary=5)]).headlines
    assert found.low < found.reference < found.high


def test_documents_that_differ_are_not_mistaken_for_domains():
    # Each document has favourites of its own, domains have none: with the noise of tokens alone this would look planted.
    found, = routing_by_domain([records.make(by="document", domains=4, documents=128, tokens=8192, choices=1)]).headlines
    assert found.low < found.reference < found.high and found.reference > 0.05


def test_planted_domains_have_their_planted_share():
    # With probability 0.8 the favourites, else 2 of 16 at random: 0.8 + 0.2/8 of the tokens.
    table = domain_specialisation([records.make(by="domain", domains=4, experts=16, tokens=1 << 14)])
    top = np.sort(table["share"].reshape(2, 4, 16), axis=-1)
    np.testing.assert_allclose(top[..., -2:], 0.825, atol=0.03)
    np.testing.assert_allclose(top[..., :-2], 0.025, atol=0.015)


def test_any_category_can_be_given():
    table = routing_by_category(TINY, np.array([0, -1, 1]), ["short", "long"], "length")
    assert table["choices"].tolist() == [1, 1, 0, 0, 1, 1] and table["length"].tolist() == ["short"] * 3 + ["long"] * 3


# Turns.


def test_conversations_of_one_and_of_several_turns():
    record = dataclasses.replace(records.make(8, documents=2, row=8), documents_T=np.array([0, 0, 1, 1, 1, 1, 2, 2]),
                                 turns_T=np.array([1, 1, 1, 2, 2, 12, 0, 0]))
    code_T, names = turn_codes(record)
    assert names == ["single turn", "turn 1", "turn 2", "turn 8 and later"]
    assert code_T.tolist() == [0, 0, 1, 2, 2, 3, -1, -1]


def test_planted_turns_are_found_and_uniform_routing_shows_none():
    planted, = routing_by_turn([records.make(by="turn", turns=4)]).headlines
    assert planted.low > 3 * planted.reference
    for by in (None, "domain"):  # whatever documents do, their turns are alike
        none, = routing_by_turn([records.make(by=by, turns=4)]).headlines
        assert none.low < none.reference < none.high
    table = routing_by_turn([records.make(turns=4, tokens=1 << 14)])
    np.testing.assert_allclose(table["distance"].mean(), table["uniform_distance"].mean(), rtol=0.25)


def test_text_without_turns_is_said():
    with pytest.raises(MissingArray, match="no turns"):
        routing_by_turn([records.make(256, documents=4)])
