"""What a user installs and runs: setup.py, requirements.lock, the Makefile, tools/install.py."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")


def setup_arguments(monkeypatch):
    import setuptools

    arguments = {}
    monkeypatch.setattr(setuptools, "setup", arguments.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return arguments


def locked_versions(python):
    """name -> version as pip would read the lock with that Python on Linux."""
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": python + ".0",
        "sys_platform": "linux",
        "platform_system": "Linux",
    }
    versions = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        line = line.split("#")[0].strip()
        if not line:
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(environment):
            name = canonicalize_name(pin.name)
            assert name not in versions, f"{name} is pinned twice for Python {python}"
            assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), f"{line} is no exact pin"
            versions[name] = str(pin.specifier)[2:]
    return versions


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_pins_everything_setup_asks_for_within_its_bounds(monkeypatch, python):
    arguments = setup_arguments(monkeypatch)
    locked = locked_versions(python)
    extras = arguments["extras_require"]
    assert set(extras) >= {"tpu", "cuda", "data", "hf", "dev"}
    assert "libtpu" in locked, "`make test` compiles for TPUs: the lock pins what jax[tpu] asks for; run `make lock`"
    for text in arguments["install_requires"] + extras["data"] + extras["dev"] + extras["tpu"]:
        wanted = Requirement(text)
        name = canonicalize_name(wanted.name)
        assert name in locked, f"{text} is in setup.py but not in requirements.lock: run `make lock`"
        assert wanted.specifier.contains(locked[name]), f"setup.py asks for {text}, the lock has {locked[name]}: run `make lock`"


def test_the_locks_libtpu_is_the_one_this_jax_asks_for():
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    asked = [Requirement(text) for text in importlib.metadata.requires("jax")]
    libtpu = next(each for each in asked if each.name == "libtpu" and each.marker.evaluate({"extra": "tpu"}))
    locked = locked_versions(python)
    if importlib.metadata.version("jax") != locked["jax"]:
        pytest.skip(f"JAX here is not the lock's {locked['jax']}")
    assert libtpu.specifier.contains(locked["libtpu"])


def test_libtpu_is_not_started_where_there_is_no_tpu(install, monkeypatch):
    """It prints errors when it finds none; a choice by the user stands."""
    from moe_jax import environment

    assert environment.TPU_PCI_DEVICES == install.TPU_PCI_DEVICES
    monkeypatch.setattr(environment, "_installed", lambda name: name == "libtpu")
    monkeypatch.setattr(environment, "has_tpu", lambda: False)
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    monkeypatch.delenv("JAX_PLATFORMS")
    environment.prepare_process(1)
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    environment.prepare_process(1)
    assert os.environ["JAX_PLATFORMS"] == "tpu"
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(environment, "has_tpu", lambda: True)
    environment.prepare_process(1)
    assert "JAX_PLATFORMS" not in os.environ


def test_setup_names_the_supported_pythons_and_the_command(monkeypatch):
    arguments = setup_arguments(monkeypatch)
    assert arguments["python_requires"] == ">=3.11,<3.14"
    assert arguments["entry_points"]["console_scripts"] == ["moe-jax = moe_jax.cli:main"]
    assert "moe_jax" in arguments["packages"]
    assert not any(name.split(".")[0] != "moe_jax" for name in arguments["packages"]), "only moe_jax is installed"


def test_every_folder_with_python_files_is_a_package(monkeypatch):
    packages = set(setup_arguments(monkeypatch)["packages"])
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "moe_jax").rglob("*.py")}
    assert folders <= packages, f"without __init__.py, so not installed: {sorted(folders - packages)}"


# ------------------------------------------------------------------------------------------- imports


def in_a_new_process(program):
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_importing_moe_jax_loads_nothing_large():
    loaded = in_a_new_process("import moe_jax, sys, json; print(json.dumps(sorted(sys.modules)))")
    large = {"tensorflow", "tensorflow_datasets", "seqio", "clu", "matplotlib", "torch", "transformers", "tensorboardX"}
    assert not large & set(loaded)


def test_training_installs_without_the_extras_so_only_data_may_import_them():
    """With TensorFlow and the rest absent, every module outside moe_jax.data can be imported."""
    refused = in_a_new_process(
        """
