"""Token stores to batches: packing, shifting, mixing; and the background thread that keeps them ready.

A batch is a pure function of (seed, step, rows). Nothing is saved to resume, and whoever wants a share of the global
batch, as each of several processes does, asks for its `rows`. With S tokens per row and B rows,
step t reads rows t*B..(t+1)*B-1 of an endless table of rows, and row r is computed from r alone.

Rows: the documents of a stream are put in a seeded order (a new one each epoch), laid end to end, and cut every S
tokens. A document that crosses a cut goes on in another row as a new segment, so every token is a target exactly once per
epoch. The rows are then shuffled in blocks as large as an epoch (at most 65,536 rows): the rows of one long document
would otherwise follow each other, and a batch would be a piece of one file. Without domain weights there is one stream of all domains (each in proportion to its size, rows mix domains).
With weights every domain is a stream of its own, every row belongs to one domain, and each block of 1,024 rows holds the
domains in exactly the given proportions, in a seeded order.
"""

import dataclasses
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from moe_jax.data.documents import TRAIN, VALIDATION, CorpusError, fingerprint_of
from moe_jax.data.token_store import SplitTokens, TokenStore, cache_folder, prepare_store, prepare_vocabulary
from moe_jax.data.vocabularies import PAD_ID, Vocabulary

log = logging.getLogger(__name__)

# What each key holds where `valid` is False.
PADDING = {
    "input_ids": PAD_ID,
    "target_ids": PAD_ID,
    "valid": False,
    "segment_ids": 0,
    "positions": 0,
    "domain_ids": -1,
    "document_ids": -1,
}
MIXING_BLOCK_ROWS = 1024
SHUFFLED_BLOCK_ROWS = 65_536
# Part of the data's fingerprint: raise it when the same settings give other rows, so that no run resumes on them.
ORDER_FORMAT = 2
# Fixed, whatever data.seed is, so that runs with different seeds are evaluated on the same text.
VALIDATION_SEED = 20_240_101


class BatchSource(Protocol):
    """What training needs from a split: `Batches`, or `streaming.StreamingBatches`."""

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]: ...

    def evaluation_batches(
        self, max_batches: int | None = None, rows: slice | None = None
    ) -> Iterator[dict[str, np.ndarray]]: ...


def parse_domain_weights(text: str, domains: list[str]) -> np.ndarray | None:
    """'code=2,docs=1' as float64 [domains] summing to 1; domains not named get 0. None for ''.

    Raises:
      CorpusError: not of this form, an unknown domain (the message names the known ones), or no positive weight.
    """
    if not text.strip():
        return None
    weights = np.zeros(len(domains))
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        try:
            weight = float(value)
        except ValueError:
            weight = -1.0
        if not equals or not 0 <= weight < float("inf"):
            raise CorpusError(f'data.domain_weights={text!r}: {part!r} is not of the form "domain=weight", weight >= 0')
        if name not in domains:
            raise CorpusError(f"data.domain_weights={text!r}: there is no domain {name!r}; the domains are {domains}")
        if weights[domains.index(name)]:
            raise CorpusError(f"data.domain_weights={text!r}: domain {name!r} stands in it twice; name it once")
        weights[domains.index(name)] = weight
    if weights.sum() == 0:
        raise CorpusError(f"data.domain_weights={text!r}: at least one weight must be above 0; domains are {domains}")
    return weights / weights.sum()


def seeded_permutation(count: int, *key: int) -> np.ndarray:
    """int64 [count]: a permutation that depends on the key alone, on every machine and with every NumPy.

    (The raw bits of Philox are guaranteed not to change between NumPy versions; `Generator.permutation` is not.)
    """
    bits = np.random.Philox(np.random.SeedSequence([value % 2**64 for value in key])).random_raw(count)
    return np.argsort(bits, kind="stable")


