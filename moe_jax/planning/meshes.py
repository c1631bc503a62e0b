"""The ways to lay the devices of a slice out along the mesh axes."""

import dataclasses
from collections.abc import Iterator

from moe_jax.config import Config, ConfigError
from moe_jax.sharding import AXES, resolve_mesh


def mesh_text(mesh: dict[str, int]) -> str:
    """``'data 8 x expert 8'``; axes of one device are left out."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one device"


def legal_meshes(config: Config, devices: int, num_slices: int = 1) -> list[Config]:
    """The config once for each way to lay so many devices out along data, fsdp, expert and tensor that
    :func:`moe_jax.sharding.resolve_mesh` accepts, and over whose ``mesh.slice_axis`` several slices divide.

    Raises:
      ConfigError: there is none; with what is wrong with the config's own mesh.
    """
    found = []
    for sizes in _factorisations(devices, len(AXES)):
        candidate = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **dict(zip(AXES, sizes))))
        if getattr(candidate.mesh, config.mesh.slice_axis) % num_slices:
            continue
        try:
            resolve_mesh(candidate, devices)
        except ConfigError:
            continue
        found.append(candidate)
    if not found:
        resolve_mesh(config, devices)
        raise ConfigError(f"no mesh of {devices} devices can run this config; choose another slice or another batch.")
    return found


def _factorisations(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every ordered way to write ``total`` as a product of so many factors."""
    if parts == 1:
        yield (total,)
        return
    for first in (d for d in range(1, total + 1) if total % d == 0):
        yield from ((first, *rest) for rest in _factorisations(total // first, parts - 1))
