"""Moving: Routing -> experts -> tokens. The only collectives of the MoE layer; knows nothing of how routes were chosen.

Every dispatcher has one signature::

    dispatcher(x_GTD, routing_G, expert, weights, num_experts, capacity) -> (y_GTD, kept_GN)

with ``expert(products, weights, x)`` an expert function (:mod:`moe_jax.dispatch.products`), ``weights`` its parameters
(leaves lead with E), ``capacity`` the slots per expert and group (ignored by those that drop nothing) and ``kept_GN``
which assignments were computed. All agree with ``reference`` in value and gradient for every list of assignments.
"""

import dataclasses
import functools
from typing import Callable

from moe_jax.config import ConfigError, MoEConfig
from moe_jax.dispatch.capacity import by_einsum, by_gather
from moe_jax.dispatch.chunks import in_chunks
from moe_jax.dispatch.dropless import dropless
from moe_jax.dispatch.expert_parallel import Exchange, exchanges_ragged, expert_devices
from moe_jax.dispatch.reference import reference
from moe_jax.sharding import lowering_platform

DISPATCHERS = {
    "reference": reference,
    "einsum": by_einsum,
    "gather": by_gather,
    "dropless": dropless,
}


def dispatcher(name: str, moe: MoEConfig = MoEConfig(), expert_nodes: int = 1, nodes_per_token: int = 0) -> Callable:
    """The dispatcher of that name, with the options of ``moe`` that say who multiplies and how rows travel between devices.

    ``expert_nodes`` is ``mesh.expert_nodes`` and ``nodes_per_token`` :attr:`moe_jax.config.Config.nodes_per_token`.

    Raises:
      ConfigError: ``moe.row_exchange='ragged'`` where the devices of the mesh in context have no ragged all-to-all.
    """
    if name == "reference":
        return reference
    if name != "dropless":
        return in_chunks(dataclasses.replace(DISPATCHERS[name], expert_parallelism=moe.expert_parallelism), moe.exchange_chunks)
    exchange = None
    if moe.expert_parallelism != "none" and expert_devices() > 1:
        ragged = moe.row_exchange != "padded" and exchanges_ragged()
        if moe.row_exchange == "ragged" and not ragged:
            raise ConfigError(f"moe.row_exchange='ragged': XLA has no ragged all-to-all for {lowering_platform()}; set it to "
                              f"'padded', or 'auto'.")
        exchange = Exchange(ragged, moe.row_exchange_factor, expert_nodes, nodes_per_token)
    return in_chunks(functools.partial(dropless, grouped_matmul=moe.grouped_matmul, exchange=exchange), moe.exchange_chunks)
