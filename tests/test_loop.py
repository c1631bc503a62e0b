"""What a whole run leaves behind, and that the loop counts, reads and reports everything once."""

import json
import re

import jax
import numpy as np
import pytest
from running import config_of, corpus, curve, lines, moe_jax, overrides, read_json, run_alone, run_here, saved_steps

from moe_jax.analysis import report
from moe_jax.nn.moe import RoutingMode
from moe_jax.training import loop
from moe_jax.training.processes import ProcessError
from moe_jax.training.run import open_run

__all__ = ["corpus", "moe_jax"]


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """(workdir, what a run in its own process printed): 12 steps, samples, report."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    words = overrides(corpus, training__sample_length=8, training__log_every=2)
    outcome = run_alone("train", *words, f"--workdir={workdir}")
    assert outcome.code == 0, outcome.err
    return workdir, outcome


@pytest.fixture
def no_report(monkeypatch):
    """Seven figures take longer than a tiny run."""
    monkeypatch.setattr(report, "write_report", lambda workdir: (workdir / "report.html").write_text("drawn elsewhere"))


# What is left behind.


def test_the_workdir_has_the_documented_layout(run):
    workdir, _ = run
    there = {path.name for path in workdir.iterdir()} - {"compilation_cache"}
    assert there == {
        "config.json", "versions.json", "checkpoints", "tensorboard", "metrics.jsonl", "routing", "report.html",
        "evaluation.json", "samples.json", "complete.json", ".lock"}
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert saved_steps(workdir) == [4, 8, 12]
    assert not list(workdir.rglob("*.partial")) and not list(workdir.rglob("*.writing"))


def test_config_and_versions_say_how_to_do_it_again(run, corpus):
    workdir, _ = run
    config = read_json(workdir / "config.json")
    expected = config_of(corpus, training__sample_length=8, training__log_every=2).to_dict()
    assert config == json.loads(json.dumps(expected))
    versions = read_json(workdir / "versions.json")
    assert versions["jax"] == jax.__version__ and versions["device_count"] == 1 and versions["backend"] == "cpu"
    assert versions["python"] and versions["orbax"] and "git_commit" in versions


def test_every_logged_step_has_every_metric_and_a_cpu_claims_no_mfu(run):
    workdir, _ = run
    train = lines(workdir)
    assert [line["step"] for line in train] == [1, 2, 4, 6, 8, 10, 12]
    names = {"loss/ce", "loss/balance", "loss/router_z", "loss/output_z", "loss/total", "grad_norm", "router_grad_norm",
             "learning_rate", "tokens_seen", "expert_load"}
    per_layer = {"load_max", "load_min", "load_cv", "max_violation", "dead_experts", "drop_fraction", "entropy",
                 "confidence", "logit_max"}
    names |= {f"moe/{name}" for name in per_layer} | {f"moe/layer_1/{name}" for name in per_layer}
    for line in train:
        assert names <= line.keys(), names - line.keys()
        assert all(np.isfinite(line[name]) for name in names - {"expert_load"})
        assert "mfu" not in line
        assert line["tokens_seen"] == line["step"] * 8 * 16
    clocked = [line for line in train if "tokens_per_second" in line]
    assert len(clocked) >= 3
    for line in clocked:
        assert line["tokens_per_second"] > 0 and line["data_wait_seconds"] >= 0 and line["model_tflops_per_second"] > 0
    assert "tokens_per_second" not in train[0]  # the first step compiled
    total = train[3]
    assert total["loss/total"] == pytest.approx(
        total["loss/ce"] + 1e-4 * total["loss/output_z"] + 0.01 * total["loss/balance"] + 1e-4 * total["loss/router_z"],
        rel=1e-5)


def test_evaluation_lines_hold_cross_entropy_alone_by_domain(run):
    workdir, _ = run
    evaluations = lines(workdir, "eval")
    assert [line["step"] for line in evaluations] == [6, 12]
    for line in evaluations:
        assert {"loss/ce", "bits_per_byte", "tokens", "domain/fruit/ce", "domain/sums/ce"} <= line.keys()
        assert line["tokens"] == 2 * 8 * 16  # eval_batches


def test_the_evaluation_stands_beside_its_baselines_and_domains(run):
    workdir, outcome = run
    evaluation = read_json(workdir / "evaluation.json")
    assert evaluation["step"] == 12 and evaluation["dispatch"] == "dropless"
    assert evaluation["ce"] == lines(workdir, "eval")[-1]["loss/ce"]
    # The corpus has twelve words: even these know it better than a model after twelve steps.
    assert evaluation["baselines"]["bigram"]["ce"] < evaluation["baselines"]["unigram"]["ce"] < evaluation["ce"] < 6.5
    domains = evaluation["domains"]
    assert set(domains) == {"fruit", "sums"}
    tokens = sum(part["tokens"] for part in domains.values())
    assert tokens == evaluation["tokens"] == 2 * 8 * 16
    assert sum(p["ce"] * p["tokens"] for p in domains.values()) / tokens == pytest.approx(evaluation["ce"])
    per_byte = evaluation["ce"] / np.log(2) * evaluation["tokens"] / evaluation["bytes"]
    assert evaluation["bits_per_byte"] == pytest.approx(per_byte)
    assert evaluation["capacity"]["capacity_factor"] == 1.25 and 0 < evaluation["capacity"]["drop_fraction"] < 1
    assert "causal" not in evaluation  # top-k without drops is
    said = [line for line in outcome.err.splitlines() if line.startswith("Validation:")]
    assert len(said) == 1 and "unigram model" in said[0] and "bigram model" in said[0]


def test_samples_and_the_report_are_of_this_run(run):
    workdir, outcome = run
    samples = read_json(workdir / "samples.json")
    assert [sample["prompt"] for sample in samples] == ["def ", "import ", "The "]
    assert all(isinstance(sample["text"], str) for sample in samples)
    page = (workdir / "report.html").read_text()
    assert "num_experts" in page and "bigram" in page and "step 12 of 12" in page
    assert str(workdir / "report.html") in outcome.err
    with np.load(workdir / "routing" / "evaluation.npz") as arrays:
        assert arrays["drop_rate_LS"].shape == (1, 16)
        np.testing.assert_allclose(arrays["domain_load_PLE"].sum(-1), 1.0)


def test_a_plain_run_prints_one_line_per_logged_step_and_nothing_from_libraries(run):
    _, outcome = run
    steps = [line for line in outcome.err.splitlines() if re.match(r"step +\d+/12  ", line)]
    assert [int(re.match(r"step +(\d+)", line).group(1)) for line in steps] == [1, 2, 4, 6, 8, 10, 12]
    for line in steps:
        assert re.search(r"loss \d\.\d{4}  .*drop \d+\.\d %  imbalance \d\.\d\d  eta ", line), line
    assert "tokens/s" in steps[1]
    sections = ("model:", "attention:", "moe:", "data:", "mesh:", "optimizer:", "training:", "versions:")
    known = (*sections, "step ", "First step after", "Validation:", "Done in", "17,040 parameters")
    strange = [line for line in outcome.err.splitlines() if not line.startswith(known)]
    assert strange == []
    assert outcome.err.count("First step after") == 1
    assert outcome.out == ""
    for name in ("num_experts=4", "learning_rate=0.003", "jax "):
        assert name in outcome.err


def test_a_complete_run_says_so_and_opens_nothing(run, corpus, moe_jax, monkeypatch):
    workdir, _ = run
    monkeypatch.setattr(loop, "open_run", lambda *_: pytest.fail("the run was opened"))
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    words = overrides(corpus, training__sample_length=8, training__log_every=2)
    outcome = moe_jax("train", *words, f"--workdir={workdir}")
    assert outcome.code == 0
    assert "is complete (12 steps)" in outcome.err and str(workdir / "report.html") in outcome.err
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


# The loop.


def test_every_step_is_read_once_and_a_checkpoint_knows_the_tokens_before_it(corpus, tmp_path, monkeypatch, no_report):
    read, saved = [], []
    real_read, real_save = loop._Trainer._read, loop._Trainer._save

    def reading(self, step, metrics, waited, window):
        read.append(step)
        real_read(self, step, metrics, waited, window)

    def saving(self):
        saved.append((self.step, self.tokens_seen))
        real_save(self)

    monkeypatch.setattr(loop._Trainer, "_read", reading)
    monkeypatch.setattr(loop._Trainer, "_save", saving)
    assert run_here("train", *overrides(corpus, training__log_every=5), f"--workdir={tmp_path / 'run'}") == 0
    assert read == list(range(1, 13))
    assert saved == [(step, step * 128) for step in (4, 8, 12)]
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 5, 10, 12]


def test_a_run_killed_between_its_last_evaluation_and_its_report_has_one_evaluation_in_its_curve(
        corpus, tmp_path, monkeypatch, no_report):
    words = ("train", *overrides(corpus, training__num_steps=4), f"--workdir={tmp_path / 'run'}")

    class Killed(BaseException):
        pass

    def die(evaluation):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "baselines", lambda *_: die(None))
        with pytest.raises(Killed):
            run_here(*words)
    before = curve(tmp_path / "run")
    assert [line["step"] for line in lines(tmp_path / "run", "eval")] == [4]
    assert run_here(*words) == 0
    assert curve(tmp_path / "run") == before
    assert read_json(tmp_path / "run" / "evaluation.json")["step"] == 4


def test_a_checkpoint_that_fails_in_the_background_stops_the_run(corpus, tmp_path, moe_jax, monkeypatch):
    from moe_jax.training import checkpoint

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", fail)
    outcome = moe_jax("train", *overrides(corpus), f"--workdir={tmp_path / 'run'}")
    assert outcome.code == 1
    assert "Checkpoint of step 4" in outcome.error and "No space left" in outcome.error
    assert lines(tmp_path / "run")[-1]["step"] <= 8  # within one interval


def test_a_profile_is_written_also_when_the_run_ends_inside_it(corpus, tmp_path, moe_jax, no_report):
    words = overrides(corpus, training__num_steps=4, training__profile_start=2, training__profile_steps=5)
    outcome = moe_jax("train", *words, f"--workdir={tmp_path / 'run'}")
    assert outcome.code == 0
    assert "Profile written" in outcome.err
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert moe_jax("train", *words[:-1], words[-1], f"--workdir={tmp_path / 'run'}").code == 0


def test_a_run_resumed_behind_its_profile_does_not_stop_one(corpus, tmp_path, moe_jax, no_report):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert moe_jax("train", *overrides(corpus, training__num_steps=4), workdir).code == 0
    words = overrides(corpus, training__num_steps=8, training__profile_start=1, training__profile_steps=3)
    assert moe_jax("train", *words, workdir, "--allow-config-change").code == 0
    assert not (tmp_path / "run" / "profile").exists()


# Other models.


@pytest.mark.slow
def test_a_dense_model_trains_evaluates_and_reports(corpus, tmp_path, moe_jax):
    words = overrides(corpus, moe__num_experts=0, moe__bias_update_rate=0.0, training__num_steps=4)
    outcome = moe_jax("train", *words, f"--workdir={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    assert "drop" not in outcome.err.split("First step")[1].split("Validation")[0]
    evaluation = read_json(tmp_path / "run" / "evaluation.json")
    assert evaluation["dispatch"] == "dense" and "capacity" not in evaluation and "causal" not in evaluation
    assert not (tmp_path / "run" / "routing").exists()
    assert not any("moe/drop_fraction" in line for line in lines(tmp_path / "run"))
    assert (tmp_path / "run" / "report.html").exists()
    found = moe_jax("eval", f"--workdir={tmp_path / 'run'}", "--batches=2", "--json")
    assert json.loads(found.out)["ce"] == pytest.approx(evaluation["ce"], rel=1e-6)


@pytest.mark.slow
def test_every_dispatcher_trains_and_those_without_drops_agree(corpus, tmp_path, no_report):
    losses = {}
    for dispatch in ("dropless", "reference", "einsum"):
        words = overrides(corpus, moe__dispatch=dispatch, training__num_steps=4)
        assert run_here("train", *words, f"--workdir={tmp_path / dispatch}") == 0
        losses[dispatch] = [line["loss/ce"] for line in lines(tmp_path / dispatch)]
        dropped = [line["moe/drop_fraction"] for line in lines(tmp_path / dispatch)]
        assert (max(dropped) > 0) == (dispatch == "einsum")
        assert ("capacity" in read_json(tmp_path / dispatch / "evaluation.json")) == (dispatch == "einsum")
    np.testing.assert_allclose(losses["dropless"], losses["reference"], rtol=1e-5)


EXPERT_CHOICE = dict(moe__router="expert_choice", moe__balance_weight=0.0, moe__bias_update_rate=0.0,
                     training__num_steps=4)


@pytest.mark.slow
def test_expert_choice_over_the_batch_is_causal_and_trains(corpus, tmp_path, moe_jax, no_report):
    words = overrides(corpus, **EXPERT_CHOICE, moe__group_over="batch")
    outcome = moe_jax("train", *words, f"--workdir={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    assert "causal" not in read_json(tmp_path / "run" / "evaluation.json")
    assert "not causal" not in outcome.err


@pytest.mark.slow
def test_a_router_that_sees_the_future_is_also_evaluated_causally_and_the_last_line_says_so(corpus, tmp_path, moe_jax):
    refused = moe_jax("train", *overrides(corpus, **EXPERT_CHOICE), f"--workdir={tmp_path / 'run'}")
    assert refused.code == 1 and "allow_noncausal_routing" in refused.error
    words = overrides(corpus, **EXPERT_CHOICE, moe__allow_noncausal_routing=True)
    outcome = moe_jax("train", *words, f"--workdir={tmp_path / 'run'}")
    assert outcome.code == 0, outcome.err
    evaluation = read_json(tmp_path / "run" / "evaluation.json")
    causal = evaluation["causal"]
    assert causal.keys() == {"ce", "bits_per_byte", "how"}
    assert causal["ce"] != evaluation["ce"]
    assert causal["bits_per_byte"] / causal["ce"] == pytest.approx(evaluation["bits_per_byte"] / evaluation["ce"])
    assert "without seeing later tokens" in (tmp_path / "run" / "report.html").read_text()
    assert evaluation["documents"] >= 1
    assert "not causal" in outcome.err and f"{causal['ce']:.3f} nats" in outcome.err
    found = json.loads(moe_jax("eval", f"--workdir={tmp_path / 'run'}", "--batches=2", "--json").out)
    assert found["causal"]["ce"] == pytest.approx(causal["ce"], rel=1e-6)


def test_which_evaluations_are_causal(corpus):
    def mode_is_causal(dispatch, router="", **settings):
        settings = {"moe__allow_noncausal_routing": True, **settings}
        return RoutingMode(dispatch, 1.0, router=router).is_causal(config_of(corpus, **settings))

    choice = {"moe__router": "expert_choice", "moe__balance_weight": 0.0, "moe__bias_update_rate": 0.0}
    assert mode_is_causal("gather")
    assert not mode_is_causal("gather", moe__fill_order="choice_major")
    assert mode_is_causal("dropless", moe__fill_order="choice_major")  # nothing is dropped, whatever the order
    dropless = {"moe__dispatch": "dropless", "moe__eval_dispatch": "dropless"}
    assert not mode_is_causal("gather", moe__fill_order="choice_major", **dropless)  # eval --dispatch=gather drops
    assert not mode_is_causal("dropless", **choice)
    assert mode_is_causal("dropless", router="top_k", **choice)
    assert mode_is_causal("gather", **choice, moe__group_over="batch")
    assert mode_is_causal("gather", moe__num_experts=0)


def test_several_processes_that_did_not_join_are_refused_rather_than_fed_every_row_twice(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ProcessError, match="2 processes, but JAX's coordination service was not started: pass --distributed"):
        open_run(config_of(corpus), tmp_path)
