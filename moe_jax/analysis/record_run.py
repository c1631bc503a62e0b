"""The records of a run: every saved step recorded once, on the same tokens, and kept in ``<workdir>/routing/``.

    records = records_of_run("workdir")                      # the run's held-out text
    records = records_of_run("workdir", data="files:texts")  # other text, a domain per folder
    drops = drops_of_run("workdir", records[-1].step)        # with the buffers of training, where choices are dropped

What is there already is used again if checkpoint, text and settings are the same.
"""

import dataclasses
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from moe_jax.analysis.recording import (
    FORMAT, RecordError, RoutingRecord, check_recordable, read_record, record_routing, write_record)
from moe_jax.analysis.turns import TURN_SEPARATOR, with_turns
from moe_jax.config import resolve
from moe_jax.data.batches import Batches
from moe_jax.data.corpora import open_corpus
from moe_jax.data.documents import VALIDATION, CorpusError, fingerprint_of
from moe_jax.data.token_store import SplitTokens, TokenStore, cache_folder, prepare_store
from moe_jax.dispatch import DISPATCHERS
from moe_jax.files import FileError
from moe_jax.nn.moe import WITHOUT_DROPS, RoutingMode
from moe_jax.training.checkpoint import Checkpointer, CheckpointError
from moe_jax.training.run import (
    Run, check_config_matches_mesh, open_run, read_config, require_checkpoint, restore_params)

log = logging.getLogger("moe_jax")

# Enough for figures by domain, position and token; more costs time.
TOKENS, FEWEST_BATCHES = 131_072, 4
_SECONDS_BETWEEN_LINES = 10


@dataclasses.dataclass(frozen=True)
class Recording:
    """What is recorded of each step.

    Attributes:
      data: a source as ``data.source`` names them, all of whose documents are read; '' = the run's validation split.
      batches: of evaluation; 0 = all there are, None = about 131,072 tokens.
      dispatch: a name in ``moe_jax.dispatch.DISPATCHERS``; '' = as the run evaluates.
      turn_separator: text that begins a turn of a conversation; '' = do not look for turns.
    """

    data: str = ""
    batches: int | None = None
    dispatch: str = ""
    turn_separator: str = TURN_SEPARATOR

    def __post_init__(self) -> None:
        if self.dispatch and self.dispatch not in DISPATCHERS:
            raise RecordError(f"dispatch={self.dispatch}: allowed are {', '.join(DISPATCHERS)}")
        if self.batches is not None and self.batches < 0:
            raise RecordError(f"batches={self.batches}: must be at least 1, or 0 for all of them")


def records_of_run(workdir: str | os.PathLike, step: int | None = None, **options) -> list[RoutingRecord]:
    """The records of a run's saved steps up to ``step`` (default: the newest), ascending; ``options``: :class:`Recording`.

    Raises:
      RecordError: the model is dense. RunError, CheckpointError, ConfigError, CorpusError.
    """
    recording = Recording(**options)
    return record_steps(_opened(workdir), recording, step)


def drops_of_run(workdir: str | os.PathLike, step: int, **options) -> RoutingRecord | None:
    """:func:`record_with_buffers` of a run's step, for :func:`routing_report.run_analyses`; ``options`` and Raises as above."""
    recording = Recording(**options)
    return record_with_buffers(_opened(workdir), recording, step)


def _opened(workdir: str | os.PathLike) -> Run:
    workdir = pathlib.Path(workdir).absolute()
    config = resolve(read_config(workdir))
    require_checkpoint(workdir)
    check_recordable(config)
    check_config_matches_mesh(config, jax.device_count())
    return open_run(config, workdir)


def record_steps(run: Run, recording: Recording, step: int | None = None) -> list[RoutingRecord]:
    """:func:`records_of_run` of a run that is open. A damaged older step is left out, with a warning."""
    check_recordable(run.config)
    read = with_data(run, recording.data) if recording.data else run
    mode = RoutingMode.evaluation(run.config)
    if recording.dispatch:
        mode = dataclasses.replace(mode, dispatch=recording.dispatch)
    checkpoints, records, failure = Checkpointer(run.checkpoints, read_only=True), [], None
    for saved in steps_up_to(checkpoints, step):
        try:
            records.append(_record_step(run, read, recording, mode, checkpoints, saved))
        except CheckpointError as error:
            if saved == step:
                raise
            failure = error
            log.warning("step %d is left out: %s", saved, error)
    if not records:
        raise failure
    return records


def record_with_buffers(run: Run, recording: Recording, step: int) -> RoutingRecord | None:
    """The record of one step routed as in training, where buffers fill and choices are dropped.

    None where that is nothing new: the config trains without buffers, or ``recording`` has them already.
    """
    moe = run.config.moe
    mode = RoutingMode(moe.dispatch, moe.capacity_factor)
    if mode.dispatch in WITHOUT_DROPS or (recording.dispatch or moe.eval_dispatch) not in WITHOUT_DROPS:
        return None
    check_recordable(run.config)
    read = with_data(run, recording.data) if recording.data else run
    return _record_step(run, read, recording, mode, Checkpointer(run.checkpoints, read_only=True), step)


