"""Texts scored in packed rows have the numbers that they have alone; lines that are no texts are named."""

import gzip
import json
import math

import jax
import numpy as np
import pytest
import tiny
from running import moe_jax, overrides, write_corpus

from moe_jax.config import ConfigError
from moe_jax.data.documents import CorpusError, Document
from moe_jax.data.questions import Question, documents, is_given, questions, targets, task_of
from moe_jax.data.vocabularies import ByteVocabulary
from moe_jax.errors import UserError
from moe_jax.inference.scoring import (
    Text, check_scorable, log_likelihoods, multiple_choice, packed, perplexity, perplexity_given, texts_of, windows)

__all__ = ["moe_jax"]
CONFIG = tiny.config(model_num_layers=2, moe_every=1)
DRAW = np.random.default_rng(0)
TEXTS = [Text(DRAW.integers(1, tiny.VOCAB, size).astype(np.int32), given)
         for size, given in ((5, 0), (16, 3), (1, 0), (7, 6), (9, 0), (2, 1), (16, 15), (3, 0), (11, 2), (4, 4))]


def alone(config, text):
    """By the plain forward pass of one row that holds nothing else, token by token."""
    row = {"input_ids": np.zeros((8, 16), np.int32), "valid": np.zeros((8, 16), bool)}
    size = len(text.ids)
    row["input_ids"][0, 1:size] = text.ids[:-1]
    row["valid"][0, :size] = True
    row["segment_ids"] = row["valid"].astype(np.int32)
    row["positions"] = np.where(row["valid"], np.arange(16), 0).astype(np.int32)
    logits_SV = np.asarray(tiny.logits(config, tiny.params(config), row)[0], np.float64)
    total = 0.0
    for place in range(text.given, size):
        logits_V = logits_SV[place]
        total += logits_V[text.ids[place]] - np.log(np.sum(np.exp(logits_V - logits_V.max()))) - logits_V.max()
    return total


def scores(config, texts, mesh=tiny.ONE):
    with jax.set_mesh(mesh):
        return log_likelihoods(tiny.placed(tiny.params(config), mesh), tiny.no_bias(config), texts, config, tiny.VOCAB, mesh)


def test_packed_texts_have_the_likelihoods_that_they_have_alone():
    found = scores(CONFIG, TEXTS)
    np.testing.assert_allclose(found, [alone(CONFIG, text) for text in TEXTS], rtol=1e-5, atol=1e-5)
    assert found[9] == 0  # nothing of it was to be predicted


def test_a_router_that_compares_tokens_gives_way_to_token_choice():
    ahead = tiny.config(model_num_layers=2, moe_every=1, moe_router="expert_choice", moe_balance_weight=0.0,
                        moe_allow_noncausal_routing=True)
    np.testing.assert_allclose(scores(ahead, TEXTS), scores(CONFIG, TEXTS), rtol=1e-6)


@pytest.mark.slow
def test_eight_devices_score_as_one_does():
    np.testing.assert_allclose(scores(CONFIG, TEXTS, tiny.mesh(fsdp=2, expert=2, tensor=2)), scores(CONFIG, TEXTS), rtol=1e-5)


@pytest.mark.slow
def test_what_is_given_is_seen_from_both_sides_by_a_model_trained_so():
    both = tiny.config(model_num_layers=2, moe_every=1, data_objective="prefix_lm", data_prefix_attention="bidirectional")
    found, causal = scores(both, TEXTS), scores(CONFIG, TEXTS)
    free = np.array([text.given == 0 for text in TEXTS])
    np.testing.assert_allclose(found[free], causal[free], rtol=1e-6)
    assert np.abs(found[1] - causal[1]) > 1e-3 and np.abs(found[8] - causal[8]) > 1e-3


def test_every_text_has_a_place_of_its_own_in_a_row_that_it_fits():
    lengths = [5, 16, 1, 7, 9, 2, 16, 3, 11, 4]
    taken = np.zeros((10, 16), int)
    for (row, begin), length in zip(packed(lengths, 16), lengths):
        assert begin + length <= 16
        taken[row, begin : begin + length] += 1
    assert taken.max() == 1 and (taken.sum(axis=1) > 0).sum() == 5  # 74 tokens need five rows of 16


def test_a_broken_model_is_told():
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), tiny.params(CONFIG))
    with jax.set_mesh(tiny.ONE), pytest.raises(UserError, match="not a finite number"):
        log_likelihoods(tiny.placed(broken, tiny.ONE), tiny.no_bias(CONFIG), TEXTS[:1], CONFIG, tiny.VOCAB, tiny.ONE)


# Encoder–decoders.

PAIRS = tiny.config(model_num_layers=2, model_encoder_layers=2, model_num_kv_heads=4, attention_positions="relative",
                    attention_relative_buckets=8, attention_relative_distance=10, data_objective="span_corruption",
                    data_target_length=12, moe_every=1)


