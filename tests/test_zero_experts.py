"""Zero-computation experts: the layer against a loop over tokens in fp64, value and gradient; slots, counts, losses.

Shapes: B, S, D activations, E experts of the router, J constant experts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from moe_jax.config import ConfigError, MoEConfig
from moe_jax.nn.groups import GroupLayout
from moe_jax.nn.moe import MoELayer, RoutingMode
from moe_jax.routing import ROUTERS
from moe_jax.routing.balance import RouterStatistics, balance_loss
from moe_jax.routing.replay import recorded_experts
from moe_jax.training.flops import (
    computed_choices, count_parameters, forward_flops_per_token, hardware_flops_per_token, training_flops_per_token)
from moe_jax.training.state import model_graph

KINDS = dict(moe_num_identity_experts=1, moe_num_zero_experts=1, moe_num_constant_experts=2)


def softmax(v):
    weight = np.exp(v - v.max())
    return weight / weight.sum()


def numpy_layer(params, moe, x_BSD, capacity=None):
    """y [B, S, D] and the choices each expert computed [E]: token by token, first come first served in each row."""
    experts = params["experts"]
    classes = [experts[i] for i in range(len(moe.width_classes))] if moe.expert_widths else [experts]
    ffns = [(w["w_gate_EDF"][e], w["w_in_EDF"][e], w["w_out_EFD"][e]) for w in classes for e in range(len(w["w_in_EDF"]))]
    constants = moe.num_experts + moe.num_identity_experts + moe.num_zero_experts
    y_BSD, kept_E = np.zeros(x_BSD.shape), np.zeros(moe.num_routed_experts, int)
    for b in range(len(x_BSD)):
        slots_E = np.zeros(moe.num_experts, int)
        for s, x in enumerate(x_BSD[b]):
            p = softmax(x @ params["w_router_DE"])
            for e in np.argsort(-p, kind="stable")[: moe.experts_per_token]:
                if e < moe.num_experts:
                    slots_E[e] += 1
                    if capacity is not None and slots_E[e] > capacity:
                        continue
                    w_gate, w_in, w_out = ffns[e]
                    gate = x @ w_gate
                    out = (gate / (1 + np.exp(-gate)) * (x @ w_in)) @ w_out
                elif e < moe.num_experts + moe.num_identity_experts:
                    out = x
                elif e < constants:
                    out = np.zeros_like(x)
                else:
                    zero = params["zero_computation"]
                    keep, add = softmax(x @ zero["w_constant_DJA"][:, e - constants])
                    out = keep * x + add * zero["constant_JD"][e - constants]
                y_BSD[b, s] += p[e] * out
                kept_E[e] += 1
    return y_BSD, kept_E


def in_fp64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@functools.lru_cache(maxsize=None)
def made(config):
    with jax.set_mesh(tiny.ONE):
        graph, state = nnx.split(MoELayer(config, nnx.Rngs(params=0)))
    params = state.to_pure_dict()
    # Logits that differ: every expert is somebody's choice.
    params["w_router_DE"] = 2 * jax.random.normal(jax.random.key(1), params["w_router_DE"].shape)
    return graph, params


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.lru_cache(maxsize=None)
def compiled(config, mode):
    graph, _ = made(config)
    experts = config.moe.num_routed_experts

    def apply(params, x_BSD, valid_BS, w_BSD):
        y_BSD, statistics = nnx.merge(graph, params)(x_BSD, valid_BS, mode, jnp.zeros(experts))
        return jnp.sum(y_BSD * w_BSD), (y_BSD, statistics)

    return jax.jit(jax.value_and_grad(apply, argnums=(0, 1), has_aux=True), compiler_options=tiny.QUICK)


def run(config, x_BSD, mode, valid_BS=None, w_BSD=None):
    """(y_BSD, statistics, gradients of Σ y·w with respect to parameters and x)."""
    valid_BS = np.ones(x_BSD.shape[:2], bool) if valid_BS is None else valid_BS
    w_BSD = np.ones_like(x_BSD) if w_BSD is None else w_BSD
    with jax.set_mesh(tiny.ONE):
        (_, (y_BSD, statistics)), grads = jax.device_get(compiled(config, mode)(made(config)[1], x_BSD, valid_BS, w_BSD))
    return y_BSD, statistics, grads


def assert_equals_fp64(config, mode, capacity=None):
    """Value, counts, and the gradient along random directions of every parameter and of x, by central differences."""
    x_BSD, w_BSD, moe = draw(2, 12, 16), draw(2, 12, 16, seed=1), config.moe
    y_BSD, statistics, grads = run(config, x_BSD, mode, w_BSD=w_BSD)
    params, x = in_fp64(made(config)[1]), x_BSD.astype(np.float64)
    wanted, kept_E = numpy_layer(params, moe, x, capacity)
    np.testing.assert_allclose(y_BSD, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(statistics.kept_GE.sum(0), kept_E)
    assert statistics.router.choices_E.sum() == moe.experts_per_token * 24
    tree, rng = (params, x), np.random.default_rng(2)
    flat, structure = jax.tree.flatten(tree)
    slopes = jax.tree.leaves(grads)
    value = lambda leaves: np.sum(numpy_layer(*_split(structure, leaves, moe), capacity)[0] * w_BSD)
    for i, leaf in enumerate(flat):
        direction, step = rng.normal(size=leaf.shape), 1e-6
        up, down = ([*flat[:i], leaf + sign * step * direction, *flat[i + 1:]] for sign in (1, -1))
        wanted = (value(up) - value(down)) / (2 * step)
        np.testing.assert_allclose(np.sum(slopes[i] * direction), wanted, rtol=2e-3, atol=2e-3)
    return kept_E


def _split(structure, leaves, moe):
    params, x = jax.tree.unflatten(structure, leaves)
    return params, moe, x


@pytest.mark.parametrize("dispatch", ["gather", "einsum", "dropless", "reference"])
def test_value_and_gradient_equal_a_loop_over_tokens(dispatch):
    config = tiny.config(moe_experts_per_token=3, **KINDS)
    kept_E = assert_equals_fp64(config, RoutingMode(dispatch, 8.0))  # room for all
    assert (kept_E > 0).all()  # of every kind


def test_they_take_no_slot_and_are_never_dropped():
    config = tiny.config(moe_experts_per_token=3, **KINDS)
    # 0.5 · 3 · 12 / 8 rounded up: 3 slots per feed-forward expert.
    kept_E = assert_equals_fp64(config, RoutingMode("gather", 0.5), capacity=3)
    _, statistics, _ = run(config, draw(2, 12, 16), RoutingMode("gather", 0.5))
    choices_E = statistics.router.choices_E.sum(0)
    assert (kept_E[:4] < choices_E[:4]).any() and (kept_E[:4] <= 6).all()
    np.testing.assert_array_equal(kept_E[4:], choices_E[4:])


def test_identity_experts_alone_give_gate_times_x():
    config = tiny.config(moe_experts_per_token=1, moe_num_experts=1, moe_num_identity_experts=3, moe_router_init=0.5)
    x_BSD, valid = draw(2, 12, 16), np.arange(24).reshape(2, 12) % 3 > 0
    y_BSD, statistics, _ = run(config, x_BSD, RoutingMode("gather", 1e-6), valid)
    p_BSE = np.exp(x_BSD @ np.asarray(made(config)[1]["w_router_DE"]))
    p_BSE /= p_BSE.sum(-1, keepdims=True)
    chosen = (p_BSE.argmax(-1) > 0) & valid
    np.testing.assert_allclose(y_BSD[chosen], (p_BSE.max(-1)[..., None] * x_BSD)[chosen], rtol=1e-4)
    assert (y_BSD[~valid] == 0).all()
    assert statistics.kept_GE[:, 1:].sum() == chosen.sum() > 10


def test_padding_reaches_none_of_them():
    config = tiny.config(moe_experts_per_token=3, **KINDS)
    x_BSD, valid = draw(2, 12, 16), np.arange(12)[None, :] < np.array([[7], [12]])
    mode = RoutingMode("dropless", 8.0)
    one, other = run(config, x_BSD, mode, valid)[:2], run(config, np.where(valid[..., None], x_BSD, 99.0), mode, valid)[:2]
    tiny.assert_equal(one, other)
    assert one[1].kept_GE.sum() == 3 * 19


# Losses, state and the whole model


def statistics(choices_E, probability_E):
    one = lambda value: jnp.asarray([value], jnp.float32)
    zero = one(0.0)
    return RouterStatistics(one(6.0), one(choices_E), one(choices_E), one(probability_E), zero, zero, zero, zero)


@pytest.mark.parametrize("weight", [1.0, 0.75])
def test_the_balancing_loss_weighs_the_two_kinds(weight):
    """Jin et al. 2024: Σ η_i f_i P_i, η = 1 for feed-forward experts and τ for the others; here times E / K."""
    moe = MoEConfig(num_experts=4, experts_per_token=2, num_identity_experts=2, zero_expert_weight=weight)
    even = float(balance_loss(statistics([2.0] * 6, [1.0] * 6), moe, jnp.float32(6)))
    assert even == pytest.approx((4 + 2 * weight) / 6, rel=1e-6)  # docs/conventions.md: the mean of η
    # f = (0, 0, 0, 0, 3, 3) / 6 · E/K …: 6/(2·36) · (6·3 + 6·3)·τ, all tokens on the cheap experts.
    collapsed = float(balance_loss(statistics([0, 0, 0, 0, 6, 6], [0, 0, 0, 0, 3, 3]), moe, jnp.float32(6)))
    assert collapsed == pytest.approx(6 / (2 * 36) * (18 + 18) * weight, rel=1e-6)


def test_the_capacity_of_feed_forward_experts_leaves_out_what_the_others_take():
    # Where η_i f_i are equal, f = 1 : 1/τ; 4 + 4/0.5 = 12 parts of K·T = 96 choices, one for a feed-forward expert.
    moe = MoEConfig(num_experts=4, experts_per_token=2, num_zero_experts=4, zero_expert_weight=0.5)
    assert ROUTERS["top_k"].capacity(48, moe, 1.0) == 8


def test_training_evaluation_and_replay_of_the_whole_model():
    config = tiny.config(model_num_layers=2, moe_bias_update_rate=0.01, moe_experts_per_token=3, **KINDS)
    state = tiny.state(config)
    assert state["router_bias_LE"].shape == (1, 8)
    batch = tiny.batch(lengths=[16, 12, 16, 5, 16, 16, 1, 16])
    params = tiny.params(config)
    after, metrics = tiny.step(config, state, batch)
    np.testing.assert_array_equal(metrics["routing"]["counts_LE"].sum(1), [3 * 98])  # K × valid tokens
    kept, counts = metrics["routing"]["kept_LE"], metrics["routing"]["counts_LE"]
    np.testing.assert_array_equal(kept[:, 4:], counts[:, 4:])
    assert (kept <= counts).all() and np.isfinite(metrics["sums"]["loss/total"])
    assert (np.abs(after["router_bias_LE"]).max(1) > 0).all()
    mode = RoutingMode("dropless", 1.0, record=True)
    recorded = tiny.output(config, params, batch, mode)
    with jax.set_mesh(tiny.ONE):
        replay = recorded_experts(jax.tree.map(jnp.asarray, recorded.statistics.routing_G), GroupLayout(8, 16, config))
    assert np.asarray(replay).max() == 8  # nowhere: padding
    assert set(range(8)) <= set(np.asarray(replay).ravel().tolist())
    again = jax.jit(lambda params, batch, replay: nnx.merge(model_graph(config, tiny.VOCAB), params)(
        batch["input_ids"], batch["positions"], batch["segment_ids"], batch["valid"],
        RoutingMode("dropless", 1.0, router="replay"), replay_LBSK=replay).logits_BSV, compiler_options=tiny.QUICK)
    with jax.set_mesh(tiny.ONE):
        logits = again(tiny.placed(params, tiny.ONE), batch, replay)
    np.testing.assert_allclose(np.asarray(logits)[batch["valid"]], recorded.logits_BSV[batch["valid"]], rtol=1e-4, atol=1e-4)


def test_b09_several_devices_compute_what_one_does():
    config = tiny.config(model_num_layers=2, moe_experts_per_token=3, **KINDS)
    batch, params = tiny.batch(lengths=[16, 12, 16, 5, 16, 16, 1, 16]), tiny.params(config)
    one, four = (tiny.grads(config, params, batch, mesh=mesh) for mesh in (tiny.ONE, tiny.mesh(data=2, expert=2)))
    tiny.assert_close(four, one, rtol=1e-4, atol=1e-5)


def test_flops_and_parameters_count_what_is_computed():
    plain, config = tiny.config(), tiny.config(**KINDS)
    assert computed_choices(config) == 2 * 4 / 8
    assert computed_choices(tiny.config(moe_zero_expert_weight=0.5, **KINDS)) == pytest.approx(2 * 4 / 12)
    expert, constants = 3 * 16 * 16, 2 * 3 * 16  # W [D, 2] and v [D] each
    difference = forward_flops_per_token(config, 32, 16) - forward_flops_per_token(plain, 32, 16)
    assert difference == 2 * 2 * (4 * 16 + constants - expert)  # 4 columns of the router, one choice less
    few, many = count_parameters(plain, 32), count_parameters(config, 32)
    assert many.total - few.total == 2 * (4 * 16 + constants)
    assert many.active - few.active == 2 * (4 * 16 + constants - expert)
    # 4 feed-forward experts · ceil(1.25 · 2 · 16 / 8) slots for 16 tokens.
    extra = hardware_flops_per_token(config, 32) - training_flops_per_token(config, 32)
    assert extra == 3 * 2 * 2 * (4 * 5 / 16 - 1) * expert


@pytest.mark.parametrize("settings, words", [
    (dict(moe_zero_expert_weight=0.75), ["moe.zero_expert_weight=0.75", "moe.num_identity_experts"]),
    (dict(moe_num_constant_experts=1, moe_gate_on="input"), ["moe.gate_on='input'", "moe.num_constant_experts=0"]),
    (dict(moe_num_identity_experts=2, moe_num_groups=2, moe_device_weight=0.1), ["moe.num_groups=2", "zero-computation"]),
    (dict(moe_num_identity_experts=1, moe_router="balanced"), ["moe.router='balanced'", "'top_k'"]),
    (dict(moe_num_zero_experts=1, moe_router="expert_choice", moe_balance_weight=0.0,
          moe_allow_noncausal_routing=True), ["moe.router='expert_choice'", "moe.num_zero_experts"]),
    (dict(moe_num_zero_experts=1, moe_experts_per_token=6), ["moe.experts_per_token=6", "1 without computation"]),
    (dict(moe_num_identity_experts=-1), ["moe.num_identity_experts=-1"]),
])
def test_what_cannot_work_is_refused(settings, words):
    with pytest.raises(ConfigError) as error:
        tiny.config(**settings)
    assert all(word in str(error.value) for word in words), str(error.value)
