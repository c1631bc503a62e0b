"""Noise, groups of experts, second choices, sigmoid scores: against hand arithmetic and NumPy in fp64.

Shapes: T tokens, E experts, K choices per token, X groups of experts.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from test_routing import numpy_softmax, numpy_top_k, random_logits

from moe_jax.config import ConfigError, MoEConfig
from moe_jax.nn.moe import MoELayer, RoutingMode
from moe_jax.routing import ROUTERS, check_router
from moe_jax.routing.assignment import RouterInputs, assign_slots
from moe_jax.routing.token_choice import load_over_others
from moe_jax.training.state import initial_params

TOKENS, EXPERTS = 40, 8


@functools.lru_cache(maxsize=None)
def compiled(moe):
    return jax.jit(lambda inputs: ROUTERS[moe.router].route(inputs, moe))


def route(moe, logits_TE, valid_T=None, bias_E=None, key=None, noise_logits_TE=None, noise_TE=None):
    logits_TE = jnp.asarray(logits_TE, jnp.float32)
    given = lambda value: None if value is None else jnp.asarray(value, jnp.float32)
    return jax.device_get(compiled(moe)(RouterInputs(
        logits_TE, jnp.ones(len(logits_TE), bool) if valid_T is None else jnp.asarray(valid_T),
        jnp.zeros(moe.num_experts) if bias_E is None else given(bias_E), key=key,
        noise_logits_TE=given(noise_logits_TE), noise_TE=given(noise_TE))))


def config(num_experts=EXPERTS, experts_per_token=2, **options):
    moe = MoEConfig(num_experts=num_experts, experts_per_token=experts_per_token, **options)
    check_router(dataclasses.replace(moe, allow_noncausal_routing=True))
    return moe


def of_tokens(routing, moe, field="expert_N"):
    return np.reshape(getattr(routing, field), (-1, moe.experts_per_token))


def best(values, count):
    """Indices of the largest values, ties to the lowest."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


# Noise (Shazeer et al. 2017)


