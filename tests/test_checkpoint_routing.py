"""Routing as the checkpoints of Switch Transformers and NLLB-MoE have it, against loops over tokens in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from moe_jax.config import ConfigError, MoEConfig, resolve
from moe_jax.nn.moe import MoELayer, RoutingMode
from moe_jax.routing import ROUTERS, check_router
from moe_jax.routing.assignment import expert_capacity

ROWS, LENGTH, WIDTH, EXPERTS = 3, 11, 8, 4
SWITCH = dict(experts_per_token=1, expert_capacity=2, dispatch="gather", eval_dispatch="gather", padding="as_text")
NLLB = dict(experts_per_token=2, group_over="all", capacity_counts="group", eval_capacity_factor=0.4, capacity_factor=0.5,
            fill_order="choice_major", allow_noncausal_routing=True, dispatch="gather", eval_dispatch="gather",
            renormalize_after_drops=True, expert_bias=True, output_dropout=0.25, min_capacity=1)


def config(**moe):
    return resolve({"model": dict(num_layers=1, d_model=WIDTH, num_heads=1, num_kv_heads=1, head_dim=8, d_ff=8),
                    "moe": dict(num_experts=EXPERTS, every=1, d_ff=6, activation="relu", router_init=2.0, **moe),
                    "data": dict(batch_size=ROWS, sequence_length=LENGTH)})


def layer_and_inputs(settings, seed=0):
    """A layer with biases that are not zero, its weights as NumPy arrays, inputs and where there is text."""
    layer = MoELayer(settings, nnx.Rngs(params=seed))
    random = np.random.default_rng(seed)
    weights = {"router": np.asarray(layer.w_router_DE[...], np.float64)}
    for name in ("w_in_EDF", "w_out_EFD", "b_in_EF", "b_out_ED"):
        if hasattr(layer.experts, name):
            values = random.normal(size=getattr(layer.experts, name)[...].shape).astype(np.float32)
            setattr(layer.experts, name, nnx.Param(jnp.asarray(values)))
            weights[name] = values.astype(np.float64)
    x_BSD = random.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    valid_BS = np.arange(LENGTH)[None, :] >= np.array([0, 4, 2])[:, None]  # padding on the left
    return layer, weights, x_BSD, valid_BS


def run(settings, layer, x_BSD, valid_BS, mode=None, key=None):
    """(output, combine weights [B, S, E]), on the host."""
    mode = dataclasses.replace(mode or RoutingMode.evaluation(settings), trace=True)
    graph, state = nnx.split(layer)
    with jax.set_mesh(tiny.ONE):
        y_BSD, statistics = _compiled(graph, mode)(state, x_BSD, valid_BS, key)
    return np.asarray(y_BSD), np.asarray(statistics.trace.combine_BSE)


@functools.lru_cache(maxsize=None)
def _compiled(graph, mode):
    return jax.jit(lambda state, x_BSD, valid_BS, key: nnx.merge(graph, state)(x_BSD, valid_BS, mode, jnp.zeros(EXPERTS), key),
                   compiler_options=tiny.QUICK)


def softmax(logits):
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def expert_output(weights, expert, x_D):
    bias = lambda name: weights[name][expert] if name in weights else 0.0
    hidden = np.maximum(x_D @ weights["w_in_EDF"][expert] + bias("b_in_EF"), 0)
    return hidden @ weights["w_out_EFD"][expert] + bias("b_out_ED")


# Switch


def test_switch_gives_every_expert_so_many_slots_of_each_row_in_order_and_padding_takes_them_too():
    settings = config(**SWITCH)
    layer, weights, x_BSD, valid_BS = layer_and_inputs(settings)
    found_BSD, combine_BSE = run(settings, layer, x_BSD, valid_BS)
    dropped = by_padding = 0
    for row in range(ROWS):
        taken, of_text = np.zeros(EXPERTS, int), np.zeros(EXPERTS, int)
        for place in range(LENGTH):
            shares_E = softmax(x_BSD[row, place] @ weights["router"])
            expert = int(np.argmax(shares_E))
            expected_D, kept = np.zeros(WIDTH), taken[expert] < 2
            if kept:
                expected_D = shares_E[expert] * expert_output(weights, expert, x_BSD[row, place])
            dropped += not kept
            by_padding += not kept and of_text[expert] < 2
            taken[expert] += 1
            of_text[expert] += valid_BS[row, place]
            np.testing.assert_allclose(found_BSD[row, place], expected_D, rtol=1e-4, atol=1e-5)
            expected_E = np.where(np.arange(EXPERTS) == expert, shares_E * kept, 0)
            np.testing.assert_allclose(combine_BSE[row, place], expected_E, rtol=1e-5, atol=1e-7)
    assert dropped > by_padding > 0  # some for want of the slots that padding has


@pytest.mark.parametrize("options, words", [
    (dict(capacity_factor=2.0), "moe.capacity_factor=2.0: has no effect beside moe.expert_capacity=2"),
    (dict(min_capacity=8), "moe.min_capacity=8: has no effect beside moe.expert_capacity=2"),
    (dict(capacity_counts="tokens"), "moe.capacity_counts='tokens': has no effect beside moe.expert_capacity=2"),
    (dict(dispatch="dropless", eval_dispatch="dropless"), "moe.expert_capacity=2: has no effect with .* no expert has a number"),
    (dict(router="expert_choice", balance_weight=0.0, allow_noncausal_routing=True, padding="nowhere"),
     "moe.expert_capacity=2: has no effect"),
], ids=str)
def test_slots_that_nothing_would_use_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        check_router(MoEConfig(**{**SWITCH, **options}))


# NLLB


def nllb_reference(weights, x_BSD, valid_BS, capacity, prioritized, normalize_before):
    """(output, combine [B, S, E]) of all tokens of the batch, row after row: first choices take slots, then second ones."""
    x_TD, valid_T = x_BSD.reshape(-1, WIDTH), valid_BS.reshape(-1)
    shares_TE = softmax(x_TD @ weights["router"])
    first_T = shares_TE.argmax(-1)
    rest_TE = shares_TE.copy()
    rest_TE[np.arange(len(x_TD)), first_T] = -1
    second_T = rest_TE.argmax(-1)
    order = np.argsort(-shares_TE.max(-1) * valid_T, kind="stable") if prioritized else np.arange(len(x_TD))
    taken, combine_TE = np.zeros(EXPERTS, int), np.zeros((len(x_TD), EXPERTS))
    for choice_T in (first_T, second_T):
        for token in order:
            if valid_T[token]:
                expert = choice_T[token]
                if taken[expert] < capacity:
                    combine_TE[token, expert] = shares_TE[token, expert]
                taken[expert] += 1
    both_T = shares_TE[np.arange(len(x_TD)), first_T] + shares_TE[np.arange(len(x_TD)), second_T]
    total_T = both_T if normalize_before else combine_TE.sum(-1)
    combine_TE /= np.where(total_T > 0, total_T, 1)[:, None]
    y_TD = np.zeros_like(x_TD, dtype=np.float64)
    for token, expert in zip(*np.nonzero(combine_TE)):
        y_TD[token] += combine_TE[token, expert] * expert_output(weights, expert, x_TD[token])
    return y_TD.reshape(x_BSD.shape), combine_TE.reshape(*valid_BS.shape, EXPERTS)


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("normalize_before", [False, True])
def test_nllb_fills_slots_over_the_whole_batch_second_choices_last(prioritized, normalize_before):
    options = {**NLLB, "fill_order": "batch_prioritized" if prioritized else "choice_major", "renormalize": normalize_before,
               "renormalize_after_drops": not normalize_before}
    settings = config(**options)
    layer, weights, x_BSD, valid_BS = layer_and_inputs(settings, seed=3)
    found_BSD, combine_BSE = run(settings, layer, x_BSD, valid_BS)
    capacity = int(np.ceil(0.4 * ROWS * LENGTH))  # of all tokens, padding too
    expected_BSD, expected_BSE = nllb_reference(weights, x_BSD, valid_BS, capacity, prioritized, normalize_before)
    number_BS = (expected_BSE > 0).sum(-1)
    assert {0, 1, 2} <= set(number_BS[valid_BS].tolist()) or {1, 2} <= set(number_BS[valid_BS].tolist())
    np.testing.assert_array_equal(combine_BSE > 0, expected_BSE > 0)
    np.testing.assert_allclose(combine_BSE, expected_BSE, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found_BSD, 0.75 * expected_BSD, rtol=1e-4, atol=1e-5)  # moe.output_dropout


def test_gates_shared_among_the_kept_have_gradients_of_the_router():
    """By finite differences, through a token with one kept choice (gate 1, no slope) and one with two."""
    settings = config(**NLLB)
    layer, _, x_BSD, valid_BS = layer_and_inputs(settings, seed=3)
    graph, state = nnx.split(layer)
    mode = RoutingMode.evaluation(settings)
    probe = np.random.default_rng(9).normal(size=x_BSD.shape).astype(np.float32)

    def loss(state):
        y_BSD, _ = nnx.merge(graph, state)(jnp.asarray(x_BSD), jnp.asarray(valid_BS), mode, jnp.zeros(EXPERTS))
        return jnp.sum(y_BSD * probe)

    with jax.set_mesh(tiny.ONE):
        value = jax.jit(loss, compiler_options=tiny.QUICK)
        slope_DE = np.asarray(jax.jit(jax.grad(loss), compiler_options=tiny.QUICK)(state).w_router_DE[...])
        start_DE = layer.w_router_DE[...]
        for d, e in ((0, 1), (5, 2)):
            moved = []
            for step in (1e-2, -1e-2):
                layer.w_router_DE[...] = start_DE.at[d, e].add(step)
                moved.append(float(value(nnx.split(layer)[1])))
            assert slope_DE[d, e] == pytest.approx((moved[0] - moved[1]) / 2e-2, rel=0.05, abs=0.05)


def test_output_dropout_drops_whole_tokens_in_training_and_the_mean_is_that_of_evaluation():
    settings = config(**{**NLLB, "capacity_factor": 1.0, "eval_capacity_factor": 1.0})
    layer, _, x_BSD, valid_BS = layer_and_inputs(settings)
    plain_BSD, _ = run(settings, layer, x_BSD, valid_BS)
    plain_BSD = plain_BSD / 0.75
    shares = []
    for seed in range(12):
        found_BSD, _ = run(settings, layer, x_BSD, valid_BS, RoutingMode.training(settings), jax.random.key(seed))
        gone_BS = (found_BSD == 0).all(-1) & valid_BS
        np.testing.assert_allclose(found_BSD[~gone_BS], plain_BSD[~gone_BS], rtol=1e-5, atol=1e-5)
        shares.append(gone_BS[valid_BS].mean())
    assert 0.15 < np.mean(shares) < 0.35 and len(set(shares)) > 3


def test_slots_as_a_share_of_the_group():
    assert expert_capacity(40, 4, 2, 0.45, "group", 1) == 18
    assert expert_capacity(100, 4, 2, 0.07, "group", 1) == 8  # ceil(7.000000000000001), as transformers has it
    assert expert_capacity(40, 4, 2, 3.0, "group", 1) == 40
    assert expert_capacity(10, 4, 2, 0.01, "group", 1) == 1
    capacity = ROUTERS["top_k"].capacity
    assert capacity(30, MoEConfig(expert_capacity=64), 1.0) == 30 and capacity(300, MoEConfig(expert_capacity=64), 1.0) == 64


@pytest.mark.parametrize("options, words", [
    (dict(renormalize=True), "moe.renormalize_after_drops=True: .* twice"),
    (dict(experts_per_token=1), "moe.experts_per_token=1: with one expert per token a renormalised gate is always 1"),
    (dict(num_identity_experts=1), "moe.renormalize_after_drops=True: knows experts with slots only"),
], ids=str)
def test_gates_that_cannot_be_shared_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        check_router(MoEConfig(**{**NLLB, "group_size": 0, **options}))


def test_a_group_of_the_whole_batch_lies_on_one_device():
    from moe_jax.sharding import resolve_mesh
    with pytest.raises(ConfigError, match="moe.group_over='all'.* one device"):
        resolve_mesh(dataclasses.replace(config(**NLLB), data=dataclasses.replace(config(**NLLB).data, batch_size=8)), 8)
    with pytest.raises(ConfigError, match="moe.group_size=22: has no effect with moe.group_over='all'"):
        config(**NLLB, group_size=22)
