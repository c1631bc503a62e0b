"""Multi-token prediction: what is predicted, by hand; the module, in NumPy; its loss, statistics and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_config import refusal

from moe_jax.nn.multi_token import ahead, sees_ahead
from moe_jax.training.losses import cross_entropy
from moe_jax.training.metrics import routing_metrics
from moe_jax.training.state import initial_state
from moe_jax.training.step import Totals, check_statistics, forward, further_targets_of

SMALL = dict(model_num_layers=2, moe_every=2, data_sequence_length=8)
# Documents of 4 tokens, rows of unequal length.
BATCH = tiny.batch(length=8, segments=2, lengths=[8, 8, 3, 7, 8, 2, 8, 5])
TARGETS = {**BATCH, "is_target": BATCH["valid"] & (BATCH["positions"] >= 2)}


# Every option that most of these tests need, so that few programs are compiled.
OPTIONS = dict(moe_dispatch="dropless", moe_balance_weight=1.0, moe_router_z_weight=0.1, moe_balance_scope="global")


def config_of(depth=2, **settings):
    return tiny.config(**SMALL, **(OPTIONS | settings), model_mtp_depth=depth)


@functools.lru_cache(maxsize=None)
def grads(depth=2, mesh=tiny.ONE, **settings):
    config = config_of(depth, **settings)
    return tiny.grads(config, tiny.params(config), TARGETS, mesh)


# What is predicted


def test_targets_by_hand():
    # Documents 10 11 12 and 20 21, then padding; the loss counts the last two of the first and the last of the second.
    batch = {"target_ids": np.array([[10, 11, 12, 20, 21, 0]]), "segment_ids": np.array([[1, 1, 1, 2, 2, 0]]),
             "valid": np.array([[True] * 5 + [False]]), "is_target": np.array([[False, True, True, False, True, False]])}
    ids, valid, counted = (np.asarray(x)[0].astype(int).tolist() for x in further_targets_of(batch, 1))
    assert ids == [11, 12, 20, 21, 0, 0]
    assert valid == [1, 1, 0, 1, 0, 0]  # not from 12 into the next document, nor into padding
    assert counted == [1, 1, 0, 1, 0, 0]
    ids, valid, counted = (np.asarray(x)[0].astype(int).tolist() for x in further_targets_of(batch, 2))
    assert ids == [12, 20, 21, 0, 0, 0] and valid == [1, 0, 0, 0, 0, 0] and counted == [1, 0, 0, 0, 0, 0]
    _, valid, counted = (np.asarray(x)[0].astype(int).tolist() for x in further_targets_of({**batch, "is_target": batch["valid"]
                         & (batch["target_ids"] == 12)}, 1))
    assert valid == [1, 1, 0, 1, 0, 0] and counted == [0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("places", [1, 2, 3])
def test_ahead_by_a_loop(places):
    ids, segments, valid = BATCH["target_ids"], BATCH["segment_ids"], BATCH["valid"]
    for row in range(8):
        for place in range(8):
            later = place + places
            there = later < 8 and valid[row, later] and valid[row, place] and segments[row, later] == segments[row, place]
            assert np.asarray(sees_ahead(segments, valid, places))[row, place] == there
            assert np.asarray(ahead(ids, places))[row, place] == (ids[row, later] if later < 8 else 0)


def test_totals_count_by_depth():
    totals = jax.device_get(Totals.of(config_of(), TARGETS))
    count = lambda k, kind: np.asarray(further_targets_of(TARGETS, k)[kind]).sum()
    assert totals.tokens == BATCH["valid"].sum() == 49 and totals.targets == TARGETS["is_target"].sum()
    assert totals.further_tokens_D.tolist() == [count(1, 1), count(2, 1)]
    assert totals.further_targets_D.tolist() == [count(1, 2), count(2, 2)]
    # Depth 2 of documents of four tokens: their first two places.
    full = Totals.of(config_of(), tiny.batch(length=8, segments=2))
    assert full.further_tokens_D.tolist() == [48, 32] and full.routed(config_of()).tolist() == [64, 48, 32]
    assert Totals.of(config_of(0), BATCH).further_tokens_D is None


# The module


@functools.lru_cache(maxsize=None)
def training_output(config):
    mode = tiny.RoutingMode("dropless", 1.0)
    return jax.jit(lambda params, batch, bias_LE: forward(config, tiny.VOCAB, params, batch, mode, bias_LE, further=True),
                   compiler_options=tiny.QUICK)


def output(config, params, batch=BATCH, bias_LE=None):
    bias_LE = tiny.no_bias(config) if bias_LE is None else bias_LE
    batch = {name: values for name, values in batch.items() if name != "is_target"}  # which concerns the loss alone
    with jax.set_mesh(tiny.ONE):
        return jax.device_get(training_output(config)(tiny.placed(params, tiny.ONE), tiny.put_batch(batch, tiny.ONE), bias_LE))


def logits_of(output):
    """By depth, from 0, the main one."""
    return (output.logits_BSV, *output.further_logits)


def rms(x, scale=1.0):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def test_the_module_in_numpy():
    """A block that adds nothing leaves M[RMSNorm(h); RMSNorm(Emb)], normed, times the output layer; h of a model whose
    blocks add nothing is the embedding of its input."""
    config = config_of(moe_num_experts=0)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if path[-1].key in ("w_out_HdD", "w_out_FD") else leaf, tiny.params(config))
    for depth, scale in enumerate((1.5, 0.5)):
        params["mtp"][depth]["token_norm"]["scale_D"] = params["mtp"][depth]["token_norm"]["scale_D"] * scale
    table, head = params["embedding"]["embedding_VD"], params["embedding"]["w_logits_DV"]
    found = output(config, params)
    h = table[BATCH["input_ids"]]
    np.testing.assert_allclose(found.logits_BSV, rms(h) @ head, rtol=1e-4, atol=1e-5)
    for depth, scale in enumerate((1.5, 0.5)):
        tokens = np.pad(BATCH["target_ids"][:, depth:], ((0, 0), (0, depth)))
        join = params["mtp"][depth]["w_join_JDO"]
        h = np.concatenate([rms(h), rms(table[tokens], scale)], -1) @ join.reshape(-1, 16)
        np.testing.assert_allclose(found.further_logits[depth], rms(h) @ head, rtol=1e-4, atol=1e-4)


def test_its_block_has_the_relative_positions_of_the_decoder():
    """In a model whose other attention adds nothing, their biases act there alone."""
    config = config_of(1, moe_num_experts=0, attention_positions="relative")
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 0 if path[-1].key == "w_out_HdD" and path[0].key != "mtp" else leaf, tiny.params(config))
    random = np.random.default_rng(0).normal(size=params["relative_bias_XH"].shape).astype(np.float32)
    before, after = (logits_of(output(config, {**params, "relative_bias_XH": scale * random})) for scale in (0, 1))
    np.testing.assert_array_equal(after[0], before[0])
    assert np.abs(after[1] - before[1]).max() > 1e-2


def test_a_token_is_predicted_from_those_before_it_alone():
    """Changing token t changes no prediction of it or of earlier ones, at any depth, and no other document's."""
    config = config_of()
    params, place = tiny.params(config), 5
    changed = {name: values.copy() for name, values in BATCH.items()}
    changed["target_ids"][:, place] = BATCH["target_ids"][:, place] % 30 + 1
    changed["input_ids"][:, place + 1] = changed["target_ids"][:, place]
    before, after = (output(config, params, batch) for batch in (BATCH, changed))
    for depth, (old, new) in enumerate(zip(logits_of(before), logits_of(after))):
        same = np.abs(old - new).max(-1) < 1e-6
        valid = BATCH["valid"] if depth == 0 else np.asarray(sees_ahead(BATCH["segment_ids"], BATCH["valid"], depth))
        # Place p at depth d predicts token p + d.
        assert same[:, : place - depth + 1][valid[:, : place - depth + 1]].all()
        later = valid[:, place - depth + 1 :]
        if later.any():
            assert not same[:, place - depth + 1 :][later].all()


