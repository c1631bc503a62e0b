"""Vocabularies of models that were trained elsewhere: their tokenizer.json, or bare ids where there is none."""

import functools
import hashlib
import json
import os
from collections.abc import Iterable

import numpy as np

from moe_jax.data.vocabularies import BYTE_PIECE, EOS_ID, PAD_ID, SPACE_MARK, UNKNOWN_ID, VocabularyError

IDS, TOKENIZER = "ids:", "tokenizer:"


class IdVocabulary:
    """Ids written as numbers: '17 4 99'. Any other word is the unknown id.

    pad_id, eos_id, unknown_id: 0, 1 and 2, as everywhere here; what they mean to the model is not known.
    """

    pad_id, eos_id, unknown_id, extra_ids = PAD_ID, EOS_ID, UNKNOWN_ID, 0

    def __init__(self, size: int):
        self.vocab_size = size
        self.bytes_per_token_V = np.array([len(str(number)) + 1 for number in range(size)], np.int32)
        self.fingerprint = f"ids-{size}"

    def encode(self, text: str) -> np.ndarray:
        """int32 [words]."""
        numbers = (int(word) if word.isdecimal() else self.unknown_id for word in text.split())
        return np.array([number if number < self.vocab_size else self.unknown_id for number in numbers], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(f" {int(number)}" for number in ids)

    def describe(self) -> str:
        """One line for people."""
        return f"{self.vocab_size} ids, written as numbers"


class TokenizerVocabulary:
    """A ``tokenizer.json`` as transformers has it, by the library ``tokenizers``.

    Special tokens are read where they stand in a text, and never written. ``eos_id`` is that of the ``config.json`` beside the
    file. The id that begins every row here is 0, whatever the model was trained with.
    """

    pad_id, unknown_id, extra_ids = PAD_ID, UNKNOWN_ID, 0

    def __init__(self, path: str):
        try:
            import tokenizers
        except ImportError:
            raise VocabularyError(f"data.vocabulary='{TOKENIZER}{path}': the library tokenizers is not installed; "
                                  "pip install 'moe_jax[hf]'") from None
        try:
            with open(path, "rb") as file:
                content = file.read()
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except OSError as error:
            raise VocabularyError(f"data.vocabulary='{TOKENIZER}{path}' cannot be read ({error.strerror})") from None
        except Exception as error:  # the library raises Exception itself
            raise VocabularyError(f"data.vocabulary='{TOKENIZER}{path}' is no tokenizer.json ({error})") from None
        self.path, about = path, json.loads(content)
        tokens = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(tokens.values()) + 1
        self.eos_id = _end_of_text(path)
        self.bytes_per_token_V = np.zeros(self.vocab_size, np.int32)
        special = {token["content"] for token in about.get("added_tokens") or () if token.get("special")}
        by_byte = "ByteLevel" in json.dumps(about.get("decoder"))
        for token, number in tokens.items():
            if token not in special:
                self.bytes_per_token_V[number] = len(token) if by_byte else _bytes_of_piece(token)
        self.fingerprint = f"tokenizer-{hashlib.sha256(content).hexdigest()[:32]}+{self.eos_id}"

    def encode(self, text: str) -> np.ndarray:
        """int32 [tokens], without those that a template would put around them."""
        text = text.encode("utf-8", "replace").decode()
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(number) for number in ids if 0 <= int(number) < self.vocab_size],
                                      skip_special_tokens=True)

    def describe(self) -> str:
        """One line for people."""
        return f"tokenizer ({self.vocab_size} ids, {self.path})"


def _bytes_of_piece(token: str) -> int:
    return 1 if BYTE_PIECE.fullmatch(token) else len(token.replace(SPACE_MARK, " ").encode())


def _end_of_text(path: str) -> int:
    """``eos_token_id`` of the settings beside a tokenizer, the first if there are several; 1 where they do not say."""
    for name in ("generation_config.json", "config.json"):
        try:
            with open(os.path.join(os.path.dirname(path), name), encoding="utf-8") as file:
                settings = json.load(file)
        except (OSError, ValueError):
            continue
        found = settings.get("eos_token_id", (settings.get("text_config") or {}).get("eos_token_id"))
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int):
            return found
    return EOS_ID


@functools.lru_cache(maxsize=8)
def _tokenizer(path: str, size: int, modified: int) -> TokenizerVocabulary:
    del size, modified  # part of the cache key only
    return TokenizerVocabulary(path)


def load(name: str) -> IdVocabulary | TokenizerVocabulary:
    """'ids:<size>' or 'tokenizer:<path of a tokenizer.json>'.

    Raises:
      VocabularyError: neither, no such file, or the library is missing.
    """
    if name.startswith(IDS):
        size = name.removeprefix(IDS)
        if not size.isdecimal() or int(size) <= UNKNOWN_ID:
            raise VocabularyError(f"data.vocabulary={name!r}: wanted is ids:<size>, the number of ids, at least {UNKNOWN_ID + 1}")
        return IdVocabulary(int(size))
    path = name.removeprefix(TOKENIZER)
    try:
        status = os.stat(path)
    except OSError as error:
        raise VocabularyError(f"data.vocabulary={name!r} cannot be read ({error.strerror}); name the tokenizer.json of the "
                              "checkpoint") from None
    return _tokenizer(path, status.st_size, status.st_mtime_ns)
