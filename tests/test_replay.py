"""Replaying recorded routes: identical routers change nothing, others keep the routes and their own gates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax.config import ConfigError, MoEConfig
from moe_jax.nn.groups import GroupLayout
from moe_jax.nn.moe import RoutingMode
from moe_jax.routing import ROUTERS, RouterInputs, check_router
from moe_jax.routing.assignment import token_choice_list
from moe_jax.routing.replay import choices_by_token, recorded_experts
from moe_jax.training.state import model_graph

GATES = {
    "softmax": dict(),
    "renormalized": dict(renormalize=True),
    "top_k_first": dict(gate_order="top_k_then_softmax"),
    "sigmoid": dict(score="sigmoid", renormalize=True, route_scale=2.5),
}


def inputs(logits, replayed=None, valid=None):
    valid = np.ones(len(logits), bool) if valid is None else valid
    replayed = None if replayed is None else jnp.asarray(replayed)
    return RouterInputs(jnp.asarray(logits, jnp.float32), jnp.asarray(valid), jnp.zeros(logits.shape[1]),
                        replay_expert_TK=replayed)


def route(name, moe, *arguments):
    return jax.device_get(jax.jit(lambda i: ROUTERS[name].route(i, moe))(inputs(*arguments)))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("order", ["token_major", "choice_major", "batch_prioritized"])
def test_a_router_that_replays_itself_changes_no_bit(gate, order):
    moe = MoEConfig(num_experts=5, experts_per_token=2, fill_order=order, **GATES[gate])
    logits, valid = draw(12, 5), np.arange(12) % 4 != 1
    recorded = route("top_k", moe, logits, None, valid)
    again = route("replay", moe, logits, np.asarray(choices_by_token(recorded)), valid)
    for name in ("token_N", "expert_N", "gate_N"):
        np.testing.assert_array_equal(getattr(again, name), getattr(recorded, name), err_msg=name)
    tiny.assert_equal(again.statistics.__dict__, recorded.statistics.__dict__)


def test_r3_gates_are_the_softmax_over_the_replayed_mask_of_the_live_logits():
    # Logits (0, ln 2, ln 3, 5) replayed on experts 2 and 0: 3/4 and 1/4, though expert 3 is the favourite.
    moe = MoEConfig(num_experts=4, experts_per_token=2, gate_order="top_k_then_softmax")
    logits = np.array([[0.0, np.log(2), np.log(3), 5.0]])
    routing = route("replay", moe, logits, [[2, 0]])
    assert routing.expert_N.tolist() == [2, 0]
    np.testing.assert_allclose(routing.gate_N, [0.75, 0.25], rtol=1e-6)


def test_a_choice_that_was_not_made_has_no_share():
    moe = MoEConfig(num_experts=4, experts_per_token=2, gate_order="top_k_then_softmax")
    routing = route("replay", moe, draw(3, 4), [[1, 4], [4, 4], [0, 2]])
    assert routing.gate_N[:4].tolist() == [1, 0, 0, 0] and routing.expert_N.tolist() == [1, 4, 4, 4, 0, 2]
    grad = jax.grad(lambda l: jnp.sum(ROUTERS["replay"].route(inputs(l, [[1, 4], [4, 4], [0, 2]]), moe).gate_N ** 2))
    assert np.isfinite(grad(draw(3, 4))).all()


@pytest.mark.parametrize("gate", ["softmax", "renormalized", "top_k_first"])
def test_gradients_reach_the_live_logits_through_the_gates(gate):
    moe = MoEConfig(num_experts=4, experts_per_token=2, **GATES[gate])
    replayed, weight, token = np.array([[3, 1], [0, 2], [2, 1]]), draw(3, 2, seed=1), np.arange(3)[:, None]
    found = jax.grad(lambda l: jnp.sum(ROUTERS["replay"].route(inputs(l, replayed), moe).gate_N * weight.reshape(-1)))(
        draw(3, 4))

    def direct(logits):
        chosen = (jax.nn.softmax(logits) if gate == "softmax" else logits)[token, replayed]
        return jnp.sum((chosen if gate == "softmax" else jax.nn.softmax(chosen)) * weight)

    np.testing.assert_allclose(found, jax.grad(direct)(jnp.asarray(draw(3, 4))), rtol=1e-4, atol=1e-6)
    assert np.abs(found).max() > 1e-2


@pytest.mark.parametrize("order", ["token_major", "choice_major", "batch_prioritized"])
def test_a_list_becomes_the_table_it_was_made_of(order):
    expert_TK = np.random.default_rng(0).integers(0, 5, (7, 3))
    routing = token_choice_list(jnp.asarray(expert_TK), jnp.asarray(draw(7, 3)), order, None)
    np.testing.assert_array_equal(choices_by_token(routing), expert_TK)


def test_expert_choice_cannot_be_replayed():
    moe = MoEConfig(num_experts=4, experts_per_token=1, router="expert_choice", balance_weight=0.0)
    with pytest.raises(ValueError, match="any number of times"):
        choices_by_token(route("expert_choice", moe, draw(8, 4)))


@pytest.mark.parametrize("options, words", [
    (dict(router="base", experts_per_token=1), "sigmoids"), (dict(router="sinkhorn", experts_per_token=1), "sigmoids"),
    (dict(router="transport_top_k", transport_gate="plan"), "entries of a plan")], ids=str)
def test_routes_are_not_replayed_with_gates_of_another_kind(options, words):
    with pytest.raises(ValueError, match=words):
        ROUTERS["replay"].route(inputs(draw(3, 4), [[0, 1]] * 3), MoEConfig(num_experts=4, **options))


@pytest.mark.parametrize("options", [
    dict(router="s_base", experts_per_token=1), dict(router="sinkhorn"), dict(router="transport_top_k"),
    dict(router="balanced"), dict(router="reinforce", experts_per_token=1), dict(router="all", experts_per_token=4)], ids=str)
def test_routers_with_the_gates_of_top_k_are_replayed_with_their_own(options):
    moe, logits = MoEConfig(num_experts=4, **options), draw(6, 4)
    recorded = ROUTERS[moe.router].route(inputs(logits), moe)
    again = ROUTERS["replay"].route(inputs(logits, np.asarray(choices_by_token(recorded))), moe)
    np.testing.assert_array_equal(again.expert_N, recorded.expert_N)
    np.testing.assert_allclose(again.gate_N, recorded.gate_N, rtol=1e-6)


def test_nothing_to_replay():
    with pytest.raises(ValueError, match="nothing to replay"):
        ROUTERS["replay"].route(inputs(draw(3, 4)), MoEConfig(num_experts=4))
    with pytest.raises(ConfigError, match="is chosen by the call"):
        check_router(MoEConfig(router="replay"))


# The whole model


@functools.lru_cache(maxsize=None)
def compiled(config, mode):
    from flax import nnx

    def call(params, batch, replay_LBSK):
        model = nnx.merge(model_graph(config, tiny.VOCAB), params)
        output = model(batch["input_ids"], batch["positions"], batch["segment_ids"], batch["valid"], mode,
                       replay_LBSK=replay_LBSK)
        recorded = None
        if mode.record:
            recorded = recorded_experts(output.statistics.routing_G, GroupLayout(*batch["valid"].shape, config))
        return output.logits_BSV, output.statistics.router.choices_E, recorded

    return jax.jit(call, compiler_options=tiny.QUICK)


def call(config, params, batch, mode, replay_LBSK=None, mesh=tiny.ONE):
    with jax.set_mesh(mesh):
        return jax.device_get(compiled(config, mode)(tiny.placed(params, mesh), tiny.put_batch(batch, mesh), replay_LBSK))


REPLAY = RoutingMode("dropless", 1.0, router="replay")


@pytest.mark.parametrize("settings", [
    dict(), dict(moe_group_size=8), dict(moe_group_over="batch", moe_fill_order="batch_prioritized"),
    dict(model_scan_layers=False)], ids=str)
def test_a_model_that_replays_itself_computes_the_same(settings):
    config, batch = tiny.config(**settings), tiny.batch(lengths=[16, 16, 9, 1, 16, 12, 16, 16])
    params = tiny.params(config)
    logits, counts, recorded = call(config, params, batch, RoutingMode("dropless", 1.0, record=True))
    assert recorded.shape == (2, 8, 16, 2) and recorded.dtype == np.int32
    assert (recorded[:, ~batch["valid"]] == 4).all() and (recorded[:, batch["valid"]] < 4).all()
    again, again_counts, _ = call(config, params, batch, REPLAY, recorded)
    np.testing.assert_array_equal(again[batch["valid"]], logits[batch["valid"]])
    np.testing.assert_array_equal(again_counts, counts)


def test_another_model_follows_the_recorded_routes_on_any_mesh():
    config, batch = tiny.config(), tiny.batch()
    params = tiny.params(config)
    other = jax.tree.map(lambda leaf: leaf + 0.1 * np.random.default_rng(0).normal(size=leaf.shape).astype(leaf.dtype), params)
    logits, counts, recorded = call(config, params, batch, RoutingMode("dropless", 1.0, record=True))
    _, free, _ = call(config, other, batch, RoutingMode("dropless", 1.0, record=True))
    moved, followed, _ = call(config, other, batch, REPLAY, recorded)
    assert not np.array_equal(free, counts)
    np.testing.assert_array_equal(followed, counts)
    assert not np.allclose(moved, logits)
    spread, spread_counts, _ = call(config, other, batch, REPLAY, recorded, tiny.mesh(data=2, expert=4))
    np.testing.assert_array_equal(spread_counts.sum(1), counts.sum(1))
    np.testing.assert_allclose(spread, moved, rtol=1e-3, atol=1e-4)