def pair_alone(config, text, begin_id):
    """By the plain forward pass of one row, token by token."""
    batch = {"encoder_input_ids": np.zeros((8, 16), np.int32), "input_ids": np.zeros((8, 12), np.int32)}
    batch["encoder_input_ids"][0, : len(text.read)] = text.read
    batch["input_ids"][0, : len(text.ids)] = [begin_id, *text.ids[:-1]]
    for side, size in (("encoder_", len(text.read)), ("", len(text.ids))):
        batch[f"{side}valid"] = np.arange(batch[f"{side}input_ids"].shape[1]) < np.array([size] + 7 * [0])[:, None]
        batch[f"{side}segment_ids"] = batch[f"{side}valid"].astype(np.int32)
        batch[f"{side}positions"] = np.cumsum(batch[f"{side}valid"], axis=1, dtype=np.int32) - batch[f"{side}valid"]
    logits_SV = np.asarray(tiny.logits(config, tiny.params(config), batch)[0], np.float64)
    return sum(logits_SV[place, number] - np.log(np.sum(np.exp(logits_SV[place]))) for place, number in enumerate(text.ids))


def test_what_is_written_is_scored_given_what_is_read():
    draw = lambda size: DRAW.integers(1, tiny.VOCAB, size).astype(np.int32)
    texts = [Text(draw(written), 0, draw(read)) for read, written in ((16, 5), (3, 12), (9, 1), (1, 7))] * 3
    with jax.set_mesh(tiny.ONE):
        found = log_likelihoods(tiny.placed(tiny.params(PAIRS), tiny.ONE), tiny.no_bias(PAIRS), texts, PAIRS, tiny.VOCAB, tiny.ONE, 4)
    np.testing.assert_allclose(found[:4], [pair_alone(PAIRS, text, 4) for text in texts[:4]], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, np.tile(found[:4], 3), rtol=1e-6)


def test_an_encoder_reads_the_question_and_the_decoder_writes_the_choice():
    texts, cut = texts_of(question("abcdef", "12", "3"), ByteVocabulary(), 5, 4)
    ids = lambda text: [byte + 3 for byte in text.encode()] + [1]
    assert cut and [text.read.tolist() for text in texts] == 2 * [ids("cdef")] and all(text.given == 0 for text in texts)
    assert [text.ids.tolist() for text in texts] == [ids("12"), ids("3")]
    with pytest.raises(CorpusError, match="file, line 1: what is to be written has more tokens than the 4"):
        texts_of(question("a", "1234", "1"), ByteVocabulary(), 5, 4)


@pytest.mark.parametrize("target_length", [0, 8])
def test_perplexity_of_targets_by_hand(target_length):
    """Of a decoder input and target are one text, of an encoder–decoder two: what is predicted is the same."""
    items = [Question("ab", ("cd",), 0, "x", "l1"), Question("", ("é",), 0, "y", "l2")]
    found = perplexity_given(items, ByteVocabulary(), by_id, 16, target_length)
    nats = [(sum(byte + 3 for byte in text.encode()) + 1) / 100 for text in ("cd", "é")]
    assert found["ce"] == pytest.approx(sum(nats) / 6) and (found["tokens"], found["bytes"], found["cut"]) == (6, 4, 0)
    assert [item["log_likelihood"] for item in found["items"]] == pytest.approx([-value for value in nats])


def test_a_text_alone_has_no_likelihood_under_an_encoder_decoder():
    with pytest.raises(ConfigError, match='write lines with "input" and "target"'):
        check_scorable(PAIRS, [Document("a", "x", "1")])
    check_scorable(PAIRS, [question("a", "b", "c")])
    check_scorable(CONFIG, [Document("a", "x", "1")])


def test_lines_with_a_target(tmp_path):
    path = written(tmp_path / "t.jsonl", json.dumps({"input": "a", "target": "b", "domain": "x"}), json.dumps({"target": "c"}))
    assert is_given(path) and task_of(path) == "perplexity"
    assert targets(path) == [Question("a", ("b",), 0, "x", f"{path}, line 1"), Question("", ("c",), 0, "default", f"{path}, line 2")]
    for line, words in (({"input": "a"}, '"target" must be a string, not empty, not None'), ({"input": 1, "target": "b"}, '"input" must')):
        bad = written(tmp_path / "bad.jsonl", json.dumps({"target": "c"}), json.dumps(line))
        with pytest.raises(CorpusError, match=f"line 2: {words}"):
            targets(bad)


# Documents.


def by_id(texts):
    """A model to compute by hand: a token of id i has log-probability -i / 100."""
    return [-float(text.ids[text.given:].sum()) / 100 for text in texts]


