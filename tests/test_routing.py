"""Who goes where: capacity, fill order, top-k, expert choice, what a token may know of later tokens.

The reference is :func:`numpy_top_k` and :func:`numpy_slots`: NumPy, fp64, one token at a time, no code in common with
the package. ``tests/test_dispatch.py`` uses it too.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import Config, ConfigError, MoEConfig
from moe_jax.routing import ROUTERS, check_router
from moe_jax.routing.assignment import RouterInputs, assign_slots, expert_capacity, token_choice_list
from moe_jax.routing.balance import router_z_loss

QUICK = settings(max_examples=25, deadline=None, derandomize=True)

GATES = {
    "softmax": dict(gate_order="softmax_then_top_k", renormalize=False),
    "renormalized": dict(gate_order="softmax_then_top_k", renormalize=True),
    "top_k_first": dict(gate_order="top_k_then_softmax", renormalize=False),
}


# The reference


def numpy_softmax(row):
    exp = np.exp(row - row.max())
    return exp / exp.sum()


def numpy_top_k(logits_TE, choices, gate="softmax", valid_T=None, bias_E=None):
    """[T, K] experts (E for padding) and fp64 gates, best first, ties to the lowest expert."""
    logits_TE = np.asarray(logits_TE, np.float64)
    tokens, num_experts = logits_TE.shape
    expert_TK, gate_TK = np.full((tokens, choices), num_experts), np.zeros((tokens, choices))
    for t in range(tokens):
        if valid_T is not None and not valid_T[t]:
            continue
        p = numpy_softmax(logits_TE[t])
        rank = logits_TE[t] if bias_E is None else p + np.asarray(bias_E, np.float64)
        chosen = sorted(range(num_experts), key=lambda e: (-rank[e], e))[:choices]
        gates = numpy_softmax(logits_TE[t][chosen]) if gate == "top_k_first" else p[chosen]
        expert_TK[t], gate_TK[t] = chosen, gates / gates.sum() if gate == "renormalized" else gates
    return expert_TK, gate_TK


def numpy_order(expert_TK, gate_TK, fill_order):
    """[(token, choice)] in the order in which buffers fill."""
    tokens, choices = expert_TK.shape
    if fill_order == "token_major":
        return [(t, k) for t in range(tokens) for k in range(choices)]
    by_token = list(range(tokens))
    if fill_order == "batch_prioritized":
        by_token.sort(key=lambda t: -np.float32(gate_TK[t, 0]))  # stable
    return [(t, k) for k in range(choices) for t in by_token]


def numpy_slots(experts, num_experts, capacity):
    """Slot and kept flag of each assignment of the list: a dropped one still advances the count."""
    count, slots, kept = [0] * num_experts, [], []
    for e in experts:
        slots.append(count[e] if e < num_experts else 0)
        kept.append(e < num_experts and count[e] < capacity)
        if e < num_experts:
            count[e] += 1
    return slots, kept


# The package, compiled once per config and shape


@functools.lru_cache(maxsize=None)
def router(moe):
    return jax.jit(lambda logits, valid, bias: ROUTERS[moe.router].route(RouterInputs(logits, valid, bias), moe))


def route(moe, logits_TE, valid_T=None, bias_E=None):
    logits_TE = jnp.asarray(logits_TE, jnp.float32)
    valid_T = jnp.ones(logits_TE.shape[0], bool) if valid_T is None else jnp.asarray(valid_T)
    bias_E = jnp.zeros(logits_TE.shape[1]) if bias_E is None else jnp.asarray(bias_E, jnp.float32)
    return jax.device_get(router(moe)(logits_TE, valid_T, bias_E))


jitted_slots = jax.jit(assign_slots, static_argnums=(1, 2))


def slots_of(experts, num_experts, capacity):
    return jax.device_get(jitted_slots(np.asarray(experts, np.int32), num_experts, capacity))


def config(num_experts=4, experts_per_token=2, **options):
    return MoEConfig(num_experts=num_experts, experts_per_token=experts_per_token, **options)


def random_logits(tokens, num_experts, seed=0):
    return np.random.default_rng(seed).normal(size=(tokens, num_experts)).astype(np.float32)


def as_lists(routing):
    return [(int(t), int(e), float(g)) for t, e, g in zip(routing.token_N, routing.expert_N, routing.gate_N)]


# Capacity


@pytest.mark.parametrize("counts, tokens, experts, choices, factor, minimum, expected", [
    ("choices", 64, 8, 2, 1.0, 1, 16),  # 1 · 2 · 64 / 8: a balanced load exactly
    ("choices", 64, 8, 2, 1.25, 1, 20),  # 1.25 · 2 · 64 / 8
    ("tokens", 64, 8, 2, 1.25, 1, 10),  # 1.25 · 64 / 8: room for 62.5 % of the 128 choices (docs/conventions.md)
    ("tokens", 64, 8, 2, 2.0, 1, 16),  # 2.0 · 64 / 8: for all of them
    ("choices", 10, 4, 1, 1.0, 1, 3),  # 2.5 up
    ("tokens", 10, 4, 1, 1.0, 1, 2),  # 2.5 to the even neighbour, as Python and flaxformer round
    ("tokens", 14, 4, 1, 1.0, 1, 4),  # 3.5 to the even neighbour
    ("tokens", 11, 4, 1, 1.0, 1, 3),  # 2.75 to the nearest
    ("choices", 8, 8, 1, 1.0, 4, 4),  # 1, but at least 4
    ("choices", 3, 8, 1, 1.0, 4, 3),  # 1, at least 4, but an expert meets each of the 3 tokens once
    ("tokens", 3, 8, 1, 1.0, 4, 3),
    ("choices", 1, 1, 1, 100.0, 4, 1),
    ("choices", 100, 10, 1, 1.1, 1, 11),  # 1.1 · 100 / 10, which floating point puts a little above 11
    ("choices", 100, 4, 2, 1.1, 1, 55),
])
def test_capacity_by_hand(counts, tokens, experts, choices, factor, minimum, expected):
    assert expert_capacity(tokens, experts, choices, factor, counts, minimum) == expected


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 8), st.floats(0.01, 50), st.sampled_from(["choices", "tokens"]),
       st.integers(1, 8))
@QUICK
def test_b38_capacity_never_exceeds_the_tokens_nor_falls_below_the_minimum(tokens, experts, choices, factor, counts, minimum):
    capacity = expert_capacity(tokens, experts, choices, factor, counts, minimum)
    assert min(minimum, tokens) <= capacity <= tokens


# Slots


def test_slots_count_earlier_assignments_to_the_same_expert():
    slot, kept = slots_of([0, 1, 0, 2, 0, 1], 3, 2)
    assert slot.tolist() == [0, 0, 1, 0, 2, 1]
    assert kept.tolist() == [True, True, True, True, False, True]


def test_a_dropped_assignment_still_advances_the_count():
    # Capacity 1: the second and third arrivals at expert 0 are both dropped, with slots 1 and 2 (not 1 and 1).
    slot, kept = slots_of([0, 0, 0], 1, 1)
    assert slot.tolist() == [0, 1, 2] and kept.tolist() == [True, False, False]


def test_nowhere_takes_no_slot_and_is_not_kept():
    slot, kept = slots_of([2, 0, 2, 0], 2, 4)
    assert kept.tolist() == [False, True, False, True]
    assert slot[1] == 0 and slot[3] == 1


expert_lists = st.integers(1, 5).flatmap(lambda e: st.tuples(st.just(e), st.lists(st.integers(0, e), min_size=24, max_size=24)))


@given(expert_lists, st.sampled_from([1, 3, 24]))
@QUICK
def test_b36_no_expert_keeps_more_than_its_capacity(case, capacity):
    num_experts, experts = case
    slot, kept = slots_of(experts, num_experts, capacity)
    slots, wanted = numpy_slots(experts, num_experts, capacity)
    assert kept.tolist() == wanted
    assert [s for s, k in zip(slot.tolist(), wanted) if k] == [s for s, k in zip(slots, wanted) if k]
    for e in range(num_experts):
        held = [s for s, k, x in zip(slot.tolist(), kept.tolist(), experts) if k and x == e]
        assert held == list(range(min(capacity, experts.count(e))))  # each slot once, from the first on


# Fill order. Three tokens, K = 2, two experts: everyone likes expert 0 better, token 2 most of all.

CHOSEN = jnp.array([[0, 1], [0, 1], [0, 1]])
GATE = jnp.array([[0.6, 0.4], [0.7, 0.3], [0.9, 0.1]])


def listed(order):
    routing = token_choice_list(CHOSEN, GATE, order, None)
    return routing, list(zip(routing.token_N.tolist(), routing.expert_N.tolist(), routing.gate_N.tolist()))


def test_token_major_lists_token_by_token():
    routing, items = listed("token_major")
    assert np.allclose(items, [(0, 0, 0.6), (0, 1, 0.4), (1, 0, 0.7), (1, 1, 0.3), (2, 0, 0.9), (2, 1, 0.1)])
    assert (routing.order, routing.choices_per_token) == ("token_major", 2)


def test_choice_major_lists_all_first_choices_first():
    routing, items = listed("choice_major")
    assert np.allclose(items, [(0, 0, 0.6), (1, 0, 0.7), (2, 0, 0.9), (0, 1, 0.4), (1, 1, 0.3), (2, 1, 0.1)])
    assert (routing.order, routing.choices_per_token) == ("choice_major", 2)


def test_batch_prioritized_lists_tokens_by_falling_first_gate_for_every_rank():
    routing, items = listed("batch_prioritized")
    # By first gate: token 2 (0.9), 1 (0.7), 0 (0.6); second choices in the same order, whatever their own gates.
    assert np.allclose(items, [(2, 0, 0.9), (1, 0, 0.7), (0, 0, 0.6), (2, 1, 0.1), (1, 1, 0.3), (0, 1, 0.4)])
    assert (routing.order, routing.choices_per_token) == ("", 2)


def test_batch_prioritized_keeps_the_order_of_equally_confident_tokens():
    routing = token_choice_list(jnp.zeros((5, 1), jnp.int32), jnp.array([[0.5], [0.7], [0.5], [0.7], [0.5]]),
                                "batch_prioritized", None)
    assert routing.token_N.tolist() == [1, 3, 0, 2, 4]


@pytest.mark.parametrize("order, kept_tokens", [
    ("token_major", {0: [0, 1], 1: [0, 1]}),  # late tokens lose everything
    ("choice_major", {0: [0, 1], 1: [0, 1]}),
    ("batch_prioritized", {0: [1, 2], 1: [1, 2]}),  # unsure tokens do
])
def test_the_fill_order_decides_who_is_dropped(order, kept_tokens):
    routing, _ = listed(order)
    _, kept = slots_of(routing.expert_N, 2, 2)
    found = {e: sorted(int(t) for t, x, k in zip(routing.token_N, routing.expert_N, kept) if k and x == e) for e in (0, 1)}
    assert found == kept_tokens


def test_fill_orders_differ_where_a_second_choice_meets_a_first():
    # Token 0 chooses (0, 1), token 1 chooses (1, 0), capacity 1. Token by token: token 0 takes both experts.
    # First choices first: each takes its favourite.
    chosen, gate = jnp.array([[0, 1], [1, 0]]), jnp.array([[0.6, 0.4], [0.7, 0.3]])
    for order, expected in (("token_major", [(0, 0), (0, 1)]), ("choice_major", [(0, 0), (1, 1)])):
        routing = token_choice_list(chosen, gate, order, None)
        _, kept = slots_of(routing.expert_N, 2, 1)
        assert [(int(t), int(e)) for t, e, k in zip(routing.token_N, routing.expert_N, kept) if k] == expected


# Top-k


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens, experts, choices", [(37, 5, 2), (9, 3, 3), (16, 8, 4)])
def test_top_k_equals_the_reference(gate, tokens, experts, choices):
    logits = 3 * random_logits(tokens, experts)
    valid = np.random.default_rng(1).random(tokens) < 0.8
    routing = route(config(experts, choices, **GATES[gate]), logits, valid)
    expert_TK, gate_TK = numpy_top_k(logits, choices, gate, valid)
    np.testing.assert_array_equal(routing.token_N, np.repeat(np.arange(tokens), choices))
    np.testing.assert_array_equal(routing.expert_N, expert_TK.reshape(-1))
    np.testing.assert_allclose(routing.gate_N, gate_TK.reshape(-1), rtol=1e-5, atol=1e-7)
    assert routing.token_N.dtype == routing.expert_N.dtype == jnp.int32
    assert routing.gate_N.dtype == jnp.float32


@pytest.mark.parametrize("fill_order", ["token_major", "choice_major", "batch_prioritized"])
def test_top_k_lists_in_its_fill_order(fill_order):
    logits = random_logits(12, 4)
    routing = route(config(fill_order=fill_order), logits)
    expert_TK, gate_TK = numpy_top_k(logits, 2)
    order = numpy_order(expert_TK, gate_TK, fill_order)
    assert list(zip(routing.token_N.tolist(), routing.expert_N.tolist())) == [(t, expert_TK[t, k]) for t, k in order]
    np.testing.assert_allclose(routing.gate_N, [gate_TK[t, k] for t, k in order], rtol=1e-5)


@pytest.mark.parametrize("fill_order", ["token_major", "choice_major", "batch_prioritized"])
def test_the_list_keeps_the_promises_that_dispatchers_rely_on(fill_order):
    routing = route(config(fill_order=fill_order), random_logits(12, 4), np.arange(12) < 9)
    assert routing.choices_per_token == 2
    assert np.bincount(routing.token_N, minlength=12).tolist() == [2] * 12
    promised = {"token_major": np.repeat(np.arange(12), 2), "choice_major": np.tile(np.arange(12), 2)}
    if routing.order:
        np.testing.assert_array_equal(routing.token_N, promised[routing.order])


def test_b25_renormalised_softmax_equals_softmax_of_the_chosen_logits():
    logits = 3 * random_logits(16, 8)
    one, other = (route(config(8, 3, **GATES[gate]), logits) for gate in ("renormalized", "top_k_first"))
    np.testing.assert_array_equal(one.expert_N, other.expert_N)
    np.testing.assert_allclose(one.gate_N, other.gate_N, rtol=1e-5)
    np.testing.assert_allclose(np.sum(np.reshape(one.gate_N, (16, 3)), 1), 1.0, rtol=1e-5)


def test_ties_go_to_the_lowest_expert():
    logits = np.array([[0, 0, 0, 0], [1, 2, 2, 1], [2, 1, 2, 2], [-1, -1, -2, -1]], np.float32)
    assert np.reshape(route(config(), logits).expert_N, (4, 2)).tolist() == [[0, 1], [1, 2], [0, 2], [0, 1]]


def test_zero_and_minus_zero_tie():
    # lax.top_k orders -0.0 below 0.0. A logit of -0.0 comes from an all-zero input row.
    logits = np.array([[-0.0, 0.0, 0.0, -0.0], [0.0, -0.0, 0.0, 0.0]], np.float32)
    routing = route(config(), logits)
    assert np.reshape(routing.expert_N, (2, 2)).tolist() == [[0, 1], [0, 1]]
    assert routing.statistics.first_choices_E.tolist() == [2, 0, 0, 0]


def test_b29_ties_are_equal_forward_and_recomputed():
    moe = config()

    def loss(logits):
        routing = ROUTERS["top_k"].route(RouterInputs(logits, jnp.ones(6, bool), jnp.zeros(4)), moe)
        return jnp.sum(routing.gate_N * jnp.cos(routing.expert_N + 3.0 * routing.token_N))

    logits = jnp.zeros((6, 4))
    plain, remat = jax.jit(jax.grad(loss))(logits), jax.jit(jax.grad(jax.checkpoint(loss)))(logits)
    np.testing.assert_array_equal(plain, remat)
    assert np.abs(plain).max() > 0


def test_b35_a_nan_logit_never_wins_and_still_makes_the_z_loss_nan():
    logits = np.array([[np.nan, 0.0, 1.0, 2.0], [0.0, np.nan, -5.0, np.nan]], np.float32)
    routing = route(config(), logits)
    assert np.reshape(routing.expert_N, (2, 2)).tolist() == [[3, 2], [0, 2]]
    assert np.isfinite(routing.gate_N).all()
    assert np.isnan(router_z_loss(routing.statistics, jnp.float32(2)))


def test_b35_a_nan_logit_never_wins_by_its_bias():
    moe = config(experts_per_token=1, bias_update_rate=0.001)
    assert route(moe, [[np.nan, 0.0, 0.0, 0.0]], bias_E=[5.0, 0.0, 0.0, 0.0]).expert_N.tolist() == [1]


def test_b26_near_ties_are_decided_as_in_fp64():
    """bf16 inputs, fp32 logits: the choice of the exact product, where bf16 logits would often choose otherwise."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(256, 16)), jnp.bfloat16).astype(jnp.float32)
    w = rng.normal(size=(16, 1)).astype(np.float32) + 1e-3 * rng.normal(size=(16, 8)).astype(np.float32)
    exact = np.asarray(x, np.float64) @ w.astype(np.float64)
    logits = jnp.dot(x, w, precision=jax.lax.Precision.HIGHEST)
    wanted, _ = numpy_top_k(exact, 2)
    routing = route(config(8, 2), logits)
    np.testing.assert_array_equal(np.reshape(routing.expert_N, (256, 2)), wanted)
    rounded = route(config(8, 2), logits.astype(jnp.bfloat16))
    assert np.mean(np.reshape(rounded.expert_N, (256, 2)) != wanted) > 0.1  # the example is a near tie


