"""Lines of a .jsonl file to evaluate on: documents, texts given others, or questions with answers to choose from."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any

from moe_jax.data.corpora import DEFAULT_DOMAIN, JSON_LINES, files, open_file
from moe_jax.data.documents import CorpusError, Document, replace_surrogates

PERPLEXITY, CHOICES = "perplexity", "choices"
TASKS = (PERPLEXITY, CHOICES)


@dataclasses.dataclass(frozen=True)
class Question:
    """context: what is given, perhaps ''. choices: texts that may follow it directly, at least two, or the
    one that does. answer: index of the right
    one. where: file and line, for messages."""

    context: str
    choices: tuple[str, ...]
    answer: int
    domain: str
    where: str


def task_of(path: str) -> str:
    """'choices' if the first line has "choices", else 'perplexity'. Raises CorpusError."""
    for _, record in itertools.islice(_records(path), 1):
        return CHOICES if "choices" in record else PERPLEXITY
    raise CorpusError(f"{path}: has no lines; each must be one JSON object")


def is_given(path: str) -> bool:
    """Whether the first line has a "target" instead of a "text". Raises CorpusError."""
    return any("target" in record for _, record in itertools.islice(_records(path), 1))


def targets(path: str) -> list[Question]:
    """Each line's ``{"input": …, "target": …, "domain": …}`` as a question with one choice.

    Raises:
      CorpusError: a line that is no such object, naming file and line.
    """
    return [_target(record, where) for where, record in _records(path)]


def _target(record: dict[str, Any], where: str) -> Question:
    given, target, domain = record.get("input", ""), record.get("target"), record.get("domain", DEFAULT_DOMAIN)
    for name, value in (("input", given), ("target", target), ("domain", domain)):
        if not isinstance(value, str) or (name == "target" and not value):
            raise CorpusError(f'{where}: "{name}" must be a string{", not empty" if name == "target" else ""}, not {value!r}')
    return Question(replace_surrogates(given), (replace_surrogates(target),), 0, replace_surrogates(domain), where)


def documents(path: str, text_field: str) -> list[Document]:
    """Each line's text under ``text_field``, which may be a conversation (:func:`moe_jax.data.corpora.files`).

    Raises:
      CorpusError: a line that is no such object, naming file and line; no text at all.
    """
    _check_name(path)
    return list(files(path, text_field))


def questions(path: str) -> list[Question]:
    """Each line's ``{"context": …, "choices": [….], "answer": 0, "domain": …}``; no context is '', no domain 'default'.

    Raises:
      CorpusError: a line that is no such object, naming file and line; no lines.
    """
    found = [_question(record, where) for where, record in _records(path)]
    if not found:
        raise CorpusError(f"{path}: has no lines; each must be one JSON object")
    return found


def _check_name(path: str) -> None:
    if not path.endswith(JSON_LINES):
        raise CorpusError(f"{path}: is read line by line as JSON, so its name must end in one of {', '.join(JSON_LINES)}")


def _records(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, object) of every line that is not empty."""
    _check_name(path)
    try:
        with open_file(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _record(line, f"{path}, line {number}")
    except (OSError, EOFError) as error:
        raise CorpusError(f"cannot read {path!r} ({getattr(error, 'strerror', None) or error})") from None


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CorpusError(f"{where}: not valid JSON ({error}); each line must be one JSON object") from None
    if not isinstance(record, dict):
        raise CorpusError(f"{where}: expected an object, found {type(record).__name__}")
    return record


def _question(record: dict[str, Any], where: str) -> Question:
    context, choices, answer = record.get("context", ""), record.get("choices"), record.get("answer")
    domain = record.get("domain", DEFAULT_DOMAIN)
    for name, value in (("context", context), ("domain", domain)):
        if not isinstance(value, str):
            raise CorpusError(f'{where}: "{name}" must be a string, not {value!r}')
    is_list = isinstance(choices, list) and len(choices) >= 2 and all(isinstance(choice, str) and choice for choice in choices)
    if not is_list:
        raise CorpusError(f'{where}: "choices" must be a list of at least two texts, none of them empty, not {choices!r}')
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise CorpusError(f'{where}: "answer" must be the index of the right choice, 0 to {len(choices) - 1}, not {answer!r}')
    choices = tuple(map(replace_surrogates, choices))
    return Question(replace_surrogates(context), choices, answer, replace_surrogates(domain), where)
