"""Where text comes from without TensorFlow: the running Python's own library, files, and a synthetic corpus.

Every source yields `Document(text, domain, name)` in a fixed order. TFDS and seqio sources are in `tasks.py`.
"""

import ast
import glob as globbing
import gzip
import inspect
import json
import logging
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator

from moe_jax.data.documents import (
    USER_HEADING,
    Corpus,
    CorpusError,
    Document,
    fingerprint_of,
    replace_surrogates,
    split_of,
    subset,
)
from moe_jax.data.synthetic import SyntheticTruth, synthetic, synthetic_truth

__all__ = [
    "Corpus",
    "CorpusError",
    "Document",
    "SyntheticTruth",
    "files",
    "open_corpus",
    "split_of",
    "standard_library",
    "subset",
    "synthetic",
    "synthetic_truth",
]

log = logging.getLogger(__name__)

SOURCES = (
    '"standard_library", "synthetic", "files:<folder, glob or file>", "tfds:<name>[/config][:version]" or '
    '"seqio:<registered task or mixture>"'
)
FORMAT = 1  # raise it when the documents of an unchanged source change


def open_corpus(config) -> Corpus:
    """The corpus named by `config.source`, cut to `config.max_bytes`; for the sources that need no TensorFlow.

    Raises:
      CorpusError: an unknown source, or files that cannot be read.
    """
    source = config.source
    if config.max_bytes < 0:
        raise CorpusError(f"data.max_bytes={config.max_bytes} must be 0 (everything) or a positive number of bytes")
    if source == "standard_library":
        identity, read = (platform.python_implementation(), _library_listing()), standard_library
    elif source == "synthetic":
        identity, read = config.seed, lambda: synthetic(config.seed)
    elif source.startswith("files:"):
        pattern = source.removeprefix("files:")
        identity = (config.text_field, _identity_of_files(pattern))
        read = lambda: files(pattern, config.text_field)
    else:
        raise CorpusError(f"data.source={source!r} is not known; allowed are {SOURCES}")
    return Corpus(
        source,
        fingerprint_of(FORMAT, source, identity, config.max_bytes),
        lambda: subset(read(), config.max_bytes),
    )


# --- The running Python's own standard library ------------------------------------------------------------------------

TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "node_modules", "_bundled"})
# Tables made by programs: character maps, Unicode data, the build configuration (which also differs by machine).
GENERATED = re.compile(
    r"gencodec\.py|^_sysconfigdata|generated (automatically )?(from|by|with)|do not edit", re.IGNORECASE | re.MULTILINE
)
LONGEST_SOURCE_BYTES = 400_000
PYDOC_TOPICS = "pydoc_data/topics.py"


def library_folder() -> str:
    """Where the running Python keeps the source of its standard library."""
    return sysconfig.get_path("stdlib")


def standard_library(folder: str | None = None) -> Iterator[Document]:
    """The standard library of the running Python (or of `folder`) as three labelled domains.

    code: modules, with their docstrings cut out;
    docs: the docstrings of each module, and the help topics of `pydoc_data`;
    tests: the test packages, unchanged (some systems ship none: one warning).
    Since docstrings leave the code, no text is in two documents, and validation text is not seen in training.

    Raises:
      CorpusError: this Python ships no source files.
    """
    folder = folder or library_folder()
    found_tests = found_code = False
    for path, _ in _library_listing(folder):
        text = _read_source(os.path.join(folder, path))
        if text is None:
            continue
        if TEST_FOLDERS.intersection(path.split("/")[:-1]):
            found_tests = True
            yield Document(text, "tests", path)
        elif path == PYDOC_TOPICS:
            yield from _help_topics(text)
        else:
            found_code = True
            code, docs = separate_docstrings(text)
            if code.strip():
                yield Document(code, "code", path)
            if docs.strip():
                yield Document(docs, "docs", path + "#docs")
    if not found_code:
        raise CorpusError(
            f'this Python ships no source of its standard library (looked in {folder}); use data.source="synthetic" or '
            '"files:<folder>"'
        )
    if not found_tests:
        log.warning('this Python ships no tests of its standard library; the corpus has no domain "tests"')


def _library_listing(folder: str | None = None) -> tuple[tuple[str, int], ...]:
    """(path relative to the library, size in bytes) of every source file, sorted."""
    folder = folder or library_folder()
    listing = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        for name in names:
            path = os.path.join(where, name)
            if name.endswith(".py") and os.path.isfile(path):
                listing.append((os.path.relpath(path, folder).replace(os.sep, "/"), os.path.getsize(path)))
    return tuple(sorted(listing))


