"""What the row of a family says, and the list of tensors that follows from it for a config.

A rule pairs the name of a tensor of the checkpoint with our parameters. It is read in both directions: coming in, the
tensor's numbers go to our arrays; going out, and to say what shape a tensor must have, ours make up the tensor.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from moe_jax.config import Config
from moe_jax.interop.layouts import LINEAR, Layout
from moe_jax.interop.settings import Settings
from moe_jax.models.decoder import is_stacked, layer_paths

# Where the selection bias of a router lies in a TrainState, one row per MoE layer.
BIAS = "router_bias_LE"


@dataclasses.dataclass(frozen=True)
class Rule:
    """One kind of tensor.

    Attributes:
      key: its name; ``{layer}`` and ``{expert}`` count from 0. A name with ``{expert}`` is one tensor for each expert.
      ours: the paths of our parameters below ``params/``, in the order of ``layout``; ``{layer}`` stands for where that
        layer's parameters lie. Or :data:`BIAS`.
      layout: how the numbers lie in one and in the other.
      layers: for which layers there is one; None: the name has no ``{layer}``.
      stack: whose layers: 'decoder', or 'encoder' of an encoder–decoder.
      experts: all experts are one tensor, which leads with them; ``layout`` is then that of one expert.
      dtype: of the tensor going out, if it is not that of the others.
    """

    key: str
    ours: tuple[str, ...]
    layout: Layout = LINEAR
    layers: tuple[int, ...] | None = None
    stack: str = "decoder"
    experts: bool = False
    dtype: str = ""


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture: data for reading and writing its checkpoints.

    Attributes:
      name: for people.
      model_types, architectures: what its ``config.json`` says.
      to_config: settings of the checkpoint -> overrides of our config, ``{'model.num_layers': 2}``.
      from_config: our config and the number of ids -> settings as hub checkpoints have them.
      rules: its tensors under a config.
      ignored: patterns of names that a file may hold and the model does not use.
      prefix: what stands before every name, by the settings.
      model_settings: of all settings those of the model, where the language model is a part of a checkpoint.
      balances: whether ``transformers`` adds a balancing loss.
      pair_losses: of an encoder–decoder (:mod:`moe_jax.interop.pair_outputs`): config, logits, router logits by stack and
        target ids -> losses.
      tables: of the names of a file's tensors and its settings: overrides of our config that follow from what is there, and
        tensors to be taken for others, old name -> new.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    to_config: Callable[[Settings], dict[str, Any]]
    from_config: Callable[[Config, int], dict[str, Any]]
    rules: Callable[[Config], list[Rule]]
    ignored: Callable[[Config], tuple[str, ...]] = lambda config: ()
    prefix: Callable[[dict[str, Any]], str] = lambda settings: ""
    model_settings: Callable[[dict[str, Any]], dict[str, Any]] = lambda settings: settings
    balances: bool = False
    pair_losses: Callable[..., dict[str, Any]] | None = None
    tables: Callable[[Collection[str], dict[str, Any]], tuple[dict[str, Any], dict[str, str]]] = lambda names, settings: ({}, {})


@dataclasses.dataclass(frozen=True)
class Place:
    """A part of one of our arrays: ``array[index]``, of ``shape``."""

    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor of the checkpoint, or, if ``expert`` is a number, its share ``tensor[expert]``; and where it lies in ours."""

    key: str
    expert: int | None
    places: tuple[Place, ...]
    layout: Layout

    def split(self, tensor: np.ndarray) -> list[np.ndarray]:
        return self.layout.split(tensor, [place.shape for place in self.places])

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return self.layout.join(list(arrays))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a file must hold under a name. ``dtype``: to be written in, '' = as all others."""

    shape: tuple[int, ...]
    dtype: str = ""


Shapes = dict[str, tuple[int, ...]]


def _lookup(config: Config) -> dict[str, dict[int, tuple[str, tuple[int, ...]]]]:
    """Of each stack's layers: where the parameters lie and which row of stacked arrays they are."""
    first = config.model.encoder_layers  # layer_paths counts an encoder's layers first
    stacks = {"encoder": {}, "decoder": {}}
    for where, layers in layer_paths(config).items():
        if where.startswith("encoder/"):
            stacks["encoder"][where] = layers
        else:
            stacks["decoder"][where] = tuple(layer - first for layer in layers)
    return {stack: {layer: (where, (row,) if is_stacked(where) else ())
                    for where, layers in paths.items() for row, layer in enumerate(layers)}
            for stack, paths in stacks.items()}


def parts(rules: Sequence[Rule], config: Config, shapes: Shapes) -> list[Part]:
    """Every tensor of the checkpoint of a model with these parameters, in order: layer by layer as the rules stand.

    Args:
      shapes: of our arrays by path: ``params/…`` and :data:`BIAS`.
    """
    lookup, bias_rows = _lookup(config), {layer: row for row, layer in enumerate(config.trained_moe_layers)}
    found = []
    for layer in sorted({layer for rule in rules for layer in rule.layers or ()} | {-1}):
        for rule in rules:
            if (layer in rule.layers) if rule.layers is not None else layer < 0:
                where, row = lookup[rule.stack][layer] if rule.layers is not None else ("", ())
                found += _expanded(rule, layer, where, row, bias_rows, shapes)
    return found


def _expanded(rule, layer, where, row, bias_rows, shapes) -> Iterator[Part]:
    key = rule.key.replace("{layer}", str(layer))
    paths = [BIAS if path == BIAS else "params/" + path.replace("{layer}", where) for path in rule.ours]
    rows = [(bias_rows[layer],) if path == BIAS else row for path in paths]
    by_name = "{expert}" in key
    if not (by_name or rule.experts):
        yield Part(key, None, tuple(_place(path, index, shapes) for path, index in zip(paths, rows)), rule.layout)
        return
    for expert in range(shapes[paths[0]][len(rows[0])]):
        places = tuple(_place(path, (*index, expert), shapes) for path, index in zip(paths, rows))
        yield Part(key.replace("{expert}", str(expert)), None if by_name else expert, places, rule.layout)


def _place(path: str, index: tuple[int, ...], shapes: Shapes) -> Place:
    return Place(path, index, shapes[path][len(index):])


def tensors(rules: Sequence[Rule], found: Sequence[Part]) -> dict[str, Tensor]:
    """Name -> shape of every tensor, by what our arrays make up."""
    dtypes = {re.sub(r"\\{\w+\\}", r"\\d+", re.escape(rule.key)): rule.dtype for rule in rules if rule.dtype}
    needed: dict[str, Tensor] = {}
    for part in found:
        shape = _joined_shape(part.layout, tuple(place.shape for place in part.places))
        if part.expert is not None:
            shape = (part.expert + 1, *shape)  # the last one says how many there are
        dtype = next((dtype for pattern, dtype in dtypes.items() if re.fullmatch(pattern, part.key)), "")
        needed[part.key] = Tensor(shape, dtype)
    return needed


@functools.lru_cache(maxsize=None)
def _joined_shape(layout: Layout, shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    arrays = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    return jax.eval_shape(lambda *arrays: layout.join(list(arrays)), *arrays).shape


def covered(found: Sequence[Part], shapes: Shapes) -> list[str]:
    """Our parameters of which the rules leave out a part, or name one twice; a fault of the table, none for a user."""
    counted: dict[str, int] = {}
    for part in found:
        for place in part.places:
            counted[place.path] = counted.get(place.path, 0) + int(np.prod(place.shape, dtype=np.int64))
    return [path for path, shape in shapes.items() if path != BIAS and counted.get(path, 0) != np.prod(shape, dtype=np.int64)]

