"""A Hugging Face checkpoint as our parameters: opened and checked as a whole, then read tensor by tensor."""

import dataclasses
import math
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from moe_jax.config import Config
from moe_jax.interop.huggingface import family_of, to_config
from moe_jax.interop.quantised import Stored, stored_tensors
from moe_jax.interop.safetensors_files import read_folder
from moe_jax.interop.settings import InteropError, read_settings
from moe_jax.interop.table import BIAS, Family, Part, Place, Shapes, Tensor, covered, parts, tensors
from moe_jax.training.named_arrays import flatten
from moe_jax.training.state import initial_state

# So many tensors are named where there are more.
_SHOWN = 40


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that fits its config, tensor for tensor.

    Attributes:
      settings: as its ``config.json`` has them.
      shapes: of our parameters and :data:`moe_jax.interop.table.BIAS`, by path.
      parts: what it holds, in order. stored: where, by name.
    """

    family: Family
    config: Config
    settings: dict[str, Any]
    shapes: Shapes
    parts: tuple[Part, ...]
    stored: dict[str, Stored]

    @property
    def vocab_size(self) -> int:
        return self.config.model.vocab_size

    def slices(self, progress: bool = False) -> Iterator[tuple[Place, np.ndarray]]:
        """Our arrays piece by piece: where it belongs, and the numbers, a view in the checkpoint's dtype.

        One tensor is in memory at a time, or, where one tensor holds all experts, one expert's share of it.
        """
        for part in with_progress(self.parts, progress, "tensors"):
            # Not by a name here, which would keep it while the next one is read.
            yield from zip(part.places, part.split(self.stored[part.key].read(part.expert)))


def with_progress(items, shown: bool, what: str):
    """The items; with a bar if a person is watching."""
    if not (shown and sys.stderr.isatty()):
        return items
    import tqdm

    return tqdm.tqdm(items, unit=f" {what}", dynamic_ncols=True, file=sys.stderr)


def parameter_shapes(config: Config, vocab_size: int) -> Shapes:
    """Of the parameters and the router's bias, by path in a TrainState; nothing is computed."""
    state = jax.eval_shape(lambda: initial_state(config, vocab_size))
    return {path: tuple(leaf.shape) for path, leaf in flatten(state).items() if path.startswith("params/") or path == BIAS}


def tensors_of(family: Family, config: Config, shapes: Shapes) -> tuple[list[Part], dict[str, Tensor]]:
    """What a checkpoint of this model consists of.

    Raises:
      InteropError: the model has parameters that checkpoints of the family have no place for.
    """
    rules = family.rules(config)
    homeless = sorted({path for rule in rules for path in _missing_paths(rule, config, shapes)})
    if homeless:
        raise InteropError(f"{family.name}: its checkpoints hold parameters that a model with this config has not: "
                           f"{', '.join(homeless)}.")
    found = parts(rules, config, shapes)
    left = covered(found, shapes)
    if left:
        raise InteropError(f"{family.name} has no tensors for these parameters of a model with this config: {', '.join(left)}.")
    return found, tensors(rules, found)


def _missing_paths(rule, config, shapes):
    try:
        parts([rule], config, shapes)
    except KeyError as error:
        yield str(error.args[0])


def open_checkpoint(folder: pathlib.Path, config_file: str = "config.json", **overrides: Any) -> Checkpoint:
    """Reads settings and headers, and compares every tensor's name and shape with the model's.

    Args:
      overrides: settings of ours that win over the checkpoint's, by their full names.

    Raises:
      InteropError, ConfigError: an unknown architecture, a setting without counterpart, a damaged file; or tensors that are
        missing, surplus, or of another shape, all of which are named.
    """
    settings = read_settings(folder, config_file)
    where = str(folder / config_file)
    family, entries = family_of(settings, where), read_folder(folder)
    of_tables, renamed = family.tables(entries, settings)
    family, config = to_config(settings, where, **of_tables, **overrides)
    shapes = parameter_shapes(config, config.model.vocab_size)
    found, needed = tensors_of(family, config, shapes)
    stored = stored_tensors(entries, family.model_settings(settings), where)
    stored = {renamed.get(name, name): tensor for name, tensor in stored.items()}
    stored = _own(stored, family, config, settings, needed)
    _check(stored, needed, folder)
    return Checkpoint(family, config, settings, shapes, tuple(found), stored)


def _own(stored: dict[str, Stored], family: Family, config: Config, settings: dict[str, Any],
         needed: dict[str, Tensor]) -> dict[str, Stored]:
    """The model's tensors by their names without prefix; of the others, those that are known to be no part of it are left
    out."""
    ignored = [*family.ignored(config), r".*rotary_emb\.inv_freq"]
    if config.model.tie_embedding:
        ignored.append(r"lm_head\.weight")
    prefix, own = family.prefix(settings), {}
    for name, tensor in stored.items():
        short = name.removeprefix(prefix)
        if short in needed or not any(re.fullmatch(pattern, short) for pattern in ignored):
            own[short if name.startswith(prefix) else name] = tensor
    return own


def _check(stored: dict[str, Stored], needed: dict[str, Tensor], folder: pathlib.Path) -> None:
    problems = []
    missing = [name for name in needed if name not in stored]
    surplus = [name for name in stored if name not in needed]
    shaped = [f"{name} {list(stored[name].shape)} instead of {list(tensor.shape)}" for name, tensor in needed.items()
              if name in stored and stored[name].shape != tensor.shape]
    for what, names in (("missing", missing), ("surplus", surplus), ("of another shape", shaped)):
        if names:
            problems.append(f"{len(names)} {what}: {', '.join(names)}")
    if problems:
        raise InteropError(f"{folder}: the tensors do not fit its config.json. " + "; ".join(problems) + ".")


def load(checkpoint: Checkpoint) -> tuple[dict[str, Any], np.ndarray]:
    """All parameters, as a TrainState has them, in fp32, and the routers' bias ``[L, E]``; for models that fit into memory."""
    arrays = {path: np.zeros(shape, np.float32) for path, shape in checkpoint.shapes.items()}
    for place, values in checkpoint.slices():
        arrays[place.path][place.index] = values
    bias_LE = arrays.pop(BIAS)
    abstract = jax.eval_shape(lambda: initial_state(checkpoint.config, checkpoint.vocab_size))["params"]
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[f"params/{path}"] for path in flatten(abstract)]), bias_LE


def joined(checkpoint_parts, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The checkpoint's tensors made of our arrays by path (``params/…``); gradients go the same way."""
    found: dict[str, Any] = {}
    for part in checkpoint_parts:
        tensor = part.join([np.asarray(arrays[place.path][place.index]) for place in part.places])
        found.setdefault(part.key, []).append(tensor)
    return {key: found[key][0] if len(found[key]) == 1 and not _is_share(checkpoint_parts, key) else np.stack(found[key])
            for key in found}


def _is_share(checkpoint_parts, key):
    return any(part.key == key and part.expert is not None for part in checkpoint_parts)


def number_of_values(shapes: Shapes) -> int:
    return sum(math.prod(shape) for path, shape in shapes.items() if path != BIAS)