def _read_source(path: str) -> str | None:
    """The text of one module; None for generated, huge, empty or oddly encoded ones."""
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    is_topics = path.replace(os.sep, "/").endswith(PYDOC_TOPICS)
    if not text.strip() or (len(text) > LONGEST_SOURCE_BYTES and not is_topics):
        return None
    if not is_topics and (GENERATED.search(text[:500]) or os.path.basename(path).startswith("_sysconfigdata")):
        return None
    return text


def _help_topics(source: str) -> Iterator[Document]:
    """One document per topic of `help()`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Dict):
            continue
        for topic, text in sorted(ast.literal_eval(node).items()):
            if text.strip():
                yield Document(text, "docs", f"pydoc_data/topics/{topic}")


def separate_docstrings(source: str) -> tuple[str, str]:
    """(the source without its docstrings, the docstrings as prose with the names they belong to).

    A source that does not parse is all code. A docstring that shares its lines with code stays where it is.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return source, ""
    lines = source.splitlines(keepends=True)
    if len(lines) != source.count("\n") + (not source.endswith("\n")):
        return source, ""  # form feeds and the like: line numbers of ast and of splitlines differ
    prose = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) or not node.body:
            continue
        first = node.body[0]
        if not (
            isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
        ):
            continue
        start, end = first.lineno - 1, first.end_lineno
        before = lines[start].encode()[: first.col_offset]
        after = lines[end - 1].encode()[first.end_col_offset :]
        if before.strip() or after.strip():
            continue
        is_alone = len(node.body) == 1 and not isinstance(node, ast.Module)
        lines[start:end] = [before.decode() + "pass\n" if is_alone else ""] + [""] * (end - start - 1)
        text = inspect.cleandoc(first.value.value)
        if text.strip():
            name = getattr(node, "name", "")
            prose.append((first.lineno, f"{name}\n\n{text}" if name else text))
    docs = "\n\n\n".join(text for _, text in sorted(prose))
    return "".join(lines), replace_surrogates(docs) + "\n" if docs else ""


# --- Files ------------------------------------------------------------------------------------------------------------

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz")
DEFAULT_DOMAIN = "default"


def list_files(pattern: str) -> list[tuple[str, str, str]]:
    """(path, domain, name) of every file of a folder, glob or single file, sorted by path.

    The name is the path below the given folder (so the split of a corpus does not depend on where it lies).

    The domain is the first folder below the given one (below the part before the first wildcard, for a glob), or
    "default". Hidden files and folders are left out.

    Raises:
      CorpusError: nothing there.
    """
    if not pattern:
        raise CorpusError('data.source="files:" names no files; write "files:<folder, glob or file>"')
    pattern = os.path.expanduser(pattern)
    if os.path.isfile(pattern):
        return [(pattern, DEFAULT_DOMAIN, os.path.basename(pattern))]
    if os.path.isdir(pattern):
        root, paths = pattern, []
        for where, folders, names in os.walk(pattern):
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
            paths += [os.path.join(where, name) for name in names if not name.startswith(".")]
        problem = f"the folder {pattern!r} has no files"
    elif globbing.has_magic(pattern):
        fixed = pattern[: re.search(r"[*?\[]", pattern).start()]
        root = os.path.dirname(fixed) or "."
        paths = globbing.glob(pattern, recursive=True)
        problem = f"no file matches {pattern!r}"
    else:
        raise CorpusError(f'data.source="files:{pattern}": there is no such file or folder; check the path')
    listing = []
    for path in sorted(path for path in paths if os.path.isfile(path)):
        parts = os.path.relpath(path, root).split(os.sep)
        listing.append((path, parts[0] if len(parts) > 1 else DEFAULT_DOMAIN, "/".join(parts)))
    if not listing:
        raise CorpusError(f'data.source="files:{pattern}": {problem}; put text or .jsonl files there')
    return listing


def _identity_of_files(pattern: str) -> list[tuple]:
    identity = []
    for path, domain, _ in list_files(pattern):
        status = os.stat(path)
        identity.append((os.path.abspath(path), domain, status.st_size, status.st_mtime_ns))
    return identity


