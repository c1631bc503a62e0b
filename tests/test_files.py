"""Files that are there whole or not at all."""

import errno
import json
import os
import pathlib

import numpy as np
import pytest

from moe_jax import files
from moe_jax.errors import UserError


def test_a_file_is_replaced_when_it_is_whole_and_its_folder_made(tmp_path):
    path = tmp_path / "a" / "b.json"
    files.write_json(path, {"x": 1})
    with files.whole(path) as file:
        file.write(b"[2]")
        assert json.loads(path.read_text()) == {"x": 1}
    assert json.loads(path.read_text()) == [2] and os.listdir(path.parent) == ["b.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    files.write_text(tmp_path / "x", "old")
    with pytest.raises(error):
        with files.whole(tmp_path / "x") as file:
            file.write(b"ne")
            raise error
    assert (tmp_path / "x").read_text() == "old" and os.listdir(tmp_path) == ["x"]


def test_two_writers_of_one_path_do_not_mix(tmp_path):
    with files.whole(tmp_path / "x") as one, files.whole(tmp_path / "x", durable=True) as other:
        one.write(b"first" * 1000)
        other.write(b"second")
    assert (tmp_path / "x").read_bytes() == b"first" * 1000


def test_others_may_read_it_as_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_a_file_that_cannot_be_written_is_named_with_the_reason(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(files.FileError, match="Cannot write .*file/x.npz: File exists. Free some space, or choose"):
        files.write_arrays(tmp_path / "file" / "x.npz", {"a": np.arange(3)})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        files.write_text(tmp_path / "y", "text")
    assert os.listdir(tmp_path) == ["file"]


def test_text_that_has_no_encoding_does_not_stop_a_report(tmp_path):
    files.write_text(tmp_path / "x", "a\ud800b")
    assert (tmp_path / "x").read_text() == "a?b"
