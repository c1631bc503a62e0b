"""One training step: what the loss is made of, microbatches that change nothing, and steps that are not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax.training.evaluate import put_batch
from moe_jax.training.losses import cross_entropy, smoothed_cross_entropy
from moe_jax.training.optimizer import schedule
from moe_jax.training.step import gradients

SMALL = dict(model_num_layers=1, moe_every=1, data_sequence_length=8)
LENGTHS = [8, 8, 1, 3, 8, 2, 8, 5]  # 43 valid tokens, unequal in every way to cut the rows
BATCH = tiny.batch(length=8, lengths=LENGTHS)


def grads(batch=BATCH, **settings):
    config = tiny.config(**SMALL, **settings)
    return tiny.grads(config, tiny.params(config), batch)


# What the loss is made of


def test_b04_total_is_the_weighted_sum_of_its_parts():
    _, metrics = grads(moe_balance_weight=0.5, moe_router_z_weight=0.25, training_output_z_weight=0.125)
    parts = metrics["sums"]
    assert set(parts) == {"loss/ce", "loss/balance", "loss/router_z", "loss/output_z", "loss/total"}
    np.testing.assert_allclose(parts["loss/total"], parts["loss/ce"] + 0.5 * parts["loss/balance"]
                               + 0.25 * parts["loss/router_z"] + 0.125 * parts["loss/output_z"], rtol=1e-6)
    assert all(part > 0 for part in parts.values())


def test_the_parts_are_means_over_valid_tokens():
    config = tiny.config(**SMALL)
    _, metrics = grads()
    logits_BSV, valid_BS = tiny.logits(config, tiny.params(config), BATCH, tiny.RoutingMode.training(config)), BATCH["valid"]
    ce_BS, log_z_BS = (np.asarray(v) for v in cross_entropy(jnp.asarray(logits_BSV), jnp.asarray(BATCH["target_ids"])))
    np.testing.assert_allclose(metrics["sums"]["loss/ce"], ce_BS[valid_BS].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["sums"]["loss/output_z"], (log_z_BS[valid_BS] ** 2).mean(), rtol=1e-5)


@pytest.mark.parametrize("field, part", [("moe_balance_weight", "balance"), ("moe_router_z_weight", "router_z")])
def test_b05_b06_b07_each_routing_loss_reaches_the_router_once_and_linearly(field, part):
    """Gradient at weights 0, 0.5 and 1: the difference doubles, is the part's own, and moves nothing behind the router."""
    off = dict(moe_balance_weight=0.0, moe_router_z_weight=0.0, training_output_z_weight=0.0)
    runs = [grads(**{**off, field: weight}) for weight in (0.0, 0.5, 1.0)]
    (none, none_metrics), (half, half_metrics), (full, full_metrics) = runs
    router = [leaf["body"]["layers"][0]["moe"]["w_router_DE"] for leaf in (none, half, full)]
    assert np.abs(router[2] - router[0]).max() > 1e-3
    np.testing.assert_allclose(router[2] - router[0], 2 * (router[1] - router[0]), rtol=1e-3, atol=1e-6)
    total = [metrics["sums"]["loss/total"] for metrics in (none_metrics, half_metrics, full_metrics)]
    np.testing.assert_allclose(total[1] - total[0], 0.5 * full_metrics["sums"][f"loss/{part}"], rtol=1e-4)
    np.testing.assert_allclose(total[2] - total[0], full_metrics["sums"][f"loss/{part}"], rtol=1e-4)
    experts = [leaf["body"]["layers"][0]["moe"]["experts"] for leaf in (none, full)]
    tiny.assert_close(*experts)