def files(pattern: str, text_field: str = "text") -> Iterator[Document]:
    """Documents of a folder, a glob or one file: each text file is one document, each line of a .jsonl file is one.

    In .jsonl files (also gzipped) `text_field` holds the text, or the turns of a conversation (`conversation`), and an
    optional "domain" overrides the folder's. Invalid
    UTF-8 is kept with U+FFFD in place of the bad bytes; empty documents and binary files are skipped; each of these is
    counted and told in one warning at the end.

    Raises:
      CorpusError: nothing to read, an unreadable file, a bad line of JSON (naming file and line), only empty documents.
    """
    counts = {"replaced": 0, "documents with invalid UTF-8": 0, "empty": 0, "binary": 0, "good": 0}
    for path, domain, name in list_files(pattern):
        if path.endswith(JSON_LINES):
            documents = _json_lines(path, domain, name, text_field, counts)
        else:
            documents = _text_file(path, domain, name, counts)
        for document in documents:
            if document.text.strip():
                counts["good"] += 1
                yield document
            else:
                counts["empty"] += 1
    _report_counts(pattern, counts)


def _report_counts(pattern: str, counts: dict[str, int]) -> None:
    if counts["empty"] or counts["binary"]:
        log.warning(
            "files:%s: skipped %d empty documents and %d binary files", pattern, counts["empty"], counts["binary"]
        )
    if counts["replaced"]:
        log.warning(
            "files:%s: %d documents hold invalid UTF-8; kept them with %d replacement characters",
            pattern,
            counts["documents with invalid UTF-8"],
            counts["replaced"],
        )
    if not counts["good"]:
        raise CorpusError(
            f'data.source="files:{pattern}": every document is empty ({counts["empty"]} empty, {counts["binary"]} '
            "binary files); put text there"
        )


def open_file(path: str):
    """For reading bytes, through gzip if the name ends in .gz."""
    return gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb")


def _decode(data: bytes, counts: dict[str, int]) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
        # Replacement characters that were in the text already are valid UTF-8 and not ours to count.
        counts["replaced"] += text.count("\ufffd") - data.count("\ufffd".encode())
        counts["documents with invalid UTF-8"] += 1
        return text


def _text_file(path: str, domain: str, name: str, counts: dict[str, int]) -> Iterator[Document]:
    try:
        with open_file(path) as file:
            data = file.read()
    except (OSError, EOFError) as error:
        raise CorpusError(f"cannot read {path!r} ({getattr(error, 'strerror', None) or error})") from None
    if b"\0" in data[:8192]:
        counts["binary"] += 1
        return
    yield Document(_decode(data, counts), domain, name)


def _json_lines(path: str, domain: str, name: str, text_field: str, counts: dict[str, int]) -> Iterator[Document]:
    try:
        with open_file(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                text, label = _json_line(_decode(line, counts), f"{path}, line {number}", text_field)
                yield Document(text, label or domain, f"{name}:{number}")
    except (OSError, EOFError) as error:
        raise CorpusError(f"cannot read {path!r} ({getattr(error, 'strerror', None) or error})") from None


def _json_line(line: str, where: str, text_field: str) -> tuple[str, str]:
    """(text, domain or '') of one line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: not valid JSON ({error}); each line must be one JSON object") from None
    if not isinstance(record, dict) or text_field not in record:
        has = f"the keys {sorted(map(str, record))}" if isinstance(record, dict) else type(record).__name__
        raise CorpusError(
            f"{where}: expected an object with the text under {text_field!r}, found {has}; set data.text_field"
        )
    text, label = record[text_field], record.get("domain", "")
    if isinstance(text, list):
        text = conversation(text)
    if not isinstance(text, str):
        raise CorpusError(
            f'{where}: {text_field!r} must be a string or a list of turns (strings, or objects with "role" and "content" '
            'or "from" and "value")'
        )
    if not isinstance(label, str):
        raise CorpusError(f'{where}: "domain" must be a string, not {label!r}')
    return replace_surrogates(text), replace_surrogates(label)


_SPEAKERS = {"user": "User", "human": "User", "prompter": "User", "gpt": "Assistant", "model": "Assistant"}


def conversation(turns: list) -> str | None:
    """A conversation as text: each part below a heading with its speaker, "### User:", "### Assistant:", "### System:".

    turns: objects with "role" and "content" (OpenAI) or "from" and "value" (ShareGPT), or strings, all of the user
    (MT-Bench). None if it is something else.
    """
    parts = []
    for turn in turns:
        if isinstance(turn, str):
            turn = {"role": "user", "content": turn}
        if not isinstance(turn, dict):
            return None
        speaker, words = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(speaker, str) or not isinstance(words, str):
            return None
        speaker = _SPEAKERS.get(speaker.lower(), speaker.capitalize())
        heading = USER_HEADING if speaker == "User" else f"### {speaker}:"
        parts.append(f"{heading}\n{words}\n")
    return "\n".join(parts)
