"""Turns of conversations: written out from .jsonl, found again in the tokens, also of documents cut by rows."""

import json

import numpy as np
import pytest

from moe_jax.analysis.turns import TURN_SEPARATOR, turns_of_text, with_turns
from moe_jax.config import DataConfig
from moe_jax.data.batches import open_data
from moe_jax.data.corpora import conversation
from moe_jax.data.documents import CorpusError
from moe_jax.data.vocabularies import ByteVocabulary

CHAT = [{"role": "system", "content": "be kind"}, {"from": "human", "value": "ä?"}, {"from": "gpt", "value": "b"}, "c?"]
TEXT = "### System:\nbe kind\n\n### User:\nä?\n\n### Assistant:\nb\n\n### User:\nc?\n"


def test_a_conversation_has_a_heading_for_each_speaker():
    assert conversation(CHAT) == TEXT
    assert conversation([1]) is None and conversation([{"role": "user"}]) is None and conversation([["a"]]) is None


def test_turns_by_hand():
    vocabulary = ByteVocabulary()
    tokens_N = np.append(vocabulary.encode(TEXT), vocabulary.eos_id)
    turns_N, text = turns_of_text(tokens_N, vocabulary, TURN_SEPARATOR), TEXT.encode()
    first, second = text.index(b"\n### User:"), text.rindex(b"\n### User:")
    assert turns_N.tolist() == [0] * first + [1] * (second - first) + [2] * (len(text) - second + 1)
    # At the very beginning the line break is missing.
    assert turns_of_text(vocabulary.encode("### User:\na"), vocabulary, TURN_SEPARATOR).tolist() == [1] * 11
    assert turns_of_text(vocabulary.encode("no turn"), vocabulary, TURN_SEPARATOR).tolist() == [0] * 7
    assert turns_of_text(vocabulary.encode("a--b--c"), vocabulary, "--").tolist() == [0, 1, 1, 1, 2, 2, 2]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Forty conversations of one to four turns of the user, longer than a row."""
    random, path = np.random.default_rng(0), tmp_path_factory.mktemp("chats") / "chats.jsonl"
    with path.open("w") as file:
        for _ in range(40):
            words = lambda speaker: " ".join(random.choice(["one", "twö", "three", "four"], 12)) + speaker
            turns = [{"role": role, "content": words(role)} for _ in range(random.integers(1, 5))
                     for role in ("user", "assistant")]
            file.write(json.dumps({"turns": turns}) + "\n")
    return path


@pytest.mark.parametrize("vocabulary", ["bytes", "sentencepiece:280"])
def test_turns_go_on_where_a_document_continues_in_another_row(chats, tmp_path, vocabulary):
    config = DataConfig(source=f"files:{chats}", text_field="turns", vocabulary=vocabulary, sequence_length=32, batch_size=4,
                        cache_dir=str(tmp_path), validation_fraction=0.3)
    data = open_data(config, str(tmp_path))
    split, pieces = data.store.splits["validation"], {}
    for number, batch in enumerate(with_turns(data.validation, data.vocabulary, TURN_SEPARATOR)):
        document_BS, place_BS = data.validation.evaluation_places(number)
        assert (batch["turn_ids"][~batch["valid"]] == 0).all() and (document_BS[~batch["valid"]] == -1).all()
        for document, place, turn, target in zip(document_BS[batch["valid"]], place_BS[batch["valid"]],
                                                 batch["turn_ids"][batch["valid"]], batch["target_ids"][batch["valid"]]):
            pieces.setdefault(int(document), {})[int(place)] = (int(turn), int(target))
    assert len(pieces) == split.num_documents
    for document, found in pieces.items():
        begin, end = split.offsets_D[document], split.offsets_D[document + 1]
        assert sorted(found) == list(range(end - begin))
        assert [found[place][1] for place in sorted(found)] == split.tokens_N[begin:end].tolist()
        text = data.vocabulary.decode(split.tokens_N[begin:end])
        # The turn of the input before target n: of the text that n tokens spell.
        for place in range(1, end - begin, 7):
            spelled = "\n" + data.vocabulary.decode(split.tokens_N[begin:begin + place])
            least = spelled.count(TURN_SEPARATOR)  # those that are spelled out
            assert least <= found[place][0] <= ("\n" + text).count(TURN_SEPARATOR)
            if not any(spelled.endswith(TURN_SEPARATOR[:k]) for k in range(1, len(TURN_SEPARATOR))):
                assert found[place][0] == least


def test_turns_that_are_none_are_refused_with_their_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": [{"role": "user"}]}\n')
    with pytest.raises(CorpusError, match="line 1.*list of turns"):
        open_data(DataConfig(source=f"files:{tmp_path / 'a.jsonl'}", cache_dir=str(tmp_path / "cache")), str(tmp_path))
