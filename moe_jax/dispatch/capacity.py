"""Fixed buffers: C slots per expert and group. Two ways to fill and empty them, equal in value and gradient.

Shapes are static and the exchange between devices is one all-to-all, which is why TPUs like them. An assignment whose
slot lies beyond C is dropped: its token keeps only the residual stream.
"""

import dataclasses
import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from moe_jax.dispatch.blocks import equal_blocks, experts_by_blocks
from moe_jax.dispatch.expert_parallel import exchange_buffers, on_every_device, return_buffers
from moe_jax.dispatch.permutation import inverse, places_to_tokens, tokens_to_places
from moe_jax.dispatch.products import BatchedProducts, ExpertFunction
from moe_jax.routing.assignment import Routing, assign_slots
from moe_jax.sharding import ACTIVATIONS, EXPERT_BUFFERS, lowering_platform, over_groups, spec, varying_like, without_single_axes

# Gates are fp32 to the end: the default product of a TPU or GPU would round them.
_EXACT = jax.lax.Precision.HIGHEST


def buffer_places(routing: Routing, num_experts: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """``place_N``: slot of each assignment in the flattened ``[E·C]`` buffers of one group (E·C: dropped), ``kept_N``."""
    slot_N, kept_N = assign_slots(routing.expert_N, num_experts, capacity)
    return jnp.where(kept_N, routing.expert_N * capacity + slot_N, num_experts * capacity), kept_N


def fill_by_gather(x_TD: jax.Array, routing: Routing, place_N: jax.Array, num_experts: int,
                   capacity: int) -> jax.Array:
    """Expert buffers ``[E, C, D]`` of one group; unfilled slots are zero."""
    source_P = inverse(place_N, num_experts * capacity)
    return tokens_to_places(x_TD, routing, source_P, place_N).reshape(num_experts, capacity, -1)


def empty_by_gather(buffer_ECD: jax.Array, routing: Routing, place_N: jax.Array, tokens: int) -> jax.Array:
    """Σ over a token's kept assignments of gate · slot, ``[T, D]``; summed in fp32."""
    buffer_PD = buffer_ECD.reshape(-1, buffer_ECD.shape[-1])
    source_P = inverse(place_N, buffer_PD.shape[0])
    return places_to_tokens(buffer_PD, routing, source_P, place_N, tokens).astype(buffer_ECD.dtype)


def fill_by_einsum(x_TD: jax.Array, routing: Routing, place_N: jax.Array, num_experts: int,
                   capacity: int) -> jax.Array:
    """As :func:`fill_by_gather`, by a one-hot ``[T, E·C]`` product (GShard, Mesh-TensorFlow): work grows with E·C."""
    gate_N = routing.gate_N if routing.gate_on == "input" else None
    mask_TP = _one_hot(routing.token_N, place_N, gate_N, x_TD.shape[0], num_experts * capacity)
    dtype = x_TD.dtype if gate_N is None else jnp.float32
    buffer_PD = jnp.einsum("TP,TD->PD", mask_TP.astype(dtype), x_TD.astype(dtype)).astype(x_TD.dtype)
    return buffer_PD.reshape(num_experts, capacity, -1)


def empty_by_einsum(buffer_ECD: jax.Array, routing: Routing, place_N: jax.Array, tokens: int) -> jax.Array:
    """As :func:`empty_by_gather`, by the one-hot product weighted with the gates."""
    buffer_PD = buffer_ECD.reshape(-1, buffer_ECD.shape[-1])
    gate_N = routing.gate_N if routing.gate_on == "output" else None
    combine_TP = _one_hot(routing.token_N, place_N, gate_N, tokens, buffer_PD.shape[0])
    return jnp.einsum("TP,PD->TD", combine_TP, buffer_PD.astype(jnp.float32), precision=_EXACT).astype(buffer_ECD.dtype)


def _one_hot(token_N, place_N, gate_N, tokens, places):
    place_NP = jax.nn.one_hot(place_N, places, dtype=jnp.float32)
    if gate_N is not None:
        place_NP = place_NP * gate_N[:, None]
    return jnp.einsum("NT,NP->TP", jax.nn.one_hot(token_N, tokens, dtype=jnp.float32), place_NP, precision=_EXACT)


@dataclasses.dataclass(frozen=True)
class CapacityDispatcher:
    """Fill buffers, bring every expert its tokens, compute, bring them back, empty.

    ``expert_parallelism`` says who brings them:
      ``'compiler'``: the buffers are constrained on *both* sides of the exchange, group-sharded and then expert-sharded,
        and XLA inserts exactly one all-to-all each way (constraining one side only gives all-gathers).
      ``'shard_map'``: ``jax.lax.all_to_all``, written out.
      ``'none'``: nobody: every device gathers all experts' weights and keeps its tokens.
    """

    fill: Callable[..., jax.Array]
    empty: Callable[..., jax.Array]
    expert_parallelism: str = "compiler"

    def __call__(self, x_GTD: jax.Array, routing_G: Routing, expert: ExpertFunction, weights: Any, num_experts: int,
                 capacity: int) -> tuple[jax.Array, jax.Array]:
        """See :data:`moe_jax.dispatch.DISPATCHERS`."""
        place_GN, kept_GN = over_groups(lambda routing: buffer_places(routing, num_experts, capacity), routing_G)
        fill = functools.partial(self.fill, num_experts=num_experts, capacity=capacity)
        empty = functools.partial(self.empty, tokens=x_GTD.shape[1])
        if self.expert_parallelism == "compiler":
            return self._by_compiler(x_GTD, routing_G, place_GN, expert, weights, fill, empty), kept_GN
        exchanged = self.expert_parallelism == "shard_map"

        def on_device(x_GTD, routing_G, place_GN, weights):
            buffer_GECD = jax.vmap(fill)(x_GTD, routing_G, place_GN)
            if exchanged:
                buffer_GECD = exchange_buffers(buffer_GECD)
            buffer_GECD = _experts_first(buffer_GECD, functools.partial(_local_experts, expert=expert, weights=weights))
            if exchanged:
                buffer_GECD = return_buffers(buffer_GECD)
            return jax.vmap(empty)(buffer_GECD, routing_G, place_GN)

        return on_every_device(on_device, (x_GTD, routing_G, place_GN), weights, split_experts=exchanged), kept_GN

    def _by_compiler(self, x_GTD, routing_G, place_GN, expert, weights, fill, empty):
        buffer_GECD = over_groups(fill, x_GTD, routing_G, place_GN)
        # [G_(data,fsdp,expert), E, C, D] -> all-to-all over expert -> [G_(data,fsdp), E_expert, C, D]
        buffer_GECD = jax.reshard(buffer_GECD, spec("GECD", EXPERT_BUFFERS))
        buffer_GECD = _experts_first(buffer_GECD, functools.partial(_sharded_experts, expert=expert, weights=weights),
                                     EXPERT_BUFFERS)
        # [G_(data,fsdp), E_expert, C, D] -> all-to-all over expert -> [G_(data,fsdp,expert), E, C, D]
        buffer_GECD = jax.reshard(buffer_GECD, spec("GECD", {"G": ACTIVATIONS["G"]}))
        return over_groups(empty, buffer_GECD, routing_G, place_GN)


def _experts_first(buffer_GECD, compute, table=None):
    """Every expert on its slots of all groups, as one product per expert: [G, E, C, D] -> [E, G·C, D] and back.

    The transposition is local. XLA on CPU would otherwise copy the operands of each of the nine products it serves.
    ``table``: where the dimensions lie; None where the code sees one device.
    """
    groups, num_experts, capacity, width = buffer_GECD.shape
    lies = lambda letters: {} if table is None else {"out_sharding": spec(letters, table)}
    x_ETD = jnp.swapaxes(buffer_GECD, 0, 1).reshape(num_experts, groups * capacity, width, **lies("ETD"))
    y_EGCD = compute(x_ETD).reshape(num_experts, groups, capacity, width, **lies("EGCD"))
    return jnp.swapaxes(y_EGCD, 0, 1)


def _local_experts(x_ETD, expert, weights):
    """The experts of one device. A CPU does one after the other, whole, while its activations are in the cache."""
    if lowering_platform() != "cpu":
        return expert(BatchedProducts(), weights, x_ETD)
    num_experts, rows, width = x_ETD.shape
    y_PD = experts_by_blocks(expert, weights, x_ETD.reshape(-1, width), None, None, equal_blocks(num_experts, rows))
    return y_PD.reshape(x_ETD.shape)


def _sharded_experts(x_ETD, expert, weights):
    """The experts of all devices. Where F lies on ``tensor`` the last product is a sum over devices, left to XLA."""
    mesh = jax.sharding.get_abstract_mesh()
    if lowering_platform() != "cpu" or mesh.empty or mesh.shape["tensor"] > 1:
        return expert(BatchedProducts(EXPERT_BUFFERS), weights, x_ETD)

    def on_device(x_ETD, weights):
        return _local_experts(x_ETD, expert, jax.tree.map(lambda leaf: varying_like(leaf, x_ETD), weights))

    rows, experts = (without_single_axes(spec(letters, EXPERT_BUFFERS)) for letters in ("ETD", "E"))
    weights = jax.tree.map(lambda leaf: jax.reshard(leaf, experts), weights)
    y_ETD = jax.shard_map(on_device, out_specs=rows)(jax.reshard(x_ETD, rows), weights)
    return jax.reshard(y_ETD, spec("ETD", EXPERT_BUFFERS))


by_gather = CapacityDispatcher(fill_by_gather, empty_by_gather)
by_einsum = CapacityDispatcher(fill_by_einsum, empty_by_einsum)