def test_b26_the_choice_is_by_logit_where_probabilities_round_to_a_tie():
    # exp(1e-9) and exp(2e-9) are both 1 in fp32.
    routing = route(config(3, 1), [[1e-9, 2e-9, 0.0]])
    assert routing.expert_N.tolist() == [1]
    assert routing.statistics.first_choices_E.tolist() == [0, 1, 0]


def test_b28_permuting_tokens_permutes_routes():
    logits, order = random_logits(10, 4), np.random.default_rng(2).permutation(10)
    straight, permuted = route(config(), logits), route(config(), logits[order])
    for name in ("expert_N", "gate_N"):
        one, other = (np.reshape(getattr(r, name), (10, 2)) for r in (straight, permuted))
        np.testing.assert_array_equal(one[order], other)


def test_b33_the_bias_changes_the_choice_never_the_weights():
    moe = config(experts_per_token=2, bias_update_rate=0.001)
    logits, bias = random_logits(32, 4), np.array([0.0, 0.5, 0.0, -0.5], np.float32)
    routing, unbiased = route(moe, logits, bias_E=bias), route(moe, logits)
    expert_TK, gate_TK = numpy_top_k(logits, 2, bias_E=bias)
    np.testing.assert_array_equal(routing.expert_N, expert_TK.reshape(-1))
    np.testing.assert_allclose(routing.gate_N, gate_TK.reshape(-1), rtol=1e-5)  # p, not p + bias
    assert np.mean(routing.expert_N != unbiased.expert_N) > 0.2
    same = np.asarray(routing.expert_N == unbiased.expert_N)
    np.testing.assert_array_equal(np.asarray(routing.gate_N)[same], np.asarray(unbiased.gate_N)[same])


