"""Which experts lie on which device: busy experts get more copies, and devices get equal loads (EPLB, DeepSeek-AI 2025).

An expert has one copy or more, P in all, numbered through: of X devices the x-th holds copies x·P/X … (x+1)·P/X − 1, as
the ``expert`` axis of the mesh cuts an array. Everything here is NumPy but :func:`to_copies`, which the layer calls
between routing and dispatch. Loads are numbers of choices, or anything proportional to them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ConfigError, nearest_divisors
from moe_jax.routing.assignment import Routing, assign_slots


@dataclasses.dataclass(frozen=True)
class Placement:
    """The expert of every copy, layer by layer.

    Attributes:
      expert_LP: int64; every expert stands in every row at least once.
      devices: how many share the copies, P/devices each.
    """

    expert_LP: np.ndarray
    devices: int

    @property
    def num_experts(self) -> int:
        return int(self.expert_LP.max()) + 1

    @property
    def is_renumbering(self) -> bool:
        """Whether every expert has one copy."""
        return self.expert_LP.shape[1] == self.num_experts

    def copies_LEJ(self) -> np.ndarray:
        """int32: the copies of each expert, ascending, then P where it has fewer than the P − E + 1 it could have."""
        layers, copies = self.expert_LP.shape
        table_LEJ = np.full((layers, self.num_experts, copies - self.num_experts + 1), copies, np.int32)
        for layer, expert_P in enumerate(self.expert_LP):
            for expert in range(self.num_experts):
                mine = np.flatnonzero(expert_P == expert)
                table_LEJ[layer, expert, :mine.size] = mine
        return table_LEJ

    def load_LX(self, load_LE: np.ndarray) -> np.ndarray:
        """What each device gets of the experts' loads, every expert's spread evenly over its copies."""
        layer_L1 = np.arange(len(self.expert_LP))[:, None]
        count_LE = np.zeros((len(self.expert_LP), self.num_experts))
        np.add.at(count_LE, (layer_L1, self.expert_LP), 1)
        share_LE = np.asarray(load_LE, np.float64) / count_LE
        return per_device_sums(share_LE[layer_L1, self.expert_LP], self.devices)


def per_device_sums(load_LP: np.ndarray, devices: int) -> np.ndarray:
    """``[L, P]`` loads of copies as ``[L, X]`` loads of devices."""
    return load_LP.reshape(len(load_LP), devices, -1).sum(axis=-1)


def imbalance(load_LX: np.ndarray) -> np.ndarray:
    """Largest over mean load, ``[L]``: 1 is even, and the slowest device decides. 1 where nothing was counted."""
    mean_L = load_LX.mean(axis=-1)
    return np.where(mean_L > 0, load_LX.max(axis=-1) / np.where(mean_L > 0, mean_L, 1.0), 1.0)


def in_order(layers: int, num_experts: int, devices: int) -> Placement | None:
    """Where experts lie without a placement: one copy each, in the order of their numbers. None if that does not divide."""
    if num_experts % devices:
        return None
    return Placement(np.tile(np.arange(num_experts), (layers, 1)), devices)


def round_copies(num_experts: int, copies: int) -> np.ndarray:
    """:meth:`Placement.copies_LEJ` of one layer in which copy p is one of expert p mod E."""
    return Placement(np.arange(copies)[None, :] % num_experts, devices=1).copies_LEJ()[0]


def replicate(load_E: np.ndarray, copies: int) -> tuple[np.ndarray, np.ndarray]:
    """The expert of each of ``copies`` copies, and the load of each: one copy of every expert, then, time after time, one
    more of the expert with the largest load per copy; ties go to the lowest."""
    load_E = np.asarray(load_E, np.float64)
    count_E, expert_P = np.ones(load_E.size), list(range(load_E.size))
    for _ in range(copies - load_E.size):
        busiest = int(np.argmax(load_E / count_E))
        count_E[busiest] += 1
        expert_P.append(busiest)
    return np.array(expert_P), (load_E / count_E)[expert_P]


def pack(load_N: np.ndarray, packs: int) -> np.ndarray:
    """N items in packs of equally many, ``[packs, N/packs]`` item numbers: by falling load, each into the pack with the
    least load so far that has room; ties go to the lowest item and the lowest pack. As many packs as items: in order."""
    room = len(load_N) // packs
    if room == 1:
        return np.arange(packs)[:, None]
    members, load_X = [[] for _ in range(packs)], np.zeros(packs)
    for item in np.argsort(-np.asarray(load_N, np.float64), kind="stable"):
        full_X = np.array([len(pack) == room for pack in members])
        chosen = int(np.argmin(np.where(full_X, np.inf, load_X)))
        members[chosen].append(item)
        load_X[chosen] += load_N[item]
    return np.array(members)


def place(load_LE: np.ndarray, copies: int, devices: int, nodes: int = 1, groups: int = 1) -> Placement:
    """EPLB: ``copies`` copies of E experts, so that ``devices`` devices get nearly equal loads, layer by layer.

    Where ``nodes`` divides ``groups`` (equal runs of experts, as group-limited routing knows them), whole groups are packed
    into nodes, then a node's experts are copied and packed into its devices: a token that keeps to few groups keeps to few
    nodes. Else nodes and groups play no part.

    Raises:
      ConfigError: numbers that do not divide, with the legal ones. ValueError: loads that are none.
    """
    load_LE = _loads(load_LE)
    if groups % nodes:
        nodes = groups = 1
    _check_numbers(load_LE.shape[1], copies, devices, nodes, groups)

    def layer(load_E):
        group_XM = np.arange(load_E.size).reshape(groups, -1)
        placed = []
        for node in pack(load_E[group_XM].sum(axis=1), nodes):
            expert_M = group_XM[node].reshape(-1)
            copy_P, load_P = replicate(load_E[expert_M], copies // nodes)
            placed.append(expert_M[copy_P][pack(load_P, devices // nodes)].reshape(-1))
        return np.concatenate(placed)

    return Placement(np.stack([layer(load_E) for load_E in load_LE]), devices)


def renumber(load_LE: np.ndarray, devices: int, nodes: int = 1, groups: int = 1) -> Placement:
    """A placement of one copy each that keeps the experts of a group beside each other, so that the experts may be given
    new numbers: whole groups are packed into nodes and into devices; where a group has several devices, its experts into
    those. A layer that would gain nothing stays as it is.

    Raises:
      ConfigError: numbers that do not divide, with the legal ones. ValueError: loads that are none.
    """
    load_LE = _loads(load_LE)
    experts = load_LE.shape[1]
    nodes = nodes if groups % nodes == 0 else 1
    _check_numbers(experts, experts, devices, nodes, groups)
    if groups > 1 and groups % devices and devices % groups:
        legal = [n for n in range(1, experts + 1) if experts % n == 0 and (groups % n == 0 or n % groups == 0)]
        raise ConfigError(f"devices={devices}: without redundant copies the experts of each of moe.num_groups={groups} groups "
                          f"stay together, so one number must divide the other; legal values: {', '.join(map(str, legal))}.")

    def layer(load_E):
        group_XM = np.arange(experts).reshape(groups, -1)
        load_X, parts, order = load_E[group_XM].sum(axis=1), min(devices, groups) // nodes, []
        for node in pack(load_X, nodes):
            for group in node[pack(load_X[node], parts)].reshape(-1):
                inside = pack(load_E[group_XM[group]], max(1, devices // groups))
                # On one device the order means nothing; the one at hand moves least.
                order.append(group_XM[group][np.sort(inside, axis=1).reshape(-1)])
        return np.concatenate(order)

    found = Placement(np.stack([layer(load_E) for load_E in load_LE]), devices)
    before = in_order(len(load_LE), experts, devices)
    gains_L = imbalance(found.load_LX(load_LE)) < imbalance(before.load_LX(load_LE))
    return Placement(np.where(gains_L[:, None], found.expert_LP, before.expert_LP), devices)


def _loads(load_LE) -> np.ndarray:
    load_LE = np.asarray(load_LE, np.float64)
    if load_LE.ndim != 2 or not load_LE.size or not np.isfinite(load_LE).all() or (load_LE < 0).any():
        raise ValueError(f"loads of shape {load_LE.shape}: wanted is [layers, experts], finite and not below 0")
    return load_LE


def _check_numbers(experts: int, copies: int, devices: int, nodes: int, groups: int) -> None:
    for name, value in (("devices", devices), ("nodes", nodes), ("groups", groups)):
        if value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1.")
    if experts % groups:
        raise ConfigError(f"groups={groups}: must divide {experts} experts; nearest legal values: "
                          f"{nearest_divisors(groups, experts)}.")
    if devices % nodes:
        raise ConfigError(f"nodes={nodes}: must divide devices={devices}; nearest legal values: "
                          f"{nearest_divisors(nodes, devices)}.")
    redundant = copies - experts
    if redundant < 0 or copies % devices:
        least = -(-experts // devices) * devices
        legal = sorted({max(least, copies // devices * devices), max(least, -(-copies // devices) * devices)})
        raise ConfigError(f"redundant={redundant}: {experts} experts and {redundant} redundant copies are {copies}, which "
                          f"must be at least {experts} and divide over devices={devices}; nearest legal values of redundant: "
                          f"{', '.join(str(value - experts) for value in legal)}.")


def to_copies(routing: Routing, copies_EJ: jax.Array, copies: int, num_routed_experts: int,
              first: jax.Array | int = 0) -> Routing:
    """The list of one group with copies in the place of experts: an expert's assignments go round its copies, in the order
    of the list, beginning with copy ``first`` (groups of one token, as in generation, would all begin with the same).

    Args:
      copies_EJ: a layer of :meth:`Placement.copies_LEJ`. copies: P.
      num_routed_experts: E and the experts without computation, which have no copies and follow behind the P.

    Returns:
      Routing whose ``expert_N`` is 0 … P−1, then experts without computation, then nowhere and the queues, as before.
    """
    num_experts, total = copies_EJ.shape[0], num_routed_experts
    nth_N, _ = assign_slots(routing.expert_N, total, capacity=1)
    count_E = jnp.sum(copies_EJ < copies, axis=1, dtype=jnp.int32)

    def placed(expert_N):
        known_N = jnp.minimum(expert_N, num_experts - 1)
        copy_N = copies_EJ[known_N, (nth_N + first) % count_E[known_N]]
        return jnp.where(expert_N < num_experts, copy_N, expert_N + (copies - num_experts))

    passes_N = routing.expert_N > total  # through a queue: see `in_queue`
    expert_N = placed(jnp.where(passes_N, routing.expert_N - (total + 1), routing.expert_N))
    behind = total + 1 + copies - num_experts
    return dataclasses.replace(routing, expert_N=jnp.where(passes_N, expert_N + behind, expert_N).astype(jnp.int32))
