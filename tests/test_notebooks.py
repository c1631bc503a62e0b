"""The notebooks run from beginning to end, on a model of seconds, and their first cell leaves Colab's JAX alone."""

import os
import pathlib
import re
import subprocess
import sys
import types
from unittest import mock

import nbformat
import pytest
from nbclient import NotebookClient
from running import TINY, corpus

__all__ = ["corpus"]

NOTEBOOKS = pathlib.Path(__file__).resolve().parents[1] / "notebooks"
NAMES = ("quickstart", "routing_analysis", "add_a_router")


def notebook(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def code_cells(found):
    return [cell for cell in found.cells if cell.cell_type == "code"]


def run(name, corpus, folder, **parameters):
    """The notebook executed with other values after its cell of parameters: (what it printed, number of pictures)."""
    found = notebook(name)
    (place,) = [i for i, cell in enumerate(found.cells) if "parameters" in cell.metadata.get("tags", ())]
    tiny = {**TINY, "data.source": f"files:{corpus}", "training.eval_batches": 1, "training.sample_length": 4,
            "training.checkpoint_every": 2, "training.eval_every": 2}
    del tiny["training.num_steps"]
    values = {"OVERRIDES": [f"--config.{key}={value}" for key, value in tiny.items()], **parameters}
    assert set(values) <= set(re.findall(r"\w+", found.cells[place].source)), "the cell of parameters names others"
    found.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(f"{key} = {value!r}" for key, value in values.items())))
    environment = {"IPYTHONDIR": str(folder / "ipython"), "JUPYTER_CONFIG_DIR": str(folder / "jupyter")}
    with mock.patch.dict(os.environ, environment):
        os.environ.pop("MPLBACKEND", None)  # the kernel's own shows pictures in the notebook
        NotebookClient(found, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    outputs = [output for cell in code_cells(found) for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    return text, sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.fixture(scope="module")
def quickstart(corpus, tmp_path_factory):
    """(what it printed, number of pictures, run directory)."""
    folder = tmp_path_factory.mktemp("quickstart")
    return *run("quickstart", corpus, folder, STEPS=4, WORKDIR=str(folder / "run")), folder / "run"


@pytest.mark.slow
def test_quickstart_trains_and_shows_the_routing(quickstart):
    text, pictures, workdir = quickstart
    assert re.search(r"held-out text: \d\.\d+ nats per token", text) and "uniform: 0.250; here" in text
    assert "--- 'def '" in text and pictures == 2
    assert (workdir / "report.html").exists()


@pytest.mark.slow
def test_routing_analysis_records_and_draws_the_run_of_quickstart(quickstart, corpus, tmp_path):
    text, pictures = run("routing_analysis", corpus, tmp_path, STEPS=4, WORKDIR=str(quickstart[-1]), BATCHES=0)
    assert re.search(r"steps \[2, 4\]: [\d,]+ tokens, layers \(1,\), 4 experts, 2 per token", text)
    assert "same number: 1.000, by chance 0.250" in text  # one layer
    assert pictures == 10


@pytest.mark.slow
def test_add_a_router_trains_the_new_router_beside_top_k(quickstart, corpus, tmp_path):
    text, _ = run("add_a_router", corpus, tmp_path, STEPS=4, TOP_K=str(quickstart[-1]), GROUPED=str(tmp_path / "grouped"))
    assert "as by hand" in text and "moe.experts_per_token=3: must divide moe.num_experts=8 into groups" in text
    assert "grouped_top_k  [[0.5, 0.5]]" in text


def test_the_router_of_the_notebook_is_that_of_the_document():
    blocks = re.findall(r"```python\n(.*?)```", (NOTEBOOKS.parent / "docs" / "adding_a_router.md").read_text(), re.DOTALL)
    sources = [cell.source for cell in code_cells(notebook("add_a_router"))]
    assert blocks[0].strip() in sources


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_committed_without_outputs_and_begin_alike(name):
    found = notebook(name)
    nbformat.validate(found)
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(found))
    assert code_cells(found)[0].source == code_cells(notebook(NAMES[0]))[0].source
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(NAMES)


def test_on_colab_pip_may_not_touch_jax(tmp_path, monkeypatch):
    """The first cell with commands that are only written down."""
    import importlib.metadata

    commands = []

    def noted(words, check):
        commands.append(words)
        if words[0] == "git":
            pathlib.Path("moe_jax").mkdir()
            pathlib.Path("moe_jax/setup.py").touch()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(subprocess, "run", noted)
    monkeypatch.setattr("moe_jax.environment.prepare_process", lambda devices: None)
    source = code_cells(notebook("quickstart"))[0].source
    with pytest.raises(AssertionError, match="Set REPOSITORY above"):
        exec(source, {})
    for _ in range(2):  # as "Run all" does in a notebook that has run
        exec(source.replace('REPOSITORY = ""', 'REPOSITORY = "https://example.org/moe_jax"'), {})
    clone, install = commands
    assert clone[-2:] == ["https://example.org/moe_jax", "moe_jax"]
    assert install[1:4] == ["-m", "pip", "install"] and install[-3:] == ["-c", "constraints.txt", "./moe_jax"]
    kept = (tmp_path / "constraints.txt").read_text().splitlines()
    assert {f"{name}=={importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "numpy")} <= set(kept)
    assert pathlib.Path.cwd() == tmp_path / "moe_jax"
