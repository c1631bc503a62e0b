"""Safetensors files: eight bytes of length, a JSON header, the numbers. One file, or shards with an index.

Tensors are read one by one, and written one by one into files whose places are laid out before: the library ``safetensors``
writes a file from tensors that are all in memory.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from moe_jax.files import write_json
from moe_jax.interop.settings import InteropError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}
DTYPES = {name: np.dtype(dtype) for name, dtype in _DTYPES.items()}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file. ``offset``: in bytes from the file's beginning."""

    path: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, part: int | None = None) -> np.ndarray:
        """The tensor, or ``tensor[part]``, of which only that is read.

        Raises:
          InteropError: the file cannot be read.
        """
        shape, offset = self.shape, self.offset
        if part is not None:
            shape = shape[1:]
            offset += part * math.prod(shape) * self.dtype.itemsize
        array = np.empty(shape, self.dtype)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                view = memoryview(array.reshape(-1).view(np.uint8))
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise InteropError(f"{self.path} ends in the middle of its tensors; copy it again.")
                    view = view[count:]
        except OSError as error:
            raise InteropError(f"Cannot read {self.path}: {error.strerror or error}.") from error
        return array


def read_header(path: pathlib.Path) -> dict[str, Entry]:
    """The tensors of one file.

    Raises:
      InteropError: there is no such file, it is damaged, or holds a dtype that is not known here.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
            if not 2 <= length <= size - 8:
                raise InteropError(f"{path} is no safetensors file, or cut short; copy it again.")
            header = json.loads(file.read(length))
    except OSError as error:
        raise InteropError(f"Cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise InteropError(f"{path} is no safetensors file: its header is no JSON ({error}).") from error
    entries = {}
    for name, about in header.items():
        if name == "__metadata__":
            continue
        if about["dtype"] not in DTYPES:
            raise InteropError(f"{path}: {name} has the dtype {about['dtype']}; known are {', '.join(DTYPES)}.")
        start, end = about["data_offsets"]
        entry = Entry(path, DTYPES[about["dtype"]], tuple(about["shape"]), 8 + length + start)
        if entry.bytes != end - start or entry.offset + entry.bytes > size:
            raise InteropError(f"{path}: {name} lies outside of the file, or is not as long as its shape; copy it again.")
        entries[name] = entry
    return entries


def read_folder(folder: pathlib.Path) -> dict[str, Entry]:
    """The tensors of a checkpoint: of its index, or of its one file.

    Raises:
      InteropError: there is neither, a file of the index is missing, or the index and the files disagree.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise InteropError(f"{folder} holds neither {SINGLE} nor {INDEX}; only safetensors are read. Convert other files with "
                               f"transformers: save_pretrained(..., safe_serialization=True).")
        return read_header(folder / SINGLE)
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InteropError(f"Cannot read {index}: {error!r}.") from error
    files = sorted(set(places.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise InteropError(f"{folder}: {len(missing)} of {len(files)} files of {INDEX} are missing: {', '.join(missing)}.")
    headers = {name: read_header(folder / name) for name in files}
    lost = [name for name, file in places.items() if name not in headers[file]]
    if lost:
        raise InteropError(f"{folder}: {INDEX} names tensors that their files do not hold: {', '.join(lost)}.")
    # What a file holds beyond the index is not passed over: it shows up as surplus.
    return {name: entry for entries in headers.values() for name, entry in entries.items()}


class Writer:
    """The files of a checkpoint, laid out at once and filled in any order.

    Args:
      folder: an existing one.
      tensors: name -> (shape, dtype), in the order in which they shall lie.
      shard_bytes: no file holds more, but for a single tensor that is larger.

    Raises:
      FileError, OSError: it cannot be written.
    """

    def __init__(self, folder: pathlib.Path, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]], shard_bytes: int):
        shards: list[dict[str, tuple[tuple[int, ...], np.dtype]]] = [{}]
        filled = 0
        for name, (shape, dtype) in tensors.items():
            size = math.prod(shape) * np.dtype(dtype).itemsize
            if shards[-1] and filled + size > shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = shape, np.dtype(dtype)
            filled += size
        names = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
                                                   for i in range(len(shards))]
        self.entries: dict[str, Entry] = {}
        for name, shard in zip(names, shards):
            self.entries |= _lay_out(folder / name, shard)
        if len(shards) > 1:
            total = sum(entry.bytes for entry in self.entries.values())
            write_json(folder / INDEX, {"metadata": {"total_size": total},
                                        "weight_map": {name: entry.path.name for name, entry in self.entries.items()}})

    def write(self, name: str, values: np.ndarray, part: int | None = None) -> None:
        """``tensor = values``, or ``tensor[part] = values``, in the tensor's dtype."""
        entry = self.entries[name]
        shape = entry.shape if part is None else entry.shape[1:]
        if values.shape != shape:
            raise ValueError(f"{name}: {values.shape} where {shape} is expected")
        with entry.path.open("r+b") as file:
            file.seek(entry.offset + (part or 0) * math.prod(shape) * entry.dtype.itemsize * (part is not None))
            file.write(np.ascontiguousarray(values, entry.dtype).reshape(-1).view(np.uint8).data)


def _lay_out(path: pathlib.Path, tensors: dict[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, Entry]:
    header, start = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, dtype) in tensors.items():
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)
    return {name: Entry(path, dtype, tuple(shape), 8 + len(text) + header[name]["data_offsets"][0])
            for name, (shape, dtype) in tensors.items()}


def write_file(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
    """One file with these arrays. Raises FileError, OSError."""
    path = pathlib.Path(path)
    entries = _lay_out(path, {name: (array.shape, array.dtype) for name, array in arrays.items()})
    with path.open("r+b") as file:
        for name, array in arrays.items():
            file.seek(entries[name].offset)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
