"""Between Hugging Face checkpoints and run directories, tensor by tensor: no model is too large for the memory."""

import itertools

import math
import pathlib
import re
import shutil
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from moe_jax.config import Config, resolve
from moe_jax.data.imported_vocabularies import IDS, special_ids
from moe_jax.data.vocabularies import EOS_ID, PAD_ID, load_vocabulary, sentencepiece_size
from moe_jax.files import write_json, write_text
from moe_jax.interop.huggingface import FAMILIES, family_of, to_config
from moe_jax.interop.reading import Checkpoint, open_checkpoint, parameter_shapes, tensors_of, with_progress
from moe_jax.interop.safetensors_files import Writer
from moe_jax.interop.settings import InteropError, read_settings
from moe_jax.interop.table import BIAS, Family, Part
from moe_jax.training.checkpoint import STATE, Checkpointer
from moe_jax.training.metrics import versions
from moe_jax.training.named_arrays import flatten, to_arrays
from moe_jax.training.new_run import new_run_directory, require_absent
from moe_jax.training.run import read_config, require_checkpoint
from moe_jax.training.slices import SliceReader, SliceWriter
from moe_jax.training.state import initial_state

# In a run that came from a checkpoint: its config.json, tokenizer and whatever else travels along.
ORIGIN = "huggingface"

# Files that travel along, in both directions.
_COMPANIONS = re.compile(r"tokenizer.*|.*\.model|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
                         r"generation_config\.json|chat_template.*|.*\.tiktoken|preprocessor_config\.json")
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
# Special ids of a run that was trained here: those of the vocabularies here.
_SPECIAL = {"bos_token_id": PAD_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
# A leaf of a state that is no parameter and no larger than this is computed; what is larger mirrors parameters.
_SMALL = 1 << 16

_CONFIG_FILE = '''\
"""The config of the run in this folder, to go on training it: moe-jax train --config={name}/config.py --workdir={name}"""

import json
import pathlib

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(json.loads(pathlib.Path(__file__).with_name("config.json").read_text()))
'''


def import_checkpoint(source: pathlib.Path, target: pathlib.Path, overrides: dict[str, Any] | None = None,
                      progress: bool = False) -> Checkpoint:
    """A run directory at step 0 with the weights of a checkpoint, written whole or not at all.

    One tensor of the checkpoint is in memory at a time. Optimizer moments are zeros, which take no space on disk.

    Args:
      overrides: settings of ours, by their full names, that win over those that follow from the checkpoint:
        ``{'model.dtype': 'bfloat16'}``.

    Raises:
      RunError: ``target`` is there already or cannot be written. InteropError, ConfigError: see
        :func:`moe_jax.interop.reading.open_checkpoint`. CheckpointError: the disk is full. VocabularyError.
    """
    require_absent(target, "a converted")
    overrides = _vocabulary(source, target) | (overrides or {})
    checkpoint = open_checkpoint(source, **overrides)
    vocabulary = _vocabulary_fingerprint(checkpoint.config)
    with new_run_directory(target) as partial:
        _copy_companions(source, partial / ORIGIN)
        with Checkpointer(partial / "checkpoints", keep=1) as checkpointer:
            write = lambda folder: _write_state(checkpoint, folder, progress)
            checkpointer.save_slices(0, _structure(checkpoint), {
                "config": checkpoint.config.to_dict(), "data_step": 0, "data_fingerprint": None, "tokens_seen": 0,
                "evaluated_step": 0, "vocab_size": checkpoint.vocab_size, "vocabulary": vocabulary}, write)
        write_json(partial / ORIGIN / "config.json", checkpoint.settings)
        write_json(partial / "config.json", checkpoint.config.to_dict())
        write_json(partial / "versions.json", versions())
        write_text(partial / "config.py", _CONFIG_FILE.format(name=target.name))
    return checkpoint


def _vocabulary(source: pathlib.Path, target: pathlib.Path) -> dict[str, Any]:
    """The setting that names the checkpoint's tokenizer where it will lie; without one, ids are written as numbers."""
    settings = read_settings(source)
    if (source / "tokenizer.json").is_file():
        return {"data.vocabulary": f"tokenizer:{target / ORIGIN / 'tokenizer.json'}"}
    size = family_of(settings, str(source / "config.json")).model_settings(settings).get("vocab_size")
    return {"data.vocabulary": f"{IDS}{size}{special_ids(source)}"}


def _vocabulary_fingerprint(config: Config) -> str:
    name = config.data.vocabulary
    if sentencepiece_size(name) is not None:
        raise InteropError(f"data.vocabulary={name!r}: is trained on a corpus, but a converted model has learnt its ids already; name the "
                           f"file of its tokenizer.")
    return load_vocabulary(name).fingerprint


def _abstract(checkpoint: Checkpoint) -> dict[str, Any]:
    return flatten(jax.eval_shape(lambda: initial_state(checkpoint.config, checkpoint.vocab_size)))


def _structure(checkpoint: Checkpoint) -> dict[str, dict]:
    """Of the whole state, as a checkpoint describes it; a key's kind is known of a key only."""
    found = {}
    for path, leaf in _abstract(checkpoint).items():
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        found |= to_arrays({path: jax.random.key(0)})[1] if is_key else {
            path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}}
    return found


