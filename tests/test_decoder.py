"""The decoder: however its layers are run the same numbers come out, padding is invisible, the future is unknown."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax.config import ConfigError
from moe_jax.models.stack import layer_pattern
from moe_jax.nn.moe import RoutingMode
from moe_jax.training.evaluate import put_batch
from moe_jax.training.step import check_statistics, gradients

D, M = False, True


# Which layers repeat


@pytest.mark.parametrize("layers, expected", [
    ((D,) * 6, (0, 1, 6)),  # dense: one layer, six times
    ((M,) * 3, (0, 1, 3)),
    ((D, M) * 3, (0, 2, 3)),  # every 2nd
    ((D, D, D, M) * 2, (0, 4, 2)),  # every 4th (OpenMoE)
    ((D, M, M, M, M), (1, 1, 4)),  # DeepSeekMoE: the first dense
    ((D, D, D, M, M, M, M, M), (3, 1, 5)),  # the first three dense: 4 distinct layers beat 6
    ((D, M, D, M, D), (0, 2, 2)),  # an odd one remains at the end
    ((D, M, M, D, M, M, D), (0, 3, 2)),
    ((D, D, D, M, D, D), (0, 1, 3)),  # every 4th of six: 4 distinct either way to cut it
    ((D, D, D, M, M, M, M), (3, 1, 4)),  # dense layers in front
    ((D, M), (0, 2, 1)),  # nothing repeats
    ((M,), (0, 1, 1)),
])
def test_layer_pattern_leaves_the_fewest_distinct_layers(layers, expected):
    prefix, period, repeats = layer_pattern(layers)
    assert (prefix, period, repeats) == expected
    assert layers[prefix : prefix + period * repeats] == layers[prefix : prefix + period] * repeats


# Scanned, unrolled, rematerialised


def unrolled_params(scanned, config):
    """Parameters of the scanned layers in the places where ``scan_layers=False`` keeps them."""
    prefix, period, repeats = layer_pattern(tuple(i in config.moe_layers for i in range(config.model.num_layers)))
    assert prefix + period * repeats == config.model.num_layers
    layers = {i: jax.tree.map(lambda leaf: np.asarray(leaf)[None], scanned["first"][i]["layers"][0]) for i in range(prefix)}
    for i in range(prefix, config.model.num_layers):
        take = lambda leaf, i=i: np.asarray(leaf)[(i - prefix) // period][None]
        layers[i] = jax.tree.map(take, scanned["body"]["layers"][(i - prefix) % period])
    return {name: part for name, part in scanned.items() if name != "first"} | {"body": {"layers": layers}}


CONFIG = tiny.config(moe_balance_weight=0.5, moe_router_z_weight=0.1)  # dense, MoE, dense, MoE
BATCH = tiny.batch(lengths=[16, 16, 9, 3, 16, 1, 16, 12])


@pytest.fixture(scope="module")
def scanned():
    return tiny.grads(CONFIG, tiny.params(CONFIG), BATCH)


def with_model(config, **changes):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


@pytest.mark.slow
def test_b08_unrolled_layers_give_the_scanned_losses_statistics_and_gradients(scanned):
    config = with_model(CONFIG, scan_layers=False)
    params = unrolled_params(tiny.params(CONFIG), CONFIG)
    grads, metrics = tiny.grads(config, params, BATCH)
    expected_grads, expected_metrics = scanned
    tiny.assert_close(metrics, expected_metrics)
    tiny.assert_close(grads, unrolled_params(expected_grads, CONFIG), rtol=1e-4)
    np.testing.assert_allclose(tiny.logits(config, params, BATCH), tiny.logits(CONFIG, tiny.params(CONFIG), BATCH),
                               rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat, scan_layers", [("block", True), ("dots", True), ("block", False)])
def test_b29_b30_rematerialised_layers_count_and_learn_the_same(scanned, remat, scan_layers):
    config, params = with_model(CONFIG, remat=remat, scan_layers=scan_layers), tiny.params(CONFIG)
    expected_grads, expected_metrics = scanned
    if not scan_layers:
        params, expected_grads = unrolled_params(params, CONFIG), unrolled_params(expected_grads, CONFIG)
    grads, metrics = tiny.grads(config, params, BATCH)
    np.testing.assert_array_equal(metrics["routing"]["counts_LE"], expected_metrics["routing"]["counts_LE"])
    np.testing.assert_array_equal(metrics["routing"]["kept_LE"], expected_metrics["routing"]["kept_LE"])
    tiny.assert_close(metrics, expected_metrics)
    tiny.assert_close(grads, expected_grads, rtol=1e-4)


@pytest.mark.slow
def test_dense_layers_in_front_are_the_same_scanned_and_unrolled():
    """Two dense layers of model.d_ff, then three of experts that are scanned: values, losses and gradients."""
    config = tiny.config(model_num_layers=5, moe_every=1, moe_first_dense_layers=2, moe_balance_weight=0.5)
    params, apart = tiny.params(config), with_model(config, scan_layers=False)
    assert [set(layer["layers"][0]) >= {"mlp"} for layer in params["first"].values()] == [True, True]
    assert params["first"][0]["layers"][0]["mlp"]["w_in_DF"].shape == (16, 32)
    assert params["body"]["layers"][0]["moe"]["experts"]["w_in_EDF"].shape == (3, 4, 16, 16)
    grads, metrics = tiny.grads(config, params, BATCH)
    assert metrics["routing"]["counts_LE"].shape == (3, 4)
    unrolled_grads, unrolled_metrics = tiny.grads(apart, unrolled_params(params, config), BATCH)
    tiny.assert_close(metrics, unrolled_metrics)
    tiny.assert_close(unrolled_params(grads, config), unrolled_grads, rtol=1e-4)


def test_b29_tied_router_logits_route_the_same_when_recomputed():
    config = tiny.config(model_num_layers=2, moe_every=1)
    params = tiny.params(config)
    params["body"]["layers"][0]["moe"]["w_router_DE"] = np.zeros((2, 16, 4), np.float32)
    grads, metrics = tiny.grads(config, params, BATCH)
    again, metrics_again = tiny.grads(with_model(config, remat="block"), params, BATCH)
    # All experts tie, so every one of the 89 valid tokens takes the two lowest.
    np.testing.assert_array_equal(metrics["routing"]["counts_LE"], [[89, 89, 0, 0]] * 2)
    tiny.assert_close(metrics_again, metrics)
    tiny.assert_close(again, grads, rtol=1e-4)


def test_statistics_lead_with_the_moe_layers_in_order():
    """A selection bias that outweighs every score tells the layers apart: bias in and counts out keep their order."""
    config = tiny.config(model_num_layers=5, moe_first=0, moe_bias_update_rate=1e-3)  # MoE, dense, MoE, dense | MoE
    bias_LE = np.array([[0, 0, 2, 2], [2, 0, 0, 2], [0, 2, 2, 0]], np.float32)
    counts_LE = tiny.output(config, tiny.params(config), BATCH, bias_LE=bias_LE).statistics.router.choices_E.sum(axis=1)
    np.testing.assert_array_equal(counts_LE, 89 * (bias_LE > 0))  # 89 valid tokens


def test_check_statistics_refuses_a_layer_that_did_not_report():
    output = tiny.output(CONFIG, tiny.params(CONFIG), BATCH)
    check_statistics(CONFIG, output.statistics)
    lost = jax.tree.map(lambda leaf: leaf[:1], output.statistics)
    with pytest.raises(RuntimeError, match="1 layers returned .* 2 MoE layers"):
        check_statistics(CONFIG, lost)
    with pytest.raises(RuntimeError, match="0 layers returned"):
        check_statistics(CONFIG, None)
    with pytest.raises(RuntimeError, match="2 layers returned .* 0 MoE layers"):
        check_statistics(tiny.config(moe_num_experts=0), output.statistics)


# Dtypes


def test_b26_b27_bf16_compute_keeps_parameters_and_routing_in_fp32():
    config = with_model(CONFIG, dtype="bfloat16")
    params = tiny.params(CONFIG)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    with jax.set_mesh(tiny.ONE):
        shapes = jax.eval_shape(lambda: gradients(params, config, tiny.VOCAB, jax.tree.map(jnp.asarray, BATCH),
                                                  jnp.zeros((2, 4)), jax.random.key(0)))
    dtypes = {name: leaf.dtype for name, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    assert set(dtypes.values()) == {jnp.dtype(jnp.float32)}


def test_b26_a_near_tie_between_experts_is_decided_in_fp32():
    """Router columns that differ by less than bf16 can tell: 1 and 1 + 2^-12 (bf16 has steps of 2^-7 at 1)."""
    config = with_model(tiny.config(model_num_layers=2, moe_every=1, moe_experts_per_token=1), dtype="bfloat16")
    params = tiny.params(config)
    direction_D = np.random.default_rng(0).choice([-1.0, 1.0], 16).astype(np.float32)
    router_DE = np.zeros((2, 16, 4), np.float32)
    router_DE[:, :, 0] = direction_D
    router_DE[:, :, 1] = direction_D * (1 + 2**-12)
    params["body"]["layers"][0]["moe"]["w_router_DE"] = router_DE
    counts_LE = tiny.output(config, params, BATCH).statistics.router.choices_E.sum(axis=1)
    # Positive logit: expert 1 is larger by a hair. Negative: 2 and 3 are 0 and win, 2 by the tie. Expert 0 never wins.
    np.testing.assert_array_equal(counts_LE[:, [0, 3]], 0)
    assert np.all(counts_LE[:, 1] > 10) and np.all(counts_LE[:, 2] > 10)


def test_bf16_compute_stays_near_fp32():
    config = with_model(CONFIG, dtype="bfloat16")
    exact, rounded = (tiny.output(c, tiny.params(CONFIG), BATCH).logits_BSV for c in (CONFIG, config))
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - exact)[BATCH["valid"]].mean() < 0.05


# Options


def test_tied_embedding_is_one_table_and_its_gradient_has_both_uses():
    config = tiny.config(model_num_layers=1, moe_num_experts=0, model_tie_embedding=True)
    params = tiny.params(config)
    assert set(params["embedding"]) == {"embedding_VD"}
    untied = with_model(config, tie_embedding=False)
    # The tied output layer is the transposed table over √16 = 4.
    separate = {**params, "embedding": {**params["embedding"], "w_logits_DV": params["embedding"]["embedding_VD"].T / 4}}
    tied_grads, tied_metrics = tiny.grads(config, params, BATCH)
    grads, metrics = tiny.grads(untied, separate, BATCH)
    tiny.assert_close(tied_metrics, metrics)
    np.testing.assert_allclose(tied_grads["embedding"]["embedding_VD"],
                               grads["embedding"]["embedding_VD"] + grads["embedding"]["w_logits_DV"].T / 4,
                               rtol=1e-4, atol=1e-6)


# Padding


@pytest.fixture(scope="module")
def two_layers():
    return tiny.config(model_num_layers=2, moe_every=1, moe_balance_weight=0.5, moe_router_z_weight=0.1,
                       moe_dispatch="dropless")


def padded(batch, left, right):
    """The batch with invalid positions before and behind, full of ids that would be noticed."""
    wide = {name: np.pad(value, ((0, 0), (left, right))) for name, value in batch.items()}
    wide["valid"] = np.pad(batch["valid"], ((0, 0), (left, right)))
    wide = tiny.emptied(wide)
    for name in ("input_ids", "target_ids"):
        wide[name] = np.where(wide["valid"], wide[name], 7).astype(np.int32)
    return wide


@pytest.mark.parametrize("left, right", [(0, 8), (8, 0), (3, 5)])
def test_b19_b41_padding_changes_no_loss_no_gradient_and_no_valid_logit(two_layers, left, right):
    params, batch = tiny.params(two_layers), tiny.batch(rows=4)
    grads, metrics = tiny.grads(two_layers, params, batch)
    wide = padded(batch, left, right)
    padded_grads, padded_metrics = tiny.grads(two_layers, params, wide)
    tiny.assert_close(padded_metrics, metrics, rtol=1e-5)
    tiny.assert_close(padded_grads, grads, rtol=1e-4, atol=1e-6)
    actual = tiny.logits(two_layers, params, wide)[:, left : left + 16]
    np.testing.assert_allclose(actual, tiny.logits(two_layers, params, batch), rtol=1e-4, atol=1e-5)


def test_b41_padding_takes_no_slot_of_a_tight_buffer(two_layers):
    """The same buffers with anything in the padding: what stands there moves nothing, and no choice of it is counted."""
    config = dataclasses.replace(two_layers, moe=dataclasses.replace(two_layers.moe, dispatch="gather",
                                                                     capacity_factor=0.5))
    params, batch = tiny.params(config), padded(tiny.batch(rows=4, length=8), 4, 4)
    other = {**batch, "input_ids": np.where(batch["valid"], batch["input_ids"], 9).astype(np.int32)}
    grads, metrics = tiny.grads(config, params, batch)
    assert metrics["routing"]["counts_LE"].sum() == 2 * 2 * 32  # layers · K · valid tokens
    # Capacity 0.5 · 2 · 16 / 4 = 4 slots per expert and row: 8 tokens make 16 choices for 16 slots, if balanced.
    assert 0 < metrics["routing"]["kept_LE"].sum() < 2 * 2 * 32
    tiny.assert_equal(tiny.grads(config, params, other), (grads, metrics))


# Documents


def test_b20_packed_documents_are_as_if_alone():
    config = tiny.config(model_num_layers=2, moe_every=1, moe_dispatch="dropless")
    packed = tiny.batch(rows=2, length=16, segments=2)
    alone = {name: value.reshape(4, 8) for name, value in packed.items()}
    alone["segment_ids"] = np.ones((4, 8), np.int32)
    params = tiny.params(config)
    np.testing.assert_allclose(tiny.logits(config, params, packed).reshape(4, 8, -1),
                               tiny.logits(config, params, alone), rtol=1e-4, atol=1e-5)


def test_a_document_does_not_see_the_one_before_it_in_the_row():
    config = tiny.config(model_num_layers=2, moe_every=1, moe_dispatch="dropless")
    batch = tiny.batch(rows=1, length=16, segments=2)
    changed = {**batch, "input_ids": batch["input_ids"].copy()}
    changed["input_ids"][:, 1:8] = 5
    params = tiny.params(config)
    np.testing.assert_allclose(tiny.logits(config, params, changed)[:, 8:], tiny.logits(config, params, batch)[:, 8:],
                               rtol=1e-5, atol=1e-5)


# Causality

TIGHT = dict(model_num_layers=2, moe_every=1, moe_capacity_factor=0.5, moe_eval_capacity_factor=0.5,
             data_batch_size=8)


def leak(config, mode=None):
    """Largest change of a logit at a position before the first changed token, over several cuts."""
    mode = mode or RoutingMode(config.moe.dispatch, config.moe.capacity_factor)
    params, batch = tiny.params(config), tiny.batch(seed=1)
    before = tiny.logits(config, params, batch, mode)
    worst = 0.0
    for cut in (4, 8, 12, 15):
        changed = {**batch, "input_ids": batch["input_ids"].copy()}
        changed["input_ids"][:, cut:] = tiny.batch(seed=cut)["input_ids"][:, cut:]
        after = tiny.logits(config, params, changed, mode)
        assert np.any(after[:, cut:] != before[:, cut:])
        worst = max(worst, float(np.abs(after[:, :cut] - before[:, :cut]).max()))
    return worst


CAUSAL = {
    "token_major, gather": dict(),
    "token_major, einsum": dict(moe_dispatch="einsum"),
    "token_major, groups of half a row": dict(moe_group_size=8),
    "choice_major, K=1": dict(moe_fill_order="choice_major", moe_experts_per_token=1),
    "choice_major over the batch": dict(moe_fill_order="choice_major", moe_group_over="batch"),
    "batch_prioritized over the batch": dict(moe_fill_order="batch_prioritized", moe_group_over="batch"),
    "expert_choice over the batch": dict(moe_router="expert_choice", moe_group_over="batch", moe_balance_weight=0.0),
    "reinforce": dict(moe_router="reinforce", moe_policy_baseline="none", moe_experts_per_token=1),
    "dense": dict(moe_num_experts=0),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_b52_b53_what_is_declared_causal_does_not_see_later_tokens_however_tight_the_buffers(name):
    assert leak(tiny.config(**TIGHT, **CAUSAL[name])) == 0.0


@pytest.mark.parametrize("dispatch", ["dropless", "reference"])
@pytest.mark.parametrize("order", ["choice_major", "batch_prioritized"])
def test_without_drops_every_fill_order_is_causal(dispatch, order):
    config = tiny.config(**TIGHT, moe_dispatch=dispatch, moe_eval_dispatch=dispatch, moe_fill_order=order)
    assert leak(config) < 1e-5  # rows share products of several sizes, so the last digits may differ


LOOKS_AHEAD = {
    "expert_choice over the sequence": dict(moe_router="expert_choice", moe_balance_weight=0.0),
    "choice_major, K=2": dict(moe_fill_order="choice_major"),
    "batch_prioritized": dict(moe_fill_order="batch_prioritized"),
    "batch_prioritized, K=1": dict(moe_fill_order="batch_prioritized", moe_experts_per_token=1),
}


@pytest.mark.parametrize("name", LOOKS_AHEAD)
def test_b52_b53_what_looks_ahead_is_seen_by_the_probe_and_refused_unless_asked_for(name):
    with pytest.raises(ConfigError, match="allow_noncausal_routing"):
        tiny.config(**TIGHT, **LOOKS_AHEAD[name])
    assert leak(tiny.config(**TIGHT, **LOOKS_AHEAD[name], moe_allow_noncausal_routing=True)) > 1e-3


def test_a_group_of_several_rows_is_causal_within_each_row():
    """Later tokens of an earlier row may push a token out of a buffer; later tokens of its own row may not."""
    config = tiny.config(**TIGHT, moe_group_size=32)
    params, batch = tiny.params(config), tiny.batch(seed=1)
    mode = RoutingMode("gather", 0.5)
    before = tiny.logits(config, params, batch, mode)
    changed = {**batch, "input_ids": batch["input_ids"].copy()}
    changed["input_ids"][1::2, 8:] = 3  # the second row of every pair
    after = tiny.logits(config, params, changed, mode)
    np.testing.assert_array_equal(after[0::2], before[0::2])
    np.testing.assert_array_equal(after[1::2, :8], before[1::2, :8])


@pytest.mark.parametrize("seed", range(3))
def test_permuting_rows_permutes_logits(seed):
    config = tiny.config(**TIGHT)
    params, batch = tiny.params(config), tiny.batch(seed=seed)
    order = np.random.default_rng(seed).permutation(8)
    shuffled = {name: value[order] for name, value in batch.items()}
    mode = RoutingMode("gather", 0.5)
    np.testing.assert_allclose(tiny.logits(config, params, shuffled, mode), tiny.logits(config, params, batch, mode)[order],
                               rtol=1e-5, atol=1e-5)


def test_remat_dots_keeps_the_products_that_remat_block_computes_again():
    def products(remat):
        config = with_model(CONFIG, remat=remat)
        with jax.set_mesh(tiny.ONE):
            batch = put_batch(BATCH, tiny.ONE)
            gradient = lambda params: gradients(params, config, tiny.VOCAB, batch, tiny.no_bias(config),
                                                jax.random.key(0))[0]
            return str(jax.make_jaxpr(gradient)(tiny.placed(tiny.params(config), tiny.ONE))).count("dot_general[")

    assert products("none") <= products("dots") < products("block")