class _Stream:
    """Documents laid end to end, in a new order each epoch: token p of the endless stream, for any p."""

    def __init__(self, tokens: SplitTokens, documents: np.ndarray, key: tuple[int, ...], reshuffle: bool = True):
        self.tokens, self.documents, self.key, self.reshuffle = tokens, documents, key, reshuffle
        self.lengths = np.diff(tokens.offsets_D)[documents]
        self.num_tokens = int(self.lengths.sum())
        # A batch reads one or two epochs; steps may be asked for in any order, so keep a few.
        self._order = functools.lru_cache(maxsize=3)(self._compute_order)
        self._shuffled = functools.lru_cache(maxsize=3)(self._compute_shuffled)

    def _compute_shuffled(self, block: int, rows: int) -> np.ndarray:
        return seeded_permutation(rows, *self.key, 7, block)

    def places(self, numbers: np.ndarray, length: int, finite: bool = False) -> np.ndarray:
        """Where on the stream, in rows of `length` tokens, the rows called `numbers` lie: shuffled within blocks.

        A finite stream is one block; numbers past its end stay where they are.
        """
        rows = -(-self.num_tokens // length) if finite else max(1, self.num_tokens // length)
        block_rows = max(1, rows) if finite else min(rows, SHUFFLED_BLOCK_ROWS)
        blocks, offsets = np.divmod(numbers, block_rows)
        places = np.array(numbers, np.int64)
        for block in np.unique(blocks):
            if not (finite and block > 0):
                chosen = blocks == block
                places[chosen] = block * block_rows + self._shuffled(int(block), block_rows)[offsets[chosen]]
        return places

    def _compute_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents in their order, int64 [documents + 1] stream position at which each begins)."""
        permutation = seeded_permutation(len(self.documents), *self.key, epoch if self.reshuffle else 0)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths[permutation])])
        return self.documents[permutation], starts

    def read(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stream positions begin..end-1 as (token, document index in the split, serial), each [end - begin].

        serial numbers the documents of the answer; it differs between neighbours of different documents.
        """
        parts = []
        while begin < end:
            epoch, offset = divmod(begin, self.num_tokens)
            take = min(end - begin, self.num_tokens - offset)
            parts.append(self._read_epoch(epoch, offset, offset + take))
            begin += take
        token = np.concatenate([part[0] for part in parts])
        document = np.concatenate([part[1] for part in parts])
        serials, first = [], 0
        for part in parts:
            serials.append(part[2] + first)
            first = int(serials[-1][-1]) + 1
        return token, document, np.concatenate(serials)

    def _read_epoch(self, epoch: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        documents, starts = self._order(epoch)
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        last = int(np.searchsorted(starts, end, side="left"))
        covered = documents[first:last]
        bounds = np.clip(starts[first : last + 1], begin, end)
        serial = np.repeat(np.arange(len(covered)), np.diff(bounds))
        # Place in the store = place in the stream, moved by the same distance for all tokens of a document.
        distance = self.tokens.offsets_D[covered] - starts[first:last]
        token = self.tokens.tokens_N[np.arange(begin, end) + distance[serial]]
        return token, covered[serial], serial


class _Mixture:
    """Which stream each row reads, and which row of that stream it is, by weights; closed form in the row number."""

    def __init__(self, weights: np.ndarray, seed: int):
        exact = weights * MIXING_BLOCK_ROWS
        quota = np.floor(exact).astype(np.int64)
        quota[(weights > 0) & (quota == 0)] = 1
        # Largest remainders fill the block; the largest quotas give back what rounding up took.
        while quota.sum() < MIXING_BLOCK_ROWS:
            quota[np.argmax(np.where(weights > 0, exact - quota, -np.inf))] += 1
        while quota.sum() > MIXING_BLOCK_ROWS:
            quota[np.argmax(quota)] -= 1
        self.quota, self.seed = quota, seed
        self._block = functools.lru_cache(maxsize=8)(self._compute_block)

    def _compute_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For each row of the block: (its stream, how many earlier rows of the block read the same stream)."""
        streams = np.repeat(np.arange(len(self.quota)), self.quota)
        streams = streams[seeded_permutation(MIXING_BLOCK_ROWS, self.seed, 1, block)]
        earlier = np.empty(MIXING_BLOCK_ROWS, np.int64)
        for stream in range(len(self.quota)):
            is_stream = streams == stream
            earlier[is_stream] = np.arange(is_stream.sum())
        return streams, earlier

    def rows(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(stream, row within the stream), each int64 [end - begin]; rows of one stream are consecutive."""
        streams, numbers = [], []
        while begin < end:
            block, offset = divmod(begin, MIXING_BLOCK_ROWS)
            take = min(end - begin, MIXING_BLOCK_ROWS - offset)
            stream, earlier = (array[offset : offset + take] for array in self._block(block))
            streams.append(stream)
            numbers.append(block * self.quota[stream] + earlier)
            begin += take
        return np.concatenate(streams), np.concatenate(numbers)


class Batches:
    """Batches of one split of a store.

    Every batch is a dict of arrays [B, S], B = config.batch_size, S = config.sequence_length:
      input_ids int32     the targets shifted right inside each segment, 0 at its start
      target_ids int32    the tokens to predict; 0 in padding
      valid bool          a real token is here
      segment_ids int32   1, 2, … for the documents packed into the row; 0 in padding
      positions int32     0, 1, … restarting in each segment
      domain_ids int32    index into the store's domains; -1 in padding
      document_ids int32  the document's number in the whole corpus; -1 in padding

    Training batches are always full (`valid` is True everywhere); the validation split is finite and its last batch is
    padded.

    Raises:
      CorpusError: bad domain weights, or a weighted domain that has no training documents.
    """

    def __init__(self, store: TokenStore, config, split: str):
        self.split, self.batch_size, self.sequence_length = split, config.batch_size, config.sequence_length
        self.tokens = store.splits[split]
        self.domains = store.domains
        weights = parse_domain_weights(config.domain_weights, store.domains)
        everything = np.arange(self.tokens.num_documents)
        self._mixture = None
        if split == VALIDATION:
            self._streams = [_Stream(self.tokens, everything, (VALIDATION_SEED,), reshuffle=False)]
        elif weights is None:
            self._streams = [_Stream(self.tokens, everything, (config.seed, 0))]
        else:
            self._streams = [
                _Stream(self.tokens, everything[self.tokens.domain_D == domain], (config.seed, 2, domain))
                for domain in range(len(store.domains))
            ]
            for domain, stream in enumerate(self._streams):
                if weights[domain] > 0 and stream.num_tokens == 0:
                    raise CorpusError(f"domain {store.domains[domain]!r} has a weight but no training documents")
            self._mixture = _Mixture(weights, config.seed)

    @property
    def num_tokens(self) -> int:
        """Tokens of the split: what one epoch of a mixture in proportion to size reads."""
        return self.tokens.num_tokens

    @property
    def num_batches(self) -> int:
        """Batches that cover the split once (the last one rounded up)."""
        return -(-self.num_tokens // (self.batch_size * self.sequence_length))

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """Rows `rows` (a slice without step; default all) of the global batch of this step.

        Concatenating the batches of slices that cover 0..B gives the whole batch. For the validation split, `step` is
        the number of the evaluation batch and must be below `num_batches`.

        Raises:
          IndexError: a negative step, or one past the end of the validation split.
        """
        first, last, stride = (rows or slice(None)).indices(self.batch_size)
        if step < 0 or stride != 1:
            raise IndexError(f"step={step} must not be negative, and rows={rows} must be consecutive")
        begin, end = step * self.batch_size + first, step * self.batch_size + max(first, last)
        if self.split == VALIDATION:
            if step >= self.num_batches:
                raise IndexError(f"the validation split has {self.num_batches} batches; there is no batch {step}")
            return self._last_rows(begin, end)
        if self._mixture is None:
            return self._stream_rows(self._streams[0], np.arange(begin, end))
        streams, numbers = self._mixture.rows(begin, end)
        out = empty_batch(end - begin, self.sequence_length)
        for stream in np.unique(streams):
            (chosen,) = np.nonzero(streams == stream)
            part = self._stream_rows(self._streams[stream], numbers[chosen])
            for key, values in part.items():
                out[key][chosen] = values
        return out

    def evaluation_batches(
        self, max_batches: int | None = None, rows: slice | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        """The split once, in a fixed order that mixes its documents, at most `max_batches` batches (None or 0: all)."""
        count = min(max_batches or self.num_batches, self.num_batches)
        for index in range(count):
            yield self.batch(index, rows)

    def _stream_rows(self, stream: _Stream, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of one stream called `numbers`."""
        length = self.sequence_length
        if not len(numbers):
            return empty_batch(0, length)
        rows = [stream.read(place * length, (place + 1) * length) for place in stream.places(numbers, length).tolist()]
        return self._pack(*(np.concatenate(parts) for parts in zip(*rows)))

    def _last_rows(self, begin: int, end: int) -> dict[str, np.ndarray]:
        """Rows of a stream that ends after one epoch: what lies past the end is padding."""
        stream, length = self._streams[0], self.sequence_length
        out = empty_batch(end - begin, length)
        for row, place in enumerate(stream.places(np.arange(begin, end), length, finite=True).tolist()):
            stop = min((place + 1) * length, stream.num_tokens)
            if place * length >= stop:
                continue
            token, document, serial = stream.read(place * length, stop)
            missing = length - len(token)
            packed = self._pack(*(np.pad(array, (0, missing), mode="edge") for array in (token, document, serial)))
            packed["valid"].reshape(-1)[len(token) :] = False
            for key, values in packed.items():
                out[key][row] = np.where(packed["valid"], values, PADDING[key])[0]
        return out

    def _pack(self, token: np.ndarray, document: np.ndarray, serial: np.ndarray) -> dict[str, np.ndarray]:
        """Flat arrays of whole rows to a batch; a segment ends where the serial changes and at the end of a row."""
        shape = (-1, self.sequence_length)
        target_BS, serial_BS = token.reshape(shape).astype(np.int32), serial.reshape(shape)
        starts_BS = np.ones(target_BS.shape, bool)
        starts_BS[:, 1:] = serial_BS[:, 1:] != serial_BS[:, :-1]
        input_BS = np.zeros_like(target_BS)
        input_BS[:, 1:] = target_BS[:, :-1]
        input_BS[starts_BS] = PAD_ID
        place_S = np.arange(self.sequence_length, dtype=np.int32)
        begin_BS = np.maximum.accumulate(np.where(starts_BS, place_S, np.int32(0)), axis=1)
        return {
            "input_ids": input_BS,
            "target_ids": target_BS,
            "valid": np.ones(target_BS.shape, bool),
            "segment_ids": np.cumsum(starts_BS, axis=1, dtype=np.int32),
            "positions": place_S - begin_BS,
            "domain_ids": self.tokens.domain_D[document].reshape(shape),
            "document_ids": self.tokens.document_D[document].reshape(shape),
        }


def empty_batch(num_rows: int, sequence_length: int) -> dict[str, np.ndarray]:
    """A batch of padding only."""
    return {
        key: np.full((num_rows, sequence_length), value, bool if key == "valid" else np.int32)
        for key, value in PADDING.items()
    }


def join_rows(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Several ranges of rows of one batch as one batch, one after the other."""
    return parts[0] if len(parts) == 1 else {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


class Prefetcher:
    """Computes batches ahead in a thread: `next()` gives (step, batch, seconds waited).

    batch_fn: step -> batch. transform: applied to each batch in the thread (for example, putting it on the devices).
    An exception in the thread is raised by `next()`, after the batches that came before it. `close()`, or leaving a
    `with` block, always ends the thread.
    """

    def __init__(
        self,
        batch_fn: Callable[[int], Any],
        start_step: int = 0,
        transform: Callable[[Any], Any] | None = None,
        depth: int = 2,
    ):
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1")
        self._batch_fn, self._transform = batch_fn, transform
        self._ready: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(start_step,), name="moe_jax-batches", daemon=True)
        self._thread.start()

    def _work(self, step: int) -> None:
        while not self._stop.is_set():
            try:
                batch = self._batch_fn(step)
                item = (step, batch if self._transform is None else self._transform(batch), None)
            except BaseException as error:  # whatever it is, the caller must see it
                item = (step, None, error)
            while not self._stop.is_set():
                try:
                    self._ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if item[2] is not None:
                return
            step += 1

    def next(self) -> tuple[int, Any, float]:
        """The next (step, batch, seconds waited for it).

        Raises:
          RuntimeError: after `close()`. Anything that batch_fn or transform raised.
        """
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise RuntimeError("the Prefetcher is closed")
        started = time.monotonic()
        item = None
        while item is None:
            try:
                item = self._ready.get(timeout=0.5)
            except queue.Empty:
                if self._stop.is_set():  # closed by another thread meanwhile
                    raise RuntimeError("the Prefetcher is closed") from None
        step, batch, error = item
        if error is not None:
            self._error = error
            raise error
        return step, batch, time.monotonic() - started

    def close(self) -> None:
        """Ends the thread and waits for it; may be called more than once."""
        self._stop.set()
        with_items = True
        while with_items:  # a waiting put() then sees room, or the stop, within a tenth of a second
            try:
                self._ready.get_nowait()
            except queue.Empty:
                with_items = False
        self._thread.join()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class Data:
    """What a run reads.

    domains: names by domain id. fingerprint: identifies the tokens, their order and their vocabulary.
    store: the tokenised corpus (None when streaming).
    """

    train: BatchSource
    validation: BatchSource
    vocabulary: Vocabulary
    domains: list[str]
    fingerprint: str
    store: TokenStore | None = None


def open_data(config, workdir: str) -> Data:
    """Opens (and the first time prepares) the data that a DataConfig describes; the one entry point of training.

    TensorFlow is imported only for the sources "tfds:" and "seqio:", and for streaming.

    Raises:
      CorpusError: anything the user can put right; the message says how.
    """
    cache = cache_folder(config, workdir)
    if config.streaming or config.source.startswith(("tfds:", "seqio:")):
        from moe_jax.data import tasks

        if config.streaming:
            from moe_jax.data import streaming

            return streaming.open_streaming(config, cache)
        store, vocabulary = tasks.prepare_task_store(config, cache)
    else:
        from moe_jax.data.corpora import open_corpus

        corpus = open_corpus(config)
        vocabulary = prepare_vocabulary(config, corpus, cache)
        store = prepare_store(config, corpus, vocabulary, cache)
    return data_of_store(store, vocabulary, config)


def data_of_store(store: TokenStore, vocabulary: Vocabulary, config) -> Data:
    """The two splits of a store as batches; says how many documents are longer than the context."""
    train, validation = Batches(store, config, TRAIN), Batches(store, config, VALIDATION)
    longer = int((np.diff(train.tokens.offsets_D) > config.sequence_length).sum())
    log.info(
        "data: %d tokens for training (%d steps per epoch), %d for validation; %d of %d documents are longer than %d "
        "tokens and continue in the next row",
        train.num_tokens,
        train.num_batches,
        validation.num_tokens,
        longer,
        train.tokens.num_documents,
        config.sequence_length,
    )
    fingerprint = fingerprint_of(
        ORDER_FORMAT, store.fingerprint, config.domain_weights, config.sequence_length, config.batch_size, config.seed
    )
    return Data(train, validation, vocabulary, store.domains, fingerprint, store)
