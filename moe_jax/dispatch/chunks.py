"""A layer's tokens in several parts, so that one part travels while the experts compute another.

Between two parts there is nothing but their order: the exchange of the next does not wait for the experts of the one
before it, in either direction. Where the compiler makes exchanges asynchronous it lays them beside each other's
products (on TPUs it is told to: :func:`moe_jax.sharding.compiler_options`).
"""

import math
from typing import Any, Callable

import jax
import jax.numpy as jnp

from moe_jax.dispatch.expert_parallel import one_after_the_other
from moe_jax.dispatch.products import ExpertFunction
from moe_jax.routing.assignment import Routing
from moe_jax.sharding import TOKEN_AXES, lowering_platform, per_device


def in_chunks(dispatch: Callable, chunks: int) -> Callable:
    """The dispatcher ``dispatch`` on every device's groups in ``chunks`` equal parts.

    Parts are whole groups, so that nothing else is dropped than without. Where groups do not divide – training refuses
    that, generation has few – into as many parts as they can.
    """
    if chunks == 1:
        return dispatch

    def chunked(x_GTD: jax.Array, routing_G: Routing, expert: ExpertFunction, weights: Any, num_experts: int,
                capacity: int) -> tuple[jax.Array, jax.Array]:
        shape = jax.sharding.get_abstract_mesh().shape
        parts = math.gcd(chunks, x_GTD.shape[0] // math.prod(shape.get(axis, 1) for axis in TOKEN_AXES))
        if parts == 1:
            return dispatch(x_GTD, routing_G, expert, weights, num_experts, capacity)
        ys, kept = [], []
        for x, routing in _cut(parts, x_GTD, routing_G):
            if ys and lowering_platform() == "cpu":
                x, ys[-1] = per_device(one_after_the_other, x, ys[-1])
            y, kept_GN = dispatch(x, routing, expert, weights, num_experts, capacity)
            ys.append(y)
            kept.append(kept_GN)
        return tuple(per_device(lambda *parts: jnp.concatenate(parts), *values) for values in (ys, kept))

    return chunked


def _cut(parts, *arrays):
    """``arrays`` part by part, cut on each device."""
    def local(*arrays):
        size = jax.tree.leaves(arrays)[0].shape[0] // parts
        return tuple(jax.tree.map(lambda leaf: leaf[n * size:(n + 1) * size], arrays) for n in range(parts))

    return per_device(local, *arrays)
