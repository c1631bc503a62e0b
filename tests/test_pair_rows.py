"""Rows for encoder and decoder: the text back from what is given and what is to be written, and how much of it fits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batches import store_of

from moe_jax.config import ConfigError, DataConfig
from moe_jax.data.batches import ENCODER_PADDING, PADDING, Batches, data_of_store
from moe_jax.data.documents import CorpusError
from moe_jax.data.objectives import (
    Denoiser, Recipe, encoder_decoder_batch, hidden_suffix, recipes_of, span_corruption, text_and_target_lengths)
from moe_jax.data.streams import seeded_bits
from moe_jax.data.vocabularies import ByteVocabulary

VOCABULARY = ByteVocabulary(extra_ids=100_000)  # as store_of's
OTHERS = ("prefix_lm", "span_corruption", "ul2", "openmoe")
# No two tokens of the corpus are alike, and the ids of sentinels and mode texts lie elsewhere.
FIRST, TRAIN = 10, [90, 17, 44, 5, 230, 61]


def config_of(**fields):
    return DataConfig(**{"sequence_length": 48, "target_length": 40, "batch_size": 4, "objective": "span_corruption", **fields})


def batches_of(folder, split="train", **fields):
    config = config_of(**fields)
    recipes, _ = recipes_of(config, VOCABULARY)
    return Batches(store_of(folder, TRAIN, (50, 20), key="pairs"), config, split, recipes)


def test_t5s_lengths_follow_from_those_of_the_inputs():
    recipe = recipes_of(config_of(sequence_length=512, target_length=114), VOCABULARY)[0][0]
    assert recipe.text_of_row(config_of(sequence_length=512, target_length=114)) == 568 == text_and_target_lengths(512, 0.15, 3)[0]
    assert not recipe.fits(569, 512, 200) and not recipe.fits(568, 512, 113) and recipe.fits(568, 512, 114)


@pytest.mark.parametrize("objective", OTHERS)
def test_every_row_gives_back_a_piece_of_text(tmp_path, objective):
    batches = batches_of(tmp_path, objective=objective)
    recipes, vocabulary = recipes_of(config_of(objective=objective), VOCABULARY)
    is_text = lambda ids: ids[(ids >= FIRST) & (ids < FIRST + sum(TRAIN) + 70)]
    modes = {recipe.mode_ids for recipe in recipes}
    for step in range(6):
        batch = batches.batch(step)
        assert {name: values.shape for name, values in batch.items()} == {
            **dict.fromkeys(PADDING, (4, 40)), **dict.fromkeys(ENCODER_PADDING, (4, 48))}
        for row in range(4):
            last = batch["segment_ids"][row].max()
            assert last == batch["encoder_segment_ids"][row].max() and last >= 1
            for segment in range(1, last + 1):
                read, written = (np.flatnonzero(batch[name][row] == segment) for name in ("encoder_segment_ids", "segment_ids"))
                inputs, targets = batch["encoder_input_ids"][row, read], batch["target_ids"][row, written]
                assert inputs[-1] == targets[-1] == 1  # both end with the end id
                np.testing.assert_array_equal(batch["input_ids"][row, written], [0, *targets[:-1]])
                for places, name in ((read, "encoder_positions"), (written, "positions")):
                    np.testing.assert_array_equal(batch[name][row, places], np.arange(len(places)))
                    assert (np.diff(places) == 1).all()
                mode = next(mode for mode in modes if tuple(inputs[: len(mode)]) == mode)
                text = np.sort(np.concatenate([is_text(inputs[len(mode):]), is_text(targets)]))
                assert len(text) and (np.diff(text) == 1).all()  # a run of the corpus, every token of it once
                for name in ("document_ids", "domain_ids"):
                    assert len(set(batch[name][row, written]) | set(batch[f"encoder_{name}"][row, read])) == 1
            for side in ("", "encoder_"):
                np.testing.assert_array_equal(batch[f"{side}valid"][row], batch[f"{side}segment_ids"][row] > 0)
            assert (batch["target_ids"][row][~batch["valid"][row]] == 0).all()


def test_one_example_is_that_of_encoder_decoder_batch(tmp_path):
    batches = batches_of(tmp_path, batch_size=1, sequence_length=40, target_length=24)
    first = next(step for step in range(50) if batches.batch(step)["segment_ids"].max() == 1)
    batch = batches.batch(first)
    inputs, targets = (batch[name][0][batch[valid][0]] for name, valid in (("encoder_input_ids", "encoder_valid"),
                                                                           ("target_ids", "valid")))
    expected = encoder_decoder_batch([(inputs[:-1], targets[:-1])], 40, 24)
    for ours, theirs in (("encoder_input_ids", "encoder_input_ids"), ("encoder_valid", "encoder_valid"), ("valid", "decoder_valid"),
                         ("target_ids", "decoder_target_ids"), ("input_ids", "decoder_input_ids")):
        np.testing.assert_array_equal(batch[ours], expected[theirs], err_msg=ours)


@pytest.mark.parametrize("objective", OTHERS)
def test_rows_asked_for_alone_are_those_of_the_whole_batch(tmp_path, objective):
    batches, again = batches_of(tmp_path, objective=objective), batches_of(tmp_path, objective=objective)
    whole = batches.batch(3)
    again.batch(11)  # in any order
    for name, values in whole.items():
        parts = [again.batch(3, rows)[name] for rows in (slice(0, 1), slice(1, 4))]
        np.testing.assert_array_equal(np.concatenate(parts), values)
    other = batches_of(tmp_path, objective=objective, seed=1).batch(3)
    assert not np.array_equal(other["encoder_input_ids"], whole["encoder_input_ids"])


@given(st.integers(2, 300), st.integers(0, 2**32), st.data())
@settings(max_examples=60, deadline=None)
def test_a_hidden_suffix_leaves_room_on_both_sides(length, seed, data):
    prefix = data.draw(st.integers(1, length - 1))
    hidden = data.draw(st.integers(length - prefix, length))
    mask = hidden_suffix(length, seeded_bits(seed), prefix, hidden)
    assert 1 <= mask.sum() <= hidden and 1 <= (~mask).sum() <= prefix and (np.diff(mask.astype(int)) >= 0).all()


@given(st.sampled_from([Denoiser(1.0), Denoiser(1.0, 3, 0.15), Denoiser(1.0, 8, 0.5), Denoiser(1.0, 64, 0.15)]),
       st.integers(0, 80), st.integers(0, 80), st.integers(0, 200), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_the_longest_pair_fits_and_one_token_more_does_not(denoiser, inputs_room, targets_room, most, seed):
    recipe = Recipe(denoiser, (7, 7), VOCABULARY.vocab_size - 1, True)
    length = recipe.longest_pair(inputs_room, targets_room, most)
    assert length <= most
    if not length:
        return
    inputs, targets = recipe.example(np.arange(10, 10 + length), seeded_bits(seed), (inputs_room, targets_room))
    assert len(inputs) <= inputs_room and len(targets) <= targets_room and len(targets) >= 2
    if denoiser.mean_span and length < most:
        assert not recipe.fits(length + 1, inputs_room, targets_room)
        longer = span_corruption(np.arange(10, 11 + length), denoiser.rate, denoiser.mean_span, VOCABULARY.vocab_size - 1,
                                 seeded_bits(seed))
        assert len(longer[0]) + 3 > inputs_room or len(longer[1]) + 1 > targets_room


def test_validation_is_of_the_objective_and_the_fingerprint_knows_both_lengths(tmp_path):
    store = store_of(tmp_path, TRAIN, (50, 20), key="pairs")
    data = data_of_store(store, VOCABULARY, config_of())
    assert data.objective_validation is None and "encoder_valid" in data.validation.batch(0)
    prints = {data_of_store(store, VOCABULARY, config_of(target_length=length)).fingerprint for length in (39, 40)}
    assert len(prints) == 2


@pytest.mark.parametrize("fields, words", [
    (dict(sequence_length=2, target_length=40), "data.sequence_length=2, data.target_length=40: too short"),
    (dict(target_length=2), "data.sequence_length=48, data.target_length=2: too short"),
])
def test_rows_too_short_for_an_example_are_refused(fields, words):
    with pytest.raises(CorpusError, match=words):
        recipes_of(config_of(**fields), VOCABULARY)


@pytest.mark.parametrize("fields, words", [
    (dict(objective="causal"), "data.objective='causal': gives an encoder nothing to read"),
    (dict(prefix_attention="bidirectional"), "data.prefix_attention='bidirectional': has no effect with data.target_length"),
    (dict(target_length=-1), "data.target_length=-1: must be at least 0"),
])
def test_settings_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        config_of(**fields)
