"""Sweeps: what is refused before anything runs, what is run and what not again, intervals, verdicts, tables."""

import dataclasses
import json
import math
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import _thread

import numpy as np
import pytest

from experiments.base import SCALES, get_config
from moe_jax.sweeps import Continue, Evaluate, Scale, Sweep, Upcycle, equal, falls, jobs, minus, reported, rises, runner
from moe_jax.sweeps.command import _seeds, Request, run
from moe_jax.sweeps.definition import Order, SweepError, label, load_sweep
from moe_jax.sweeps.figure import draw
from moe_jax.sweeps.progress import Display
from moe_jax.sweeps.results import Key, config_hash, finished, identity, metrics_of, read_result, write_result
from moe_jax.sweeps.scoreboard import experiments, write_scoreboard
from moe_jax.sweeps.statistics import Interval, compare, missing_metrics, paired_interval, verdict
from moe_jax.sweeps.tables import arms_table, comparisons_table, markdown, put_between_marks

ROOT = pathlib.Path(__file__).resolve().parent.parent


def sweep(arms, expected=(), **more):
    values = dict(number=1, title="Title", question="?", paper="A et al. 2020", config=get_config, scales=SCALES)
    return Sweep(arms=arms, expected=expected, **{**values, **more})


# What is refused.


@pytest.mark.parametrize("make, message", [
    (lambda: sweep({"a": {}}, (falls("ce", "a", "b"),)), "there is no arm 'b'; the arms are 'a'"),
    (lambda: sweep({"b": Evaluate("a"), "a": {}}), "it starts from 'a', which must stand before it"),
    (lambda: sweep({"a": {}, "b": Evaluate("a"), "c": Continue("b")}), "which is an evaluation and leaves no model"),
    (lambda: sweep({"A b": {}}), "a name is lower-case letters"),
    (lambda: sweep({}), "at least one"),
    (lambda: sweep({"a": {}}, scales={"smoke": Scale(1)}), "has smoke, quick, full"),
    (lambda: sweep({"a": {}}, published={"a": 1.0}), "published_metric"),
    (lambda: sweep({"a": {}}, published={"z": 1.0}, published_metric="ce"), "there is no arm 'z'"),
    (lambda: falls("ce", "a"), "compares at least two"),
    (lambda: Order("ce", ("a", "b"), "equal"), "needs a margin"),
    (lambda: Order("ce", ("a", "b"), "sinks"), "allowed are 'falls'"),
    (lambda: Scale(0), "at least 1"),
])
def test_a_sweep_that_cannot_work_is_refused(make, message):
    with pytest.raises(SweepError, match=message.replace("?", r"\?")):
        make()


@pytest.mark.parametrize("arms, message", [
    ({"a": {}, "b": {"moe.num_expert": 4}}, "arm 'b' at scale 'quick': moe.num_expert: there is no such setting"),
    ({"a": {}, "b": {"moe.num_experts": 4, "moe.experts_per_token": 5}}, "arm 'b'.*cannot choose more than"),
    ({"a": {}, "b": {"moe.num_experts": 4.0}}, "arm 'b'.*must be of type int"),
    ({"a": {}, "b": {"moe.fill_order": "choice_major", "moe.experts_per_token": 2}}, "arm 'b'.*fill_order"),
    ({"a": {}, "b": {"mesh.data": 3}}, "arm 'b'.*mesh"),
    ({"a": {}, "b": Continue("a", {})}, "arm 'b'.*has as many already"),
    ({"a": {}, "b": Upcycle("a", {})}, "arm 'b'.*upcycling starts from a dense one"),
    ({"a": {}, "b": Evaluate("a", {"moe.eval_dispatch": "nowhere"})}, "arm 'b'.*allowed are"),
])
def test_every_arm_is_checked_before_the_first_run(arms, message):
    with pytest.raises(SweepError, match=message):
        runner.check(sweep(arms), "quick", 1)


@pytest.mark.parametrize("text, message", [
    (None, "has no sweep.py"), ("x = 1", "defines no SWEEP"), ("import nothing_of_that_name", "ModuleNotFoundError"),
    ("from moe_jax.sweeps import falls\nfalls('ce', 'a')", "compares at least two"),
])
def test_a_file_that_is_no_sweep_is_refused(tmp_path, text, message):
    (tmp_path / "all" / "one").mkdir(parents=True)
    if text is not None:
        (tmp_path / "all" / "one" / "sweep.py").write_text(text)
    with pytest.raises(SweepError, match=message):
        load_sweep(tmp_path / "all" / "one")


