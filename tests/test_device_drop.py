"""Token dropping at device level (DeepSeek-V2): who is dropped, who never is, and what is counted.

Shapes: T tokens, E experts, X devices (groups of experts), N assignments.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from moe_jax.config import ConfigError, MoEConfig
from moe_jax.nn.moe import MoELayer, RoutingMode
from moe_jax.routing.assignment import Routing
from moe_jax.routing.limits import within_device_budget

DROPPING = dict(moe_num_experts=8, moe_num_groups=4, moe_device_capacity_factor=1.0, moe_dispatch="dropless",
                moe_allow_noncausal_routing=True)


def numpy_budget(token_N, expert_N, gate_N, exempt_T, devices, experts, budget):
    """The list without what is dropped: device by device, the highest gates first, exempt tokens before all others."""
    kept_N = np.array(expert_N)
    for device in range(devices):
        here = [i for i in range(len(expert_N)) if expert_N[i] // (experts // devices) == device]
        here.sort(key=lambda i: (not exempt_T[token_N[i]], -gate_N[i], i))
        for place, i in enumerate(here):
            if place >= budget and not exempt_T[token_N[i]]:
                kept_N[i] = experts
    return kept_N


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.1, 4.0])
def test_the_lowest_gates_of_each_device_go_until_it_is_within_its_budget(factor):
    rng, tokens, choices, experts, devices = np.random.default_rng(0), 40, 3, 8, 4
    moe = MoEConfig(num_experts=experts, experts_per_token=choices, num_groups=devices, device_capacity_factor=factor)
    valid_T, exempt_T = rng.random(tokens) > 0.2, rng.random(tokens) < 0.1
    token_N = np.repeat(np.arange(tokens), choices)
    # More to the first devices; some gates equal.
    expert_N = np.stack([rng.choice(experts, choices, replace=False, p=np.arange(8, 0, -1) / 36) for _ in range(tokens)])
    expert_N = np.where(valid_T[:, None], expert_N, experts).reshape(-1)
    gate_N = np.round(rng.random(tokens * choices), 1).astype(np.float32)
    routing = Routing(jnp.asarray(token_N), jnp.asarray(expert_N), jnp.asarray(gate_N), None, choices, "token_major")
    found = jax.jit(functools.partial(within_device_budget, moe=moe))(routing, jnp.asarray(valid_T), jnp.asarray(exempt_T))
    budget = -(-round(100 * factor) * choices * int(valid_T.sum()) // (100 * devices))  # in whole numbers, rounded up
    wanted_N = numpy_budget(token_N, expert_N, gate_N, exempt_T, devices, experts, budget)
    np.testing.assert_array_equal(found.expert_N, wanted_N)
    dropped_N = wanted_N != expert_N
    assert dropped_N.any() == (factor < 4) and not dropped_N[exempt_T[token_N]].any()
    np.testing.assert_array_equal(found.gate_N, np.where(dropped_N, 0, gate_N))
    assert found.order == "token_major" and found.choices_per_token == choices
    loads = np.bincount(wanted_N // 2, minlength=5)[:4]
    assert (loads <= np.maximum(budget, np.bincount(expert_N[exempt_T[token_N]] // 2, minlength=5)[:4])).all()


@functools.lru_cache(maxsize=None)
def made(config):
    with jax.set_mesh(tiny.ONE):
        graph, state = nnx.split(MoELayer(config, nnx.Rngs(params=0)))
    return graph, state.to_pure_dict()


@functools.lru_cache(maxsize=None)
def compiled(config, mode):
    graph, _ = made(config)
    return jax.jit(lambda params, x_BSD, valid_BS, undropped_BS: nnx.merge(graph, params)(
        x_BSD, valid_BS, mode, jnp.zeros(8), jax.random.key(0), undropped_BS=undropped_BS), compiler_options=tiny.QUICK)


def run(config, mode, undropped_B=(False,) * 4):
    x_BSD = np.random.default_rng(1).normal(size=(4, 12, 16)).astype(np.float32)
    valid = np.arange(12)[None, :] < np.array([[12], [7], [12], [12]])
    undropped = np.broadcast_to(np.array(undropped_B)[:, None], (4, 12))
    with jax.set_mesh(tiny.ONE):
        return jax.device_get(compiled(config, mode)(made(config)[1], x_BSD, valid, undropped))


@pytest.mark.parametrize("dispatch", ["dropless", "reference", "gather"])
def test_drops_are_visible_and_dispatched_plus_dropped_is_k_times_the_valid_tokens(dispatch):
    config = tiny.config(**DROPPING)
    mode = RoutingMode(dispatch, 8.0, record=True, noise=True)
    _, statistics = run(config, mode)
    choices, kept = statistics.router.choices_E.sum(), statistics.kept_GE.sum()
    assert choices == 2 * 43 and 0 < kept < choices
    np.testing.assert_array_equal(statistics.kept_GN.sum(), kept)
    # The record says where the dropped ones wanted to go.
    assert (statistics.routing_G.expert_N < 8).sum() == choices
    budget_G = np.ceil(2 * np.array([12, 7, 12, 12]) / 4)
    assert (statistics.kept_GE.reshape(4, 4, 2).sum(-1) <= budget_G[:, None]).all()


def test_a_dropped_choice_adds_nothing_and_the_others_what_they_did():
    config = tiny.config(**DROPPING)
    y_BSD, statistics = run(config, RoutingMode("dropless", 1.0, record=True, noise=True))
    routing, kept_GN = statistics.routing_G, statistics.kept_GN
    free_BSD = run(config, RoutingMode("dropless", 1.0))[0]
    for g in range(4):
        touched = np.unique(routing.token_N[g][(routing.expert_N[g] < 8) & ~kept_GN[g]])
        rest = np.setdiff1d(np.arange(12), touched)
        np.testing.assert_allclose(y_BSD[g][rest], free_BSD[g][rest], rtol=1e-5, atol=1e-6)
        assert all(np.abs(y_BSD[g][t] - free_BSD[g][t]).max() > 1e-4 for t in touched)
        both = [t for t in touched if not kept_GN[g][routing.token_N[g] == t].any()]
        assert (y_BSD[g][both] == 0).all()


def test_exempt_sequences_and_evaluation_lose_nothing():
    config = tiny.config(**DROPPING)
    _, statistics = run(config, RoutingMode("dropless", 1.0, noise=True), (True, False, False, True))
    lost_G = statistics.router.choices_E.sum(1) - statistics.kept_GE.sum(1)
    assert lost_G[0] == lost_G[3] == 0 and lost_G[2] > 0
    _, statistics = run(config, RoutingMode.evaluation(config))
    np.testing.assert_array_equal(statistics.kept_GE, statistics.router.choices_E)


def test_a_share_of_the_sequences_is_exempt_in_every_layer():
    batch = tiny.batch(rows=8)
    sums = {}
    for share in (0.0, 1.0):
        config = tiny.config(moe_undropped_sequences=share, **DROPPING)
        sums[share] = tiny.grads(config, tiny.params(config), batch)[1]["routing"]
    assert (sums[0.0]["kept_LE"].sum(1) < 2 * 128).all()
    np.testing.assert_array_equal(sums[1.0]["kept_LE"].sum(1), 2 * 128)
    from moe_jax.models.decoder import undropped
    config, mode = tiny.config(**DROPPING), RoutingMode.training(tiny.config(**DROPPING))
    with jax.set_mesh(tiny.ONE):
        valid_BS = jnp.arange(3)[None, :] < jnp.where(jnp.arange(4000) % 2 == 0, 3, 2)[:, None]
        draw = lambda seed: np.asarray(undropped(config, valid_BS, mode, jax.random.key(seed)))
        first, again, other = draw(0), draw(0), draw(1)
    np.testing.assert_array_equal(first, again)
    for key in jax.random.split(jax.random.key(0), config.model.num_layers):  # by a key that no layer has
        assert (first[:, 0] != (np.asarray(jax.random.uniform(key, (4000,))) < 0.1)).any()
    assert first[:, 0].mean() == pytest.approx(0.1, abs=0.02) and (first[:, 0] != other[:, 0]).any()
    np.testing.assert_array_equal(first[:, :2], np.repeat(first[:, :1], 2, axis=1))  # whole rows
    np.testing.assert_array_equal(first, first[:, :1] & np.asarray(valid_BS))  # and no padding


def test_b09_the_mesh_does_not_decide_who_is_dropped():
    config = tiny.config(model_num_layers=2, moe_undropped_sequences=0.5, **DROPPING)
    batch = tiny.batch(lengths=[16, 3, 16, 16, 9, 16, 16, 16])
    one, four = (tiny.grads(config, tiny.params(config), batch, mesh=mesh)
                 for mesh in (tiny.ONE, tiny.mesh(data=2, expert=2)))
    tiny.assert_close(four, one, rtol=1e-4, atol=1e-5)
    assert one[1]["routing"]["kept_LE"].sum() < one[1]["routing"]["counts_LE"].sum()


def test_b53_a_decoder_refuses_it_unless_asked_for_and_evaluation_is_causal():
    with pytest.raises(ConfigError, match="moe.device_capacity_factor=1.0.*gates of later tokens"):
        tiny.config(**{**DROPPING, "moe_allow_noncausal_routing": False})
    config = tiny.config(**DROPPING)
    assert not RoutingMode.training(config).is_causal(config) and RoutingMode.evaluation(config).is_causal(config)
    tiny.config(**{**DROPPING, "moe_allow_noncausal_routing": False, "moe_group_over": "batch"})  # no later tokens in it


@pytest.mark.parametrize("settings, words", [
    (dict(moe_device_capacity_factor=1.0), ["moe.device_capacity_factor=1.0", "moe.num_groups above 1"]),
    (dict(moe_undropped_sequences=0.2), ["moe.undropped_sequences=0.2", "moe.device_capacity_factor above 0"]),
    (dict(DROPPING, moe_undropped_sequences=1.5), ["moe.undropped_sequences=1.5"]),
    (dict(DROPPING, moe_router="expert_choice", moe_balance_weight=0.0), ["'expert_choice'"]),
])
def test_what_cannot_work_is_refused(settings, words):
    with pytest.raises(ConfigError) as error:
        tiny.config(**settings)
    assert all(word in str(error.value) for word in words), str(error.value)
