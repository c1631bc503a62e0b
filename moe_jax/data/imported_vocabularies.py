"""Vocabularies of models that were trained elsewhere: their tokenizer.json, or bare ids where there is none."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from moe_jax.data.vocabularies import BYTE_PIECE, EOS_ID, PAD_ID, SPACE_MARK, UNKNOWN_ID, VocabularyError

IDS, TOKENIZER = "ids:", "tokenizer:"
_SENTINEL = re.compile(r"<extra_id_(\d+)>")


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """What a checkpoint says of its special ids.

    Attributes:
      begin: stands before a text, or is what a decoder behind an encoder begins with; None: nothing does.
      ends: at any of which a sample stops, the first being the one that closes a document; perhaps none.
    """

    begin: int | None = None
    ends: tuple[int, ...] = ()

    def __str__(self) -> str:
        """As it stands in the name of a vocabulary: ',begin=1,end=2+7'."""
        begin = "" if self.begin is None else f",begin={self.begin}"
        return begin + (f",end={'+'.join(map(str, self.ends))}" if self.ends else "")


def special_ids(folder: str | os.PathLike) -> SpecialIds:
    """Of ``generation_config.json`` and ``config.json``; the former wins."""
    found: dict[str, Any] = {}
    for name in ("generation_config.json", "config.json"):
        settings = _settings(folder, name)
        for part in (settings, settings.get("text_config") or {}):
            found = {**{key: value for key, value in part.items() if value is not None}, **found}
    is_pair = found.get("is_encoder_decoder", False)
    begin = found.get("decoder_start_token_id", found.get("pad_token_id")) if is_pair else found.get("bos_token_id")
    ends = found.get("eos_token_id", ())
    ends = tuple(ends) if isinstance(ends, (list, tuple)) else (ends,)
    return SpecialIds(begin if isinstance(begin, int) else None, tuple(number for number in ends if isinstance(number, int)))


def _settings(folder, name) -> dict[str, Any]:
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class _ImportedIds:
    """Special ids as a checkpoint has them.

    Where it has nothing that begins a text, prompts stand alone and the first token of a row follows the id that closes the
    document before, as in training of such models; 0, 1 where there is no such id either. No id is kept out of samples.
    """

    never_ids = ()

    def __init__(self, special: SpecialIds):
        self.special, self.end_ids = special, special.ends
        self.eos_id = special.ends[0] if special.ends else EOS_ID
        self.prompt_begin = () if special.begin is None else (special.begin,)
        self.begin_id = (*self.prompt_begin, *special.ends, PAD_ID)[0]


class IdVocabulary(_ImportedIds):
    """Ids written as numbers: '17 4 99'. Any other word is the unknown id, 2. The last ids are its sentinels, as T5's are."""

    pad_id, unknown_id = PAD_ID, UNKNOWN_ID

    def __init__(self, size: int, special: SpecialIds = SpecialIds()):
        super().__init__(special)
        self.vocab_size, self.extra_ids, self.first_sentinel = size, size, size - 1
        self.bytes_per_token_V = np.array([len(str(number)) + 1 for number in range(size)], np.int32)
        self.fingerprint = f"ids-{size}{special}"

    def encode(self, text: str) -> np.ndarray:
        """int32 [words]."""
        numbers = (int(word) if word.isdecimal() else self.unknown_id for word in text.split())
        return np.array([number if number < self.vocab_size else self.unknown_id for number in numbers], np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(f" {int(number)}" for number in ids)

    def describe(self) -> str:
        """One line for people."""
        return f"{self.vocab_size} ids, written as numbers"


class TokenizerVocabulary(_ImportedIds):
    """A ``tokenizer.json`` as transformers has it, by the library ``tokenizers``.

    Special tokens are read where they stand in a text, and never written. Special ids are those of the settings beside the file;
    what begins a text is what the tokenizer itself puts there (``add_bos_token`` of ``tokenizer_config.json``, else its template).
    """

    pad_id, unknown_id = PAD_ID, None

    def __init__(self, path: str):
        try:
            import tokenizers
        except ImportError:
            raise VocabularyError(f"data.vocabulary='{TOKENIZER}{path}': the library tokenizers is not installed; "
                                  "pip install tokenizers (the extra hf has it too)") from None
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
        super().__init__(self._special(os.path.dirname(path)))
        sentinels = {int(match[1]): number for token, number in tokens.items() if (match := _SENTINEL.fullmatch(token))}
        self.first_sentinel = sentinels.get(0, self.vocab_size - 1)
        # As many as are counted down from the first one.
        self.extra_ids = next(n for n in itertools.count() if sentinels.get(n) != self.first_sentinel - n)
        self.bytes_per_token_V = np.zeros(self.vocab_size, np.int32)
        special = {token["content"] for token in about.get("added_tokens") or () if token.get("special")}
        by_byte = "ByteLevel" in json.dumps(about.get("decoder"))
        for token, number in tokens.items():
            if token not in special:
                self.bytes_per_token_V[number] = len(token) if by_byte else _bytes_of_piece(token)
        self.fingerprint = f"tokenizer-{hashlib.sha256(content).hexdigest()[:32]}{self.special}"

    def _special(self, folder: str) -> SpecialIds:
        found, settings = special_ids(folder), _settings(folder, "tokenizer_config.json")
        if _settings(folder, "config.json").get("is_encoder_decoder"):
            return found
        adds = settings.get("add_bos_token")
        if adds is None:
            plain, whole = (self._tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
            adds = whole[: 1] != plain[: 1]
            found = dataclasses.replace(found, begin=whole[0]) if adds else found
        elif adds and found.begin is None:
            token = settings.get("bos_token") or ""
            token = token.get("content", "") if isinstance(token, dict) else token
            found = dataclasses.replace(found, begin=self._tokenizer.token_to_id(token))
        return found if adds else dataclasses.replace(found, begin=None)

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


@functools.lru_cache(maxsize=8)
def _tokenizer(path: str, size: int, modified: int) -> TokenizerVocabulary:
    del size, modified  # part of the cache key only
    return TokenizerVocabulary(path)


def load(name: str) -> IdVocabulary | TokenizerVocabulary:
    """'ids:<size>', perhaps with the special ids as in 'ids:<size>,begin=1,end=2', or 'tokenizer:<path of a tokenizer.json>'.

    Raises:
      VocabularyError: neither, no such file, or the library is missing.
    """
    if name.startswith(IDS):
        match = re.fullmatch(r"(\d+)(?:,begin=(\d+))?(?:,end=(\d+(?:\+\d+)*))?", name.removeprefix(IDS))
        if not match or int(match[1]) <= UNKNOWN_ID:
            raise VocabularyError(f"data.vocabulary={name!r}: wanted is ids:<size>, the number of ids, at least {UNKNOWN_ID + 1}; "
                                  f"perhaps with special ids: ids:<size>,begin=1,end=2")
        special = SpecialIds(int(match[2]) if match[2] else None, tuple(map(int, match[3].split("+"))) if match[3] else ())
        beyond = [number for number in (special.begin, *special.ends) if number is not None and number >= int(match[1])]
        if beyond:
            raise VocabularyError(f"data.vocabulary={name!r}: there is no id {beyond[0]}; the last is {int(match[1]) - 1}")
        return IdVocabulary(int(match[1]), special)
    path = name.removeprefix(TOKENIZER)
    try:
        status = os.stat(path)
    except OSError as error:
        raise VocabularyError(f"data.vocabulary={name!r} cannot be read ({error.strerror}); name the tokenizer.json of the "
                              "checkpoint") from None
    return _tokenizer(path, status.st_size, status.st_mtime_ns)
