"""Real steps of a tiny model compiled for four TPU chips that are not there: memory, FLOPs, collectives, refusals."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import plan_tpu
import pytest
import tiny

from moe_jax.config import ConfigError
from moe_jax.planning.compiled import _refused, compile_step
from moe_jax.planning.formulas import estimate
from moe_jax.planning.slices import PlanError, parse_slice
from moe_jax.training.flops import forward_flops_per_token, hardware_flops_per_token

ROOT = Path(__file__).resolve().parents[1]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="libtpu is not installed (pip install '.[tpu]')")


@pytest.fixture(scope="module")
def compiled():
    """A training step and a decoding step for v5e-4, fsdp 2 x expert 2, and a training step of an encoder–decoder; about 30 s."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "plan_tpu.py"], capture_output=True, text=True, timeout=400,
                          env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


@needs_libtpu
def test_memory_is_that_of_the_state_and_the_old_state_is_reused(compiled):
    step = compiled["train"]
    assert compiled["state_bytes"] < step["arguments_bytes"] < 1.01 * compiled["state_bytes"] + compiled["batch_bytes"]
    assert step["aliased_bytes"] >= compiled["state_bytes"]
    assert step["peak_bytes"] == (step["arguments_bytes"] + step["output_bytes"] - step["aliased_bytes"]
                                  + step["temporary_bytes"])
    # Decoding has the parameters and the cache (2 layers x keys and values x 1 row x 256 slots x 2 heads x 64, bf16), which
    # it writes in place.
    assert compiled["decode"]["aliased_bytes"] >= 2 * 2 * 256 * 2 * 64 * 2
    assert 1 < compiled["decode"]["arguments_bytes"] / (compiled["state_bytes"] / 3) < 1.1


@needs_libtpu
def test_flops_are_those_of_the_formula_scanned_layers_multiplied(compiled):
    """Products by XLA within 1 % of the formula, buffers' empty slots included; attention by the kernel apart."""
    config, step = plan_tpu.config(), compiled["train"]
    tokens = config.tokens_per_step / 4
    attention = tokens * 2 * 2 * 4 * 64 * 256  # both layers, forward, over the causal half
    expected = tokens * hardware_flops_per_token(config, 512) - 3 * attention
    assert step["flops"] - step["kernel_flops"] == pytest.approx(expected, rel=0.01)
    # A row is one block, of which the kernel computes the hidden half too; backward it makes 7 products, not 4.
    assert step["kernel_flops"] == 2 * attention * (2 + 7) / 2 and step["uncounted_kernels"] == []
    # Every token chooses 2 experts; the kernels of the exchange compute at least those.
    decode = compiled["decode"]
    assert decode["flops"] >= 0.9 * forward_flops_per_token(config, 512, 512)
    assert step["bytes_accessed"] > step["arguments_bytes"]


@needs_libtpu
def test_the_collectives_of_the_mixtures_are_exchanges(compiled):
    """Compiler's exchange: buffers [E, C, D] of a row go to their experts and back, forward and backward: 4 per layer."""
    exchanges = [c for c in compiled["train"]["collectives"] if c["kind"] == "all-to-all"]
    assert sum(c["count"] for c in exchanges) == 4 * 2
    assert {(*c["axes"], c["dtype"], c["bytes"]) for c in exchanges} == {("expert", "bf16", 4 * 160 * 256 * 2 // 2)}
    # In generation nothing is dropped: rows go by ragged exchanges, which a TPU has (row_exchange 'auto').
    kinds = {c["kind"] for c in compiled["decode"]["collectives"]}
    assert "ragged-all-to-all" in kinds


@needs_libtpu
def test_formulas_match_the_program_compiled_for_tpus(compiled):
    """Gathered weights and exchanged tokens are exact in bytes. Gradients: those over `fsdp` are scattered sums, for which
    the compiler takes whole ones here and there; a sum of two devices sends as much as two scattered ones."""
    agree(estimate(plan_tpu.config(), parse_slice(plan_tpu.SLICE), plan_tpu.SIZES), compiled["train"])


@needs_libtpu
def test_formulas_of_two_stacks_match_the_program_compiled_for_tpus(compiled):
    """The same, and FLOPs: relative positions have no kernel, so that all of them are products."""
    guess, step = estimate(plan_tpu.pair(), parse_slice(plan_tpu.SLICE), plan_tpu.SIZES), compiled["pair"]
    agree(guess, step)
    assert step["kernel_flops"] == 0 and 4 * step["flops"] == pytest.approx(guess.hardware_flops, rel=1e-3)


def agree(guess, step):
    """Bytes by formula and in the compiled program."""
    def sent(found, *kinds, axes):
        return sum(c["count"] * c["bytes"] for c in found if c["kind"] in kinds and tuple(c["axes"]) == axes)

    ours, theirs = [dataclasses.asdict(each) for each in guess.collectives], step["collectives"]
    for kind, axes in (("all-gather", ("fsdp",)), ("all-to-all", ("expert",))):
        assert sent(ours, kind, axes=axes) == sent(theirs, kind, axes=axes) > 0
    both = ("fsdp", "expert")
    assert sent(ours, "all-reduce", axes=both) == pytest.approx(sent(theirs, "all-reduce", axes=both), rel=0.01)
    scattered = lambda found: sent(found, "reduce-scatter", axes=("fsdp",)) + sent(found, "all-reduce", axes=("fsdp",)) / 2
    assert scattered(ours) == pytest.approx(scattered(theirs), rel=0.01)


@needs_libtpu
def test_the_compiler_says_what_it_does_and_nothing_else_is_printed(compiled):
    assert compiled["said"][:3] == ["tracing the train step", "compiling the train step for v5e-4",
                                    "reading the compiled program"]
    assert compiled["stderr"] == ""
    assert compiled["train"]["cycles"] > compiled["decode"]["cycles"] > 1000
    assert compiled["train"]["compile_seconds"] > 0


@needs_libtpu
def test_a_program_that_does_not_fit_is_refused_with_what_it_needs(compiled):
    refused = compiled["refused"]
    assert refused["message"].startswith("The program does not fit into the memory of one device of v5e-4: ")
    assert refused["needed"] > 2**36 / 2 > refused["available"] == compiled["hbm_bytes"]


def test_other_refusals_of_the_compiler_are_one_line():
    error = _refused(RuntimeError("INTERNAL: Mosaic failed to compile\n  because of that"), parse_slice("v5e-4"))
    assert isinstance(error, PlanError)
    assert str(error) == "The compiler for v5e-4 refuses the program: INTERNAL: Mosaic failed to compile because of that"
    error = _refused(RuntimeError("RESOURCE_EXHAUSTED: Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G."),
                     parse_slice("v5e-4"))
    assert (error.needed_bytes, error.available_bytes) == (int(17.5 * 2**30), int(15.75 * 2**30))


def test_a_plan_needs_the_size_of_the_vocabulary_because_it_opens_no_data():
    with pytest.raises(ConfigError, match="model.vocab_size=0: a plan opens no data"):
        compile_step(tiny.config(), parse_slice("v5e-4"), plan_tpu.SIZES)
    with pytest.raises(ValueError, match="step='serve': must be one of train, prefill, decode"):
        compile_step(plan_tpu.config(), parse_slice("v5e-4"), plan_tpu.SIZES, "serve")
