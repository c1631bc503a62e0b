"""Training under other objectives than the causal one: the loss of targets alone, prefixes that are seen from both sides, and
a run that resumes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from running import CLOCKED, moe_jax, overrides, write_corpus  # noqa: F401 (moe_jax is a fixture)

from moe_jax.inference.generate import prefill
from moe_jax.models.decoder import attention_mask
from moe_jax.nn.moe import RoutingMode
from moe_jax.training.evaluate import Evaluator, loss_summary
from moe_jax.training.losses import cross_entropy
from moe_jax.training.metrics import read_metrics

SMALL = dict(model_num_layers=1, moe_every=1, data_sequence_length=8, moe_dispatch="dropless", moe_balance_weight=1.0,
             moe_router_z_weight=0.1)
CONFIG = tiny.config(**SMALL)
# Two documents a row; of each all but the first two tokens are targets, of the last row's nothing.
PLAIN = tiny.batch(length=8, segments=2, lengths=[8, 8, 3, 7, 8, 2, 8, 5])
IS_TARGET = PLAIN["valid"] & (PLAIN["positions"] >= 2) & (np.arange(8) < 7)[:, None]
BATCH = {**PLAIN, "is_target": IS_TARGET}


@functools.lru_cache(maxsize=None)
def grads(targets=True, mesh=tiny.ONE, **settings):
    config = tiny.config(**SMALL, **settings)
    return tiny.grads(config, tiny.params(config), BATCH if targets else PLAIN, mesh)


# Loss


def test_the_loss_is_of_targets_and_the_balance_of_all_tokens():
    logits_BSV = tiny.logits(CONFIG, tiny.params(CONFIG), PLAIN)
    ce_BS, log_z_BS = (np.asarray(x) for x in cross_entropy(jnp.asarray(logits_BSV), jnp.asarray(PLAIN["target_ids"])))
    slopes, metrics = grads()
    parts, plain = metrics["sums"], grads(targets=False)[1]["sums"]
    np.testing.assert_allclose(parts["loss/ce"], ce_BS[IS_TARGET].mean(), rtol=1e-5)
    np.testing.assert_allclose(parts["loss/output_z"], (log_z_BS[IS_TARGET] ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(plain["loss/ce"], ce_BS[PLAIN["valid"]].mean(), rtol=1e-5)
    for name in ("loss/balance", "loss/router_z"):
        np.testing.assert_allclose(parts[name], plain[name], rtol=1e-6)
    tiny.assert_equal(metrics["routing"], grads(targets=False)[1]["routing"])
    # Where nothing is to be predicted the target makes no difference, and where something is, it does.
    for where, same in ((~IS_TARGET, True), (IS_TARGET, False)):
        other = {**BATCH, "target_ids": np.where(where, (BATCH["target_ids"] + 7) % tiny.VOCAB, BATCH["target_ids"])}
        other_slopes, other_metrics = tiny.grads(CONFIG, tiny.params(CONFIG), other)
        assert (other_metrics["sums"]["loss/total"] == parts["loss/total"]) == same
        head = [tree["embedding"]["w_logits_DV"] for tree in (slopes, other_slopes)]
        assert np.array_equal(*head) == same


def test_b10_b13_microbatches_and_devices_with_unequal_targets_change_nothing():
    expected = grads()
    assert IS_TARGET[0::2].sum() != IS_TARGET[1::2].sum()  # of the two microbatches
    spread = grads(mesh=tiny.mesh(data=2, expert=2, tensor=2), training_microbatches=2)
    tiny.assert_close(spread[1], expected[1])
    tiny.assert_close(spread[0], expected[0], rtol=1e-4)


def test_a_step_counts_tokens_and_targets():
    _, metrics = tiny.step(CONFIG, tiny.state(CONFIG), BATCH)
    assert metrics["tokens"] == PLAIN["valid"].sum() and metrics["targets"] == IS_TARGET.sum()


def test_evaluation_is_of_targets():
    evaluator = Evaluator(CONFIG, tiny.VOCAB, np.ones(tiny.VOCAB, np.int32), ["even", "odd"], tiny.ONE)
    with jax.set_mesh(tiny.ONE):
        mode, params = RoutingMode("dropless", 1.0, record=True), tiny.placed(tiny.params(CONFIG), tiny.ONE)
        # One evaluator, batches with other keys: each is counted by its own.
        plain, own = (evaluator.sums(params, tiny.no_bias(CONFIG), [batch], mode) for batch in (PLAIN, BATCH))
    logits_BSV = jnp.asarray(tiny.logits(CONFIG, tiny.params(CONFIG), PLAIN))
    ce_BS = np.asarray(cross_entropy(logits_BSV, jnp.asarray(PLAIN["target_ids"]))[0])
    for sums, counted in ((plain, PLAIN["valid"]), (own, IS_TARGET)):
        summary = loss_summary(sums, ["even", "odd"])
        assert summary["tokens"] == counted.sum()
        np.testing.assert_allclose(summary["ce"], ce_BS[counted].mean(), rtol=1e-5)
    np.testing.assert_array_equal(plain["counts_LE"], own["counts_LE"])


# Attention


def test_the_mask_by_a_loop():
    in_prefix = PLAIN["valid"] & (PLAIN["positions"] <= 2)
    segments, valid = PLAIN["segment_ids"], PLAIN["valid"]
    masks = [np.asarray(attention_mask(segments, segments, valid, 0, prefix)) for prefix in (None, in_prefix)]
    for row in range(8):
        for query in range(8):
            for key in range(8):
                inside = valid[row, query] and segments[row, query] == segments[row, key]
                both = in_prefix[row, query] and in_prefix[row, key]
                assert masks[0][row, query, key] == (inside and key <= query)
                assert masks[1][row, query, key] == (inside and (key <= query or both))
    # With empty slots behind, as a cache has them.
    slots = np.pad(segments, ((0, 0), (0, 3)))
    wide = np.asarray(attention_mask(segments, slots, valid, 0, in_prefix))
    np.testing.assert_array_equal(wide, np.pad(masks[1], ((0, 0), (0, 0), (0, 3))) & (segments > 0)[:, :, None])


def changed_at(batch, place):
    """The batch with another input there (and so another target before it)."""
    other = {name: values.copy() for name, values in batch.items()}
    other["input_ids"][:, place] = batch["input_ids"][:, place] % 30 + 1
    return other


def test_a_prefix_is_seen_from_both_sides_and_targets_only_backwards():
    config = tiny.config(model_num_layers=2, moe_every=2, data_sequence_length=8, data_objective="prefix_lm",
                         data_prefix_attention="bidirectional")
    params, batch = tiny.params(config), tiny.batch(length=8)
    batch["in_prefix"] = batch["positions"] <= 3
    before = tiny.logits(config, params, batch)
    for place in range(1, 8):
        same = np.abs(tiny.logits(config, params, changed_at(batch, place)) - before).max(-1) < 1e-6
        if place <= 3:
            assert not same[:, :4].any() and not same[:, 4:].any()  # all see it
        else:
            assert same[:, :place].all() and not same[:, place:].any()
    # A prefix of one token is no prefix; the layers are the same with and without.
    alone = {**batch, "in_prefix": batch["positions"] == 0}
    causal = tiny.logits(config, params, {name: values for name, values in batch.items() if name != "in_prefix"})
    np.testing.assert_allclose(tiny.logits(config, params, alone), causal, rtol=1e-5, atol=1e-6)
    assert np.abs(before - causal)[:, 0].max() > 1e-3

    # A prompt is read as what is given was: the cache, padded on the left, against the whole row.
    row = {name: values[:2, :4] for name, values in batch.items()}
    pad = lambda values: np.pad(values, ((0, 0), (4, 0)))
    with jax.set_mesh(tiny.ONE):
        run = jax.jit(lambda params, ids, valid, bias: prefill(params, ids, valid, bias, config, tiny.VOCAB, 10)[0])
        logits_BV = jax.device_get(run(tiny.placed(params, tiny.ONE), pad(row["input_ids"]), pad(row["valid"]), tiny.no_bias(config)))
    np.testing.assert_allclose(logits_BV, before[:2, 3], rtol=1e-4, atol=1e-5)


# A run


@pytest.mark.slow
def test_a_run_resumes_and_says_what_it_trained_on(tmp_path, moe_jax):  # noqa: F811
    corpus = write_corpus(tmp_path / "text")
    settings = dict(data__objective="ul2", data__prefix_attention="bidirectional", data__sequence_length=32, model__mtp_depth=1,
                    training__eval_every=4)

    def train(name, steps, *words):
        outcome = moe_jax("train", *overrides(corpus, **settings, training__num_steps=steps), f"--workdir={tmp_path / name}", *words)
        assert outcome.code == 0, outcome.err

    train("whole", 8)
    train("parts", 4)
    train("parts", 8, "--allow-config-change")
    lines = {}
    for name in ("whole", "parts"):
        lines[name] = {(line["kind"], line["step"]): {k: v for k, v in line.items() if k not in CLOCKED}
                       for line in read_metrics(tmp_path / name / "metrics.jsonl")}
    assert lines["whole"].keys() <= lines["parts"].keys()
    for key, line in lines["whole"].items():
        assert line == lines["parts"][key], key
    step, evaluated = lines["whole"]["train", 8], lines["whole"]["eval", 8]
    assert 0.1 < step["target_fraction"] < 0.9 and step["loss/mtp"] > 0 and "moe/layer_2/load_max" in step
    assert evaluated["objective/ce"] > 0 and evaluated["objective/ce"] != evaluated["loss/ce"]
    evaluation = json.loads((tmp_path / "whole" / "evaluation.json").read_text())
    assert evaluation["objective"] == {"name": "ul2", "ce": evaluated["objective/ce"]}
