"""Checkpoints to run directories and back: bit by bit, for every family and options of all kinds; and what is refused."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoints
import ml_dtypes
import numpy as np
import pytest

from moe_jax.config import ConfigError
from moe_jax.interop.convert import export_run, import_checkpoint, parse_size
from moe_jax.interop.huggingface import FAMILIES, to_config
from moe_jax.interop.layouts import FLAT, LINEAR, PER_HEAD, SAME, Halves, Linear, Same
from moe_jax.interop.quantised import from_mxfp4, scaled_by_block
from moe_jax.interop.reading import joined, load, open_checkpoint
from moe_jax.interop.safetensors_files import INDEX, Writer, read_folder, read_header, write_file
from moe_jax.interop.settings import InteropError
from moe_jax.training.run import RunError
from moe_jax.training.slices import SliceReader, SliceWriter, chunk_shape
from moe_jax.training.step import check_trainable

needs_oracles = pytest.mark.skipif(not checkpoints.FOLDER.exists(), reason=f"no {checkpoints.FOLDER}")


def same_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    found = {name: entry.read() for name, entry in read_folder(folder).items()}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].tobytes() == tensor.tobytes(), name


# Round trips

@pytest.mark.parametrize("name", checkpoints.VARIANTS)
def test_a_round_trip_is_bitwise(name, tmp_path):
    settings = checkpoints.settings(name)
    tensors = checkpoints.write(tmp_path / "hf", settings)
    made = import_checkpoint(tmp_path / "hf", tmp_path / "run")
    family, step = export_run(tmp_path / "run", tmp_path / "back", shard_bytes=3000)
    assert (family, step) == (made.family, 0)
    same_tensors(tmp_path / "back", tensors)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert to_config(written)[1] == to_config(settings)[1]  # the same model, by its own config.json
    assert written["eos_token_id"] == 3 and written["torch_dtype"] == "bfloat16" and "rope_parameters" not in written
    assert (tmp_path / "back" / INDEX).exists() and len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 3


def test_a_run_is_exported_as_the_family_that_can_hold_it(tmp_path):
    checkpoints.write(tmp_path / "hf", checkpoints.settings("deepseek_v3"))
    import_checkpoint(tmp_path / "hf", tmp_path / "run")
    (tmp_path / "run" / "huggingface" / "config.json").unlink()  # as if it had been trained here
    assert export_run(tmp_path / "run", tmp_path / "back")[0].name == "DeepSeek-V3"
    assert read_header(tmp_path / "back" / "model.safetensors")["lm_head.weight"].dtype == np.float32
    with pytest.raises(InteropError, match="This model is none of .*: Mixtral: .*attention.kind='latent'"):
        export_run(tmp_path / "run", tmp_path / "mixtral", family="mixtral")
    with pytest.raises(InteropError, match="--family=bert: known are Mixtral, mixtral"):
        export_run(tmp_path / "run", tmp_path / "bert", family="bert")
    assert not (tmp_path / "mixtral").exists() and not (tmp_path / "bert").exists()


def test_shards_with_an_index_are_read(tmp_path):
    settings = checkpoints.settings("gpt_oss")
    tensors = checkpoints.write(tmp_path / "one", settings)
    (tmp_path / "many").mkdir()
    writer = Writer(tmp_path / "many", {name: (array.shape, array.dtype) for name, array in tensors.items()}, 2000)
    for name, array in reversed(tensors.items()):
        writer.write(name, array)
    (tmp_path / "many" / "config.json").write_text(json.dumps(settings))
    same_tensors(tmp_path / "many", tensors)
    one, many = (load(open_checkpoint(tmp_path / name)) for name in ("one", "many"))
    np.testing.assert_array_equal(one[0]["embedding"]["embedding_VD"], many[0]["embedding"]["embedding_VD"])
    file = next(iter(json.loads((tmp_path / "many" / INDEX).read_text())["weight_map"].values()))
    (tmp_path / "many" / file).unlink()
    with pytest.raises(InteropError, match=f"1 of .* files of {INDEX} are missing: {file}"):
        open_checkpoint(tmp_path / "many")


def test_a_multimodal_checkpoint_gives_its_language_model(tmp_path):
    text = checkpoints.settings("llama4")
    tensors = checkpoints.write(tmp_path / "text", text)
    whole = {f"language_model.{name}": array for name, array in tensors.items()}
    whole |= {"vision_model.patch.weight": np.zeros((2, 2), np.float32),
              "multi_modal_projector.linear_1.weight": np.zeros(3, np.float32)}
    (tmp_path / "whole").mkdir()
    write_file(tmp_path / "whole" / "model.safetensors", whole)
    (tmp_path / "whole" / "config.json").write_text(json.dumps(
        {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"], "text_config": text, "vision_config": {}}))
    ours, theirs = open_checkpoint(tmp_path / "text"), open_checkpoint(tmp_path / "whole")
    assert ours.config == theirs.config
    for left, right in zip(ours.slices(), theirs.slices(), strict=True):
        assert left[0] == right[0] and left[1].tobytes() == right[1].tobytes()


# What is refused

def test_tensors_that_do_not_fit_are_all_named_and_nothing_is_left(tmp_path):
    settings = checkpoints.settings("mixtral")
    tensors = checkpoints.write(tmp_path / "hf", settings)
    del tensors["model.norm.weight"], tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
    write_file(tmp_path / "hf" / "model.safetensors", tensors)
    with pytest.raises(InteropError) as error:
        import_checkpoint(tmp_path / "hf", tmp_path / "run")
    text = str(error.value)
    assert "2 missing: model.norm.weight, model.layers.1.block_sparse_moe.experts.2.w3.weight" in text
    assert "1 surplus: model.layers.0.self_attn.q_proj.bias" in text
    assert "1 of another shape: lm_head.weight [23, 16] instead of [24, 16]" in text
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("change, message", [
    (dict(model_type="gpt2"), "model_type='gpt2'.* not supported; supported are Mixtral .*deepseek_v3.*gpt_oss"),
    (dict(hidden_act="tanh"), "hidden_act='tanh' has no gated counterpart"),
    (dict(rope_scaling=dict(rope_type="longrope", factor=2.0)), "is of the kind 'longrope'; supported: 'default', 'linear', 'llama3', 'yarn'"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 rotates a part"),
    (dict(num_hidden_layers=None), "num_hidden_layers is missing"),
    (dict(num_local_experts=0), "num_local_experts is 0; it must be a whole number"),
    (dict(num_experts_per_tok=9), "moe.experts_per_token=9: a token cannot choose more than"),
])
def test_settings_without_counterpart_are_refused(change, message):
    with pytest.raises((InteropError, ConfigError), match=message):
        to_config(checkpoints.settings("mixtral", **change))


@pytest.mark.parametrize("name, change, message", [
    ("deepseek_v3", dict(scoring_func="softmax"), "scoring_func='softmax' is not how"),
    ("deepseek_v2", dict(topk_method="noaux_tc"), "topk_method='noaux_tc' is not how"),
    ("qwen2", dict(layer_types=["linear_attention"] * 3), "linear_attention is not known here"),
    ("llama4", dict(no_rope_layers=[1]), "must have an entry for each of num_hidden_layers=3"),
])
def test_options_of_families_without_counterpart_are_refused(name, change, message):
    with pytest.raises(InteropError, match=message):
        to_config(checkpoints.settings(name, **change))


@pytest.mark.parametrize("name, change, acts", [
    ("mixtral", {}, True), ("gpt_oss", {}, True), ("qwen3", dict(norm_topk_prob=True), True), ("qwen3", {}, False),
    ("deepseek_v3", dict(norm_topk_prob=True), True), ("deepseek_v3", {}, False), ("llama4", {}, False),
    ("deepseek_v1", dict(norm_topk_prob=True), False),  # its code normalises several gates only
], ids=str)
def test_one_expert_with_a_gate_of_1_can_be_imported_and_is_not_trained(name, change, acts):
    config = to_config(checkpoints.settings(name, num_experts_per_tok=1, **change))[1]
    assert config.moe.allow_untrained_router == acts
    assert (config.moe.renormalize or config.moe.gate_order == "top_k_then_softmax") == acts
    with pytest.raises(ConfigError, match="moe.allow_untrained_router=True: .* no gradient") if acts else contextlib.nullcontext():
        check_trainable(config)


def test_unknown_settings_are_named_in_a_warning(caplog):
    to_config(checkpoints.settings("mixtral", hyper_connections=4, use_cache=False))
    assert "hyper_connections=4" in caplog.text and "use_cache" not in caplog.text


def test_damaged_files_are_refused(tmp_path):
    checkpoints.write(tmp_path, checkpoints.settings("mixtral"))
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for content, message in ((whole[: len(whole) // 2], "lies outside of the file"), (b"\0" * 4, "no safetensors file"),
                             (b"\x10" + b"\0" * 7 + b"x" * 16, "its header is no JSON")):
        file.write_bytes(content)
        with pytest.raises(InteropError, match=message):
            open_checkpoint(tmp_path)
    file.unlink()
    with pytest.raises(InteropError, match="neither model.safetensors nor"):
        open_checkpoint(tmp_path)


def test_a_target_that_is_there_is_left_alone(tmp_path):
    checkpoints.write(tmp_path / "hf", checkpoints.settings("mixtral"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    with pytest.raises(RunError, match="is there already"):
        import_checkpoint(tmp_path / "hf", tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    checkpoints.write(tmp_path / "hf", checkpoints.settings("mixtral"))
    write, count = SliceWriter.write, [0]

    def full(self, path, index, values):
        count[0] += 1
        if count[0] > 20:
            raise OSError(28, "No space left on device")
        write(self, path, index, values)

    monkeypatch.setattr(SliceWriter, "write", full)
    with pytest.raises(Exception, match="No space left on device"):
        import_checkpoint(tmp_path / "hf", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("200mb", 2 * 10**8), ("1.5K", 1500), ("77", 77)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "-1", "0", "5XB"])
def test_sizes_that_are_none(text):
    with pytest.raises(InteropError, match="shard-size"):
        parse_size(text)


# Config styles and defaults

@needs_oracles
@pytest.mark.parametrize("folder", sorted(path.name for path in checkpoints.FOLDER.glob("*")) if checkpoints.FOLDER.exists() else [])
def test_both_styles_of_config_say_the_same(folder):
    new, hub = (to_config(json.loads((checkpoints.FOLDER / folder / file).read_text()))[1]
                for file in ("config.json", "config.hub.json"))
    assert new == hub


@pytest.mark.parametrize("name, theta, epsilon, balance", [
    ("mixtral", 1e6, 1e-5, 0.001), ("olmoe", 1e4, 1e-5, 0.01), ("qwen2", 1e4, 1e-6, 0.001), ("qwen3", 1e4, 1e-6, 0.001),
    ("deepseek_v1", 1e4, 1e-6, 0.001), ("deepseek_v2", 1e4, 1e-6, 0.0), ("deepseek_v3", 1e4, 1e-6, 0.0),
    ("llama4", 5e5, 1e-5, 0.001), ("gpt_oss", 1.5e5, 1e-5, 0.001)])
def test_defaults_of_settings_that_are_missing(name, theta, epsilon, balance):
    settings = checkpoints.settings(name)
    del settings["rms_norm_eps"]
    config = to_config(settings)[1]
    assert (config.model.rope_theta, config.model.norm_epsilon, config.moe.balance_weight) == (theta, epsilon, balance)
    assert not config.model.tie_embedding


def test_defaults_of_gpt_oss_and_llama4():
    attention = to_config(checkpoints.settings("gpt_oss"))[1].attention
    assert (attention.rope_scaling, attention.rope_factor, attention.rope_truncate) == ("yarn", 32.0, False)
    assert (attention.layers, attention.bias, attention.sinks) == ("sliding,full", "all", True)
    config = to_config(checkpoints.settings("llama4", num_hidden_layers=4, no_rope_layer_interval=None, floor_scale=None))[1]
    assert config.attention.layers == "chunked,chunked,chunked,full:nope" and config.moe_layers == (1, 3)
    assert (config.attention.temperature_scale, config.attention.temperature_floor) == (0.1, 8192)


def test_layers_of_deepseek_v1_count_from_zero():
    of = lambda **change: to_config(checkpoints.settings("deepseek_v1", num_hidden_layers=6, **change))[1].moe_layers
    assert of() == (0, 2, 4)
    assert of(first_k_dense_replace=1) == (2, 4)
    assert of(first_k_dense_replace=3, moe_layer_freq=1) == (3, 4, 5)


# Numbers of few bits

def test_fp8_with_blocks_cut_at_the_edges():
    random = np.random.default_rng(0)
    values = random.standard_normal((28, 37)).astype(ml_dtypes.float8_e4m3fn)
    scale = random.uniform(0.5, 2, (2, 3)).astype(np.float32)
    slow = np.array([[np.float32(values[i, j]) * scale[i // 16, j // 16] for j in range(37)] for i in range(28)], np.float32)
    np.testing.assert_array_equal(scaled_by_block(values, scale, (16, 16)), slow)


def test_mxfp4_by_hand():
    # One row of 32: the first byte holds codes 1 (low) and 10 (high), 0.5 and -1, times 2**(129 - 127).
    blocks, scales = np.zeros((1, 1, 16), np.uint8), np.array([[129]], np.uint8)
    blocks[0, 0, 0], blocks[0, 0, 15] = 0xA1, 0xF7
    values = from_mxfp4(blocks, scales)
    assert values.shape == (1, 32)
    assert values[0, :2].tolist() == [2.0, -4.0] and values[0, 30:].tolist() == [24.0, -24.0] and not values[0, 2:30].any()


def _fp8(folder: Path, settings: dict, block: tuple[int, int]) -> None:
    """Rewrites a checkpoint's matrices of layers in FP8."""
    tensors = {name: entry.read() for name, entry in read_header(folder / "model.safetensors").items()}
    for name in [name for name in tensors if name.endswith("_proj.weight") or "_proj_with_mqa.weight" in name]:
        tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        grid = [-(-size // width) for size, width in zip(tensors[name].shape, block)]
        tensors[name + "_scale_inv"] = np.random.default_rng(1).uniform(0.5, 2, grid).astype(np.float32)
    write_file(folder / "model.safetensors", tensors)
    settings = {**settings, "quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    (folder / "config.json").write_text(json.dumps(settings))


def test_an_fp8_checkpoint(tmp_path):
    settings = checkpoints.settings("deepseek_v3")
    checkpoints.write(tmp_path, settings)
    _fp8(tmp_path, settings, (5, 7))
    params, _ = load(open_checkpoint(tmp_path))
    stored = {name: entry.read() for name, entry in read_header(tmp_path / "model.safetensors").items()}
    key = "model.layers.0.self_attn.o_proj.weight"
    theirs = scaled_by_block(stored[key], stored[key + "_scale_inv"], (5, 7))
    np.testing.assert_array_equal(params["first"][0]["layers"][0]["attention"]["w_out_HdD"], theirs.T.reshape(4, 3, 16))
    (tmp_path / "config.json").write_text(json.dumps(
        {**settings, "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}))
    with pytest.raises(InteropError, match=r"blocks of \[4, 4\] cut .* into"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(InteropError, match="quant_method='awq' is not supported"):
        open_checkpoint(tmp_path)


# Layouts and slices

@pytest.mark.parametrize("layout, shapes", [
    (LINEAR, [(4, 6)]), (LINEAR, [(4, 2, 3)]), (LINEAR, [(5, 3), (5, 4)]), (Linear(inputs=2), [(2, 3, 5)]), (SAME, [(4, 3)]),
    (FLAT, [(2, 3)]), (Same(row=True), [(6,)]), (PER_HEAD, [(5, 2, 3), (5, 2, 4)]), (Halves(), [(4, 3), (4, 3)]),
    (Halves(interleaved=True), [(4, 3), (4, 3)])])
def test_layouts_invert(layout, shapes):
    random = np.random.default_rng(0)
    arrays = [random.standard_normal(shape) for shape in shapes]
    tensor = layout.join(arrays)
    for array, back in zip(arrays, layout.split(tensor, shapes), strict=True):
        np.testing.assert_array_equal(array, back)


def test_layouts_by_hand():
    assert Halves(interleaved=True).join([np.array([[1, 3]]), np.array([[2, 4]])]).tolist() == [[1, 2, 3, 4]]
    # kv_b_proj: rows are head 0's keys, head 0's values, head 1's keys, ...
    key, value = PER_HEAD.split(np.arange(6)[:, None], [(1, 2, 2), (1, 2, 1)])
    assert key.tolist() == [[[0, 1], [3, 4]]] and value.tolist() == [[[2], [5]]]


def test_every_family_has_a_variant_here():
    covered = {to_config(checkpoints.settings(name))[0].name for name in checkpoints.VARIANTS}
    assert covered >= {family.name for family in FAMILIES if family.pair_losses is None}


def test_joined_undoes_load(tmp_path):
    tensors = checkpoints.write(tmp_path, checkpoints.settings("gpt_oss"))
    checkpoint = open_checkpoint(tmp_path)
    arrays = {path: np.zeros(shape, np.float32) for path, shape in checkpoint.shapes.items()}
    for place, values in checkpoint.slices():
        arrays[place.path][place.index] = values
    back = joined(checkpoint.parts, arrays)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor.astype(np.float32), err_msg=name)


def test_slices_are_read_as_they_were_written(tmp_path):
    writer, array = SliceWriter(tmp_path), np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    writer.create("a/b", array.shape, np.float32, leading=2)
    writer.create("zeros", (3,), np.int32)
    writer.create("number", (), np.int32)
    writer.write("number", (), np.int32(7))
    for i in range(2):
        for j in range(3):
            writer.write("a/b", (i, j), array[i, j])
    writer.finish()
    reader = SliceReader(tmp_path)
    np.testing.assert_array_equal(reader.read("a/b"), array)
    np.testing.assert_array_equal(reader.read("a/b", (1, 2)), array[1, 2])
    assert reader.read("zeros").tolist() == [0, 0, 0] and reader.read("number") == 7


def test_files_of_a_state_are_small():
    assert chunk_shape((60, 256, 7168, 2048), 4, 2) == (1, 1, 1792, 2048)  # a quarter of what is written at once
    assert chunk_shape((129280, 7168), 4) == (2340, 7168)  # 64 MiB
    assert chunk_shape((), 4) == () and chunk_shape((5,), 4) == (5,) and chunk_shape((3, 100, 100), 4, 1) == (1, 100, 100)


_MEMORY = """
import json, re, sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
from moe_jax.interop.convert import export_run, import_checkpoint

def growth(work):
    \"\"\"Bytes by which the peak of work() lies above what was in memory before.\"\"\"
    size = lambda name: 1024 * int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = size("VmRSS")
    work()
    return size("VmHWM") - before

folder, shard = Path(sys.argv[1]), int(sys.argv[2])
import_checkpoint(folder / "tiny", folder / "tiny_run")  # imports, and whatever is compiled
export_run(folder / "tiny_run", folder / "tiny_back", shard_bytes=shard)
print(json.dumps([growth(lambda: import_checkpoint(folder / "large", folder / "run")),
                  growth(lambda: export_run(folder / "run", folder / "back", shard_bytes=shard))]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """A model many times as large as the limit: twice the largest tensor, in fp32 as we hold it, and one shard."""
    shard = 1 << 23
    settings = checkpoints.settings("mixtral", hidden_size=256, vocab_size=16384, num_hidden_layers=24, intermediate_size=1024,
                                    num_local_experts=8)
    tensors = checkpoints.write(tmp_path / "large", settings)
    writer = Writer(tmp_path / "large", {name: (array.shape, array.dtype) for name, array in tensors.items()}, shard)
    for name, array in tensors.items():
        writer.write(name, array)
    (tmp_path / "large" / "model.safetensors").unlink()
    total, largest = (function(array.nbytes for array in tensors.values()) for function in (sum, max))
    checkpoints.write(tmp_path / "tiny", checkpoints.settings("mixtral", num_hidden_layers=24))
    # Without the settings of the tests: eight devices have a hundred threads, each with memory of its own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    # And what is freed goes back at once: glibc else keeps blocks as large as those that it has seen freed, now more, now fewer.
    environment |= {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
    run = subprocess.run([sys.executable, "-c", _MEMORY, str(tmp_path), str(shard)], capture_output=True, text=True, timeout=500,
                         env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    came_in, went_out = json.loads(run.stdout.splitlines()[-1])
    same_tensors(tmp_path / "back", tensors)
    limit = 2 * 2 * largest + shard
    assert total > 7 * limit and 0 < came_in < limit and 0 < went_out < limit, (came_in, went_out, limit, total)