def normal_cdf(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def numpy_noisy_top_k(clean_TE, noise_logits_TE, noise_TE, choices):
    """Experts, gates, importance and load, expert by expert as the paper's equations 3 to 9."""
    tokens, experts = clean_TE.shape
    expert_TK, gate_TK = np.zeros((tokens, choices), int), np.zeros((tokens, choices))
    importance_E, load_E = np.zeros(experts), np.zeros(experts)
    for t in range(tokens):
        std = np.log1p(np.exp(np.asarray(noise_logits_TE[t], np.float64)))
        h = clean_TE[t].astype(np.float64) + noise_TE[t] * std
        expert_TK[t] = best(h, choices)
        gate_TK[t] = numpy_softmax(h[expert_TK[t]])
        for e, gate in zip(expert_TK[t], gate_TK[t]):
            importance_E[e] += gate
        for e in range(experts):
            kth_excluding = np.sort(np.delete(h, e))[::-1][choices - 1] if choices < experts else -np.inf
            load_E[e] += normal_cdf((clean_TE[t, e] - kth_excluding) / std[e])
    return expert_TK, gate_TK, importance_E, load_E


SHAZEER = dict(router="noisy_top_k", gate_order="top_k_then_softmax", load_weight=0.1, importance_weight=0.1)


@pytest.mark.parametrize("choices", [2, 3, EXPERTS])
def test_noisy_top_k_equals_the_equations_of_the_paper(choices):
    moe, rng = config(experts_per_token=choices, **SHAZEER), np.random.default_rng(0)
    clean, noise_logits, noise = rng.normal(size=(3, TOKENS, EXPERTS)).astype(np.float32)
    routing = route(moe, clean, noise_logits_TE=noise_logits, noise_TE=noise)
    expert, gate, importance, load = numpy_noisy_top_k(clean, noise_logits, noise, choices)
    np.testing.assert_array_equal(of_tokens(routing, moe), expert)
    np.testing.assert_allclose(of_tokens(routing, moe, "gate_N"), gate, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(routing.statistics.importance_E, importance, rtol=1e-5)
    np.testing.assert_allclose(routing.statistics.load_E, load, rtol=1e-5)
    assert np.mean(expert[:, :1] != clean.argmax(1)[:, None]) > 0.1  # the noise does something


def test_expected_load_sums_to_about_k_times_the_tokens():
    # The sum over experts is exact in expectation (expected load: docs/conventions.md).
    tokens = 4000
    clean = 0.5 * random_logits(tokens, EXPERTS)
    routing = route(config(**SHAZEER), clean, noise_logits_TE=np.zeros((tokens, EXPERTS)), key=jax.random.key(0))
    assert float(np.sum(routing.statistics.load_E)) == pytest.approx(2 * tokens, rel=0.02)
    np.testing.assert_allclose(routing.statistics.load_E, routing.statistics.choices_E, rtol=0.1)


def test_evaluation_draws_no_noise():
    for moe in (config(**SHAZEER), config(router_noise=1.0)):
        logits = random_logits(TOKENS, EXPERTS)
        quiet, loud = route(moe, logits), route(moe, logits, key=jax.random.key(1), noise_logits_TE=np.zeros_like(logits))
        np.testing.assert_array_equal(of_tokens(quiet, moe), numpy_top_k(logits, 2)[0])
        assert np.mean(quiet.gate_N != loud.gate_N) > 0.9
        assert (quiet.statistics.load_E == 0).all() and (loud.statistics.load_E > 0).all()


def test_vmoe_noise_has_a_standard_deviation_of_one_over_e():
    # The summed score of equal logits: log p differs from token to token by the noise alone.
    moe = config(experts_per_token=EXPERTS, router_noise=2.0)
    routing = route(moe, np.zeros((4000, EXPERTS)), key=jax.random.key(0))
    logits = np.log(np.take_along_axis(of_tokens(routing, moe, "gate_N"), np.argsort(of_tokens(routing, moe)), 1))
    assert np.std(logits[:, 0] - logits[:, 1]) == pytest.approx(math.sqrt(2) * 2.0 / EXPERTS, rel=0.05)


def test_the_load_has_the_gradient_of_finite_differences():
    clean, noisy, std = np.random.default_rng(1).normal(size=(3, 5, 4))
    weights, arrays = np.arange(1.0, 5.0), (clean, noisy, np.exp(std))

    def value(*arrays):
        with jax.enable_x64(True):
            return float(jnp.sum(load_over_others(*map(jnp.asarray, arrays), 2) @ weights))

    found = jax.grad(lambda *a: jnp.sum(load_over_others(*a, 2) @ weights), (0, 1, 2))(
        *(jnp.asarray(a, jnp.float32) for a in arrays))
    for i, t, e in [(i, t, e) for i in range(3) for t in (0, 3) for e in range(4)]:
        up, down = ([a.copy() for a in arrays] for _ in range(2))
        up[i][t, e] += 1e-6
        down[i][t, e] -= 1e-6
        assert float(found[i][t, e]) == pytest.approx((value(*up) - value(*down)) / 2e-6, abs=1e-3)
    assert all(np.abs(slope).max() > 1e-2 for slope in found)  # through the threshold too


def test_padding_is_in_no_importance_and_no_load():
    moe, rng = config(**SHAZEER), np.random.default_rng(2)
    clean, noise_logits, noise = rng.normal(size=(3, 12, EXPERTS)).astype(np.float32)
    valid = np.arange(12) < 7
    poison = lambda x: np.where(valid[:, None], x, np.nan)
    padded = route(moe, poison(clean), valid, noise_logits_TE=poison(noise_logits), noise_TE=noise)
    short = route(moe, clean[:7], noise_logits_TE=noise_logits[:7], noise_TE=noise[:7])
    for name in ("importance_E", "load_E", "choices_E", "tokens"):
        np.testing.assert_allclose(getattr(padded.statistics, name), getattr(short.statistics, name), rtol=1e-6)


def test_the_layer_has_a_noise_matrix_where_the_router_wants_one():
    run = tiny.config(moe_router="noisy_top_k", moe_gate_order="top_k_then_softmax", moe_load_weight=0.1)
    params = nnx.split(MoELayer(run, nnx.Rngs(0)))[1].to_pure_dict()
    assert (params["w_router_noise_DE"] == 0).all() and params["w_router_noise_DE"].shape == params["w_router_DE"].shape
    assert "w_router_noise_DE" not in nnx.split(MoELayer(tiny.config(), nnx.Rngs(0)))[1].to_pure_dict()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 16)), jnp.float32)
    with jax.set_mesh(tiny.ONE):
        graph, state = nnx.split(MoELayer(run, nnx.Rngs(0)))

        @functools.partial(jax.jit, static_argnums=1)
        def slope(state, mode):
            def total(state):
                y, _ = nnx.merge(graph, state)(x, jnp.ones((2, 6), bool), mode, jnp.zeros(4), jax.random.key(0))
                return jnp.sum(y**2)
            return jax.grad(total)(state)["w_router_noise_DE"][...]

        assert np.abs(slope(state, RoutingMode("dropless", 1.0, noise=True))).max() > 0
        assert np.abs(slope(state, RoutingMode("dropless", 1.0))).max() == 0