def test_b33_the_bias_does_not_alter_the_balance_probabilities():
    moe = config(bias_update_rate=0.001)
    logits = random_logits(8, 4)
    one, other = (route(moe, logits, bias_E=bias).statistics for bias in (np.zeros(4), np.array([1.0, 0, 0, 0])))
    np.testing.assert_array_equal(one.probability_E, other.probability_E)
    assert one.choices_E.tolist() != other.choices_E.tolist()


def test_a_bias_that_is_no_longer_updated_still_chooses():
    """DeepSeek-V3 sets the rate to 0 for the last phase and keeps the bias."""
    for rate in (0.0, 0.001):
        routing = route(config(bias_update_rate=rate), [[0.0, 1.0, 2.0, 3.0]], bias_E=[100.0, 0, 0, 0])
        assert routing.expert_N.tolist() == [0, 3]
        np.testing.assert_allclose(routing.gate_N, numpy_softmax(np.arange(4.0))[[0, 3]], rtol=1e-6)


# Padding


def statistics_of(routing):
    return {field.name: np.asarray(getattr(routing.statistics, field.name))
            for field in dataclasses.fields(routing.statistics)}


ROUTER_CONFIGS = {
    "top_k": config(),
    "top_k_first": config(gate_order="top_k_then_softmax"),
    "batch_prioritized": config(fill_order="batch_prioritized"),
    "biased": config(bias_update_rate=0.001),
    "expert_choice": config(router="expert_choice", balance_weight=0.0),
    "deepseek_v3": config(score="sigmoid", renormalize=True, num_groups=2, groups_per_token=1, group_score="top_sum",
                          bias_update_rate=0.001),
    "threshold": config(second_policy="threshold", second_threshold=0.3),
    "noisy_top_k": config(router="noisy_top_k", gate_order="top_k_then_softmax"),
}


