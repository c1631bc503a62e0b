"""A checkpoint beside what another implementation computed with it: logits, layer by layer, routing, losses, gradients.

The stored outputs lie beside the checkpoint: ``oracle.safetensors`` with ``input_ids``, ``logits``, ``layer_out.<layer>``,
``router_logits.<layer>``, ``combine.<layer>``, ``moe_out.<layer>`` and ``grad.<tensor>``; ``oracle.json`` with losses and the
norms of all gradients. Whatever of it is there is compared.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import Config
from moe_jax.interop.pair_outputs import batch_of_pairs, pooled_balance_loss
from moe_jax.interop.reading import Checkpoint, joined, load, open_checkpoint
from moe_jax.interop.safetensors_files import read_header
from moe_jax.interop.settings import InteropError
from moe_jax.models.decoder import of_stacks
from moe_jax.interop.table import BIAS
from moe_jax.nn.moe import RoutingMode
from moe_jax.sharding import AXES, lowering_platform, make_mesh
from moe_jax.training.evaluate import put_batch
from moe_jax.training.losses import cross_entropy
from moe_jax.training.named_arrays import flatten
from moe_jax.training.state import abstract_state
from moe_jax.training.step import forward

ARRAYS, NUMBERS = "oracle.safetensors", "oracle.json"
TOLERANCE = 1e-4

# 'model.layers.3.mlp.gate' or 'encoder.block.3.layer.1.mlp.router': which stack's, and which layer.
_LAYER = re.compile(r"(?:^|\.)(?:(encoder|decoder)\.)?(?:layers|block)\.(\d+)(?:\.|$)")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One stored array, or number, beside ours.

    Attributes:
      kind: what was compared: 'logits', 'layer_out', 'experts' …; name: of the stored array.
      difference: the largest; of kind 'experts' the number of choices that differ.
      scale: standard deviation of what was stored, or 1 if it is smaller; of a norm the norm.
    """

    kind: str
    name: str
    difference: float
    scale: float = 1.0

    def passes(self, tolerance: float) -> bool:
        """Chosen experts must be the same; everything else within ``tolerance``, times the scale of what is stored (the stream
        of some models is a hundred times as large as their logits). No number never passes."""
        return self.difference == 0 if self.kind == "experts" else self.difference <= tolerance * self.scale


@dataclasses.dataclass(frozen=True)
class Traced:
    """What our model computed; keys are (stack, layer)."""

    logits_BSV: jax.Array
    layers: dict[tuple[str, int], jax.Array]
    router_logits: dict[tuple[str, int], jax.Array]
    combine: dict[tuple[str, int], jax.Array]
    moe_out: dict[tuple[str, int], jax.Array]


def verify(folder: pathlib.Path, config_file: str = "config.json") -> list[Comparison]:
    """Every comparison that the stored outputs allow, in fp32 on one device.

    Raises:
      InteropError: no checkpoint, or no stored outputs. ConfigError.
    """
    if not (folder / ARRAYS).is_file():
        raise InteropError(f"{folder} holds no {ARRAYS}, the outputs to compare with (docs/checkpoints.md says what is in it).")
    checkpoint = open_checkpoint(folder, config_file, **{"model.dtype": "float32"})
    stored = {name: entry.read() for name, entry in read_header(folder / ARRAYS).items()}
    numbers = json.loads((folder / NUMBERS).read_text()) if (folder / NUMBERS).is_file() else {}
    with jax.default_matmul_precision("highest"), jax.set_mesh(make_mesh(dict.fromkeys(AXES, 1))):
        traced, losses, gradients = computed(checkpoint, stored)
    found = [*_arrays(checkpoint, traced, stored)]
    found += [Comparison("loss", name, _difference(losses[name], numbers[name])) for name in losses if name in numbers]
    return found + _gradients(checkpoint, gradients, stored, numbers)


