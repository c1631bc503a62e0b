"""``moe-jax plan``: the record, what is printed and drawn, the search over meshes, the cache, the command line.

What the compiler and the formulas say is tested in test_compiled_plan.py and test_formulas.py; here plans are made by
formula, by hand, or, once, compiled for a TPU that is not there.
"""

import dataclasses
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from running import REPOSITORY, moe_jax

from moe_jax.config import ConfigError, load_config
from moe_jax.planning import command, plan as plan_module, plan_cache
from moe_jax.planning.compiled import CompiledStep, OutOfMemory
from moe_jax.planning.formulas import estimate
from moe_jax.planning.plan import COMPILED, Change, Exchange, Memory, Plan, make_plan
from moe_jax.planning.plan_table import GIB, count_text, merged, seconds_text, text_of, text_of_search
from moe_jax.planning.meshes import legal_meshes
from moe_jax.planning.search import chosen_mesh, search
from moe_jax.planning.slices import has_libtpu, parse_slice
from moe_jax.planning.suggestions import Suggestion
from moe_jax.planning.times import StepTime
from moe_jax.planning.waiting import Waiting
from moe_jax.sharding import AXES, resolve_mesh

__all__ = ["moe_jax"]

needs_libtpu = pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed (pip install '.[tpu]')")

# Small enough to compile for a TPU in seconds; divides over every mesh of eight devices with tensor up to 2.
TINY = {"model.num_layers": 2, "model.d_model": 64, "model.num_heads": 2, "model.num_kv_heads": 2, "model.head_dim": 32,
        "model.d_ff": 128, "model.vocab_size": 512, "model.dtype": "bfloat16", "moe.num_experts": 8, "moe.every": 1,
        "moe.d_ff": 128, "data.sequence_length": 128, "data.batch_size": 16, "training.num_steps": 1000,
        "optimizer.warmup_steps": 10}
WORDS = (f"--config={REPOSITORY / 'configs' / 'base.py'}", *(f"--config.{key}={value}" for key, value in TINY.items()))


