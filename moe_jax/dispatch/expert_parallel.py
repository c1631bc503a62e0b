"""Experts across devices, written out in ``jax.shard_map``: who sends which rows to whom, and what comes back.

Inside, every array is one device's; small letters stand for its share: g groups, e experts, and P devices along the mesh
axis ``expert``. Where F lies on ``tensor``, an expert's output is a sum over that axis; it is taken once at the very
end, when the rows are tokens again, of which there are fewer.
"""

import dataclasses
import functools
import math
from typing import Any, Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moe_jax.dispatch.permutation import inverse, places_to_tokens, tokens_to_places
from moe_jax.routing.assignment import Routing, assign_slots, assignments_per_expert
from moe_jax.sharding import TOKEN_AXES, concrete_mesh, varying_axes, varying_like, without_single_axes

AXIS = "expert"


def on_every_device(function: Callable, arrays: Any, weights: Any, split_experts: bool) -> jax.Array:
    """``function(*arrays, weights) -> y`` on what lies on each device; y leads with G, as ``arrays`` do.

    ``weights`` (leaves lead with E) are those of this device's experts if ``split_experts``, else of all
    ([E_expert, D, F_tensor] -> all-gather -> [E, D, F_tensor]).
    """
    tokens = without_single_axes(P(TOKEN_AXES))
    arrays = jax.tree.map(lambda leaf: jax.reshard(leaf, tokens), tuple(arrays))

    def weight_spec(leaf):
        experts, *rest = jax.typeof(leaf).sharding.spec
        return without_single_axes(P(experts if split_experts else None, *rest))

    weight_specs = jax.tree.map(weight_spec, weights)
    weights = jax.tree.map(jax.reshard, weights, weight_specs)
    summed = {"tensor"} & {axis for spec in jax.tree.leaves(weight_specs, is_leaf=lambda s: isinstance(s, P))
                           for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ())}

    def local(arrays, weights):
        if not summed:
            return function(*arrays, jax.tree.map(lambda leaf: varying_like(leaf, *jax.tree.leaves(arrays)), weights))
        # What is not split over `tensor` (the output's bias) counts once.
        first = jax.lax.axis_index("tensor") == 0
        weights = jax.tree.map(lambda leaf: leaf if "tensor" in varying_axes(leaf) else jnp.where(first, leaf, 0), weights)
        arrays = jax.tree.map(lambda leaf: varying_like(leaf, *jax.tree.leaves(weights)), arrays)
        weights = jax.tree.map(lambda leaf: varying_like(leaf, *jax.tree.leaves(arrays)), weights)
        return jax.lax.psum(function(*arrays, weights), "tensor")

    in_specs = (jax.tree.map(lambda _: tokens, arrays), weight_specs)
    y_GTD = jax.shard_map(local, in_specs=in_specs, out_specs=tokens)(arrays, weights)
    return jax.reshard(y_GTD, P(TOKEN_AXES))


def expert_devices() -> int:
    """P, the devices that share the experts."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


# Buffers of a fixed capacity.


def exchange_buffers(buffer_gECD: jax.Array) -> jax.Array:
    """My groups, all experts -> all groups, my experts.  [g, P·e, C, D] -> all-to-all -> [P·g, e, C, D]."""
    if expert_devices() == 1:
        return buffer_gECD
    return jax.lax.all_to_all(buffer_gECD, AXIS, split_axis=1, concat_axis=0, tiled=True)


def return_buffers(buffer_GeCD: jax.Array) -> jax.Array:
    """The way back.  [P·g, e, C, D] -> all-to-all -> [g, P·e, C, D]."""
    if expert_devices() == 1:
        return buffer_GeCD
    return jax.lax.all_to_all(buffer_GeCD, AXIS, split_axis=0, concat_axis=1, tiled=True)


# Rows without a capacity.


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How rows travel where there is no capacity (``dispatch='dropless'``).

    Each pair of devices exchanges up to C rows at once, C being ``factor`` times a balanced load; what a skewed load has
    beyond that travels in further rounds of the same buffers, as many as the fullest pair needs. So nothing is dropped,
    and memory grows with the mean load, not with the worst.

    Attributes:
      ragged: send the rows that there are (``jax.lax.ragged_all_to_all``) instead of C to everyone.
      factor: of a balanced load.
    """

    ragged: bool
    factor: float = 2.0


