"""Plans that were compiled before, one JSON file each in ``<cache>/plans``.

The name of a file is a hash of all that decides its content: config, slice, mesh, step, the versions of what compiles,
and the code of this package.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from moe_jax import files
from moe_jax.data.token_store import users_cache

log = logging.getLogger("moe_jax")

FORMAT = 1


def key_of(**decides: Any) -> str:
    """The name of a plan, from everything that decides what is in it (JSON values)."""
    text = json.dumps({"format": FORMAT, "code": files.source_fingerprint(), **decides}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


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
        files.write_text(folder / f"{key}.json", json.dumps(plan, indent=1))
    except files.FileError as error:
        log.warning("the plan is not kept: %s", error)


def _folder() -> pathlib.Path | None:
    cache = users_cache()
    return pathlib.Path(cache) / "plans" if cache else None
