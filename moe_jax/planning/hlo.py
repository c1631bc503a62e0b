"""Reading compiled programs: which collectives run, over which mesh axes, how often, with how many bytes.

XLA's text of a compiled program (``compiled.as_text()``, scheduled: instructions stand in the order they start in) is the
only place where this can be seen, since the compiler inserts, combines and splits collectives. Programs for CPUs and for
TPUs are understood, with the forms that their compilers rewrite collectives to.
"""

import collections
import dataclasses
import math
import re
from typing import Any, Iterator

import numpy as np

from moe_jax.planning.program import Instruction, Program, arrays, parse, size_in_bytes, trip_count

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")

# Names an axis that only a part of takes part: groups that are no product of whole mesh axes.
PART = "?"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program, as one device sees it.

    Attributes:
      kind: a name in :data:`KINDS`.
      axes: mesh axes that a group runs over. Ends in "?" where a group takes in only a part of these axes; () if a group
        is one device.
      dtype: of the data; several are joined by "+".
      bytes: what one device sends in one execution, on a ring: for n devices in a group and data of b bytes per device
        b·(n-1) to gather, b·(n-1)/n to reduce and scatter or to exchange, twice that to reduce to all, b to permute. Of a
        ragged exchange, whose sizes the program learns as it runs, the most that fits in the smaller of its two buffers.
      shape: of the data before the collective, e.g. "bf16[2,8,160,2048]".
      count: executions in one run of the program. A loop whose rounds are decided as it runs counts as one round; of the
        branches of a conditional, the one that sends most counts.
      asynchronous: it is started and waited for in two places of the schedule.
      overlapped: and something is computed in between.
      scope: the path of names in the model, from the program's metadata.
      devices: devices in one group.
      between_slices: it goes over the data-centre network, from slice to slice.
      conditional: it stands in a branch, or in a loop whose rounds are decided as it runs: ``count`` is not certain.
    """

    kind: str
    axes: tuple[str, ...]
    dtype: str
    bytes: int
    shape: str
    count: int = 1
    asynchronous: bool = False
    overlapped: bool = False
    scope: str = ""
    devices: int = 1
    between_slices: bool = False
    conditional: bool = False


def collectives(hlo_text: str, mesh: Any) -> tuple[Collective, ...]:
    """The collectives of a compiled program, in the order they start in; loops are multiplied, not repeated.

    Args:
      hlo_text: ``compiled.as_text()``.
      mesh: the mesh it was compiled for, a ``jax.sharding.Mesh``. Without several slices any mapping ``mesh.shape`` from
        axis to size will do.
    """
    program = parse(hlo_text)
    naming = _Naming.of(mesh, program.devices)
    found = _of_computation(program, program.entry, 1, naming)
    return tuple(found)


# Collectives of a computation


def _of_computation(program: Program, name: str, times: int, naming: "_Naming") -> list[Collective]:
    found = []
    schedule = list(program.computations[name].values())
    for place, instruction in enumerate(schedule):
        found += _of_instruction(program, name, schedule, place, times, naming)
        for called in instruction.called():
            if instruction.opcode.startswith("async-") or called not in program.computations:
                continue
            rounds = trip_count(program, name, instruction) if instruction.opcode == "while" else 1
            inside = _of_computation(program, called, times * (1 if rounds is None else rounds), naming)
            inside = _conditional(inside) if rounds is None else inside
            found += _of_fusion(program, instruction, called, inside, schedule, place)
        branches = [_of_computation(program, branch, times, naming) for branch in instruction.branches()]
        most = max(branches, key=lambda branch: sum(each.bytes * each.count for each in branch), default=[])
        found += _conditional(most)
    return found


def _conditional(found: list[Collective]) -> list[Collective]:
    return [dataclasses.replace(each, conditional=True) for each in found]


def _of_instruction(program, name, schedule, place, times, naming) -> Iterator[Collective]:
    instruction = schedule[place]
    kind, started = instruction.opcode.removesuffix("-start"), instruction.opcode.endswith("-start")
    overlapped = started and _computes(program, schedule[place + 1:_done(schedule, place)])
    if instruction.opcode == "async-start":
        for called in instruction.called():
            for each in _of_computation(program, called, times, naming):
                yield dataclasses.replace(each, asynchronous=True, overlapped=overlapped)
    elif kind in KINDS:
        yield _collective(kind, program.computations[name], instruction, times, naming, started, overlapped)
    elif instruction.opcode == "send" and "_xla_megascale_transfer_type" in instruction.rest:
        yield _between_slices(program, schedule, place, times, naming)


def _collective(kind, computation, instruction, times, naming, started, overlapped) -> Collective:
    count = {"ragged-all-to-all": 2}.get(kind, len(instruction.operands))
    shapes = [computation[operand].shape for operand in instruction.operands[:count] if operand in computation]
    if kind == "ragged-all-to-all":
        shapes = [min(shapes, key=size_in_bytes)]
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?\})\}", instruction.rest)
        axes, devices = naming.of_pairs(_lists(pairs.group(1)) if pairs else [])
    else:
        axes, devices = naming.of_groups(replica_groups(instruction.rest, naming.devices))
    return Collective(kind, axes, _dtypes(shapes), sent_bytes(kind, sum(map(size_in_bytes, shapes)), devices), _plain(shapes),
                      times, started, overlapped, _scope(instruction), devices)


def sent_bytes(kind: str, size: int, devices: int) -> int:
    """What one of ``devices`` sends where each brings data of ``size`` bytes; see :attr:`Collective.bytes`."""
    if kind == "collective-permute":
        return size if devices > 1 else 0
    if kind == "all-gather":
        return size * (devices - 1)
    if kind == "collective-broadcast":
        return size
    share = size * (devices - 1) // devices
    return 2 * share if kind == "all-reduce" else share


def _dtypes(shapes: list[str]) -> str:
    return "+".join(dict.fromkeys(dtype for shape in shapes for dtype, _ in arrays(shape)))


def _plain(shapes: list[str]) -> str:
    """Without layouts, equal ones counted: "3 x bf16[2,4]"."""
    plain = collections.Counter(f"{dtype}[{','.join(map(str, sizes))}]"
                                for shape in shapes for dtype, sizes in arrays(shape))
    return ", ".join(f"{number} x {shape}" if number > 1 else shape for shape, number in plain.items())


def _scope(instruction: Instruction) -> str:
    match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.rest)
    return match.group(1) if match else ""


def _between_slices(program, schedule, place, times, naming) -> Collective:
    """A TPU program talks to other slices through its host: ``send`` and ``recv`` with the collective's name beside."""
    send = schedule[place]
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.rest).group(1).lower().replace("_", "-")
    rendezvous = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', send.rest)
    received = next((at for at, each in enumerate(schedule) if each.opcode == "recv" and rendezvous
                     and rendezvous.group() in each.rest), None)
    done = len(schedule) if received is None else _done(schedule, received)
    axes, devices = naming.between_slices()
    shape = arrays(send.shape)[0]
    text = f"{shape[0]}[{','.join(map(str, shape[1]))}]"
    return Collective(kind, axes, shape[0], sent_bytes(kind, size_in_bytes(text), devices), text, times, True,
                      _computes(program, schedule[place + 1:done]), _scope(send), devices, True)


