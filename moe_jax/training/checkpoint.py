"""Checkpoints that prove themselves: written in the background, hashed, verified before they are trusted.

A step on disk is one directory, and it appears under its final name only when it is whole:

    checkpoints/step_0000000040/
      state/           arrays as Orbax writes them; any mesh can read them back
      structure.json   path, shape and dtype of every array; what a mismatch is reported against
      metadata.json    what the caller gave: config, data position, versions, ...
      manifest.json    size and SHA-256 of every file above

Orbax alone restores a flipped bit without an error and never falls back to an older step; the manifest is what
turns silent damage into a named one. A directory `step_N.writing` is a save that has not finished, `.deleting`
one that is being removed, `.replaced` an old version of a step that is being written again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pathlib
import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Sequence

import jax

from moe_jax.errors import UserError
from moe_jax.training import processes
from moe_jax.training.manifest import FORMAT, MANIFEST, reason_of, verify, write_manifest
from moe_jax.training.named_arrays import describe, flatten, nest, orbax, parts, read_arrays, to_arrays

STATE, STRUCTURE, METADATA = "state", "structure.json", "metadata.json"

_STEP_NAME = re.compile(r"step_(\d+)")
_LEFTOVER_NAME = re.compile(r"(step_\d+)\.(writing|deleting|replaced)")
_DIFFERENCES_SHOWN = 10

_log = logging.getLogger("moe_jax")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written, read or trusted; the message is one line for the person at the terminal."""


class Restored(NamedTuple):
    """What `Checkpointer.restore` returns: the state on its target devices, the caller's metadata, the step."""

    state: Any
    metadata: dict
    step: int


