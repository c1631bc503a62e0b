"""TPU slices by their product names: how many chips of which kind, how they are wired, what they can do.

A slice is named as in the shop, ``v5p-128``, by its shape, ``v5p:4x4x4``, or as several of one kind joined by the data
centre's network, ``2x v6e-256``.
"""

import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import re
import sys

from moe_jax.config import ConfigError
from moe_jax.errors import UserError
from moe_jax.training.metrics import peak_flops_per_device


class PlanError(UserError, RuntimeError):
    """A plan that cannot be made; the message is one line for people."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU; everything per chip.

    Attributes:
      name: v4, v5e, v5p, v6e or tpu7x.
      peak_bf16_flops: dense, FLOP/s.
      hbm_bytes: of memory that programs can use.
      hbm_bytes_per_second: to and from it.
      ici_bytes_per_second: of one link between neighbouring chips, in one direction.
      ici_links: of a chip; two for each dimension of the torus.
      dcn_bytes_per_second: a chip's share of its host's network cards, in one direction: between slices.
      clock_hz: of the cores.
      devices_per_chip: JAX devices. v4 and v5p run their two cores as one device (megacore), tpu7x has two devices.
    """

    name: str
    peak_bf16_flops: float
    hbm_bytes: int
    hbm_bytes_per_second: float
    ici_bytes_per_second: float
    ici_links: int
    dcn_bytes_per_second: float
    clock_hz: float
    devices_per_chip: int = 1

    @property
    def dimensions(self) -> int:
        """Of the torus."""
        return self.ici_links // 2


@dataclasses.dataclass(frozen=True)
class _Family:
    """How one kind of TPU is sold.

    device_kind: JAX's name.
    cores_per_chip: the number in a product's name counts cores.
    shapes: legal ones of less than a cube of 4x4x4 (3D), or all of them (2D); each with sides in ascending order.
    most_chips: of one slice; 3D slices from a cube on are any whole number of cubes up to it.
    options: for libtpu.
    """

    chip: Chip
    device_kind: str
    cores_per_chip: int
    shapes: tuple[tuple[int, ...], ...]
    most_chips: int
    options: tuple[tuple[str, str], ...] = ()