def test_scale_settings_come_after_the_sweeps_and_the_arms_last():
    ours = sweep({"a": {}, "b": {"moe.d_ff": 7}}, settings={"moe.d_ff": 5, "moe.num_experts": 6},
                 scales={**SCALES, "quick": Scale(3, {"moe.d_ff": 3}), "full": Scale(5, {"moe.d_ff": {"smoke": 1}} and {})})
    d_ff = lambda arm, scale: ours.config_of(arm, scale, 0).moe.d_ff
    assert (d_ff("a", "full"), d_ff("a", "quick"), d_ff("b", "quick")) == (5, 3, 7)
    assert ours.config_of("a", "quick", 0).moe.num_experts == 6


def test_a_value_may_differ_by_scale():
    ours = sweep({"a": {}, "more": Continue("a", {"training.num_steps": {"smoke": 9, "quick": 700, "full": 5000}})})
    assert [ours.config_of("more", scale, 0).training.num_steps for scale in SCALES] == [9, 700, 5000]


def test_a_seed_decides_parameters_and_the_order_of_the_text():
    config = sweep({"a": {}}).config_of("a", "quick", 4)
    assert config.training.seed == config.data.seed == 4


# Intervals and verdicts.


def test_paired_interval_by_hand():
    """1, 2, 3: mean 2, s = 1, t(2) at 97.5 % = 4.302653, half width 4.302653 / sqrt(3) = 2.484138."""
    interval = paired_interval([1.0, 2.0, 3.0])
    np.testing.assert_allclose([interval.mean, interval.low, interval.high], [2.0, 2 - 2.484138, 2 + 2.484138], atol=1e-6)
    assert interval.n == 3


def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [(i := paired_interval(rng.normal(0.3, 1, 4))).low < 0.3 < i.high for _ in range(4000)]
    assert abs(np.mean(covered) - 0.95) < 0.012


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_than_three_seeds_have_no_interval_and_resolve_nothing(n):
    interval = paired_interval([-5.0] * n)
    assert interval == Interval(-5.0, None, None, n)
    assert verdict(falls("ce", "a", "b"), interval) == "not resolved"


@pytest.mark.parametrize("order, low, high, expected", [
    (falls("ce", "a", "b"), -2, -1, "holds"), (falls("ce", "a", "b"), -2, 1, "not resolved"),
    (falls("ce", "a", "b"), 1, 2, "does not hold"), (falls("ce", "a", "b"), -2, 0, "not resolved"),
    (falls("ce", "a", "b"), 0, 2, "not resolved"), (falls("ce", "a", "b"), math.nan, math.nan, "not resolved"),
    (rises("ce", "a", "b"), 1, 2, "holds"), (rises("ce", "a", "b"), -2, -1, "does not hold"),
    (rises("ce", "a", "b"), -1, 2, "not resolved"),
    (equal("ce", "a", "b", within=1), -0.5, 0.5, "holds"), (equal("ce", "a", "b", within=1), 0.5, 0.9, "holds"),
    (equal("ce", "a", "b", within=1), -0.5, 1.5, "not resolved"), (equal("ce", "a", "b", within=1), 1.5, 2, "does not hold"),
    (equal("ce", "a", "b", within=1), -2, -1.5, "does not hold"), (equal("ce", "a", "b", within=1), -2, 2, "not resolved"),
    (reported("ce", "a", "b"), -2, -1, "reported"),
])
def test_verdicts(order, low, high, expected):
    assert verdict(order, Interval((low + high) / 2, low, high, 3)) == expected


