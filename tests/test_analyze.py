"""``moe-jax analyze`` on a tiny run: every step recorded once, kept and used again; and what users get wrong."""

import json
import os
import pathlib
import re
import shutil
from unittest import mock

import numpy as np
import pytest
from running import corpus, finished, moe_jax, restored_process, run_here

from moe_jax.analysis import record_run, routing_report
from moe_jax.analysis.catalogue import ANALYSES
from moe_jax.analysis.record_run import drops_of_run, records_of_run
from moe_jax.analysis.recording import read_record
from moe_jax.training.checkpoint import CheckpointError

__all__ = ["corpus", "finished", "moe_jax"]


@pytest.fixture(scope="module")
def analysed(finished):
    """Its routing is recorded; copy it before changing it."""
    with few_analyses():
        assert run_here("analyze", f"--checkpoint={finished}") == 0
    return finished


def few_analyses():
    """Drawing all of them takes seconds."""
    few = [analysis for analysis in ANALYSES if analysis.name in ("drops_by_position", "saturation", "routing_by_domain")]
    real = routing_report.run_analyses
    return mock.patch.object(routing_report, "run_analyses", lambda records, analyses, drops: real(records, few, drops))


@pytest.fixture
def copied(analysed, tmp_path):
    return pathlib.Path(shutil.copytree(analysed, tmp_path / "copied"))


def recorded(workdir, **options):
    with restored_process(1):
        return records_of_run(workdir, **options)


@pytest.fixture
def no_model(monkeypatch):
    """Recording would fail."""
    def refuse(*args, **kwargs):
        raise AssertionError("recorded again")
    monkeypatch.setattr(record_run, "record_routing", refuse)


def test_every_saved_step_is_recorded_on_the_same_tokens(analysed):
    names = ["record_step_0000000004.npz", "record_step_0000000008.npz", "record_step_0000000008_gather.npz"]
    assert sorted(path.name for path in (analysed / "routing").glob("record_*")) == names
    four, eight, buffered = (read_record(analysed / "routing" / name) for name in names)
    assert (four.step, eight.step, buffered.step) == (4, 8, 8)
    np.testing.assert_array_equal(four.token_ids_T, eight.token_ids_T)
    assert (four.experts_LTK != eight.experts_LTK).any()
    assert eight.domains == ("fruit", "sums") and eight.kept_LTK.all() and eight.capacity_factor is None
    assert (buffered.dispatch, buffered.capacity_factor) == ("gather", 1.25)
    report = analysed / "routing_report"
    assert (report / "report.html").exists() and (report / "routing_by_domain.csv").exists()


def test_records_are_used_again_while_nothing_has_changed(corpus, analysed, no_model):
    assert [record.step for record in recorded(analysed)] == [4, 8]
    with restored_process(1):
        assert drops_of_run(analysed, 8).dispatch == "gather"
    assert [record.step for record in recorded(analysed, step=4)] == [4]
    for changed in (dict(batches=1), dict(dispatch="reference"), dict(turn_separator="x"), dict(data=f"files:{corpus}")):
        with pytest.raises(AssertionError, match="recorded again"):
            recorded(analysed, **changed)


def test_a_damaged_record_is_made_again_and_a_damaged_checkpoint_left_out(copied, caplog):
    caplog.set_level("WARNING", "moe_jax")
    path = copied / "routing" / "record_step_0000000008.npz"
    path.write_bytes(path.read_bytes()[:-100])
    for file in (copied / "checkpoints" / "step_0000000004" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-1] + b"?")
    (copied / "routing" / "record_step_0000000004.npz").unlink()
    assert [record.step for record in recorded(copied)] == [8]
    assert "cannot be read as a record" in caplog.text and "step 4 is left out" in caplog.text
    assert read_record(path).step == 8
    with pytest.raises(CheckpointError, match="step 4.*damaged"):
        recorded(copied, step=4)


