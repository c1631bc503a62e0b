"""A run directory and what belongs to it: the config it was started with, the mesh, the data, the checkpoints."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from moe_jax import files
from moe_jax.config import Config, ConfigError, differences, with_defaults
from moe_jax.data.batches import Data, join_rows, open_data
from moe_jax.errors import UserError
from moe_jax.nn.moe import dispatcher_of
from moe_jax.sharding import local_rows, make_mesh, resolve_mesh
from moe_jax.training import processes
from moe_jax.training.checkpoint import Checkpointer, CheckpointError, Restored
from moe_jax.training.metrics import versions
from moe_jax.training.state import TrainState, abstract_state, table_size

log = logging.getLogger("moe_jax")


class RunError(UserError, RuntimeError):
    """A run directory that cannot be used; the message is one line for people."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What training, evaluation and generation share.

    vocab_size: rows of the embedding table (the vocabulary, rounded up).
    """

    config: Config
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    data: Data
    vocab_size: int

    @property
    def checkpoints(self) -> pathlib.Path:
        return self.workdir / "checkpoints"

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of the training batch of a step: those of its devices; all of them if it is alone."""
        return join_rows([self.data.train.batch(step, rows) for rows in self._rows])

    def validation_batches(self, max_batches: int | None, objective: bool = False) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of the validation batches: of the text, or under the ``objective`` of training if it is
        another than the causal one (:class:`moe_jax.data.batches.Data`)."""
        source = self.data.objective_validation if objective else self.data.validation
        for parts in zip(*(source.evaluation_batches(max_batches, rows) for rows in self._rows)):
            yield join_rows(parts)

    @functools.cached_property
    def _rows(self) -> list[slice]:
        return local_rows(self.mesh, self.config.data.batch_size)

    def abstract_state(self) -> TrainState:
        return abstract_state(self.config, self.vocab_size, self.mesh)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file of a run, whole or not at all; process 0 writes for all. Raises FileError."""
    if jax.process_index() == 0:
        files.write_json(path, value)


