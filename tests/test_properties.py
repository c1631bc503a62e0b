"""What every router promises, tried on all of ``tests/every_router.py``: it knows nothing of later tokens or says so, padding
is invisible, tokens are treated alike, ties and NaN are decided by the rule, choices carry no gradient, nobody is lost.

The reference is NumPy in fp64, one token at a time. Shapes: ``tests/every_router.py``.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from every_router import (
    D, E, FEW, G, LEARNED, OUTPUTS, T, VARIANTS, awkward, kept_of, lists_of, moved, noisy_logits, numpy_choice, numpy_gates,
    numpy_scores, problem, pulled, routed, with_previous)
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from test_dispatch import WITH_BUFFERS, run
from test_dispatch import problem as experts_problem
from test_routing import numpy_expert_choice

from moe_jax.config import Config, ConfigError, DataConfig, ModelConfig
from moe_jax.dispatch import DISPATCHERS
from moe_jax.nn.moe import MoELayer, RoutingMode
from moe_jax.routing import ROUTERS, check_router, has_fixed_choices

seeds = st.integers(0, 10**6)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with jax.set_mesh(tiny.ONE):
        yield


# The table


def test_every_router_is_in_the_table_and_so_are_its_options():
    assert {variant.router for variant in VARIANTS.values()} == set(ROUTERS)
    for name, router in ROUTERS.items():
        used = {option for variant in VARIANTS.values() if variant.router == name for option in variant.options}
        assert set(router.options) - used <= UNTRIED.get(name, set()), f"options of {name} that no variant sets"


# Options without a variant here, because they are another router's too or change no property that is tried.
OF_TOP_K = {"score", "route_scale", "second_policy", "second_threshold", "second_in_queue", "num_groups", "groups_per_token",
            "group_score", "priority", "padding", "device_weight", "communication_weight"}
# tests/test_device_drop.py, tests/test_checkpoint_routing.py, tests/test_config.py
IN_THE_LAYER = {"device_capacity_factor", "renormalize_after_drops", "allow_untrained_router"}
OF_PLANS = {"transport_tolerance", "transport_iterations", "transport_rate", "transport_gate", "transport_plan",
            "importance_weight"}  # tests/test_transport.py, tests/test_semi_dual.py
UNTRIED = {
    "top_k": IN_THE_LAYER,
    "noisy_top_k": OF_TOP_K | IN_THE_LAYER,
    "hash": {"hash_seed", "hash_table"},  # tests/test_hashing.py
    "sinkhorn": OF_PLANS, "s_base": OF_PLANS, "base": OF_PLANS, "transport_top_k": OF_PLANS,
    "transport_expert_choice": OF_PLANS,
    "reinforce": {"policy_weight", "policy_entropy_weight", "policy_baseline", "policy_baseline_weight",
                  "policy_baseline_decay"},  # of its losses: tests/test_policy.py
    "expert_choice": {"cap_entropy", "transport_iterations"},  # tests/test_expert_choice.py
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_can_be_configured_and_is_refused_by_a_decoder_if_it_looks_ahead(name):
    variant = VARIANTS[name]
    # GShard's queue has no meaning without buffers.
    for dispatch in ("gather",) if variant.moe.second_in_queue else ("gather", "dropless"):
        run_config = variant.config(dispatch=dispatch, eval_dispatch=dispatch)
        if ROUTERS[run_config.moe.router].is_causal(run_config.moe):
            variant.config(dispatch=dispatch, eval_dispatch=dispatch, allow_noncausal_routing=False)
        else:
            with pytest.raises(ConfigError, match="moe.allow_noncausal_routing=True"):
                variant.config(dispatch=dispatch, eval_dispatch=dispatch, allow_noncausal_routing=False)
            # One position of many sequences is a group in which nobody comes later.
            variant.config(dispatch=dispatch, eval_dispatch=dispatch, allow_noncausal_routing=False, group_over="batch")


# Through the dispatchers


@functools.lru_cache(maxsize=1)
def weights():
    return experts_problem(G, T, E)[1:]


def outputs(name, dispatch, capacity, training, arrays, order=slice(None)):
    """(y_GTD, gradient of Σ y · fixed by x and by the expert weights, kept_GN, Routing) of the router's list; what y is
    multiplied with stands in ``order``, as the tokens do."""
    routing = routed(name, training, arrays)
    lists = lists_of(routing, VARIANTS[name].moe.gate_on)
    if dispatch not in WITH_BUFFERS:  # as the layer does: where there are no buffers there are no queues
        lists = dataclasses.replace(lists, expert_GN=np.minimum(lists.expert_GN, E))
    expert_weights, dy = weights()
    y, kept, dx, _, dw = run(dispatch, E, capacity, lists, arrays["x"], expert_weights, dy[:, order])
    return y, (dx, dw), kept, routing


def buffers(name):
    """One slot, and as many as the router wants at a factor of 1/2; only the router's own number where it leaves no choice."""
    variant = VARIANTS[name]
    own = variant.slots(0.5)
    return (own,) if variant.router == "all" or variant.chooses == "experts" else (1, own)


