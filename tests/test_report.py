"""The report: complete for a complete run, honest about what an interrupted one lacks, safe for any text."""

import errno
import json
import math
import pathlib
import re

import numpy as np
import pytest

from moe_jax.analysis import report as report_module
from moe_jax.analysis import report_figures
from moe_jax.analysis.report import ReportError, write_report
from moe_jax.analysis.run_directory import FILES, read_run, series
from moe_jax.training.metrics import MetricsWriter, routing_metrics

LAYERS, EXPERTS, POSITIONS = [1, 3], 8, 256
DOMAINS = ["code", "prose", "tests <b>&$x$"]


def make_run(workdir, num_steps=300, stopped_at=300, ce=1.62):
    """A run directory as training leaves it, with invented numbers of the usual shapes."""
    random = np.random.default_rng(0)
    workdir.mkdir()
    write_settings(workdir, num_steps)
    skew_LE = np.sort(random.normal(0, 1.0, (len(LAYERS), EXPERTS)), axis=1)
    random.permuted(skew_LE, axis=1, out=skew_LE)
    with MetricsWriter(workdir, tensorboard=False) as writer:
        for step in range(5, stopped_at + 1, 5):
            share_LE = np.exp(skew_LE * np.exp(-step / 90) * 1.2 + random.normal(0, 0.06, skew_LE.shape))
            counts_LE = np.round(8192 * share_LE / share_LE.sum(axis=1, keepdims=True))
            statistics = {
                "counts_LE": counts_LE,
                "kept_LE": np.minimum(counts_LE, 1.25 * 1024),
                "valid_tokens": 4096,
                "entropy_L": math.log(EXPERTS) * (0.55 + 0.42 * np.exp(-step / np.array([80, 140]))),
                "confidence_L": [0.4, 0.5],
                "logit_max_L": [4.0, 6.0],
                "layers": LAYERS,
            }
            values = {
                "loss/ce": ce + 3.9 * math.exp(-step / 45) + random.normal(0, 0.05),
                "loss/balance": 1 + 0.6 * math.exp(-step / 90),
                "loss/router_z": 4.3 * math.exp(-step / 200) + 0.8,
                "tokens_per_second": 11500 + random.normal(0, 260) - (2500 if step % 100 == 5 else 0),
                "tokens_seen": step * 4096,
                "data_wait_seconds": 0.0004,
            }
            writer.write(step, values | routing_metrics(statistics))
            if step % 50 == 0:
                writer.write(step, {"loss/ce": ce + 0.04 + 3.9 * math.exp(-step / 45)}, kind="eval")
    write_evaluation(workdir, stopped_at, ce + 0.045, random)
    return workdir


def write_settings(workdir, num_steps):
    config = {
        "model": {"num_layers": 4, "d_model": 128, "num_heads": 4, "activation": "swiglu", "dtype": "float32"},
        "moe": {"num_experts": EXPERTS, "experts_per_token": 2, "capacity_factor": 1.25, "balance_loss": "switch"},
        "data": {"source": "standard_library", "sequence_length": POSITIONS, "batch_size": 16, "seed": 0},
        "mesh": {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1},
        "optimizer": {"name": "adamw", "learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 50},
        "training": {"num_steps": num_steps, "log_every": 5, "sample_prompts": "def |import |The "},
    }
    versions = {"python": "3.11.7", "jax": "0.10.2", "git_commit": "0123456789abcdef", "device_kind": "cpu"}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "versions.json").write_text(json.dumps(versions | {"device_count": 8, "moe_jax": None}))