def test_perplexity_by_hand():
    vocabulary = ByteVocabulary()
    texts = [Document("ab", "x", "1"), Document("c" * 9, "y", "2"), Document("é", "x", "3")]
    ids = lambda text: [byte + 3 for byte in text.encode()] + [1]  # ends with the end of text
    found = perplexity(texts, vocabulary, by_id, length=4)
    nats = [sum(ids(document.text)) / 100 for document in texts]
    assert found["ce"] == pytest.approx(sum(nats) / (3 + 10 + 3))
    assert found["perplexity"] == pytest.approx(math.exp(found["ce"]))
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / (2 + 9 + 2))
    assert (found["tokens"], found["bytes"], found["documents"], found["cut"]) == (16, 13, 3, 1)
    assert found["domains"]["x"]["ce"] == pytest.approx((nats[0] + nats[2]) / 6) and found["domains"]["y"]["cut"] == 1
    assert [item["log_likelihood"] for item in found["items"]] == pytest.approx([-value for value in nats])


def test_a_long_document_is_cut_into_rows_that_begin_anew():
    assert [text.ids.tolist() for text in windows(np.arange(9), 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert all(text.given == 0 for text in windows(np.arange(9), 4))


# Questions.


def question(context, *choices, answer=0, domain="default"):
    return Question(context, choices, answer, domain, "file, line 1")


def test_choices_by_hand():
    """By total the short 'b' wins over 'aaaa', by byte 'aaaa' does: 0.98 against 0.97 + 0.03."""
    found = multiple_choice([question("x", "aaaa", "b", answer=0, domain="p"), question("", "b", "a", answer=1, domain="q")],
                            ByteVocabulary(), by_id, 16)
    first = found["items"][0]
    assert first["log_likelihoods"] == pytest.approx([-4 * 1.0, -1.01])  # 'a' is 97 + 3
    assert (first["chosen"], first["chosen_normalised"]) == (1, 0)
    assert (found["accuracy"], found["accuracy_normalised"], found["guessing"], found["questions"]) == (0.5, 1.0, 0.5, 2)
    assert found["domains"]["p"]["accuracy"] == 0 and found["domains"]["q"]["accuracy"] == 1


def test_of_equal_choices_the_first_is_taken():
    found = multiple_choice([question("x", "a", "a", answer=1)], ByteVocabulary(), by_id, 16)
    assert found["items"][0]["chosen"] == 0 and found["accuracy"] == 0


class PairVocabulary:
    """Two characters are one token, a last single one is another."""

    end_ids = (1,)

    def encode(self, text):
        return np.array([int.from_bytes(text[place : place + 2].encode()) for place in range(0, len(text), 2)], np.int32)


def test_context_and_choice_are_tokenised_as_one_text():
    """A token that reaches over the seam is predicted whole, after the same tokens for every choice."""
    pairs = lambda *texts: [PairVocabulary().encode(text)[0] for text in texts]
    texts, cut = texts_of(question("abc", "de", "f"), PairVocabulary(), 8)  # alone the context is ab, c
    assert not cut and [text.ids.tolist() for text in texts] == [pairs("ab", "cd", "e"), pairs("ab", "cf")]
    assert [text.given for text in texts] == [1, 1]
    texts, _ = texts_of(question("abcd", "e", "fg"), PairVocabulary(), 8)
    assert [text.given for text in texts] == [2, 2]


def test_a_long_context_loses_its_beginning_as_much_for_all_choices():
    texts, cut = texts_of(question("abcdefgh", "12", "3456"), ByteVocabulary(), 10)
    assert cut and [bytes(text.ids.astype(np.uint8) - 3) for text in texts] == [b"cdefgh12", b"cdefgh3456"]
    assert [text.given for text in texts] == [6, 6]
    with pytest.raises(CorpusError, match="file, line 1: a choice has more tokens than the 10"):
        texts_of(question("ab", "1", "2" * 11), ByteVocabulary(), 10)


# Files.


def written(path, *lines):
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


GOOD = json.dumps({"context": "1 + 1 =", "choices": [" 2", " 3"], "answer": 0, "domain": "sums"})


def test_a_file_says_what_it_holds(tmp_path):
    asked = written(tmp_path / "q.jsonl", "", GOOD, json.dumps({"choices": ["a", "b"], "answer": 1}))
    assert task_of(asked) == "choices"
    assert questions(asked) == [Question("1 + 1 =", (" 2", " 3"), 0, "sums", f"{asked}, line 2"),
                                Question("", ("a", "b"), 1, "default", f"{asked}, line 3")]
    told = written(tmp_path / "d.jsonl", json.dumps({"text": "a", "domain": "x"}), json.dumps({"text": "b"}))
    assert task_of(told) == "perplexity"
    assert [(d.text, d.domain) for d in documents(told, "text")] == [("a", "x"), ("b", "default")]
    with gzip.open(tmp_path / "q.jsonl.gz", "wt") as file:
        file.write(GOOD)
    assert len(questions(str(tmp_path / "q.jsonl.gz"))) == 1


@pytest.mark.parametrize("line, words", [
    ("{", "line 2: not valid JSON"), ("[1]", "line 2: expected an object, found list"),
    ('{"choices": ["a", "b"]}', '"answer" must be the index of the right choice, 0 to 1, not None'),
    ('{"choices": ["a", "b"], "answer": 2}', "0 to 1, not 2"), ('{"choices": ["a", "b"], "answer": true}', "not True"),
    ('{"choices": ["a"], "answer": 0}', "at least two texts"), ('{"choices": ["a", ""], "answer": 0}', "none of them empty"),
    ('{"choices": "ab", "answer": 0}', "must be a list"), ('{"text": "a"}', '"choices" must be a list'),
    ('{"context": 1, "choices": ["a", "b"], "answer": 0}', '"context" must be a string, not 1'),
    ('{"domain": 1, "choices": ["a", "b"], "answer": 0}', '"domain" must be a string, not 1'),
    ("\udcff", "line 2: not valid JSON")])
def test_a_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / "q.jsonl"
    path.write_bytes((GOOD + "\n" + line + "\n").encode("utf-8", "surrogateescape"))
    with pytest.raises(CorpusError) as error:
        questions(str(path))
    assert words in str(error.value) and f"{path}, line 2" in str(error.value)


@pytest.mark.parametrize("name, content, words", [
    ("q.txt", GOOD, "its name must end in one of .jsonl"), ("q.jsonl", "", "has no lines"),
    ("none.jsonl", None, "cannot read")])
def test_a_file_that_cannot_be_read_is_told(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    for read in (task_of, questions):
        with pytest.raises(CorpusError, match=words):
            read(str(tmp_path / name))


# The command.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from running import run_here
    folder = tmp_path_factory.mktemp("scored")
    corpus = write_corpus(folder / "texts")
    assert run_here("train", *overrides(corpus, training__num_steps=4), f"--workdir={folder / 'run'}") == 0
    return folder / "run"


@pytest.mark.slow
def test_the_command_scores_documents_and_questions(moe_jax, trained, tmp_path):
    told = written(tmp_path / "d.jsonl", json.dumps({"body": "apple river", "domain": "fruit"}),
                   json.dumps({"body": "one plus"}))
    outcome = moe_jax("eval", f"--workdir={trained}", f"--data={told}", "--config.data.text_field=body", "--json",
                      f"--out={tmp_path / 'out.json'}")
    assert outcome.code == 0, outcome.err
    found, kept = json.loads(outcome.out), json.loads((tmp_path / "out.json").read_text())
    assert found["task"] == "perplexity" and found["documents"] == 2 and found["tokens"] == 12 + 9 and found["bytes"] == 11 + 8
    assert set(found["domains"]) == {"fruit", "default"} and "items" not in found
    assert {name: value for name, value in kept.items() if name != "items"} == found and len(kept["items"]) == 2
    asked = written(tmp_path / "q.jsonl", GOOD, json.dumps({"context": "apple", "choices": [" river", " xq"], "answer": 0}))
    outcome = moe_jax("eval", f"--workdir={trained}", f"--data={asked}")
    assert outcome.code == 0 and "accuracy" in outcome.out and "sums" in outcome.out and "2 questions" in outcome.out
    printed = moe_jax("eval", f"--workdir={trained}", f"--data={told}", "--config.data.text_field=body").out
    assert "perplexity" in printed and "read in parts" not in printed


@pytest.mark.slow
def test_the_run_of_held_out_text_can_be_written_to_a_file_too(moe_jax, trained, tmp_path):
    outcome = moe_jax("eval", f"--workdir={trained}", "--json", f"--out={tmp_path / 'out.json'}")
    assert outcome.code == 0 and json.loads((tmp_path / "out.json").read_text()) == json.loads(outcome.out)


def test_options_that_do_not_go_together_are_refused(moe_jax, tmp_path):
    asked = written(tmp_path / "q.jsonl", GOOD)
    for options, words in [(["--task=choices"], "there is none"),
                           ([f"--data={asked}", "--task=both"], "allowed are perplexity, choices"),
                           ([f"--data={asked}", "--dispatch=gather"], "--dispatch=gather: is for held-out text"),
                           ([f"--data={asked}", "--batches=2"], "--batches=2: counts batches"),
                           ([f"--data={asked}", "--task=perplexity"], "expected an object with the text under 'text'"),
                           ([f"--data={tmp_path / 'none.jsonl'}"], "cannot read")]:
        outcome = moe_jax("eval", f"--workdir={tmp_path}", *options)
        assert outcome.code != 0 and words in outcome.error
