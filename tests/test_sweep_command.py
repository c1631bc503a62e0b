"""``moe-jax sweep`` from its words to its tables, with real workers."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from running import REPOSITORY, moe_jax

__all__ = ["moe_jax"]

SWEEP = """
from experiments.base import SCALES, get_config
from moe_jax.sweeps import Continue, Evaluate, Scale, Sweep, falls, reported


def measure(model):
    return {"kept_steps": len(model.steps()), "ce_of_first": model.at_step(model.steps()[0]).sums()["ce_P"].sum(),
            "rows": model.config.data.sequence_length}


SWEEP = Sweep(
    number=1, title="Tiny", question="Does it run?", paper="nobody", config=get_config,
    settings={**SCALES["smoke"].settings, "model.num_layers": 2, "training.checkpoint_every": 3, "training.keep_checkpoints": 9},
    arms={
        "first": {"moe.num_shared_experts": 1},
        "buffers": Evaluate("first", {"moe.eval_dispatch": "gather", "moe.eval_capacity_factor": 0.5}),
        "long": Evaluate("first", {"data.sequence_length": 64}),
        "unshared": Evaluate("first", {"moe.num_shared_experts": 0, "moe.experts_per_token": 2}),
        "elsewhere": Evaluate("first", {"data.source": "standard_library", "data.max_bytes": 60_000}),
        "more": Continue("first", {"training.num_steps": 9}),
        "broken": {"data.source": "files:/there/is/no/such/folder"},
    },
    expected=(falls("ce", "first", "more"), reported("ce", "buffers", "first")),
    metrics=("ce", "drop_fraction", "rows"), scales={"smoke": Scale(1), "quick": Scale(3), "full": Scale(5)}, measure=measure)
"""
MARKS = "".join(f"<!-- results of {scale} -->\n<!-- end of results of {scale} -->\n" for scale in ("quick", "full"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("all") / "tiny"
    folder.mkdir()
    (folder / "sweep.py").write_text(SWEEP)
    (folder / "README.md").write_text(f"# Tiny\n{MARKS}")
    return folder


def sweep(folder: pathlib.Path, *words):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "COLUMNS": "200"}
    environment.pop("XLA_FLAGS", None)
    return subprocess.run([sys.executable, "-m", "moe_jax", "sweep", str(folder), f"--scratch={folder.parent}/scratch", *words],
                          cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_sweep_from_its_words_to_its_tables(folder):
    found = sweep(folder, "--seeds=4")
    assert found.returncode == 1 and "Traceback" not in found.stderr
    (problem,) = [line for line in found.stderr.splitlines() if line.startswith("moe-jax sweep")]
    assert "tiny/broken_seed4" in problem and "/there/is/no/such/folder" in problem
    results = {path.name.removesuffix("_seed4.json"): json.loads(path.read_text())
               for path in (folder / "results" / "quick").glob("*.json")}
    assert set(results) == {"first", "buffers", "long", "unshared", "elsewhere", "more"}
    metrics = {arm: result["metrics"] for arm, result in results.items()}
    assert metrics["buffers"]["drop_fraction"] > 0 == metrics["first"]["drop_fraction"]
    assert [metrics[arm]["rows"] for arm in ("first", "long")] == [32, 64]
    assert len({round(each["ce"], 6) for each in metrics.values()}) == 6  # each was evaluated otherwise
    assert metrics["unshared"]["choices_per_token"] == 2
    assert (metrics["first"]["kept_steps"], metrics["more"]["kept_steps"]) == (2, 3)  # 3, 6; and 9
    assert results["first"]["curve"]["step"] == [1, 2, 3, 4, 5, 6] and results["more"]["curve"]["step"][-1] == 9
    assert results["first"]["machine"]["jobs"] == 2 and len(results["first"]["code"]["source_hash"]) == 16
    assert (folder / "results" / "quick.png").read_bytes().startswith(b"\x89PNG")
    readme = (folder / "README.md").read_text()
    assert "| ce: first > more | < 0 |" in readme and "![Tiny](results/quick.png)" in readme
    assert not [path for path in (folder.parent / "scratch" / "tiny" / "quick").iterdir() if "broken" not in path.name]

    written = {path: path.stat().st_mtime_ns for path in (folder / "results" / "quick").glob("*.json")}
    again = sweep(folder, "--seeds=4", "--arms=first,buffers,long,unshared,elsewhere,more")
    assert again.returncode == 0 and "runs to train" not in again.stderr
    assert "not resolved" in again.stdout and "-" in again.stdout
    assert written == {path: path.stat().st_mtime_ns for path in (folder / "results" / "quick").glob("*.json")}


@pytest.mark.parametrize("words, message", [
    ([], "name an experiment"), (["nowhere"], "has no sweep.py"), (["{}", "--scale=huge"], "allowed are smoke, quick, full"),
    (["{}", "--arms=first,second"], "Tiny has no arm 'second'; it has first, buffers"), (["{}", "--seeds=a"], "must be numbers or ranges"),
    (["{}", "--seeds=3-1"], "must be numbers or ranges"), (["{}", "--jobs=0"], "must be at least 1"),
    (["{}", "--scratch=/dev/null/runs"], "/dev/null/runs: runs cannot be trained there (Not a directory)"),
    (["--scoreboard", "a", "b"], "takes one folder"), (["--scoreboard", "nowhere"], "holds no experiments"),
])
def test_words_that_cannot_work_are_one_line(words, message, folder, moe_jax):
    outcome = moe_jax("sweep", *(word.format(folder) for word in words))
    assert outcome.code == 1 and message in outcome.error


def test_the_table_of_what_is_there_runs_nothing(folder, moe_jax, tmp_path):
    outcome = moe_jax("sweep", folder, "--scale=full", "--table", f"--scratch={tmp_path}")
    assert outcome.code == 0 and "Tiny, full" in outcome.out and list(tmp_path.iterdir()) == []
