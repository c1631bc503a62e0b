"""Objectives: examples by hand, the text back from inputs and targets, and rows that are a pure function of seed and number."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batches import store_of
from test_config import refusal

from moe_jax.config import DataConfig
from moe_jax.data.batches import PADDING, Batches, data_of_store, empty_batch, padding_of
from moe_jax.data.documents import CorpusError
from moe_jax.data.objectives import (
    MIXTURES,
    Denoiser,
    Recipe,
    encoder_decoder_batch,
    fill_row,
    hidden_spans,
    hidden_suffix,
    recipes_of,
    span_corruption,
    span_counts,
    text_and_target_lengths,
    with_sentinels,
)
from moe_jax.data.streams import seeded_bits
from moe_jax.data.vocabularies import ByteVocabulary

VOCABULARY = ByteVocabulary(extra_ids=100_000)  # as store_of's; sentinels count down from its end
LAST = VOCABULARY.vocab_size - 1
OTHERS = ("prefix_lm", "span_corruption", "ul2", "openmoe")


def config_of(**fields):
    return DataConfig(**{"sequence_length": 40, "batch_size": 2, **fields})


# What is hidden


def test_t5s_own_example():
    # "Thank you for inviting me to your party last week": "for inviting" and "last" are hidden (Raffel et al. 2020, fig. 2).
    text = np.arange(10, 20)
    hidden = np.isin(text, [12, 13, 18])
    assert with_sentinels(text, hidden, 99).tolist() == [10, 11, 99, 14, 15, 16, 17, 98, 19]
    # "X for inviting Y last Z": what is not hidden is a sentinel there.
    assert with_sentinels(text, ~hidden, 99).tolist() == [99, 12, 13, 98, 18, 97]


@pytest.mark.parametrize("length, rate, mean_span, counts", [
    (568, 0.15, 3, (85, 28)),  # T5: 512 inputs
    (10, 0.15, 3, (2, 1)),  # 1.5 tokens, to the even number
    (2, 0.15, 3, (1, 1)),
    (2, 0.99, 3, (1, 1)),  # one stays
    (10, 0.9, 1, (9, 1)),  # nine spans of one token would need nine between them
    (10, 0.5, 1, (5, 5)),
    (100, 0.5, 64, (50, 1)),
])  # fmt: skip
def test_counts_of_hidden_tokens_and_spans(length, rate, mean_span, counts):
    assert span_counts(length, rate, mean_span) == counts


def test_t5s_lengths():
    # The numbers of T5's pre-training: 512 inputs, 15 %, spans of 3.
    assert text_and_target_lengths(512, 0.15, 3) == (568, 114)
    with pytest.raises(ValueError, match="inputs_length=2"):
        text_and_target_lengths(2, 0.15, 3)


@settings(max_examples=200, deadline=None)
@given(length=st.integers(2, 60), rate=st.floats(0.01, 0.99), mean_span=st.floats(1, 20), seed=st.integers(0, 99))
def test_spans_are_as_many_and_as_long_as_counted(length, rate, mean_span, seed):
    hidden = hidden_spans(length, rate, mean_span, seeded_bits(seed))
    count, spans = span_counts(length, rate, mean_span)
    assert hidden.shape == (length,) and hidden.sum() == count
    assert not hidden[0] and hidden[-1]  # as T5's
    assert (np.diff(hidden.astype(int)) == 1).sum() == spans


def test_every_division_is_equally_likely():
    # Three hidden tokens of six in two spans: (1, 2) or (2, 1) of either kind, four masks.
    bits = seeded_bits(5)
    drawn = collections.Counter(tuple(hidden_spans(6, 0.5, 1.5, bits).astype(int)) for _ in range(2000))
    assert set(drawn) == {(0, 1, 0, 0, 1, 1), (0, 1, 1, 0, 0, 1), (0, 0, 1, 0, 1, 1), (0, 0, 1, 1, 0, 1)}
    assert all(abs(count - 500) < 100 for count in drawn.values())  # five standard deviations


def test_every_prefix_is_equally_likely():
    bits = seeded_bits(6)
    prefixes = collections.Counter(int((~hidden_suffix(5, bits)).sum()) for _ in range(2000))
    assert set(prefixes) == {1, 2, 3, 4} and all(abs(count - 500) < 100 for count in prefixes.values())
    assert hidden_suffix(5, bits)[-1] and hidden_suffix(1, bits).tolist() == [True]
    for _ in range(20):
        assert (np.diff(hidden_suffix(7, bits).astype(int)) >= 0).all()


# Rows


@dataclasses.dataclass
class Given:
    """A recipe whose examples are given."""

    examples: list
    ends: bool = False
    begin_id: int = 0
    end_id: int = 1

    def longest(self, room, most=None):
        return 1 if self.examples and sum(map(len, self.examples[0])) <= room else 0

    def example(self, tokens, bits):
        inputs, targets = self.examples.pop(0)
        return np.array(inputs, np.int32), np.array(targets, np.int32)


def row_of(recipe, pieces, length, **keys):
    row = {key: values[0] for key, values in empty_batch(1, length, PADDING | {"is_target": False, "in_prefix": False}).items()}
    fill_row(row, pieces, recipe, seeded_bits(0))
    return row


def test_a_row_is_laid_out_as_seqio_does():
    """The first example in the documentation of seqio's PrefixLMFeatureConverter."""
    recipe = Given([([7, 8, 5, 1], [3, 9, 1]), ([8, 4, 9, 3, 1], [4, 1])])
    row = row_of(recipe, [(np.array([5]), 2, 7), (np.array([5]), 1, 9)], 15)
    assert row["target_ids"].tolist() == [7, 8, 5, 1, 3, 9, 1, 8, 4, 9, 3, 1, 4, 1, 0]
    assert row["input_ids"].tolist() == [0, 7, 8, 5, 1, 3, 9, 0, 8, 4, 9, 3, 1, 4, 0]
    assert row["is_target"].astype(int).tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 0]
    assert row["positions"].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 0]
    assert row["in_prefix"].astype(int).tolist() == [1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert row["valid"].tolist() == [True] * 14 + [False]
    assert row["domain_ids"].tolist() == [2] * 7 + [1] * 7 + [-1] and row["document_ids"].tolist() == [7] * 7 + [9] * 7 + [-1]


def test_an_example_of_every_kind_by_hand():
    ends = Recipe(Denoiser(1.0, 2, 0.5, "[X] "), (5, 6), 99, ends=True)
    assert ends.example_length(4) == 2 + 2 + 1 + 2 + 1 + 2  # mode, text, sentinels, ends: one span of two
    inputs, targets = ends.example(np.array([20, 21, 22, 23]), seeded_bits(0))
    assert inputs.tolist() == [5, 6, 20, 21, 99, 1] and targets.tolist() == [99, 22, 23, 1]
    assert ends.longest(9) == 3 and ends.example_length(3) == 9 and ends.longest(7) == 0
    prefix = Recipe(Denoiser(1.0), (), 0, ends=False)
    inputs, targets = prefix.example(np.array([20, 21]), seeded_bits(0))
    assert inputs.tolist() == [20] and targets.tolist() == [21] and prefix.longest(9) == 9


def test_the_last_piece_is_cut_to_fit_and_end_ids_of_documents_give_way_to_those_of_examples():
    recipe = Recipe(Denoiser(1.0, 2, 0.5), (), 99, ends=True)
    row = row_of(recipe, [(np.array([20, 21, 1]), 0, 0), (np.array([1]), 0, 1), (np.arange(30, 50), 0, 2)], 14)
    # 20, 21 and its end make 6; a document's end alone makes nothing; of the last piece four tokens fit.
    assert row["target_ids"].tolist() == [20, 99, 1, 99, 21, 1, 30, 31, 99, 1, 99, 32, 33, 1]
    assert row["document_ids"].tolist() == [0] * 6 + [2] * 8


def text_of(row, segment, recipe):
    """The text that one example was made of: each sentinel of the inputs is replaced by what follows it in the targets."""
    mine = row["segment_ids"] == segment
    given, wanted = (row["target_ids"][mine & kind].tolist() for kind in (~row["is_target"], row["is_target"]))
    if recipe.ends:
        assert given.pop() == 1 and wanted.pop() == 1
    mode = len(recipe.mode_ids)
    assert tuple(given[:mode]) == recipe.mode_ids
    if not recipe.denoiser.mean_span:
        return given[mode:] + wanted
    spans, text = [], []
    for token in wanted:
        if token > LAST - 50:
            spans.append((token, []))
        else:
            spans[-1][1].append(token)
    assert [token for token, _ in spans] == list(range(LAST, LAST - len(spans), -1))  # they count down, each once
    spans = dict(spans)
    for token in given[mode:]:
        text += spans.pop(token) if token in spans else [token]
    assert not spans
    return text


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 70), min_size=1, max_size=8), objective=st.sampled_from(OTHERS),
       step=st.integers(0, 10**6), length=st.integers(30, 80), split=st.sampled_from(["train", "validation"]))  # fmt: skip
