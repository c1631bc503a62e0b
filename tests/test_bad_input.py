"""What users get wrong: one line that says what to do, an exit code, and nothing half-written."""

import json
import os
import pathlib
import shutil

import pytest
from running import corpus, finished, lines, moe_jax, overrides, read_json, run_alone, saved_steps

from moe_jax.training import loop
from moe_jax.training.checkpoint import Checkpointer

__all__ = ["corpus", "finished", "moe_jax"]


@pytest.fixture
def copied(finished, tmp_path):
    return pathlib.Path(shutil.copytree(finished, tmp_path / "copied"))


@pytest.fixture
def stopped(copied):
    """The same, not complete, so that `train` opens it."""
    (copied / "complete.json").unlink()
    return copied


def files(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} if folder.is_dir() else set()


def assert_refused(outcome, *parts, code=1):
    assert outcome.code == code
    assert len(outcome.error) < 1600
    for part in parts:
        assert part in outcome.error


# The config.


@pytest.mark.parametrize("setting, parts", [
    ("moe.num_expert=4", ("moe.num_expert", "Did you mean moe.num_experts")),
    ("moe.num_experts=four", ("moe.num_experts", "four")),
    ("moe.num_experts=2.5", ("moe.num_experts", "2.5")),
    ("moe.dispatch=gathr", ("moe.dispatch='gathr'", "Did you mean 'gather'")),
    ("training.tensorboard=maybe", ("tensorboard", "maybe")),
    ("moe.num_experts", ("a value is missing",)),
    ("moe=1", ("moe", "no such setting")),
    ("optimizer.learning_rate=nan", ("optimizer.learning_rate", "finite")),
    ("mesh.expert=5", ("expert=5", "nearest legal")),
    ("moe.row_exchange=ragged", ("moe.row_exchange='ragged'", "no ragged all-to-all for cpu", "'padded'")),
    ("data.batch_size=7", ("data.batch_size", "nearest legal data.batch_size: 6, 8", "--devices=1, 7")),
])
def test_a_setting_that_cannot_be_names_the_key_and_the_cure(moe_jax, corpus, tmp_path, setting, parts):
    words = [*overrides(corpus), f"--config.{setting}"]
    assert_refused(moe_jax("train", *words, f"--workdir={tmp_path / 'run'}", devices=2), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text, part", [
    (None, "no such file"),
    ("def get_config(:\n", "SyntaxError"),
    ("x = 1\n", "get_config"),
    ("def get_config():\n    return None\n", "get_config() returned None"),
    ("def get_config():\n    return {}['a']\n", "KeyError"),
    ("import not_there\n", "not_there"),
    ("from configs.base import get_config as base\ndef get_config():\n    c = base()\n    c.moe.expert = 3\n    return c\n",
     "moe.expert"),
])
def test_a_config_file_that_cannot_be_used_is_named(moe_jax, tmp_path, text, part):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    outcome = moe_jax("train", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert_refused(outcome, part)
    assert text is None or "mine.py" in outcome.error or "moe.expert" in outcome.error
    assert not (tmp_path / "run").exists()


def test_a_folder_is_not_a_config_file(moe_jax, tmp_path):
    assert_refused(moe_jax("train", f"--config={tmp_path}", f"--workdir={tmp_path / 'run'}"), "no such file")


@pytest.mark.parametrize("devices, parts", [(0, ("--devices=0", "at least 1")), (3, ("3 devices", "--devices=1, 2, 4"))])
def test_a_number_of_devices_that_cannot_work_names_the_legal_ones(moe_jax, corpus, tmp_path, devices, parts):
    assert_refused(moe_jax("train", *overrides(corpus), f"--workdir={tmp_path / 'run'}", devices=devices), *parts)
    assert not (tmp_path / "run").exists()


# The data.


@pytest.mark.parametrize("source, part", [
    ("files:/not/there", "/not/there"),
    ("files:{empty}", "{empty}"),
    ("wikipedia", "data.source='wikipedia'"),
])
def test_a_corpus_that_is_not_there_leaves_a_workdir_that_the_corrected_command_may_use(
        moe_jax, corpus, tmp_path, source, part):
    (tmp_path / "empty").mkdir()
    bad = source.format(empty=tmp_path / "empty")
    workdir = tmp_path / "run"
    outcome = moe_jax("train", *overrides(corpus, data__source=bad), f"--workdir={workdir}")
    assert_refused(outcome, part.format(empty=tmp_path / "empty"))
    assert files(workdir) <= {".lock", "compilation_cache"}
    # Not "belongs to another config": nothing was trained.
    loop.check_workdir(workdir, loop.Config(), allow_config_change=False)


def test_a_vocabulary_file_that_is_none_is_refused(moe_jax, corpus, tmp_path):
    (tmp_path / "notes.model").write_text("not a vocabulary " * 50)
    outcome = moe_jax("train", *overrides(corpus, data__vocabulary=tmp_path / "notes.model"), f"--workdir={tmp_path / 'run'}")
    assert_refused(outcome, "notes.model", "SentencePiece")
    assert not (tmp_path / "run" / "config.json").exists()


def test_invalid_utf8_long_and_empty_documents_are_counted_and_the_run_goes_on(moe_jax, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "texts")
    (tmp_path / "texts" / "fruit" / "latin1.txt").write_bytes("café ".encode("latin-1") * 50)
    (tmp_path / "texts" / "fruit" / "empty.txt").write_text("")
    words = overrides(tmp_path / "texts", training__num_steps=2)
    outcome = moe_jax("train", *words, f"--workdir={tmp_path / 'run'}")
    assert outcome.code == 0
    assert "50 replacement characters" in outcome.err
    assert "skipped 1 empty documents" in outcome.err
    assert "longer than 16 tokens" in outcome.err
    assert len(lines(tmp_path / "run")) == 2


def test_data_that_changed_under_a_checkpoint_stops_the_run(moe_jax, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "texts")
    words = ("train", *overrides(tmp_path / "texts", training__num_steps=2), f"--workdir={tmp_path / 'run'}")
    assert moe_jax(*words).code == 0
    (tmp_path / "run" / "complete.json").unlink()
    before = files(tmp_path / "run") - {"compilation_cache"}
    (tmp_path / "texts" / "fruit" / "new.txt").write_text("a new document")
    assert_refused(moe_jax(*words), "trained on other data", "Choose another --workdir")
    assert files(tmp_path / "run") == before


# The workdir.


def test_a_workdir_of_another_config_is_refused_by_the_keys_that_differ_and_not_touched(moe_jax, corpus, stopped):
    before = (stopped / "config.json").read_bytes()
    words = overrides(corpus, training__num_steps=8, moe__experts_per_token=1, optimizer__learning_rate=0.1)
    outcome = moe_jax("train", *words, f"--workdir={stopped}")
    assert_refused(outcome, "moe.experts_per_token: 2 -> 1", "optimizer.learning_rate: 0.003 -> 0.1",
                   "--allow-config-change", "another --workdir")
    assert (stopped / "config.json").read_bytes() == before


def test_a_change_that_the_checkpoint_cannot_take_leaves_the_config_of_the_run(moe_jax, corpus, stopped):
    before = (stopped / "config.json").read_bytes()
    words = overrides(corpus, training__num_steps=8, moe__num_experts=8)
    outcome = moe_jax("train", *words, f"--workdir={stopped}", "--allow-config-change")
    assert_refused(outcome, "does not fit this model", "4")
    assert (stopped / "config.json").read_bytes() == before


def test_a_workdir_that_is_a_file_is_refused(moe_jax, corpus, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert_refused(moe_jax("train", *overrides(corpus), f"--workdir={tmp_path / 'run'}"), "File exists", "another --workdir")
    assert (tmp_path / "run").read_text() == "mine"
    assert_refused(moe_jax("eval", f"--workdir={tmp_path / 'run'}"), "not a run directory")


def test_a_place_where_nothing_can_be_written_is_refused_before_the_data_is_read(moe_jax, corpus, monkeypatch):
    monkeypatch.setattr(loop, "open_run", lambda *_: pytest.fail("the data was opened"))
    assert_refused(moe_jax("train", *overrides(corpus), "--workdir=/proc/run"), "/proc/run", "another --workdir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere; the test above is for root")
def test_a_read_only_workdir_is_refused(moe_jax, corpus, tmp_path):
    (tmp_path / "run").mkdir(mode=0o500)
    assert_refused(moe_jax("train", *overrides(corpus), f"--workdir={tmp_path / 'run'}"), "Cannot write", "--workdir")


def test_a_file_in_the_way_of_the_checkpoints_is_named(moe_jax, corpus, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    outcome = moe_jax("train", *overrides(corpus), f"--workdir={tmp_path / 'run'}")
    assert_refused(outcome, str(tmp_path / "run" / "checkpoints"))
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_a_full_disk_stops_with_one_line_and_the_same_command_goes_on_once_there_is_room(corpus, tmp_path):
    workdir = tmp_path / "run"  # the data was prepared by another test, or fits
    words = ("train", *overrides(corpus, training__num_steps=8, training__tensorboard=False), f"--workdir={workdir}")

    outcome = run_alone(*words, event="full disk", at=60_000)  # no checkpoint fits
    assert_refused(outcome, "Checkpoint of step", "File too large", "Free some space")
    assert saved_steps(workdir) == [] and not (workdir / "complete.json").exists()
    assert not list(workdir.rglob("*.writing")) and not list(workdir.rglob(".*.????????"))
    assert run_alone(*words).code == 0
    assert [line["step"] for line in lines(workdir)] == list(range(1, 9))


@pytest.mark.slow
def test_a_disk_that_fills_up_under_tensorboard_stops_the_run_instead_of_hanging_it(corpus, tmp_path):
    words = overrides(corpus, training__num_steps=40, training__checkpoint_every=100, training__eval_every=100)
    outcome = run_alone("train", *words, f"--workdir={tmp_path / 'run'}", event="full disk", at=60_000)
    assert_refused(outcome, "Cannot write", "tensorboard", "File too large")


def test_a_result_that_cannot_be_written_is_one_line(moe_jax, corpus, stopped):
    shutil.rmtree(stopped / "routing")
    (stopped / "routing").write_text("in the way")
    outcome = moe_jax("train", *overrides(corpus, training__num_steps=8), f"--workdir={stopped}")
    assert_refused(outcome, "Cannot write", "evaluation.npz")
    assert not (stopped / "complete.json").exists()


# Checkpoints.


def damage(workdir, step):
    path = max((workdir / "checkpoints" / f"step_{step:010d}" / "state").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_it_is_used(moe_jax, corpus, stopped):
    damage(stopped, 8)
    outcome = moe_jax("train", *overrides(corpus, training__num_steps=8), f"--workdir={stopped}")
    assert outcome.code == 0
    assert "Checkpoint of step 8" in outcome.err and "damaged" in outcome.err and "using step 4 instead" in outcome.err
    assert [line["step"] for line in lines(stopped)] == list(range(1, 9))
    assert Checkpointer(stopped / "checkpoints", read_only=True).latest_verified_step() == 8


def test_with_every_checkpoint_damaged_the_run_stops_and_never_starts_from_scratch(moe_jax, corpus, stopped):
    damage(stopped, 4)
    damage(stopped, 8)
    curve_before = (stopped / "metrics.jsonl").read_bytes()
    outcome = moe_jax("train", *overrides(corpus, training__num_steps=8), f"--workdir={stopped}")
    assert_refused(outcome, "No checkpoint", "can be trusted", "step 4", "step 8")
    assert (stopped / "metrics.jsonl").read_bytes() == curve_before
    assert saved_steps(stopped) == [4, 8]
    assert_refused(moe_jax("eval", f"--workdir={stopped}"), "can be trusted")


# Commands on runs that are not there.


@pytest.mark.parametrize("command", ["eval", "generate", "report"])
def test_a_folder_that_is_no_run_is_refused(moe_jax, tmp_path, command):
    assert_refused(moe_jax(command, f"--workdir={tmp_path}"), "not a run directory", "--workdir")
    assert_refused(moe_jax(command, f"--workdir={tmp_path / 'nothing'}"), "not a run directory")
    assert files(tmp_path) == set()


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_run_without_a_checkpoint_is_refused_before_its_data_is_opened(moe_jax, finished, tmp_path, command):
    shutil.copy(finished / "config.json", tmp_path)
    assert_refused(moe_jax(command, f"--workdir={tmp_path}"), "no checkpoint yet", "moe-jax train")
    assert files(tmp_path) == {"config.json"}


@pytest.mark.parametrize("text", ["{", "[]", '{"moe": 1}', '{"moe": {"experts": 3}}'])
def test_a_config_json_that_is_none_is_one_line(moe_jax, copied, text):
    (copied / "config.json").write_text(text)
    assert_refused(moe_jax("eval", f"--workdir={copied}"))


@pytest.mark.parametrize("words, part", [
    (["generate", "--temperature=-1"], "--temperature=-1"),
    (["generate", "--temperature=nan"], "--temperature=nan"),
    (["generate", "--top-p=0"], "--top-p=0"),
    (["generate", "--top-p=1.5"], "--top-p=1.5"),
    (["generate", "--top-k=-2"], "--top-k=-2"),
    (["generate", "--max-tokens=0"], "--max-tokens=0"),
    (["eval", "--batches=-1"], "--batches=-1"),
    (["eval", "--dispatch=fastest"], "reference, einsum, gather, dropless"),
    (["eval", "--config.moe.eval_dispatch=fastest"], "moe.eval_dispatch='fastest'"),
    (["eval", "--config.moe.expert=1"], "moe.expert"),
    (["eval", "--config.moe=1"], "moe"),
    (["eval", "--config.training.eval_batches=x"], "must be of type int"),
    (["eval", "--config.training.tensorboard=x"], "must be of type bool"),
    (["eval", "--devices=0"], "--devices=0"),
])
def test_an_argument_that_cannot_work_is_named(moe_jax, finished, words, part):
    assert_refused(moe_jax(*words, f"--workdir={finished}"), part)


@pytest.mark.parametrize("words, part", [
    ([], "required"),
    (["trane"], "invalid choice: 'trane'"),
    (["train"], "--config"),
    (["train", "--config=x", "--stpes=3"], "--stpes=3"),
    (["generate", "--max-tokens=many"], "many"),
    (["report", "--config.moe.num_experts=3"], "--config.moe.num_experts=3"),
    (["eval", "--work=x"], "--work=x"),
])
def test_wrong_usage_exits_with_2_and_names_the_word(capsys, words, part):
    from moe_jax import cli

    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert part in capsys.readouterr().err


# Losses that are not finite.


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_with_nothing_applied_and_the_batch_recorded(moe_jax, corpus, tmp_path):
    workdir = tmp_path / "run"
    words = overrides(corpus, optimizer__learning_rate=1e30, training__eval_every=100, training__checkpoint_every=1)
    outcome = moe_jax("train", *words, f"--workdir={workdir}")
    assert_refused(outcome, "not finite", "the update was not applied", "optimizer.learning_rate")
    (record,) = workdir.glob("nonfinite_step_*.json")
    found = read_json(record)
    step = int(record.stem.rpartition("_")[2])
    assert found["step"] == step and found["data_step"] == step - 1
    assert len(found["document_ids"]) >= 1 and all(isinstance(d, int) for d in found["document_ids"])
    assert saved_steps(workdir)[-1] == step - 1  # of the step before, which was finite
    assert not (workdir / "complete.json").exists()


@pytest.mark.slow
def test_skipping_goes_on_up_to_the_cap_and_counts_across_a_resume(moe_jax, corpus, tmp_path):
    workdir = tmp_path / "run"
    words = overrides(corpus, optimizer__learning_rate=1e30, training__eval_every=100, training__checkpoint_every=1,
                      training__nonfinite="skip", training__max_skipped_steps=3)
    outcome = moe_jax("train", *words, f"--workdir={workdir}")
    first = min(int(path.stem.rpartition("_")[2]) for path in workdir.glob("nonfinite_step_*.json"))
    for count in (1, 2, 3):
        assert f"its update was skipped ({count} of at most 3)" in outcome.err
    assert_refused(outcome, f"step {first + 3}", "max_skipped_steps=3")
    metadata = json.loads((workdir / f"checkpoints/step_{first + 2:010d}/metadata.json").read_text())
    assert saved_steps(workdir)[-1] == first + 2 == metadata["data_step"]
    again = moe_jax("train", *words, f"--workdir={workdir}")
    assert_refused(again, f"step {first + 3}", "max_skipped_steps=3")  # the three are not forgotten


# Two trainers.


def test_a_second_trainer_in_a_workdir_is_refused_by_the_name_of_the_first(moe_jax, corpus, stopped):
    before = files(stopped)
    with loop.locked(stopped):
        outcome = moe_jax("train", *overrides(corpus, training__num_steps=8), f"--workdir={stopped}")
    assert_refused(outcome, "is in use", f"process {os.getpid()}", "another --workdir")
    assert files(stopped) - {".lock"} == before - {".lock"}
    with loop.locked(stopped):  # released
        pass


def test_the_lock_ends_with_its_process_and_readers_do_not_need_it(moe_jax, corpus, stopped):
    (stopped / ".lock").write_text("process 1 on elsewhere\n")  # what a killed trainer leaves
    with loop.locked(stopped):
        assert moe_jax("eval", f"--workdir={stopped}", "--batches=1").code == 0


def test_without_file_locks_training_goes_on_with_a_warning(tmp_path, caplog, monkeypatch):
    import errno
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with loop.locked(tmp_path / "run"):
        assert "cannot be locked (No locks available)" in caplog.text
