"""Token stores to batches: packing, shifting, mixing; and the background thread that keeps them ready.

A batch is a pure function of (seed, step, rows). Nothing is saved to resume, and whoever wants a share of the global
batch, as each of several processes does, asks for its `rows`. With S tokens per row and B rows,
step t reads rows t*B..(t+1)*B-1 of an endless table of rows, and row r is computed from r alone.

Rows: the documents of a stream are put in a seeded order (a new one each epoch), laid end to end, and cut every S
tokens. A document that crosses a cut goes on in another row as a new segment, so every token is a target exactly once per
epoch. The rows are then shuffled in blocks as large as an epoch (at most 65,536 rows): the rows of one long document
would otherwise follow each other, and a batch would be a piece of one file. Without domain weights there is one stream of
all domains (each in proportion to its size, rows mix domains). With weights every domain is a stream of its own, every row
belongs to one domain, and each block of 1,024 rows holds the domains in exactly the given proportions, in a seeded order.

Other objectives than the causal one (`objectives.py`) mix in the same way: every denoiser reads a stream of its own, in
rows of as many tokens as make an example of S.
"""

import dataclasses
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from moe_jax.data.documents import TRAIN, VALIDATION, CorpusError, fingerprint_of
from moe_jax.data.objectives import Recipe, fill_pair, fill_row, recipes_of
from moe_jax.data.streams import Mixture, Stream, seeded_bits
from moe_jax.data.token_store import TokenStore, cache_folder, prepare_store, prepare_vocabulary
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
# Two keys more under other objectives than the causal one; `in_prefix` only where attention asks for it.
TARGET_PADDING = {"is_target": False}
PREFIX_PADDING = {"in_prefix": False}
# What an encoder reads (config.target_length > 0); the other keys are then the decoder's.
ENCODER = "encoder_"
ENCODER_PADDING = {ENCODER + name: value for name, value in PADDING.items() if name != "target_ids"}
# Part of the data's fingerprint: raise it when the same settings give other rows, so that no run resumes on them.
ORDER_FORMAT = 2
# The same of rows of other objectives than the causal one.
OBJECTIVES_FORMAT = 1
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