def tiny(**settings):
    path, *rest = WORDS
    rest += [f"--config.{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return load_config(path.removeprefix("--config="), rest)


def by_hand(slice_="v5p-128", peak=15.2, **fields) -> Plan:
    """A plan with round figures; ``peak`` in GiB."""
    wanted = parse_slice(slice_)
    exchange = Exchange("all-to-all", ("expert",), "bf16", "bf16[8,2]", "layer/moe", 80 * 2**20, 128, 0.05, True, False,
                        False)
    memory = Memory({"parameters": 3 * GIB, "activations": 4 * GIB}, {"arguments": 8 * GIB}, round(peak * GIB), 32 * GIB)
    return Plan(**{**dict(
        name="by_hand", step="train", slice=wanted, mesh={"data": 8, "fsdp": 1, "expert": 8, "tensor": 1}, basis=COMPILED,
        why="the real program", sequences=512, sequence_tokens=4096, parameters_total=46_700_000_000,
        parameters_active=12_900_000_000, memory=memory, changes=(), exchanges=(exchange,), model_flops=1.6e17,
        hardware_flops=2.4e17, compiled_flops=2.5e17, 
        time=StepTime(8.0, "compute", {"compute": 7.0, "network": 1.0}, "roofline"), kv_cache_bytes=0, num_steps=900, lower_seconds=4.0, compile_seconds=118.0,
        versions={"jax": "0.10.2"}), **fields})


# The record.


def test_what_follows_from_a_plan():
    plan = by_hand()
    assert plan.tokens == 512 * 4096
    assert plan.tokens_per_second == 512 * 4096 / 8
    assert plan.mfu_upper_bound == pytest.approx(1.6e17 / 8 / (64 * 459e12))
    assert plan.chip_hours == 900 * 8 * 64 / 3600
    assert plan.memory.formula_peak_bytes == 7 * GIB and plan.memory.fits
    assert by_hand(step="decode").tokens == 512 and by_hand(step="decode").chip_hours is None
    tight = by_hand(peak=40).memory
    assert not tight.fits and tight.headroom_bytes == -8 * GIB


def test_a_plan_survives_json_whole():
    plan = by_hand(changes=(Change(("--config.training.microbatches=4",), "less at a time", GIB, COMPILED),))
    found = json.loads(json.dumps(plan.to_dict()))
    assert Plan.from_dict(found) == plan
    assert found["memory"]["fits"] is True and found["chip_hours"] == plan.chip_hours
    for damage in ({"memory": {}}, {"exchanges": [{}]}, {"time": "long"}, {"name": 3}):
        with pytest.raises((KeyError, TypeError)):
            Plan.from_dict({**found, **damage})


# The table.


def test_the_table_says_what_the_plan_holds():
    text = text_of(by_hand())
    for piece in ("by_hand on v5p-128: one training step", "64 chips v5p (4x4x4), mesh data 8 x expert 8",
                  "46.70 B parameters, 12.90 B active per token; 512 sequences of 4,096 tokens",
                  "of 32.0 GiB: 16.8 free, fits", "bound by compute; roofline", "160.00 P model, 240.00 P hardware",
                  "262,144 tokens/s; MFU at most 68.1 %; 128 chip-hours for 900 steps"):
        assert piece in text
    rows = {line.split("  ")[1]: line.split() for line in text.splitlines() if line.startswith("  ")}
    assert rows["parameters"] == ["parameters", "3.00"] and rows["arguments"] == ["arguments", "8.00"]
    assert rows["peak"] == ["peak", "7.00", "15.20"]
    assert rows["all-to-all"] == ["all-to-all", "expert", "bf16", "128", "80", "10", "50", "ms", "no"]
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_table_of_what_does_not_fit_says_by_how_much_and_what_would():
    change = Change(("--config.training.microbatches=4",), "a quarter of the activations at a time", 20 * GIB, COMPILED)
    text = text_of(by_hand(peak=40, changes=(change,)))
    assert "of 32.0 GiB: 8.0 too much: DOES NOT FIT" in text
    assert "would fit with --config.training.microbatches=4: 20.0 GiB, compiled" in text
    assert "no single change" in text_of(by_hand(peak=40))


def test_the_memory_of_a_chip_with_two_devices_is_that_of_both():
    text = text_of(by_hand("tpu7x-128"))
    assert "64 chips tpu7x (4x4x4, 128 devices)" in text
    assert "memory per chip, GiB (2 devices together)" in text


def test_collectives_of_one_kind_are_one_row_and_lose_nothing():
    one = by_hand().exchanges[0]
    other = dataclasses.replace(one, bytes_sent=2**20, count=128, seconds=0.25, scope="elsewhere")
    apart = dataclasses.replace(one, overlapped=True, seconds=0.01)
    rows = merged([one, apart, other])
    assert [(row.count, row.overlapped) for row in rows] == [(256, False), (128, True)]
    assert rows[0].bytes_sent * rows[0].count == 128 * (one.bytes_sent + other.bytes_sent)
    assert rows[0].seconds == pytest.approx(0.3)


@pytest.mark.parametrize("value, text", [(46_702_792_704, "46.70 B"), (1.5e15, "1.50 P"), (999, "999"), (1234, "1.23 k")])
def test_counts_are_short(value, text):
    assert count_text(value) == text


@pytest.mark.parametrize("value, text", [(0.0123, "12.3 ms"), (1.5, "1.50 s"), (90, "1 min 30 s")])
def test_times_are_short(value, text):
    assert seconds_text(value) == text


def test_the_table_of_a_search_marks_the_best_and_says_what_does_not_fit():
    best, large = by_hand(), by_hand(peak=40, mesh={"data": 64, "fsdp": 1, "expert": 1, "tensor": 1})
    lines = text_of_search([best, large] * 10, best).splitlines()
    assert lines[1].split()[:2] == ["->", "data"] and " fits " in lines[1]
    assert "does not fit" in lines[2] and "->" not in lines[2]
    assert lines[-1].startswith("and 8 more meshes")
    assert "none of these meshes fits" in text_of_search([large], None)


# The search.


def test_every_legal_mesh_is_found_and_no_other():
    config = tiny()
    found = {tuple(getattr(candidate.mesh, axis) for axis in AXES) for candidate in legal_meshes(config, 8)}
    assert (1, 1, 8, 1) in found and (2, 2, 1, 2) in found
    powers = itertools.product((1, 2, 4, 8), repeat=4)
    sides = [sizes for sizes in powers if math.prod(sizes) == 8]
    assert len(sides) == 20
    for sizes in sides:
        mesh = dataclasses.replace(config.mesh, **dict(zip(AXES, sizes)))
        try:
            resolve_mesh(dataclasses.replace(config, mesh=mesh), 8)
        except ConfigError:
            assert sizes not in found
        else:
            assert sizes in found
    assert len(found) == sum(sizes[3] <= 2 for sizes in sides)  # two heads


def test_a_batch_that_fits_no_mesh_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="data.batch_size=15"):
        legal_meshes(tiny(data__batch_size=15), 16)


