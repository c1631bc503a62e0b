"""Two processes of four CPU devices each, joined over loopback, are one run of eight: the same rows, losses, checkpoints.

And what becomes of one process when the other is missing: a message that names it, and an end (R11).
"""

import functools
import json
import os
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from running import REPOSITORY, Outcome, config_of, corpus, lines, overrides, read_json, run_here, saved_steps

from moe_jax import cli
from moe_jax.data.batches import Batches, open_data
from moe_jax.sharding import local_rows, make_mesh, resolve_mesh
from moe_jax.training import evaluate, processes
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.state import abstract_state

__all__ = ["corpus"]

STEPS, BATCH = 12, 8  # checkpoints at 4, 8 and 12; an evaluation at 6 and at the end

# argv: a folder for what is recorded, event, step, then the words of the command line.
_DRIVER = """
import json, os, signal, sys, time
folder, event, at, words = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:]
import numpy as np
from moe_jax import cli
from moe_jax.data import batches
from moe_jax.training import checkpoint, evaluate, processes, run

rows, texts = [], []
real_batch, real_put = batches.Batches.batch, evaluate.put_batch

def batch(self, step, wanted=None):
    found = real_batch(self, step, wanted)
    first, last, _ = (wanted or slice(None)).indices(self.batch_size)
    rows.append([self.split, step, first, last, found['target_ids'].tolist()])
    return found

batches.Batches.batch = batch

def dump(state, name):
    import jax
    from jax.experimental import multihost_utils
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        leaves[jax.tree_util.keystr(path)] = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    if jax.process_index() == 0:
        np.savez(os.path.join(folder, name), **leaves)

real_save, real_restore = checkpoint.Checkpointer.save, checkpoint.Checkpointer.restore

def save(self, step, state, metadata):
    dump(state, f'saved_{step}.npz')
    return real_save(self, step, state, metadata)

def restore(self, *arguments, **options):
    restored = real_restore(self, *arguments, **options)
    if restored is not None:
        dump(restored.state, f'restored_{restored.step}.npz')
    return restored

checkpoint.Checkpointer.save, checkpoint.Checkpointer.restore = save, restore

asked = []
def on_step(action):
    real = batches.Prefetcher.next
    def wrapped(self):
        asked.append(None)
        if len(asked) == at:
            action()
        return real(self)
    batches.Prefetcher.next = wrapped

if event == 'terminate':
    on_step(lambda: os.kill(os.getpid(), signal.SIGTERM))
elif event == 'kill':
    # Its place has reached the others by then: they hear of it every few seconds.
    on_step(lambda: (time.sleep(4), os.kill(os.getpid(), signal.SIGKILL)))
elif event == 'hang before the data':
    run.open_data = lambda *_: time.sleep(1000)
else:
    assert event == 'nothing'
real_leave = processes.leave
def leave(*arguments):
    import jax
    with open(os.path.join(folder, f'rows_{jax.process_index()}.json'), 'w') as file:
        json.dump(rows, file)
    real_leave(*arguments)
processes.leave = leave
sys.exit(cli.main(words))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@functools.cache
def seeds_that_order_sets_differently() -> tuple[str, str]:
    """For PYTHONHASHSEED. By default it is by chance, and a program that depends on a set's order differs only now and then."""
    program, found = "print(list({'data', 'expert'}))", {}
    for seed in map(str, range(64)):
        order = subprocess.check_output([sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed})
        found.setdefault(order, seed)
        if len(found) == 2:
            return tuple(found.values())
    raise AssertionError("no two seeds order the axes differently")


