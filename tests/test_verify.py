"""Imported checkpoints beside what transformers computes with them (shared/oracles/hf): logits, layers, routing, losses and
gradients."""

import argparse
import json
import shutil

import checkpoints
import jax
import numpy as np
import pytest
import tiny

from moe_jax.commands import verify as command
from moe_jax.interop.convert import import_checkpoint
from moe_jax.interop.reading import load, open_checkpoint
from moe_jax.interop.safetensors_files import read_header, write_file
from moe_jax.interop.settings import InteropError
from moe_jax.interop.verify import Comparison, report, verify
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.named_arrays import flatten
from moe_jax.training.state import abstract_state

# The encoder–decoders are in test_pairs.py. Compiling each takes ten seconds and more.
QUICK = ("mixtral", "deepseek_v2_lite", "gpt_oss_mxfp4")
SLOW = ("olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v1", "deepseek_v2", "deepseek_v3", "deepseek_v3_fp8", "llama4_text", "gpt_oss")
needs_oracles = pytest.mark.skipif(not checkpoints.FOLDER.exists(), reason=f"no {checkpoints.FOLDER}")


@needs_oracles
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_everything_stored_is_matched(name):
    folder = checkpoints.FOLDER / name
    found = verify(folder, "config.hub.json")
    assert not [comparison for comparison in found if not comparison.passes(1e-4)]
    stored, numbers = read_header(folder / "oracle.safetensors"), json.loads((folder / "oracle.json").read_text())
    compared = {comparison.name for comparison in found}
    assert {key for key in stored if key != "input_ids"} <= compared
    assert set(numbers["grad_l2_of_loss_total"]) <= compared and {"loss_ce", "loss_total"} <= compared
    assert {key for key in numbers if key.startswith("aux_loss")} <= compared
    assert sum(comparison.kind == "experts" for comparison in found) == sum(key.startswith("combine.") for key in stored)


@needs_oracles
def test_every_stored_checkpoint_is_verified_by_some_test():
    assert {path.name for path in checkpoints.FOLDER.iterdir()} == {*QUICK, *SLOW, "nllb_moe", "switch_transformers"}


@pytest.mark.slow
@needs_oracles
def test_a_wrong_weight_fails(tmp_path, capsys):
    """The router of one layer halved: its choices stay, everything behind it changes; the command's exit code is 1."""
    shutil.copytree(checkpoints.FOLDER / "mixtral", tmp_path / "hf")
    tensors = {name: entry.read() for name, entry in read_header(tmp_path / "hf" / "model.safetensors").items()}
    key = "model.layers.0.block_sparse_moe.gate.weight"
    tensors[key] = (tensors[key].astype(np.float32) / 2).astype(tensors[key].dtype)
    write_file(tmp_path / "hf" / "model.safetensors", tensors)
    arguments = argparse.Namespace(hf=str(tmp_path / "hf"), config_file="config.json", tolerance=1e-4)
    assert command.run(arguments, []) == 1
    text = capsys.readouterr().out
    assert "decoder layer 0    experts 0 differ" in text and "FAILS" in text and text.splitlines()[-1].endswith("FAIL")


def test_the_report_names_what_does_not_pass():
    found = [Comparison("logits", "logits", 2e-5), Comparison("experts", "combine.model.layers.1.mlp.gate", 3.0),
             Comparison("layer_out", "layer_out.model.layers.1", 2e-4, scale=8.0)]
    assert [comparison.passes(1e-4) for comparison in found] == [True, False, True]
    assert not Comparison("logits", "logits", float("inf")).passes(1e-4)
    lines = report(found, 1e-4)
    assert lines[0].startswith("decoder layer 1") and "experts 3 differ" in lines[0] and "layer_out 2.0e-04" in lines[0]
    assert [line for line in lines if "FAILS" in line] == ["experts            3 choices differ (1 compared)  FAILS"]
    assert lines[-1] == "in total: at most 2.00e-04, tolerance 0.0001: 1 of 3 FAIL"


def test_without_stored_outputs_there_is_nothing_to_compare(tmp_path):
    checkpoints.write(tmp_path, checkpoints.settings("mixtral"))
    with pytest.raises(InteropError, match="holds no oracle.safetensors"):
        verify(tmp_path)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_a_converted_run_is_restored_onto_a_mesh(name, tmp_path):
    checkpoints.write(tmp_path / "hf", checkpoints.settings(name, q_lora_rank=6))
    checkpoint = import_checkpoint(tmp_path / "hf", tmp_path / "run")
    params, bias_LE = load(open_checkpoint(tmp_path / "hf"))
    mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
    state = abstract_state(checkpoint.config, checkpoint.vocab_size, mesh)
    restored = Checkpointer(tmp_path / "run" / "checkpoints", read_only=True).restore(state)
    assert restored.step == 0 and int(restored.state["step"]) == 0
    for path, leaf in flatten(restored.state["params"]).items():
        assert leaf.sharding.mesh.shape == mesh.shape
        np.testing.assert_array_equal(np.asarray(leaf), flatten(params)[path], err_msg=path)
    np.testing.assert_array_equal(np.asarray(restored.state["router_bias_LE"]), bias_LE)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(restored.state["opt_state"]))
