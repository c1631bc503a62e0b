"""Vocabularies of imported models: bare ids, and a tokenizer.json."""

import json

import numpy as np
import pytest

from moe_jax.data.vocabularies import VocabularyError, load_vocabulary


def test_ids_are_written_as_numbers():
    vocabulary = load_vocabulary("ids:128")
    assert vocabulary.encode("5 17 word 127 128 -3").tolist() == [5, 17, 2, 127, 2, 2]
    assert vocabulary.decode([5, 17]) == " 5 17" and vocabulary.encode(vocabulary.decode(range(128))).tolist() == list(range(128))
    assert (vocabulary.vocab_size, vocabulary.bytes_per_token_V[[7, 127]].tolist()) == (128, [2, 4])
    assert vocabulary.fingerprint != load_vocabulary("ids:129").fingerprint


@pytest.mark.parametrize("name", ["ids:", "ids:many", "ids:2"])
def test_ids_without_a_number_are_refused(name):
    with pytest.raises(VocabularyError, match="wanted is ids:<size>"):
        load_vocabulary(name)


def test_a_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(VocabularyError, match="No such file"):
        load_vocabulary(f"tokenizer:{tmp_path / 'tokenizer.json'}")


@pytest.fixture
def tokenizer_file(tmp_path):
    """Bytes, the pair 'th', and a special token, with the settings of a model beside it."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install 'moe_jax[hf]'")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "th"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("t", "h")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<end>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [257, 3]}))
    return tmp_path / "tokenizer.json"


def test_a_tokenizer(tokenizer_file):
    vocabulary = load_vocabulary(f"tokenizer:{tokenizer_file}")
    text = "the path – naïve"
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int32 and vocabulary.decode(ids) == text
    assert vocabulary.bytes_per_token_V[ids].sum() == len(text.encode())
    assert (vocabulary.vocab_size, vocabulary.eos_id, vocabulary.bytes_per_token_V[257]) == (258, 257, 0)
    assert vocabulary.encode("a<end>")[-1] == 257 and vocabulary.decode([257]) == ""


def test_a_file_that_is_no_tokenizer(tokenizer_file):
    tokenizer_file.write_text("{}")
    with pytest.raises(VocabularyError, match="is no tokenizer.json"):
        load_vocabulary(f"tokenizer:{tokenizer_file}")