def run_two(folder, *words, events=("nothing", "nothing"), at=0, timeout=120, extra=((), ()), seconds=280):
    """Both processes' outcomes, of the same command line; ``extra`` are words that one of them alone is given."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    # Compiled programs of killed processes may be half-written, so these share a folder with nobody else.
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": os.path.join(os.environ["MOE_JAX_TEST_SESSION"], "compiled_by_two")}
    seeds = seeds_that_order_sets_differently()
    started = []
    try:
        for i in (0, 1):
            command = [sys.executable, "-c", _DRIVER, str(folder), events[i], str(at), *map(str, words), "--devices=4",
                       f"--coordinator=127.0.0.1:{port}", "--num-processes=2", f"--process-id={i}", f"--timeout={timeout}",
                       *extra[i]]
            # Files, not pipes: what one process writes must not wait until the other has been read.
            with open(folder / f"out{i}", "w") as out, open(folder / f"err{i}", "w") as err:
                started.append(subprocess.Popen(command, cwd=REPOSITORY, stdout=out, stderr=err,
                                                env={**environment, "PYTHONHASHSEED": seeds[i]}))
        until = time.monotonic() + seconds
        for process in started:
            process.wait(max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        said = "\n".join(f"--- process {i}\n{(folder / f'err{i}').read_text()[-3000:]}" for i in (0, 1))
        pytest.fail(f"the processes did not end within {seconds} s\n{said}")
    finally:
        for process in started:
            process.kill()
    time.sleep(0.5)  # a witness may still be speaking
    return [Outcome(process.returncode, (folder / f"out{i}").read_text(), (folder / f"err{i}").read_text())
            for i, process in enumerate(started)]


@pytest.fixture(scope="module")
def one(corpus, tmp_path_factory):
    """The run of a single process with eight devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    assert run_here("train", *overrides(corpus, training__sample_length=4), f"--workdir={workdir}", devices=8) == 0
    return workdir


@pytest.fixture(scope="module")
def two(corpus, tmp_path_factory):
    """(workdir, folder of records by part, outcomes by part): the same run by two processes up to step 5, where process 1
    gets a SIGTERM; by a single process up to step 8; by two again to the end."""
    base = tmp_path_factory.mktemp("two")
    words = ("train", *overrides(corpus, training__sample_length=4), f"--workdir={base / 'run'}")
    first = run_two(base / "first", *words, events=("nothing", "terminate"), at=5)
    stopped = saved_steps(base / "run")
    half = [*overrides(corpus, training__sample_length=0, training__num_steps=8), "--allow-config-change"]
    middle = run_here("train", *half, f"--workdir={base / 'run'}", devices=8) if stopped else None
    last = run_two(base / "last", *words, "--allow-config-change")
    return {"workdir": base / "run", "first": first, "stopped": stopped, "middle": middle, "last": last, "folder": base}


def records(two, part):
    return [read_json(two["folder"] / part / f"rows_{i}.json") for i in (0, 1)]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step_saved(two):
    assert [outcome.code for outcome in two["first"]] == [143, 143], two["first"][0].err + two["first"][1].err
    (step,) = re.findall(r"Interrupted: step (\d+) is saved", two["first"][0].err)
    assert two["stopped"][-1] == int(step) and 5 <= int(step) <= 8
    assert "Traceback" not in two["first"][0].err + two["first"][1].err
    assert two["middle"] == 0
    assert [outcome.code for outcome in two["last"]] == [0, 0], two["last"][0].err + two["last"][1].err


@pytest.mark.slow
def test_each_process_makes_its_own_rows_and_together_they_are_those_of_one_process(two, corpus, tmp_path):
    data = open_data(config_of(corpus).data, str(tmp_path))
    for part, first in (("first", 0), ("last", 8)):
        by_process = records(two, part)
        for i, rows in enumerate(by_process):
            mine = [row for row in rows if row[0] == "train"]
            assert [row[1] for row in mine][:4] == list(range(first, first + 4))
            assert {tuple(row[2:4]) for row in mine} == {(4 * i, 4 * i + 4)}
        for zero, other in zip(*([row for row in rows if row[0] == "train"] for rows in by_process)):
            assert zero[1] == other[1]
            np.testing.assert_array_equal(zero[4] + other[4], data.train.batch(zero[1])["target_ids"])
    # Validation too; process 0 alone reads whole batches, for the baselines.
    validation = [{tuple(row[2:4]) for row in rows if row[0] == "validation"} for rows in records(two, "last")]
    assert validation == [{(0, 4), (0, BATCH)}, {(4, 8)}]