def fake_planner(seconds, peak, compiled_peak=None):
    """Plans whose time and memory are functions of the mesh; and the list of the meshes that were compiled."""
    compiled = []

    def plan(config, compile_it):
        mesh = {axis: getattr(config.mesh, axis) for axis in AXES}
        if compile_it:
            compiled.append(mesh)
        size = (compiled_peak or peak)(mesh) if compile_it else peak(mesh)
        return by_hand(peak=size, mesh=mesh, basis=COMPILED if compile_it else "by formula",
                       time=StepTime(seconds(mesh), "compute", {}, ""))
    return plan, compiled


def test_where_no_mesh_fits_those_that_lack_least_are_compiled():
    planner, compiled = fake_planner(lambda mesh: 1.0 * mesh["fsdp"], lambda mesh: 400.0 / mesh["fsdp"])
    found = search(tiny(), parse_slice("v5e-8"), planner, 1)
    largest = max(plan.mesh["fsdp"] for plan in found.plans)
    assert found.best is None and compiled[0]["fsdp"] == largest > 1


def test_the_fastest_mesh_that_fits_is_compiled_and_is_the_best():
    planner, compiled = fake_planner(lambda mesh: 10.0 - mesh["data"] - mesh["fsdp"], lambda mesh: 40.0 / mesh["fsdp"])
    said = []
    found = search(tiny(), parse_slice("v5e-8"), planner, 2, lambda text, left: said.append((text, left)))
    assert len(compiled) == 2 and all(40 / mesh["fsdp"] <= 32 for mesh in compiled)
    assert found.best.mesh == compiled[0] and found.best.basis == COMPILED
    assert found.plans[0] is found.best and len(found.plans) == len(legal_meshes(tiny(), 8))
    fits = [plan.memory.fits for plan in found.plans]
    assert fits == sorted(fits, reverse=True)
    assert said[-2][0].startswith("mesh 1 of 2: ") and said[-2][1] is None and said[-1][1] >= 0


def test_where_the_formulas_were_too_hopeful_more_meshes_are_compiled():
    planner, compiled = fake_planner(lambda mesh: 10.0 - mesh["data"], lambda mesh: 1,
                                     lambda mesh: 40.0 if mesh["data"] > 2 else 1.0)
    found = search(tiny(), parse_slice("v5e-8"), planner, 1)
    assert len(compiled) == 2 and found.best is None  # both have data above 2
    planner, compiled = fake_planner(lambda mesh: mesh["data"], lambda mesh: 1,
                                     lambda mesh: 40.0 if len(compiled) == 1 else 1.0)
    assert search(tiny(), parse_slice("v5e-8"), planner, 1).best.mesh == compiled[1]


def test_a_mesh_that_is_chosen_is_the_fastest_that_leaves_room():
    memory = lambda mesh: {1: 40.0, 2: 30.0}.get(mesh["fsdp"], 20.0)  # of 32: fsdp 2 fits, and leaves 6 % of it
    planner, compiled = fake_planner(lambda mesh: 1.0 * mesh["fsdp"], memory)
    chosen = chosen_mesh(tiny(), parse_slice("v5e-8"), planner, False)
    assert chosen.mesh.fsdp == 4 and chosen.training.microbatches == 1 and not compiled


def test_where_no_mesh_leaves_room_there_are_more_microbatches():
    planner, _ = fake_planner(lambda mesh: 1.0 * mesh["fsdp"], lambda mesh: 30.0)
    quarter = lambda config, compiled: planner(config, compiled) if config.training.microbatches < 2 else by_hand(
        peak=20, mesh={axis: getattr(config.mesh, axis) for axis in AXES})
    assert chosen_mesh(tiny(), parse_slice("v5e-8"), quarter, True).training.microbatches == 2
    assert chosen_mesh(tiny(training__microbatches=1), parse_slice("v5e-8"), quarter, False).training.microbatches == 1
    # Where that does not help either, what lacks least; 16 rows on 8 chips go through in two parts at most.
    planner, _ = fake_planner(lambda mesh: 1.0, lambda mesh: 400.0 / mesh["fsdp"])
    chosen = chosen_mesh(tiny(), parse_slice("v5e-8"), planner, True)
    assert chosen.mesh.fsdp == 8