class Checkpointer:
    """Saves and restores training state under one directory.

    One process per directory writes. Readers (evaluation, generation) pass `read_only=True`, so that they neither
    create the directory nor clean up what a running trainer is writing. With several JAX processes all of them
    call `save`, `restore`, `wait` and `close`; process 0 writes manifests and removes old steps.

    Args:
      directory: where the steps lie; made if missing (and its parents).
      keep: number of newest verified steps that are kept, at least 1.
      read_only: never write, never clean up.
      timeout_seconds: longest wait for one save to reach the disk.

    Raises:
      ValueError: `keep` < 1.
      CheckpointError: the directory cannot be made or cleaned.
    """

    def __init__(
        self, directory: str | os.PathLike, keep: int = 3, *, read_only: bool = False, timeout_seconds: float = 1800.0
    ):
        if keep < 1:
            raise ValueError(f"keep={keep} checkpoints: at least 1 is needed to resume from")
        from etils import epath  # Orbax's own path type: local folders and gs:// buckets alike

        self.directory = epath.Path(os.path.abspath(directory) if "://" not in os.fspath(directory) else directory)
        self.keep = keep
        self.read_only = read_only
        self.timeout_seconds = timeout_seconds
        self._orbax = None
        self._finisher: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._verified: set[int] = set()  # steps whose hashes this process has compared itself
        if not read_only and jax.process_index() == 0:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._clean_leftovers()
            except OSError as error:
                raise CheckpointError(
                    f"Cannot use {self.directory} for checkpoints: {reason_of(error)}. {_advice(error)}"
                ) from error

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception_details) -> None:
        self.close()

    # What is there.

    def steps(self) -> list[int]:
        """The steps under their final name, rising; being listed does not mean being undamaged."""
        if not self.directory.exists():
            return []
        matches = (_STEP_NAME.fullmatch(path.name) for path in self.directory.iterdir())
        return sorted(int(match.group(1)) for match in matches if match)

    def verify(self, step: int) -> list[str]:
        """Reads every file of a step and compares it with the manifest; returns the problems, none when it is good."""
        problems = verify(self._path(step), step)
        (self._verified.discard if problems else self._verified.add)(step)
        return problems

    def latest_verified_step(self) -> int | None:
        """The newest step whose every file matches its manifest, or None."""
        return next((step for step in reversed(self.steps()) if not self.verify(step)), None)

    def read_metadata(self, step: int) -> dict:
        """The metadata given to `save`; reads one small file, needs no devices and no knowledge of the model.

        Raises:
          CheckpointError: there is no such step, or its metadata cannot be read.
        """
        self._require(step)
        return _read_json(self._path(step) / METADATA)

    def fingerprint(self, step: int) -> str:
        """Hex digest of a step's manifest, hence of all its files; reads one small file.

        Raises:
          CheckpointError: there is no such step, or its manifest cannot be read.
        """
        self._require(step)
        try:
            return hashlib.sha256((self._path(step) / MANIFEST).read_bytes()).hexdigest()
        except OSError as error:
            raise CheckpointError(f"Cannot read {self._path(step) / MANIFEST}: {reason_of(error)}") from error

    # Writing.

    def save(self, step: int, state: Any, metadata: dict) -> None:
        """Copies the state off the devices and returns; the writing and hashing go on in the background.

        The caller may donate or overwrite the arrays at once. A step that already exists is replaced, and the old
        version stays until the new one is on disk.

        Args:
          step: training step, >= 0.
          state: a pytree (dicts, NamedTuples, lists) of jax.Arrays of any sharding, typed PRNG keys, NumPy arrays or
            Python numbers.
          metadata: anything `json` can write.

        Raises:
          CheckpointError: this save, or the one before it, failed (disk full, ...). Earlier steps are intact.
          ValueError: a leaf is not an array, or the metadata is not JSON.
        """
        if self.read_only:
            raise CheckpointError(
                f"Checkpoints in {self.directory} were opened read-only; open them without read_only=True to save"
            )
        self.wait()
        if step < 0:
            raise ValueError(f"step={step}: a checkpoint needs a step >= 0")
        try:
            metadata_text = json.dumps(metadata, indent=1)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The metadata of a checkpoint must be JSON: {error}") from error
        arrays, structure = to_arrays(flatten(state))
        staging = self._path(step, ".writing")
        try:
            if jax.process_index() == 0:
                if staging.exists():
                    staging.rmtree()
                staging.mkdir(parents=True)
            processes.barrier(f"checkpoint {step} staged", self.timeout_seconds)
            self._checkpointer().save(staging / STATE, args=orbax().args.PyTreeSave(nest(arrays)))
        except processes.ProcessError:
            self._discard(staging)
            raise
        except Exception as error:
            self._discard(staging)
            raise self._save_error(step, error) from error
        # Not a daemon: a process that ends normally waits for its last checkpoint.
        self._finisher = threading.Thread(
            target=self._finish, args=(step, metadata_text, structure), name=f"checkpoint-{step}"
        )
        self._finisher.start()

    def save_slices(self, step: int, structure: dict[str, dict], metadata: dict,
                    write: Callable[[pathlib.Path], None]) -> None:
        """A step whose arrays the caller writes himself, for states that no memory holds; on disk when this returns.

        Args:
          structure: shape and dtype of every array by path, as :func:`moe_jax.training.named_arrays.to_arrays` has them.
          write: fills the folder of the state (:class:`moe_jax.training.slices.SliceWriter`); one process, local folders.

        Raises:
          CheckpointError: it could not be written; nothing is left of it. Whatever else ``write`` raises.
        """
        self.wait()
        staging = self._path(step, ".writing")
        try:
            (staging / STATE).mkdir(parents=True)
            write(pathlib.Path(staging / STATE))
            self._complete(staging, step, json.dumps(metadata, indent=1), structure)
        except (OSError, ValueError) as error:
            self._discard(staging)
            if isinstance(error, UserError):
                raise
            raise self._save_error(step, error) from error
        except BaseException:
            self._discard(staging)
            raise

    def _complete(self, staging, step: int, metadata_text: str, structure: dict) -> None:
        """Describes and hashes what lies there, and gives the step its final name."""
        (staging / METADATA).write_text(metadata_text)
        (staging / STRUCTURE).write_text(json.dumps({"format": FORMAT, "arrays": structure}, indent=1))
        write_manifest(staging, step)
        self._commit(step)
        self._verified.add(step)

    def wait(self) -> None:
        """Returns once the last save is on disk under its final name, hashed.

        Raises:
          CheckpointError: it failed, or did not finish within `timeout_seconds`.
        """
        if self._finisher is not None:
            with processes.place(self._finisher.name, self.timeout_seconds + 60):
                self._finisher.join(self.timeout_seconds)
            if self._finisher.is_alive():
                raise CheckpointError(
                    f"{self._finisher.name} is still being written to {self.directory} after "
                    f"{self.timeout_seconds:.0f} s; check that file system, then run the same command again"
                )
            self._finisher = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Waits for the last save and releases Orbax's threads; raises what `wait` raises."""
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None

    def _finish(self, step: int, metadata_text: str, structure: dict) -> None:
        """The background half of a save: wait for the arrays, describe and hash them, give the step its final name."""
        staging = self._path(step, ".writing")
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                self._complete(staging, step, metadata_text, structure)
        except BaseException as error:  # handed to the training thread, which stops at its next save or wait
            self._failure = self._save_error(step, error)
            self._discard(staging)
            return
        try:
            if jax.process_index() == 0:
                self._remove_old(step)
        except OSError as error:
            self._failure = CheckpointError(
                f"Old checkpoints in {self.directory} could not be removed: {reason_of(error)}. {_advice(error)}; "
                f"step {step} is saved"
            )

    def _commit(self, step: int) -> None:
        final, replaced = self._path(step), self._path(step, ".replaced")
        if final.exists():
            final.rename(replaced)
        self._path(step, ".writing").rename(final)
        if replaced.exists():
            replaced.rmtree()

    def _remove_old(self, newest: int) -> None:
        """Removes what lies behind the `keep` newest steps whose hashes were compared; others do not count."""
        verified = {newest}
        for step in reversed(self.steps()):
            if step == newest:
                continue
            if len(verified) >= self.keep:
                # Renamed first: a process killed half-way leaves a leftover, not a step that looks damaged.
                self._path(step).rename(self._path(step, ".deleting"))
                self._path(step, ".deleting").rmtree()
                self._verified.discard(step)
            elif step in self._verified or not self.verify(step):
                verified.add(step)

    def _clean_leftovers(self) -> None:
        for path in list(self.directory.iterdir()):
            match = _LEFTOVER_NAME.fullmatch(path.name)
            if not match:
                continue
            final = self.directory / match.group(1)
            if match.group(2) == "replaced" and not final.exists():
                path.rename(final)  # killed between the two renames of _commit: the old version is the good one
            else:
                path.rmtree()

    def _discard(self, staging) -> None:
        """Gives the space of a failed save back; what cannot be removed now is removed at the next start."""
        try:
            if jax.process_index() == 0 and staging.exists():
                staging.rmtree()
        except OSError:
            pass

    # Reading.

    def restore(
        self, abstract_state: Any, step: int | None = None, only: Sequence[str] | None = None
    ) -> Restored | None:
        """Restores the newest step that verifies, or exactly `step`, onto the devices that `abstract_state` names.

        Args:
          abstract_state: the pytree to fill; leaves have shape, dtype and sharding (jax.ShapeDtypeStruct with a
            NamedSharding over the current mesh, whatever mesh the checkpoint was written from). A leaf without a
            sharding is restored uncommitted on the default device.
          step: restore this step or fail, instead of the newest good one.
          only: names of the top-level entries to restore, say ('params',); `abstract_state` then holds exactly these
            and everything else in the checkpoint is left alone.

        Returns:
          (state, metadata, step), or None when there is no checkpoint at all.

        Raises:
          CheckpointError: no step verifies, the asked one is missing or damaged, or its arrays differ from
            `abstract_state` in path, shape or dtype (nothing is padded, cut or cast).
        """
        if not self.read_only:
            self.wait()
        step = self._agree(step)
        if step is None:
            return None
        wanted = flatten(abstract_state)
        saved = _read_json(self._path(step) / STRUCTURE)["arrays"]
        if only is not None:
            saved = self._select(wanted, saved, only, step)
        self._check_structure(wanted, saved, step)
        try:
            leaves = read_arrays(self._path(step) / STATE, wanted, saved)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"Checkpoint of step {step} in {self.directory} could not be read: {reason_of(error)}"
            ) from error
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        return Restored(state, self.read_metadata(step), step)

    def _agree(self, asked: int | None) -> int | None:
        """The step to restore, the same on every process: process 0 reads and hashes, the others are told."""
        if jax.process_count() == 1:
            return self._choose(asked)

        def choose() -> dict:
            try:
                return {"step": self._choose(asked)}
            except CheckpointError as error:
                return {"error": str(error)}

        chosen = processes.of_process_0("the checkpoint to restore", choose, processes.COMPILING)
        if "error" in chosen:
            raise CheckpointError(chosen["error"])
        return chosen["step"]

    def _choose(self, asked: int | None) -> int | None:
        if asked is not None:
            self._require(asked)
            problems = self.verify(asked)
            if problems:
                raise CheckpointError(
                    f"Checkpoint of step {asked} in {self.directory} is damaged ({_few(problems, 3)}); "
                    f"restore another step of {self.steps()}"
                )
            return asked
        damaged: list[tuple[int, list[str]]] = []
        for step in reversed(self.steps()):
            problems = self.verify(step)
            if not problems:
                for bad, found in damaged:
                    _log.warning(
                        "Checkpoint of step %d in %s is damaged (%s): using step %d instead",
                        bad,
                        self.directory,
                        _few(found, 3),
                        step,
                    )
                return step
            damaged.append((step, problems))
        if damaged:
            each = "; ".join(f"step {step}: {_few(found, 1)}" for step, found in damaged)
            raise CheckpointError(
                f"No checkpoint in {self.directory} can be trusted ({each}); put a good copy back, or "
                "move this directory away to start from scratch"
            )
        return None

    def _select(self, wanted: dict, saved: dict, only: Sequence[str], step: int) -> dict:
        if isinstance(only, str):
            raise ValueError(f"only={only!r} is a string; give a sequence of names, ({only!r},)")
        top_level = sorted({path[0] for path in map(parts, saved)})
        absent = [name for name in only if name not in top_level]
        if absent:
            raise CheckpointError(
                f"Checkpoint of step {step} in {self.directory} has no {_few(absent, 5)}; it has {', '.join(top_level)}"
            )
        selected = {path: leaf for path, leaf in saved.items() if parts(path)[0] in only}
        _log.info("Restoring only %s of step %d: %d of %d arrays", ", ".join(only), step, len(selected), len(saved))
        return selected

    def _check_structure(self, wanted: dict, saved: dict, step: int) -> None:
        here = {path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for path, leaf in wanted.items()}
        different, missing, extra = [], [], []
        for path in sorted(here.keys() | saved.keys()):
            if path not in saved:
                missing.append(f"{path}: {describe(here[path])} is not in the checkpoint")
            elif path not in here:
                extra.append(f"{path}: {describe(saved[path])} is only in the checkpoint")
            elif describe(here[path]) != describe(saved[path]):
                different.append(
                    f"{path}: {describe(saved[path])} in the checkpoint, {describe(here[path])} in this run"
                )
        differences = different + missing + extra
        if differences:
            raise CheckpointError(
                f"Checkpoint of step {step} in {self.directory} does not fit this model, "
                f"{len(differences)} arrays differ: {_few(differences, _DIFFERENCES_SHOWN)}. Use the "
                "config it was trained with, or another workdir"
            )

    # Small parts.

    def _path(self, step: int, suffix: str = ""):
        return self.directory / f"step_{step:010d}{suffix}"

    def _require(self, step: int) -> None:
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"No checkpoint of step {step} in {self.directory}; steps there: {there}")

    def _checkpointer(self):
        if self._orbax is None:
            ocp = orbax()
            self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), timeout_secs=int(self.timeout_seconds))
        return self._orbax

    def _save_error(self, step: int, error: BaseException) -> CheckpointError:
        earlier = [earlier for earlier in self.steps() if earlier in self._verified or not self.verify(earlier)]
        resume = f"it resumes from step {earlier[-1]}" if earlier else "no earlier checkpoint exists"
        return CheckpointError(
            f"Checkpoint of step {step} was not written to {self.directory}: {reason_of(error)}. "
            f"{_advice(error)}, then run the same command again ({resume})"
        )


def _read_json(path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path}: {reason_of(error)}") from error


def _few(items: Sequence[str], most: int) -> str:
    rest = f"; and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + rest


def _advice(error: BaseException) -> str:
    reason = reason_of(error)
    if any(word in reason for word in ("space", "quota", "too large")):
        return "Free some space or choose another workdir"
    if any(word in reason for word in ("Read-only", "ermission", "Not a directory", "not permitted")):
        return "Choose a workdir that you may write to"
    return "Check that file system or choose another workdir"