@pytest.mark.slow
def test_two_processes_find_the_losses_of_one(two, one):
    for kind in ("train", "eval"):
        expected = lines(one, kind)  # the single process in between has evaluated at its own end too
        found = [line for line in lines(two["workdir"], kind) if (kind, line["step"]) != ("eval", 8)]
        assert [line["step"] for line in found] == [line["step"] for line in expected]
        for name in ("loss/ce", "grad_norm", "tokens_seen", "moe/drop_fraction", "moe/load_max", "bits_per_byte"):
            if name in expected[0]:
                np.testing.assert_allclose([line[name] for line in found], [line[name] for line in expected], rtol=1e-5)
    assert read_json(two["workdir"] / "samples.json") == read_json(one / "samples.json")
    mine, theirs = read_json(two["workdir"] / "evaluation.json"), read_json(one / "evaluation.json")
    assert mine.keys() == theirs.keys() and mine["baselines"] == theirs["baselines"]
    np.testing.assert_allclose(mine["ce"], theirs["ce"], rtol=1e-5)
    with np.load(two["workdir"] / "routing" / "evaluation.npz") as found, np.load(one / "routing" / "evaluation.npz") as expected:
        assert found.files == expected.files
    assert (two["workdir"] / "report.html").exists() and read_json(two["workdir"] / "complete.json") == {"step": STEPS}