def test_the_text_comes_back_and_rows_are_well_formed(tmp_path_factory, lengths, objective, step, length, split):
    store = store_of(tmp_path_factory.getbasetemp() / "shared", lengths, (50, 9))
    config = config_of(objective=objective, sequence_length=length, prefix_attention="bidirectional")
    recipes, vocabulary = recipes_of(config, VOCABULARY)
    assert vocabulary is VOCABULARY  # it has enough ids to spare
    batches = Batches(store, config, split, recipes)
    batch = batches.batch(step if split == "train" else step % batches.num_batches)
    assert set(batch) == set(padding_of(config)) and all(values.shape == (2, length) for values in batch.values())
    valid = batch["valid"]
    for key, value in padding_of(config).items():
        assert (batch[key][~valid] == value).all() and batch[key].dtype == (bool if isinstance(value, bool) else np.int32)
    assert (np.diff(valid.astype(int), axis=1) <= 0).all()  # padding at the end only
    tokens, offsets = store.splits[split].tokens_N, store.splits[split].offsets_D
    for number in range(2):
        row = {key: values[number] for key, values in batch.items()}
        if not valid[number].any():  # documents that are an end id and no more
            continue
        recipe = next(r for r in recipes if tuple(row["target_ids"][: len(r.mode_ids)]) == r.mode_ids)
        for segment in range(1, row["segment_ids"].max() + 1):
            text, mine = text_of(row, segment, recipe), row["segment_ids"] == segment
            (document,) = set(row["document_ids"][mine].tolist())
            place = int(np.flatnonzero(store.splits[split].document_D == document)[0])
            whole = tokens[offsets[place] : offsets[place + 1]].tolist()
            begin = whole.index(text[0])
            assert whole[begin : begin + len(text)] == text and text  # a piece of one document
            assert row["positions"][mine].tolist() == list(range(mine.sum()))
            assert row["input_ids"][mine].tolist() == [0, *row["target_ids"][mine][:-1]]
            given_tokens = int((mine & ~row["is_target"]).sum())
            assert row["is_target"][mine].tolist() == [False] * given_tokens + [True] * int(mine.sum() - given_tokens)
            assert row["in_prefix"][mine].tolist() == (row["positions"][mine] <= given_tokens).tolist()