def test_without_compiling_the_best_is_by_formula():
    planner, compiled = fake_planner(lambda mesh: mesh["tensor"], lambda mesh: 40.0 / mesh["expert"])
    found = search(tiny(), parse_slice("v5e-8"), planner, 0)
    assert not compiled and found.best.basis == "by formula" and found.best.mesh["expert"] >= 2
    planner, _ = fake_planner(lambda mesh: 1, lambda mesh: 50)
    assert search(tiny(), parse_slice("v5e-8"), planner, 0).best is None


# The cache.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


def test_a_plan_that_was_kept_is_found_by_the_same_key_only(cache):
    key = plan_cache.key_of(config={"a": 1}, mesh={"data": 2})
    assert plan_cache.read(key) is None
    plan_cache.write(key, {"x": 1.5})
    assert plan_cache.read(key) == {"x": 1.5}
    assert [path.name for path in cache.iterdir()] == [f"{key}.json"]
    assert plan_cache.key_of(mesh={"data": 2}, config={"a": 1}) == key
    for other in ({"config": {"a": 2}, "mesh": {"data": 2}}, {"config": {"a": 1}, "mesh": {"data": 4}}):
        assert plan_cache.key_of(**other) != key


def test_other_code_is_another_key(monkeypatch):
    key = plan_cache.key_of(config=1)
    monkeypatch.setattr(plan_cache.files, "source_fingerprint", lambda: "other")
    assert plan_cache.key_of(config=1) != key


def test_a_damaged_plan_is_none_and_a_write_that_fails_leaves_the_old_one(cache, caplog):
    plan_cache.write("key", {"x": 1})
    with pytest.raises(TypeError):
        plan_cache.write("key", {"x": object()})
    assert plan_cache.read("key") == {"x": 1} and len(list(cache.iterdir())) == 1
    (cache / "key.json").write_text('{"x": ')
    assert plan_cache.read("key") is None
    (cache / "key.json").write_text("[]")
    assert plan_cache.read("key") is None


def test_a_search_and_a_plan_share_what_was_compiled_but_for_changes_that_a_search_does_not_look_for(cache, monkeypatch):
    made = []

    def make(config, slice_, sizes, step, compile, say, name, alternatives):
        made.append(alternatives)
        changes = (Change(("--slice=v5e-16",), "", GIB, COMPILED),) if alternatives else ()
        return by_hand("v5e-8", peak=peak, mesh=sizes, changes=changes)

    monkeypatch.setattr(command, "make_plan", make)
    planner = command._Planner(command.Request("tiny", "v5e-8"), parse_slice("v5e-8"))
    for peak, wanted in ((1, [False]), (40, [False, True])):
        made.clear()
        config = tiny(training__seed=peak)
        for alternatives in (False, False, True, True, False):
            planner.plan(config, True, alternatives=alternatives)
        assert made == wanted
    uncached = dataclasses.replace(planner, request=dataclasses.replace(planner.request, cache=False))
    uncached.plan(config, True)
    assert made == [False, True, True]


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOE_JAX_CACHE", str(tmp_path / "file"))
    plan_cache.write("key", {"x": 1})
    assert "the plan is not kept: Cannot write" in caplog.text and plan_cache.read("key") is None


# Waiting.


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_a_line_at_once_and_one_now_and_then():
    stream = io.StringIO()
    with Waiting(stream, every=0.02) as waiting:
        waiting.say("compiling", 3600)
        deadline = time.monotonic() + 10
        while stream.getvalue().count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    first, *more = stream.getvalue().splitlines()
    assert first == "compiling, eta 1 h 00 min"
    assert len(more) >= 2 and all(line.startswith("compiling  0 s, eta ") for line in more)


