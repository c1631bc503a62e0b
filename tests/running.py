"""Tiny whole runs, in this process or in one of their own, on a corpus of two domains; for the end-to-end tests.

One setting of everything that is compiled, so that the tests share compiled programs: a constant learning rate
(``num_steps`` may then differ) and all that a checkpoint must carry switched on (router bias, noise, running mean).
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import random
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest

from moe_jax import cli
from moe_jax.config import load_config
from moe_jax.sharding import make_mesh, resolve_mesh
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.metrics import read_metrics
from moe_jax.training.state import abstract_state

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
VOCAB = 320  # 259 bytes and marks, rounded up

TINY = {
    "model.num_layers": 2, "model.d_model": 16, "model.num_heads": 2, "model.num_kv_heads": 2, "model.head_dim": 8,
    "model.d_ff": 32, "moe.num_experts": 4, "moe.d_ff": 16, "moe.bias_update_rate": 0.01, "moe.router_jitter": 0.05,
    "data.sequence_length": 16, "data.batch_size": 8, "data.validation_fraction": 0.2,
    "optimizer.schedule": "constant", "optimizer.warmup_steps": 2, "training.num_steps": 12, "training.log_every": 1,
    "training.eval_every": 6, "training.eval_batches": 2, "training.checkpoint_every": 4, "training.ema_decay": 0.9,
    "training.sample_length": 0,
}

# Different in every run.
CLOCKED = {"time", "tokens_per_second", "step_seconds", "data_wait_seconds", "model_tflops_per_second",
           "hardware_tflops_per_second"}


def write_corpus(folder: pathlib.Path) -> pathlib.Path:
    """Sixty short documents of two domains; the same text wherever it lies."""
    words = {"fruit": "apple river stone cloud tree light", "sums": "one two three plus equals"}
    choose = random.Random(0)
    for domain, text in words.items():
        (folder / domain).mkdir(parents=True)
        for i in range(30):
            (folder / domain / f"{i}.txt").write_text(" ".join(choose.choice(text.split()) for _ in range(60)))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


def overrides(corpus, **settings) -> list[str]:
    """``--config`` and its overrides; settings are named section__field."""
    values = {**TINY, "data.source": f"files:{corpus}", **{k.replace("__", "."): v for k, v in settings.items()}}
    return [f"--config={REPOSITORY / 'configs' / 'base.py'}", *(f"--config.{k}={v}" for k, v in values.items())]


def config_of(corpus, **settings):
    path, *rest = overrides(corpus, **settings)
    return load_config(path.removeprefix("--config="), rest)


# In this process.


@dataclasses.dataclass
class Outcome:
    """code: exit code. out, err: what was printed; err includes the log."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr that begins with the program's name."""
        assert "Traceback" not in self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("moe-jax") and "error" in line]
        return line


@contextlib.contextmanager
def restored_process(devices: int):
    """JAX seems to have so many devices; the mesh and the environment are put back afterwards."""
    jax.devices()  # a command that was the first to start JAX would leave the tests after it as many devices as it asked for
    entered, set_mesh, hook, absl = [], jax.set_mesh, sys.unraisablehook, logging.getLogger("absl").level

    def recorded(mesh):
        entered.append(set_mesh(mesh))
        return entered[-1]

    with (mock.patch.dict(os.environ), mock.patch.object(jax, "set_mesh", recorded),
          mock.patch.object(jax, "device_count", lambda: devices)):
        try:
            yield
        finally:
            for mesh in reversed(entered):
                mesh.__exit__(None, None, None)
            sys.unraisablehook = hook
            logging.getLogger("absl").setLevel(absl)


@pytest.fixture
def moe_jax(capsys, caplog):
    """``moe_jax('train', ..., devices=1) -> Outcome``: the command line in this process."""
    caplog.set_level("INFO", "moe_jax")

    def run(*words, devices=1):
        caplog.clear()
        capsys.readouterr()
        code = run_here(*words, devices=devices)
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err + caplog.text)

    return run


