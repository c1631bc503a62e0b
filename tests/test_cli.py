"""The command line: help, evaluation, generation and the report of an existing run."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
from running import REPOSITORY, moe_jax, overrides, read_json, run_here, write_corpus

from moe_jax import cli

__all__ = ["moe_jax"]
COMMANDS = ("train", "eval", "generate", "report", "place")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A complete run of four steps."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "texts")
    workdir = tmp_path_factory.mktemp("run") / "run"
    assert run_here("train", *overrides(corpus, training__num_steps=4), f"--workdir={workdir}") == 0
    return workdir


def help_of(capsys, *words) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command_and_an_example_to_begin_with(capsys):
    text = help_of(capsys)
    for command in COMMANDS:
        assert f"    {command}  " in text
    assert "moe-jax train --config=configs/openmoe_tiny.py" in text and "--config.moe.num_experts=16" in text
    for word in text.split():
        if word.startswith("--config=configs/"):
            assert (REPOSITORY / word.removeprefix("--config=")).is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_explains_every_option_and_its_default(capsys, command):
    text = " ".join(help_of(capsys, command).split("settings:")[0].split())
    assert "(default: workdir)" in text
    options = {"train": {"--devices": "(default: 8)"},
               "eval": {"--devices": "(default: as in training)", "--dispatch": "(default: the config's",
                        "--batches": "(default: all of them)"},
               "generate": {"--max-tokens": "(default: 200)", "--temperature": "(default: 0.8)", "--top-k": "(default: 0)",
                            "--top-p": "(default: 1.0)", "--seed": "(default: 0)", "--prompt": "(default: the empty text)"},
               "report": {}, "place": {"--nodes": "(default: 1)", "--redundant": "(default: 0)",
                                       "--out": "(default: placement.json)"}}[command]
    for option, default in options.items():
        assert default in text.split(f" {option} ", 2)[-1], option


def test_python_m_moe_jax_is_the_same_and_help_needs_no_jax():
    code = "import sys, runpy; sys.argv = ['moe-jax', '--help']\ntry: runpy.run_module('moe_jax', run_name='__main__')\n" \
           "finally: print('jax' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert "train|eval|generate|report" in found.stdout and found.stdout.endswith("False\n")


def test_eval_agrees_with_the_evaluation_at_the_end_of_training(moe_jax, run):
    outcome = moe_jax("eval", f"--workdir={run}", "--batches=2", "--json")
    assert outcome.code == 0
    found, written = json.loads(outcome.out), read_json(run / "evaluation.json")
    for name in ("step", "dispatch", "tokens", "bytes"):
        assert found[name] == written[name]
    assert found["ce"] == pytest.approx(written["ce"], rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(written["bits_per_byte"], rel=1e-6)
    for name, part in written["domains"].items():
        assert found["domains"][name] == pytest.approx(part, rel=1e-6)
    assert found["drop_fraction"] == 0


def test_eval_reads_all_of_the_validation_text_unless_told_and_prints_each_domain(moe_jax, run):
    outcome = moe_jax("eval", f"--workdir={run}")
    assert outcome.code == 0
    assert "over 4,936 tokens, 0.0 % of choices dropped" in outcome.out
    assert "  fruit " in outcome.out and "  sums " in outcome.out


def test_eval_with_buffers_reports_drops_and_settings_can_be_changed(moe_jax, run):
    words = ("eval", f"--workdir={run}", "--dispatch=gather", "--batches=2", "--json")
    tight = json.loads(moe_jax(*words, "--config.moe.eval_capacity_factor=0.5", "--config.moe.min_capacity=1").out)
    assert tight["dispatch"] == "gather" and tight["drop_fraction"] >= 0.5
    assert tight["ce"] != read_json(run / "evaluation.json")["ce"]
    assert read_json(run / "config.json")["moe"]["eval_capacity_factor"] == 2.0


def test_greedy_generation_is_the_same_twice_and_alone_or_with_other_prompts(moe_jax, run):
    words = ("generate", f"--workdir={run}", "--max-tokens=8", "--temperature=0")
    both = moe_jax(*words, "--prompt=apple", "--prompt=one two")
    assert both.code == 0
    assert both.out == moe_jax(*words, "--prompt=apple", "--prompt=one two").out
    alone = moe_jax(*words, "--prompt=apple")
    assert both.out.startswith(alone.out)
    assert both.out.count("--- step 4") == 2 and "\napple" in both.out and "\none two" in both.out


def test_another_seed_draws_another_sample_and_odd_prompts_are_no_error(moe_jax, run):
    words = ("generate", f"--workdir={run}", "--max-tokens=8")
    first, again, other = (moe_jax(*words, "--prompt=apple", f"--seed={seed}").out for seed in (1, 1, 2))
    assert first == again != other
    assert moe_jax(*words, "--prompt=").code == 0
    assert moe_jax(*words, "--prompt=caf\udce9 \U0001f34e").code == 0  # an argument that was not UTF-8


def test_reading_a_run_does_not_change_it(moe_jax, run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert moe_jax("eval", f"--workdir={run}", "--batches=1").code == 0
    assert moe_jax("generate", f"--workdir={run}", "--max-tokens=8").code == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_the_devices_of_training_are_taken_for_reading(run, tmp_path):
    parse = lambda *words: cli._devices(cli._parser().parse_args([str(word) for word in words]))
    (tmp_path / "versions.json").write_text(json.dumps({"backend": "cpu", "device_count": 2}))
    assert parse("eval", f"--workdir={tmp_path}") == 2
    assert parse("eval", f"--workdir={tmp_path}", "--devices=4") == 4
    assert parse("train", "--config=x", f"--workdir={tmp_path}") == 8
    (tmp_path / "versions.json").write_text(json.dumps({"backend": "tpu", "device_count": 256}))
    assert parse("generate", f"--workdir={tmp_path}") == 8
    assert parse("generate", f"--workdir={tmp_path / 'nothing'}") == 8


def test_the_report_of_an_interrupted_run_is_written_again_without_starting_jax(run, tmp_path):
    copy = pathlib.Path(shutil.copytree(run, tmp_path / "copy"))
    for name in ("report.html", "evaluation.json", "complete.json", "routing/evaluation.npz"):
        (copy / name).unlink()
    code = "import sys; from moe_jax.cli import main; code = main(['report', '--workdir', sys.argv[1]])\n" \
           "from jax._src import xla_bridge; print(code, len(xla_bridge._backends))"
    found = subprocess.run([sys.executable, "-c", code, copy], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [str(copy / "report.html"), "0", "0"]
    page = (copy / "report.html").read_text()
    assert "evaluation.json is missing" in page and "num_experts" in page


def test_a_report_that_cannot_be_written_is_one_line(moe_jax, run, tmp_path):
    copy = pathlib.Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "report.html").unlink()
    (copy / "report.html").mkdir()
    outcome = moe_jax("report", f"--workdir={copy}")
    assert outcome.code == 1 and "Cannot write" in outcome.error


def test_the_installed_command_finds_what_a_config_imports_from_its_folder(tmp_path):
    # An installed script has neither the current folder nor the repository's root on its path.
    code = ("import sys; sys.path = [p for p in sys.path if p not in ('', %r)]; sys.path.append(%r)\n"
            "import importlib.util, pathlib\n"
            "spec = importlib.util.spec_from_file_location('moe_jax', %r, submodule_search_locations=[%r])\n"
            "sys.modules['moe_jax'] = importlib.util.module_from_spec(spec); spec.loader.exec_module(sys.modules['moe_jax'])\n"
            "from moe_jax.config import load_config\n"
            "print(load_config(%r, []).moe.num_experts)")
    package = REPOSITORY / "moe_jax"
    code %= (str(REPOSITORY), str(tmp_path), str(package / "__init__.py"), str(package),
             str(REPOSITORY / "configs" / "openmoe_tiny.py"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "8", done.stderr


@pytest.mark.slow
def test_another_vocabulary_than_the_checkpoints_is_refused_and_another_corpus_noticed(tmp_path, moe_jax):
    corpus = write_corpus(tmp_path / "texts")
    words = overrides(corpus, training__num_steps=2, data__vocabulary="sentencepiece:280")
    workdir = f"--workdir={tmp_path / 'run'}"
    assert moe_jax("train", *words, workdir).code == 0
    (corpus / "fruit" / "another.txt").write_text("seseplusse lutone " * 300)  # other pieces, no new letters
    for command in (["generate", "--max-tokens=1"], ["eval", "--batches=1"]):
        outcome = moe_jax(*command, workdir)
        assert outcome.code == 1 and "was trained with another vocabulary" in outcome.error


@pytest.mark.parametrize("words", [["train", "--config=configs/base.py", "--config.training.seed=99999999999999999999"],
                                   ["generate", "--seed=-1"]])
def test_a_seed_that_no_key_can_hold_is_one_line(words, tmp_path, moe_jax, run):
    workdir = tmp_path / "run" if words[0] == "train" else run
    outcome = moe_jax(*words, f"--workdir={workdir}")
    assert outcome.code == 1 and "2**32" in outcome.error