def test_a_terminal_gets_one_line_that_is_cleared_in_the_end():
    stream = Terminal()
    with Waiting(stream, every=0.01) as waiting:
        waiting.say("tracing")
        waiting.say("compiling")
        time.sleep(0.05)
    text = stream.getvalue()
    assert "\n" not in text and text.endswith("\r\x1b[K") and "compiling  0 s" in text


def test_after_an_error_nothing_more_is_said():
    stream = io.StringIO()
    with pytest.raises(ValueError), Waiting(stream, every=0.01) as waiting:
        waiting.say("compiling")
        raise ValueError
    said = stream.getvalue()
    time.sleep(0.05)
    assert stream.getvalue() == said


# Plans by formula.


@pytest.fixture(scope="module")
def plan():
    wanted, config = parse_slice("v5e-8"), tiny()
    return make_plan(config, wanted, resolve_mesh(config, wanted.devices), compile=False, name="tiny")


def test_a_plan_by_formula_holds_what_the_formulas_say(plan):
    config = tiny()
    guess = estimate(config, plan.slice, plan.mesh)
    assert plan.basis == "by formula" and plan.compiled_flops is None and plan.compile_seconds is None
    assert plan.memory.formula_bytes == guess.memory_bytes and plan.memory.peak_bytes == guess.peak_bytes
    assert (plan.parameters_total, plan.model_flops) == (guess.parameters_total, guess.model_flops)
    # AdamW holds two numbers per parameter, and a count.
    bytes_of = plan.memory.formula_bytes
    assert bytes_of["optimizer state"] == pytest.approx(2 * bytes_of["parameters"], rel=1e-3)
    assert plan.tokens == 16 * 128 and plan.num_steps == 1000
    assert plan.time.seconds > 0 and plan.mfu_upper_bound < 1
    assert sum(each.seconds for each in plan.exchanges) == pytest.approx(plan.time.parts_seconds["network, exposed"])
    assert plan.time.seconds >= guess.hardware_flops / 8 / plan.slice.chip.peak_bf16_flops


def test_two_devices_of_a_chip_hold_twice_what_one_holds():
    wanted = parse_slice("tpu7x-8")  # four chips, eight devices
    config = tiny()
    sizes = resolve_mesh(config, wanted.devices)
    plan, guess = make_plan(config, wanted, sizes, compile=False), estimate(config, wanted, sizes)
    assert plan.memory.peak_bytes == 2 * guess.peak_bytes and plan.memory.available_bytes == wanted.chip.hbm_bytes
    assert plan.chip_hours == plan.num_steps * plan.time.seconds * 4 / 3600


@pytest.mark.parametrize("step, tokens", [("prefill", 16 * 128), ("decode", 16)])
def test_inference_has_a_cache_and_no_optimizer(step, tokens):
    wanted, config = parse_slice("v5e-8"), tiny()
    plan = make_plan(config, wanted, resolve_mesh(config, 8), step, compile=False)
    assert plan.kv_cache_bytes == 2 * 2 * 16 * 128 * 2 * 32 * 2  # keys and values, layers, rows, slots, heads, width, bf16
    assert "optimizer state" not in plan.memory.formula_bytes and plan.tokens == tokens and plan.chip_hours is None
    assert "KV cache" in text_of(plan)


@pytest.mark.parametrize("step, tokens, words", [
    ("train", 16 * (128 + 32), "16 sequences of 128 tokens and 32 targets"),
    ("prefill", 16 * 128, "16 sequences of 128 tokens for the encoder"),
    ("decode", 16, "16 sequences with a cache of 32 tokens behind 128 of the encoder")])
def test_an_encoder_decoder_is_planned_as_two_stacks(step, tokens, words):
    wanted, config = parse_slice("v5e-8"), tiny(model__encoder_layers=2, data__objective="span_corruption", data__target_length=32)
    plan = make_plan(config, wanted, resolve_mesh(config, 8), step, compile=False)
    assert plan.tokens == tokens and words in text_of(plan)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    if step != "train":
        assert plan.kv_cache_bytes == 2 * 2 * 16 * (32 + 128) * 2 * 32 * 2  # as above, of what is written and of what is given