# What TPUs make of collectives: fusions


def _of_fusion(program, fusion, called, inside, schedule, place) -> list[Collective]:
    """``inside``, the collectives of a called computation, as what they are when the caller is a fusion.

    A TPU fuses an all-reduce with the slice that follows: a reduce-scatter. And it runs a collective beside products by
    fusing it with them: the same collective then stands in one fusion that starts it, in some that go on with it, and
    in one that waits for it. Only the first counts.
    """
    if fusion.opcode != "fusion" or not inside:
        return inside
    body = program.computations[called].values()
    targets = [each.attribute("custom_call_target") for each in body if each.opcode == "custom-call"]
    if "AsyncCollectiveStart" in targets:
        channels = {each.attribute("channel_id") for each in body if each.opcode in KINDS}
        later = range(place + 1, len(schedule))
        done = next((at for at in later if _ends(program, schedule[at], channels)), len(schedule))
        overlapped = _computes(program, schedule[place + 1:done])
        return [dataclasses.replace(each, asynchronous=True, overlapped=overlapped) for each in inside]
    if any('"async_collective_fusion_config"' in each.rest for each in body if each.opcode in KINDS):
        return []
    inside = [dataclasses.replace(each, scope=each.scope or _scope(fusion)) for each in inside]
    if any(each.opcode == "dynamic-slice" for each in body) and fusion.attribute("kind") == "kCustom":
        return [each if each.kind != "all-reduce" else
                dataclasses.replace(each, kind="reduce-scatter", bytes=each.bytes // 2) for each in inside]
    return inside


def _ends(program, instruction, channels) -> bool:
    if instruction.opcode != "fusion":
        return False
    body = program.computations[instruction.attribute("calls")].values()
    return (any(each.attribute("custom_call_target") == "AsyncCollectiveDone" for each in body)
            and any(each.opcode in KINDS and each.attribute("channel_id") in channels for each in body))


# What runs while a collective is under way

# Custom calls that only name memory or promise something.
_NO_WORK = ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "GatherScatterIndicesBitpacked", "Sharding")

# A fusion without a product counts from this size of its result on: less is an index or a counter.
_SOME_WORK = 1 << 14


def _done(schedule: list[Instruction], start: int) -> int:
    """Where the result of ``schedule[start]`` is waited for; behind the last instruction if that is elsewhere (a loop's
    next round)."""
    names = {schedule[start].name}
    for place in range(start + 1, len(schedule)):
        instruction = schedule[place]
        if names & set(instruction.operands):
            if instruction.opcode.endswith("-done"):
                return place
            if instruction.opcode.endswith("-update"):
                names.add(instruction.name)
    return len(schedule)


def _computes(program: Program, schedule: list[Instruction]) -> bool:
    return any(_is_work(program, instruction) for instruction in schedule)


def _is_work(program, instruction) -> bool:
    if instruction.opcode in ("dot", "convolution", "while", "conditional", "call"):
        return True
    large = size_in_bytes(instruction.shape) >= _SOME_WORK
    if instruction.opcode == "custom-call":
        return large and instruction.attribute("custom_call_target") not in _NO_WORK
    if instruction.opcode == "fusion":
        return large or any(each.opcode in ("dot", "convolution")
                            for each in program.computations.get(instruction.attribute("calls"), {}).values())
    return False


# Groups of devices and the axes they run over


def replica_groups(rest: str, devices: int) -> list[list[int]]:
    """The groups in an instruction's attributes, in all ways XLA writes them; one group of all if it names none.

    ``{{0,1},{2,3}}`` lists them; ``[2,4]<=[4,2]T(1,0)`` numbers 0 … 7 as a 4 × 2 array, transposes it and cuts it into
    2 rows of 4; ``mesh['a'=2,'b'=4] {'b'}`` numbers a mesh and groups along axes of it, where ``device_ids`` may be
    transposed first and ``'b':(2)2`` is a part of an axis, here of 2 after 2.
    """
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return _iota(*match.group(2, 3)).reshape(_numbers(match.group(1))).tolist()
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", rest):
        return _along_axes(*match.groups())
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return _lists(match.group(1))
    return [list(range(devices))]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _lists(text: str) -> list[list[int]]:
    return [_numbers(group) for group in re.findall(r"\{([^}]*)\}", text)]


def _iota(shape: str, order: str | None) -> np.ndarray:
    sizes = _numbers(shape)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose(_numbers(order)) if order else ids


def _along_axes(mesh: str, device_ids: str | None, axes: str) -> list[list[int]]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    total = math.prod(sizes.values())
    if device_ids is None:
        ids = np.arange(total)
    elif iota := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$", device_ids):
        ids = _iota(*iota.groups())
    else:
        ids = np.array(_numbers(device_ids))
    # Every axis in three parts: before the part that is named, that part, after it.
    named = {name: (int(before or 1), int(size or sizes[name]))
             for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes)}
    parts, grouped = [], []
    for name, size in sizes.items():
        before, part = named.get(name, (size, 1))
        grouped += [len(parts) + 1] if name in named else []
        parts += [before, part, size // (before * part)]
    others = [place for place in range(len(parts)) if place not in grouped]
    ids = ids.reshape(parts).transpose(others + grouped)
    return ids.reshape(-1, math.prod(parts[place] for place in grouped)).tolist()


@dataclasses.dataclass(frozen=True)
class _Naming:
    """From groups of device numbers to axes of the mesh. ``places`` are the mesh positions that the numbers mean: all,
    or, in a program for several slices, those of the first slice (each slice counts its own devices)."""

    shape: dict[str, int]
    places: np.ndarray
    slices: np.ndarray

    @classmethod
    def of(cls, mesh, devices: int) -> "_Naming":
        shape = dict(mesh.shape)
        total = math.prod(shape.values())
        slices = np.array([getattr(device, "slice_index", 0) or 0 for device in mesh.devices.flat]
                          if devices < total and hasattr(mesh, "devices") else [0] * total)
        places = np.flatnonzero(slices == slices[0])
        if devices not in (len(places), 1):
            raise ValueError(f"the program is for {devices} devices and the mesh {shape} has {total}: it was compiled for "
                             f"another mesh.")
        return cls(shape, places, slices)

    @property
    def devices(self) -> int:
        return len(self.places)

    def _coordinates(self, places: np.ndarray) -> np.ndarray:
        return np.stack(np.unravel_index(places, tuple(self.shape.values())))

    def of_groups(self, groups: list[list[int]]) -> tuple[tuple[str, ...], int]:
        """The axes along which the devices of a group differ, and the devices of a group."""
        devices = max(map(len, groups))
        full = [self._coordinates(self.places[group]) for group in groups if len(group) == devices]
        axes = self._differing(np.stack(full))
        whole = math.prod(len(set(self._coordinates(self.places)[list(self.shape).index(axis)])) for axis in axes)
        return axes if devices == whole else (*axes, PART), devices

    def of_pairs(self, pairs: list[list[int]]) -> tuple[tuple[str, ...], int]:
        """The axes that a permutation crosses, and the devices it could reach along them."""
        pairs = [pair for pair in pairs if pair[0] != pair[1]]
        if not pairs:
            return (), 1
        axes = self._differing(np.stack([self._coordinates(self.places[pair]) for pair in pairs]))
        return axes, math.prod(self.shape[axis] for axis in axes)

    def _differing(self, coordinates: np.ndarray) -> tuple[str, ...]:
        """``coordinates [groups, axes, devices]``"""
        differs = (coordinates != coordinates[:, :, :1]).any(axis=(0, 2))
        return tuple(axis for axis, differ in zip(self.shape, differs) if differ)

    def between_slices(self) -> tuple[tuple[str, ...], int]:
        """The axes along which the slice changes, and the number of slices."""
        slices = self.slices.reshape(tuple(self.shape.values()))
        axes = tuple(axis for place, axis in enumerate(self.shape) if (np.diff(slices, axis=place) != 0).any())
        return axes, len(set(self.slices.tolist()))
