"""How the numbers of one tensor of a checkpoint lie in our arrays, and back.

Every layout only moves numbers, so gradients travel through it as the weights do. Going in it gives views where NumPy can,
so that a large tensor is copied in pieces, by whoever writes it; going out it also takes abstract arrays, of which
``jax.eval_shape`` makes the shape a tensor must have.
"""

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]


class Layout(Protocol):
    """``split``: a tensor of the checkpoint -> our arrays, which have these shapes; ``join``: the inverse."""

    def split(self, tensor: np.ndarray, shapes: list[Shape]) -> list[np.ndarray]: ...

    def join(self, arrays: list[Any]) -> Any: ...


def _numpy(array: Any) -> Any:
    """The module that computes with this array."""
    return jnp if isinstance(array, jax.Array) else np


def _bounds(widths: list[int]) -> list[slice]:
    ends = np.cumsum([0, *widths])
    return [slice(int(start), int(end)) for start, end in zip(ends[:-1], ends[1:])]


@dataclasses.dataclass(frozen=True)
class Linear:
    """A torch ``Linear``'s weight ``[out, in]`` <-> ours ``[in…, out…]``, the first ``inputs`` dimensions being the input's.

    Of several arrays the outputs follow one another, the input is the same.
    """

    inputs: int = 1

    def split(self, tensor, shapes):
        rows = _bounds([math.prod(shape[self.inputs :]) for shape in shapes])
        return [tensor[part].T.reshape(shape) for part, shape in zip(rows, shapes)]

    def join(self, arrays):
        matrices = [array.reshape(math.prod(array.shape[: self.inputs]), -1).T for array in arrays]
        return matrices[0] if len(matrices) == 1 else _numpy(arrays[0]).concatenate(matrices)


@dataclasses.dataclass(frozen=True)
class PerHead:
    """A ``Linear``'s weight whose outputs are, head by head, those of several of our arrays ``[in, H, d]``."""

    def split(self, tensor, shapes):
        heads = tensor.reshape(shapes[0][1], -1, tensor.shape[-1])  # [H, all d, in]
        columns = _bounds([shape[2] for shape in shapes])
        return [heads[:, part].transpose(2, 0, 1) for part in columns]

    def join(self, arrays):
        heads = _numpy(arrays[0]).concatenate([array.transpose(1, 2, 0) for array in arrays], axis=1)
        return heads.reshape(-1, heads.shape[-1])


@dataclasses.dataclass(frozen=True)
class Same:
    """The same numbers in the same order; dimensions may be grouped otherwise: ``[H·d]`` <-> ``[H, d]``.

    ``tensor_shape`` of the checkpoint's, if not one dimension for all of ours but the last: ``flat`` joins them all.
    """

    flat: bool = False
    row: bool = False

    def split(self, tensor, shapes):
        return [tensor.reshape(shapes[0])]

    def join(self, arrays):
        array = arrays[0]
        if self.row:
            return array.reshape(1, -1)
        return array.reshape(-1) if self.flat else array


@dataclasses.dataclass(frozen=True)
class Halves:
    """Two of our arrays along the last dimension: one after the other, or in turn (``interleaved``)."""

    interleaved: bool = False

    def split(self, tensor, shapes):
        if self.interleaved:
            return [tensor[..., 0::2], tensor[..., 1::2]]
        return [tensor[..., part] for part in _bounds([shape[-1] for shape in shapes])]

    def join(self, arrays):
        xp = _numpy(arrays[0])
        if self.interleaved:
            return xp.stack(arrays, axis=-1).reshape(*arrays[0].shape[:-1], -1)
        return xp.concatenate(arrays, axis=-1)


LINEAR, SAME, FLAT, PER_HEAD = Linear(), Same(), Same(flat=True), PerHead()
