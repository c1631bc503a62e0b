"""Corpora: what is read, how it is split, and the truth of the synthetic one."""

import ast
import collections
import json
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.data import corpora
from moe_jax.data.corpora import Document, files, separate_docstrings, split_of, standard_library, synthetic
from moe_jax.data.documents import CorpusError, subset, with_splits
from moe_jax.data.synthetic import synthetic_truth


def make_documents(count, domain="default"):
    return [Document(f"text number {index}\n", domain, f"{domain}/{index}") for index in range(count)]


def test_the_standard_library_has_labelled_domains_and_no_empty_document():
    by_domain = collections.Counter()
    names = set()
    for document in standard_library():
        assert document.text.strip() and document.name not in names
        names.add(document.name)
        by_domain[document.domain] += document.num_bytes
    # Every Python ships at least its code; the sizes are those of the leanest (Debian's) we know.
    assert by_domain["code"] > 3_000_000 and by_domain["docs"] > 1_000_000
    assert set(by_domain) <= {"code", "docs", "tests"}
    assert "json/decoder.py" in names and "json/decoder.py#docs" in names
    assert not any("site-packages" in name or "_sysconfigdata" in name for name in names)
    assert "encodings/cp1252.py" not in names, "generated tables are left out"


def test_a_library_without_tests_gives_one_warning_and_goes_on(tmp_path, caplog):
    (tmp_path / "module.py").write_text('"""Says hello."""\nprint("hello")\n')
    documents = list(standard_library(str(tmp_path)))
    assert [(document.domain, document.name) for document in documents] == [
        ("code", "module.py"),
        ("docs", "module.py#docs"),
    ]
    assert [record.getMessage() for record in caplog.records if "no tests" in record.getMessage()]
    assert len(caplog.records) == 1


def test_a_python_without_sources_is_told_what_to_use_instead(tmp_path):
    with pytest.raises(CorpusError, match="synthetic"):
        list(standard_library(str(tmp_path)))


def test_docstrings_move_from_code_to_docs_and_the_code_still_parses():
    source = (
        '"""Module words."""\nimport os\n\n\nclass A:\n    """Class words.\n\n    More.\n    """\n\n'
        '    def f(self):\n        "Method words."\n        return "kept"\n\n    def g(self): "one line stays"\n'
    )
    code, docs = separate_docstrings(source)
    assert docs == "Module words.\n\n\nA\n\nClass words.\n\nMore.\n\n\nf\n\nMethod words.\n"
    assert "words" not in code and '"kept"' in code and "one line stays" in code
    assert [node.name for node in ast.parse(code).body[1].body] == ["f", "g"]


def test_a_body_of_only_a_docstring_becomes_pass():
    code, docs = separate_docstrings('class E(Exception):\n    """Bad."""\n')
    assert code == "class E(Exception):\n    pass\n" and docs == "E\n\nBad.\n"


def test_source_that_does_not_parse_is_all_code():
    assert separate_docstrings("print 'python 2'") == ("print 'python 2'", "")


def test_the_split_is_the_same_in_another_process_and_close_to_the_fraction():
    documents = make_documents(2000)
    splits = [split_of(document, 0.1) for document in documents]
    assert 150 < splits.count("validation") < 250
    program = (
        "from moe_jax.data.corpora import Document, split_of\n"
        "documents = [Document(f'text number {i}\\n', 'default', f'default/{i}') for i in range(2000)]\n"
        "print(','.join(split_of(d, 0.1) for d in documents))"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == ",".join(splits)


def test_the_split_depends_on_name_and_content():
    fractions = {split_of(Document("same", "d", str(index)), 0.5) for index in range(50)}
    assert fractions == {"train", "validation"}
    fractions = {split_of(Document(str(index), "d", "same"), 0.5) for index in range(50)}
    assert fractions == {"train", "validation"}


def test_a_growing_fraction_only_moves_documents_into_validation():
    for document in make_documents(300):
        if split_of(document, 0.05) == "validation":
            assert split_of(document, 0.2) == "validation"


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 2.0])
def test_a_fraction_outside_0_to_1_is_refused(fraction):
    with pytest.raises(CorpusError, match="strictly between 0 and 1"):
        split_of(Document("a", "d", "n"), fraction)


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 7, 50])
def test_both_splits_get_documents_whenever_there_are_two(count, fraction, caplog):
    documents = make_documents(count)
    result = list(with_splits(documents, fraction))
    assert {split for _, split in result} == {"train", "validation"}
    assert sorted(document.name for document, _ in result) == sorted(document.name for document in documents)
    moved = [(document, split) for document, split in result if split != split_of(document, fraction)]
    assert len(moved) <= 1 and len(caplog.records) == len(moved)