def write_evaluation(workdir, step, ce, random):
    evaluation = {
        "step": step,
        "ce": ce,
        "bits_per_byte": ce / math.log(2),
        "tokens": 81920,
        "documents": 57,
        "baselines": {"unigram": {"ce": 3.31, "bits_per_byte": 4.78}, "bigram": {"ce": 2.47, "bits_per_byte": 3.56}},
        "domains": {name: {"ce": ce + d, "bits_per_byte": 2.4 + d, "tokens": 27000} for d, name in enumerate(DOMAINS)},
        "dispatch": "dropless",
        "capacity": {"ce": ce + 0.02, "drop_fraction": 0.031, "capacity_factor": 1.25},
    }
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    share_PLE = random.dirichlet(np.full(EXPERTS, 4.0), (len(DOMAINS), len(LAYERS)))
    ramp_S = np.clip(np.linspace(-0.03, 0.12, POSITIONS), 0, 1)
    (workdir / "routing").mkdir()
    np.savez(
        workdir / "routing" / "evaluation.npz",
        drop_rate_LS=np.clip(np.stack([ramp_S, 0.5 * ramp_S]) + random.normal(0, 0.004, (2, POSITIONS)), 0, 1),
        choices_at_position_S=np.full(POSITIONS, 640),
        domain_load_PLE=share_PLE,
        entropy_L=np.array([1.2, 1.3]),
        layers=np.array(LAYERS),
        domains=np.array(DOMAINS),
    )
    samples = [
        {
            "prompt": "def ",
            "text": 'def test_read(self):\n    """Read <b>all</b> & check."""\n    self.assertEqual(a, 1)\n',
        },
        {"prompt": "The ", "text": "<script>alert(1)</script> of the module \x1b[31m\x00 is the name \ud800."},
    ]
    (workdir / "samples.json").write_text(json.dumps(samples))


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    workdir = make_run(tmp_path_factory.mktemp("report") / "openmoe_tiny")
    path = write_report(workdir)
    assert path == workdir / "report.html"
    return path.read_text(encoding="utf-8")


def test_a_complete_run_shows_every_figure(complete):
    assert complete.count("data:image/png;base64,") == 7
    for word in ("Not shown", "Could not be drawn", "Incomplete run", "is missing"):
        assert word not in complete
    for title, _ in report_module.SECTIONS:
        assert f"<h2>{title}</h2>" in complete


def test_the_page_needs_no_network(complete):
    without_images = re.sub(r"data:image/png;base64,[^\"]+", "", complete)
    assert not re.search(r"https?://|<link|<script|@import|url\(|src=\"(?!\")", without_images)


def test_every_figure_says_how_to_read_it_and_on_how_many_tokens(complete):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", complete, re.S)
    assert len(captions) == 7
    for caption in captions:
        assert "How to read it:" in caption and re.search(
            r"\d[\d,]+ (training tokens|held-out tokens|choices)", caption
        )


def test_the_headline_stands_beside_its_baselines(complete):
    assert "1.665" in complete and "<td>unigram</td><td>3.310</td><td>4.780</td>" in complete
    assert "The model beats the bigram model and the unigram model: 0.8" in complete
    assert "81,920 held-out tokens of 57 documents" in complete and "factor 1.25 (3.1 % dropped)" in complete


@pytest.mark.parametrize(
    "ce, kind, words",
    [
        (2.0, "good", "beats the bigram model and the unigram model: 0.50 nats"),
        (2.8, "mixed", "beats the unigram but not the bigram model: 0.30 nats per token above"),
        (4.0, "bad", "does not beat any n-gram model yet: 1.50 nats per token above the bigram"),
    ],
)
def test_the_verdict_is_honest(ce, kind, words):
    verdict = report_module._verdict(ce, {"unigram": {"ce": 3.0}, "bigram": {"ce": 2.5}})
    assert f"verdict {kind}" in verdict and words in verdict


def test_text_from_the_run_cannot_become_html(complete):
    assert "<script>" not in complete and "&lt;script&gt;alert(1)&lt;/script&gt;" in complete
    assert "tests &lt;b&gt;&amp;$x$" in complete and "<b>&$x$" not in complete
    assert "\x1b" not in complete and "\u241b[31m\u2400" in complete, "control characters are made visible"


def test_config_and_versions_are_tables(complete):
    assert "<td>experts_per_token</td><td>2</td>" in complete and "<td>learning_rate</td><td>0.003</td>" in complete
    assert "<td>git_commit</td><td>0123456789abcdef</td>" in complete and "<td>moe_jax</td><td>–</td>" in complete


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "damaged", "another kind"])
def test_any_file_may_be_missing_or_damaged(tmp_path, name, damage, monkeypatch):
    monkeypatch.setattr(report_figures, "WIDTH", 2.0)  # quick: what is drawn does not matter here
    monkeypatch.setattr(report_module, "_figure", lambda figure, caption, how: "<figure></figure>")
    workdir = make_run(tmp_path / "run", stopped_at=20)
    path = workdir / name
    path.unlink() if damage == "missing" else path.write_text('{"half' if damage == "damaged" else "3")
    text = write_report(workdir).read_text()
    assert "Incomplete run" in text and "Could not be drawn" not in text
    if name != "metrics.jsonl" or damage == "missing":  # lines that are no records are left out, as after a crash
        assert f"{name} {'is missing' if damage == 'missing' else 'cannot be read'}" in text.replace("&#x27;", "'")
    assert "<h2>Loss</h2>" in text and "<h2>Versions</h2>" in text


