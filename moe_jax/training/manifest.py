"""The manifest of a directory: size and SHA-256 of every file, written last, compared before anything is trusted.

Needs neither devices nor Orbax. Orbax restores a flipped bit in its data files without an error; this is what turns
silent damage into a problem with a name.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"

_HASH_BLOCK = 1 << 20


def _canonical(manifest: dict) -> bytes:
    return (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()


def _files(directory) -> dict[str, Any]:
    """Every file of a step by relative path, but for the manifest itself."""
    found, pending = {}, [("", directory)]
    while pending:
        prefix, folder = pending.pop()
        for path in folder.iterdir():
            if path.is_dir():
                pending.append((f"{prefix}{path.name}/", path))
            elif prefix or path.name != MANIFEST:
                found[f"{prefix}{path.name}"] = path
    return found


def _hash(path, flush: bool = False) -> dict:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        if flush and hasattr(file, "fileno"):
            os.fsync(file.fileno())  # a power cut must not empty a file whose hash is about to be recorded
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _hash_all(paths: dict[str, Any], flush: bool = False) -> dict[str, dict]:
    workers = min(8, os.cpu_count() or 1)  # hashlib releases the interpreter's lock
    with concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="checkpoint-hash") as pool:
        return dict(zip(paths, pool.map(lambda path: _hash(path, flush), paths.values())))


def _seal(manifest: dict) -> dict:
    """Adds the hash of the rest, so that damage to the manifest is blamed on the manifest."""
    return {**manifest, "sha256": hashlib.sha256(_canonical(manifest)).hexdigest()}


def write_manifest(directory, step: int) -> None:
    """Hashes every file under `directory` and writes its manifest.json atomically; flushes all of it to the disk."""
    manifest = {"format": FORMAT, "step": step, "files": _hash_all(_files(directory), flush=True)}
    partial = directory / f"{MANIFEST}.partial"
    with partial.open("wb") as file:
        file.write(_canonical(_seal(manifest)))
        file.flush()
        if hasattr(file, "fileno"):
            os.fsync(file.fileno())
    partial.replace(directory / MANIFEST)


def verify(directory, step: int) -> list[str]:
    """Compares every file under `directory` with its manifest; returns the problems, empty when it is good."""
    if not directory.exists():
        return [f"{directory.name} does not exist"]
    try:
        written = (directory / MANIFEST).read_bytes()
        manifest = json.loads(written)
        recorded = manifest["files"]
        seal = manifest.pop("sha256")
        if written != _canonical(_seal(manifest)) or seal != hashlib.sha256(_canonical(manifest)).hexdigest():
            return [f"{MANIFEST}: its own checksum differs"]
    except FileNotFoundError:
        return [f"{MANIFEST}: missing"]
    except OSError as error:
        return [f"{MANIFEST}: {reason_of(error)}"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST}: not readable as a manifest"]
    if manifest["step"] != step:
        return [f"{MANIFEST}: belongs to step {manifest['step']}"]
    # Files that are not in the manifest are no damage: copying tools and network file systems leave their own.
    there = {name: path for name, path in _files(directory).items() if name in recorded}
    problems = [f"{name}: missing" for name in recorded if name not in there]
    try:
        for name, found in _hash_all(there).items():
            if found["bytes"] != recorded[name]["bytes"]:
                problems.append(f"{name}: {found['bytes']} bytes, {recorded[name]['bytes']} were written")
            elif found != recorded[name]:
                problems.append(f"{name}: contents changed since they were written")
    except OSError as error:
        problems.append(reason_of(error))
    return sorted(problems)


_KNOWN_REASONS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "Read-only file system",
    "Permission denied",
    "Input/output error",
    "Too many open files",
)


def reason_of(error: BaseException) -> str:
    """One line from an error of the operating system, TensorStore (whose messages run to pages) or JSON."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f": {error.filename}" if error.filename else "")
    text = str(error) or type(error).__name__
    known = [reason for reason in _KNOWN_REASONS if reason.lower() in text.lower()]
    return known[0] if known else " ".join(text.split())[:300]