def test_what_does_not_fit_by_formula_is_told_changes_that_do():
    wanted = parse_slice("v5e-8")
    config = tiny(model__num_layers=24, model__d_model=2048, model__d_ff=8192, moe__d_ff=8192, data__sequence_length=4096,
                  data__batch_size=64)
    plan = make_plan(config, wanted, resolve_mesh(config, 8), compile=False)
    assert not plan.memory.fits and plan.changes
    for change in plan.changes:
        assert change.basis == "by formula" and change.settings and change.peak_bytes <= wanted.chip.hbm_bytes
    assert not make_plan(config, wanted, resolve_mesh(config, 8), compile=False, alternatives=False).changes


def test_a_program_that_the_compiler_refuses_is_planned_with_what_it_needs_and_mended(monkeypatch):
    wanted, config = parse_slice("v5e-8"), tiny()
    sizes = resolve_mesh(config, 8)
    asked = []

    def refuses(config, slice_, sizes, step, say):
        asked.append((config.training.microbatches, slice_.name, sizes))
        if len(asked) < 3:
            raise OutOfMemory("The program does not fit.", 20 * GIB, 16 * GIB)
        return CompiledStep(step, 1 * GIB, 1 * GIB, 3 * GIB, 1 * GIB, 4 * GIB, 1e12, 0, (), 1e9, None, (), 1, 2)

    def suggested(config, slice_, sizes, step, correction):
        assert correction == pytest.approx(20 * GIB / estimate(config, slice_, sizes).peak_bytes)
        for count in (2, 4, 8):
            changed = dataclasses.replace(config, training=dataclasses.replace(config.training, microbatches=count))
            setting = f"--config.training.microbatches={count}"
            yield Suggestion((setting,), "", changed, slice_, sizes, estimate(config, slice_, sizes))

    monkeypatch.setattr(plan_module, "compile_step", refuses)
    monkeypatch.setattr(plan_module, "suggestions", suggested)
    plan = make_plan(config, wanted, sizes)
    assert plan.basis == "by formula" and "does not fit" in plan.why and plan.memory.peak_bytes == 20 * GIB
    # The smallest change was refused too, the next was compiled, the last is by formula.
    assert [count for count, *_ in asked] == [1, 2, 4]
    assert [(change.settings[0][-1], change.basis) for change in plan.changes] == [("4", "compiled"), ("8", "by formula")]
    assert plan.changes[0].peak_bytes == 4 * GIB
    (peak,) = [line.split() for line in text_of(plan).splitlines() if line.startswith("  peak ")]
    assert peak == ["peak", f"{plan.memory.formula_peak_bytes / GIB:.2f}", "20.00"]


# The command line.


def plan_words(*more):
    return ("plan", *WORDS, "--slice=v5e-8", *more)


