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
class Peers:
    """Devices along the axis ``expert`` that exchange with one another; P of them.

    Attributes:
      size: P.
      groups: numbers of the devices that do, group by group; None: all on the axis.
    """

    size: int
    groups: tuple[tuple[int, ...], ...] | None = None

    def number(self) -> jax.Array:
        """Of this device in its group."""
        number = jax.lax.axis_index(AXIS)
        if self.groups is None:
            return number
        numbers = {device: place for group in self.groups for place, device in enumerate(group)}
        return jnp.array([numbers[device] for device in sorted(numbers)], jnp.int32)[number]

    def exchange(self, x_P: jax.Array) -> jax.Array:
        """The P equal parts of ``x_P`` to the P devices.  [P·m, ...] -> all-to-all -> [P·m, ...]."""
        if self.size == 1:
            return x_P
        return jax.lax.all_to_all(x_P, AXIS, 0, 0, tiled=True, axis_index_groups=self.groups)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How rows travel where there is no capacity (``dispatch='dropless'``).

    Each pair of devices exchanges up to C rows at once, C being ``factor`` times a balanced load; what a skewed load has
    beyond that travels in further rounds of the same buffers, as many as the fullest pair needs. So nothing is dropped,
    and memory grows with the mean load, not with the worst.

    Attributes:
      ragged: send the rows that there are (``jax.lax.ragged_all_to_all``) instead of C to everyone.
      factor: of a balanced load.
      nodes: equal runs of devices; above 1 a token goes to each node at most once (:mod:`moe_jax.dispatch.two_level`).
      nodes_per_token: how many nodes a token's choices reach at most, if routing limits that; 0: any number.
    """

    ragged: bool
    factor: float = 2.0
    nodes: int = 1
    nodes_per_token: int = 0


def through_exchange(x_TD: jax.Array, routing: Routing, weights: Any, num_experts: int,
                     compute: Callable[[jax.Array, Routing, Any], jax.Array], how: Exchange, peers: Peers | None = None,
                     load: int | None = None) -> jax.Array:
    """Every assignment's row to the device of its expert, through ``compute`` there, and back: ``[T, D]`` in fp32.

    Args:
      x_TD, routing: this device's tokens and their assignments to all experts.
      weights: of this device's e experts.
      compute: ``compute(x_RD, routing, weights) -> y_RD``, rows through this device's experts; the list it is given has
        one assignment for each row, e (nowhere) for rows that hold none.
      peers: the devices that hold the experts; None: all along the axis.
      load: how many assignments a device has that go anywhere, on average; None: all of the list.
    """
    peers = peers or Peers(expert_devices())
    devices = peers.size
    assignments = routing.expert_N.shape[0]
    rows = rows_at_once(assignments, x_TD.shape[0], num_experts, devices, how.factor, load)
    plan = _plan(routing.expert_N, num_experts, peers)
    ragged = how.ragged and devices > 1
    one_round = functools.partial(_ragged_round if ragged else _padded_round, rows=rows, peers=peers, compute=compute)
    return in_rounds(one_round, rows, assignments, jnp.max(plan.size_P), x_TD, routing, weights, plan)


def rows_at_once(assignments: int, tokens: int, num_experts: int, devices: int, factor: float,
                 load: int | None = None) -> int:
    """Rows that a pair of devices exchanges in one round."""
    # In most lists a token meets an expert once: more than T·e rows never go to one device.
    usual = min(assignments, tokens * (num_experts // devices))
    return min(usual, 8 * math.ceil(factor * (load or assignments) / devices / 8))


def in_rounds(one_round: Callable[..., jax.Array], rows: int, most: int, fullest: jax.Array, *operands: Any) -> jax.Array:
    """The sum of ``one_round(number, *operands)`` over as many rounds of ``rows`` rows as the fullest pair of devices
    anywhere needs. ``fullest``: the rows of this device's fullest pair, of which there can be ``most``."""
    if rows == most:  # all of them fit, wherever they go
        return one_round(0, *operands)
    # The same number on every device, or some would wait for an exchange that others do not take part in.
    rounds = (jax.lax.pmax(fullest, varying_axes(fullest)) + rows - 1) // rows
    leaves, tree = jax.tree.flatten(operands)
    has_gradient = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def on_leaves(number, numbers, whole_numbers):
        numbers, whole_numbers = iter(numbers), iter(whole_numbers)
        return one_round(number, *tree.unflatten([next(numbers if has else whole_numbers) for has in has_gradient]))

    return _in_rounds(on_leaves, rounds, [leaf for leaf, has in zip(leaves, has_gradient) if has],
                      [leaf for leaf, has in zip(leaves, has_gradient) if not has])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(one_round, rounds, numbers, whole_numbers):
    return _with_further(one_round(0, numbers, whole_numbers), rounds, lambda n: one_round(n, numbers, whole_numbers))


def _in_rounds_forward(one_round, rounds, numbers, whole_numbers):
    y_TD, pull = jax.vjp(lambda numbers: one_round(0, numbers, whole_numbers), numbers)
    y_TD = _with_further(y_TD, rounds, lambda n: one_round(n, numbers, whole_numbers))
    return y_TD, (pull, rounds, numbers, whole_numbers)


def _in_rounds_backward(one_round, residuals, d_TD):
    """The first round's intermediate results were kept; those of further ones, which hardly ever happen, are computed again."""
    pull, rounds, numbers, whole_numbers = residuals

    def further(number):
        return jax.vjp(lambda numbers: one_round(number, numbers, whole_numbers), numbers)[1](d_TD)[0]

    return None, _with_further(pull(d_TD)[0], rounds, further), None