# Later tokens


def changed_later(variant, arrays, now, seed):
    """The same tokens up to ``now``, others after it, some of them padding."""
    other, late_T = problem(variant, seed + 1), np.arange(T) > now
    found = dict(arrays)
    for key in (*LEARNED, "ids", "x", "replay", "valid"):
        mine, theirs = arrays[key], 4 * other[key] if key == "logits" else other[key]
        if key == "valid":
            theirs = np.random.default_rng(seed).random(mine.shape) < 0.8
        late = late_T.reshape(1, T, *(1 for _ in mine.shape[2:]))
        found[key] = np.where(late, theirs, mine)
    return with_previous(found)


def earlier_outputs_change(name, dispatch, capacity, training, seed, now):
    """Largest change of an output at a place up to ``now``; 0.0 means not a bit."""
    variant, arrays = VARIANTS[name], problem(VARIANTS[name], seed)
    before, after = (outputs(name, dispatch, capacity, training, given)[0] for given in (
        arrays, changed_later(variant, arrays, now, seed)))
    if dispatch == "dropless":
        assert not np.array_equal(before[:, now + 1:], after[:, now + 1:])  # the change is one
    return float(np.abs(before[:, :now + 1] - after[:, :now + 1]).max())


DECLARED = [(name, dispatch, training) for name in VARIANTS for dispatch in ("gather", "dropless")
            for training in VARIANTS[name].modes]
CAUSAL = [case for case in DECLARED if VARIANTS[case[0]].is_causal(*case[1:])]


@pytest.mark.parametrize("name, dispatch, training", CAUSAL)
@given(seed=seeds, now=st.integers(0, T - 2))
@FEW
def test_b52_b53_what_is_declared_causal_lets_no_later_token_change_a_bit_of_an_earlier_output(
        name, dispatch, training, seed, now):
    for capacity in buffers(name) if dispatch == "gather" else (1,):
        assert earlier_outputs_change(name, dispatch, capacity, training, seed, now) == 0.0


@pytest.mark.parametrize("name, dispatch, training", [case for case in DECLARED if case not in CAUSAL])
def test_b52_b53_what_is_declared_to_look_ahead_does(name, dispatch, training):
    capacity = buffers(name)[0]
    assert max(earlier_outputs_change(name, dispatch, capacity, training, seed, 7) for seed in range(5)) > 1e-2


# Padding


def on_valid(place_P, value_GTX):
    """The rows of the tokens that were moved to ``place_P``, in their old order."""
    order = [int(np.flatnonzero(place_P == t)[0]) for t in range(place_P.max() + 1)]
    return np.take(value_GTX, order, axis=1)


def places(kind, count, seed):
    """Where ``count`` tokens stand among T places: 'right' has the padding behind them."""
    place_P = np.full(T, -1)
    where = {"right": np.arange(count), "left": np.arange(T - count, T),
             "scattered": np.sort(np.random.default_rng(seed).permutation(T)[:count])}[kind]
    place_P[where] = np.arange(count)
    return place_P


# With `takes_slots` padding is meant to be seen (flaxformer's scatter router).
PADDED = [name for name in VARIANTS if VARIANTS[name].moe.padding != "takes_slots"]


