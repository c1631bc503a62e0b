"""The tensors of a checkpoint as numbers, whatever they are stored as: bf16, FP8 with block scales, MXFP4."""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from moe_jax.interop.safetensors_files import Entry
from moe_jax.interop.settings import InteropError

_FP8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
_SCALE, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"
# The sixteen numbers of four bits (OCP Microscaling, E2M1).
_FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclasses.dataclass(frozen=True)
class Plain:
    """A tensor that is stored as it is."""

    entry: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def read(self, part: int | None = None) -> np.ndarray:
        """The numbers, or those of ``tensor[part]``."""
        return self.entry.read(part)


@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """``[out, in]`` in FP8, every block of it times a number of its own; blocks at the edges are cut (DeepSeek-V3 §3.3)."""

    entry: Entry
    scale: Entry
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def read(self, part: int | None = None) -> np.ndarray:
        """fp32."""
        return scaled_by_block(self.entry.read(part), self.scale.read(part), self.block)


@dataclasses.dataclass(frozen=True)
class Microscaled:
    """``[E, out, in/32, 16]`` bytes of two numbers of four bits, every 32 of them times a power of two; as a tensor
    ``[E, in, out]``."""

    blocks: Entry
    scales: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        experts, rows, groups, _ = self.blocks.shape
        return experts, 32 * groups, rows

    def read(self, part: int | None = None) -> np.ndarray:
        """fp32."""
        values = from_mxfp4(self.blocks.read(part), self.scales.read(part))
        return np.swapaxes(values, -1, -2)


Stored = Plain | BlockScaled | Microscaled


def scaled_by_block(values: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """fp32 ``[out, in]``: ``values[i, j] · scale[i // b0, j // b1]``."""
    rows, columns = values.shape
    result = values.astype(np.float32)
    for i in range(scale.shape[0]):  # row by row of blocks: no second array of the whole size
        here = np.repeat(scale[i].astype(np.float32), block[1])[:columns]
        result[i * block[0] : (i + 1) * block[0]] *= here[None, :]
    return result


def from_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """fp32 ``[..., out, in]`` of ``blocks [..., out, in/32, 16]`` and ``scales [..., out, in/32]``; the low half of a byte
    comes first (GPT-OSS)."""
    values = np.empty((*blocks.shape[:-1], 16, 2), np.float32)
    values[..., 0], values[..., 1] = _FP4[blocks & 15], _FP4[blocks >> 4]
    values = values.reshape(*blocks.shape[:-1], 32)
    # A byte of 255 is no number; ldexp of it is infinite, which no check of finiteness passes over.
    values *= np.ldexp(np.float32(1), scales.astype(np.int32) - 127)[..., None]
    return values.reshape(*blocks.shape[:-2], -1)


def stored_tensors(entries: dict[str, Entry], settings: dict[str, Any], where: str = "config.json") -> dict[str, Stored]:
    """The tensors of a checkpoint by the names they have when they are not quantised.

    Raises:
      InteropError: quantised in another way, or FP8 without scales or with a grid of another size.
    """
    quantisation = settings.get("quantization_config") or {}
    method = quantisation.get("quant_method")
    if method not in (None, "fp8", "mxfp4"):
        raise InteropError(f"{where}: quantization_config.quant_method={method!r} is not supported; supported are 'fp8' (with "
                           f"weight_block_size), 'mxfp4', and weights that are not quantised.")
    block = tuple(quantisation.get("weight_block_size") or ())
    found: dict[str, Stored] = {}
    used: set[str] = set()
    for name, entry in entries.items():
        if name.endswith(_BLOCKS) and name.removesuffix(_BLOCKS) + _SCALES in entries and entry.dtype == np.uint8:
            scales = entries[name.removesuffix(_BLOCKS) + _SCALES]
            if len(entry.shape) != 4 or entry.shape[-1] != 16 or scales.shape != entry.shape[:-1]:
                raise InteropError(f"{name} {list(entry.shape)} and its scales {list(scales.shape)} are no MXFP4, which has [experts, "
                                   f"outputs, inputs / 32, 16] and the same without the 16.")
            found[name.removesuffix(_BLOCKS)] = Microscaled(entry, scales)
            used |= {name, name.removesuffix(_BLOCKS) + _SCALES}
        elif entry.dtype in _FP8:
            found[name] = _block_scaled(name, entry, entries.get(name + _SCALE), block, where)
            used |= {name, name + _SCALE}
    return {**{name: Plain(entry) for name, entry in entries.items() if name not in used}, **found}


def _block_scaled(name: str, entry: Entry, scale: Entry | None, block: tuple[int, ...], where: str) -> BlockScaled:
    if scale is None:
        raise InteropError(f"{name} is stored in FP8, but {name + _SCALE}, which scales it, is missing.")
    if len(block) != 2 or len(entry.shape) != 2:
        raise InteropError(f"{where}: quantization_config.weight_block_size={list(block)}: {name} {list(entry.shape)} is stored in "
                           f"FP8, of which only matrices with scales of blocks, such as [128, 128], are read.")
    grid = tuple(-(-size // width) for size, width in zip(entry.shape, block))
    if scale.shape != grid:
        raise InteropError(f"{name + _SCALE} has the shape {list(scale.shape)}; blocks of {list(block)} cut {list(entry.shape)} into "
                           f"{list(grid)}.")
    return BlockScaled(entry, scale, block)