def through_exchange(x_TD: jax.Array, routing: Routing, weights: Any, num_experts: int,
                     compute: Callable[[jax.Array, Routing, Any], jax.Array], how: Exchange) -> jax.Array:
    """Every assignment's row to the device of its expert, through ``compute`` there, and back: ``[T, D]`` in fp32.

    Args:
      x_TD, routing: this device's tokens and their assignments to all experts.
      weights: of this device's e experts.
      compute: ``compute(x_RD, routing, weights) -> y_RD``, rows through this device's experts; the list it is given has
        one assignment for each row, e (nowhere) for rows that hold none.
    """
    devices = expert_devices()
    assignments = routing.expert_N.shape[0]
    # A token meets an expert once: more than T·e rows never go to one device.
    most = min(assignments, x_TD.shape[0] * (num_experts // devices))
    rows = min(most, 8 * math.ceil(how.factor * assignments / devices / 8))
    plan = _plan(routing.expert_N, num_experts, devices)
    one_round = functools.partial(_ragged_round if how.ragged else _padded_round, rows=rows, compute=compute)
    y_TD = one_round(0, x_TD, routing, weights, plan)
    if rows == most:
        return y_TD
    # The same number on every device, or some would wait for an exchange that others do not take part in.
    fullest = jnp.max(plan.size_P)
    rounds = (jax.lax.pmax(fullest, tuple(varying_axes(fullest))) + rows - 1) // rows

    def skip(x_TD, *_):
        return varying_like(jnp.zeros(x_TD.shape, jnp.float32), y_TD)

    # Computed again in the backward pass, so that rounds that hardly ever happen need no memory.
    @jax.checkpoint
    def a_round(number, *operands):
        return jax.lax.cond(number < rounds, functools.partial(one_round, number), skip, *operands)

    def further(*operands):
        step = lambda y_TD, number: (y_TD + a_round(number, *operands), None)
        return jax.lax.scan(step, skip(*operands), jnp.arange(1, -(-most // rows)))[0]

    with jax.named_scope("further_rounds"):
        return y_TD + jax.lax.cond(rounds > 1, further, skip, x_TD, routing, weights, plan)


@functools.partial(jax.tree_util.register_dataclass, meta_fields=(),
                   data_fields=("device_N", "position_N", "size_P", "received_Pe", "first_P", "returned_to_P"))
@dataclasses.dataclass(frozen=True)
class _Plan:
    """Where N assignments go, and what comes from elsewhere.

    Attributes:
      device_N, position_N: device of each assignment's expert (P: nowhere), and its place among the rows for it, which
        lie in the order of their experts.
      size_P: rows for each device.
      received_Pe: rows from each device for each of this device's experts.
      first_P: of all rows in the order of their experts the first for each device.
      returned_to_P: in each device's rows, so ordered, the first of those for this device.
    """

    device_N: jax.Array
    position_N: jax.Array
    size_P: jax.Array
    received_Pe: jax.Array
    first_P: jax.Array
    returned_to_P: jax.Array


def _plan(expert_N, num_experts, devices):
    expert_N = jnp.minimum(expert_N, num_experts)
    size_Pe = assignments_per_expert(expert_N, num_experts).reshape(devices, -1)
    start_E = (jnp.cumsum(size_Pe, axis=1) - size_Pe).reshape(-1)
    slot_N, _ = assign_slots(expert_N, num_experts, expert_N.shape[0])
    position_N = start_E.at[expert_N].get(mode="fill", fill_value=0) + slot_N
    size_P = jnp.sum(size_Pe, axis=1)
    first_P = jnp.cumsum(size_P) - size_P
    message_Pm = jax.lax.all_to_all(jnp.concatenate([size_Pe, first_P[:, None]], axis=1), AXIS, 0, 0, tiled=True)
    return _Plan(expert_N // (num_experts // devices), position_N, size_P, message_Pm[:, :-1], first_P, message_Pm[:, -1])


def _received(plan, number, rows):
    """What the rows ``[P, rows]`` of a round are: a list with one assignment each."""
    here_e = plan.received_Pe.shape[1]
    end_Pe = jnp.cumsum(plan.received_Pe, axis=1)
    place_R = number * rows + jnp.arange(rows, dtype=jnp.int32)
    expert_PR = jnp.sum(end_Pe[:, None, :] <= place_R[None, :, None], axis=2, dtype=jnp.int32)
    expert_N = jnp.minimum(expert_PR, here_e).reshape(-1)
    token_N = varying_like(jnp.arange(expert_N.shape[0], dtype=jnp.int32), expert_N)
    gate_N = varying_like(jnp.ones(expert_N.shape, jnp.float32), expert_N)
    return Routing(token_N, expert_N, gate_N, None, choices_per_token=1, order="token_major")


def _padded_round(number, x_TD, routing, weights, plan, *, rows, compute):
    """``rows`` places for each device, whether filled or not.  [P, rows, D] -> all-to-all -> [P, rows, D]."""
    devices = plan.size_P.shape[0]
    position_N = plan.position_N - number * rows
    now_N = (position_N >= 0) & (position_N < rows) & (plan.device_N < devices)
    place_N = jnp.where(now_N, plan.device_N * rows + position_N, devices * rows)
    source_R = inverse(place_N, devices * rows)
    exchange = lambda x_RD: jax.lax.all_to_all(x_RD, AXIS, 0, 0, tiled=True)
    x_RD = exchange(tokens_to_places(x_TD, routing, source_R, place_N))
    y_RD = exchange(compute(x_RD, _received(plan, number, rows), weights).astype(x_TD.dtype))
    return places_to_tokens(y_RD, routing, source_R, place_N, x_TD.shape[0])


def _ragged_round(number, x_TD, routing, weights, plan, *, rows, compute):
    """The rows that there are.  [N, D] by expert -> ragged all-to-all -> [P, up to rows, D] -> and back to [N, D]."""
    devices, assignments = plan.size_P.shape[0], routing.expert_N.shape[0]
    position_N = plan.position_N - number * rows
    now_N = (position_N >= 0) & (position_N < rows) & (plan.device_N < devices)
    first_N = plan.first_P.at[plan.device_N].get(mode="fill", fill_value=0)
    place_N = jnp.where(now_N, first_N + plan.position_N, assignments)
    source_N = inverse(place_N, assignments)
    sent_P = jnp.clip(plan.size_P - number * rows, 0, rows)
    received_P = jnp.clip(jnp.sum(plan.received_Pe, axis=1) - number * rows, 0, rows)
    section_P = jnp.arange(devices, dtype=jnp.int32) * rows
    mine_P = jnp.full((devices,), jax.lax.axis_index(AXIS) * rows, jnp.int32)

    def zeros(length):
        return varying_like(jnp.zeros((length, x_TD.shape[1]), x_TD.dtype), x_TD, plan.size_P)

    send = functools.partial(jax.lax.ragged_all_to_all, axis_name=AXIS)
    x_ND = tokens_to_places(x_TD, routing, source_N, place_N)
    x_RD = send(x_ND, zeros(devices * rows), plan.first_P + number * rows, sent_P, mine_P, received_P)
    y_RD = compute(x_RD, _received(plan, number, rows), weights).astype(x_TD.dtype)
    y_ND = send(y_RD, zeros(assignments), section_P, received_P, plan.returned_to_P + number * rows, sent_P)
    return places_to_tokens(y_ND, routing, source_N, place_N, x_TD.shape[0])


def exchanges_ragged() -> bool:
    """Whether ``jax.lax.ragged_all_to_all`` works where the program being traced will run: found out by compiling one for
    the devices of the mesh in context. XLA has none for CPUs."""
    mesh = concrete_mesh()
    return mesh is not None and _compiles_ragged(mesh)


@functools.lru_cache(maxsize=None)
def _compiles_ragged(mesh) -> bool:
    devices = mesh.shape[AXIS]
    spec = P(AXIS)

    def local(x_ND, size_P):
        here_P = varying_like(jnp.arange(devices, dtype=jnp.int32), size_P)
        return jax.lax.ragged_all_to_all(x_ND, jnp.zeros_like(x_ND), here_P, size_P, here_P, size_P, axis_name=AXIS)

    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))
                 for shape, dtype in (((devices * devices, 128), jnp.float32), ((devices * devices,), jnp.int32))]
    try:
        jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec)).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError:  # UNIMPLEMENTED
        return False
    return True