# Second choices


def test_gshard_takes_the_second_expert_with_probability_twice_its_gate():
    # Gates 0.9 and 0.1 of all tokens: the second is taken with probability 0.2; 0.6 and 0.4: with 0.8; 0.5, 0.5: always.
    moe = config(3, renormalize=True, second_policy="random", second_threshold=0.5)
    for second, probability in ((0.1, 0.2), (0.4, 0.8), (0.5, 1.0)):
        logits = np.tile(np.log([1 - second, second, 1e-9]), (5000, 1))
        routing = route(moe, logits, key=jax.random.key(3))
        expert, gate = of_tokens(routing, moe), of_tokens(routing, moe, "gate_N")
        taken = expert[:, 1] == 1
        assert (expert[:, 0] == 0).all() and (expert[~taken, 1] == 3).all() and (gate[~taken, 1] == 0).all()
        np.testing.assert_allclose(gate[:, 0], 1 - second, rtol=1e-5)  # not renormalised again
        assert np.mean(taken) == pytest.approx(probability, abs=0.03)
        assert routing.statistics.choices_E.tolist() == [5000, taken.sum(), 0]
        assert (of_tokens(route(moe, logits), moe)[:, 1] == 1).all()  # evaluation draws nothing and takes all


def gshard_algorithm_1(first_T, second_T, taken_T, experts, capacity):
    """Slot of each token's first and second expert, None without one (Lepikhin et al. 2020 Algorithm 1): the counters go
    on at every choice, whether it found room, whether it was made or not."""
    counter, slots = [0] * experts, []
    for choices, made in ((first_T, [True] * len(first_T)), (second_T, taken_T)):
        for e, take in zip(choices, made):
            slots.append(counter[e] if counter[e] < capacity and take else None)
            counter[e] += 1
    return slots


@pytest.mark.parametrize("in_queue", [True, False])
def test_gshard_second_choices_that_are_not_made_pass_the_queue_by_name(in_queue):
    tokens, experts, capacity = 60, 4, 14
    moe = config(experts, renormalize=True, second_policy="random", second_threshold=0.5, second_in_queue=in_queue,
                 fill_order="choice_major")
    logits = 2 * random_logits(tokens, experts)
    routing = route(moe, logits, key=jax.random.key(0))
    wanted_TK = numpy_top_k(logits, 2)[0]
    taken_T = np.asarray(routing.expert_N[tokens:]) < experts
    slots = gshard_algorithm_1(wanted_TK[:, 0], wanted_TK[:, 1], taken_T, experts, capacity)
    slot_N, kept_N = assign_slots(jnp.asarray(routing.expert_N), experts, capacity)
    found = [int(slot) if kept else None for slot, kept in zip(slot_N, kept_N)]
    assert 10 < taken_T.sum() < 50 and None in slots[:tokens]
    assert (found == slots) == in_queue
    # Either way what is not made is counted nowhere and has gate 0.
    assert routing.statistics.choices_E.sum() == tokens + taken_T.sum()
    assert (np.asarray(routing.gate_N[tokens:])[~taken_T] == 0).all()