def _write_state(checkpoint: Checkpoint, folder: pathlib.Path, progress: bool) -> None:
    abstract, writer = _abstract(checkpoint), SliceWriter(folder)
    leading = {place.path: len(place.index) for part in checkpoint.parts for place in part.places}
    small = {path: leaf for path, leaf in abstract.items()
             if not path.startswith(("params/", "ema/")) and path != BIAS and leaf.size <= _SMALL}
    for path, leaf in abstract.items():
        if path not in small and leaf.size:
            writer.create(path, leaf.shape, leaf.dtype, leading.get(path.replace("ema/", "params/", 1), 0))
    for path, array in to_arrays(_computed(checkpoint, list(small)))[0].items():
        writer.create(path, array.shape, array.dtype)
        writer.write(path, (), np.asarray(array))
    copies = ("params/", "ema/") if any(path.startswith("ema/") for path in abstract) else ("params/",)
    for place, values in checkpoint.slices(progress):
        for copy in copies if place.path.startswith("params/") else ("",):
            writer.write(place.path.replace("params/", copy, 1), place.index, values)
        del values  # before the next tensor is read
    writer.finish()


def _computed(checkpoint: Checkpoint, paths: list[str]) -> dict[str, Any]:
    """These leaves of the initial state; only they are computed."""
    def leaves():
        state = flatten(initial_state(checkpoint.config, checkpoint.vocab_size))
        return {path: state[path] for path in paths}

    return jax.jit(leaves)()


def export_run(workdir: pathlib.Path, target: pathlib.Path, family: str = "", dtype: str = "", shard_bytes: int = 5 * 10**9,
               progress: bool = False) -> tuple[Family, int]:
    """The newest good checkpoint of a run as a Hugging Face directory, written whole or not at all.

    Arrays are read file by file of the run's checkpoint; where a file of it holds several layers, those together.

    Args:
      family: a name or model type in :data:`moe_jax.interop.huggingface.FAMILIES`; '': the one the run was imported from, or the
        first that can hold such a model.
      dtype: 'float32', 'bfloat16' or 'float16'; '': that of the checkpoint the run was imported from, or float32.
      shard_bytes: no file is larger, but for one of a single tensor.

    Returns:
      The family, and the step of the run.

    Raises:
      InteropError: the model fits no family. RunError, CheckpointError: see :func:`moe_jax.training.new_run.restore_on_host`.
    """
    require_absent(target, "an exported")
    require_checkpoint(workdir)
    config = resolve(read_config(workdir))
    checkpointer = Checkpointer(workdir / "checkpoints", read_only=True)
    step = checkpointer.latest_verified_step()
    if step is None:
        checkpointer.restore({})  # says what is damaged
    vocab_size = checkpointer.read_metadata(step)["vocab_size"]
    shapes, origin = parameter_shapes(config, vocab_size), _origin(workdir)
    chosen = _family(config, vocab_size, family, origin)
    found, needed = tensors_of(chosen, config, shapes)
    name = dtype or _dtype_name(origin) or "float32"
    if name not in _DTYPES:
        raise InteropError(f"--dtype={name}: allowed are {', '.join(_DTYPES)}.")
    folder = epath.Path(checkpointer.directory) / f"step_{step:010d}" / STATE
    with new_run_directory(target) as partial:
        layout = {key: (tensor.shape, _DTYPES[tensor.dtype or name]) for key, tensor in needed.items()}
        _write_tensors(SliceReader(folder), Writer(partial, layout, shard_bytes), found,
                       "ema" if config.training.ema_decay else "params", progress)
        if (workdir / ORIGIN).is_dir():
            _copy_companions(workdir / ORIGIN, partial)
        write_json(partial / "config.json", settings_of(chosen, config, vocab_size, name, origin))
    return chosen, step


def settings_of(family: Family, config: Config, vocab_size: int, dtype: str, origin: dict[str, Any]) -> dict[str, Any]:
    """``config.json`` in the style of the hub: what follows from our config, and of the checkpoint that the run came from what
    says nothing about it (ids of special tokens, lengths)."""
    ours = family.from_config(config, vocab_size)
    kept = family.model_settings(origin) if origin else {}
    dropped = {"rope_parameters", "dtype", "quantization_config", "transformers_version", "text_config", "vision_config"}
    special = {name: kept[name] for name in (*_SPECIAL, "decoder_start_token_id") if name in kept}
    return {**({} if kept else _SPECIAL), **{name: value for name, value in kept.items() if name not in dropped}, **ours, **special,
            "architectures": [family.architectures[0]], "model_type": family.model_types[0], "torch_dtype": dtype}


