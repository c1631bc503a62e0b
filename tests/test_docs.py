"""The documents say what is true: their code runs, their settings, commands, targets and files exist."""

import argparse
import importlib
import pathlib
import re
import shlex
import sys
import types

import jax
import numpy as np
import oracles
import pytest
import records

from benchmarks import expert_parallel, families as families_benchmark, moe_layer, policy_variance
from benchmarks import train_step as train_step_benchmark
from moe_jax import cli, routing
from moe_jax.analysis.catalogue import ANALYSES, Analysis
from moe_jax.config import SECTIONS, ConfigError, known_keys, load_config
from moe_jax.data.batches import empty_batch
from moe_jax.dispatch import DISPATCHERS
from moe_jax.routing import ROUTERS
from moe_jax.routing.balance import BALANCE_LOSSES
from moe_jax.sharding import make_mesh, resolve_mesh
from moe_jax.training.evaluate import put_batch
from moe_jax.training.state import new_state
from moe_jax.training.step import jitted_train_step

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("README.md"), *ROOT.glob("benchmarks/README.md"),
                    *ROOT.glob("experiments/README.md")])
RECIPE = ROOT / "docs/adding_a_router.md"
# Files that the recipe tells the reader to write.
TO_BE_WRITTEN = ("moe_jax/routing/grouped_top_k.py", "tests/test_grouped_top_k.py", "moe_jax/analysis/gate_shares.py",
                 "configs/sample_tiny.py")

# Options of gcloud, XPK and Slurm that docs/tpu.md explains.
OPTIONS_OF_OTHERS = {"--max-restarts", "--node-count", "--node-id", "--num-slices", "--requeue", "--script-dir", "--worker"}

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


ERROR = re.compile(r"^\$ (.*)\nmoe-jax \w+: error: (.*)$", re.MULTILINE)


def read(path: pathlib.Path) -> str:
    """A document without the mistakes that it shows on purpose, with the error that they give."""
    return ERROR.sub("", path.read_text(encoding="utf-8"))


def blocks(path: pathlib.Path, language: str = r"\w*") -> list[str]:
    """The fenced blocks of a document."""
    return re.findall(rf"^```{language}\n(.*?)^```$", read(path), re.MULTILINE | re.DOTALL)


def code(path: pathlib.Path) -> list[str]:
    """Everything set as code: the lines of fenced and indented blocks, and inline spans."""
    text = read(path)
    fenced = [line.strip() for block in blocks(path) for line in block.replace("\\\n", " ").splitlines()]
    rest = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = [line.strip() for line in rest.splitlines() if line.startswith("    ")]
    return fenced + indented + re.findall(r"`([^`\n]+)`", rest)


def commands(path: pathlib.Path, program: str) -> list[list[str]]:
    """The words after ``program`` in every piece of code that begins with it; comments cut off."""
    starts = (program, f".venv/bin/{program}")
    return [shlex.split(line.removeprefix("$ "), comments=True)[len(program.split()):]
            for line in code(path) if line.removeprefix("$ ").startswith(starts)]


def command_names():
    return next(action.choices for action in cli._parser()._actions if action.dest == "command")