@pytest.mark.parametrize("dispatch", ["gather", "einsum", "dropless", "reference"])
def test_what_passes_a_queue_is_computed_by_no_dispatcher(dispatch):
    run = tiny.config(moe_renormalize=True, moe_second_policy="threshold", moe_second_threshold=0.45,
                      moe_second_in_queue=True, moe_group_size=8, data_sequence_length=8, data_batch_size=2)
    x_BSD = np.random.default_rng(0).normal(size=(2, 8, 16)).astype(np.float32)
    with jax.set_mesh(tiny.ONE):
        graph, state = nnx.split(MoELayer(run, nnx.Rngs(params=0)))
        plain, _ = nnx.split(nnx.eval_shape(lambda: MoELayer(tiny.config(
            moe_renormalize=True, moe_second_policy="threshold", moe_second_threshold=0.45, moe_group_size=8,
            data_sequence_length=8, data_batch_size=2), nnx.Rngs(params=0))))
        apply = lambda graph, mode: jax.device_get(jax.jit(lambda state: nnx.merge(graph, state)(
            x_BSD, jnp.ones((2, 8), bool), mode, jnp.zeros(4)), compiler_options=tiny.QUICK)(state))
        y_BSD, statistics = apply(graph, RoutingMode(dispatch, 4.0))  # room for all: the queue decides nothing
        wanted_BSD, _ = apply(plain, RoutingMode("reference", 4.0))
    np.testing.assert_allclose(y_BSD, wanted_BSD, rtol=1e-4, atol=1e-5)
    assert 16 < statistics.kept_GE.sum() == statistics.router.choices_E.sum() < 32


def test_second_policies_by_hand():
    logits = np.log([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]])  # renormalised over two: 7/9, 2/9; 8/15, 7/15
    expected = {"all": [[0, 1], [0, 1]], "none": [[0, 3], [0, 3]]}
    for policy, wanted in expected.items():
        moe = config(3, renormalize=True, second_policy=policy)
        assert of_tokens(route(moe, logits), moe).tolist() == wanted
    for threshold, wanted in ((0.2, [[0, 1], [0, 1]]), (0.3, [[0, 3], [0, 1]]), (0.47, [[0, 3], [0, 3]])):
        moe = config(3, renormalize=True, second_policy="threshold", second_threshold=threshold)
        assert of_tokens(route(moe, logits), moe).tolist() == wanted


def test_st_moe_top_3_keeps_each_later_expert_by_its_own_gate():
    moe = config(4, 3, renormalize=True, second_policy="random")
    routing = route(moe, np.tile(np.log([0.85, 0.1, 0.05, 1e-9]), (5000, 1)), key=jax.random.key(0))
    kept = np.mean(of_tokens(routing, moe) < 4, axis=0)
    np.testing.assert_allclose(kept, [1.0, 0.1 / 0.2, 0.05 / 0.2], atol=0.03)


# Priority


def test_priority_by_the_highest_score_or_by_the_sum_and_always_by_raw_scores():
    # Highest: 0.6, 0.5, 0.45. Sums of two: 0.74, 0.95, 0.85. Renormalised first gates: 0.81, 0.526, 0.529.
    p_TE = np.array([[0.6, 0.14, 0.13, 0.13], [0.5, 0.45, 0.03, 0.02], [0.45, 0.4, 0.1, 0.05]])
    for gates in (dict(), dict(renormalize=True), dict(gate_order="top_k_then_softmax")):
        for priority, wanted in (("max", [0, 1, 2]), ("sum", [1, 2, 0])):
            moe = config(4, fill_order="batch_prioritized", priority=priority, **gates)
            assert route(moe, np.log(p_TE)).token_N[:3].tolist() == wanted


# Groups of experts