def test_with_many_documents_the_split_is_purely_by_hash(caplog):
    for document, split in with_splits(make_documents(500), 0.1):
        assert split == split_of(document, 0.1)
    assert not caplog.records


def test_one_document_is_cut_in_two_with_a_warning(caplog):
    text = "".join(f"line {index}\n" for index in range(100))
    (head, first), (tail, second) = with_splits([Document(text, "d", "only")], 0.1)
    assert (first, second) == ("train", "validation") and head.text + tail.text == text
    assert head.text.endswith("\n") and 0.05 < len(tail.text) / len(text) < 0.2
    assert "one document" in caplog.text


def test_no_documents_and_a_single_character_are_errors():
    with pytest.raises(CorpusError, match="no documents"):
        list(with_splits([], 0.1))
    with pytest.raises(CorpusError, match="at least two characters"):
        list(with_splits([Document("x", "d", "n")], 0.1))


def test_a_subset_keeps_the_domains_proportions_and_is_deterministic():
    documents = make_documents(600, "a") + make_documents(200, "b")
    total = sum(document.num_bytes for document in documents)
    chosen = list(subset(documents, total // 4))
    assert chosen == list(subset(documents, total // 4))
    size = collections.Counter()
    for document in chosen:
        size[document.domain] += document.num_bytes
    assert 0.95 * total / 4 < sum(size.values()) <= total / 4
    assert size["a"] / size["b"] == pytest.approx(3, rel=0.1)
    assert [documents.index(document) for document in chosen] == sorted(documents.index(d) for d in chosen)


def test_a_subset_has_its_fair_share_of_validation_documents():
    chosen = list(subset(make_documents(2000), 10_000))
    assert 400 < len(chosen) < 1000
    held_out = sum(split_of(document, 0.2) == "validation" for document in chosen)
    assert 0.1 < held_out / len(chosen) < 0.3


def test_a_subset_keeps_one_document_of_every_domain_and_0_means_everything():
    documents = make_documents(50, "a") + [Document("long " * 1000, "b", "b/0")]
    assert {document.domain for document in subset(documents, 100)} == {"a", "b"}
    assert list(subset(documents, 0)) == documents and list(subset(documents, 10**9)) == documents


# --- Files ---


def test_sub_folders_are_domains_and_hidden_or_binary_files_are_left_out(tmp_path, caplog):
    for name in ("a/one.txt", "a/deep/two.md", "b/three.py", "four.rst", ".hidden/x.txt", "b/.y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("words in " + name)
    (tmp_path / "a" / "image.bin").write_bytes(b"\x89PNG\0\0")
    found = {(document.domain, document.text) for document in files(str(tmp_path))}
    assert found == {
        ("a", "words in a/one.txt"),
        ("a", "words in a/deep/two.md"),
        ("b", "words in b/three.py"),
        ("default", "words in four.rst"),
    }
    assert "1 binary" in caplog.text


def test_a_glob_and_a_single_file(tmp_path):
    for name in ("en/one.txt", "de/two.txt", "de/three.log"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [(d.domain, d.text) for d in files(str(tmp_path / "*" / "*.txt"))] == [
        ("de", "de/two.txt"),
        ("en", "en/one.txt"),
    ]
    assert [(d.domain, d.text) for d in files(str(tmp_path / "en" / "one.txt"))] == [("default", "en/one.txt")]


def test_json_lines_use_the_text_field_and_an_optional_domain(tmp_path):
    lines = [{"body": "first"}, {"body": "second", "domain": "news"}]
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "part.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert [(d.domain, d.text) for d in files(str(tmp_path), text_field="body")] == [
        ("web", "first"),
        ("news", "second"),
    ]


@pytest.mark.parametrize(
    "line, expected",
    [
        ('{"text": "unfinished', "not valid JSON"),
        ('["a list"]', "found list"),
        ('{"body": "x"}', r"keys \['body'\].*data.text_field"),
        ('{"text": 3}', "'text' must be a string or a list of turns"),
        ('{"text": ["x", 3]}', "'text' must be a string or a list of turns"),
        ('{"text": "x", "domain": 3}', '"domain" must be a string, not 3'),
    ],
)
def test_a_bad_json_line_names_file_line_and_reason(tmp_path, line, expected):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(CorpusError, match=rf"bad\.jsonl, line 2: .*{expected}"):
        list(files(str(path)))


def test_invalid_utf8_is_kept_replaced_and_counted_in_one_warning(tmp_path, caplog):
    (tmp_path / "latin.txt").write_bytes("caf\xe9 na\xefve \ufffd".encode("latin-1", "replace") + "\ufffd".encode())
    (tmp_path / "good.txt").write_text("fine \ufffd")
    documents = list(files(str(tmp_path)))
    assert documents[1].text.startswith("caf\ufffd na\ufffdve")
    assert len(caplog.records) == 1
    assert "1 documents hold invalid UTF-8; kept them with 2 replacement characters" in caplog.text


def test_lone_surrogates_in_json_become_replacement_characters(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n')
    assert [document.text for document in files(str(path))] == ["a\ufffdb \U0001f600"]


def test_empty_documents_are_skipped_and_counted(tmp_path, caplog):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "good.txt").write_text("words")
    assert [document.text for document in files(str(tmp_path))] == ["words"]
    assert "skipped 2 empty documents" in caplog.text


def test_missing_and_empty_sources_say_what_to_do(tmp_path):
    with pytest.raises(CorpusError, match="no such file or folder"):
        list(files(str(tmp_path / "nowhere")))
    with pytest.raises(CorpusError, match="has no files"):
        list(files(str(tmp_path)))
    with pytest.raises(CorpusError, match="no file matches"):
        list(files(str(tmp_path / "*.txt")))
    with pytest.raises(CorpusError, match="names no files"):
        list(files(""))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(CorpusError, match="every document is empty"):
        list(files(str(tmp_path)))


# --- Synthetic ---


def test_the_synthetic_corpus_is_deterministic_and_depends_on_the_seed():
    first = list(synthetic(3, documents_per_domain=2, document_bytes=300))
    assert first == list(synthetic(3, documents_per_domain=2, document_bytes=300))
    assert first != list(synthetic(4, documents_per_domain=2, document_bytes=300))
    assert {document.domain for document in first} == set(synthetic_truth(3).domains)


def test_related_languages_share_exactly_the_stated_fraction_and_others_nothing():
    truth = synthetic_truth(1, words_per_language=200, shared_fraction=0.3)
    assert truth.related_pairs == (
        ("language_0", "language_1"),
        ("language_2", "language_3"),
        ("language_4", "language_5"),
    )
    names = sorted(truth.vocabulary)
    for first in names:
        assert len(set(truth.vocabulary[first])) == 200
        for second in names:
            shared = set(truth.vocabulary[first]) & set(truth.vocabulary[second])
            if (first, second) in truth.related_pairs:
                assert len(shared) == 60 and truth.shared_fraction == 0.3
                for word in shared:
                    assert truth.vocabulary[first].index(word) == truth.vocabulary[second].index(word)
            elif first < second:
                assert not shared


def test_words_follow_the_stated_zipf_law():
    truth = synthetic_truth(0)
    words = collections.Counter()
    for document in synthetic(0, documents_per_domain=100):
        if document.domain == "language_0":
            words.update(document.text.replace(".", "").split())
    total = sum(words.values())
    probability = truth.word_probabilities("language_0")
    assert probability[1] / probability[0] == pytest.approx(0.5), "exponent 1: the second word is half as frequent"
    for rank in (0, 1, 2, 5):
        word = truth.vocabulary["language_0"][rank]
        # Four standard deviations of a binomial count.
        tolerance = 4 * np.sqrt(probability[rank] / total)
        assert words[word] / total == pytest.approx(probability[rank], abs=tolerance)


def test_arithmetic_is_right_and_dialogue_turns_alternate():
    for document in synthetic(0, documents_per_domain=3):
        lines = document.text.splitlines()
        if document.domain == "arithmetic":
            for line in lines:
                question, answer = line.split("=")
                assert eval(question) == int(answer)
        elif document.domain == "dialogue":
            assert [line.split()[0] for line in lines[:4]] == ["<user>", "<assistant>"] * 2


def test_an_unknown_source_names_the_known_ones():
    from moe_jax.config import DataConfig

    with pytest.raises(CorpusError, match="standard_library"):
        corpora.open_corpus(DataConfig(source="wikipedia"))


def test_the_fingerprint_follows_the_files(tmp_path):
    from moe_jax.config import DataConfig

    config = DataConfig(source=f"files:{tmp_path}")
    (tmp_path / "a.txt").write_text("one")
    first = corpora.open_corpus(config).fingerprint
    assert corpora.open_corpus(config).fingerprint == first
    (tmp_path / "b.txt").write_text("two")
    assert corpora.open_corpus(config).fingerprint != first


def test_the_split_does_not_depend_on_where_the_folder_lies(tmp_path):
    def names_of(folder):
        for name in ("x/a.txt", "x/b.jsonl", "c.md"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text('{"text": "words"}\n')
        return [document.name for document in files(str(folder))]

    assert (
        names_of(tmp_path / "here") == names_of(tmp_path / "somewhere" / "else") == ["c.md", "x/a.txt", "x/b.jsonl:1"]
    )