def test_differences_are_paired_by_seed():
    """Seeds differ by 10, arms by exactly 1: unpaired nothing could be said."""
    found = {"a": {s: {"ce": 10.0 * s} for s in range(3)}, "b": {s: {"ce": 10.0 * s - 1} for s in range(1, 4)},
             "c": {s: {"ce": 10.0 * s - 1 + 0.1 * s} for s in range(3)}}
    (ab, ac) = compare(sweep(dict.fromkeys("abc", {}), (falls("ce", "a", "b"), falls("ce", "a", "c"))), found)
    assert (ab.interval.mean, ab.interval.n, ab.verdict) == (-1.0, 2, "not resolved")  # seeds 1 and 2 only
    assert ac.interval.n == 3 and ac.verdict == "holds" and ac.claim == "ce: a > c"
    np.testing.assert_allclose(ac.interval.mean, -0.9)


def test_points_may_be_metrics_numbers_and_differences():
    found = {arm: {s: {"ce": base + s, "leak": base + s - 2} for s in range(3)} for arm, base in (("a", 5.0), ("b", 4.0))}
    orders = (falls("ce", "a", ("a", "leak")), rises("ce", 0.5, minus("a", "b")), rises("ce", minus("a", "b"), minus("a", ("a", "leak"))))
    ours = compare(sweep({"a": {}, "b": {}}, orders), found)
    assert [each.interval.mean for each in ours] == [-2.0, 0.5, 1.0]
    assert [each.claim for each in ours] == ["ce: a > a: leak", "ce: 0.5 < (a - b)", "ce: (a - b) < (a - a: leak)"]
    assert label({"a": 2.0, "b": -0.5}, "ce") == "(2 a - 0.5 b)"


def test_a_chain_gives_a_comparison_for_each_neighbouring_pair_and_bonferroni_counts_them():
    """Differences -1 ± s: t(2) at 95 % is 4.30, at 1 - 0.05/2 6.21. With s = 0.3 half widths 0.745 and 1.07."""
    noise = np.array([-0.3, 0.0, 0.3])
    found = {arm: {s: {"ce": -place + (noise[s] if arm == "b" else 0.0)} for s in range(3)} for place, arm in enumerate("abc")}
    orders = (falls("ce", "a", "b", "c"), reported("ce", "a", "c"), falls("ce", "c", "not_run"))
    ours = compare(sweep(dict.fromkeys(("a", "b", "c", "not_run"), {}), orders), found)
    assert [(each.claim, each.verdict, each.strict) for each in ours] == [
        ("ce: a > b", "holds", "not resolved"), ("ce: b > c", "holds", "not resolved"), ("ce: a and c", "reported", "reported")]


def test_a_metric_that_no_run_has_is_told():
    ours = sweep({"a": {}, "b": {}}, (falls("drops", "a", "b"),))
    assert missing_metrics(ours, {"a": {0: {"ce": 1.0}}}) == ["a has no metric 'drops'; it has ce"]


# Results.


def result_of(ours, key, **metrics):
    which = identity(ours, key)
    return {"config_hash": config_hash(which), "identity": which, "metrics": metrics, "curve": {"step": [1, 2], "train/ce": [3.0, 2.0]}, "step": 2,
            "parameters": {"total": 10}, "seconds": {"training": 1.0}, "machine": {"processor": "p", "devices": "1 x cpu"},
            "versions": {"jax": "1", "python": "3"}, "code": {"git_commit": "abcdef0123"}}


def test_a_finished_run_is_not_run_again_and_a_changed_one_is(tmp_path):
    arms = {"a": {}, "b": {"moe.num_experts": 4}}
    ours = sweep(arms)
    jobs_of = lambda which: [(job.arm, job.seed) for job in runner.jobs_to_do(which, "quick", list(arms), range(2), tmp_path)]
    assert jobs_of(ours) == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    write_result(tmp_path, Key("b", "quick", 0), result_of(ours, Key("b", "quick", 0), ce=1.0))
    assert jobs_of(ours) == [("a", 0), ("a", 1), ("b", 1)]
    assert jobs_of(sweep({**arms, "b": {"moe.num_experts": 2}})) == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert jobs_of(dataclasses.replace(ours, measure=lambda model: {})) == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_settings_of_more_digits_than_a_result_shows_are_recognised(tmp_path):
    ours, key = sweep({"a": {"moe.capacity_factor": 2 / 3, "optimizer.learning_rate": 6e-3 * 2**0.5}}), Key("a", "quick", 0)
    write_result(tmp_path, key, result_of(ours, key, ce=1.0))
    assert finished(ours, tmp_path, key)["metrics"] == {"ce": 1.0}
    assert finished(sweep({"a": {"moe.capacity_factor": 2 / 3 + 1e-9, "optimizer.learning_rate": 6e-3 * 2**0.5}}), tmp_path, key) is None