@pytest.mark.parametrize("name", PADDED)
@given(kind=st.sampled_from(["left", "scattered"]), count=st.integers(3, T - 1), seed=seeds)
@FEW
def test_b41_padding_anywhere_and_whatever_it_holds_changes_no_output_no_gradient_and_no_statistic(name, kind, count, seed):
    variant = VARIANTS[name]
    capacity, training = buffers(name)[-1], variant.moves
    arrays, found = problem(variant, seed), []
    for place_P in (places("right", count, seed), places(kind, count, seed)):
        given_arrays = moved(arrays, place_P)
        given_arrays["x"] = np.nan_to_num(given_arrays["x"], nan=3.0)
        y, (dx, _), kept, routing = outputs(name, "gather", capacity, training, given_arrays)
        went = [sorted((int(place_P[t]), int(e), bool(k)) for t, e, k in zip(*row) if e < E)
                for row in zip(routing.token_N, routing.expert_N, kept)]
        assert all(token >= 0 for row in went for token, _, _ in row)  # padding goes nowhere
        assert (y[:, place_P < 0] == 0).all() and (dx[:, place_P < 0] == 0).all()
        found.append((on_valid(place_P, y), went, routing.statistics))
    (y, went, statistics), (other_y, other_went, other_statistics) = found
    assert other_went == went
    np.testing.assert_allclose(other_y, y, rtol=1e-5, atol=1e-5)
    tiny.assert_close(vars(other_statistics), vars(statistics), rtol=1e-5, atol=1e-5)


# Experts take a share of the *places* of a group, so a longer group has more to give.
SHORTER = [name for name in PADDED if VARIANTS[name].chooses != "experts" and VARIANTS[name].moe.padding == "nowhere"
           and not VARIANTS[name].plans_always]


@pytest.mark.parametrize("name", SHORTER)
def test_b19_b41_the_statistics_are_sums_over_valid_tokens(name):
    """They double when every token stands there twice as often as before, and padding fills the rest."""
    variant, training = VARIANTS[name], len(VARIANTS[name].modes) == 1
    arrays = problem(variant, 3)
    once = routed(name, training, moved(arrays, places("right", 6, 0))).statistics
    twice_P = np.concatenate([np.arange(6), np.arange(6), np.full(T - 12, -1)])
    twice = routed(name, training, moved(arrays, twice_P)).statistics
    for field, value in vars(once).items():
        factor = 1 if field == "logit_max" else 2
        if variant.by_place and field == "choices_E":
            continue
        np.testing.assert_allclose(getattr(twice, field), factor * value, rtol=1e-5, err_msg=field)


# Order


@pytest.mark.parametrize("name", [name for name in VARIANTS if not VARIANTS[name].by_place])
@given(seed=seeds)
@FEW
def test_b28_permuting_tokens_permutes_outputs_when_nobody_is_dropped(name, seed):
    variant = VARIANTS[name]
    arrays, order = problem(variant, seed), np.random.default_rng(seed).permutation(T)
    training = variant.moves
    y, (dx, dw), _, routing = outputs(name, "dropless", 1, training, arrays)
    other_y, (other_dx, other_dw), _, other = outputs(name, "dropless", 1, training, moved(arrays, order), order)
    np.testing.assert_allclose(other_y, y[:, order], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other_dx, dx[:, order], rtol=1e-4, atol=1e-5)
    tiny.assert_close(other_dw, dw, rtol=1e-4, atol=1e-4)
    tiny.assert_close(vars(other.statistics), vars(routing.statistics), rtol=1e-5, atol=1e-5)


# Experts in another order


def gates_of_experts(name, training, arrays):
    """Σ of the gates of each token's choices of each expert, [G, T, E]."""
    routing, gate_GTE = routed(name, training, arrays), np.zeros((G, T, E + 1))
    index_G1 = np.arange(G)[:, None]
    np.add.at(gate_GTE, (index_G1, routing.token_N, np.minimum(routing.expert_N, E)), routing.gate_N)
    return gate_GTE[:, :, :E]


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.moe.padding != "takes_slots"
                                  and variant.chooses != "draw"])
def test_experts_given_other_numbers_get_the_same_tokens_unless_their_number_has_a_meaning(name):
    variant, arrays = VARIANTS[name], problem(VARIANTS[name], 3)
    reversed_arrays = {key: value[..., ::-1] if key in (*LEARNED, "noise", "group_noise", "bias") else value
                       for key, value in arrays.items()}
    for training in variant.modes:
        gate_GTE = gates_of_experts(name, training, arrays)
        same = np.allclose(gates_of_experts(name, training, reversed_arrays), gate_GTE[:, :, ::-1], rtol=1e-4, atol=1e-5)
        assert same != ROUTERS[variant.router].by_number


