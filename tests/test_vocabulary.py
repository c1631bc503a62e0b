"""Token ids and their experts: by hand, planted, and absent."""

import dataclasses

import numpy as np
import pytest
import records

from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.tables import MissingArray
from moe_jax.analysis.vocabulary import codes_of, routing_by_token, top_tokens, vocabulary_specialisation

# Id 4 three times, id 8 twice; 3 experts, 2 choices.
TINY = RoutingRecord(
    step=1, layers=(2,), num_experts=3, token_ids_T=np.array([4, 8, 4, 4, 8]), target_ids_T=np.array([8, 4, 4, 8, -1]),
    experts_LTK=np.array([[[0, 1], [2, 1], [0, 2], [1, 0], [2, 0]]]), documents_T=np.array([0, 0, 1, 1, 1]),
    token_texts=tuple("abcdefghi"))


def test_codes_of_wanted_values():
    assert codes_of(np.array([4, 8, 5, 0, 9]), np.array([8, 4])).tolist() == [1, 0, -1, -1, -1]


def test_routing_ratio_of_token_ids_by_hand():
    table = routing_by_token([TINY])
    assert table["token_id"].tolist() == [4] * 3 + [8] * 3 and table["token"].tolist() == ["e"] * 3 + ["i"] * 3
    np.testing.assert_allclose(table["ratio"], [3 / 6, 2 / 6, 1 / 6, 1 / 4, 1 / 4, 2 / 4])
    assert set(routing_by_token([TINY], ids=[8])["token_id"]) == {8}
    twins = dataclasses.replace(TINY, token_texts=("x",) * 9)
    assert set(routing_by_token([twins])["token"]) == {"x #4", "x #8"}


def test_top_tokens_by_hand():
    table = top_tokens([TINY])
    # Expert 0: id 4 three times, id 8 once. Expert 1: twice, once. Expert 2: id 8 twice, id 4 once.
    assert table["token_id"].tolist() == [4, 8, 4, 8, 8, 4] and table["count"].tolist() == [3, 1, 2, 1, 2, 1]
    assert table["rank"].tolist() == [1, 2] * 3 and table["text"].tolist() == list("eieiie")
    np.testing.assert_allclose(table["share_of_expert"][:2], [3 / 4, 1 / 4])
    np.testing.assert_allclose(table["share_of_token"], [3 / 6, 1 / 4, 2 / 6, 1 / 4, 2 / 4, 1 / 6])
    assert top_tokens([TINY], most=1)["token_id"].tolist() == [4, 4, 8]


def test_vocabulary_specialisation_by_hand():
    table = vocabulary_specialisation([TINY], least=2)
    assert table["kind"].tolist() == ["input"] * 2 + ["ground truth"] * 2  # nothing was predicted
    # Input 4 goes to expert 0 each time, 8 to 2. As a target 4 is seen at (2, 1), (0, 2), and 8 at (0, 1), (1, 0).
    np.testing.assert_allclose(table["share"], 1.0)
    assert table["expert"].tolist() == [0, 2, 2, 0]
    np.testing.assert_allclose(table["load"], 4 / 5)  # expert 0
    assert vocabulary_specialisation([TINY], least=3)["token_id"].tolist() == [4]
    with pytest.raises(MissingArray, match="No token id occurs 4 times"):
        vocabulary_specialisation([TINY], least=4)


def test_planted_token_ids_are_found_by_the_kind_that_is_planted():
    record = records.make(by="token", tokens=1 << 14, documents=128)
    found = {line.name.split(",")[0].split()[-1] + line.name.split(",")[1].split(":")[0]: line
             for line in vocabulary_specialisation([record]).headlines}
    given, truth = found["specialisation input"], found["specialisation ground truth"]
    assert abs(given.value - (0.8 + 0.2 * 2 / 8)) < 0.02 and given.low > 1.5 * given.reference  # 2 favourites of 8 experts
    assert abs(truth.value - truth.reference) < 0.03 * truth.reference  # ids follow each other at random
    moved = dataclasses.replace(record, target_ids_T=record.token_ids_T, token_ids_T=record.target_ids_T)
    assert vocabulary_specialisation([moved]).headlines[1].value == given.value


def test_uniform_routing_shows_no_vocabulary():
    for seed in range(2):
        table = vocabulary_specialisation([records.make(tokens=1 << 14, documents=128, seed=seed)])
        for line in table.headlines:
            assert line.low < line.reference < line.high
        np.testing.assert_allclose(table["share"].mean(), table["uniform"].mean(), rtol=0.02)
        assert table["uniform"].mean() > 1.03 * 2 / 8  # the best of 8 noisy shares


def test_the_reference_knows_how_many_experts_tokens_have():
    table = vocabulary_specialisation([records.any_number(records.make(1 << 14, documents=128, choices=4))])
    np.testing.assert_allclose(table["share"].mean(), table["uniform"].mean(), rtol=0.02)


def test_planted_ids_lead_the_lists_of_their_experts():
    record = records.make(by="token", strength=1.0, layers=1, choices=1, vocabulary=10)
    table = top_tokens([record])
    assert (table["share_of_token"] == 1).all()
    none = top_tokens([records.make(tokens=1 << 14)])
    np.testing.assert_allclose(none["share_of_token"], 1 / 8, atol=0.08)
    planted, = routing_by_token([record]).headlines
    assert planted.low > 3 * planted.reference
    uniform, = routing_by_token([records.make()]).headlines
    assert uniform.low < uniform.reference < uniform.high