@pytest.mark.parametrize("name", ROUTER_CONFIGS)
@pytest.mark.parametrize("poison", [0.0, 50.0, np.nan])
def test_b41_padding_goes_nowhere_and_changes_no_statistic(name, poison):
    logits, valid = random_logits(12, 4), np.arange(12) % 3 == 1  # fewer valid tokens than experts could take
    routing = route(ROUTER_CONFIGS[name], np.where(valid[:, None], logits, poison), valid)
    plain = route(ROUTER_CONFIGS[name], np.where(valid[:, None], logits, 0.0), valid)
    padding = ~valid[np.asarray(routing.token_N)]
    assert padding.any() and (np.asarray(routing.expert_N)[padding] == 4).all()
    assert (np.asarray(routing.gate_N)[padding] == 0).all()
    for one, other in zip(as_lists(routing), as_lists(plain)):
        assert one == other
    for key, value in statistics_of(routing).items():
        np.testing.assert_array_equal(value, statistics_of(plain)[key], err_msg=key)


@pytest.mark.parametrize("name", [name for name in ROUTER_CONFIGS if name != "expert_choice"])
def test_b19_statistics_with_padding_equal_those_without_it(name):
    logits, valid = random_logits(12, 4), np.arange(12) % 3 != 0
    padded, short = route(ROUTER_CONFIGS[name], logits, valid), route(ROUTER_CONFIGS[name], logits[valid])
    for key, value in statistics_of(padded).items():
        np.testing.assert_allclose(value, statistics_of(short)[key], rtol=1e-6, err_msg=key)