MEASURING = """
import functools
import jax
from configs.base import get_config
from moe_jax.sweeps import Scale, Sweep

@functools.partial(jax.jit, static_argnums=0)
def compiled(n, x):
    return x + 1

def half(x):
    return x / 2

class Mean:
    names = {"b", "c"}

NUMBER, _HIDDEN, TABLE, UNUSED = 1, 2, {"a": 3, "compiled": compiled}, {"e"}
later = functools.partial(half)

def used(x):
    return later(x) + NUMBER + _HIDDEN + TABLE["a"]

def measure(model):
    return {} if model else {"a": used(1) + Mean()}

SWEEP = Sweep(number=1, title="Tiny", question="?", paper="nobody", config=get_config, arms={"a": {}}, expected=(),
              scales={"smoke": Scale(1), "quick": Scale(3), "full": Scale(5)}, measure=measure)
"""


def written_sweep(folder, text):
    folder.mkdir(parents=True)
    (folder / "sweep.py").write_text(text)
    (folder / "README.md").write_text("<!-- results of quick -->\n<!-- end of results of quick -->\n")
    return load_sweep(folder)


def test_whatever_a_measure_may_use_makes_its_results_new(tmp_path):
    changes = [("", ""), ("= 1, 2,", "= 9, 2,"), ("= 1, 2,", "= 1, 9,"), ('"a": 3', '"a": 4'), ('"c"}', '"d"}'), ("x / 2", "x / 3"),
               ("later(x) +", "later(x) -"), ("return {}", 'return {"n": 1}'), ('"Tiny"', '"Small"'), ('{"e"}', '{"f"}')]
    hashes = [written_sweep(tmp_path / f"all{place}" / "one", MEASURING.replace(old, new)).measure_hash()
              for place, (old, new) in enumerate(changes)]
    assert len(set(hashes[:-2])) == len(changes) - 2
    assert hashes[0] == hashes[-2] == hashes[-1]  # not of what it does not use, nor of where the functions of TABLE are


def test_some_seeds_do_not_take_the_others_out_of_the_readme(tmp_path, capsys):
    folder = tmp_path / "all" / "one"
    ours = written_sweep(folder, MEASURING)
    for seed in range(4):
        write_result(folder / "results", Key("a", "quick", seed), result_of(ours, Key("a", "quick", seed), ce=1.0 + seed))
    for seeds, mean in [((), 2.0), ((1,), 2.0), ((3,), 2.5)]:
        assert run([folder], Request("quick", seeds=seeds, table=True, scratch=str(tmp_path))) == 0
        assert f"| a | {mean:.4f}" in (folder / "README.md").read_text()


def test_an_evaluation_trains_the_arm_that_it_looks_at_and_what_that_starts_from(tmp_path):
    ours = sweep({"dense": {"moe.num_experts": 0}, "up": Upcycle("dense", {}), "look": Evaluate("up", {}), "other": {}})
    asked = lambda arms: [(job.arm, job.wanted) for job in runner.jobs_to_do(ours, "quick", arms, [0], tmp_path)]
    assert asked(["look"]) == [("dense", ()), ("up", ("look",))]
    assert asked(["dense", "up", "look"]) == [("dense", ("dense",)), ("up", ("up", "look"))]
    for name in ("dense", "up"):
        write_result(tmp_path, Key(name, "quick", 0), result_of(ours, Key(name, "quick", 0), ce=1.0))
    assert asked(list(ours.arms)) == [("dense", ()), ("up", ("look",)), ("other", ("other",))]


def test_a_changed_arm_makes_those_that_start_from_it_new():
    make = lambda experts: sweep({"a": {"moe.num_experts": experts}, "b": Evaluate("a", {"moe.num_experts": 4})})
    key = Key("b", "quick", 0)
    assert identity(make(4), key) == identity(make(4), key) != identity(make(8), key)


def test_an_identity_leaves_out_settings_at_their_default():
    """So a setting that is added to the config later, with a default that changes nothing, makes no run new."""
    config = identity(sweep({"a": {"moe.router_jitter": 0.0, "moe.d_ff": 99}}), Key("a", "quick", 0))["config"]
    assert config["moe.d_ff"] == 99 and "moe.router_jitter" not in config and "data.cache_dir" not in config