_SQUARE = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBIC = ((1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_GIB = 2**30


def _chip(name, device_kind, gib, hbm, ici, links, dcn, matrix_units, devices=1):
    # The peak is that of the table by which a run's MFU is told. A matrix unit is given by its side; its elements each do a
    # multiply-add per cycle.
    count, side = matrix_units
    peak = peak_flops_per_device(device_kind)[0]
    return Chip(name, peak * devices, int(gib * _GIB), hbm, ici, links, dcn, peak / (2 * count * side**2), devices)


# Memory: what libtpu 0.0.42 says is available when it refuses a program; Google's pages, docs.cloud.google.com/tpu/docs/
# {v4,v5e,v5p,v6e,tpu7x}, say 32, 16, 95, 32 and 192 GB, of which the runtime keeps some. Bandwidths of memory, of one
# link one way and of the data-centre network: Austin et al. 2025, How to Scale Your Model (jax-ml.github.io/scaling-book/
# tpus, "TPU specs"); its links are 0.9 of the figure on Google's pages (v5p: 1200 GB/s = 6 links x 2 ways x 100 GB/s).
# Matrix units of a device: the same pages; where they differ (v6e: 2 or 4), and for tpu7x, as many as libtpu's own
# estimates of cycles need. Shapes: the same pages of Google's, "Configurations". What the number in a name counts: v4 and
# v5p TensorCores ("v5p-128 is 4x4x4"), v5e and v6e chips, which have one core (the same pages); tpu7x TensorCores again
# (XPK and MaxText: tpu7x-128 is 4x4x4).
_FAMILIES = {family.chip.name: family for family in (
    _Family(_chip("v4", "TPU v4", 30.75, 1.2e12, 4.5e10, 6, 6.25e9, (8, 128)), "TPU v4", 2, _CUBIC, 4096,
            (("chip_config_name", "megacore"),)),
    _Family(_chip("v5e", "TPU v5 lite", 15.75, 8.2e11, 4.5e10, 4, 3.125e9, (4, 128)), "TPU v5 lite", 1, _SQUARE, 256),
    _Family(_chip("v5p", "TPU v5", 95.74, 2.8e12, 9e10, 6, 6.25e9, (8, 128)), "TPU v5", 2, _CUBIC, 6144,
            (("chip_config_name", "megacore"),)),
    _Family(_chip("v6e", "TPU v6 lite", 31.25, 1.6e12, 9e10, 4, 1.25e10, (4, 256)), "TPU v6 lite", 1, _SQUARE, 256),
    _Family(_chip("tpu7x", "TPU7x", 2 * 94.75, 7.4e12, 9e10, 6, 1.25e10, (4, 256), devices=2), "TPU7x", 2, _CUBIC, 9216),
)}
_ALIASES = {"v5litepod": "v5e"}


@dataclasses.dataclass(frozen=True)
class Slice:
    """One or several slices of one kind.

    Attributes:
      name: as a product, '2x v6e-256'.
      topology: the shape of one slice, in chips: '16x16'.
      num_slices: joined by the data-centre network.
      chips, devices: of all slices together.
      chip: what one can do.
    """

    name: str
    topology: str
    num_slices: int
    chips: int
    devices: int
    chip: Chip

    @property
    def shape(self) -> tuple[int, ...]:
        """Chips along each side of one slice."""
        return tuple(map(int, self.topology.split("x")))

    @property
    def devices_per_slice(self) -> int:
        return self.devices // self.num_slices

    @property
    def hbm_bytes_per_device(self) -> int:
        return self.chip.hbm_bytes // self.chip.devices_per_chip

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Which sides close to a ring: those of 16 chips on v5e and v6e; on 3D tori all from a whole cube on (Google's
        pages on v4 and v5e; How to Scale Your Model, "TPU networking")."""
        if self.chip.dimensions == 2:
            return tuple(side == 16 for side in self.shape)
        return (all(side % 4 == 0 for side in self.shape),) * len(self.shape)


_NAME = re.compile(r"(?:(?P<count>\d+)\s*[x*]\s*)?(?P<family>[a-z]\w*?)(?:-(?P<size>\d+)|:(?P<shape>\d+(?:x\d+)*))")


def parse_slice(text: str) -> Slice:
    """``'v5p-128'`` (64 chips), ``'v5p:4x4x4'``, ``'2x v6e-256'``: the slice of that name.

    Raises:
      ConfigError: there is no such slice; with the nearest ones there are.
    """
    match = _NAME.fullmatch(text.strip().lower())
    if not match:
        raise ConfigError(f"slice={text!r}: is not the name of TPUs; wanted is a product such as v5p-128, a topology such "
                          f"as v5p:4x4x4, or several slices, 2x v6e-256. Kinds: {', '.join(_FAMILIES)}.")
    name = _ALIASES.get(match["family"], match["family"])
    if name not in _FAMILIES:
        raise ConfigError(f"slice={text!r}: there are no TPUs {match['family']!r}; kinds: {', '.join(_FAMILIES)} "
                          f"(v5litepod is v5e).")
    family, count = _FAMILIES[name], int(match["count"] or 1)
    if count < 1:
        raise ConfigError(f"slice={text!r}: the number of slices must be at least 1.")
    if match["size"]:
        shape = _shape_of_size(text, family, int(match["size"]))
    else:
        shape = _checked_shape(text, family, tuple(map(int, match["shape"].split("x"))))
    chips = math.prod(shape)
    product = f"{name}-{chips * family.cores_per_chip}"
    if shape != _by_chips(name)[chips]:
        product = f"{name}:{_joined(shape)}"
    return Slice(product if count == 1 else f"{count}x {product}", _joined(shape), count, count * chips,
                 count * chips * family.chip.devices_per_chip, family.chip)


def _joined(shape):
    return "x".join(map(str, shape))


def _as_written(shape):
    """Google writes a flat 3D slice 2x2x1 and all others with ascending sides."""
    return (2, 2, 1) if shape == (1, 2, 2) else shape


@functools.cache
def _shapes(name: str) -> tuple[tuple[int, ...], ...]:
    """All legal shapes of one slice."""
    family = _FAMILIES[name]
    shapes = [_as_written(shape) for shape in family.shapes]
    if family.chip.dimensions == 3:
        cubes = family.most_chips // 64
        for a, b in itertools.combinations_with_replacement(range(1, cubes + 1), 2):
            shapes += [(4 * a, 4 * b, 4 * c) for c in range(b, cubes // (a * b) + 1)]
    return tuple(shapes)


@functools.cache
def _by_chips(name: str) -> dict[int, tuple[int, ...]]:
    """The shape that a product's name means: the most compact one of its number of chips."""
    return {math.prod(shape): shape for shape in sorted(_shapes(name), key=sum, reverse=True)}


def larger_slices(slice_: Slice) -> list[Slice]:
    """Slices of the same kind, and as many of them, with more chips; ascending."""
    name, most = slice_.chip.name, slice_.chips // slice_.num_slices
    count = "" if slice_.num_slices == 1 else f"{slice_.num_slices}x "
    return [parse_slice(f"{count}{name}:{_joined(shape)}") for chips, shape in sorted(_by_chips(name).items()) if chips > most]


def _shape_of_size(text, family, size):
    cores, shapes = family.cores_per_chip, _by_chips(family.chip.name)
    if size % cores == 0 and size // cores in shapes:
        return shapes[size // cores]
    sizes = sorted(chips * cores for chips in shapes)
    near = [s for s in sizes if s < size][-2:] + [s for s in sizes if s > size][:2]
    counts = "TensorCores, two per chip" if cores == 2 else "chips"
    raise ConfigError(f"slice={text!r}: {family.chip.name} is not sold in this size (the number counts {counts}); nearest: "
                      f"{', '.join(f'{family.chip.name}-{s} ({_joined(shapes[s // cores])})' for s in near)}.")


def _checked_shape(text, family, shape):
    legal = _shapes(family.chip.name)
    if shape in legal:
        return shape
    chips, ordered = math.prod(shape), _as_written(tuple(sorted(shape)))
    if ordered in legal:
        near = [ordered]
    else:
        # By number of chips, then by likeness of shape.
        distance = lambda s: (abs(math.log(math.prod(s) / max(chips, 1))), abs(sum(s) - sum(shape)))
        near = sorted(legal, key=distance)[:3]
    kind = f"{family.chip.dimensions} sides" + (", from 4x4x4 on multiples of 4" if family.chip.dimensions == 3 else "")
    raise ConfigError(f"slice={text!r}: there is no such topology (ascending, {kind}; at most {family.most_chips} chips); "
                      f"nearest: {', '.join(f'{family.chip.name}:{_joined(s)}' for s in near)}.")


# What libtpu must find in the environment so that it neither looks for a TPU nor prints anything.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
}

INSTALL_LIBTPU = "pip install 'moe_jax[tpu]'"


def prepare_environment() -> None:
    """Lets this process plan on its CPU, whatever else the machine has. Call it before JAX starts its backends."""
    os.environ.update(_ENVIRONMENT)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # has read the environment
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


@dataclasses.dataclass(frozen=True)
class _StandIn:
    """What laying out a mesh asks of a device."""

    id: int
    coords: tuple[int, int, int]
    core_on_chip: int
    slice_index: int
    process_index: int
    device_kind: str
    platform: str = "tpu"


def stand_ins(slice_: Slice) -> list[_StandIn]:
    """As :func:`tpu_devices`, without libtpu: enough to lay out a mesh (:func:`moe_jax.sharding.placed`), not to compile."""
    sides = (*slice_.shape, 1)[:3]
    kind, cores, found = _FAMILIES[slice_.chip.name].device_kind, slice_.chip.devices_per_chip, []
    for number in range(slice_.num_slices):
        for z, y, x, core in itertools.product(*map(range, reversed(sides)), range(cores)):
            host = (x // 2, y // 2, z, number)
            found.append(_StandIn(len(found), (x, y, z), core, number, hash(host) % 2**31, kind))
    return found


def tpu_devices(slice_: Slice) -> list:
    """Devices of the slice, which need not exist: programs can be compiled for them, not run. Slices follow each other.

    Raises:
      PlanError: libtpu, the compiler for TPUs, is not installed or refuses.
    """
    if not has_libtpu():
        raise PlanError(f"libtpu, the compiler for TPUs, is not installed; install it with: {INSTALL_LIBTPU}")
    prepare_environment()
    from jax.experimental import topologies

    family = _FAMILIES[slice_.chip.name]
    options = dict(family.options)
    if slice_.shape == (1, 1):
        options["chips_per_host_bounds"] = (1, 1, 1)
    if slice_.num_slices > 1:
        options["num_slices"] = slice_.num_slices
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=f"{slice_.chip.name}:{slice_.topology}",
                                                **options)
    except Exception as error:  # whatever libtpu raises: it has no class of its own
        raise PlanError(f"libtpu cannot make the slice {slice_.name} ({slice_.topology}): {' '.join(str(error).split())}. "
                        f"Another version of it may: {INSTALL_LIBTPU}") from error
    devices = list(topology.devices)
    if len(devices) != slice_.devices or devices[0].device_kind != family.device_kind:
        raise PlanError(f"libtpu made {len(devices)} devices {devices[0].device_kind!r} of the slice {slice_.name}, wanted "
                        f"are {slice_.devices} of {family.device_kind!r}; install the libtpu that JAX asks for: "
                        f"{INSTALL_LIBTPU}")
    return devices