def test_b19_padding_adds_nothing_to_the_z_loss():
    # Two valid tokens with logits 0: (ln 4)² each. Two padding tokens would add as much again.
    statistics = route(config(), np.zeros((4, 4)), [True, False, True, False]).statistics
    assert float(statistics.logsumexp_squared) == pytest.approx(2 * math.log(4) ** 2, rel=1e-6)
    assert float(router_z_loss(statistics, statistics.tokens)) == pytest.approx(math.log(4) ** 2, rel=1e-6)


def test_b41_the_mask_is_per_token_when_there_are_as_many_tokens_as_experts():
    # T = E: a mask broadcast along the wrong axis has the same shape.
    routing = route(config(4, 1), np.eye(4), [True, False, True, True])
    assert routing.expert_N.tolist() == [0, 4, 2, 3]
    assert routing.statistics.choices_E.tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("name", ROUTER_CONFIGS)
def test_a_group_of_padding_alone_is_all_zeros(name):
    routing = route(ROUTER_CONFIGS[name], np.full((12, 4), np.nan), np.zeros(12, bool))
    assert (np.asarray(routing.expert_N) == 4).all()
    assert all((value == 0).all() for value in statistics_of(routing).values())


def test_statistics_by_hand():
    # Two valid tokens, p = (3/4, 1/4) and (1/4, 3/4) … with logits (ln 3, 0) and (0, ln 3); K = 1.
    routing = route(config(2, 1), [[math.log(3), 0.0], [0.0, math.log(3)], [9.0, 0.0]], [True, True, False])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = dict(tokens=2, choices_E=[1, 1], first_choices_E=[1, 1], probability_E=[1, 1],
                    logsumexp_squared=2 * math.log(4) ** 2, entropy=2 * entropy, confidence=1.5, logit_max=math.log(3),
                    importance_E=[1, 1], load_E=[0, 0], reached_X=[2], group_load_X=[0])
    for key, value in statistics_of(routing).items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-6, err_msg=key)


