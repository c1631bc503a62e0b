"""A corpus tokenised once, into memory-mapped arrays in the cache folder.

    <cache>/tokens/<key>/
      meta.json                   domains, counts, sizes and checksums of the other files, and its own checksum
      train.tokens                uint16 or uint32: all documents one after the other, each ending with the end id
      train.offsets               int64 [documents + 1]: where each document begins
      train.domains               int32 [documents]: index into meta.json's list of domains
      train.ids                   int32 [documents]: number of the document in the whole corpus, over both splits
      train.names.json            list of the documents' names
      validation.*                the same

The key is a hash of everything that determines the content. A store is written beside its place and renamed, so a
reader sees a whole one or none, and two processes that write the same store do not disturb each other. Sizes and
checksums are verified when it is opened; a damaged store is built again, with a warning.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from moe_jax import files
from moe_jax.data.documents import SPLITS, TRAIN, VALIDATION, Corpus, CorpusError, fingerprint_of, with_splits
from moe_jax.data.vocabularies import (
    SentencePieceVocabulary,
    Vocabulary,
    load_vocabulary,
    sentencepiece_size,
    train_sentencepiece,
)

log = logging.getLogger(__name__)

FORMAT = 1
FILES = ("tokens", "offsets", "domains", "ids", "names.json")
# Reading a file to check it costs about a second per gigabyte; larger ones are checked by size only.
LARGEST_CHECKED_BYTES = 1 << 29


@dataclasses.dataclass(frozen=True)
class TokenizedDocument:
    """What a store is built from. tokens: int array ending with the end id; num_bytes: UTF-8 length of its text."""

    tokens: np.ndarray
    domain: str
    name: str
    split: str
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class SplitTokens:
    """One split. D documents, N tokens. `names()` reads the documents' names from disk."""

    tokens_N: np.ndarray
    offsets_D: np.ndarray  # int64 [D + 1]
    domain_D: np.ndarray  # int32
    document_D: np.ndarray  # int32
    names_path: str

    @property
    def num_documents(self) -> int:
        return len(self.domain_D)

    @property
    def num_tokens(self) -> int:
        return int(self.offsets_D[-1])

    def names(self) -> list[str]:
        """Where each document came from, in the order of `document_D`."""
        with open(self.names_path, encoding="utf-8") as file:
            return json.load(file)


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """A tokenised corpus: `splits['train']`, `splits['validation']`, and what its numbers mean."""

    folder: str
    fingerprint: str
    domains: list[str]
    splits: dict[str, SplitTokens]
    summary: dict  # documents, bytes and tokens by split and domain


def users_cache(chosen: str = "") -> str | None:
    """`chosen`, else $MOE_JAX_CACHE, else $XDG_CACHE_HOME/moe_jax, else ~/.cache/moe_jax. None: there is no home folder."""
    home_cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    wanted = chosen or os.environ.get("MOE_JAX_CACHE") or os.path.join(home_cache, "moe_jax")
    # A user without a home folder: "~" stays as it is, and would become a folder of that name.
    is_given = chosen or os.environ.get("MOE_JAX_CACHE") or os.environ.get("XDG_CACHE_HOME")
    if not is_given and os.path.expanduser("~").startswith("~"):
        return None
    return os.path.abspath(os.path.expanduser(wanted))


def cache_folder(config, workdir: str) -> str:
    """The folder for stores and trained vocabularies, created if needed.

    :func:`users_cache` of `config.cache_dir`. If that cannot be written, `<workdir>/data` with a warning.

    Raises:
      CorpusError: neither can be written.
    """
    wanted = users_cache(config.cache_dir)
    problem = "this user has no home folder" if wanted is None else _why_not_writable(wanted)
    if problem is None:
        return wanted
    wanted = wanted or "~/.cache/moe_jax"
    fallback = os.path.abspath(os.path.join(workdir, "data"))
    log.warning("cannot write the data cache %s (%s); using %s instead (set data.cache_dir)", wanted, problem, fallback)
    problem = _why_not_writable(fallback)
    if problem is not None:
        raise CorpusError(f"cannot write the data cache {wanted!r} nor {fallback!r} ({problem}); set data.cache_dir")
    return fallback