def _origin(workdir: pathlib.Path) -> dict[str, Any]:
    return read_settings(workdir / ORIGIN) if (workdir / ORIGIN / "config.json").is_file() else {}


def _dtype_name(origin: dict[str, Any]) -> str:
    if not origin:
        return ""
    settings = family_of(origin).model_settings(origin)
    name = str(settings.get("torch_dtype") or settings.get("dtype") or "bfloat16").removeprefix("torch.")
    return name if name in _DTYPES else "bfloat16"


def _family(config: Config, vocab_size: int, name: str, origin: dict[str, Any]) -> Family:
    """The family asked for, or the run's own, or the first that gives the model's config back when it is read again."""
    known = {word: family for family in FAMILIES for word in (family.name, *family.model_types)}
    if name and name not in known:
        raise InteropError(f"--family={name}: known are {', '.join(known)}.")
    candidates = [known[name]] if name else [family_of(origin)] if origin else list(FAMILIES)
    problems = []
    for family in candidates:
        problem = _misfit(family, config, vocab_size)
        if not problem:
            return family
        problems.append(f"{family.name}: {problem}")
    raise InteropError("This model is none of the supported families: " + "; ".join(problems) + ".")


# What a checkpoint does not say, or says of training only.
_FREE = {"model": ("dtype", "remat", "scan_layers", "init_scale", "embedding_init", "attention", "vocab_size"),
         "moe": ("every", "first", "first_dense_layers", "layers", "dispatch", "eval_dispatch", "capacity_factor",
                 "eval_capacity_factor", "balance_weight", "router_z_weight", "router_init", "grouped_matmul", "balance_loss",
                 "balance_scope", "expert_parallelism", "row_exchange", "row_exchange_factor", "exchange_chunks", "group_size",
                 "group_over", "capacity_counts", "capacity_rounding", "capacity_multiple", "min_capacity", "bias_update_rate",
                 "bias_update", "bias_centered", "router_jitter", "router_noise", "importance_weight", "load_weight",
                 "device_weight", "communication_weight", "device_capacity_factor", "undropped_sequences"),
         "attention": ()}


def _misfit(family: Family, config: Config, vocab_size: int) -> str:
    """Why checkpoints of a family cannot hold a model of this config; '' if they can."""
    try:
        settings = settings_of(family, config, vocab_size, "float32", {})
        # Of tables of their own a checkpoint's tensors tell, not its settings.
        of_tables, _ = family.tables([rule.key for rule in family.rules(config)], settings)
        back = to_config(settings, "its config.json", quiet=True, **of_tables)[1]
    except (InteropError, ValueError, StopIteration, KeyError, IndexError, ZeroDivisionError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    all_moe = len(config.moe_layers) == config.model.num_layers + config.model.encoder_layers
    unused = {"model": ("d_ff", "activation") if all_moe and config.moe.residual_ffn == "none" else ()}
    differing = [f"{section}.{field}={value!r} (it has {getattr(getattr(back, section), field)!r})"
                 for section, free in _FREE.items() for field, value in config.to_dict()[section].items()
                 if field not in (*free, *unused.get(section, ())) and getattr(getattr(back, section), field) != value]
    if back.moe_layers != config.moe_layers:
        differing.append(f"MoE layers {list(config.moe_layers)} (it has {list(back.moe_layers)})")
    return ", ".join(differing)


def _write_tensors(reader: SliceReader, writer: Writer, found: list[Part], tree: str, progress: bool) -> None:
    """Every tensor, those made of the same arrays together, so that no array is read twice."""
    groups: dict[str, list[Part]] = {}
    for part in found:
        groups.setdefault("|".join(sorted(place.path for place in part.places)), []).append(part)
    ordered = with_progress(list(itertools.chain.from_iterable(groups.values())), progress, "tensors")
    last = None
    for part in ordered:
        paths = {place.path for place in part.places}
        if paths != last:
            reader.forget()
            last = paths
        arrays = [reader.read(place.path.replace("params/", f"{tree}/", 1), place.index) for place in part.places]
        writer.write(part.key, part.join(arrays), part.expert)


def _copy_companions(source: pathlib.Path, target: pathlib.Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and _COMPANIONS.fullmatch(path.name):
            shutil.copyfile(path, target / path.name)


def parse_size(text: str) -> int:
    """'5GB', '200MB', '1000000' as a number of bytes.

    Raises:
      InteropError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = float(match.group(1)) * 1000.0 ** " KMGT".index(match.group(2).upper() or " ") if match else 0
    if size < 1:
        raise InteropError(f"--shard-size={text}: wanted is a number of bytes, such as 5GB or 200MB.")
    return math.ceil(size)