def test_other_text_is_read_whole_with_its_domains_and_turns(moe_jax, copied, tmp_path):
    texts = tmp_path / "chats"
    for domain in ("a", "b", "c"):
        texts.mkdir(exist_ok=True)
        lines = [json.dumps({"text": [f"{domain} {n}", f"more {n}"], "domain": domain}) for n in range(12)]
        (texts / f"{domain}.jsonl").write_text("\n".join(lines))
    with few_analyses():
        result = moe_jax("analyze", f"--checkpoint={copied}/checkpoints/step_0000000008", f"--data=files:{texts}", "--json",
                         "--batches=0", f"--out={tmp_path / 'report'}")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["steps"] == [4, 8] and found["data"] == f"files:{texts}"
    (path,) = (copied / "routing").glob("record_step_0000000008_[0-9a-f]*.npz")
    record = read_record(path)
    assert record.domains == ("a", "b", "c") and np.unique(record.domains_T).tolist() == [0, 1, 2]
    assert len(np.unique(record.documents_T)) == 36 and np.unique(record.turns_T).tolist() == [1, 2]
    # Each document is its text and an end.
    assert record.num_tokens == sum(len(f"### User:\n{d} {n}\n\n### User:\nmore {n}\n") + 1 for d in "abc" for n in range(12))


def test_a_record_is_analysed_without_a_model(moe_jax, analysed, no_model, tmp_path):
    files = [f"--record={path}" for path in (analysed / "routing").glob("record_*.npz")]
    with few_analyses():
        result = moe_jax("analyze", *files, f"--out={tmp_path / 'report'}")
    assert result.code == 0 and "step 8" in result.out and (tmp_path / "report" / "saturation.csv").exists()
    with (tmp_path / "report" / "drops_by_position.csv").open() as file:
        assert len(file.readlines()) > 1


@pytest.mark.slow
def test_no_analysis_of_the_catalogue_fails_on_a_tiny_run(moe_jax, analysed, no_model, tmp_path):
    result = moe_jax("analyze", f"--workdir={analysed}", f"--out={tmp_path / 'report'}")
    assert result.code == 0, result.err
    assert {"routing_by_turn", "drops_by_turn"} <= set(re.findall(r"not possible: (\w+):", result.out))
    assert len(list((tmp_path / "report").glob("*.png"))) > len(ANALYSES) // 2


@pytest.mark.parametrize("words, parts", [
    (["--out={file}"], ["is a file"]),
    (["--dispatch=gathr"], ["dispatch=gathr", "gather"]),
    (["--batches=-1"], ["batches=-1", "at least 1"]),
    (["--checkpoint={run}/checkpoints/step_0000000005"], ["step 5", "4, 8"]),
    (["--checkpoint={file}"], ["is a file, not a run directory"]),
    (["--checkpoint={empty}"], ["has no config.json"]),
    (["--data=files:{empty}/none"], ["no such file or folder"]),
    (["--data=filez:x"], ["filez:x", "allowed are"]),
    (["--record={file}"], ["cannot be read as a record"]),
    (["--record={empty}/none.npz"], ["no such file"]),
    (["--record={file}", "--batches=3"], ["--batches", "leave one of them out"]),
    (["--record={file}", "--checkpoint={run}"], ["--checkpoint", "leave one of them out"]),
], ids=lambda value: value[0] if isinstance(value[0], str) and value[0].startswith("--") else "")
def test_what_cannot_be_is_one_line_and_leaves_nothing(moe_jax, analysed, tmp_path, words, parts):
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    named = [word.format(file=tmp_path / "file", empty=tmp_path / "empty", run=analysed) for word in words]
    if not any(word.startswith(("--checkpoint", "--record")) for word in named):
        named.append(f"--workdir={analysed}")
    if not any(word.startswith("--out") for word in named):
        named.append(f"--out={tmp_path / 'report'}")
    result = moe_jax("analyze", *named)
    assert result.code == 1
    for part in parts:
        assert part in result.error
    assert sorted(os.listdir(tmp_path)) == ["empty", "file"]


def test_a_run_without_a_checkpoint_and_a_dense_one_are_refused(moe_jax, copied, tmp_path):
    config = json.loads((copied / "config.json").read_text())
    shutil.rmtree(copied / "checkpoints")
    assert "has no checkpoint yet" in moe_jax("analyze", f"--workdir={copied}").error
    config["moe"]["num_experts"] = 0
    (copied / "config.json").write_text(json.dumps(config))
    assert "The model is dense" in moe_jax("analyze", f"--workdir={copied}").error