def test_one_long_document_fills_its_rows():
    """What a row reads is just what it can hold: at most a token or two of padding."""
    for objective in OTHERS:
        config = config_of(objective=objective, sequence_length=200)
        for recipe in recipes_of(config, VOCABULARY)[0]:
            row = row_of(recipe, [(np.arange(10, 10 + recipe.longest(200)), 0, 0)], 200)
            assert (~row["valid"]).sum() <= 2 and recipe.example_length(recipe.longest(200)) == row["valid"].sum()


def test_rows_are_a_pure_function_of_seed_and_number(tmp_path):
    store = store_of(tmp_path, [40] * 12)
    for objective in ("prefix_lm", "openmoe"):
        config = config_of(objective=objective, batch_size=6)
        recipes, _ = recipes_of(config, VOCABULARY)
        batches = Batches(store, config, "train", recipes)
        expected = [batches.batch(step) for step in range(4)]
        other = Batches(store, config, "train", recipes)
        for step in (3, 0, 2):
            parts = [other.batch(step, slice(first, last)) for first, last in ((0, 2), (2, 2), (2, 6))]
            for key, values in expected[step].items():
                np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), values)
        again = Batches(store, dataclasses.replace(config, seed=1), "train", recipes).batch(0)
        assert not np.array_equal(again["target_ids"], expected[0]["target_ids"])
        # Another epoch hides other tokens.
        first = {tuple(row) for batch in expected for row in batch["is_target"]}
        later = {tuple(row) for row in batches.batch(5000)["is_target"]}
        assert later - first