_in_rounds.defvjp(_in_rounds_forward, _in_rounds_backward)


def _with_further(first, rounds, one_round):
    """``first`` plus rounds 1, 2, …: a loop whose carry it is, so that no further round costs nothing, and takes no memory
    for sums."""
    with jax.named_scope("further_rounds"):
        return jax.lax.while_loop(
            lambda state: state[0] < rounds,
            lambda state: (state[0] + 1, jax.tree.map(jnp.add, state[1], one_round(state[0]))), (jnp.int32(1), first))[1]


@jax.custom_vjp
def one_after_the_other(x_TD: jax.Array, y_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same, where x waits for y and, in the backward pass, the gradient of y for that of x.

    XLA on CPU runs a loop beside what does not depend on it, and two exchanges at once mix up their devices.
    """
    return _when_there(y_TD, x_TD), y_TD


def _when_there(awaited, x):
    """x; nobody but us knows that nothing is NaN and 0."""
    first = awaited.ravel()[0]
    return jnp.where(jnp.isnan(first) & (first == 0), jnp.nan, x).astype(x.dtype)


one_after_the_other.defvjp(lambda x, y: (one_after_the_other(x, y), None),
                           lambda _, d: (d[0], _when_there(d[0], d[1])))


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


def _plan(expert_N, num_experts, peers):
    devices = peers.size
    expert_N = jnp.minimum(expert_N, num_experts)
    size_Pe = assignments_per_expert(expert_N, num_experts).reshape(devices, -1)
    start_E = (jnp.cumsum(size_Pe, axis=1) - size_Pe).reshape(-1)
    slot_N, _ = assign_slots(expert_N, num_experts, expert_N.shape[0])
    position_N = start_E.at[expert_N].get(mode="fill", fill_value=0) + slot_N
    size_P = jnp.sum(size_Pe, axis=1)
    first_P = jnp.cumsum(size_P) - size_P
    message_Pm = peers.exchange(jnp.concatenate([size_Pe, first_P[:, None]], axis=1))
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


def _padded_round(number, x_TD, routing, weights, plan, *, rows, peers, compute):
    """``rows`` places for each device, whether filled or not.  [P, rows, D] -> all-to-all -> [P, rows, D]."""
    devices = peers.size
    position_N = plan.position_N - number * rows
    now_N = (position_N >= 0) & (position_N < rows) & (plan.device_N < devices)
    place_N = jnp.where(now_N, plan.device_N * rows + position_N, devices * rows)
    source_R = inverse(place_N, devices * rows)
    x_RD = peers.exchange(tokens_to_places(x_TD, routing, source_R, place_N))
    y_RD = peers.exchange(compute(x_RD, _received(plan, number, rows), weights).astype(x_TD.dtype))
    return places_to_tokens(y_RD, routing, source_R, place_N, x_TD.shape[0])


def _ragged_round(number, x_TD, routing, weights, plan, *, rows, peers, compute):
    """The rows that there are.  [N, D] by expert -> ragged all-to-all -> [P, up to rows, D] -> and back to [N, D]."""
    devices, assignments = peers.size, routing.expert_N.shape[0]
    position_N = plan.position_N - number * rows
    now_N = (position_N >= 0) & (position_N < rows) & (plan.device_N < devices)
    first_N = plan.first_P.at[plan.device_N].get(mode="fill", fill_value=0)
    place_N = jnp.where(now_N, first_N + plan.position_N, assignments)
    source_N = inverse(place_N, assignments)
    sent_P = jnp.clip(plan.size_P - number * rows, 0, rows)
    received_P = jnp.clip(jnp.sum(plan.received_Pe, axis=1) - number * rows, 0, rows)
    section_P = jnp.arange(devices, dtype=jnp.int32) * rows
    mine_P = jnp.full((devices,), peers.number() * rows, jnp.int32)
    there = plan.first_P + number * rows, sent_P, mine_P, received_P
    back = section_P, received_P, plan.returned_to_P + number * rows, sent_P

    x_RD = _send(peers, devices * rows, tokens_to_places(x_TD, routing, source_N, place_N), there, back)
    y_RD = compute(x_RD, _received(plan, number, rows), weights).astype(x_TD.dtype)
    y_ND = _send(peers, assignments, y_RD, back, there)
    return places_to_tokens(y_ND, routing, source_N, place_N, x_TD.shape[0])


def _send(peers, places, x_RD, there, back):
    """x's rows to ``places`` rows of the peers, those that nobody fills being zero.

    ``there``: for each peer the first row and how many, their place over there, and how many come from it. ``back`` is
    the same for the way back, which the gradient takes: JAX would exchange these numbers once more to find it (and its
    transpose does not know groups).
    """
    return _sent(peers, places, x_RD.shape[0], x_RD, there, back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sent(peers, places, length, x_RD, there, back):
    del length, back
    out_PD = varying_like(jnp.zeros((places, x_RD.shape[1]), x_RD.dtype), x_RD, *there)
    return jax.lax.ragged_all_to_all(x_RD, out_PD, *there, axis_name=AXIS, axis_index_groups=peers.groups)


_sent.defvjp(lambda peers, places, length, x_RD, there, back: (_sent(peers, places, length, x_RD, there, back), (there, back)),
             lambda peers, places, length, ways, d_PD: (_sent(peers, length, places, d_PD, *ways[::-1]), None, None))


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
