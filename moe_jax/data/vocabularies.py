"""Text to token ids and back: bytes, or SentencePiece trained here or loaded from a file.

Both vocabularies offer the same interface, and both follow the T5/umT5/OpenMoE convention: id 0 pads and also begins
every sequence, id 1 ends a document, id 2 is unknown. `bytes_per_token_V` says how many UTF-8 bytes each id stands for,
so bits per byte can be computed from any set of target ids. Those of imported models have ids of their own
(`imported_vocabularies.py`): `begin_id` stands before a text's first token in rows, `prompt_begin` before a prompt,
`eos_id` closes a document, samples stop at `end_ids` and never hold `never_ids`.
"""

import functools
import hashlib
import io
import os
import re
from collections.abc import Iterable

import numpy as np

from moe_jax.data.documents import CorpusError

PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2
SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Enough text to see every frequent piece; the time of training grows with it (1.5 MB: about 4 s for 2,048 pieces).
TRAINING_SAMPLE_BYTES = 1_500_000
TRAINING_CHUNK_CHARACTERS = 2000
SMALLEST_SENTENCEPIECE = 270  # 3 specials, 256 bytes, a few characters


class VocabularyError(CorpusError):
    """A vocabulary that cannot be made or loaded; the message says what to do about it."""


class _OurIds:
    """Special ids of the vocabularies that are made here. Sentinels are counted down from `first_sentinel`."""

    pad_id = begin_id = PAD_ID
    eos_id, unknown_id = EOS_ID, UNKNOWN_ID
    prompt_begin, end_ids, never_ids = (PAD_ID,), (EOS_ID,), (PAD_ID,)

    @property
    def first_sentinel(self) -> int:
        return self.vocab_size - 1


