"""Experts on several nodes: a token goes to each node once, however many of its experts are there.

For networks of two levels, fast inside a node and slow between nodes. The P devices of the axis ``expert`` are X nodes of
P/X devices, in this order. Every row takes two steps: first to the device of its own rank in the other node, together
with its choices there and their gates; then, inside the node, to the devices of its experts. On the way back the
node's experts are summed where the row came in, so that between nodes one row per token and node travels in either
direction. With routing limited to M nodes (DeepSeek-V3 §2.1.2, ``moe.groups_per_token``) these are at most M per token.
"""

import functools
import math
from typing import Any, Callable

import jax
import jax.numpy as jnp

from moe_jax.dispatch.expert_parallel import Exchange, Peers, expert_devices, in_rounds, through_exchange
from moe_jax.dispatch.permutation import by_token, inverse, places_to_tokens, tokens_to_places
from moe_jax.routing.assignment import Routing, assign_slots, assignments_per_expert
from moe_jax.sharding import varying_like


def through_nodes(x_TD: jax.Array, routing: Routing, weights: Any, num_experts: int,
                  compute: Callable[[jax.Array, Routing, Any], jax.Array], how: Exchange) -> jax.Array:
    """As :func:`moe_jax.dispatch.expert_parallel.through_exchange`, in two steps.

    Raises:
      ValueError: a list in which tokens have no fixed number of choices: they travel beside the token.
    """
    if routing.choices_per_token is None:
        raise ValueError(f"mesh.expert_nodes={how.nodes} needs a router that makes the same number of choices for every "
                         f"token.")
    tokens, nodes = x_TD.shape[0], how.nodes
    expert_TK = jnp.minimum(by_token(routing.expert_N, routing), num_experts)
    visits = visited_nodes(expert_TK, num_experts, nodes)
    slot_N, _ = assign_slots(visits.expert_N, nodes, tokens)
    # Small whole numbers are exact in fp32, so that choices and gates are one message; 0 is nowhere.
    message_TM = jnp.concatenate([(expert_TK + 1) % (num_experts + 1) + 0.0, by_token(routing.gate_N, routing)], axis=1)
    reached = min(routing.choices_per_token, how.nodes_per_token or nodes, nodes)
    rows = min(tokens, 8 * math.ceil(how.factor * reached * tokens / nodes / 8))
    one_round = functools.partial(_round, rows=rows, num_experts=num_experts, gate_on=routing.gate_on, compute=compute,
                                  how=how)
    fullest = jnp.max(assignments_per_expert(visits.expert_N, nodes))
    return in_rounds(one_round, rows, tokens, fullest, x_TD, message_TM, visits, slot_N, weights)


def visited_nodes(expert_TK: jax.Array, num_experts: int, nodes: int) -> Routing:
    """Which nodes each token goes to, as a list: every node with an expert of its choice once, its own too.

    A token has min(K, X) places in the list; X is nowhere.
    """
    tokens, choices = expert_TK.shape
    node_TK = expert_TK // (num_experts // nodes)
    node_X = jnp.arange(nodes, dtype=jnp.int32)
    reached_TX = jnp.any(node_TK[:, :, None] == node_X[None, None, :], axis=1)
    place_TX = jnp.where(reached_TX, jnp.cumsum(reached_TX, axis=1) - 1, nodes)
    at_TMX = place_TX[:, None, :] == jnp.arange(min(choices, nodes))[None, :, None]
    node_TM = jnp.min(jnp.where(at_TMX, node_X[None, None, :], nodes), axis=2)
    token_TM = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32)[:, None], node_TM.shape)
    node_N, token_N = node_TM.reshape(-1), varying_like(token_TM.reshape(-1), node_TM)
    return Routing(token_N, node_N, varying_like(jnp.ones(node_N.shape, jnp.float32), node_N), None, node_TM.shape[1],
                   "token_major")


def levels(nodes: int) -> tuple[Peers, Peers]:
    """Who exchanges between nodes – devices of one rank – and who within a node."""
    devices = expert_devices()
    size = devices // nodes
    return (Peers(nodes, tuple(tuple(range(rank, devices, size)) for rank in range(size))),
            Peers(size, tuple(tuple(range(first, first + size)) for first in range(0, devices, size))))


def _round(number, x_TD, message_TM, visits, slot_N, weights, *, rows, num_experts, gate_on, compute, how):
    """``rows`` places for each node.

    [X, rows, D] -> all-to-all between nodes -> [X, rows, D] -> exchange within the node -> experts, and both ways back.
    """
    nodes, tokens = how.nodes, x_TD.shape[0]
    between, within = levels(nodes)
    place_N = slot_N - number * rows
    now_N = (place_N >= 0) & (place_N < rows) & (visits.expert_N < nodes)
    place_N = jnp.where(now_N, visits.expert_N * rows + place_N, nodes * rows)
    source_R = inverse(place_N, nodes * rows)
    x_RD = between.exchange(tokens_to_places(x_TD, visits, source_R, place_N))
    message_RM = between.exchange(tokens_to_places(message_TM, visits, source_R, place_N))
    received = _choices_here(message_RM, between.number(), num_experts // nodes, gate_on)
    y_RD = through_exchange(x_RD, received, weights, num_experts // nodes, compute, how, within,
                            tokens * received.choices_per_token)
    y_RD = between.exchange(y_RD.astype(x_TD.dtype))
    return places_to_tokens(y_RD, visits, source_R, place_N, tokens)


def _choices_here(message_RM, node, here, gate_on):
    """The list of what has come to this node; a choice made elsewhere goes nowhere."""
    rows, choices = message_RM.shape[0], message_RM.shape[1] // 2
    expert_RK = jax.lax.stop_gradient(message_RM[:, :choices]).astype(jnp.int32) - 1 - node * here
    expert_N = jnp.where((expert_RK >= 0) & (expert_RK < here), expert_RK, here).reshape(-1)
    token_RK = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], (rows, choices))
    token_N, gate_N = varying_like(token_RK.reshape(-1), expert_N), message_RM[:, choices:].reshape(-1)
    return Routing(token_N, expert_N, gate_N, None, choices, "token_major", gate_on)
