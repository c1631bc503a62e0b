"""Vocabularies of imported models: bare ids, and a tokenizer.json."""

import json

import numpy as np
import pytest

from moe_jax.data.imported_vocabularies import special_ids
from moe_jax.data.vocabularies import VocabularyError, load_vocabulary, with_extra_ids


def test_ids_are_written_as_numbers():
    vocabulary = load_vocabulary("ids:128")
    assert vocabulary.encode("5 17 word 127 128 -3").tolist() == [5, 17, 2, 127, 2, 2]
    assert vocabulary.decode([5, 17]) == " 5 17" and vocabulary.encode(vocabulary.decode(range(128))).tolist() == list(range(128))
    assert (vocabulary.vocab_size, vocabulary.bytes_per_token_V[[7, 127]].tolist()) == (128, [2, 4])
    assert vocabulary.fingerprint != load_vocabulary("ids:129").fingerprint


@pytest.mark.parametrize("name, special", [
    ("ids:64", (0, (), 1, ())), ("ids:64,end=5+7", (5, (), 5, (5, 7))), ("ids:64,begin=3", (3, (3,), 1, ())),
    ("ids:64,begin=3,end=5", (3, (3,), 5, (5,)))])
def test_special_ids_of_bare_ids(name, special):
    """What begins rows, what begins prompts, what closes documents, what ends samples."""
    vocabulary = load_vocabulary(name)
    assert (vocabulary.begin_id, vocabulary.prompt_begin, vocabulary.eos_id, vocabulary.end_ids) == special
    assert vocabulary.never_ids == () and vocabulary.fingerprint == name.replace("ids:", "ids-")
    with_sentinels = with_extra_ids(vocabulary, 30)
    assert with_sentinels.vocab_size == 64 and with_sentinels.first_sentinel == 63


def test_vocabularies_of_our_own_have_the_special_ids_of_t5():
    ours = load_vocabulary("bytes")
    assert (ours.begin_id, ours.prompt_begin, ours.eos_id, ours.end_ids, ours.never_ids) == (0, (0,), 1, (1,), (0,))
    assert with_extra_ids(ours, 5).first_sentinel == 263


@pytest.mark.parametrize("files, special", [
    (dict(config=dict(bos_token_id=1, eos_token_id=2)), ",begin=1,end=2"), (dict(config=dict(bos_token_id=None, eos_token_id=None)), ""),
    (dict(config=dict(bos_token_id=1, eos_token_id=2), generation_config=dict(eos_token_id=[7, 9])), ",begin=1,end=7+9"),
    (dict(config=dict(text_config=dict(bos_token_id=4, eos_token_id=5))), ",begin=4,end=5"),
    (dict(config=dict(is_encoder_decoder=True, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2)), ",begin=2,end=2"),
    (dict(config=dict(is_encoder_decoder=True, pad_token_id=0, eos_token_id=1)), ",begin=0,end=1"), ({}, "")])
def test_special_ids_of_a_checkpoints_settings(tmp_path, files, special):
    for name, settings in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(settings))
    assert str(special_ids(tmp_path)) == special


@pytest.mark.parametrize("name", ["ids:", "ids:many", "ids:2", "ids:64,begin=", "ids:64,end=1,begin=2"])
def test_ids_without_a_number_are_refused(name):
    with pytest.raises(VocabularyError, match="wanted is ids:<size>"):
        load_vocabulary(name)


def test_an_id_beyond_the_last_is_refused():
    with pytest.raises(VocabularyError, match="there is no id 64; the last is 63"):
        load_vocabulary("ids:64,begin=1,end=64")


def test_a_tokenizer_that_is_not_there(tmp_path):
    with pytest.raises(VocabularyError, match="No such file"):
        load_vocabulary(f"tokenizer:{tmp_path / 'tokenizer.json'}")


@pytest.fixture
def tokenizer_file(tmp_path):
    """Bytes, the pair 'th', and a special token, with the settings of a model beside it."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "th"])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("t", "h")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<end>", "<extra_id_1>", "<extra_id_0>"])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [257, 3]}))
    return tmp_path / "tokenizer.json"


def test_a_tokenizer(tokenizer_file):
    vocabulary = load_vocabulary(f"tokenizer:{tokenizer_file}")
    text = "the path – naïve"
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int32 and vocabulary.decode(ids) == text
    assert vocabulary.bytes_per_token_V[ids].sum() == len(text.encode())
    assert (vocabulary.vocab_size, vocabulary.eos_id, vocabulary.bytes_per_token_V[257]) == (260, 257, 0)
    assert vocabulary.encode("a<end>")[-1] == 257 and vocabulary.decode([257]) == ""


def test_sentinels_of_a_tokenizer_are_those_it_names(tokenizer_file):
    vocabulary = load_vocabulary(f"tokenizer:{tokenizer_file}")
    assert (vocabulary.first_sentinel, vocabulary.extra_ids) == (259, 2) and with_extra_ids(vocabulary, 2) is vocabulary
    with pytest.raises(VocabularyError, match="has 2 sentinels .* up to 3 spans .* set data.objective='prefix_lm'"):
        with_extra_ids(vocabulary, 3)


@pytest.mark.parametrize("template, flag, begin", [
    (False, None, None), (True, None, 256), (False, True, 3), (True, False, None), (True, True, 256)])
def test_what_begins_a_text_is_what_the_tokenizer_puts_there(tokenizer_file, template, flag, begin):
    """By its template or the flag of its settings; a bos_token_id alone says only which id it would be."""
    tokenizers = pytest.importorskip("tokenizers")
    if template:
        made = tokenizers.Tokenizer.from_file(str(tokenizer_file))
        made.post_processor = tokenizers.processors.TemplateProcessing(single="th $A", special_tokens=[("th", 256)])
        made.save(str(tokenizer_file))
    (tokenizer_file.parent / "config.json").write_text(json.dumps({"bos_token_id": 256 if template else 3, "eos_token_id": 257}))
    if flag is not None:
        (tokenizer_file.parent / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": flag}))
    vocabulary = load_vocabulary(f"tokenizer:{tokenizer_file}")
    assert vocabulary.prompt_begin == (() if begin is None else (begin,))
    assert vocabulary.begin_id == (257 if begin is None else begin)


def test_a_file_that_is_no_tokenizer(tokenizer_file):
    tokenizer_file.write_text("{}")
    with pytest.raises(VocabularyError, match="is no tokenizer.json"):
        load_vocabulary(f"tokenizer:{tokenizer_file}")