def test_a_router_that_deals_by_place_is_not_equivariant():
    for name in ("balanced",):
        assert VARIANTS[name].by_place
        arrays = problem(VARIANTS[name], 0)
        y, other = (outputs(name, "dropless", 1, True, given)[0] for given in (arrays, moved(arrays, np.arange(T)[::-1])))
        assert np.abs(other[:, ::-1] - y).max() > 0.1


@pytest.mark.parametrize("name", VARIANTS)
@given(seed=seeds)
@FEW
def test_b43_a_group_is_routed_as_if_alone(name, seed):
    """Other groups beside it, in another order: not a bit changes, nor does it the second time."""
    order = np.random.default_rng(seed).permutation(G)
    arrays = problem(VARIANTS[name], seed)
    routing, again = routed(name, True, arrays), routed(name, True, arrays)
    shuffled = routed(name, True, {key: value[order] for key, value in arrays.items()})
    for field in ("token_N", "expert_N", "gate_N"):
        np.testing.assert_array_equal(getattr(again, field), getattr(routing, field), err_msg=field)
        np.testing.assert_array_equal(getattr(shuffled, field), getattr(routing, field)[order], err_msg=field)


# Choices and gates against the reference


def by_token(routing, values):
    """[G][T] lists of what stands at a token's assignments, in the order of the list."""
    found = [[[] for _ in range(T)] for _ in range(G)]
    for g in range(G):
        for t, value in zip(routing.token_N[g], values[g]):
            found[g][int(t)].append(value)
    return found


def by_own_logits(variant, training):
    return variant.chooses == "logits" or variant.chooses in ("plan", "draw") and not training and not variant.plans_always


def chosen_experts(name, training, arrays, routing):
    """[G][T] the experts whose scores make a token's gates: all choices, made or not."""
    variant = VARIANTS[name]
    if not by_own_logits(variant, training):
        return [[[int(e) for e in experts if e < E] for experts in group] for group in by_token(routing, routing.expert_N)]
    logits = noisy_logits(variant, training)(arrays)
    return [[numpy_choice(variant, logits[g, t], arrays["bias"][g]) for t in range(T)] for g in range(G)]


def check_choices(name, training, arrays, routing, chosen):
    variant, valid = VARIANTS[name], arrays["valid"]
    made = by_token(routing, routing.expert_N)
    for g, t in np.ndindex(G, T):
        wanted = chosen[g][t] if valid[g, t] else [E] * len(made[g][t])
        if not valid[g, t] and variant.moe.padding == "takes_slots":
            wanted = list(range(variant.moe.experts_per_token))
        found = [int(e) for e in made[g][t]]
        if variant.moe.second_policy != "all" and valid[g, t]:
            assert found[0] == wanted[0] and all(e in (w, E, E + 1 + w) for e, w in zip(found, wanted))
        else:
            assert found == wanted, (g, t)


@pytest.mark.parametrize("name", [name for name in VARIANTS if by_own_logits(VARIANTS[name], False)])
def test_the_choice_is_that_of_the_fp64_router_ties_and_all(name):
    arrays = awkward(VARIANTS[name])
    for training in VARIANTS[name].modes if VARIANTS[name].chooses == "logits" else (False,):
        routing = routed(name, training, arrays)
        check_choices(name, training, arrays, routing, chosen_experts(name, training, arrays, routing))


@pytest.mark.parametrize("name", ["expert choice"])
def test_experts_choose_as_in_fp64_ties_to_the_lowest_token(name):
    arrays = awkward(VARIANTS[name])
    routing, capacity = routed(name, True, arrays), VARIANTS[name].slots(1.0)
    for g in range(G):
        logits = np.where(arrays["valid"][g][:, None], arrays["logits"][g], 0.0)
        wanted = numpy_expert_choice(logits, capacity, arrays["valid"][g])
        for e in range(E):
            assert [int(t) for t in routing.token_N[g][routing.expert_N[g] == e]] == [t for t, _ in wanted[e]]


@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn, two experts", "s_base", "entropic plan", "quadratic plan"])
def test_ties_of_a_plan_go_to_the_lowest_experts(name):
    routing = routed(name, True, awkward(VARIANTS[name]))
    assert by_token(routing, routing.expert_N)[4] == [list(range(VARIANTS[name].moe.experts_per_token))] * T


# Gradients