def test_with_a_prefix_seen_from_both_sides_no_target_is_seen_before_its_time():
    config = config_of(data_objective="prefix_lm", data_prefix_attention="bidirectional")
    params = tiny.params(config)
    batch = tiny.batch(length=8)
    batch |= {"is_target": batch["positions"] >= 4, "in_prefix": batch["positions"] <= 4}  # four given, four to predict
    for place in range(8):
        changed = {name: values.copy() for name, values in batch.items()}
        changed["target_ids"][:, place] = batch["target_ids"][:, place] % 30 + 1
        if place < 7:
            changed["input_ids"][:, place + 1] = changed["target_ids"][:, place]
        before, after = (output(config, params, batch) for batch in (batch, changed))
        for depth, (old, new) in enumerate(zip(logits_of(before), logits_of(after))):
            same = np.abs(old - new).max(-1) < 1e-6
            # A prediction that counts, of the changed token or an earlier one, did not see it.
            counted = [p for p in range(8) if 4 <= p + depth <= place]
            assert place < 4 or same[:, counted].all()
            if place < 4 and depth < 2:  # and what is given reaches the places before it
                assert not same[:, 0].any()


# The loss


def test_the_loss_is_the_mean_over_depths_of_the_mean_over_their_targets():
    found, means = output(config_of(), tiny.params(config_of()), TARGETS), []
    for depth, logits in enumerate(found.further_logits, start=1):
        ids, _, counted = further_targets_of(TARGETS, depth)
        means.append(np.asarray(cross_entropy(jnp.asarray(logits), ids)[0])[np.asarray(counted)].mean())
    parts = grads()[1]["sums"]
    np.testing.assert_allclose(parts["loss/mtp"], np.mean(means), rtol=1e-5)
    np.testing.assert_allclose(parts["loss/total"], parts["loss/ce"] + 0.3 * parts["loss/mtp"] + parts["loss/balance"]
                               + 0.1 * parts["loss/router_z"] + 1e-4 * parts["loss/output_z"], rtol=1e-6)


