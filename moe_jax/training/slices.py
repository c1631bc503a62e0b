"""A state on disk, written and read slice by slice: no more of an array is in memory than the slice.

What is written is a checkpoint as Orbax reads it (plain zarr, one folder per array); what is read may be one of those or
one that Orbax has written.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.training.named_arrays import parts

# One file holds a quarter of what is written at once, within these bounds: a file's numbers are in memory twice while they are
# written, and a restore of a share reads whole files.
SMALLEST_FILE, LARGEST_FILE = 1 << 20, 64 << 20

_METADATA = "_METADATA"


def _tensorstore():
    import tensorstore  # a part of Orbax; not needed to import this package

    return tensorstore


def chunk_shape(shape: Sequence[int], itemsize: int, leading: int = 0) -> tuple[int, ...]:
    """Of one file: single entries of the ``leading`` dimensions, along which an array is written; whole ones of the last, and as
    many of those between as fit."""
    written = math.prod(shape[leading:]) * itemsize
    chunk, room = list(shape), max(SMALLEST_FILE, min(written // 4, LARGEST_FILE)) // itemsize
    for axis in range(len(shape)):
        rest = math.prod(shape[axis + 1 :])
        if axis < leading:
            chunk[axis] = 1
        elif rest * chunk[axis] > room:
            chunk[axis] = max(1, room // max(rest, 1))
        else:
            break
    return tuple(chunk)


class SliceWriter:
    """Writes a new state into an empty folder. Arrays are zeros until they are written; call :meth:`finish` at the end.

    Raises (all methods): OSError or ValueError of tensorstore, where the disk does.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder, self.shapes, self._open = pathlib.Path(folder), {}, {}
        # One file after the other, and none kept: every thread that writes has buffers of its own.
        self._context = _tensorstore().Context({"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1},
                                                "cache_pool": {"total_bytes_limit": 0}})

    def create(self, path: str, shape: Sequence[int], dtype: Any, leading: int = 0) -> None:
        """Makes room for an array of zeros, which takes no space. ``leading``: dimensions along which it will be written one by
        one."""
        ts, dtype = _tensorstore(), np.dtype(dtype)
        chunks = chunk_shape(shape, dtype.itemsize, leading)
        self.shapes[path] = tuple(shape)
        self._open[path] = ts.open({
            "driver": "zarr", "kvstore": {"driver": "file", "path": str(self.folder / ".".join(parts(path)))},
            "metadata": {"shape": list(shape), "chunks": [max(1, c) for c in chunks], "dtype": dtype.str, "fill_value": 0,
                         "order": "C", "filters": None, "compressor": {"id": "zstd", "level": 1}},
        }, create=True, context=self._context).result(), chunks

    def write(self, path: str, index: tuple[int, ...], values: np.ndarray) -> None:
        """``array[index] = values``, in the array's dtype, file by file."""
        store, chunks = self._open[path]
        if not np.shape(values):
            store[index].write(values).result()
            return
        rows = chunks[len(index)]
        for start in range(0, values.shape[0], rows):
            # A copy in the array's dtype and order of these rows alone: values may be a view of anything.
            block = np.ascontiguousarray(values[start : start + rows], store.dtype.numpy_dtype)
            store[(*index, slice(start, start + block.shape[0]))].write(block).result()

    def finish(self) -> None:
        """Writes what says which arrays there are."""
        tree = {}
        for path, shape in self.shapes.items():
            names = parts(path)
            tree[str(tuple(names))] = {
                "key_metadata": [{"key": name, "key_type": 2} for name in names],
                "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False, "write_shape": list(shape)}}
        text = {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": False,
                "custom_metadata": None}
        (self.folder / _METADATA).write_text(json.dumps(text))


class SliceReader:
    """Reads arrays of a state by path; what is smaller than a file of it comes from the file, which is read once."""

    def __init__(self, folder: Any):
        self.folder = folder
        self._whole: dict[str, np.ndarray] = {}
        self._open: dict[str, Any] = {}
        metadata = json.loads((folder / _METADATA).read_text())
        self._ocdbt, self._driver = metadata["use_ocdbt"], "zarr3" if metadata.get("use_zarr3") else "zarr"

    def read(self, path: str, index: tuple[int, ...] = ()) -> np.ndarray:
        """``array[index]``. Where files hold more than one entry of the leading dimensions, the whole array is kept until
        :meth:`forget`."""
        store = self._store(path)
        chunk = store.chunk_layout.read_chunk.shape or ()
        if any(chunk[axis] != 1 and store.shape[axis] != 1 for axis in range(len(index))):
            if path not in self._whole:
                self._whole[path] = store.read().result()
            return self._whole[path][index]
        return store[index].read().result()

    def forget(self) -> None:
        """Gives the memory back."""
        self._whole.clear()
        self._open.clear()

    def _store(self, path: str):
        if path not in self._open:
            name, folder = ".".join(parts(path)), str(self.folder)
            base = {"driver": "file", "path": folder} if "://" not in folder else folder
            store = {"driver": "ocdbt", "base": base, "path": f"{name}/"} if self._ocdbt else (
                {"driver": "file", "path": f"{folder}/{name}/"} if "://" not in folder else f"{folder}/{name}/")
            self._open[path] = _tensorstore().open({"driver": self._driver, "kvstore": store}, open=True).result()
        return self._open[path]


def is_array(leaf: Any) -> bool:
    """Whether a leaf of an abstract state is an array with anything in it, and no key."""
    return not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) and math.prod(leaf.shape) > 0