def test_a_table_and_a_picture(moe_jax, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = moe_jax(*plan_words("--formula"))
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("base on v5e-8: one training step") and "by formula: nothing was compiled" in outcome.out
    picture = (tmp_path / "plan.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]


def test_json_is_all_there_is_on_stdout_and_nothing_is_drawn_unless_asked_for(moe_jax, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = moe_jax(*plan_words("--formula", "--json", "--mesh=expert=4,fsdp=2"))
    found = json.loads(outcome.out)
    assert Plan.from_dict(found).mesh == {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}
    assert found["memory"]["fits"] is True and found["tokens_per_second"] > 0 and not list(tmp_path.iterdir())
    assert moe_jax(*plan_words("--formula", "--json", f"--out={tmp_path / 'a' / 'b.png'}")).code == 0
    assert (tmp_path / "a" / "b.png").read_bytes().startswith(b"\x89PNG")


def test_slices_may_divide_another_axis_than_data(moe_jax):
    words = ("--config.data.batch_size=64", "--formula", "--json", "--slice=2x v5e-8", "--mesh=fsdp=2,expert=8")
    refused = moe_jax("plan", *WORDS, *words)
    assert refused.code == 1 and "mesh.slice_axis" in refused.error
    found = json.loads(moe_jax("plan", *WORDS, *words, "--config.mesh.slice_axis=fsdp").out)
    assert found["mesh"]["fsdp"] == 2 and found["slice"]["num_slices"] == 2
    # What passes from slice to slice takes longer than what stays inside.
    one = json.loads(moe_jax("plan", *WORDS, *words, "--slice=v5e-16").out)
    pairs = zip(found["exchanges"], one["exchanges"], strict=True)
    assert {"fsdp" in a["axes"] for a, b in pairs if a["seconds"] > b["seconds"]} == {True}


def test_batch_and_context_of_a_step(moe_jax):
    found = json.loads(moe_jax(*plan_words("--formula", "--json", "--step=decode", "--batch=32", "--context=64")).out)
    assert (found["sequences"], found["sequence_tokens"], found["tokens"]) == (32, 64, 32)
    assert found["kv_cache_bytes"] == 2 * 2 * 32 * 64 * 2 * 32 * 2


def test_a_search_by_formula_ranks_and_marks(moe_jax, tmp_path):
    outcome = moe_jax(*plan_words("--formula", "--search", f"--out={tmp_path / 'plan.png'}"))
    lines = outcome.out.splitlines()
    assert outcome.code == 0 and lines[1].startswith("->") and "and 4 more meshes" in outcome.out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(moe_jax(*plan_words("--formula", "--search", "--json")).out)
    seconds = [row["step_seconds"] for row in found["meshes"] if row["fits"]]
    assert len(found["meshes"]) == 16 and seconds == sorted(seconds)
    assert found["best"]["mesh"] == found["meshes"][0]["mesh"]


def test_a_model_is_planned_by_its_name_and_what_was_chosen_is_said(moe_jax, tmp_path):
    words = ("plan", "--config=openmoe_paper:base", "--slice=v5e-8", "--formula")
    outcome = moe_jax(*words, "--config.model.remat=none", "--batch=64", f"--out={tmp_path / 'plan.png'}")
    text = " ".join(outcome.out.split())
    assert text.startswith("openmoe_paper:base on v5e-8: one training step")
    chosen = text.split("where the name says nothing: ")[1].split(" memory per chip")[0].split()
    assert chosen[:2] == ["--config.model.dtype=bfloat16", "--config.optimizer.name=adamw"]  # not what was given, nor the row's
    assert [word.split("=")[0] for word in chosen[2:]] == ["--config.training.microbatches", "--config.training.num_steps",
                                                          "--mesh"]
    # Said so, the plan is the same.
    found = json.loads(moe_jax(*words, "--config.model.remat=none", "--batch=64", *chosen, "--json").out)
    again = json.loads(moe_jax(*words, "--config.model.remat=none", "--batch=64", "--json").out)
    assert again.pop("chosen") == chosen and found.pop("chosen") == [] and found == again
    assert found["memory"]["fits"] and found["sequences"] == 64 and found["sequence_tokens"] == 2048
    kept = json.loads(moe_jax(*words, "--config.mesh.fsdp=8", "--json").out)
    assert kept["mesh"]["fsdp"] == 8 and not any("mesh" in word for word in kept["chosen"])


def test_without_libtpu_the_plan_is_by_formula_and_says_how_to_have_the_compiler(moe_jax, monkeypatch, tmp_path):
    for module in (command, plan_module):
        monkeypatch.setattr(module, "has_libtpu", lambda: False)
    outcome = moe_jax(*plan_words(f"--out={tmp_path / 'plan.png'}"))
    assert outcome.code == 0 and "pip install 'moe_jax[tpu]'" in outcome.err
    assert "by formula: libtpu, the compiler for TPUs, is not installed" in outcome.out
    assert "compiled" not in outcome.out.split("collectives")[0]


@pytest.mark.parametrize("words, wanted", [
    (["--slice=v5p-7"], "v5p-8"), (["--slice=v9-8"], "v5e, v5p"), (["--slice="], "--slice=v5p-128"),
    (["--mesh=data=4"], "does not match 8 devices"), (["--mesh=data=3,expert=8"], "v5e-8 has 8 chips"),
    (["--mesh=expert=8,model=2"], "data, fsdp, expert, tensor"), (["--mesh=data=2,data=4"], "cannot be read at 'data=4'"),
    (["--mesh=tensor=4"], "model.num_heads=2"), (["--batch=12"], "data.batch_size: 8, 16"), (["--batch=0"], "at least 1"),
    (["--step=training"], "train, prefill, decode"), (["--search", "--mesh=data=8"], "leave one of them out"),
    (["--search=2", "--formula"], "leave one of them out"), (["--no-cache", "--formula"], "leave one of them out"),
    (["--out=plan.pdf"], "--out=plan.pdf: must end in .png"),
    (["--config.model.vocab_size=0", "--config.data.vocabulary=no/such.model"], "--config.model.vocab_size=32000"),
    (["--config.moe.num_expert=8"], "moe.num_experts")])
def test_what_cannot_be_planned_is_one_line_with_what_is_allowed(moe_jax, words, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = [word for word in plan_words() if not any(word.split("=")[0] == other.split("=")[0] for other in words)]
    outcome = moe_jax(*base, *words)
    assert outcome.code == 1 and wanted in outcome.error and not outcome.out
    assert not list(tmp_path.iterdir())


def test_the_size_of_a_known_vocabulary_need_not_be_given(moe_jax):
    words = [word for word in plan_words("--formula", "--json") if "vocab_size" not in word]
    table = 320 * 64  # 259 bytes and marks, rounded up; width 64
    other = "--config.data.vocabulary=sentencepiece:576"
    sizes = [json.loads(moe_jax(*words, *more).out)["parameters_total"] for more in ((), (other,))]
    assert sizes[1] - sizes[0] == 2 * (576 * 64 - table)


def test_a_picture_that_cannot_be_written_is_one_line(moe_jax, tmp_path):
    (tmp_path / "plan.png").mkdir()
    outcome = moe_jax(*plan_words("--formula", f"--out={tmp_path / 'plan.png'}"))
    assert outcome.code == 1 and "plan.png: Is a directory" in outcome.error and "another place" in outcome.error
    assert not list((tmp_path / "plan.png").iterdir()) and len(list(tmp_path.iterdir())) == 1


def test_ctrl_c_ends_the_process_while_the_compiler_runs_and_python_hears_of_it_again_afterwards():
    # A process that was started in the background of a shell ignores Ctrl-C, and so do its children.
    wait = "import signal, time\nfrom moe_jax.planning.command import ended_at_once_by_ctrl_c\n" \
           "signal.signal(signal.SIGINT, signal.default_int_handler)\n" \
           "def sleep():\n    print('waiting', flush=True)\n    time.sleep(60)\n"
    for code, ended in ((wait + "with ended_at_once_by_ctrl_c():\n    sleep()", -signal.SIGINT),
                        (wait + "with ended_at_once_by_ctrl_c():\n    pass\n"
                         "try:\n    sleep()\nexcept KeyboardInterrupt:\n    raise SystemExit(7)", 7)):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == ended


def test_help_explains_every_option(moe_jax):
    outcome = moe_jax("plan", "--help")
    text = " ".join(outcome.out.split())
    for option in ("--slice SLICE v5p-128", "--mesh MESH data=8,expert=8", "--step STEP train, prefill or decode",
                   "--search [N]", "--formula", "--no-cache", "--json", "--out PNG"):
        assert option in text, option


@needs_libtpu
@pytest.mark.slow
def test_a_compiled_plan_is_kept_and_found_again(tmp_path):
    """The real program of a tiny model for eight chips that are not there."""
    environment = {**os.environ, "MOE_JAX_CACHE": str(tmp_path / "cache")}

    def run(*words):
        done = subprocess.run([sys.executable, "-m", "moe_jax", *plan_words("--mesh=expert=4,data=2", "--json", *words)],
                              cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    plan, said = run()
    assert plan["basis"] == "compiled" and "compiling the train step for v5e-8" in said
    assert plan["versions"]["libtpu"] and plan["compile_seconds"] > 0
    parts = plan["memory"]["compiled_bytes"]
    assert sum(parts.values()) == plan["memory"]["peak_bytes"] and plan["memory"]["fits"]
    # State and batch are exact by formula; the compiler pads some arrays.
    state = sum(plan["memory"]["formula_bytes"][name] for name in ("parameters", "optimizer state", "other state and batch"))
    assert state <= parts["arguments"] < 1.3 * state
    assert {each["kind"] for each in plan["exchanges"] if each["axes"] == ["expert"]} >= {"all-to-all"}
    assert plan["compiled_flops"] == pytest.approx(plan["hardware_flops"], rel=0.25)
    (kept,) = (tmp_path / "cache" / "plans").iterdir()
    again, said = run()
    assert again == plan and "compiling" not in said
    kept.write_text("{")
    other, said = run("--step=decode")
    assert other["step"] == "decode" and other["kv_cache_bytes"] > 0 and "compiling" in said
    assert len(list((tmp_path / "cache" / "plans").iterdir())) == 2
