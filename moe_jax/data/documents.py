"""Documents, the train/validation split, and deterministic subsets of a corpus.

Everything here is decided by hashes of the document itself (never by Python's `hash()`, which changes from
process to process), so every machine and every host splits a corpus in the same way.
"""

import dataclasses
import hashlib
import heapq
import logging
from collections.abc import Callable, Iterable, Iterator

from moe_jax.errors import UserError

log = logging.getLogger(__name__)

TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
# Begins every turn of the user where a conversation is written out as text.
USER_HEADING = "### User:"


class CorpusError(UserError, ValueError):
    """What the user asked to read cannot be read; the message says what to do about it."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One text. `name` is where it came from, unique inside its corpus; `domain` is the label analyses group by."""

    text: str
    domain: str
    name: str

    @property
    def num_bytes(self) -> int:
        """Length of the text in UTF-8 bytes."""
        return len(self.text.encode("utf-8", "replace"))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus that can be read any number of times, always in the same order.

    name: what the user called it (`config.source`).
    fingerprint: hex digest of everything that determines the documents.
    documents: starts a new pass over them.
    """

    name: str
    fingerprint: str
    documents: Callable[[], Iterator[Document]]


def fingerprint_of(*parts: object) -> str:
    """Hex digest of the given values (their `repr`), the same in every process and on every machine."""
    return hashlib.sha256(repr(parts).encode("utf-8", "backslashreplace")).hexdigest()[:32]


def hash_fraction(document: Document, purpose: str) -> float:
    """A number in [0, 1) from the document's name and text, independent for each purpose.

    (With one number for all, a subset of the smallest would be the validation split.)
    """
    digest = hashlib.sha256(purpose.encode() + b"\0")
    digest.update(document.name.encode("utf-8", "backslashreplace"))
    digest.update(b"\0")
    digest.update(document.text.encode("utf-8", "backslashreplace"))
    # 53 bits: the quotient is then an exact float below 1.
    return (int.from_bytes(digest.digest()[:8], "big") >> 11) / 2.0**53


def split_of(document: Document, validation_fraction: float) -> str:
    """'validation' for about `validation_fraction` of all documents, 'train' for the others.

    Raises:
      CorpusError: unless 0 < validation_fraction < 1.
    """
    _check_fraction(validation_fraction)
    return VALIDATION if hash_fraction(document, "split") < validation_fraction else TRAIN


def with_splits(documents: Iterable[Document], validation_fraction: float) -> Iterator[tuple[Document, str]]:
    """Yields (document, split), and makes sure that neither split ends up empty.

    Documents follow `split_of`. When that would leave a split empty (a handful of documents), the document whose
    hash comes closest moves there; a corpus of ONE document is cut in two at a line end. Both are announced with a
    warning. To decide this in one pass the closest candidates are held back, so the order is that of the input except
    for two documents, and is always the same.

    Raises:
      CorpusError: no document at all, or one single document too short to cut.
    """
    _check_fraction(validation_fraction)
    counts = dict.fromkeys(SPLITS, 0)
    # Held back: the train document nearest to validation, and the validation document nearest to train.
    nearest: dict[str, tuple[float, Document] | None] = dict.fromkeys(SPLITS)
    for document in documents:
        fraction = hash_fraction(document, "split")
        split = VALIDATION if fraction < validation_fraction else TRAIN
        counts[split] += 1
        if sum(counts.values()) > 2 and min(counts.values()) > 0:  # both splits have documents: nothing to hold back
            for held_split, held in nearest.items():
                if held is not None:
                    nearest[held_split] = None
                    yield held[1], held_split
            yield document, split
            continue
        distance = abs(fraction - validation_fraction)
        held = nearest[split]
        if held is None or distance < held[0]:
            nearest[split] = (distance, document)
            if held is not None:
                yield held[1], split
        else:
            yield document, split
    yield from _settle(counts, nearest, validation_fraction)


def _settle(counts, nearest, validation_fraction) -> Iterator[tuple[Document, str]]:
    """The end of `with_splits`: hand out what was held back, filling an empty split."""
    total = sum(counts.values())
    if total == 0:
        raise CorpusError("the corpus has no documents with text in them; check data.source")
    if total == 1:
        document = (nearest[TRAIN] or nearest[VALIDATION])[1]
        yield from _cut_in_two(document, validation_fraction)
        return
    empty = [split for split in SPLITS if counts[split] == 0]
    for split, held in nearest.items():
        if held is None:
            continue
        target = empty[0] if empty else split
        if empty:
            log.warning(
                "the split by hash left no %s document among %d; moved %r there (more documents, or another "
                "data.validation_fraction than %g, avoid this)",
                target,
                total,
                held[1].name,
                validation_fraction,
            )
        yield held[1], target


def _cut_in_two(document: Document, validation_fraction: float) -> Iterator[tuple[Document, str]]:
    text = document.text
    if len(text) < 2:
        raise CorpusError(
            f"the corpus is one document of {len(text)} character ({document.name!r}); it needs at least two "
            "characters to give a training and a validation split"
        )
    cut = min(max(1, round(len(text) * (1 - validation_fraction))), len(text) - 1)
    line_end = text.rfind("\n", 0, cut) + 1
    # A line end far away (or none) would change the fraction; then any character will do.
    if line_end > cut - len(text) // 20 and line_end > 0:
        cut = line_end
    log.warning(
        "the corpus is one document (%r): its last %d of %d characters become the validation split",
        document.name,
        len(text) - cut,
        len(text),
    )
    yield dataclasses.replace(document, text=text[:cut]), TRAIN
    yield dataclasses.replace(document, text=text[cut:], name=document.name + "#end"), VALIDATION


def subset(documents: Iterable[Document], max_bytes: int) -> Iterator[Document]:
    """At most about `max_bytes` of the documents, whole ones, chosen by hash, keeping each domain's share of the bytes.

    One pass, at most `max_bytes` of text per domain in memory. Every domain keeps at least one document, even when that
    document alone is longer than its share. `max_bytes=0` passes everything through.
    """
    if max_bytes == 0:
        yield from documents
        return
    chosen: dict[str, list] = {}  # domain -> heap of (-hash, index, bytes, document): worst (largest hash) on top
    kept_bytes: dict[str, int] = {}
    total_bytes: dict[str, int] = {}
    for index, document in enumerate(documents):
        domain, size = document.domain, document.num_bytes
        heap = chosen.setdefault(domain, [])
        heapq.heappush(heap, (-hash_fraction(document, "subset"), index, size, document))
        total_bytes[domain] = total_bytes.get(domain, 0) + size
        kept_bytes[domain] = kept_bytes.get(domain, 0) + size
        while kept_bytes[domain] > max_bytes and len(heap) > 1:
            kept_bytes[domain] -= heapq.heappop(heap)[2]
    everything = sum(total_bytes.values())
    survivors = []
    for domain, heap in chosen.items():
        budget = max_bytes * min(1.0, total_bytes[domain] / everything) if everything > max_bytes else float("inf")
        while kept_bytes[domain] > budget and len(heap) > 1:
            kept_bytes[domain] -= heapq.heappop(heap)[2]
        survivors.extend((index, document) for _, index, _, document in heap)
    for _, document in sorted(survivors, key=lambda item: item[0]):
        yield document


def replace_surrogates(text: str) -> str:
    """The text with lone surrogates (possible in JSON escapes, impossible in UTF-8) as U+FFFD; pairs are joined."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _check_fraction(validation_fraction: float) -> None:
    if not 0 < validation_fraction < 1:
        raise CorpusError(
            f"data.validation_fraction={validation_fraction!r} must lie strictly between 0 and 1 (for example 0.05)"
        )