class Batches:
    """Batches of one split of a store.

    Every batch is a dict of arrays [B, S], B = config.batch_size, S = config.sequence_length:
      input_ids int32     the targets shifted right inside each segment, `begin_id` at its start
      target_ids int32    the tokens to predict; 0 in padding
      valid bool          a real token is here
      segment_ids int32   1, 2, … for the documents packed into the row; 0 in padding
      positions int32     0, 1, … restarting in each segment
      domain_ids int32    index into the store's domains; -1 in padding
      document_ids int32  the document's number in the whole corpus; -1 in padding
    and, with `recipes`,
      is_target bool      the loss counts this target; `valid` says that there is a token, given or to be predicted
      in_prefix bool      only with config.prefix_attention="bidirectional": given, seen by all of the segment's prefix
    For an encoder–decoder (config.target_length = T > 0; with `recipes`) these, without the last two, are the decoder's, [B, T];
    what its encoder is given are the same keys with `encoder_` in front, without target_ids, [B, S]. A segment of the one
    belongs to the segment of the same number of the other.

    Training batches are always full (`valid` is True everywhere), but for the ends of rows of `recipes`; the validation
    split is finite and its last batch is padded.

    recipes: of another objective than the causal one (`objectives.recipes_of`). The validation split is then as endless as
    the training split, and `num_batches` read as much text as it has. begin_id: the vocabulary's.

    Raises:
      CorpusError: bad domain weights, or a weighted domain that has no training documents.
    """

    def __init__(self, store: TokenStore, config, split: str, recipes: Sequence[Recipe] = (),
                 begin_id: int = PAD_ID):
        self.split, self.batch_size, self.sequence_length = split, config.batch_size, config.sequence_length
        self.target_length, self.begin_id = config.target_length, begin_id
        self.tokens = store.splits[split]
        self.domains = store.domains
        self.recipes, self.padding = tuple(recipes), padding_of(config)
        self._text_lengths = [recipe.text_of_row(config) for recipe in self.recipes]
        self._seed = config.seed if split == TRAIN else VALIDATION_SEED
        weights = parse_domain_weights(config.domain_weights, store.domains) if split == TRAIN else None
        self._mixture = None
        if self.recipes:
            self._open_denoisers(weights)
        elif split == VALIDATION:
            self._streams = [Stream(self.tokens, self._documents(), (VALIDATION_SEED,), reshuffle=False)]
        elif weights is None:
            self._streams = [Stream(self.tokens, self._documents(), (config.seed, 0))]
        else:
            self._streams = [
                Stream(self.tokens, self._documents(domain), (config.seed, 2, domain))
                for domain in range(len(store.domains))
            ]
            self._require_tokens(weights, self._streams)
            self._mixture = Mixture(weights, config.seed)

    def _documents(self, domain: int | None = None) -> np.ndarray:
        everything = np.arange(self.tokens.num_documents)
        return everything if domain is None else everything[self.tokens.domain_D == domain]

    def _require_tokens(self, weights: np.ndarray, streams: Sequence[Stream]) -> None:
        """Streams of the domains, in order: each with a weight must have some."""
        for domain, stream in enumerate(streams):
            if weights[domain] > 0 and stream.num_tokens == 0:
                raise CorpusError(f"domain {self.domains[domain]!r} has a weight but no training documents")

    def _open_denoisers(self, weights: np.ndarray | None) -> None:
        """A stream for each recipe, and each domain if they are weighted; stream i is of recipe i % len(recipes)."""
        domains = [None] if weights is None else range(len(weights))
        shares = np.array([recipe.denoiser.share for recipe in self.recipes])
        self._streams = [
            Stream(self.tokens, self._documents(domain), (self._seed, 3, number, -1 if domain is None else domain))
            for domain in domains
            for number in range(len(self.recipes))
        ]
        if weights is not None:
            self._require_tokens(weights, self._streams[:: len(self.recipes)])
        self._mixture = Mixture(np.outer(np.ones(1) if weights is None else weights, shares).reshape(-1), self._seed)

    @property
    def num_tokens(self) -> int:
        """Tokens of the split: what one epoch of a mixture in proportion to size reads."""
        return self.tokens.num_tokens

    @property
    def num_batches(self) -> int:
        """Batches that cover the split once (the last one rounded up)."""
        if not self.recipes:
            return -(-self.num_tokens // (self.batch_size * self.sequence_length))
        read = sum(recipe.denoiser.share * length for recipe, length in zip(self.recipes, self._text_lengths))
        return math.ceil(self.num_tokens / (self.batch_size * read))

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
        if self.split == VALIDATION and step >= self.num_batches:
            raise IndexError(f"the validation split has {self.num_batches} batches; there is no batch {step}")
        if self.split == VALIDATION and not self.recipes:
            return self._last_rows(begin, end)
        if self._mixture is None:
            return self._stream_rows(self._streams[0], np.arange(begin, end))
        out = self._empty(end - begin)
        if begin == end:
            return out
        streams, numbers = self._mixture.rows(begin, end)
        for stream in np.unique(streams):
            (chosen,) = np.nonzero(streams == stream)
            if self.recipes:
                self._denoise(out, chosen, int(stream), numbers[chosen])
                continue
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

    def evaluation_places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the targets of a causal evaluation batch come from, each int64 [B, S]: the document's index in the split, and
        which of its tokens it is, also where the document began in another row; -1 in padding.
        """
        stream, length = self._streams[0], self.sequence_length
        rows = stream.places(step * self.batch_size + np.arange(self.batch_size), length, finite=True)
        position_BS = rows[:, None] * length + np.arange(length)
        document_BS, place_BS = stream.locate(np.minimum(position_BS, stream.num_tokens - 1))
        is_text_BS = position_BS < stream.num_tokens
        return np.where(is_text_BS, document_BS, -1), np.where(is_text_BS, place_BS, -1)

    def _empty(self, rows: int) -> dict[str, np.ndarray]:
        """Rows of padding, with the keys of the objective."""
        if not self.target_length:
            return empty_batch(rows, self.sequence_length, self.padding)
        return empty_batch(rows, self.target_length) | empty_batch(rows, self.sequence_length, ENCODER_PADDING)

    def _stream_rows(self, stream: Stream, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of one stream called `numbers`."""
        length = self.sequence_length
        if not len(numbers):
            return empty_batch(0, length)
        rows = [stream.read(place * length, (place + 1) * length) for place in stream.places(numbers, length).tolist()]
        return self._pack(*(np.concatenate(parts) for parts in zip(*rows)))

    def _denoise(self, out: dict[str, np.ndarray], rows: np.ndarray, index: int, numbers: np.ndarray) -> None:
        """Fills the rows of `out` with the examples of one stream's rows called `numbers`."""
        number_of_recipe = index % len(self.recipes)
        stream, recipe, length = self._streams[index], self.recipes[number_of_recipe], self._text_lengths[number_of_recipe]
        fill = fill_pair if self.target_length else fill_row
        for row, number, place in zip(rows, numbers.tolist(), stream.places(numbers, length).tolist()):
            token, document, serial = stream.read(place * length, (place + 1) * length)
            starts = np.flatnonzero(np.diff(serial, prepend=-1))
            pieces = [
                (piece, self.tokens.domain_D[first], self.tokens.document_D[first])
                for piece, first in zip(np.split(token, starts[1:]), document[starts])
            ]
            bits = seeded_bits(self._seed, 4, index, number)
            fill({key: values[row] for key, values in out.items()}, pieces, recipe, bits)

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
        input_BS[starts_BS] = self.begin_id
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


def padding_of(config) -> dict[str, Any]:
    """The keys of a DataConfig's training batches, and what they hold in padding."""
    if config.target_length:
        return PADDING | ENCODER_PADDING
    if config.objective == "causal":
        return PADDING
    return PADDING | TARGET_PADDING | (PREFIX_PADDING if config.prefix_attention == "bidirectional" else {})


def empty_batch(num_rows: int, sequence_length: int, padding: dict[str, Any] = PADDING) -> dict[str, np.ndarray]:
    """A batch of padding only."""
    return {
        key: np.full((num_rows, sequence_length), value, bool if isinstance(value, bool) else np.int32)
        for key, value in padding.items()
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

    validation: of an encoder–decoder under its objective. domains: names by domain id. fingerprint: identifies the tokens, their
    order and their vocabulary.
    store: the tokenised corpus (None when streaming).
    objective_validation: the validation split under the objective of training; None if that is causal, as `validation` is.
    """

    train: BatchSource
    validation: BatchSource
    vocabulary: Vocabulary
    domains: list[str]
    fingerprint: str
    store: TokenStore | None = None
    objective_validation: BatchSource | None = None


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
    recipes, vocabulary = recipes_of(config, vocabulary)
    begin = vocabulary.begin_id
    train, validation = (Batches(store, config, split, recipes, begin) for split in (TRAIN, VALIDATION))
    objective_validation = None
    if recipes and not config.target_length:
        validation, objective_validation = Batches(store, config, VALIDATION, begin_id=begin), validation
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
        ORDER_FORMAT, store.fingerprint, config.domain_weights, config.sequence_length, config.batch_size, config.seed,
        *((OBJECTIVES_FORMAT, config.prefix_attention, vocabulary.fingerprint, repr(recipes)) if recipes else ()),
        *((config.target_length,) if config.target_length else ()),
    )  # fmt: skip
    return Data(train, validation, vocabulary, store.domains, fingerprint, store, objective_validation)
