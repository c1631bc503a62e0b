"""Token classes and the entropy of their routing: by hand, planted, and absent."""

import dataclasses
import math

import numpy as np
import pytest
import records

from moe_jax.analysis.tables import MissingArray
from moe_jax.analysis.token_classes import CLASSES, class_codes, class_of, entropy, information, token_classes


@pytest.mark.parametrize("text, name", [
    ("", "special"), ("<start>", "special"), ("<", "punctuation"), ("<=>", "special"), (" ", "white space"), ("\n\t", "white space"),
    ("▁", "white space"), ("42", "digits"), (" 3.14", "digits"), ("1_000,5", "digits"), ("...", "punctuation"), (" ->", "punctuation"),
    ("_", "punctuation"), (" if", "keyword"), ("return", "keyword"), ("▁None", "keyword"), (" The", "Capitalised"), ("MyClass", "Capitalised"),
    (" word", "word"), ("Ġword", "word"), (" snake_case", "word"), ("ing", "piece"), ("é", "piece"), ("x1", "other"), ("self.", "other")])
def test_classes_by_their_rules(text, name):
    assert class_of(text) == name and name in CLASSES


def test_entropy_and_information_by_hand():
    np.testing.assert_allclose(entropy(np.array([[1, 1], [3, 1], [5, 0]])),
                               [math.log(2), math.log(4) - 0.75 * math.log(3), 0], atol=1e-12)
    # Two categories with an expert each: the category tells all of ln 2. Alike: nothing.
    np.testing.assert_allclose(information(np.array([[[2, 0], [0, 2]], [[1, 1], [3, 3]]])), [math.log(2), 0], atol=1e-12)


TEXTS = (" the", ".", " if", "foo", " Bar", "x1", "\n", "12")


def of_classes(**options):
    return records.make(tokens=1 << 14, documents=128, vocabulary=8, token_texts=TEXTS, **options)


def test_planted_classes_are_found():
    # One id to a class: every class goes to its one expert, 4 times in 5.
    table = token_classes([of_classes(by="token", choices=1)])
    share = np.array([0.8 + 0.2 / 8] + [0.2 / 8] * 7)
    np.testing.assert_allclose(table["entropy"], -(share * np.log(share)).sum(), atol=0.12)
    assert table.headlines[0].low > 100 * table.headlines[0].reference
    assert set(table["class"]) == {"word", "punctuation", "keyword", "piece", "Capitalised", "other", "white space", "digits"}


def test_uniform_routing_shows_no_classes():
    for seed in range(2):
        table = token_classes([of_classes(seed=seed)])
        np.testing.assert_allclose(table["entropy"], table["uniform"], atol=0.004)
        found, = table.headlines
        assert found.low < found.reference < found.high


def test_uniform_routing_to_several_experts_falls_short_of_the_largest_entropy_by_less():
    missed = []
    for seed in range(20):
        record = records.make(4000, layers=2, choices=4, documents=20, seed=seed, token_texts=("a", "1"),
                              token_ids_T=np.where(np.arange(4000) < 100, 0, 1))
        rows = token_classes([record]).where(**{"class": "piece"})
        np.testing.assert_allclose(rows["uniform"], np.log(8) - (8 - 4) / 2 / 400, rtol=1e-9)
        missed += (rows["uniform"] - rows["entropy"]).tolist()
    assert abs(np.mean(missed)) < 0.001  # by (E - 1) / 2n it would be -0.004


def test_rare_classes_are_left_out_and_missing_texts_said():
    record = records.make(250, documents=5, vocabulary=2, token_texts=("a", "1"),
                          token_ids_T=np.repeat([0, 1], [160, 90]))
    code_T, names = class_codes(record)
    assert names == ["piece"] and (code_T[:160] == 0).all() and (code_T[160:] == -1).all()
    with pytest.raises(MissingArray, match="no token_texts"):
        token_classes([dataclasses.replace(record, token_texts=())])