def test_a_smoke_result_is_of_one_version_of_the_code(monkeypatch):
    ours, key = sweep({"a": {}}), Key("a", "smoke", 0)
    before = identity(ours, key)
    monkeypatch.setattr("moe_jax.sweeps.results.source_fingerprint", lambda: "other")
    assert identity(ours, key) != before
    assert "code" not in identity(ours, Key("a", "quick", 0))


def test_a_result_file_is_json_with_an_entry_a_line_and_reads_back(tmp_path):
    ours, key = sweep({"a": {}}), Key("a", "quick", 3)
    write_result(tmp_path, key, result_of(ours, key, ce=1.23456789, load_max=1e-5))
    assert read_result(tmp_path, key)["metrics"] == {"ce": 1.234568, "load_max": 1e-5}
    assert metrics_of(ours, tmp_path, "quick", range(5)) == {"a": {3: {"ce": 1.234568, "load_max": 1e-5}}}
    text = (tmp_path / "quick" / "a_seed3.json").read_text()
    assert '\n    "ce": 1.234568,\n' in text and '"step": [1, 2],' in text
    (tmp_path / "quick" / "a_seed3.json").write_text(text[:40])
    assert finished(ours, tmp_path, key) is None


# The pool, with workers that only answer.


def tasks(ours, tmp_path, seeds=(0,), scale="quick"):
    places = runner.Places(tmp_path / "experiment", tmp_path / "results", tmp_path / "scratch" / scale)
    return runner.tasks_of(ours, places, runner.jobs_to_do(ours, scale, list(ours.arms), seeds, places.results))


def pool_with(monkeypatch, tmp_path, ours, worker: str, processes=2, keep=False, **more):
    """A pool whose workers run these lines for each task, with `words` (a dict) and `answer(dict)`."""
    program = ("import json, os, pathlib, sys, time\nanswer = lambda value: print(json.dumps(value), flush=True)\n"
               "for line in sys.stdin:\n    words = json.loads(line)\n" + textwrap.indent(textwrap.dedent(worker), "    "))

    def start(self, number):
        process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                   cwd=tmp_path)
        process.number = number
        self._workers.append(process)
        return process

    monkeypatch.setattr(runner.Pool, "_start", start)
    todo = tasks(ours, tmp_path, **more)
    return runner.Pool(todo, processes, 1, keep, tmp_path), Display({task.name: task.steps for task in todo})


def test_a_run_that_fails_is_told_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    ours = sweep({"bad": {}, "after_bad": Continue("bad", {"training.num_steps": 5000}), "dies": {}, "good": {}})
    pool, display = pool_with(monkeypatch, tmp_path, ours, """
        if words['arm'] == 'dies':
            os._exit(9)
        answer({'error': 'no luck'} if words['arm'] == 'bad' else {'done': True})
        """, seeds=(0, 1))
    pool.run(display)
    assert pool.done == {"experiment/good_seed0", "experiment/good_seed1"}
    assert pool.failed["experiment/bad_seed1"] == "no luck"
    assert pool.failed["experiment/after_bad_seed0"] == "experiment/bad_seed0 failed, from which it starts"
    assert "exit code 9" in pool.failed["experiment/dies_seed0"]
    said = capsys.readouterr().err
    assert "8/8" in said and "failed: no luck" in said


def test_a_process_that_cannot_be_started_fails_its_task(monkeypatch, tmp_path):
    pool, display = pool_with(monkeypatch, tmp_path, sweep({"a": {}, "after_a": Continue("a", {"training.num_steps": 5000})}), "")

    def start(self, number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner.Pool, "_start", start)
    pool.run(display)
    assert "No space left on device" in pool.failed["experiment/a_seed0"] and "experiment/after_a_seed0" in pool.failed