def test_label_smoothing_changes_the_total_and_not_the_reported_cross_entropy():
    config = tiny.config(**SMALL, moe_balance_weight=0.0, moe_router_z_weight=0.0, training_output_z_weight=0.0)
    _, metrics = grads(moe_balance_weight=0.0, moe_router_z_weight=0.0, training_output_z_weight=0.0,
                       training_label_smoothing=0.1)
    logits_BSV = jnp.asarray(tiny.logits(config, tiny.params(config), BATCH, tiny.RoutingMode.training(config)))
    ce_BS, log_z_BS = cross_entropy(logits_BSV, jnp.asarray(BATCH["target_ids"]))
    smoothed_BS = np.asarray(smoothed_cross_entropy(logits_BSV, ce_BS, log_z_BS, 0.1))
    np.testing.assert_allclose(metrics["sums"]["loss/ce"], np.asarray(ce_BS)[BATCH["valid"]].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["sums"]["loss/total"], smoothed_BS[BATCH["valid"]].mean(), rtol=1e-5)


def test_dense_models_have_no_routing_losses():
    _, metrics = grads(moe_num_experts=0)
    assert metrics["sums"]["loss/balance"] == metrics["sums"]["loss/router_z"] == 0 and metrics["routing"] == {}


def test_gradients_are_the_slopes_of_the_loss():
    """Along each parameter's own gradient the loss rises by its norm: nothing is scaled, lost or added twice on the way
    through products and dispatch, whose gradients are written by hand.

    Every token goes to every expert (K = E), which keeps 6 of a row's 8 tokens: no choice and no drop can jump.
    """
    config = tiny.config(**SMALL, moe_experts_per_token=4, moe_capacity_factor=0.75, moe_num_shared_experts=1)
    params = tiny.params(config)
    slopes, _ = tiny.grads(config, params, BATCH)
    paths = jax.tree_util.tree_leaves_with_path(slopes)
    for path, gradient in paths:
        norm = np.linalg.norm(gradient)
        assert norm > 1e-4, path

        def loss(sign):
            move = lambda p, leaf: leaf + sign * 3e-3 * gradient / norm if p == path else leaf
            return float(tiny.grads(config, jax.tree_util.tree_map_with_path(move, params), BATCH)[1]["sums"]["loss/total"])

        np.testing.assert_allclose((loss(1) - loss(-1)) / 6e-3, norm, rtol=0.02, atol=1e-3, err_msg=str(path))


# Microbatches

SCOPED = dict(moe_balance_weight=1.0, moe_router_z_weight=0.1)


def test_microbatches_put_the_model_into_the_program_once():
    """A second copy, for the first of them, doubled the time of compiling a large model."""
    def products(microbatches):
        config = tiny.config(**SMALL, training_microbatches=microbatches)
        with jax.set_mesh(tiny.ONE):
            arguments = tiny.placed(tiny.params(config), tiny.ONE), put_batch(BATCH, tiny.ONE), tiny.no_bias(config)
            traced = jax.make_jaxpr(lambda params, batch, bias_LE: gradients(
                params, config, tiny.VOCAB, batch, bias_LE, jax.random.key(0)))(*arguments)
        return str(traced).count("dot_general[")

    assert products(4) == products(2) == products(1) > 10


@pytest.mark.parametrize("scope", ["group", "global"])
@pytest.mark.parametrize("microbatches", [2, 4])
def test_b10_b11_b12_b13_microbatches_change_no_loss_no_count_and_no_gradient(scope, microbatches):
    expected = grads(**SCOPED, moe_balance_scope=scope)
    actual = grads(**SCOPED, moe_balance_scope=scope, training_microbatches=microbatches)
    tiny.assert_close(actual[1], expected[1])
    tiny.assert_close(actual[0], expected[0], rtol=1e-4)