def run_here(*words, devices=1) -> int:
    """The exit code of the command line in this process."""
    words = [str(word) for word in words]
    if words[0] not in ("report", "plan", "upcycle") and not any(word.startswith("--devices") for word in words):
        words.append(f"--devices={devices}")
    with restored_process(devices):
        try:
            return cli.main(words)
        except SystemExit as exit:  # argparse
            return exit.code


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory) -> pathlib.Path:
    """A complete run of 8 steps with checkpoints at 4 and 8; copy it before changing it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert run_here("train", *overrides(corpus, training__num_steps=8), f"--workdir={workdir}") == 0
    return workdir


# In a process of its own.

# argv: event, step, then the words of the command line. The event happens when the loop asks for that step's batch,
# or in the evaluation, compilation, or report that follows.
_DRIVER = """
import os, signal, sys, threading, time
event, at, words = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
from moe_jax import cli
from moe_jax.analysis import report
from moe_jax.data import batches
from moe_jax.training import evaluate, loop

def kill(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
    time.sleep(0.2)  # a signal takes a moment to be noticed

def before(owner, name, action):
    real = getattr(owner, name)
    def wrapped(*args, **kwargs):
        action()
        return real(*args, **kwargs)
    setattr(owner, name, wrapped)

steps = []
def on_batch(action):
    def counted():
        steps.append(None)
        if first + len(steps) - 1 == at:
            action()
    real = batches.Prefetcher.__init__
    def init(self, batch_fn, start_step=0, *args, **kwargs):
        global first
        first = start_step
        real(self, batch_fn, start_step, *args, **kwargs)
    batches.Prefetcher.__init__ = init
    before(batches.Prefetcher, 'next', counted)

def later(*delays):
    def send():
        for delay in delays:
            time.sleep(delay)
            os.kill(os.getpid(), signal.SIGTERM)
    threading.Thread(target=send, daemon=True).start()

if event == 'kill':
    on_batch(lambda: kill(signal.SIGKILL))
elif event == 'kill in report':
    before(report, 'write_report', lambda: kill(signal.SIGKILL))
elif event == 'terminate':
    on_batch(kill)
elif event == 'terminate in evaluation':
    before(evaluate.Evaluator, '_function', lambda: None)
    real_put = evaluate.put_batch
    before(evaluate, 'put_batch', kill)  # the loop has its own name for training batches
elif event == 'terminate in compilation':
    real_step = loop.jitted_train_step
    def jitted(*args):
        step = real_step(*args)
        def call(*operands):
            if not steps:
                steps.append(None)
                later(0.1)
            return step(*operands)
        return call
    loop.jitted_train_step = jitted
elif event == 'full disk':  # every file ends at so many bytes
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
elif event == 'terminate twice':
    def hang():
        later(0.3, 0.5)
        time.sleep(100)
    on_batch(hang)
else:
    assert event == 'nothing'
sys.exit(cli.main(words))
"""


def start(*words, event="nothing", at=0, devices=1, **options) -> subprocess.Popen:
    """The command line in a new process, to which something happens (see _DRIVER)."""
    command = [sys.executable, "-c", _DRIVER, event, str(at), *map(str, words), f"--devices={devices}"]
    if event != "nothing":
        # A killed process can leave a compiled program half-written, and JAX warns about it in every later one.
        folder = os.path.join(os.environ["MOE_JAX_TEST_SESSION"], "compiled_by_killed")
        # On a full disk JAX's own attempts to keep programs fail too, with tracebacks of theirs.
        enabled = "false" if event == "full disk" else "true"
        options["env"] = {**os.environ, "JAX_COMPILATION_CACHE_DIR": folder, "JAX_ENABLE_COMPILATION_CACHE": enabled,
                          **options.get("env", {})}
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(process: subprocess.Popen, timeout: float = 150) -> Outcome:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Outcome(process.returncode, out, err)


def run_alone(*words, **options) -> Outcome:
    return finish(start(*words, **options))


# What a run left behind.


def curve(workdir) -> list[dict]:
    """metrics.jsonl without what a clock decides."""
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in read_metrics(workdir / "metrics.jsonl")]


def lines(workdir, kind="train") -> list[dict]:
    return [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == kind]


def saved_steps(workdir) -> list[int]:
    return Checkpointer(workdir / "checkpoints", read_only=True).steps()


def newest_state(workdir, config):
    """(step, metadata, {path: bytes}) of the newest checkpoint."""
    mesh = make_mesh(resolve_mesh(config, 1))
    restored = Checkpointer(workdir / "checkpoints", read_only=True).restore(abstract_state(config, VOCAB, mesh))
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(restored.state):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        leaves[jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    return restored.step, restored.metadata, leaves


def read_json(path):
    return json.loads(path.read_text())