def options(parser: argparse.ArgumentParser) -> set[str]:
    found = set()
    for action in parser._actions:
        found.update(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= options(command)
    return found


# The recipe.


@pytest.fixture
def recipe(monkeypatch):
    """The recipe followed: its router in the table. Gives the code of its test and its command."""
    function, importing, entry, test = blocks(RECIPE, "python")
    module = types.ModuleType("moe_jax.routing.grouped_top_k")
    exec(compile(function, TO_BE_WRITTEN[0], "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(routing, "grouped_top_k", module, raising=False)
    names = dict(vars(routing))
    exec(importing, names)
    for name, router in eval("{" + entry + "}", names).items():
        assert name not in ROUTERS, f"{name} is built in by now: the recipe needs another example"
        monkeypatch.setitem(ROUTERS, name, router)
    (command,) = [words for words in commands(RECIPE, "moe-jax") if words[0] == "train"]
    return test, command


def test_the_recipe_is_as_short_as_it_says():
    lines = [line for block in blocks(RECIPE, "python") for line in block.splitlines()]
    assert len(lines) <= 60


def test_the_test_of_the_recipe_passes(recipe):
    names = {}
    exec(compile(recipe[0], TO_BE_WRITTEN[1], "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


def test_the_analysis_that_is_added_works(monkeypatch):
    function, entry, test = blocks(ROOT / "docs/analysis.md", "python")[-3:]
    module = types.ModuleType("moe_jax.analysis.gate_shares")
    exec(compile(function, TO_BE_WRITTEN[2], "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    (analysis,) = eval("[" + entry + "]", {"Analysis": Analysis, "gate_shares": module})
    assert analysis.name not in [known.name for known in ANALYSES], "it is built in by now: the page needs another example"
    analysis.draw(analysis.compute([records.make(choices=3)])).draw_without_rendering()
    names = {}
    exec(compile(test, "the test", "exec"), names)
    names["test_gate_shares_by_hand"]()


SMALL = {"model.num_layers": 2, "model.d_model": 16, "model.num_heads": 2, "model.num_kv_heads": 2, "model.head_dim": 8,
         "model.d_ff": 16, "moe.d_ff": 16, "data.sequence_length": 16, "data.batch_size": 8}


def config_of(command: list[str], **more):
    arguments, overrides = cli._parser().parse_known_args(command)
    small = [f"--config.{key}={value}" for key, value in {**SMALL, **more}.items()]
    return load_config(str(ROOT / arguments.config), overrides + small)


def test_the_command_of_the_recipe_trains(recipe):
    config, rows = config_of(recipe[1]), 8
    assert config.moe.router == "grouped_top_k"
    rng = np.random.default_rng(0)
    batch = {**empty_batch(rows, 16), "valid": np.ones((rows, 16), bool), "segment_ids": np.ones((rows, 16), np.int32),
             "positions": np.tile(np.arange(16, dtype=np.int32), (rows, 1))}
    batch["input_ids"], batch["target_ids"] = rng.integers(1, 64, (2, rows, 16), dtype=np.int32)
    mesh = make_mesh(resolve_mesh(config, jax.device_count()))
    with jax.set_mesh(mesh):
        state, step, losses = new_state(config, 64, mesh), jitted_train_step(config, 64), []
        for _ in range(2):
            state, metrics = step(state, put_batch(batch, mesh))
            metrics = jax.device_get(metrics)
            assert metrics["applied"] and metrics["router_grad_norm"] > 0
            counts_LKe = metrics["routing"]["counts_LE"].reshape(len(config.moe_layers), 2, -1)
            np.testing.assert_array_equal(counts_LKe.sum(-1), rows * 16)  # every group gets equally much work
            losses.append(metrics["sums"]["loss/ce"])
    assert losses[1] < losses[0]


def test_the_router_of_the_recipe_refuses_what_cannot_work(recipe):
    for key, value in (("moe.experts_per_token", 3), ("moe.renormalize", True), ("moe.fill_order", "choice_major")):
        with pytest.raises(ConfigError, match=key.split(".")[1]):
            config_of(recipe[1], **{key: value})


# All documents.


@each_document
def test_settings_exist(path):
    section = "|".join(SECTIONS)
    named = set(re.findall(r"--config\.([\w.]+)", read(path)))
    for piece in code(path):
        # `moe.router`, `moe.router=top_k`, but neither moe.py nor moe.jsonl nor data.train.batch().
        named.update(key for key in re.findall(rf"(?<![\w./\-'\"])((?:{section})\.\w+)(?![\w.(/])", piece)
                     if not key.endswith((".py", ".md", ".json", ".jsonl")))
    unknown = named - set(known_keys())
    assert not unknown


@each_document
def test_errors_are_quoted_word_for_word(path):
    for command, message in ERROR.findall(path.read_text(encoding="utf-8")):
        arguments, overrides = cli._parser().parse_known_args(shlex.split(command)[1:])
        with pytest.raises(ConfigError) as error:
            load_config(str(ROOT / arguments.config), overrides)
        assert str(error.value) == message


@each_document
def test_values_of_settings_are_allowed(path):
    """`moe.dispatch=gather` names a dispatcher: resolved on its own, the value may not be unknown or of another type."""
    text = " ".join(code(path))
    for key, value in set(re.findall(r"((?:moe|optimizer|training)\.\w+)=(-?[\w.]+)", text)):
        try:
            load_config(str(ROOT / "configs/base.py"), [f"--config.{key}={value}"])
        except ConfigError as error:
            # Some are allowed only together with another setting; x stands for a number.
            wrong = re.search(r"allowed are|must be of type|no such setting", str(error))
            assert not wrong or value in ("x", "grouped_top_k"), f"{key}={value}: {error}"


@each_document
def test_make_targets_exist(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(path, "make "):
        named = [word for word in words if re.fullmatch(r"[a-z-]+", word)][:1]
        assert set(named) <= targets


@each_document
def test_commands_and_their_options_exist(path):
    programs = {"moe-jax": cli._parser(), "python -m moe_jax": cli._parser(),
                "python -m benchmarks.train_step": train_step_benchmark._parser(),
                "python -m benchmarks.moe_layer": moe_layer._parser(),
                "python -m benchmarks.policy_variance": policy_variance._parser(),
                "python -m benchmarks.families": families_benchmark._parser(),
                "python -m benchmarks.expert_parallel": expert_parallel._parser()}
    everything = {"--help", "-h", *OPTIONS_OF_OTHERS}.union(*map(options, programs.values()))
    for program, parser in programs.items():
        for words in commands(path, program):
            named = {word.split("=")[0] for word in words if word.startswith("-") and not word.startswith("--config.")}
            assert named <= options(parser), (program, words)
            if program != "python -m benchmarks.train_step" and words and words[0].isalpha():
                assert words[0] in command_names(), words
    for piece in code(path):
        if re.match(r"--(?!config\.)\w", piece):
            assert re.match(r"--[\w-]+", piece).group() in everything, piece


@each_document
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name) if name else path
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


@each_document
def test_files_exist(path):
    """`nn/moe.py` in code is a file of the repository or of the package."""
    for piece in code(path):
        for name in re.findall(r"(?<![\w/.<*…-])((?:[\w.]+/)*\w+\.(?:py|md))(?!\w)", piece):
            if name in TO_BE_WRITTEN:
                continue
            places = [ROOT / name, ROOT / "moe_jax" / name, path.parent / name, *ROOT.glob(f"moe_jax/*/{name}")]
            assert any(place.exists() for place in places), name


def test_the_conventions_name_every_choice():
    """What a table of the code offers is explained on the page that promises to explain it."""
    text = (ROOT / "docs/conventions.md").read_text(encoding="utf-8")
    for name in (*DISPATCHERS, *BALANCE_LOSSES, *ROUTERS):
        assert re.search(rf"\b{name}\b", text), name


def rows_of_the_table(title: str) -> list[str]:
    section = (ROOT / "docs/conventions.md").read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize("row", rows_of_the_table("To get somebody's router"), ids=lambda row: row.split("|")[1].strip())
def test_the_settings_of_each_router_go_together(row):
    settings = dict(re.findall(r"`moe\.(\w+)=([^`]+)`", row))
    assert settings
    load_config(str(ROOT / "configs/base.py"), [f"--config.moe.{name}={value}" for name, value in {
        "num_experts": "64", "allow_noncausal_routing": "True", **settings}.items()])


@pytest.mark.slow
def test_the_calls_of_the_conventions_run_and_none_is_missing():
    """One for each file of other implementations' numbers; together they are one program."""
    section = (ROOT / "docs/conventions.md").read_text(encoding="utf-8").split("## A call for each\n")[1].split("\n## ")[0]
    calls = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    names = {}
    for call in calls:
        exec(compile(call, "docs/conventions.md", "exec"), names)
    assert len(calls) >= 12
    assert names["capacity"] == 12  # as the comment in it says
    for file in oracles.FOLDER.glob("*.npz"):
        assert f"`{file.stem}`" in section, file.stem


def test_perfectly_balanced_losses_have_the_values_in_the_table():
    experts, choices, tokens = 8, 2, 64.0
    values = {"1": 1.0, "1/E²": 1 / experts**2, "K": choices}
    text = (ROOT / "docs/conventions.md").read_text(encoding="utf-8")
    each_E = np.ones(experts, np.float32)
    for name, function in BALANCE_LOSSES.items():
        row = re.search(rf"^\| \**`{name}`\** \|(.*)$", text, re.MULTILINE).group(1).split("|")
        loss = function(each_E * choices * tokens / experts, each_E * tokens / experts, each_E * tokens / experts,
                        np.float32(tokens), choices)
        np.testing.assert_allclose(loss, values[row[2].strip()], rtol=1e-6)


def test_symbols_named_with_their_file_exist():
    """`assign_slots` in `routing/assignment.py` and the like, in the architecture."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    found = re.findall(r"`(\w+)`(?: and `(\w+)`)? in\s+`([\w/]+)\.py`", text)
    assert len(found) >= 5
    for first, second, file in found:
        module = importlib.import_module("moe_jax." + file.replace("/", "."))
        assert all(hasattr(module, name) for name in (first, second) if name), file