@pytest.mark.parametrize("objective, shares", [
    ("openmoe", {"[NLU] ": 0.2, "[NLG] ": 0.3, "[S2S] ": 0.5}),
    ("ul2", {"[NLU] ": 0.4, "[NLG] ": 0.4, "[S2S] ": 0.2}),
])  # fmt: skip
def test_a_mixtures_rows_come_in_its_shares(tmp_path, objective, shares):
    assert sum(denoiser.share for denoiser in MIXTURES[objective]) == pytest.approx(1)
    store = store_of(tmp_path, [300] * 8, domains=("a", "b"))
    config = config_of(objective=objective, batch_size=1024, domain_weights="a=3,b=1")
    batch = Batches(store, config, "train", recipes_of(config, VOCABULARY)[0]).batch(3)
    modes = collections.Counter(VOCABULARY.decode(row[:6]) for row in batch["target_ids"])
    for mode, share in shares.items():
        assert abs(modes[mode] - share * 1024) <= 6  # a rounding per stream
    assert abs((batch["domain_ids"][:, 0] == 0).sum() - 768) <= 6
    assert (batch["domain_ids"][batch["valid"]] >= 0).all()
    rate = lambda batch: batch["is_target"].sum() / batch["valid"].sum()
    assert 0.1 < rate(batch) < 0.7


def test_the_published_mixtures():
    openmoe = [(d.mean_span, d.rate, d.share) for d in MIXTURES["openmoe"]]
    assert openmoe == [(3, 0.15, 0.1), (8, 0.15, 0.1), (3, 0.5, 0.1), (8, 0.5, 0.1), (64, 0.5, 0.1), (0, 0.5, 0.5)]
    ul2 = {(d.mean_span, d.rate, d.mode) for d in MIXTURES["ul2"]}
    assert ul2 == {(3, 0.15, "[NLU] "), (8, 0.15, "[NLU] "), (3, 0.5, "[NLG] "), (8, 0.5, "[NLG] "), (64, 0.15, "[NLG] "),
                   (64, 0.5, "[NLG] "), (0, 0.5, "[S2S] ")}  # fmt: skip


# The data of a run


def test_the_causal_objective_is_left_alone(tmp_path):
    store = store_of(tmp_path, [40] * 4)
    data = data_of_store(store, VOCABULARY, config_of())
    assert data.vocabulary is VOCABULARY and data.objective_validation is None
    assert set(data.train.batch(0)) == set(PADDING) == set(padding_of(config_of()))


def test_a_run_has_the_sentinels_it_needs_and_is_validated_on_plain_text_too(tmp_path):
    store = store_of(tmp_path, [40] * 4, (60,))
    plain = data_of_store(store, ByteVocabulary(), config_of())
    fingerprints = {plain.fingerprint}
    for objective in OTHERS:
        data = data_of_store(store, ByteVocabulary(), config_of(objective=objective))
        spans = 0 if objective == "prefix_lm" else data.vocabulary.extra_ids
        assert spans == data.vocabulary.vocab_size - 259 and (spans > 0) == (objective != "prefix_lm")
        for key, values in plain.validation.batch(0).items():
            np.testing.assert_array_equal(data.validation.batch(0)[key], values)
        own = list(data.objective_validation.evaluation_batches())
        assert own and all(batch["is_target"].any() for batch in own)
        fingerprints.add(data.fingerprint)
    assert len(fingerprints) == 5
    many = data_of_store(store, ByteVocabulary(), config_of(objective="span_corruption", sentinels=100))
    assert many.vocabulary.vocab_size == 359