def _why_not_writable(folder: str) -> str | None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def prepare_vocabulary(config, corpus: Corpus, cache: str) -> Vocabulary:
    """The vocabulary named by `config.vocabulary`; one that must be trained sees the training split only, once.

    Raises:
      VocabularyError: a bad name, file or size. CorpusError: the cache is full or read-only.
    """
    size = sentencepiece_size(config.vocabulary)
    if size is None:
        return load_vocabulary(config.vocabulary)
    key = fingerprint_of(FORMAT, corpus.fingerprint, size, config.validation_fraction)
    path = os.path.join(cache, "vocabularies", f"sentencepiece-{size}-{key}.model")
    if os.path.exists(path):
        try:
            return SentencePieceVocabulary.load(path)
        except CorpusError:
            log.warning("the cached vocabulary %s is damaged; training it again", path)
    started = time.monotonic()
    log.info("training a SentencePiece vocabulary of %d pieces on %s", size, corpus.name)
    documents = with_splits(corpus.documents(), config.validation_fraction)
    model = train_sentencepiece((document.text for document, split in documents if split == TRAIN), size)
    with files.whole(path) as file:
        file.write(model)
    log.info("trained %s in %.1f s", path, time.monotonic() - started)
    return SentencePieceVocabulary.load(path)


def prepare_store(config, corpus: Corpus, vocabulary: Vocabulary, cache: str) -> TokenStore:
    """The store of a corpus that needs no TensorFlow, from the cache or built now.

    Raises:
      CorpusError: the corpus cannot be read, or the cache cannot be written.
    """

    def tokenized() -> Iterator[TokenizedDocument]:
        for document, split in with_splits(corpus.documents(), config.validation_fraction):
            tokens = np.append(vocabulary.encode(document.text), np.int32(vocabulary.eos_id))
            yield TokenizedDocument(tokens, document.domain, document.name, split, document.num_bytes)

    key = fingerprint_of(corpus.fingerprint, config.validation_fraction)
    return open_or_build(cache, key, tokenized, vocabulary, corpus.name)


def open_or_build(
    cache: str,
    content_key: str,
    documents: Callable[[], Iterable[TokenizedDocument]],
    vocabulary: Vocabulary,
    name: str,
) -> TokenStore:
    """Opens the store of `documents` in `cache`, or builds it.

    content_key: identifies the documents and their splits; vocabulary, byte order and Python version are added here
    (what a Python version can read differs: its library, its Unicode tables).

    Raises:
      CorpusError: no documents, or the cache is full or read-only; then nothing is left behind.
    """
    key = fingerprint_of(FORMAT, content_key, vocabulary.fingerprint, sys.version_info[:3], sys.byteorder)
    folder = os.path.join(cache, "tokens", key)
    if os.path.isdir(folder):
        try:
            store = open_store(folder)
            log.info("data: using the prepared corpus %s", folder)
            _log_summary(store)
            return store
        except CorpusError as error:
            log.warning("%s; preparing the corpus again", error)
            shutil.rmtree(folder, ignore_errors=True)
    started = time.monotonic()
    log.info("data: reading and tokenising %s with %s", name, vocabulary.describe())
    with _errors_for_people(folder):
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        _remove_leftovers(os.path.dirname(folder))
        temporary = tempfile.mkdtemp(prefix=".writing-", dir=os.path.dirname(folder))
        try:
            write_store(temporary, key, documents(), vocabulary.vocab_size)
            _move_into_place(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    store = open_store(folder)
    _log_summary(store)
    log.info("data: prepared in %.1f s, kept in %s", time.monotonic() - started, folder)
    return store


def _remove_leftovers(parent: str) -> None:
    """What killed processes left behind. A day old, so that no other process is still writing it."""
    for name in os.listdir(parent):
        path = os.path.join(parent, name)
        with contextlib.suppress(OSError):
            if name.startswith(".writing-") and time.time() - os.path.getmtime(path) > 86_400:
                shutil.rmtree(path)


def _move_into_place(temporary: str, folder: str) -> None:
    try:
        os.rename(temporary, folder)
    except OSError:
        # Another process was first; its store is as good as ours, provided that it opens.
        open_store(folder)


@contextlib.contextmanager
def _errors_for_people(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CorpusError(
            f"cannot write {path!r} ({reason}); free some space or set data.cache_dir to a folder that can be written"
        ) from error


class _SplitWriter:
    """Appends documents to the files of one split."""

    def __init__(self, folder: str, split: str, dtype: np.dtype):
        self.prefix = os.path.join(folder, split + ".")
        self.dtype = dtype
        self.file = open(self.prefix + "tokens", "wb")
        self.lengths, self.domains, self.ids, self.names, self.sizes = [], [], [], [], []

    def add(self, document: TokenizedDocument, domain: int, number: int) -> None:
        self.file.write(np.ascontiguousarray(document.tokens, self.dtype))
        self.lengths.append(len(document.tokens))
        self.domains.append(domain)
        self.ids.append(number)
        self.names.append(document.name)
        self.sizes.append(document.num_bytes)

    def finish(self, rank_of_domain: np.ndarray) -> None:
        self.file.close()
        self.lengths = np.array(self.lengths, np.int64)
        self.domains = rank_of_domain[np.array(self.domains, np.int64)].astype(np.int32)
        arrays = {
            "offsets": np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)]),
            "domains": self.domains,
            "ids": np.array(self.ids, np.int32),
        }
        for name, array in arrays.items():
            with open(self.prefix + name, "wb") as file:
                file.write(array)
        with open(self.prefix + "names.json", "w", encoding="utf-8", errors="backslashreplace") as file:
            json.dump(self.names, file)

    def summary(self, domains: list[str]) -> dict[str, dict[str, int]]:
        sizes = np.array(self.sizes, np.int64)
        return {
            domain: {
                "documents": int((self.domains == index).sum()),
                "bytes": int(sizes[self.domains == index].sum()),
                "tokens": int(self.lengths[self.domains == index].sum()),
                "longest": int(self.lengths[self.domains == index].max(initial=0)),
            }
            for index, domain in enumerate(domains)
        }