def numpy_grouped(logits_TE, moe, bias_E):
    """Experts and gates, group by group, of DeepSeek-V2 (softmax, best score) and V3 (sigmoid, best K/M scores)."""
    size, expert_TK, gate_TK = moe.num_experts // moe.num_groups, [], []
    for logits in logits_TE.astype(np.float64):
        s = numpy_softmax(logits) if moe.score == "softmax" else 1 / (1 + np.exp(-logits))
        rank = s + bias_E
        groups = [np.sort(rank[x * size:(x + 1) * size])[::-1] for x in range(moe.num_groups)]
        count = {"max": 1, "top_2_sum": 2, "top_sum": moe.experts_per_token // moe.groups_per_token}[moe.group_score]
        allowed = best([group[:count].sum() for group in groups], moe.groups_per_token)
        chosen = best([r if e // size in allowed else -np.inf for e, r in enumerate(rank)], moe.experts_per_token)
        gate = s[chosen] / s[chosen].sum() if moe.renormalize else s[chosen]
        expert_TK.append(chosen)
        gate_TK.append(moe.route_scale * gate)
    return np.array(expert_TK), np.array(gate_TK)


V2 = dict(num_experts=16, experts_per_token=4, num_groups=8, groups_per_token=3, route_scale=16.0)
V3 = dict(num_experts=16, experts_per_token=4, num_groups=4, groups_per_token=2, group_score="top_sum", score="sigmoid",
          renormalize=True, route_scale=2.5, bias_update_rate=0.001)


@pytest.mark.parametrize("options", [V2, V3, {**V3, "group_score": "max"}, {**V2, "group_score": "top_sum"},
                                     {**V3, "group_score": "top_2_sum", "experts_per_token": 2},
                                     {**V3, "group_score": "top_2_sum", "experts_per_token": 6}])
def test_deepseek_routers_equal_the_reference(options):
    moe, logits = config(**options), 2 * random_logits(60, 16)
    bias = np.random.default_rng(1).normal(size=16) if moe.bias_update_rate else np.zeros(16)
    routing = route(moe, logits, bias_E=bias)
    expert, gate = numpy_grouped(logits, moe, bias.astype(np.float32))
    np.testing.assert_array_equal(of_tokens(routing, moe), expert)
    np.testing.assert_allclose(of_tokens(routing, moe, "gate_N"), gate, rtol=1e-5)
    # §19.6: no more than M groups are touched; §19.7: the gates sum to the scale.
    touched = [len(set(row)) for row in expert // (16 // moe.num_groups)]
    assert max(touched) <= moe.groups_per_token and np.mean(expert != best_of_all(logits, moe, bias)) > 0.1
    if moe.renormalize:
        np.testing.assert_allclose(of_tokens(routing, moe, "gate_N").sum(1), 2.5, rtol=1e-5)
    reached = [sum(x in row for row in (expert // (16 // moe.num_groups)).tolist()) for x in range(moe.num_groups)]
    assert routing.statistics.reached_X.tolist() == reached


def best_of_all(logits, moe, bias):
    return numpy_grouped(logits, dataclasses.replace(moe, num_groups=1, groups_per_token=1), bias)[0]


@pytest.mark.parametrize("options", [V2, V3])
def test_all_groups_reproduce_plain_top_k(options):
    logits = random_logits(60, 16)
    everywhere = config(**{**options, "groups_per_token": options["num_groups"]})
    plain = config(**{**options, "num_groups": 1, "groups_per_token": 0, "group_score": "max"})
    for one, other in zip(*(jax.tree.leaves(dataclasses.replace(route(moe, logits), statistics=None))
                            for moe in (everywhere, plain))):
        np.testing.assert_array_equal(one, other)


def test_the_balance_probability_of_sigmoid_scores_is_their_share():
    logits = random_logits(10, 4)
    s = 1 / (1 + np.exp(-logits.astype(np.float64)))
    statistics = route(config(4, score="sigmoid"), logits).statistics
    np.testing.assert_allclose(statistics.probability_E, (s / s.sum(1, keepdims=True)).sum(0), rtol=1e-5)


def test_saturated_sigmoids_are_told_apart_by_their_logits():
    # sigmoid(40) and sigmoid(50) are both 1 in fp32.
    assert route(config(3, 1, score="sigmoid"), [[40.0, 50.0, 30.0]]).expert_N.tolist() == [1]


# Llama-4


@pytest.mark.parametrize("dispatch", ["reference", "einsum", "gather", "dropless"])
def test_llama_4_scales_the_input_of_its_one_expert_and_adds_the_shared_one(dispatch):
    run = tiny.config(moe_experts_per_token=1, moe_score="sigmoid", moe_gate_on="input", moe_num_shared_experts=1)
    module, x_BSD = MoELayer(run, nnx.Rngs(0)), np.random.default_rng(0).normal(size=(2, 6, 16)).astype(np.float32)
    graph, state = nnx.split(module)
    with jax.set_mesh(tiny.ONE):
        y, _ = jax.jit(lambda state, x: nnx.merge(graph, state)(
            x, jnp.ones((2, 6), bool), RoutingMode(dispatch, 4.0), jnp.zeros(4)))(state, x_BSD)
    weight = lambda parameter: np.asarray(parameter[...], np.float64)
    swiglu = lambda x, gate, up, down: (x @ gate / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down
    experts, shared = ([weight(getattr(part, f"w_{name}_{letters}")) for name, letters in names] for part, names in (
        (module.experts, (("gate", "EDF"), ("in", "EDF"), ("out", "EFD"))),
        (module.shared, (("gate", "DF"), ("in", "DF"), ("out", "FD")))))
    for index in np.ndindex(2, 6):
        x = x_BSD[index].astype(np.float64)
        logits = x @ weight(module.w_router_DE)
        e = logits.argmax()
        wanted = swiglu(x / (1 + np.exp(-logits[e])), *(w[e] for w in experts)) + swiglu(x, *shared)
        np.testing.assert_allclose(y[index], wanted, rtol=1e-4, atol=1e-5)


# Refusals


@pytest.mark.parametrize("options, words", [
    (dict(score="sigmoid", gate_order="top_k_then_softmax"), ["moe.score='sigmoid'", "softmax_then_top_k"]),
    (dict(load_weight=0.1), ["moe.load_weight=0.1", "moe.router_noise", "noisy_top_k"]),
    (dict(num_groups=3), ["moe.num_groups=3", "2, 4"]),
    (dict(num_groups=4), ["moe.num_groups=4", "no effect", "moe.groups_per_token"]),
    (dict(num_groups=2, groups_per_token=3), ["moe.groups_per_token=3", "moe.num_groups=2"]),
    (dict(num_groups=8, groups_per_token=1), ["moe.groups_per_token=1", "moe.experts_per_token=2"]),
    (dict(group_score="top_sum"), ["moe.group_score='top_sum'", "no effect"]),
    (dict(device_weight=0.1), ["moe.device_weight=0.1", "moe.num_groups"]),
    (dict(num_groups=2, device_weight=0.1, communication_weight=0.1), ["moe.communication_weight", "groups_per_token"]),
    (dict(second_threshold=0.5), ["moe.second_threshold=0.5", "second_policy"]),
    (dict(second_policy="none", experts_per_token=1), ["moe.second_policy='none'", "no effect"]),
    (dict(second_in_queue=True), ["moe.second_in_queue=True", "second_policy"]),
    (dict(second_policy="random", second_in_queue=True, dispatch="dropless", eval_dispatch="gather"),
     ["moe.second_in_queue=True", "no effect"]),
    (dict(priority="sum"), ["moe.priority='sum'", "batch_prioritized"]),
    (dict(router="noisy_top_k", router_noise=1.0), ["moe.router_noise=1.0", "'top_k'"]),
    (dict(router="expert_choice", balance_weight=0.0, score="sigmoid"), ["moe.score='sigmoid'", "'expert_choice'"]),
    (dict(bias_centered=True), ["moe.bias_centered=True", "moe.bias_update_rate"]),
    (dict(bias_update="magnitude"), ["moe.bias_update='magnitude'", "moe.bias_update_rate"]),
])
def test_options_without_effect_are_refused(options, words):
    with pytest.raises(ConfigError) as error:
        config(**options)
    assert all(word in str(error.value) for word in words), str(error.value)


# Eight devices


def test_b09_noise_random_second_choices_and_their_losses_do_not_depend_on_the_mesh():
    run = tiny.config(moe_router="noisy_top_k", moe_gate_order="top_k_then_softmax", moe_second_policy="random",
                      moe_importance_weight=0.1, moe_load_weight=0.1, moe_dispatch="dropless")
    with jax.set_mesh(tiny.ONE):
        params = jax.device_get(initial_params(run, tiny.VOCAB, jax.random.key(0)))
    batch = tiny.batch(lengths=[16, 16, 9, 4, 16, 16, 1, 12])
    one, eight = (tiny.grads(run, params, batch, mesh=mesh) for mesh in (tiny.ONE, tiny.mesh(data=2, expert=4)))
    assert one[1]["routing"]["counts_LE"].sum() < 2 * 2 * batch["valid"].sum()  # some second choices are not taken
    tiny.assert_close(eight[1], one[1], rtol=1e-4, atol=1e-5)
    tiny.assert_close(eight[0], one[0], rtol=1e-3, atol=1e-5)
    noise = [leaf for name, leaf in tiny.leaves(one[0]).items() if name.endswith("w_router_noise_DE")]
    assert noise and np.abs(noise[0]).max() > 0