def test_an_empty_run_directory_still_renders(tmp_path):
    text = write_report(tmp_path).read_text()
    assert text.count("is missing: no report on") == len(FILES)
    assert "No validation result yet" in text and "data:image" not in text


def test_an_interrupted_run_says_where_it_stopped(tmp_path):
    workdir = make_run(tmp_path / "run", stopped_at=5)  # one logged step: single-point curves and heat maps
    (workdir / "evaluation.json").unlink()
    text = write_report(workdir).read_text()
    assert "The run stopped at step 5 of 300; the same command continues it" in text
    assert "Could not be drawn" not in text and "No validation result yet" in text


def test_a_model_without_buffers_has_no_drops_to_show(tmp_path):
    workdir = make_run(tmp_path / "run", stopped_at=20)
    assert f"{640 * POSITIONS:,} choices on held-out text, in all layers" in write_report(workdir).read_text()
    config = json.loads((workdir / "config.json").read_text())
    config["moe"]["dispatch"] = "dropless"
    (workdir / "config.json").write_text(json.dumps(config))
    text = write_report(workdir).read_text()
    assert "trained without buffers (moe.dispatch=dropless)" in text and "choices on held-out text" not in text


def test_one_odd_array_does_not_cost_the_report(tmp_path):
    workdir = make_run(tmp_path / "run", stopped_at=20)
    np.savez(workdir / "routing" / "evaluation.npz", drop_rate_LS=np.zeros(3), domain_load_PLE=np.zeros((2, 2, 2)))
    text = write_report(workdir).read_text()
    assert "Could not be drawn" in text and text.count("data:image") >= 4


def test_not_finite_losses_leave_gaps_not_errors(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(1, 100):
            writer.write(step, {"loss/ce": math.nan if step > 50 else 3.0, "loss/balance": math.inf})
    steps, values = series(read_run(tmp_path), "train", "loss/ce")
    assert len(steps) == 99 and np.isnan(values[50:]).all() and (values[:50] == 3.0).all()
    text = write_report(tmp_path).read_text()
    assert "Could not be drawn" not in text and text.count("data:image") == 1


def test_many_layers_experts_and_positions_fit(tmp_path):
    random = np.random.default_rng(0)
    layers = list(range(1, 24, 2))
    figure = report_figures.load_over_training(np.arange(50) * 10, random.gamma(4, 0.25, (50, 12, 64)), layers)
    assert figure.get_figheight() <= 16
    report_figures.domains_by_expert(random.dirichlet(np.ones(64), (6, 12)), [f"domain {i}" for i in range(6)], layers)
    report_figures.drops_by_position(random.random((12, 2048)), np.full(2048, 9), layers)


def test_bins_weigh_positions_by_their_choices():
    # bins of 2 positions; in the first, 30 choices at rate 0 and 10 at rate 1: 10 / 40.
    positions, rate_LB = report_figures.binned(
        np.array([[0.0, 1.0, 0.5, 0.5, 0.2]]), np.array([30, 10, 5, 5, 0]), most=3
    )
    np.testing.assert_allclose(positions, [0.5, 2.5, 4.0])
    np.testing.assert_allclose(rate_LB, [[0.25, 0.5, np.nan]])


def test_smoothing_keeps_level_and_skips_gaps():
    values = np.full(200, 2.0)
    values[50:60] = np.nan
    np.testing.assert_allclose(report_figures.smooth(values)[[0, 47, 100, 199]], 2.0)


def test_no_run_directory_is_one_line(tmp_path):
    with pytest.raises(ReportError, match="No run directory at .*: give the workdir of a training run"):
        write_report(tmp_path / "nowhere")


def test_a_failed_write_keeps_the_previous_report(tmp_path, monkeypatch):
    (tmp_path / "report.html").write_text("previous")


    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "replace", full)
    with pytest.raises(ReportError, match="Cannot write .*report.html: No space left on device"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "previous" and len(list(tmp_path.iterdir())) == 1