def write_store(folder: str, fingerprint: str, documents: Iterable[TokenizedDocument], vocab_size: int) -> None:
    """Writes the files of a store into an existing empty folder.

    Raises:
      CorpusError: a split stays empty. OSError: from the file system.
    """
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    writers = {}
    index_of_domain: dict[str, int] = {}
    try:
        for split in SPLITS:
            writers[split] = _SplitWriter(folder, split, dtype)
        for number, document in enumerate(documents):
            domain = index_of_domain.setdefault(document.domain, len(index_of_domain))
            writers[document.split].add(document, domain, number)
    finally:
        # Also flushes: a full disk shows here at the latest, and as the OSError that it is.
        for writer in writers.values():
            writer.file.close()
    for split, writer in writers.items():
        if not writer.lengths:
            raise CorpusError(f"the {split} split has no documents; check data.source and data.validation_fraction")
    domains = sorted(index_of_domain)
    rank_of_domain = np.array([domains.index(domain) for domain in index_of_domain])
    for writer in writers.values():
        writer.finish(rank_of_domain)
    meta = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "dtype": dtype.name,
        "domains": domains,
        "summary": {split: writer.summary(domains) for split, writer in writers.items()},
        "files": {name: _size_and_checksum(os.path.join(folder, name)) for name in _file_names()},
    }
    body = json.dumps(meta, sort_keys=True)
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as file:
        json.dump({"checksum": zlib.crc32(body.encode()), "meta": body}, file)


def _file_names() -> list[str]:
    return [f"{split}.{name}" for split in SPLITS for name in FILES]


def _size_and_checksum(path: str) -> list[int]:
    """[bytes, CRC-32]; the checksum of a very large file is 0, meaning unchecked."""
    size = os.path.getsize(path)
    checksum = 0
    if size <= LARGEST_CHECKED_BYTES:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                checksum = zlib.crc32(block, checksum)
    return [size, checksum]


def open_store(folder: str) -> TokenStore:
    """Opens and verifies a store.

    Raises:
      CorpusError: a file is missing, truncated or damaged (the message names it).
    """
    try:
        with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
            envelope = json.load(file)
        if zlib.crc32(envelope["meta"].encode()) != envelope["checksum"]:
            raise ValueError("its checksum differs")
        meta = json.loads(envelope["meta"])
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']} instead of {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"the prepared corpus {folder} is damaged (meta.json: {error})") from None
    for name in _file_names():
        try:
            found = _size_and_checksum(os.path.join(folder, name))
        except OSError as error:
            raise CorpusError(f"the prepared corpus {folder} is damaged ({name}: {error.strerror})") from None
        if found != meta["files"][name]:
            what = "truncated or grown" if found[0] != meta["files"][name][0] else "changed"
            raise CorpusError(f"the prepared corpus {folder} is damaged ({name} was {what})")
    splits = {split: _open_split(folder, split, meta["dtype"]) for split in SPLITS}
    return TokenStore(folder, meta["fingerprint"], meta["domains"], splits, meta["summary"])


def _open_split(folder: str, split: str, dtype: str) -> SplitTokens:
    prefix = os.path.join(folder, split + ".")
    return SplitTokens(
        tokens_N=np.memmap(prefix + "tokens", dtype, mode="r"),
        offsets_D=np.fromfile(prefix + "offsets", np.int64),
        domain_D=np.fromfile(prefix + "domains", np.int32),
        document_D=np.fromfile(prefix + "ids", np.int32),
        names_path=prefix + "names.json",
    )


def _log_summary(store: TokenStore) -> None:
    """One line per domain: what was read, what is held out."""
    for domain in store.domains:
        train, validation = (store.summary[split][domain] for split in (TRAIN, VALIDATION))
        log.info(
            "data: %-10s %7d documents %12d bytes %12d tokens for training, %5d documents %10d tokens for validation",
            domain,
            train["documents"],
            train["bytes"],
            train["tokens"],
            validation["documents"],
            validation["tokens"],
        )