def write_arrays(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz file of a run, whole or not at all; process 0 writes for all. Raises FileError."""
    if jax.process_index() == 0:
        files.write_arrays(path, arrays)


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
    """The resolved config a run was started with.

    Raises:
      RunError: there is none, or it is not readable.
    """
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"{workdir} is not a run directory: it has no config.json. Give the --workdir of a training "
                       f"run.") from None
    except NotADirectoryError:
        raise RunError(f"{workdir} is a file, not a run directory. Give the --workdir of a training run.") from None
    except (OSError, ValueError) as error:
        raise RunError(f"Cannot read {path}: {error}. Put a good copy back, or choose another --workdir.") from error
    if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
        raise RunError(f"Cannot read {path}: it holds no config. Put a good copy back, or choose another --workdir.")
    return config


def check_workdir(workdir: pathlib.Path, config: Config, allow_config_change: bool) -> None:
    """Refuses a directory that belongs to another config; writes nothing.

    Raises:
      RunError: it does (the message says which settings differ), and changes were not allowed.
    """
    if not (workdir / "config.json").exists():
        return
    changed = differences(with_defaults(read_config(workdir)), config.to_dict())
    if changed and not allow_config_change:
        shown = "; ".join(changed[:8]) + (f"; and {len(changed) - 8} more" if len(changed) > 8 else "")
        raise RunError(f"{workdir} belongs to a run with another config ({shown}). Choose another --workdir, or "
                       f"pass --allow-config-change to continue it with the new settings.")
    for line in changed:
        log.warning("continuing with a changed setting: %s", line)


def record_config(workdir: pathlib.Path, config: Config) -> None:
    """Makes the directory this config's. Called once everything the config names has been opened, so that a run that
    could not start leaves a directory that the corrected command may use."""
    write_json(workdir / "config.json", config.to_dict())
    write_json(workdir / "versions.json", versions())


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the directory and holds it for one trainer: a second would clean up the first one's checkpoints.

    The lock is the operating system's, on ``<workdir>/.lock``, and ends with the process, however that ends.

    Raises:
      RunError: another process holds it (the message names it), or the directory cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    path = workdir / ".lock"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"Cannot make {workdir}: {error.strerror or error}. Choose another --workdir.") from error
    try:
        file = path.open("a+")
    except OSError as error:
        raise RunError(f"Cannot write {path}: {error.strerror or error}. Choose a --workdir that you may write to.") from error
    with file:
        _lock(file, workdir)
        yield


def _lock(file, workdir: pathlib.Path) -> None:
    try:
        if fcntl is None:
            raise OSError("this system has no file locks")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise RunError(f"{workdir} is in use: {holder} is training there. Wait for it, end it, or choose another "
                       f"--workdir.") from None
    except OSError as error:  # some network file systems
        log.warning("%s cannot be locked (%s): make sure that nothing else trains there", workdir,
                    error.strerror or error)
        return
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same, only without a name
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def open_run(config: Config, workdir: pathlib.Path) -> Run:
    """Puts the mesh in place (``jax.set_mesh``) and opens the data. Compiled programs are kept in the workdir.

    Raises:
      ConfigError, CorpusError. ProcessError: several processes that are not joined, or that find different data.
    """
    prepares_data = processes.is_first_of_host()
    sizes = resolve_mesh(config, jax.device_count())
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compilation_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    mesh = make_mesh(sizes, slice_axis=config.mesh.slice_axis)
    jax.set_mesh(mesh)
    data = _open_data_in_turns(config, workdir, prepares_data)
    return Run(config, workdir, mesh, data, table_size(config, data.vocabulary.vocab_size))


def _open_data_in_turns(config: Config, workdir: pathlib.Path, is_first: bool) -> Data:
    """The data; where a host has several processes, the first prepares what is missing and the others find it."""
    with processes.place("preparing the data", processes.PREPARING):
        data = open_data(config.data, str(workdir)) if is_first else None
    processes.barrier("the data is prepared", processes.PREPARING)
    with processes.place("opening the data", processes.PREPARING):
        data = open_data(config.data, str(workdir)) if data is None else data
    processes.require_equal("the data is opened", {f"the data of {config.data.source!r}": data.fingerprint})
    return data


def require_equal_processes(config: Config, workdir: pathlib.Path, **options: Any) -> None:
    """Refuses a run whose processes differ in settings, code, packages or run directory; nothing with one process.

    Raises:
      ProcessError: on every process, naming the settings and the processes.
    """
    if not processes.several():
        return
    settings = {f"{section}.{name}": value for section, values in config.to_dict().items() for name, value in values.items()}
    found = versions()
    del found["platform"]  # hosts of one cluster may differ in their kernel
    environment = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    processes.require_equal("the settings of all processes", {
        **settings, **found, **environment, **options, "workdir": str(workdir), "code of moe_jax": files.source_fingerprint()[:12]})


def restore(run: Run, checkpointer: Checkpointer) -> Restored | None:
    """The newest good checkpoint on this mesh, or None.

    Raises:
      CheckpointError: none is good, it does not fit the model, or it was trained on other data.
    """
    restored = checkpointer.restore(run.abstract_state())
    if restored is not None and restored.metadata["data_fingerprint"] not in (None, run.data.fingerprint):
        raise CheckpointError(
            f"The checkpoint of step {restored.step} in {run.checkpoints} was trained on other data or another order of "
            f"it (the corpus, vocabulary, batch shape or data.seed changed); its data position means nothing here. "
            f"Choose another --workdir.")
    return restored


def require_checkpoint(workdir: pathlib.Path) -> None:
    """Raises RunError if the run has no checkpoint yet."""
    if not Checkpointer(workdir / "checkpoints", read_only=True).steps():
        raise RunError(f"{workdir} has no checkpoint yet; train it first: moe-jax train --workdir={workdir} …")


def restore_params(run: Run, abstract: TrainState | None = None, step: int | None = None) -> tuple[Any, jax.Array, int]:
    """Parameters (their running mean if the run keeps one), router bias and step of the newest good checkpoint, or of the
    one of ``step``.

    ``abstract`` says where they shall lie, if not on the run's mesh.

    Raises:
      RunError: there is no checkpoint. CheckpointError: none is good, or it does not fit the config or vocabulary.
    """
    require_checkpoint(run.workdir)
    name = "ema" if run.config.training.ema_decay else "params"
    abstract = run.abstract_state() if abstract is None else abstract
    wanted = {key: value for key, value in abstract.items() if key in (name, "router_bias_LE")}
    restored = Checkpointer(run.checkpoints, read_only=True).restore(wanted, step, only=tuple(wanted))
    if restored.metadata["vocabulary"] != run.data.vocabulary.fingerprint:
        raise CheckpointError(
            f"The checkpoint of step {restored.step} in {run.checkpoints} was trained with another vocabulary than "
            f"{run.config.data.vocabulary!r} is now (the corpus it was trained on has changed, or its file); token ids "
            f"would mean other text. Put the old corpus or vocabulary file back.")
    # None: of a converted checkpoint, of whose training nothing is known.
    if restored.metadata["data_fingerprint"] not in (None, run.data.fingerprint):
        log.warning("the corpus is not the one of training: held-out text may have been trained on")
    return restored.state[name], restored.state["router_bias_LE"], restored.step


def evaluated_params(state: TrainState) -> Any:
    """What is evaluated and sampled from: the running mean of the parameters if there is one."""
    return state.get("ema", state["params"])


def check_config_matches_mesh(config: Config, num_devices: int) -> None:
    """Refuses early, before data is prepared.

    Raises:
      ConfigError: the mesh does not fit; on CPU, where the number of devices is free, the message says which ones do. Or
        its devices cannot exchange rows as evaluation and generation, which are dropless, will ask them to.
    """
    try:
        sizes = resolve_mesh(config, num_devices)
    except ConfigError as error:
        fitting = [str(n) for n in range(1, 65) if _fits(config, n)] if jax.default_backend() == "cpu" else []
        hint = f" Numbers of devices that fit as it is: --devices={', '.join(fitting)}." if fitting else ""
        raise ConfigError(f"{error}{hint}") from None
    if config.moe_layers:
        with jax.set_mesh(make_mesh(sizes, slice_axis=config.mesh.slice_axis)):
            dispatcher_of(config, "dropless")


def _fits(config: Config, num_devices: int) -> bool:
    try:
        resolve_mesh(config, num_devices)
    except ConfigError:
        return False
    return True
