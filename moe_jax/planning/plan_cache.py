"""Plans that were compiled before, one JSON file each in ``<cache>/plans``.

The name of a file is a hash of all that decides its content: config, slice, mesh, step, the versions of what compiles,
and the code of this package. A file is written beside its place and renamed: a reader sees a whole one or none.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import moe_jax
from moe_jax.data.token_store import users_cache

log = logging.getLogger("moe_jax")

FORMAT = 1


def key_of(**decides: Any) -> str:
    """The name of a plan, from everything that decides what is in it (JSON values)."""
    text = json.dumps({"format": FORMAT, "code": code_hash(), **decides}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@functools.cache
def code_hash() -> str:
    """Of every source file of this package: a plan made by other code is made again."""
    root, digest = pathlib.Path(moe_jax.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def read(key: str) -> dict[str, Any] | None:
    """The plan of that name; None if there is none, or none that can be read."""
    folder = _folder()
    try:
        found = json.loads((folder / f"{key}.json").read_text(encoding="utf-8")) if folder else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write(key: str, plan: Mapping[str, Any]) -> None:
    """Keeps a plan. Where that cannot be done a warning says so: the plan itself is not lost by it."""
    folder = _folder()
    if folder is None:
        log.warning("this user has no home folder: the plan is not kept (set MOE_JAX_CACHE)")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Two processes may write the same plan: each has a file of its own until it is whole.
        descriptor, partial = tempfile.mkstemp(dir=folder, prefix=f".{key}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(plan, file, indent=1)
            os.replace(partial, folder / f"{key}.json")
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        log.warning("cannot keep the plan in %s: %s", folder, error.strerror or error)


def _folder() -> pathlib.Path | None:
    cache = users_cache()
    return pathlib.Path(cache) / "plans" if cache else None
