"""A run directory made from another run's checkpoint: read on the host, written whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import jax
from jax.sharding import SingleDeviceSharding

from moe_jax.config import Config
from moe_jax.training.checkpoint import Checkpointer, Restored
from moe_jax.training.run import RunError, require_checkpoint
from moe_jax.training.state import TrainState, initial_state


def require_absent(target: pathlib.Path, kind: str) -> None:
    """Refuses, with RunError, a directory that holds something. ``kind`` of run, for the message: ``'a rearranged'``."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{target} is there already; {kind} run needs a directory of its own, new or empty.")


@contextlib.contextmanager
def new_run_directory(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder beside ``target`` to write into; it becomes ``target`` when the block ends well, and is removed if not.

    Raises:
      RunError: it cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise RunError(f"Cannot make {target}: {error.strerror or error}. Choose another directory.") from error
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        partial.rename(target)
    except OSError as error:
        raise RunError(f"Cannot write {target}: {error.strerror or error}. Free some space or choose another "
                       f"directory.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def state_on_host(config: Config, vocab_size: int) -> TrainState:
    """The abstract state, all of it in this machine's memory."""
    host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host),
                        jax.eval_shape(lambda: initial_state(config, vocab_size)))


def restore_on_host(workdir: pathlib.Path, config: Config) -> Restored:
    """The newest good checkpoint of a run, in this machine's memory.

    Raises:
      RunError: there is none. CheckpointError: none is good, or it does not fit the config.
    """
    require_checkpoint(workdir)
    checkpointer = Checkpointer(workdir / "checkpoints", read_only=True)
    step = checkpointer.latest_verified_step()
    if step is None:
        return checkpointer.restore({})  # says what is damaged
    return checkpointer.restore(state_on_host(config, checkpointer.read_metadata(step)["vocab_size"]), step)