def test_at_depth_0_nothing_is_added():
    without, zero = tiny.config(**SMALL, **OPTIONS), config_of(0)
    assert without == zero and "mtp" not in tiny.params(zero)
    assert "loss/mtp" not in grads(depth=0)[1]["sums"]
    # And what there is beside it does not change the model: the same parameters, the same main loss.
    assert set(tiny.leaves(tiny.params(zero))) < set(tiny.leaves(tiny.params(config_of())))
    np.testing.assert_allclose(grads(depth=0)[1]["sums"]["loss/ce"], grads()[1]["sums"]["loss/ce"], rtol=1e-6)


def test_gradients_are_the_slopes_of_the_loss():
    """Of what multi-token prediction adds: every parameter of its modules, and the weights that they share."""
    config = config_of(1, moe_experts_per_token=4)  # every token to every expert: nothing jumps
    params = tiny.params(config)
    slopes, _ = tiny.grads(config, params, BATCH)
    for path, gradient in jax.tree_util.tree_leaves_with_path(slopes):
        names = [getattr(key, "key", "") for key in path]
        if names[0] not in ("mtp", "embedding", "final_norm") or path[-1].key in ("w_key_DHd", "w_query_DHd"):
            continue
        norm = np.linalg.norm(gradient)
        assert norm > 1e-4, path

        def loss(sign):
            move = lambda p, leaf: leaf + sign * 3e-3 * gradient / norm if p == path else leaf
            return float(tiny.grads(config, jax.tree_util.tree_map_with_path(move, params), BATCH)[1]["sums"]["loss/total"])

        np.testing.assert_allclose((loss(1) - loss(-1)) / 6e-3, norm, rtol=0.03, atol=1e-3, err_msg=str(path))


def test_microbatches_and_devices_change_nothing():
    expected = grads()
    spread = grads(mesh=tiny.mesh(data=2, expert=2, tensor=2), training_microbatches=2)
    tiny.assert_close(spread[1], expected[1])
    tiny.assert_close(spread[0], expected[0], rtol=1e-4)


# Routing


