"""The conversations of experiments/multi_turn, by hand."""

import numpy as np
import pytest

from experiments.multi_turn.conversations import CONTEXTS, HEADING, Question, batches_of, questions_by_module, rows_of
from moe_jax.data.token_store import SplitTokens, TokenStore
from moe_jax.data.vocabularies import EOS_ID, PAD_ID, ByteVocabulary

VOCABULARY = ByteVocabulary()
ENCODED_HEADING = VOCABULARY.encode(HEADING)


def module(*names):
    return [Question.of(name, f"It is {name}.", VOCABULARY) for name in names]


def text(tokens):
    return VOCABULARY.decode(tokens.tolist())


def test_the_same_answer_is_asked_for_in_each_context():
    contexts = rows_of([module("f1", "f2", "f3", "f4"), module("g1", "g2", "g3")], ENCODED_HEADING, 400, 100)[0]
    turn = lambda name: f"### User:\nWhat does {name} do?\n\n### Assistant:\nIt is {name}.\n\n"
    ask = "What does f1 do?\n\n### Assistant:\n"
    example = lambda name: f"What does {name} do? It is {name}.\n"
    found = dict(zip(CONTEXTS, (text(context) for context, _ in contexts)))
    assert found["single"] == f"### User:\n{ask}"
    assert found["second"] == f"{turn('f2')}### User:\n{ask}"
    assert found["multi-turn"] == f"{turn('f2')}{turn('f3')}{turn('f4')}### User:\n{ask}"
    assert found["few-shot"] == f"### User:\n{example('g1')}{example('g2')}{example('g3')}{ask}"
    assert {text(answer) for _, answer in contexts} == {"It is f1.\n"}


def test_rows_are_never_too_long_and_questions_without_enough_before_them_are_left_out():
    modules = [module(*(f"f{n}" for n in range(9))), module(*(f"g{n}" for n in range(9))), module("h0", "h1")]
    rows = rows_of(modules, ENCODED_HEADING, 300, 100)
    assert len(rows) == 18  # h has one other question only
    lengths = [len(context) + len(answer) for contexts in rows for context, answer in contexts]
    assert max(lengths) <= 300 and max(lengths) > 300 - len(module("f0")[0].turn)
    assert len(rows_of(modules, ENCODED_HEADING, 300, 7)) == 7
    assert rows_of(modules, ENCODED_HEADING, 200, 100) == []  # two turns fit, not three


def test_only_tokens_of_the_asked_answer_count():
    rows = rows_of([module("f1", "f2", "f3", "f4"), module("g1", "g2", "g3")], ENCODED_HEADING, 400, 100)
    batches = batches_of(rows, 3, 400)
    assert len(batches) == -(-len(rows) * 4 // 3)
    batch, (context, answer) = batches[0], rows[0][2]
    counted = batch["domain_ids"][2] >= 0
    assert text(batch["target_ids"][2][counted]) == "It is f1.\n" and (batch["domain_ids"][2][counted] == 2).all()
    here = np.flatnonzero(counted)
    assert here[0] == len(context) and batch["valid"][2].sum() == len(context) + len(answer)
    np.testing.assert_array_equal(batch["input_ids"][2, 1:][batch["valid"][2, 1:]], np.concatenate([context, answer])[:-1])
    assert batch["input_ids"][2, 0] == PAD_ID and (batch["target_ids"][2][~batch["valid"][2]] == PAD_ID).all()


@pytest.mark.parametrize("domain, expected", [("docs", ["What does g do?"]), ("code", [])])
def test_questions_come_from_held_out_documentation(domain, expected):
    """The module's own docstring has no name; a docstring of several lines gives its first."""
    source = "About the module.\n\n\ng\n\nDoes it.\n\nMore.\n\n\nnot a name\n\nText."
    tokens = np.append(VOCABULARY.encode(source), EOS_ID)
    split = SplitTokens(tokens, np.array([0, len(tokens)]), np.zeros(1, np.int32), np.zeros(1, np.int32), "")
    domains = [domain, "docs"] if domain == "code" else ["docs"]
    found = questions_by_module(TokenStore("", "", domains, {"validation": split}, {}), VOCABULARY)
    assert [text(each.ask).split("\n")[0] for each in sum(found, [])] == expected
    assert all(text(each.answer) == "Does it.\n" for each in sum(found, []))