def test_an_arm_waits_for_the_one_that_it_starts_from_whose_directory_is_kept_until_then(monkeypatch, tmp_path):
    ours = sweep({"first": {}, "then": Continue("first", {"training.num_steps": 5000}), "last": Continue("then", {
        "training.num_steps": 6000}), "alone": {}})
    pool, display = pool_with(monkeypatch, tmp_path, ours, """
        with open('order.txt', 'a') as file:
            print(words['arm'], [part.name.split('_')[0] for part in sorted(pathlib.Path(words['scratch']).iterdir())], file=file)
        answer({'done': True})
        """)
    for task in pool.tasks:
        task.workdir.mkdir(parents=True)
    pool.run(display)
    order = [line.split(" ", 1) for line in (tmp_path / "order.txt").read_text().splitlines()]
    places = {arm: place for place, (arm, _) in enumerate(order)}
    assert places["first"] < places["then"] < places["last"]
    assert "'first'" in dict(order)["then"] and "'then'" in dict(order)["last"]
    assert list((tmp_path / "scratch" / "quick").iterdir()) == []


def test_an_interrupted_sweep_lets_its_runs_save_themselves(monkeypatch, tmp_path):
    """As the worker does: it sees the end of its stdin while a run goes on."""
    pool, display = pool_with(monkeypatch, tmp_path, sweep({"a": {}, "b": {}}), """
        pathlib.Path('started').touch()
        sys.stdin.read()
        pathlib.Path('saved').touch()
        """, processes=1)

    def interrupt():
        while not (tmp_path / "started").exists():
            pass
        _thread.interrupt_main()

    # A process that was started in the background of a shell ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.run(display)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "saved").exists()
    assert not pool.done and not pool.failed and all(worker.poll() is not None for worker in pool._workers)


def test_a_run_goes_on_in_the_directory_where_it_was_interrupted(monkeypatch, tmp_path):
    ours, seen = sweep({"a": {}, "b": {"moe.num_experts": 4}}), []
    monkeypatch.setattr(jobs, "train", lambda config, workdir, finish: seen.append(workdir))
    for arm in ("a", "a", "b"):
        jobs.run_job(ours, jobs.Job(arm, "quick", 0, ()), tmp_path / "results", tmp_path, {})
    assert seen[0] == seen[1] != seen[2]


# Tables.


def test_curves_are_of_differences_where_arms_have_the_same_steps():
    curves = lambda *steps: {seed: {"metrics": {"ce": 2.0}, "curve": {"step": list(steps), "train/ce": [3.0 - seed] * len(steps)}}
                             for seed in (0, 1)}
    ours = sweep({"a": {}, "b": {}})
    panel = lambda **results: draw(ours, "quick", results, ()).subfigs[0].axes[0]
    same, apart = panel(a=curves(1, 2), b=curves(1, 2)), panel(a=curves(1, 2), b=curves(3, 4, 5))
    assert [line.get_ydata().tolist() for line in same.lines] == [[0.0], [0.0]] and "less that of a" in same.get_title("left")
    assert [line.get_ydata().tolist() for line in apart.lines] == [[2.5], [2.5]]  # means over seeds, smoothed to one point
    assert [line.get_xdata().tolist() for line in apart.lines] == [[2], [5]] and apart.get_title("left") == "training loss, smoothed"


def test_the_table_has_means_spreads_and_the_papers_figures():
    ours = sweep({"a": {}, "b": {}}, (falls("ce", "a", "b"),), metrics=("ce", "load_max"), published={"a": 39.8},
                 published_metric="perplexity")
    found = {"a": {s: {"ce": 4.0 + s, "load_max": 12.5} for s in range(3)}, "b": {0: {"ce": 3.0, "load_max": 0.001}}}
    assert arms_table(ours, found) == [["arm", "ce", "load_max", "perplexity", "seeds"],
                                       ["a", "5.0000 ± 1.0000", "12.5 ± 0.0000", "39.8", "3"], ["b", "3.0000", "0.001", "–", "1"]]
    assert comparisons_table(compare(ours, found))[1] == ["ce: a > b", "< 0", "-1.0000", "–", "1", "not resolved"]
    assert markdown([["a|b", "c"], ["1", "2"]]) == "| a\\|b | c |\n| --- | --- |\n| 1 | 2 |"


