"""Sort, grouped matmul, unsort: every assignment is computed, none is padded to a capacity (Gale et al. 2022)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.dispatch.blocks import cut_into_blocks, experts_by_blocks
from moe_jax.dispatch.expert_parallel import Exchange, expert_devices, on_every_device, through_exchange
from moe_jax.dispatch.grouped_matmul import choose
from moe_jax.dispatch.permutation import by_token, inverse, places_to_tokens, token_of_places, tokens_to_places
from moe_jax.dispatch.products import ExpertFunction, GroupedProducts
from moe_jax.dispatch.two_level import through_nodes
from moe_jax.routing.assignment import Routing, assignments_per_expert, sorted_by_expert


def dropless(x_GTD: jax.Array, routing_G: Routing, expert: ExpertFunction, weights: Any, num_experts: int,
             capacity: int, *, grouped_matmul: str = "auto", exchange: Exchange | None = None) -> tuple[jax.Array, jax.Array]:
    """As the reference, at the cost of the chosen experts only. Groups play no part: a device's tokens are one list.

    Across devices every row travels to its expert's device and back (``exchange``), or, without, tokens stay where they
    are and every device gathers all experts' weights ([E_expert, D, F] -> all-gather -> [E, D, F]).

    ``grouped_matmul`` names who multiplies (:func:`moe_jax.dispatch.grouped_matmul.grouped_matmul`). Where that is the
    portable one, experts are computed whole, block by block; a library's kernel is called product by product.

    See :data:`moe_jax.dispatch.DISPATCHERS`.
    """
    del capacity
    exchanged = exchange is not None and expert_devices() > 1

    def here(x_TD, routing, weights):
        by_blocks = _all_portable(grouped_matmul, x_TD, routing, weights)
        compute = _by_blocks if by_blocks else functools.partial(_by_products, grouped_matmul=grouped_matmul)
        return compute(x_TD, routing, expert, weights, jax.tree.leaves(weights)[0].shape[0])

    def on_device(x_GTD, routing_G, weights):
        groups, tokens, width = x_GTD.shape
        routing, x_TD = _one_list(routing_G, groups, tokens), x_GTD.reshape(-1, width)
        if exchanged:
            travel = through_nodes if exchange.nodes > 1 else through_exchange
            y_TD = travel(x_TD, routing, weights, num_experts, here, exchange)
        else:
            y_TD = here(x_TD, routing, weights)
        return y_TD.astype(x_GTD.dtype).reshape(x_GTD.shape)

    y_GTD = on_every_device(on_device, (x_GTD, routing_G), weights, split_experts=exchanged)
    return y_GTD, routing_G.expert_N < num_experts


def _all_portable(grouped_matmul, x_TD, routing, weights):
    rows_ND = jax.ShapeDtypeStruct((routing.expert_N.shape[0], x_TD.shape[1]), x_TD.dtype)
    matrices = [leaf for leaf in jax.tree.leaves(weights) if leaf.ndim == 3]
    return all(choose(grouped_matmul, rows_ND, matrix) == "portable" for matrix in matrices)


def _by_products(x_TD, routing, expert, weights, num_experts, grouped_matmul):
    source_N = sorted_by_expert(routing.expert_N, num_experts)
    place_N = inverse(source_N, source_N.shape[0])
    sizes_E = assignments_per_expert(routing.expert_N, num_experts)
    rows_ND = tokens_to_places(x_TD, routing, source_N, place_N)
    rows_ND = expert(GroupedProducts(sizes_E, grouped_matmul), weights, rows_ND)
    return places_to_tokens(rows_ND, routing, source_N, place_N, x_TD.shape[0])


def _by_blocks(x_TD, routing, expert, weights, num_experts):
    blocks = cut_into_blocks(routing.expert_N, num_experts)
    source_P, place_N = blocks.source_P, blocks.place_N
    tokens = x_TD.shape[0]
    if routing.choices_per_token is None or routing.gate_on == "input":
        x_TD, token_P, place_TK = tokens_to_places(x_TD, routing, source_P, place_N), None, None
    else:
        token_P, place_TK = token_of_places(routing, source_P, x_TD.shape[0]), by_token(place_N, routing)
    y_PD = experts_by_blocks(expert, weights, x_TD, token_P, place_TK, blocks)
    return places_to_tokens(y_PD, routing, source_P, place_N, tokens)


def _one_list(routing_G: Routing, groups: int, tokens: int) -> Routing:
    """The lists of all groups as one; order is kept inside each group, and no order matters where nobody is dropped."""
    token_GN = routing_G.token_N + tokens * jnp.arange(groups, dtype=jnp.int32)[:, None]
    order = "token_major" if routing_G.order == "token_major" else ""
    return Routing(token_GN.reshape(-1), routing_G.expert_N.reshape(-1), routing_G.gate_N.reshape(-1), None,
                   routing_G.choices_per_token, order, routing_G.gate_on)