def gate_values(name, routing, chosen, logits):
    """[G, N] fp64 gates of the list with the choices held fixed."""
    variant, gate_N = VARIANTS[name], np.zeros(routing.gate_N.shape)
    for g in range(G):
        gates = {}
        for i, (t, e) in enumerate(zip(routing.token_N[g], routing.expert_N[g])):
            if e >= E:
                continue
            if t not in gates:
                experts = chosen[g][t]
                gates[t] = dict(zip(experts, numpy_gates(variant, logits[g, t], np.array(experts))))
            gate_N[g, i] = gates[t].get(int(e), 0.0)
    return gate_N


# Where the plan is the gate a gradient is meant to flow through it: tests/test_semi_dual.py.
WITH_FORMULA = [name for name in VARIANTS if VARIANTS[name].moe.transport_gate == "softmax"]


@pytest.mark.parametrize("name", WITH_FORMULA)
def test_b29_gates_and_their_gradient_are_those_of_the_formula_with_the_choice_held_fixed(name):
    """Central differences in fp64, every choice fixed as the forward pass made it. The package's gradient makes each choice
    anew (``jax.checkpoint``), so a tie decided otherwise, a plan or a bias with a gradient would show."""
    variant, arrays = VARIANTS[name], awkward(VARIANTS[name])
    for training in variant.modes:
        routing = routed(name, training, arrays)
        chosen = chosen_experts(name, training, arrays, routing)
        logits = np.where(arrays["valid"][..., None], noisy_logits(variant, training)(arrays), 0.0)
        gates = gate_values(name, routing, chosen, logits)
        if variant.moe.padding == "takes_slots":
            gates *= np.take_along_axis(arrays["valid"], routing.token_N, axis=1)
        assert np.isfinite(routing.gate_N).all()
        np.testing.assert_allclose(routing.gate_N, gates, rtol=1e-4, atol=1e-6)
        cotangent = np.random.default_rng(0).normal(size=gates.shape)
        found = pulled(name, training, arrays, gate_N=cotangent)[2]
        slope, step = np.zeros(logits.shape), 1e-5
        for e in range(logits.shape[-1]):
            up, down = (gate_values(name, routing, chosen, logits + sign * step * np.eye(logits.shape[-1])[e])
                        for sign in (1, -1))
            for g in range(G):
                np.add.at(slope[g, :, e], routing.token_N[g], (up - down)[g] / (2 * step) * cotangent[g])
        slope[~arrays["valid"]] = 0.0
        assert (np.abs(slope).max() > 1e-2) == (variant.router != "hash")
        assert (found["bias"] == 0).all()
        noisy = training and ROUTERS[variant.router].learned_noise
        for prefix, part in (("", slice(0, E)), ("group_", slice(E, None))):
            if part.start and not variant.two_levels:
                assert (found["group_logits"] == 0).all() and (found["group_noise_logits"] == 0).all()
                continue
            np.testing.assert_allclose(found[prefix + "logits"], slope[..., part], rtol=1e-3, atol=1e-4)
            noise = arrays[prefix + "noise"] / (1 + np.exp(-arrays[prefix + "noise_logits"].astype(np.float64)))
            np.testing.assert_allclose(found[prefix + "noise_logits"], slope[..., part] * noise * noisy, rtol=1e-3, atol=1e-4)


# Statistics that carry a gradient; the others are counts, or only reported.
CARRY = ("probability_E", "logsumexp_squared", "importance_E", "load_E", "group_load_X")


