"""How long a step takes, estimated: products at the peak, memory and network at their bandwidths. No TPU is asked.

The network within a slice is a torus: a chip has a link to each neighbour, and a side that closes to a ring can be used
both ways round. With W the bandwidth of one link one way (Austin et al. 2025, How to Scale Your Model, part 3, "Sharded
matrices"; jax-ml.github.io/scaling-book/sharding):

- to gather, reduce or scatter, every device sends its bytes along all sides of its group at once, 2W per ring and W per
  line, where the links at one end have to carry everything: seconds = bytes / Σ_sides (2W or W).
- all-to-all: half of the data of b bytes per device crosses the middle of the longest side, of n chips: n·b / 8W on a ring,
  n·b / 4W on a line.
- to permute: to a neighbour, bytes / W.
- nothing is quicker than a microsecond per hop.

Between slices everything passes a chip's share of its host's network cards. What goes inside slices and between them
is reduced or gathered inside first, so that every chip sends only its part.
"""

import dataclasses
import functools
from typing import Iterable

import numpy as np

from moe_jax.planning.hlo import Collective
from moe_jax.planning.slices import Slice, stand_ins
from moe_jax.sharding import AXES, placed

_HOP_SECONDS = 1e-6

COMPUTE, MEMORY, NETWORK = "compute", "memory", "network"


@dataclasses.dataclass(frozen=True)
class StepTime:
    """An estimate of a step's time, from below: nothing waits, nothing is slower than the figures of the chip.

    Attributes:
      seconds: of one step.
      bound: what it is spent on most: 'compute', 'memory' or 'network'.
      parts_seconds: by name; not all of them add up, some run beside each other.
      basis: where the figure comes from, in words.
    """

    seconds: float
    bound: str
    parts_seconds: dict[str, float]
    basis: str


def step_time(slice_: Slice, sizes: dict[str, int], flops: float, bytes_accessed: float, collectives: Iterable[Collective],
              cycles: float | None = None, kernel_flops: float = 0.0, slice_axis: str = "data") -> StepTime:
    """max(products, memory, overlapped network) + network that nothing overlaps.

    Args:
      collectives: conditional ones are left out.
      sizes: of the mesh axes; slice_axis: ``mesh.slice_axis``.
      flops, bytes_accessed: of one device in one step; hardware's: recomputation and padding included.
      cycles, kernel_flops: the compiler's estimate and the FLOPs of kernels, which it leaves out; shown beside, not used.
    """
    chip = slice_.chip
    peak = chip.peak_bf16_flops / chip.devices_per_chip
    products, memory = flops / peak, bytes_accessed * chip.devices_per_chip / chip.hbm_bytes_per_second
    exposed, hidden = 0.0, 0.0
    for each in collectives:
        if each.conditional:  # hardly ever runs
            continue
        seconds = each.count * collective_seconds(each, slice_, sizes, slice_axis)
        exposed, hidden = (exposed, hidden + seconds) if each.overlapped else (exposed + seconds, hidden)
    device = max(products, memory)
    seconds = max(device, hidden) + exposed
    bound = COMPUTE if products >= memory else MEMORY
    if exposed + max(hidden - device, 0.0) > device:
        bound = NETWORK
    parts = {"products at peak": products, "memory at full bandwidth": memory, "network, exposed": exposed,
             "network, overlapped": hidden}
    basis = ("roofline: the larger of products at the chip's dense bf16 peak, memory traffic at full bandwidth and "
             "overlapped collectives, plus the other collectives; a bound from below, not a measurement")
    if cycles is not None:
        parts["compiler's estimate, without network"] = cycles / chip.clock_hz + kernel_flops / peak
        basis += "; beside it the compiler's estimated cycles, kernels, of which it estimates nothing, at peak"
    return StepTime(seconds, bound, parts, basis)


def collective_seconds(collective: Collective, slice_: Slice, sizes: dict[str, int], slice_axis: str = "data") -> float:
    """Of one execution."""
    if collective.devices <= 1 or not collective.bytes:
        return 0.0
    chip = slice_.chip
    sent = collective.bytes * chip.devices_per_chip  # devices of one chip share its links
    if collective.between_slices:
        return sent / chip.dcn_bytes_per_second
    group = _group(slice_, tuple(sizes[axis] for axis in AXES), slice_axis, collective.axes)
    spans = group.slices > 1 and collective.devices > group.devices // group.slices
    between = 0.0
    if spans:
        exchanged = "all-to-all" in collective.kind or collective.kind == "collective-permute"
        part = (group.slices - 1) / group.slices if exchanged else group.slices / group.devices
        between = sent * part / chip.dcn_bytes_per_second
    return _inside(collective, sent, group, chip.ici_bytes_per_second) + between


@dataclasses.dataclass(frozen=True)
class _Group:
    """Devices that exchange something: how many, of how many slices, and inside one slice the sides of the box that they
    span: (chips, whether it is a ring)."""

    devices: int
    slices: int
    sides: tuple[tuple[int, bool], ...]


@functools.lru_cache(maxsize=1024)
def _group(slice_: Slice, shape: tuple[int, ...], slice_axis: str, axes: tuple[str, ...]) -> _Group:
    """The group along mesh axes that holds device 0. An axis may lie on several sides of the torus, or on a part of one."""
    places = _places(slice_, shape, slice_axis)
    group = places[tuple(slice(None) if axis in axes else 0 for axis in AXES)].ravel()
    coordinates = np.array([device.coords for device in group])
    sides = []
    for place, (length, wraps) in enumerate(zip(slice_.shape, slice_.wraps)):
        chips = len(set(coordinates[:, place].tolist()))
        if chips > 1:
            sides.append((chips, wraps and chips == length))
    return _Group(len(group), len({device.slice_index for device in group}), tuple(sides))


@functools.lru_cache(maxsize=64)
def _places(slice_: Slice, shape: tuple[int, ...], slice_axis: str) -> np.ndarray:
    return placed(dict(zip(AXES, shape)), stand_ins(slice_), slice_axis)


def _inside(collective: Collective, sent: float, group: _Group, link: float) -> float:
    """Seconds within a slice; none between the devices of one chip."""
    if not group.sides:
        return 0.0
    hops = sum(chips // 2 if ring else chips - 1 for chips, ring in group.sides)
    if "all-to-all" in collective.kind:
        data = sent * collective.devices / (collective.devices - 1)
        seconds = max(data * chips / ((8 if ring else 4) * link) for chips, ring in group.sides)
    elif collective.kind == "collective-permute":
        seconds, hops = sent / link, 1
    else:
        seconds = sent / sum(2 * link if ring else link for _, ring in group.sides)
        hops *= 2 if collective.kind == "all-reduce" else 1
    return max(seconds, hops * _HOP_SECONDS)