def test_b55_choices_sum_to_k_times_the_valid_tokens():
    valid = np.arange(12) < 7
    statistics = route(config(4, 3), random_logits(12, 4), valid).statistics
    assert np.sum(statistics.choices_E) == 21
    assert np.sum(statistics.first_choices_E) == 7


# Gradients


def gradient(moe, logits, pick, valid=None):
    valid = jnp.ones(logits.shape[0], bool) if valid is None else jnp.asarray(valid)
    route_ = ROUTERS[moe.router].route
    return np.asarray(jax.jit(jax.grad(lambda l: pick(route_(RouterInputs(l, valid, jnp.zeros(moe.num_experts)), moe))))(
        jnp.asarray(logits, jnp.float32)))


@pytest.mark.parametrize("name, carries", [
    ("choices_E", False), ("first_choices_E", False), ("tokens", False), ("entropy", False), ("confidence", False),
    ("logit_max", False), ("probability_E", True), ("logsumexp_squared", True)])
def test_gradient_contract_of_the_statistics(name, carries):
    weights = jnp.array([1.0, 2.0, -1.0, 0.5])

    def pick(routing):
        value = getattr(routing.statistics, name)
        return jnp.sum(value * weights) if value.ndim else value

    assert (np.abs(gradient(config(), random_logits(6, 4), pick)).max() > 1e-3) == carries