@pytest.mark.parametrize("fields, words", [
    (dict(objective="openmoe", sequence_length=10), ["data.sequence_length=10", "too short", "'openmoe'", "at least 12"]),
    (dict(objective="span_corruption", sentinels=1, span_rate=0.5), ["data.sentinels=1", "hides up to", "or to 0"]),
])  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, fields, words):
    with pytest.raises(CorpusError) as error:
        data_of_store(store_of(tmp_path, [40] * 4), VOCABULARY, config_of(**fields))
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("sections, words", [
    ({"data": {"objective": "t5"}}, ["data.objective='t5'", "'span_corruption'"]),
    ({"data": {"span_mean": 8.0}}, ["data.span_mean=8.0", "no effect", "data.objective='causal'"]),
    ({"data": {"objective": "ul2", "span_rate": 0.5}}, ["data.span_rate=0.5", "no effect"]),
    ({"data": {"objective": "span_corruption", "span_rate": 1.0}}, ["data.span_rate=1.0", "between 0 and 1"]),
    ({"data": {"objective": "prefix_lm", "sentinels": 100}}, ["data.sentinels=100", "hides no spans"]),
    ({"data": {"prefix_attention": "bidirectional"}}, ["data.prefix_attention='bidirectional'", "no effect"]),
    ({"data": {"objective": "prefix_lm", "streaming": True}}, ["data.objective='prefix_lm'", "data.streaming=False"]),
    ({"data": {"objective": "prefix_lm", "prefix_attention": "bidirectional"}, "model": {"attention": "splash"}},
     ["model.attention='splash'", "causal attention only"]),
])  # fmt: skip
def test_settings_that_could_not_act_are_refused(sections, words):
    message = refusal(sections)
    assert all(word in message for word in words), message


# Encoder and decoder


def test_an_encoder_decoder_batch_by_hand():
    inputs, targets = np.array([20, 21, 99]), np.array([99, 22, 23])
    batch = encoder_decoder_batch([(inputs, targets), (inputs[:1], targets[:1])], 5, 4)
    assert batch["encoder_input_ids"].tolist() == [[20, 21, 99, 1, 0], [20, 1, 0, 0, 0]]
    assert batch["encoder_valid"].tolist() == [[True] * 4 + [False], [True] * 2 + [False] * 3]
    assert batch["decoder_target_ids"].tolist() == [[99, 22, 23, 1], [99, 1, 0, 0]]
    assert batch["decoder_input_ids"].tolist() == [[0, 99, 22, 23], [0, 99, 0, 0]]
    assert batch["decoder_valid"].tolist() == [[True] * 4, [True] * 2 + [False] * 2]
    assert all(values.dtype == (bool if "valid" in key else np.int32) for key, values in batch.items())
    with pytest.raises(ValueError, match="example 0: 4 targets with the end id, but targets_length=3"):
        encoder_decoder_batch([(inputs, targets)], 5, 3)


def test_an_encoder_decoder_is_filled_by_text_of_the_length_that_is_named():
    for rate, mean_span in ((0.15, 3), (0.5, 3), (0.5, 64), (0.15, 8)):
        text, targets_length = text_and_target_lengths(128, rate, mean_span)
        examples = [span_corruption(np.arange(10, 10 + text), rate, mean_span, 9999, seeded_bits(seed)) for seed in range(3)]
        batch = encoder_decoder_batch(examples, 128, targets_length)
        assert batch["decoder_valid"].all() and (~batch["encoder_valid"]).sum(1).max() <= 1
        merged = [set(inputs) | set(targets) for inputs, targets in examples]
        assert all(set(range(10, 10 + text)) <= tokens for tokens in merged)
