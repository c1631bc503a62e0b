"""Files that are there whole or not at all, and the fingerprint of this package's source files."""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import secrets
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from moe_jax.errors import UserError


class FileError(UserError, OSError):
    """A file that cannot be written."""


@contextlib.contextmanager
def whole(path: str | os.PathLike, durable: bool = False) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` when the block ends well: a reader sees the old file or the new one.

    It lies beside ``path`` until then, under a name of its own, so that several processes may write the same path; its
    folder is made if it is missing. ``durable`` waits until the disk has it.

    Raises:
      FileError: it cannot be written; the message names ``path`` and the reason.
    """
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"Cannot write {path}: {error.strerror or error}. Free some space, or choose another place that you "
                        f"may write to.") from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """UTF-8; generated text may hold lone surrogates, which have none and become '?'. Raises FileError."""
    with whole(path) as file:
        file.write(text.encode("utf-8", errors="replace"))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Raises FileError."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_arrays(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """A compressed .npz file. Raises FileError."""
    with whole(path) as file:
        np.savez_compressed(file, **arrays)


@functools.cache
def source_fingerprint() -> str:
    """Of every source file of this package as it is on this machine, committed or not: 64 hexadecimal digits."""
    package, digest = pathlib.Path(__file__).resolve().parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