@pytest.mark.parametrize("gate", GATES)
def test_gates_carry_the_gradient_of_their_formula(gate):
    logits, valid = random_logits(6, 4), np.array([1, 1, 0, 1, 1, 1], bool)
    cotangent = np.random.default_rng(5).normal(size=12)
    found = gradient(config(**GATES[gate]), logits, lambda r: jnp.sum(r.gate_N * cotangent.astype(np.float32)), valid)

    def value(x):
        return np.sum(numpy_top_k(x, 2, gate, valid)[1].reshape(-1) * cotangent)

    for t, e in np.ndindex(6, 4):
        step = np.zeros((6, 4))
        step[t, e] = 1e-5
        slope = (value(logits + step) - value(logits - step)) / 2e-5
        assert found[t, e] == pytest.approx(slope, abs=1e-4)
    assert (found[2] == 0).all() and np.abs(found).max() > 1e-2


@pytest.mark.parametrize("name", ROUTER_CONFIGS)
def test_nan_in_padding_stays_out_of_the_gradient(name):
    valid = np.arange(12) < 8
    logits = np.where(valid[:, None], random_logits(12, 4), np.nan)
    found = gradient(ROUTER_CONFIGS[name], logits, lambda r: jnp.sum(r.gate_N**2) + r.statistics.logsumexp_squared
                     + jnp.sum(r.statistics.probability_E**2), valid)
    assert np.isfinite(found).all() and (found[8:] == 0).all() and np.abs(found[:8]).max() > 0


def test_b23_one_expert_per_token_has_a_router_gradient_in_its_only_legal_mode():
    assert np.abs(gradient(config(experts_per_token=1), random_logits(6, 4), lambda r: jnp.sum(r.gate_N))).max() > 1e-2


@pytest.mark.parametrize("gate", ["renormalized", "top_k_first"])
def test_b23_normalised_gates_of_one_expert_have_none_and_are_refused(gate):
    moe = config(experts_per_token=1, **GATES[gate])
    assert np.abs(gradient(moe, random_logits(6, 4), lambda r: jnp.sum(r.gate_N))).max() < 1e-6
    with pytest.raises(ConfigError, match="experts_per_token=1"):
        check_router(moe)
    allowed = dataclasses.replace(moe, allow_untrained_router=True)  # of an imported checkpoint; training refuses it
    check_router(allowed)
    np.testing.assert_array_equal(route(allowed, random_logits(6, 4)).gate_N, np.ones(6))


# Expert choice