def test_b21_the_scope_microbatch_is_the_token_weighted_mean_of_each_microbatchs_own_loss():
    scope = dict(**SCOPED, moe_balance_scope="microbatch")
    together, metrics = grads(**scope, training_microbatches=2)
    # Microbatch m holds rows m, m + 2, …
    halves = [{name: value[m::2] for name, value in BATCH.items()} for m in (0, 1)]
    weights = [half["valid"].sum() / 43 for half in halves]
    assert weights[0] != weights[1]
    own = [grads(half, **scope, data_batch_size=4) for half in halves]
    mean = lambda trees: jax.tree.map(lambda a, b: weights[0] * a + weights[1] * b, *trees)
    tiny.assert_close(metrics["sums"], mean([m["sums"] for _, m in own]))
    tiny.assert_close(together, mean([g for g, _ in own]), rtol=1e-4)
    pooled = grads(**scope)[1]["sums"]
    assert abs(pooled["loss/balance"] - metrics["sums"]["loss/balance"]) > 1e-3
    np.testing.assert_allclose(pooled["loss/ce"], metrics["sums"]["loss/ce"], rtol=1e-5)


def test_the_scopes_differ_and_agree_on_one_group():
    balance = lambda batch, scope: grads(batch, **SCOPED, moe_balance_scope=scope)[1]["sums"]["loss/balance"]
    assert abs(balance(BATCH, "group") - balance(BATCH, "global")) > 1e-3
    # One row with valid tokens: the other groups weigh nothing.
    alone = tiny.batch(length=8, lengths=[8, 0, 0, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(balance(alone, "group"), balance(alone, "global"), rtol=1e-5)


def test_a_batch_without_a_valid_token_has_loss_zero_and_no_gradient():
    nothing, metrics = grads(tiny.batch(length=8, lengths=[0] * 8))
    for leaf in [*jax.tree.leaves(nothing), *jax.tree.leaves(metrics)]:
        np.testing.assert_array_equal(leaf, 0.0)


# The step: EMA, router bias, steps that are not finite

FULL = tiny.config(**SMALL, optimizer_name="adamw", optimizer_learning_rate=0.01, optimizer_weight_decay=0.1,
                   optimizer_schedule="cosine", optimizer_warmup_steps=2, training_ema_decay=0.75,
                   training_nonfinite="skip", moe_bias_update_rate=0.01)
STOP = dataclasses.replace(FULL, training=dataclasses.replace(FULL.training, nonfinite="stop"))


@pytest.fixture(scope="module")
def stepped():
    before = tiny.state(FULL)
    return before, *tiny.step(FULL, before, BATCH)


def test_a_step_reports_its_rate_its_tokens_and_the_norms(stepped):
    _, after, metrics = stepped
    expected, _ = tiny.grads(FULL, tiny.params(FULL), BATCH)
    squares = {name: np.sum(np.square(leaf, dtype=np.float64)) for name, leaf in tiny.leaves(expected).items()}
    np.testing.assert_allclose(metrics["grad_norm"], sum(squares.values()) ** 0.5, rtol=1e-5)
    router = sum(value for name, value in squares.items() if name.endswith("w_router_DE"))
    np.testing.assert_allclose(metrics["router_grad_norm"], router**0.5, rtol=1e-5)
    assert metrics["tokens"] == 43 and metrics["applied"]
    assert metrics["learning_rate"] == schedule(FULL.optimizer, 20)(0) == pytest.approx(0.005)
    assert after["step"] == 1 and after["skipped"] == 0


def test_ema_is_the_decayed_mean_of_the_parameters(stepped):
    before, after, _ = stepped
    expected = jax.tree.map(lambda ema, new: 0.75 * np.asarray(ema) + 0.25 * np.asarray(new), before["ema"], after["params"])
    tiny.assert_close(after["ema"], expected, rtol=1e-6, atol=1e-8)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), before["params"], after["params"])
    assert all(jax.tree.leaves(changed))


def test_b30_b32_the_router_bias_moves_once_per_step_by_the_counts_of_the_whole_batch(stepped):
    _, after, metrics = stepped
    counts_E = metrics["routing"]["counts_LE"][0]
    assert counts_E.sum() == 2 * 43
    # Up by the rate for experts below the mean load 86/4 = 21.5, down for those above.
    np.testing.assert_allclose(after["router_bias_LE"], [np.where(counts_E < 21.5, 0.01, -0.01)], rtol=1e-6)