def test_text_is_put_between_its_marks_and_nowhere_else(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- x -->\nold\n<!-- end of x -->\nafter\n<!-- y -->\n<!-- end of y -->\n")
    put_between_marks(path, "x", "new \\1")
    assert path.read_text() == "before\n<!-- x -->\n\nnew \\1\n\n<!-- end of x -->\nafter\n<!-- y -->\n<!-- end of y -->\n"
    with pytest.raises(SweepError, match="needs the line <!-- z -->"):
        put_between_marks(path, "z", "new")
    with pytest.raises(SweepError, match="write one"):
        put_between_marks(tmp_path / "none.md", "x", "new")


SWEEP_FILE = """
from experiments.base import SCALES, get_config
from moe_jax.sweeps import Sweep, falls
SWEEP = Sweep(number={number}, title="T{number}", question="?", paper="P", config=get_config, scales=SCALES,
              arms={{"a": {{}}, "b": {{"moe.num_experts": 4}}}}, expected=(falls("ce", "a", "b", paper="{paper}"),))
"""


def test_the_scoreboard_has_each_claim_with_the_largest_scale_that_has_results(tmp_path):
    for number, name in ((2, "run"), (1, "not_run")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sweep.py").write_text(SWEEP_FILE.format(number=number, paper="P2" if number == 2 else ""))
    (tmp_path / "README.md").write_text("<!-- scoreboard -->\n<!-- end of scoreboard -->\n")
    ours = load_sweep(tmp_path / "run")
    for scale, gain in (("quick", 0.5), ("full", -0.5)):
        for seed in range(ours.scales[scale].seeds):
            for arm in ("a", "b"):
                value = 3.0 + seed + (gain + seed / 100 if arm == "b" else 0.0)
                write_result(tmp_path / "run" / "results", Key(arm, scale, seed), result_of(ours, Key(arm, scale, seed), ce=value))
    text = write_scoreboard(tmp_path)
    lines = text.splitlines()
    assert lines[2] == "| 1 | [T1](not_run/README.md) | – | P | – | – | – | not run |"
    assert lines[3].startswith("| 2 | [T2](run/README.md) | ce: a > b | P2 | -0.4800 | -0.4996 … -0.4604 | full, 5 | holds |")
    assert lines[-1] == "Comparisons: 1 holds. Experiments that have not been run: 1."
    assert text in (tmp_path / "README.md").read_text()
    for seed in range(2, 5):  # two seeds of full make no interval, and those of quick do
        (tmp_path / "run" / "results" / "full" / f"a_seed{seed}.json").unlink()
    assert "| +0.5100 | +0.4852 … +0.5348 | quick, 3 | does not hold |" in write_scoreboard(tmp_path)
    (tmp_path / "not_run" / "sweep.py").write_text(SWEEP_FILE.format(number=2, paper=""))
    with pytest.raises(SweepError, match="number=2: not_run, run have it"):
        write_scoreboard(tmp_path)


# The experiments that are here.

EVERY = experiments(ROOT / "experiments")


@pytest.mark.parametrize("path, ours", EVERY, ids=[path.name for path, _ in EVERY])
def test_every_experiment_has_arms_that_can_run_and_a_readme_to_write_into(path, ours, tmp_path):
    for scale in ("smoke", "quick", "full"):
        runner.check(ours, scale, 1)
        assert ours.scales[scale].seeds >= {"smoke": 1, "quick": 3, "full": 5}[scale]
    readme = (path / "README.md").read_text()
    for scale in ("quick", "full"):
        assert f"<!-- results of {scale} -->" in readme and f"<!-- end of results of {scale} -->" in readme


@pytest.mark.parametrize("path, ours", EVERY, ids=[path.name for path, _ in EVERY])
def test_committed_results_are_of_the_sweep_as_it_is(path, ours):
    """A result of settings that the sweep no longer has stands for nothing: delete it, or run it again."""
    for file in sorted((path / "results").glob("*/*.json")):
        result = json.loads(file.read_text())
        key = Key(result["arm"], file.parent.name, result["seed"])
        assert key.arm in ours.arms and file.name == key.file_name
        assert result["identity"] == identity(ours, key), f"{file} is of other settings than {path.name}/sweep.py"
        assert len(result["curve"].get("step", [])) <= 100


def test_the_request_names_seeds():
    ours = sweep({"a": {}})
    assert list(_seeds(ours, Request("quick"))) == [0, 1, 2] and _seeds(ours, Request("quick", seeds=(7,))) == (7,)