import importlib, json, pkgutil, sys
absent = {"tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "clu", "torch", "transformers", "safetensors",
          "pytest", "hypothesis", "wandb"}
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r} (absent in this test)", name=name)
sys.meta_path.insert(0, Absent())
import moe_jax
refused = {}
for module in pkgutil.walk_packages(moe_jax.__path__, "moe_jax.", onerror=lambda name: None):
    if module.name.startswith("moe_jax.data.") or module.name.endswith("__main__"):
        continue
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        refused[module.name] = str(error)
print(json.dumps(refused))
"""
    )
    assert not refused


# ------------------------------------------------------------------------------------------- no trace of one machine


def test_no_file_names_a_machine_path_or_a_registry():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    assert listing.returncode == 0, listing.stderr
    # Written in pieces, so that this file does not contain what it looks for.
    unwanted = re.compile(
        "|".join(
            (
                r"(?<![\w.])/(?:opt|root|work|home/\w+|tmp/[a-z]{1,2})" + r"/[\w.]",
                r"pypi\." + "org",
                "python" + r"hosted\.org",
                r"registry\." + r"npmjs",
                "--(?:extra-)?index" + "-url",
                "--find" + "-links",
                "--trusted" + "-host",
            )
        )
    )
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file() or path.is_symlink():
            continue
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            if match := unwanted.search(line):
                found.append(f"{name}:{number}: {match.group()}")
    assert not found, "\n".join(found)


def test_the_lock_holds_pins_only():
    text = (ROOT / "requirements.lock").read_text()
    for unwanted in ("://", "file:", "/opt", "--", "@"):  # addresses, in any form
        assert unwanted not in text


# ------------------------------------------------------------------------------------------- the Makefile


def make(*words):
    if not shutil.which("make"):
        pytest.skip("no make")
    return subprocess.run(["make", "--no-print-directory", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_make_help_names_every_target_and_variable():
    result = make("help")
    assert result.returncode == 0, result.stderr
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.M).group(1).split()
    for target in targets:
        assert target == "python-is-there" or f"make {target} " in result.stdout, f"make help does not name {target}"
    for variable in re.findall(r"^(\w+) \?=", makefile, re.M):
        assert f"  {variable}=" in result.stdout, f"make help does not name {variable}"
    assert make().stdout == result.stdout, "a bare make prints the help"


def test_make_train_honours_its_variables():
    plan = make("-n", "train", "WORKDIR=my runs/a", "DEVICES=4", "CONFIG=configs/x.py", "ARGS=--config.training.num_steps=3").stdout
    assert 'moe-jax" train --config="configs/x.py" --workdir="my runs/a" --devices="4" --config.training.num_steps=3' in plan
    assert "--python-was-named" not in plan
    assert "--python-was-named" in make("-n", "train", "PYTHON=python3").stdout
    assert "--accelerator \"cuda\"" in make("-n", "train", "ACCELERATOR=cuda").stdout


def test_a_python_that_is_not_there_is_one_line():
    result = make("train", "PYTHON=no-such-python")
    assert result.returncode != 0
    assert "there is no 'no-such-python'" in result.stderr
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------------- tools/install.py


@pytest.fixture
def install(monkeypatch):
    spec = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_old_python_can_read_the_installer_and_is_told_which_ones_do(install, monkeypatch):
    ast.parse((ROOT / "tools" / "install.py").read_text(), feature_version=(3, 6))
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit) as stopped:
        install.check_this_python()
    message = str(stopped.value)
    assert "3.9.18" in message and "3.11, 3.12, 3.13" in message and "PYTHON=" in message
    assert "\n" not in message


def test_a_python_without_venv_is_told_the_package(install, monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(SystemExit, match=r"python3\.\d+-venv"):
        install.check_this_python()


def a_whole_environment(install, path):
    """A folder that passes for an environment: this Python, and a note."""
    (path / "bin").mkdir(parents=True)
    (path / "bin" / "python").symlink_to(sys.executable)
    environment = install.Environment(str(path))
    environment.write_note({"checkout": install.CHECKOUT, "digest": install.digest_of_inputs(), "extras": ["data"]})
    return environment


def test_an_environment_is_kept_only_if_it_is_whole_and_ours(install, monkeypatch, tmp_path):
    version = sys.version_info[:2]
    environment = a_whole_environment(install, tmp_path / "whole")
    monkeypatch.setattr(environment, "version", lambda: version)
    assert environment.wrong_with_it(python_was_named=True) is None

    (tmp_path / "whole" / "moe_jax_install.unfinished").touch()
    assert "did not finish" in environment.wrong_with_it(False)
    (tmp_path / "whole" / "moe_jax_install.unfinished").unlink()

    environment.write_note({"checkout": "/somewhere/else", "digest": "", "extras": []})
    assert "/somewhere/else" in environment.wrong_with_it(False)

    monkeypatch.setattr(environment, "version", lambda: (3, 12) if version != (3, 12) else (3, 13))
    assert "PYTHON= names" in environment.wrong_with_it(python_was_named=True)

    broken = a_whole_environment(install, tmp_path / "broken")
    (tmp_path / "broken" / "bin" / "python").unlink()
    assert "does not run" in broken.wrong_with_it(False)


def test_a_folder_of_someone_else_is_never_removed(install, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="not made by this Makefile"):
        install.Environment(str(tmp_path / "mine")).remove("its Python does not run")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_nothing_is_installed_twice_and_a_changed_lock_installs_again(install, monkeypatch, tmp_path, capsys):
    a_whole_environment(install, tmp_path / "venv")
    installed = []
    monkeypatch.setattr(install.Environment, "version", lambda self: sys.version_info[:2])
    monkeypatch.setattr(install.Environment, "install", lambda self, extras: installed.append(extras))
    monkeypatch.setattr(install, "accelerator_of_this_machine", lambda: "cpu")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(tmp_path / "venv"), *words])
        install.main()

    run()
    assert installed == [] and capsys.readouterr().out == ""
    run("--extras", "data,dev")
    assert installed == [["data", "dev"]]
    run("--extras", "data,dev")
    assert len(installed) == 1
    monkeypatch.setattr(install, "digest_of_inputs", lambda: "changed")
    run()
    assert installed[1:] == [["data", "dev"]], "what was installed before is brought up to date too"
    run("--accelerator", "cuda")
    assert installed[2:] == [["cuda", "data", "dev"]]
    with pytest.raises(SystemExit, match="ACCELERATOR=gpu is none of"):
        run("--accelerator", "gpu")


@pytest.mark.parametrize("device, found", [("/dev/accel0", "tpu"), ("/dev/nvidia0", "cuda"), ("/dev/null", "cpu")])
def test_the_accelerator_is_seen(install, monkeypatch, device, found):
    monkeypatch.setattr(install.os.path, "exists", lambda path: path == device)
    monkeypatch.setattr(install.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    assert install.accelerator_of_this_machine() == found


def test_googles_network_card_is_no_tpu(install, monkeypatch):
    device = {"value": "0x0042"}
    monkeypatch.setattr(install.os.path, "exists", lambda path: False)
    monkeypatch.setattr(install.glob, "glob", lambda pattern: ["/sys/bus/pci/devices/0/vendor"])
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    monkeypatch.setattr(install, "first_line", lambda path: "0x1ae0" if path.endswith("vendor") else device["value"])
    assert install.accelerator_of_this_machine() == "cpu"
    device["value"] = "0x0063"
    assert install.accelerator_of_this_machine() == "tpu"