def test_its_layers_report_and_are_balanced():
    config = config_of()
    assert config.moe_layers == (1,) and config.trained_moe_layers == (1, 2, 3)
    statistics, (_, metrics) = output(config, tiny.params(config), TARGETS).statistics, grads()
    check_statistics(config, statistics, training=True)
    with pytest.raises(RuntimeError, match="2 layers returned .* has 3 MoE layers"):
        check_statistics(config, jax.tree.map(lambda leaf: leaf[:2], statistics), training=True)
    # The balance loss is the mean over the three; scope "global": over all tokens that each routes.
    totals = jax.device_get(Totals.of(config, TARGETS).routed(config))
    counts_LE, probabilities_LE = statistics.router.choices_E.sum(1), statistics.router.probability_E.sum(1)
    switch_L = 4 * (counts_LE / (2 * totals[:, None]) * probabilities_LE / totals[:, None]).sum(1)
    np.testing.assert_allclose(metrics["sums"]["loss/balance"], switch_L.mean(), rtol=1e-5)
    np.testing.assert_array_equal(metrics["routing"]["counts_LE"], counts_LE)
    np.testing.assert_array_equal(counts_LE.sum(1), 2 * totals)
    routing = {**metrics["routing"], "valid_tokens": totals, "layers": config.trained_moe_layers}
    assert routing_metrics(routing, 2)["moe/choices_per_token"] == 2
    with pytest.raises(ValueError, match="valid tokens"):
        routing_metrics({**routing, "valid_tokens": totals[0]}, 2)


def test_its_selection_bias_acts_there_alone():
    config, bias_LE = config_of(), np.zeros((3, 4), np.float32)
    bias_LE[2, 2:] = 1e9
    before, after = (output(config, tiny.params(config), bias_LE=bias) for bias in (None, bias_LE))
    counts = after.statistics.kept_GE.sum(1)
    assert (counts[2, :2] == 0).all() and (before.statistics.kept_GE.sum(1)[2, :2] > 0).any()
    np.testing.assert_array_equal(counts[:2], before.statistics.kept_GE.sum(1)[:2])


def test_evaluation_does_without_it():
    config = config_of()
    found, trained = tiny.output(config, tiny.params(config), BATCH), output(config, tiny.params(config))
    assert found.further_logits == () and found.statistics.kept_GE.shape[0] == 1
    np.testing.assert_allclose(found.logits_BSV[BATCH["valid"]], trained.logits_BSV[BATCH["valid"]], rtol=1e-4, atol=1e-5)


# Training


def test_it_learns_and_its_selection_bias_moves():
    """Rows that repeat eight tokens: the one after the next can be known."""
    rows = np.stack([np.roll(np.arange(1, 9), r)[np.arange(16) % 8] for r in range(8)]).astype(np.int32)
    batch = tiny.batch(length=16)
    batch |= {"target_ids": rows, "input_ids": np.pad(rows, ((0, 0), (1, 0)))[:, :-1]}
    config = tiny.config(model_num_layers=1, moe_every=1, model_mtp_depth=1, optimizer_learning_rate=1.0,
                         moe_bias_update_rate=0.01, moe_balance_weight=0.0)
    state, losses = tiny.state(config), []
    for _ in range(20):
        state, metrics = tiny.step(config, state, batch)
        losses.append((metrics["sums"]["loss/ce"], metrics["sums"]["loss/mtp"]))
    (first_ce, first), (last_ce, last) = losses[0], losses[-1]
    assert last_ce < 0.5 * first_ce and last < 0.7 * first and np.isfinite(losses).all()
    bias_LE = np.asarray(state["router_bias_LE"])
    assert bias_LE.shape == (2, 4) and (np.abs(bias_LE).max(1) > 0.005).all()
    assert metrics["routed_tokens_L"].tolist() == [128, 120]  # of 16 places of a row 15 have a token after the next
    shapes = jax.eval_shape(lambda: initial_state(config, tiny.VOCAB))
    assert jax.tree.map(jnp.shape, shapes["params"]) == jax.tree.map(jnp.shape, state["params"])
    assert shapes["router_bias_LE"].shape == (2, 4)


@pytest.mark.parametrize("sections, words", [
    ({"model": {"mtp_depth": -1}}, ["model.mtp_depth=-1", "at least 0"]),
    ({"training": {"mtp_weight": 0.1}}, ["training.mtp_weight=0.1", "no effect without model.mtp_depth"]),
    ({"model": {"mtp_depth": 1}, "training": {"mtp_weight": 0.0}}, ["training.mtp_weight=0.0", "untrained"]),
    ({"model": {"mtp_depth": 8}, "data": {"sequence_length": 8}}, ["model.mtp_depth=8", "data.sequence_length=8"]),
    ({"model": {"mtp_depth": 1}, "moe": {"router": "reinforce", "experts_per_token": 1}}, ["model.mtp_depth=1", "reinforce"]),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(sections, words):
    message = refusal(sections)
    assert all(word in message for word in words), message