def steps_up_to(checkpoints: Checkpointer, step: int | None) -> Sequence[int]:
    """The saved steps, up to ``step`` if it is given. Raises CheckpointError: there is no such step, or none at all."""
    steps = checkpoints.steps()
    if step is not None and step not in steps or not steps:
        raise CheckpointError(f"No checkpoint{'' if step is None else f' of step {step}'} in {checkpoints.directory}; steps "
                              f"there: {', '.join(map(str, steps)) or 'none'}")
    return [saved for saved in steps if step is None or saved <= step]


def _record_step(run: Run, read: Run, recording: Recording, mode: RoutingMode, checkpoints: Checkpointer,
                 step: int) -> RoutingRecord:
    """The record of one step of ``run`` on the data of ``read``, from its file or made now."""
    count = _batches(read, recording)
    config_hash = fingerprint_of(run.config.to_dict())[:12]
    identity = fingerprint_of(FORMAT, checkpoints.fingerprint(step), config_hash, read.data.fingerprint, count, mode,
                              recording.turn_separator)
    suffix = f"_{mode.dispatch}" if mode.dispatch != run.config.moe.eval_dispatch else ""
    suffix += f"_{read.data.fingerprint[:8]}" if recording.data else ""
    path = run.workdir / "routing" / f"record_step_{step:010d}{suffix}.npz"
    if path.exists():
        try:
            found = read_record(path)
            if found.identity == identity:
                log.info("step %d: routing of %s tokens read from %s", step, f"{found.num_tokens:,}", path)
                return found
        except RecordError as error:
            log.warning("%s", error)
    params, bias_LE, _ = restore_params(run, step=step)
    record = record_routing(read, params, bias_LE, step, _with_turns(read, recording, count), mode,
                            _progress(step, mode.dispatch, count, read.config.data.source))
    record = dataclasses.replace(record, config_hash=config_hash, identity=identity)
    try:
        write_record(path, record)
    except FileError as error:
        log.warning("the record of step %d is not kept: %s", step, error)
    return record


def _batches(read: Run, recording: Recording) -> int | None:
    """How many evaluation batches are read; None: all there are (of a stream, whose end nobody knows)."""
    wanted = recording.batches
    if wanted is None:
        wanted = max(FEWEST_BATCHES, -(-TOKENS // read.config.tokens_per_step))
    there = getattr(read.data.validation, "num_batches", None)
    return min(wanted or there, there) if there else wanted or None


def _with_turns(read: Run, recording: Recording, count: int | None) -> Iterator[dict[str, np.ndarray]]:
    validation = read.data.validation
    if recording.turn_separator and isinstance(validation, Batches):
        return with_turns(validation, read.data.vocabulary, recording.turn_separator, count)
    return read.validation_batches(count)


def _progress(step: int, dispatch: str, count: int | None, source: str) -> Callable[[int], None]:
    started = last = time.monotonic()
    log.info("step %d: recording the routing (%s) of %s batches of %s", step, dispatch, count or "all", source)

    def progress(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == count or now - last > _SECONDS_BETWEEN_LINES:
            last = now
            left = "" if not count or done == count else f", eta {(now - started) / done * (count - done):.0f} s"
            log.info("step %d: batch %d%s in %.0f s%s", step, done, f"/{count}" if count else "", now - started, left)
    return progress


def with_data(run: Run, source: str) -> Run:
    """The run with all documents of another source, in the run's vocabulary, as its validation data.

    Raises:
      CorpusError: it cannot be read, or it comes with a vocabulary of its own.
    """
    config = dataclasses.replace(run.config.data, source=source, domain_weights="", max_bytes=0, streaming=False)
    cache, vocabulary = cache_folder(config, str(run.workdir)), run.data.vocabulary
    if source.startswith(("tfds:", "seqio:")):
        from moe_jax.data import tasks  # imports TensorFlow

        store, found = tasks.prepare_task_store(config, cache)
        if found.fingerprint != vocabulary.fingerprint:
            raise CorpusError(f"{source} comes with another vocabulary ({found.describe()}) than the model has "
                              f"({vocabulary.describe()}); its token ids would mean other text. Give it as text: files:…")
    else:
        store = prepare_store(config, open_corpus(config), vocabulary, cache)
    store = dataclasses.replace(store, splits={**store.splits, VALIDATION: _both_splits(store)})
    fingerprint = fingerprint_of(store.fingerprint, "all", config.sequence_length, config.batch_size)
    validation = Batches(store, config, VALIDATION, begin_id=vocabulary.begin_id)
    data = dataclasses.replace(run.data, validation=validation, domains=store.domains, store=store, fingerprint=fingerprint)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, data=config), data=data)


def _both_splits(store: TokenStore) -> SplitTokens:
    splits = list(store.splits.values())
    joined = {name: np.concatenate([getattr(split, name) for split in splits])
              for name in ("tokens_N", "domain_D", "document_D")}
    starts = np.cumsum([0] + [split.num_tokens for split in splits[:-1]])
    offsets_D = np.concatenate([split.offsets_D[:-1] + start for split, start in zip(splits, starts)]
                               + [[sum(split.num_tokens for split in splits)]])
    return SplitTokens(offsets_D=offsets_D, names_path="", **joined)