@pytest.mark.parametrize("name", VARIANTS)
def test_counts_carry_no_gradient_and_probabilities_and_logsumexp_do(name):
    variant, arrays = VARIANTS[name], awkward(VARIANTS[name])
    training, valid = variant.modes[0], arrays["valid"]
    rng, (values, _, _) = np.random.default_rng(1), pulled(name, variant.modes[0], arrays)
    cotangent = {field: rng.normal(size=values[field].shape) for field in OUTPUTS}
    gradient = lambda *fields: pulled(name, training, arrays, **{field: cotangent[field] for field in fields})[2]
    for learned, found in gradient(*(field for field in OUTPUTS if field not in ("gate_N", *CARRY))).items():
        assert (found == 0).all(), learned
    if variant.router == "hash":
        return  # nothing is learned: what stands in for logits is the choice itself

    noisy, clean = (np.where(valid[..., None], noisy_logits(variant, noise)(arrays), 0.0) for noise in (training, False))

    def probability(logits):
        score = np.apply_along_axis(lambda row: numpy_scores(variant, row), -1, logits)
        if variant.router in ("sinkhorn", "base"):  # the balancing losses of a sigmoid gate see the softmax all the same
            score = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        return np.where(valid[..., None], score / score.sum(-1, keepdims=True), 0.0)

    def logsumexp(logits):
        if variant.two_levels:
            logits = logits[..., :E] + np.repeat(logits[..., E:], E // (logits.shape[-1] - E), axis=-1)
        counted = valid | (variant.moe.padding != "nowhere")
        return np.where(counted, np.log(np.exp(logits).sum(-1)) ** 2, 0.0)

    for field, function, at in (("probability_E", probability, noisy), ("logsumexp_squared", logsumexp, clean)):
        np.testing.assert_allclose(values[field], function(at).sum(1), rtol=1e-4, err_msg=field)
        found, weight = gradient(field), cotangent[field].astype(np.float32)[:, None]
        found = np.concatenate([found["logits"], found["group_logits"]], -1)[..., :at.shape[-1]]
        assert np.abs(found).max() > 1e-2
        for e in range(at.shape[-1]):
            step = 1e-5 * np.eye(at.shape[-1])[e]
            slope = (function(at + step) - function(at - step)) / 2e-5 * weight
            slope = np.where(valid, slope.sum(-1) if slope.ndim == 3 else slope, 0.0)
            np.testing.assert_allclose(found[..., e], slope, rtol=1e-3, atol=2e-4, err_msg=field)
    noise = training and (ROUTERS[variant.router].learned_noise or variant.moe.router_noise > 0)
    assert np.abs(gradient("importance_E")["logits"]).max() > 1e-3
    # Two experts of a group of two are always both kept: a load without a gradient.
    assert (np.abs(gradient("load_E")["logits"]).max() > 1e-3) == (noise and not variant.two_levels)
    assert (np.abs(gradient("group_load_X")["group_logits"]).max() > 1e-3) == (noise and variant.two_levels)


# Nobody is lost, nothing is infinite


@pytest.mark.parametrize("name", VARIANTS)
@given(seed=seeds, share=st.floats(0.0, 1.0))
@FEW
def test_b40_dispatched_plus_dropped_is_k_times_the_valid_tokens(name, seed, share):
    variant, arrays = VARIANTS[name], problem(VARIANTS[name], seed)
    arrays["valid"] = np.random.default_rng(seed).random((G, T)) < share
    for training in variant.modes:
        routing = routed(name, training, arrays)
        tokens, listed = arrays["valid"].sum(1), routing.expert_N < E
        if variant.chooses == "experts":
            np.testing.assert_array_equal(listed.sum(1), E * np.minimum(tokens, listed.shape[1] // E))
        elif has_fixed_choices(variant.moe) and variant.router != "replay":
            np.testing.assert_array_equal(listed.sum(1), variant.moe.experts_per_token * tokens)
        np.testing.assert_array_equal(routing.statistics.choices_E.sum(1), listed.sum(1))
        assert np.isfinite(routing.gate_N).all()
        for capacity in (1, 4, T):
            kept = kept_of(lists_of(routing), capacity)
            dropped = listed & ~kept
            assert (kept <= listed).all()
            np.testing.assert_array_equal(kept.sum(1) + dropped.sum(1), listed.sum(1))
            loads = np.array([np.bincount(experts[k], minlength=E) for experts, k in zip(routing.expert_N, kept)])
            filled = np.minimum(routing.statistics.choices_E, capacity)
            assert (loads <= filled).all() if variant.moe.second_in_queue else (loads == filled).all()


@pytest.mark.parametrize("dispatch", DISPATCHERS)
@pytest.mark.parametrize("name", ["plain", "gshard", "v_moe", "expert choice"])
def test_b40_every_dispatcher_reports_who_it_computed(name, dispatch):
    arrays = awkward(VARIANTS[name])
    _, _, kept, routing = outputs(name, dispatch, 4, True, {**arrays, "x": np.nan_to_num(arrays["x"])})
    lists = lists_of(routing)
    np.testing.assert_array_equal(kept, kept_of(lists, 4) if dispatch in WITH_BUFFERS else lists.expert_GN < E)


@pytest.mark.parametrize("name", VARIANTS)
@given(seed=seeds)
@FEW
def test_b35_a_nan_logit_never_wins_and_no_gate_is_nan(name, seed):
    variant, arrays = VARIANTS[name], problem(VARIANTS[name], seed)
    rng = np.random.default_rng(seed)
    # One or two in every other row, its favourite among them.
    nan = np.zeros((G, T, E), bool)
    np.put_along_axis(nan, np.argmax(arrays["logits"], -1)[..., None], True, -1)
    np.put_along_axis(nan, rng.integers(0, E, (G, T, 1)), True, -1)
    nan[:, ::2] = False
    arrays["logits"] = np.where(nan, np.nan, arrays["logits"])
    for training in variant.modes:
        routing = routed(name, training, arrays)
        assert np.isfinite(routing.gate_N).all()
        # BASE's experts must all get equally many tokens; a group of two of which two are kept has nobody else.
        avoidable = variant.chooses != "fixed" and variant.router != "hierarchical" and not (variant.router == "base" and training)
        if avoidable and variant.moe.experts_per_token < E:
            for g in range(G):
                listed = routing.expert_N[g] < E
                assert not nan[g, routing.token_N[g][listed], routing.expert_N[g][listed]].any()
        # The losses see it, so that a step with it is refused.
        assert variant.router == "hash" or np.isnan(routing.statistics.logsumexp_squared).all()


# fp32


NEAR = 1e-3  # how far the router's columns differ; bf16 has steps of 2^-8 near 1


@functools.lru_cache(maxsize=None)
def layer(name):
    """A jitted MoE layer in bf16 on x_BSD; one sequence is a group."""
    variant = VARIANTS[name]
    config = Config(ModelConfig(num_layers=1, d_model=D, d_ff=8, num_heads=1, num_kv_heads=1, head_dim=D, dtype="bfloat16"),
                    dataclasses.replace(variant.moe, every=1, d_ff=4, allow_noncausal_routing=True),
                    DataConfig(batch_size=G, sequence_length=T))
    check_router(config.moe)
    module = MoELayer(config, nnx.Rngs(0))
    graph, state = nnx.split(module)
    state = state.to_pure_dict()

    def apply(router_DE, x_BSD, bias_E):
        state["w_router_DE"] = router_DE
        y_BSD, statistics = nnx.merge(graph, state)(x_BSD, jnp.ones(x_BSD.shape[:2], bool), RoutingMode("reference", 1.0, record=True), bias_E)
        return y_BSD, statistics.routing_G

    return jax.jit(apply, compiler_options=tiny.QUICK)


# One variant of every way to choose by logits; the others differ in their gates.
@pytest.mark.parametrize("name", ["plain", "switch", "gshard", "v_moe", "deepseek v2", "deepseek v3", "shazeer", "reinforce",
                                  "sinkhorn", "base", "expert choice"])
def test_b26_under_bf16_compute_near_ties_are_decided_as_by_the_fp64_router(name):
    variant, rng = VARIANTS[name], np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(G, T, D)), jnp.bfloat16)
    router_DE = (rng.normal(size=(D, 1)) / 2 + NEAR * rng.normal(size=(D, E))).astype(np.float32)
    bias_E = (NEAR / 10 * rng.normal(size=E) if variant.moe.bias_update_rate else np.zeros(E)).astype(np.float32)
    y, routing = jax.device_get(layer(name)(router_DE, x, bias_E))
    assert y.dtype == jnp.bfloat16 and routing.gate_N.dtype == np.float32
    logits = np.asarray(x, np.float64) @ router_DE.astype(np.float64)
    rounded = np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float64)

    def choices(logits_TE):
        if variant.chooses == "experts":
            chosen = numpy_expert_choice(logits_TE, variant.slots(1.0), np.ones(T, bool))
            return [[token for token, _ in chosen[e]] for e in range(E)]
        return [numpy_choice(variant, row, bias_E) for row in logits_TE]

    found, wrong = by_token(routing, routing.expert_N), 0
    for g in range(G):
        if variant.chooses == "experts":
            found[g] = [routing.token_N[g][routing.expert_N[g] == e].tolist() for e in range(E)]
        wanted = choices(logits[g])
        for one, other, rough in zip(found[g], wanted, choices(rounded[g])):
            made = [w if f < E else E for f, w in zip(one, other)] if variant.moe.second_policy != "all" else other
            assert [int(value) for value in one] == made
            wrong += rough != other
    assert wrong > G * len(wanted) / 10  # in bf16 they would be other experts