def numpy_expert_choice(logits_TE, capacity, valid_T):
    """{expert: [(token, gate)]}, best first, ties to the lowest token; padding never."""
    logits_TE = np.asarray(logits_TE, np.float64)
    p = np.array([numpy_softmax(row) for row in logits_TE])
    tokens = [t for t in range(len(p)) if valid_T[t]]
    return {e: [(t, p[t, e]) for t in sorted(tokens, key=lambda t: (-p[t, e], t))[:capacity]] for e in range(p.shape[1])}


def expert_choice_config(num_experts, mean):
    return config(num_experts, mean, router="expert_choice", balance_weight=0.0)


@pytest.mark.parametrize("tokens, experts, mean, capacity", [
    (16, 4, 2, 8),  # 2 · 16 / 4
    (10, 4, 1, 3),  # 2.5 up
    (12, 3, 3, 12),  # everybody everywhere
    (37, 5, 2, 15),  # 14.8 up
    (2, 8, 1, 1),  # at least one
])
def test_every_expert_chooses_exactly_its_capacity(tokens, experts, mean, capacity):
    moe = expert_choice_config(experts, mean)
    assert ROUTERS["expert_choice"].capacity(tokens, moe, 99.0) == capacity
    logits, valid = random_logits(tokens, experts), np.ones(tokens, bool)
    routing = route(moe, logits)
    assert routing.choices_per_token is None and routing.expert_N.shape == (experts * capacity,)
    assert np.bincount(routing.expert_N, minlength=experts).tolist() == [capacity] * experts
    wanted = numpy_expert_choice(logits, capacity, valid)
    for e in range(experts):
        mine = [(t, g) for t, x, g in as_lists(routing) if x == e]
        assert [t for t, _ in mine] == [t for t, _ in wanted[e]]
        np.testing.assert_allclose([g for _, g in mine], [g for _, g in wanted[e]], rtol=1e-5)
    # Capacity buffers of that size drop nobody.
    _, kept = slots_of(routing.expert_N, experts, capacity)
    assert kept.all()


def test_expert_choice_never_takes_padding_even_with_slots_to_spare():
    valid = np.arange(16) < 5  # capacity 8 per expert, 5 tokens
    routing = route(expert_choice_config(4, 2), random_logits(16, 4), valid)
    taken = np.asarray(routing.expert_N) < 4
    assert valid[np.asarray(routing.token_N)[taken]].all()
    assert np.bincount(np.asarray(routing.expert_N)[taken], minlength=4).tolist() == [5] * 4
    assert (np.asarray(routing.gate_N)[~taken] == 0).all()


def test_expert_choice_breaks_ties_by_the_lowest_token():
    routing = route(expert_choice_config(2, 1), np.zeros((6, 2)))
    assert routing.token_N.tolist() == [0, 1, 2, 0, 1, 2]


def test_expert_choice_gates_carry_gradient_and_the_choice_none():
    moe, logits = expert_choice_config(3, 1), random_logits(6, 3)
    found = gradient(moe, logits, lambda r: jnp.sum(r.gate_N))
    wanted = numpy_expert_choice(logits, 2, np.ones(6, bool))
    expected = np.zeros((6, 3))  # d p_e / d l_j = p_e (1[e=j] - p_j)
    for e, taken in wanted.items():
        for t, p_e in taken:
            expected[t] += p_e * (np.eye(3)[e] - numpy_softmax(logits[t].astype(np.float64)))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_expert_choice_over_the_batch_compares_sequences_at_one_position():
    """group_over='batch': one position of B sequences is a group, so other positions cannot matter (A6)."""
    from moe_jax.nn.groups import GroupLayout
    from moe_jax.config import DataConfig
    from moe_jax.sharding import make_mesh
    run = Config(moe=config(router="expert_choice", balance_weight=0.0, group_over="batch"),
                 data=DataConfig(batch_size=3, sequence_length=2))
    with jax.set_mesh(make_mesh(dict(data=1, fsdp=1, expert=1, tensor=1))):
        layout = GroupLayout(3, 2, run)
        x_BS = jnp.array([[0, 1], [10, 11], [20, 21]])
        x_GT = layout.split(x_BS)
        np.testing.assert_array_equal(x_GT, [[0, 10, 20], [1, 11, 21]])
        np.testing.assert_array_equal(layout.join(x_GT), x_BS)