def arrays(workdir, config, step, devices):
    mesh = make_mesh(resolve_mesh(config, devices))
    state = Checkpointer(workdir / "checkpoints", read_only=True).restore(abstract_state(config, 320, mesh), step=step).state
    data = lambda leaf: jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return {jax.tree_util.keystr(path): np.asarray(data(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


@pytest.mark.slow
@pytest.mark.parametrize("part, name, step", [("first", "saved", None), ("last", "restored", 8), ("last", "saved", 12)])
def test_r3_what_two_processes_save_one_restores_exactly_and_back(two, corpus, part, name, step):
    step = step or two["stopped"][-1]
    with np.load(two["folder"] / part / f"{name}_{step}.npz") as kept:  # as the two processes had it in memory
        expected = dict(kept)
    found = arrays(two["workdir"], config_of(corpus), step, devices=1)
    assert found.keys() == expected.keys() and len(found) > 50
    for path in expected:
        assert found[path].dtype == expected[path].dtype and found[path].tobytes() == expected[path].tobytes(), path


@pytest.mark.slow
def test_process_0_alone_speaks_and_writes(two):
    workdir, (zero, other) = two["workdir"], two["last"]
    assert "validation:" in zero.err and "step 12/12" in zero.err and other.out == zero.out == ""
    assert [line for line in other.err.splitlines() if not line.startswith("[Gloo]")] == []
    assert [line["step"] for line in lines(workdir)] == list(range(1, STEPS + 1))  # each written once
    assert read_json(workdir / "versions.json")["process_count"] == 2
    assert read_json(workdir / "versions.json")["device_count"] == 8
    assert not (workdir / ".shared").exists()


@pytest.mark.slow
def test_two_processes_evaluate_like_one(two, capsys, tmp_path):
    words = ("eval", f"--workdir={two['workdir']}", "--batches=2", "--json")
    zero, other = run_two(tmp_path / "eval", *words)
    assert (zero.code, other.code, other.out) == (0, 0, ""), zero.err + other.err
    capsys.readouterr()
    assert run_here(*words, devices=8) == 0
    expected, found = json.loads(capsys.readouterr().out), json.loads(zero.out)
    assert found.keys() == expected.keys() and found["tokens"] == expected["tokens"]
    np.testing.assert_allclose(found["ce"], expected["ce"], rtol=1e-6)


# Differences and losses.


def test_processes_with_other_settings_are_refused_before_anything_is_written(corpus, tmp_path):
    words = ("train", *overrides(corpus), f"--workdir={tmp_path / 'run'}")
    outcomes = run_two(tmp_path / "records", *words, extra=((), ("--config.optimizer.learning_rate=0.5",)))
    for outcome in outcomes:
        assert outcome.code == 1
        assert "optimizer.learning_rate is 0.003 on process 0 and 0.5 on process 1" in outcome.error
        assert "same command, the same code and the same packages" in outcome.error
    assert not (tmp_path / "run").exists()


def test_programs_that_differ_are_refused_and_those_of_one_text_run(monkeypatch):
    """As process 0 of three sees it, whose third has compiled another program."""
    others = []
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes, "gather", lambda name, digest: [digest, digest, *(others or [digest])])
    monkeypatch.setattr(processes, "barrier", lambda name, seconds=None: None)
    double = jax.jit(lambda x: 2 * x)
    assert processes.compiled_together(double, "doubling")(np.float32(3)) == 6
    others.append("something else")
    with pytest.raises(processes.ProcessError, match="program of doubling is another one on process 2 than on process 0"):
        processes.compiled_together(double, "doubling")(np.float32(3))


def test_hosts_that_do_not_share_the_run_directory_are_refused(monkeypatch, tmp_path):
    """As process 1 sees it: process 0's sign is not in its folder."""
    monkeypatch.setattr(processes, "_joined", lambda: object())
    monkeypatch.setattr(processes, "index", lambda: 1)
    monkeypatch.setattr(processes, "of_process_0", lambda name, make: "4711")
    monkeypatch.setattr(processes, "gather", lambda name, value: [True, value, True])
    monkeypatch.setattr(processes, "SHARED_WITHIN", 0.5)
    with pytest.raises(processes.ProcessError, match="of process 1 is not the folder of process 0: all processes need one"):
        processes.require_shared(tmp_path)
    (tmp_path / ".shared").write_text("4711")
    processes.require_shared(tmp_path)


@pytest.mark.slow
def test_r11_a_peer_that_never_comes_to_a_barrier_ends_the_run_within_the_timeout_and_is_named(corpus, tmp_path):
    words = ("train", *overrides(corpus), f"--workdir={tmp_path / 'run'}")
    started = time.monotonic()
    zero, other = run_two(tmp_path / "records", *words, events=("nothing", "hang before the data"), timeout=15)
    assert zero.code == 1 and other.code != 0
    assert time.monotonic() - started < 90
    assert re.search(r"process 0 of 2 \(pid \d+ on .*\) (has )?waited \d+ s at the barrier 'the data is opened'", zero.err), zero.err
    assert re.search(r"process 1 of 2 \(pid \d+ on .*\), last seen at opening the data|process 1 .* is alive, at opening the data",
                     zero.err), zero.err


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_r11_a_killed_peer_ends_the_survivor_within_the_timeout_and_is_named(corpus, tmp_path, victim):
    words = ("train", *overrides(corpus, training__eval_every=1000), f"--workdir={tmp_path / 'run'}")
    events = ["nothing", "nothing"]
    events[victim] = "kill"
    started = time.monotonic()
    outcomes = run_two(tmp_path / "records", *words, events=events, at=4, timeout=20)
    dead, survivor = outcomes[victim], outcomes[1 - victim]
    assert dead.code == -9 and survivor.code != 0
    assert time.monotonic() - started < 200
    assert re.search(rf"process {victim} of 2 \(pid \d+ on .*\) ended without a word at step", dead.err), dead.err
    if victim == 1:
        assert survivor.code == 1
        assert re.search(r"process 1 of 2 \(pid \d+ on .*\) has given no sign of life for \d+ s, last at step \d", survivor.error)
        assert re.search(r"process 0 of 2 \(pid \d+ on .*\) has waited \d+ s at step [45]", survivor.error)
    else:  # JAX aborts it from C++; its witness says why
        assert re.search(r"process 1 of 2 .* ended without a word at step \d.*: process 0, which coordinates the run at "
                         r"127.0.0.1:\d+, is gone", survivor.err), survivor.err


def test_a_process_that_nobody_joins_gives_up_with_a_message_and_not_with_an_abort(corpus, tmp_path):
    command = [sys.executable, "-m", "moe_jax", "train", *overrides(corpus), f"--workdir={tmp_path / 'run'}", "--devices=1",
               f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2", "--process-id=0", "--timeout=10"]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("moe-jax")]
    assert "process 0 of 2 waited 10 s for all processes to connect to process 0 at 127.0.0.1:" in line
    assert "Terminating process" not in process.stderr


# Parts that need no second process.


@pytest.mark.parametrize("words, message", [
    (["--num-processes=2", "--process-id=0"], "--coordinator missing: --coordinator, --num-processes and --process-id belong"),
    (["--distributed", "--coordinator=a:1"], "--distributed finds the other processes by itself"),
    (["--coordinator=a", "--num-processes=2", "--process-id=0"], "--coordinator=a: must be HOST:PORT"),
    (["--coordinator=a:1", "--num-processes=2", "--process-id=2"], "--process-id=2: must be from 0 to --num-processes - 1 = 1"),
    (["--coordinator=a:1", "--num-processes=2", "--process-id=0", "--timeout=1"], "--timeout=1: must be at least 10 seconds"),
    (["--timeout=60"], "--timeout=60: has no effect on a single process"),
])
def test_flags_that_cannot_work_are_refused(words, message, capsys, monkeypatch):
    monkeypatch.setattr(processes, "start", lambda *_: pytest.fail("joined"))
    monkeypatch.setattr(cli, "prepare_process", lambda devices: None)
    assert run_here("train", "--config=configs/base.py", *words) == 1
    assert message in capsys.readouterr().err


def test_one_process_waits_for_nobody_and_sees_every_row():
    processes.barrier("nobody else")
    assert processes.gather("a value", 3) == [3] and processes.of_process_0("a choice", lambda: {"a": 1}) == {"a": 1}
    assert processes.stop_signal(None) is None and processes.stop_signal(15) == 15
    processes.require_equal("anything", {"a": 1})
    assert processes.is_first_of_host() and not processes.several()
    mesh = make_mesh({"data": 4, "fsdp": 1, "expert": 2, "tensor": 1})
    assert local_rows(mesh, 16) == [slice(0, 16)]


class ThisHalf:
    """A sharding of which the devices of this process have some rows, not all next to each other."""

    is_fully_addressable = False

    def addressable_devices_indices_map(self, shape):
        return {device: (slice(first, last, None), *(slice(None) for _ in shape[1:]))
                for device, (first, last) in enumerate([(8, 10), (2, 4), (0, 2), (2, 4)])}


def test_rows_that_are_not_next_to_each_other_find_their_devices(monkeypatch):
    monkeypatch.setattr("moe_jax.sharding.batch_sharding", lambda mesh: ThisHalf())
    monkeypatch.setattr(evaluate, "batch_sharding", lambda mesh: ThisHalf())
    assert local_rows(None, 12) == [slice(0, 4), slice(8, 10)]
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, sharding, rows: (
        shape, {device: rows(index) for device, index in sharding.addressable_devices_indices_map(shape).items()}))
    whole = np.arange(12 * 3).reshape(12, 3)
    (shape, by_device) = evaluate.put_batch({"ids": np.concatenate([whole[0:4], whole[8:10]])}, None, 12)["ids"]
    assert shape == (12, 3)
    for device, (first, last) in enumerate([(8, 10), (2, 4), (0, 2), (2, 4)]):
        np.testing.assert_array_equal(by_device[device], whole[first:last])
    with pytest.raises(ValueError, match="12 rows for the 6 of this process"):
        evaluate.put_batch({"ids": whole}, None, 12)


def test_r4_a_share_of_the_batch_is_the_share_of_the_batch(corpus, tmp_path):
    data = open_data(config_of(corpus).data, str(tmp_path))
    assert isinstance(data.train, Batches)
    whole = data.train.batch(3)
    for key, values in data.train.batch(3, slice(4, 8)).items():
        np.testing.assert_array_equal(values, whole[key][4:8])


def test_the_message_about_differences_names_settings_and_processes(monkeypatch):
    said = [{"data.seed": 0, "jax": "0.10.2"}, {"data.seed": 1, "jax": "0.10.2"}, {"data.seed": 0, "jax": "0.11"}]
    monkeypatch.setattr(processes, "gather", lambda name, values: said)
    with pytest.raises(processes.ProcessError) as raised:
        processes.require_equal("the settings", said[0])
    assert 'data.seed is 0 on processes 0, 2 and 1 on process 1; jax is "0.10.2" on processes 0, 1 and "0.11" on process 2' in str(
        raised.value)