def batch_of(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The stored ids, each row one text, or, of an encoder–decoder, two."""
    if "decoder_input_ids" in stored:
        return batch_of_pairs(stored)
    ids_BS = stored["input_ids"].astype(np.int32)
    positions_BS = np.broadcast_to(np.arange(ids_BS.shape[1], dtype=np.int32), ids_BS.shape)
    return {"input_ids": ids_BS, "positions": positions_BS, "segment_ids": np.ones_like(ids_BS),
            "valid": np.ones(ids_BS.shape, bool)}


def computed(checkpoint: Checkpoint, stored: dict[str, np.ndarray]) -> tuple[Traced, dict[str, float], dict[str, np.ndarray]]:
    """The trace, the losses by the names of ``oracle.json``, and the gradients of ``loss_total`` by our paths."""
    config, mesh = checkpoint.config, jax.sharding.get_mesh()
    params, bias_LE = load(checkpoint)
    state = abstract_state(config, checkpoint.vocab_size, mesh)
    params = jax.tree.map(lambda array, leaf: jax.device_put(array, leaf.sharding), params, state["params"])
    batch = put_batch(batch_of(stored), mesh)
    mode = dataclasses.replace(RoutingMode.evaluation(config), trace=True)

    def loss(params, bias_LE, batch):
        output = forward(config, checkpoint.vocab_size, params, batch, mode, bias_LE)
        traced = traced_of(config, output)
        losses = _losses(checkpoint, traced, batch)
        return losses["loss_total"], (traced.__dict__, losses)

    bias_LE = jax.device_put(bias_LE, state["router_bias_LE"].sharding)
    options = {"xla_backend_optimization_level": 0} if lowering_platform() == "cpu" else None  # compiling takes longest
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), compiler_options=options)
    (_, (traced, losses)), gradients = run(params, bias_LE, batch)
    gradients = {path: np.asarray(array) for path, array in flatten(dict(zip(("params", BIAS), gradients))).items()}
    return Traced(**traced), {name: float(value) for name, value in losses.items()}, gradients


def traced_of(config: Config, output: Any) -> Traced:
    """By layer what the model returned with ``RoutingMode.trace``."""
    layers = {("encoder", i): output.encoder_layers_LBTD[i] for i in range(config.model.encoder_layers)}
    layers |= {("decoder", i): output.layers_LBSD[i] for i in range(config.model.num_layers)}
    places = [[("encoder", layer) for layer in config.encoder_moe_layers], [("decoder", layer) for layer in config.decoder_moe_layers]]
    kinds = {}
    for name, leaf in (("router_logits", "logits_BSE"), ("combine", "combine_BSE"), ("moe_out", "output_BSD")):
        kinds[name] = {place: getattr(part.trace, leaf)[i]
                       for part, of_stack in zip(of_stacks(output.statistics), [stack for stack in places if stack])
                       for i, place in enumerate(of_stack)}
    return Traced(output.logits_BSV, layers, **kinds)


def _losses(checkpoint: Checkpoint, traced: Traced, batch: Any) -> dict[str, jax.Array]:
    if checkpoint.family.pair_losses is None:
        return causal_losses(checkpoint, traced, batch)
    router_logits: dict[str, list[jax.Array]] = {}
    for (stack, _), logits_BSE in traced.router_logits.items():
        router_logits.setdefault(stack, []).append(logits_BSE)
    router_logits = {stack: jnp.stack(of_layers) for stack, of_layers in router_logits.items()}
    return checkpoint.family.pair_losses(checkpoint.config, traced.logits_BSV, router_logits, batch["target_ids"])


def causal_losses(checkpoint: Checkpoint, traced: Traced, batch: Any) -> dict[str, jax.Array]:
    """Cross-entropy of the next token; where the family has one, the balancing loss, of all rows and without the last five of
    the first row; and their sum, with the weight that ``transformers`` uses."""
    ids_BS = batch["input_ids"]
    loss_BS, _ = cross_entropy(traced.logits_BSV[:, :-1], ids_BS[:, 1:])
    ce = jnp.mean(loss_BS)
    if not checkpoint.family.balances or not traced.router_logits:
        return {"loss_ce": ce, "loss_total": ce}
    logits_LBSE = jnp.stack(list(traced.router_logits.values()))
    valid_BS = jnp.ones(ids_BS.shape, bool)
    chosen = checkpoint.config.moe.experts_per_token
    aux = pooled_balance_loss(logits_LBSE, valid_BS, chosen)
    masked = pooled_balance_loss(logits_LBSE, valid_BS.at[0, -5:].set(False), chosen)
    return {"loss_ce": ce, "aux_loss": aux, "aux_loss_masked_last5_of_row0": masked,
            "loss_total": ce + checkpoint.config.moe.balance_weight * aux}


def _arrays(checkpoint: Checkpoint, traced: Traced, stored: dict[str, np.ndarray]) -> list[Comparison]:
    ours = {"layer_out": traced.layers, "router_logits": traced.router_logits, "combine": traced.combine,
            "moe_out": traced.moe_out}
    found = [Comparison("logits", "logits", _difference(traced.logits_BSV, stored["logits"]))]
    for name in sorted((name for name in stored if name.split(".")[0] in ours), key=_place_of):
        kind, place = name.split(".")[0], _place_of(name)[:2]
        if place not in ours[kind]:
            raise InteropError(f"{ARRAYS}: {name}: the model has no such layer.")
        mine = np.asarray(ours[kind][place]).reshape(stored[name].shape)
        if kind == "combine":
            found.append(Comparison("experts", name, float(np.sum((mine != 0) != (stored[name] != 0)))))
        found.append(Comparison(kind, name, _difference(mine, stored[name]), max(1.0, float(np.std(stored[name])))))
    return found


def _place_of(name: str) -> tuple[str, int, str]:
    match = _LAYER.search(name)
    if match is None:
        raise InteropError(f"{ARRAYS}: {name} names no layer.")
    return match.group(1) or "decoder", int(match.group(2)), name


def _gradients(checkpoint: Checkpoint, gradients: dict[str, np.ndarray], stored: dict[str, np.ndarray],
               numbers: dict[str, Any]) -> list[Comparison]:
    tensors = joined(checkpoint.parts, gradients)
    found = []
    for name in (name for name in stored if name.startswith("grad.")):
        found.append(Comparison("grad", name, _difference(tensors[name.removeprefix("grad.")], stored[name])))
    for key, norm in numbers.get("grad_l2_of_loss_total", {}).items():
        if key not in tensors:
            raise InteropError(f"{NUMBERS}: there is a gradient of {key}, which is no parameter here.")
        ours = float(np.linalg.norm(tensors[key].astype(np.float64)))
        found.append(Comparison("grad_l2", key, abs(ours - norm), max(norm, 1.0)))
    return found


def _difference(ours: Any, theirs: Any) -> float:
    """The largest absolute difference; infinite where one is no number."""
    difference = np.max(np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)), initial=0.0)
    return float(difference) if np.isfinite(difference) else float("inf")


def report(comparisons: list[Comparison], tolerance: float) -> list[str]:
    """Lines for people: each layer's largest differences, then each kind's, then what does not pass."""
    layers: dict[str, dict[str, float]] = {}
    for found in comparisons:
        if found.kind in ("layer_out", "router_logits", "experts", "combine", "moe_out"):
            stack, layer, _ = _place_of(found.name)
            layers.setdefault(f"{stack} layer {layer}", {})[found.kind] = found.difference
    lines = [f"{where:<18} " + "  ".join(f"{kind} {value:.1e}" if kind != "experts" else f"experts {value:.0f} differ"
                                         for kind, value in kinds.items()) for where, kinds in layers.items()]
    for kind in dict.fromkeys(found.kind for found in comparisons):
        of_kind = [found for found in comparisons if found.kind == kind]
        worst = max(of_kind, key=lambda found: found.difference / found.scale)
        passed = all(found.passes(tolerance) for found in of_kind)
        value = f"{worst.difference:.0f} choices differ" if kind == "experts" else f"at most {worst.difference:.2e}"
        value += f", where values are about {worst.scale:.1f}" if worst.scale > 1 else ""
        lines.append(f"{kind:<18} {value} ({len(of_kind)} compared{'' if len(of_kind) == 1 else f', worst {worst.name}'})"
                     + ("" if passed else "  FAILS"))
    numbers = [found.difference for found in comparisons if found.kind != "experts"]
    failed = sum(not found.passes(tolerance) for found in comparisons)
    lines.append(f"in total: at most {max(numbers):.2e}, tolerance {tolerance:g}: "
                 + ("all pass" if not failed else f"{failed} of {len(comparisons)} FAIL"))
    return lines
