"""Interrupted in whatever way, a run ends where an uninterrupted one ends: bit for bit on one topology (R1, R2, R3)."""

import time

import jax
import numpy as np
import pytest
from running import (
    config_of, corpus, curve, lines, moe_jax, newest_state, overrides, read_json, run_alone, run_here, saved_steps)

from moe_jax.data.batches import Batches

__all__ = ["corpus", "moe_jax"]
STEPS = 12  # checkpoints at 4, 8 and 12; an evaluation at 6 and at the end


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    outcome = run_alone("train", *overrides(corpus), f"--workdir={workdir}")
    assert outcome.code == 0, outcome.err
    return workdir


def assert_ends_like(workdir, whole, config):
    step, metadata, leaves = newest_state(workdir, config)
    expected_step, expected_metadata, expected = newest_state(whole, config)
    assert step == expected_step == STEPS
    assert {"params", "opt_state", "router_bias_LE", "rng", "ema", "skipped", "step"} == {
        path.split("'")[1] for path in expected}
    assert {path for path in expected if leaves[path] != expected[path]} == set()
    assert metadata["tokens_seen"] == expected_metadata["tokens_seen"] == STEPS * 8 * 16
    assert curve(workdir) == curve(whole)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_bitwise_like_one_that_was_not(corpus, whole, tmp_path):
    words = ("train", *overrides(corpus), f"--workdir={tmp_path / 'run'}")
    # Before the first checkpoint; while the one of step 4 is being written; after an evaluation; before the report.
    for event, at in (("kill", 3), ("kill", 4), ("kill", 9), ("kill in report", 0)):
        outcome = run_alone(*words, event=event, at=at)
        assert outcome.code == -9, outcome.err
        assert not (tmp_path / "run" / "complete.json").exists()
        if at == 3:
            assert saved_steps(tmp_path / "run") == []
    assert saved_steps(tmp_path / "run")[-1] == STEPS
    assert not (tmp_path / "run" / "report.html").exists()
    outcome = run_alone(*words)
    assert outcome.code == 0, outcome.err
    assert "First step" not in outcome.err  # only the evaluation and the report were missing
    assert (tmp_path / "run" / "report.html").exists() and (tmp_path / "run" / "complete.json").exists()
    assert_ends_like(tmp_path / "run", whole, config_of(corpus))


def test_a_run_killed_before_its_first_checkpoint_starts_over_with_a_clean_curve(whole):
    """The other half of the test above: nothing of the attempt is in the curve that `whole` is compared with."""
    assert [line["step"] for line in lines(whole)] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_sigterm_in_compilation_training_and_evaluation_saves_and_the_run_ends_as_if_nothing_had_happened(
        corpus, whole, tmp_path):
    words = ("train", *overrides(corpus), f"--workdir={tmp_path / 'run'}")
    # The evaluation of step 6 is put off by the second signal, ended by the third, and made by the last process.
    for event, at, saved in (
            ("terminate in compilation", 0, 1), ("terminate", 5, 6), ("terminate in evaluation", 0, 6)):
        started = time.monotonic()
        outcome = run_alone(*words, event=event, at=at)
        assert outcome.code == 143, outcome.err
        assert time.monotonic() - started < 120
        assert f"step {saved} is saved" in outcome.err and "Traceback" not in outcome.err
        assert saved_steps(tmp_path / "run")[-1] == saved
        assert lines(tmp_path / "run", "eval") == []
    assert run_alone(*words).code == 0
    assert_ends_like(tmp_path / "run", whole, config_of(corpus))


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once_even_while_it_hangs(corpus, tmp_path):
    started = time.monotonic()
    outcome = run_alone("train", *overrides(corpus), f"--workdir={tmp_path / 'run'}", event="terminate twice", at=6)
    assert outcome.code == 143
    assert time.monotonic() - started < 90  # it hangs for 100 s
    assert "once more stops at once" in outcome.err


def test_on_fewer_devices_a_run_reads_the_same_data_and_finds_the_same_losses(corpus, tmp_path, moe_jax, monkeypatch):
    read, real = [], Batches.batch

    def batch(self, step, rows=None):
        found = real(self, step, rows)
        read.append((self.split, step, found["target_ids"].tobytes()))
        return found

    words = overrides(corpus)
    assert run_here("train", *words, f"--workdir={tmp_path / 'two'}", devices=2) == 0
    half = overrides(corpus, training__num_steps=6)
    assert run_here("train", *half, f"--workdir={tmp_path / 'one'}", devices=2) == 0
    monkeypatch.setattr(Batches, "batch", batch)
    outcome = moe_jax("train", *words, f"--workdir={tmp_path / 'one'}", "--allow-config-change", devices=1)
    assert outcome.code == 0 and "Resumed from the checkpoint of step 6" in outcome.err
    steps = [step for split, step, _ in read if split == "train"]
    assert steps[0] == 6 and steps[:6] == list(range(6, 12))
    two, one = ({line["step"]: line["loss/ce"] for line in lines(tmp_path / name)} for name in ("two", "one"))
    assert [two[step] for step in range(1, 7)] == [one[step] for step in range(1, 7)]
    np.testing.assert_allclose([one[step] for step in range(7, 13)], [two[step] for step in range(7, 13)], rtol=2e-4)
    assert lines(tmp_path / "one")[-1]["tokens_seen"] == lines(tmp_path / "two")[-1]["tokens_seen"]


def test_more_steps_than_planned_need_permission_and_then_continue(corpus, tmp_path, moe_jax):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert moe_jax("train", *overrides(corpus, training__num_steps=4), workdir).code == 0
    refused = moe_jax("train", *overrides(corpus, training__num_steps=8), workdir)
    assert refused.code == 1
    assert "training.num_steps: 4 -> 8" in refused.error and "--allow-config-change" in refused.error
    assert read_json(tmp_path / "run" / "config.json")["training"]["num_steps"] == 4
    continued = moe_jax("train", *overrides(corpus, training__num_steps=8), workdir, "--allow-config-change")
    assert continued.code == 0
    assert "changed setting: training.num_steps: 4 -> 8" in continued.err
    assert "Resumed from the checkpoint of step 4" in continued.err
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 9))
    assert read_json(tmp_path / "run" / "evaluation.json")["step"] == 8
    assert read_json(tmp_path / "run" / "config.json")["training"]["num_steps"] == 8
    assert jax.sharding.get_abstract_mesh().empty  # what a test does to the process is undone