class ByteVocabulary(_OurIds):
    """UTF-8 bytes. Ids: 0 padding and beginning, 1 end, 2 unknown (never produced), 3..258 the bytes 0x00..0xff.

    The offsets are those of ByT5 and of `seqio.ByteVocabulary`, so their ids agree with these.
    `extra_ids` reserves ids at the end that stand for no bytes (T5's sentinels).
    """

    first_byte = 3

    def __init__(self, extra_ids: int = 0):
        self.extra_ids = extra_ids
        self.vocab_size = self.first_byte + 256 + extra_ids
        self.bytes_per_token_V = np.zeros(self.vocab_size, np.int32)
        self.bytes_per_token_V[self.first_byte : self.first_byte + 256] = 1
        self.fingerprint = f"bytes+{extra_ids}"

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens], one per UTF-8 byte, without the end id. Lone surrogates become `?`."""
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int32) + self.first_byte

    def decode(self, ids: Iterable[int]) -> str:
        """The text of any ids; specials and ids out of range vanish, invalid UTF-8 becomes U+FFFD."""
        values = np.asarray(list(ids), np.int64) - self.first_byte
        return values[(values >= 0) & (values < 256)].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def describe(self) -> str:
        """One line for people."""
        return f"bytes ({self.vocab_size} ids)"


class SentencePieceVocabulary(_OurIds):
    """A SentencePiece model (T5, umT5, or one that `train_sentencepiece` made), from its serialised bytes.

    With a model from `train_sentencepiece`, `decode(encode(text)) == text` for every valid text. Models made elsewhere
    may normalise (T5 folds whitespace), and pieces they do not know become `unknown_id`, which counts 0 bytes.
    """

    def __init__(self, model: bytes, source: str = "SentencePiece model", extra_ids: int = 0):
        self.model, self.source, self.extra_ids = model, source, extra_ids
        self._processor = _load_processor(model, source)
        size = self._processor.vocab_size()
        self.vocab_size = size + extra_ids
        self._bytes_of_id = [_piece_bytes(self._processor, index) for index in range(size)] + [b""] * extra_ids
        self.bytes_per_token_V = np.array([len(piece) for piece in self._bytes_of_id], np.int32)
        self.fingerprint = f"sentencepiece-{hashlib.sha256(model).hexdigest()[:32]}+{extra_ids}"
        # Text may contain the very character that marks a space; only byte pieces can spell it without loss.
        space_mark = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        spelled = all(self._processor.is_byte(index) for index in space_mark)
        self._space_mark_ids = np.array(space_mark, np.int32) if spelled else None
        self._dummy_prefix = self._processor.decode(self._processor.encode("a")) == "a" and self._bytes_of_id[
            self._processor.encode("a")[0]
        ].startswith(b" ")

    @classmethod
    def load(cls, path: str | os.PathLike, extra_ids: int = 0) -> "SentencePieceVocabulary":
        """Reads a `.model` file.

        Raises:
          VocabularyError: missing, unreadable, empty, not SentencePiece, or with other special ids than pad 0, end 1.
        """
        path = os.fspath(path)
        if os.path.isdir(path):
            raise VocabularyError(f"data.vocabulary={path!r} is a folder; name the SentencePiece .model file in it")
        try:
            with open(path, "rb") as file:
                model = file.read()
        except FileNotFoundError:
            raise VocabularyError(
                f'data.vocabulary={path!r}: there is no such file; allowed are "bytes", "sentencepiece:<size>" or the '
                "path of a SentencePiece .model file"
            ) from None
        except OSError as error:
            raise VocabularyError(f"data.vocabulary={path!r} cannot be read ({error.strerror})") from None
        return cls(model, path, extra_ids)

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens], without the end id."""
        text = text.encode("utf-8", "replace").decode()
        if SPACE_MARK not in text or self._space_mark_ids is None:
            return np.array(self._processor.encode(text), np.int32)
        parts = []
        for index, part in enumerate(text.split(SPACE_MARK)):
            if index:
                parts.append(self._space_mark_ids)
            parts.append(np.array(self._processor.encode(part), np.int32))
        return np.concatenate(parts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of any ids; specials and ids out of range vanish, invalid UTF-8 becomes U+FFFD."""
        size = len(self._bytes_of_id)
        pieces = b"".join(self._bytes_of_id[index] for index in map(int, ids) if 0 <= index < size)
        text = pieces.decode("utf-8", "replace")
        return text[1:] if self._dummy_prefix and text.startswith(" ") else text

    def describe(self) -> str:
        """One line for people."""
        return f"SentencePiece ({self.vocab_size} ids, {self.source})"


Vocabulary = ByteVocabulary | SentencePieceVocabulary


def with_extra_ids(vocabulary: Vocabulary, count: int) -> Vocabulary:
    """The vocabulary with at least `count` ids at its end that stand for no bytes; all other ids stay."""
    if vocabulary.extra_ids >= count:
        return vocabulary
    if isinstance(vocabulary, ByteVocabulary):
        return ByteVocabulary(count)
    if isinstance(vocabulary, SentencePieceVocabulary):
        return SentencePieceVocabulary(vocabulary.model, vocabulary.source, count)
    raise VocabularyError(
        f"the vocabulary of the imported model ({vocabulary.describe()}) has {vocabulary.extra_ids} sentinels (<extra_id_…>), but "
        f"data.objective hides up to {count} spans in a row; set data.objective='prefix_lm', or shorter rows"
    )


def _load_processor(model: bytes, source: str):
    """A SentencePieceProcessor, after the checks that turn a bad file into one line."""
    import sentencepiece

    if not model:
        raise VocabularyError(f"data.vocabulary={source!r} is an empty file; a SentencePiece .model file is needed")
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        size = processor.vocab_size()
    except (RuntimeError, ValueError, TypeError):
        size = 0
    if size < 4:
        raise VocabularyError(
            f"data.vocabulary={source!r} is not a SentencePiece model (its {len(model)} bytes do not parse as one); "
            'name a .model file such as those of T5 or umT5, or use "bytes" or "sentencepiece:<size>"'
        )
    if (processor.pad_id(), processor.eos_id()) != (PAD_ID, EOS_ID):
        raise VocabularyError(
            f"data.vocabulary={source!r} has pad id {processor.pad_id()} and end id {processor.eos_id()}; moe_jax "
            f"needs pad id {PAD_ID} and end id {EOS_ID}, as T5, umT5 and its own models have"
        )
    return processor


def _piece_bytes(processor, index: int) -> bytes:
    """The UTF-8 bytes that one id stands for."""
    if processor.is_control(index) or processor.is_unknown(index) or processor.is_unused(index):
        return b""
    piece = processor.id_to_piece(index)
    if processor.is_byte(index):
        return bytes([int(BYTE_PIECE.fullmatch(piece).group(1), 16)])
    return piece.replace(SPACE_MARK, " ").encode()


def train_sentencepiece(texts: Iterable[str], size: int, sample_bytes: int = TRAINING_SAMPLE_BYTES) -> bytes:
    """Trains a unigram model with `size` ids that loses nothing; returns it serialised.

    No normalisation, no dummy prefix, unknown characters as bytes, single digits. Deterministic: the sample is chosen
    by hash from the whole of `texts`, at most `sample_bytes` of it, and the number of threads is fixed.

    Raises:
      VocabularyError: a size that this text cannot support (the message names the limits).
    """
    import sentencepiece

    sample = _training_sample(texts, sample_bytes)
    if not sample:
        raise VocabularyError("there is no text to train a SentencePiece vocabulary on; check data.source")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNKNOWN_ID,
            bos_id=-1,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            max_sentence_length=8 * TRAINING_CHUNK_CHARACTERS,
            num_threads=4,  # part of the result: sums are split by thread
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise VocabularyError(_training_problem(str(error), size)) from None
    return model.getvalue()


def _training_sample(texts: Iterable[str], sample_bytes: int) -> list[str]:
    """Chunks of the texts with the smallest hashes, at most `sample_bytes` characters in all, in reading order."""
    kept: list[tuple[bytes, int, str]] = []
    kept_characters, index = 0, 0
    for text in texts:
        for start in range(0, len(text), TRAINING_CHUNK_CHARACTERS):
            chunk = text[start : start + TRAINING_CHUNK_CHARACTERS].encode("utf-8", "replace").decode()
            kept.append((hashlib.blake2b(f"{index} {chunk}".encode(), digest_size=8).digest(), index, chunk))
            kept_characters += len(chunk)
            index += 1
        if kept_characters > 4 * sample_bytes:
            kept, kept_characters = _smallest(kept, sample_bytes)
    kept, _ = _smallest(kept, sample_bytes)
    return [chunk for _, _, chunk in sorted(kept, key=lambda item: item[1])]


def _smallest(chunks: list[tuple[bytes, int, str]], limit: int) -> tuple[list[tuple[bytes, int, str]], int]:
    total, kept = 0, []
    for item in sorted(chunks):
        if kept and total + len(item[2]) > limit:
            break
        kept.append(item)
        total += len(item[2])
    return kept, total


def _training_problem(message: str, size: int) -> str:
    too_high = re.search(r"value <= (\d+)", message)
    too_low = re.search(r"(\d+) vs (\d+)", message)
    problem = f'data.vocabulary="sentencepiece:{size}" cannot be trained on this corpus: '
    if too_high:
        return problem + f"it supports at most {too_high.group(1)} pieces; use a smaller size or more text"
    if too_low:
        return problem + f"its characters and the 256 bytes alone need {too_low.group(2)} ids; use a larger size"
    return problem + " ".join(message.split())


def sentencepiece_size(name: str) -> int | None:
    """The size in 'sentencepiece:<size>', or None when `name` is something else.

    Raises:
      VocabularyError: the size is not a whole number, or too small.
    """
    if not name.startswith("sentencepiece:"):
        return None
    size = name.removeprefix("sentencepiece:")
    if not size.isdecimal() or int(size) < SMALLEST_SENTENCEPIECE:
        raise VocabularyError(
            f"data.vocabulary={name!r}: the size must be a whole number of at least {SMALLEST_SENTENCEPIECE}"
        )
    return int(size)


@functools.lru_cache(maxsize=8)
def _load_cached(path: str, size: int, modified: int) -> SentencePieceVocabulary:
    del size, modified  # part of the cache key only
    return SentencePieceVocabulary.load(path)


def load_vocabulary(name: str) -> Vocabulary:
    """The vocabulary that needs no training: 'bytes', the path of a SentencePiece model, or that of an imported checkpoint.

    Raises:
      VocabularyError: an unknown name or a bad file.
    """
    if name == "bytes":
        return ByteVocabulary()
    if not name:
        raise VocabularyError('data.vocabulary is empty; allowed are "bytes", "sentencepiece:<size>", "tokenizer:<file>", '
                              '"ids:<size>" or a .model file')
    if name.startswith(("ids:", "tokenizer:")):
        from moe_jax.data import imported_vocabularies  # imports this module

        return imported_vocabularies.load(name)
    try:
        status = os.stat(name)
    except OSError:
        return SentencePieceVocabulary.load(name)  # raises the error for people
    return _load_cached(name, status.st_size, status.st_mtime_ns)