def test_b32_microbatches_move_the_router_bias_once_by_their_sum(stepped):
    _, after, metrics = stepped
    config = dataclasses.replace(FULL, training=dataclasses.replace(FULL.training, microbatches=2))
    split, split_metrics = tiny.step(config, tiny.state(config), BATCH)
    np.testing.assert_array_equal(split_metrics["routing"]["counts_LE"], metrics["routing"]["counts_LE"])
    np.testing.assert_array_equal(split["router_bias_LE"], after["router_bias_LE"])


def with_nan(state, name="embedding_VD"):
    """The embedding of id 31 is NaN; only a batch with that id meets it."""
    params = jax.device_get(state["params"])
    params["embedding"][name] = np.array(params["embedding"][name])
    params["embedding"][name][31] = np.nan
    return {**state, "params": params, "ema": params}


def replaced_id(batch, old, new):
    return {**batch, "input_ids": np.where(batch["input_ids"] == old, new, batch["input_ids"]).astype(np.int32)}


GOOD, BAD = replaced_id(BATCH, 31, 30), replaced_id(BATCH, 30, 31)


def frozen(after, before):
    """Everything but ``skipped`` is bit for bit as it was."""
    host = lambda state: {k: jax.random.key_data(v) if k == "rng" else v for k, v in state.items() if k != "skipped"}
    tiny.assert_equal(jax.device_get(host(after)), jax.device_get(host(before)))


@pytest.fixture(scope="module")
def poisoned():
    assert 31 in BAD["input_ids"] and 31 not in GOOD["input_ids"]
    host = with_nan(tiny.state(FULL))
    return tiny.state(FULL, params=host["params"], ema=host["ema"])


def test_r8_a_step_that_is_not_finite_changes_nothing_but_the_counter(poisoned):
    after, metrics = tiny.step(FULL, poisoned, BAD)
    assert not metrics["applied"] and not np.isfinite(metrics["sums"]["loss/total"])
    assert after["skipped"] == 1
    frozen(after, poisoned)


def test_r8_skip_goes_on_with_the_next_batch(poisoned):
    after, _ = tiny.step(FULL, poisoned, BAD)
    later, metrics = tiny.step(FULL, after, GOOD)
    assert metrics["applied"] and later["step"] == 1 and later["skipped"] == 1


def test_r8_stop_applies_no_later_step_either(poisoned):
    fine, metrics = tiny.step(STOP, poisoned, GOOD)
    assert metrics["applied"] and fine["step"] == 1
    after, metrics = tiny.step(STOP, fine, BAD)
    assert not metrics["applied"] and after["skipped"] == 1
    later, metrics = tiny.step(STOP, after, GOOD)
    assert not metrics["applied"] and later["skipped"] == 2
    assert np.isfinite(metrics["sums"]["loss/total"])
    frozen(later, fine)


def test_r8_b35_a_nan_in_the_router_stops_the_step_instead_of_winning_the_route():
    params = tiny.params(FULL)
    layer = params["body"]["layers"][0]["moe"]
    layer["w_router_DE"] = np.array(layer["w_router_DE"])
    layer["w_router_DE"][0, 0, 2] = np.nan  # the logit of expert 2 is NaN for every token
    before = tiny.state(FULL, params=params)
    after, metrics = tiny.step(FULL, before, BATCH)
    assert metrics["routing"]["counts_LE"][0, 2] == 0 and metrics["routing"]["counts_LE"].sum() == 86
    assert not metrics["applied"]
    frozen(after, before)


def test_the_noise_of_a_step_is_its_own():
    """Jitter differs from step to step, and is the same when a step is done again."""
    config = tiny.config(**SMALL, moe_router_jitter=0.3, optimizer_learning_rate=1e-30)
    state = tiny.state(config)
    first, metrics = tiny.step(config, state, BATCH)
    again = tiny.step(config, state, BATCH)[1]
    second = tiny.step(config, first, BATCH)[1]
    z = [m["sums"]["loss/router_z"] for m in (metrics, again, second)]
    assert z[0] == z[1] != z[2]
