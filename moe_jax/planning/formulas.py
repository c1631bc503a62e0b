"""What one step of a config needs, by formula: no compiler, no devices, seconds for any model.

Parameters and optimizer state are exact: shapes and shardings of the real state. Floating-point operations and collectives
follow from what the layers do (:mod:`moe_jax.planning.formula_collectives`). Activations are an estimate: which arrays live
at the same time is the compiler's choice; docs/planning.md says how near it comes.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moe_jax.config import Config, MeshConfig
from moe_jax.dispatch.expert_parallel import rows_at_once
from moe_jax.models.decoder import decoder_kinds, encoder_kinds
from moe_jax.models.stack import LayerKind, stack_pattern
from moe_jax.nn.activations import activation
from moe_jax.nn.cache import slots_of
from moe_jax.nn.splash import unfit
from moe_jax.planning.hlo import Collective
from moe_jax.planning.slices import Slice
from moe_jax.routing import ROUTERS
from moe_jax.sharding import TOKEN_AXES
from moe_jax.training.flops import (
    computed_choices, count_parameters, forward_flops_per_token, group_tokens, hardware_flops_per_token, pair_flops_per_token,
    score_weights, seen_keys, training_flops_per_token)
from moe_jax.training.state import initial_state, state_specs


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One step by formula. Bytes are of one device, FLOPs of all devices.

    Attributes:
      step: 'train', 'prefill' or 'decode'.
      parameters_total, parameters_active: of the model; active per token.
      memory_bytes: what lies in a device's memory at the fullest moment, by name.
      kv_cache_bytes: of one device; 0 in training.
      model_flops: of the active parameters, as MFU counts.
      hardware_flops: with slots of buffers that stay empty, hidden scores and recomputation.
      collectives: of one device, as a compiled program would list them; those of a few numbers are left out.
    """

    step: str
    parameters_total: int
    parameters_active: int
    memory_bytes: dict[str, int]
    kv_cache_bytes: int
    model_flops: float
    hardware_flops: float
    collectives: tuple[Collective, ...]

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory_bytes.values())


def estimate(config: Config, slice_: Slice, sizes: dict[str, int], step: str = "train") -> Estimate:
    """One ``step`` ('train', 'prefill', 'decode') on a slice whose mesh axes have ``sizes``.

    As :func:`moe_jax.planning.compiled.compile_step`, which compiles the same: ``data.batch_size`` rows of
    ``data.sequence_length`` tokens, or one token more for each. ``config.model.vocab_size`` must be given.
    """
    from moe_jax.planning.formula_collectives import step_collectives

    stacks = shares(config, sizes, step)
    state = state_leaves(config, sizes)
    count = _abstract(_without_mesh(config))[0]
    cache = _cache_bytes(config, stacks[-1]) if step != "train" else 0
    memory = _training_memory(config, stacks, state) if step == "train" else _inference_memory(config, stacks, state, cache)
    model_flops, hardware_flops = _training_flops(config, stacks) if step == "train" else _inference_flops(config, stacks[-1])
    return Estimate(step, count.total, count.active, memory, cache, model_flops, hardware_flops,
                    step_collectives(config, slice_, stacks, state))


# A device's share


@dataclasses.dataclass(frozen=True)
class Share:
    """What of one step one device computes at once in one stack of layers: one microbatch of training, a prompt, or one token
    of each row.

    Attributes:
      sizes: of the mesh axes.
      step: see :func:`estimate`.
      rows, length: sequences, and tokens of each.
      kinds: of the layers that run once for each of these tokens; multi-token prediction's are not among them.
      dispatch: the dispatcher that runs.
      passes: how often the layers run forward: 2 where the backward pass runs them again.
      splash: the spans of layers whose attention runs by the kernel.
      item: bytes of a number in the compute dtype.
      row: tokens of a row, of which decoding computes the last.
      given: tokens of an encoder's row that these layers look at; 0 without an encoder.
      is_encoder: tokens see later ones too, and there is no output layer.
    """

    sizes: dict[str, int]
    step: str
    rows: int
    length: int
    kinds: tuple[LayerKind, ...]
    dispatch: str
    passes: int
    splash: frozenset[str]
    item: int
    row: int
    given: int = 0
    is_encoder: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def mixtures(self) -> int:
        return sum(kind.is_moe for kind in self.kinds)

    def axes(self, *names: str) -> tuple[str, ...]:
        """Those of the axes that have more than one device."""
        return tuple(name for name in names if self.sizes[name] > 1)

    def devices(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def slots(self, config: Config) -> int:
        """Rows that this device's experts compute in one MoE layer: filled or not."""
        moe, sizes = config.moe, self.sizes
        if self.dispatch == "reference":
            return self.tokens * moe.num_experts
        if self.dispatch == "dropless":
            chosen, peers = math.ceil(self.tokens * computed_choices(config)), sizes["expert"]
            if peers == 1 or moe.expert_parallelism == "none":
                return chosen
            return peers * exchanged_rows(config, chosen, self.tokens, peers)
        tokens = group_tokens(config, self.length)
        capacity = ROUTERS[moe.router].capacity(tokens, moe, moe.capacity_factor)
        # [G_(data,fsdp,expert), E, C] and [G_(data,fsdp), E_expert, C] hold as many.
        return self.tokens // tokens * moe.num_experts * capacity


def shares(config: Config, sizes: dict[str, int], step: str) -> tuple[Share, ...]:
    """The stacks that run in a step, an encoder first. (In decoding what an encoder has read waits in the cache.)"""
    data, training = config.data, step == "train"
    batch = data.batch_size // (config.training.microbatches if training else 1)
    rows = -(-batch // math.prod(sizes[axis] for axis in TOKEN_AXES))
    encodes = config.model.encoder_layers > 0
    row = data.target_length if encodes else data.sequence_length
    # Behind an encoder that reads the prompt a decoder begins with one token.
    length = 1 if step == "decode" or (encodes and not training) else row
    # The formulas are of a program for TPUs, whatever this machine is.
    allowed = config.model.attention != "plain" and data.prefix_attention == "causal" and length > 1
    splash = frozenset(layer.span for layer in config.attention_layers if allowed and not unfit(
        length, config.model.head_dim, "tpu", config.attention, layer.span))
    decoder = Share(sizes, step, rows, length, decoder_kinds(config), config.moe.dispatch if training else "dropless",
                    2 if training and config.model.remat != "none" else 1, splash, jnp.dtype(config.model.dtype).itemsize, row,
                    data.sequence_length if encodes else 0)
    if not encodes or step == "decode":
        return (decoder,)
    return dataclasses.replace(decoder, length=data.sequence_length, row=data.sequence_length, kinds=encoder_kinds(config),
                               splash=frozenset(), given=0, is_encoder=True), decoder


def exchanged_rows(config: Config, assignments: int, tokens: int, peers: int) -> int:
    """Rows that a pair of ``peers`` devices exchanges at once, of a device's tokens and their assignments."""
    return rows_at_once(assignments, tokens, config.moe.num_experts, peers, config.moe.row_exchange_factor)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the state: its path, shape and dtype, and how it lies on the mesh."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    itemsize: int
    spec: P
    sizes: dict[str, int]

    def parts(self, *without: str) -> int:
        """Devices that share it, those along the axes ``without`` left out."""
        axes = [axis for entry in self.spec for axis in ((entry,) if isinstance(entry, str) else entry or ())]
        return math.prod(self.sizes[axis] for axis in axes if axis not in without)

    @property
    def numbers(self) -> int:
        """On one device."""
        return math.prod(self.shape) // self.parts()

    @property
    def bytes(self) -> int:
        return self.numbers * self.itemsize

    @property
    def repeats(self) -> int:
        """Layers that are stacked in it."""
        return self.shape[0] if self.path[:2] == ("params", "body") or self.path[:3] == ("params", "encoder", "body") else 1


def state_leaves(config: Config, sizes: dict[str, int]) -> dict[str, list[Leaf]]:
    """The arrays of the training state by its entries (``params``, ``opt_state`` …), nothing allocated."""
    found: dict[str, list[Leaf]] = {}
    for path, shape, itemsize, spec in _abstract(_without_mesh(config))[1]:
        found.setdefault(path[0], []).append(Leaf(path, shape, itemsize, spec, sizes))
    return found


def _without_mesh(config: Config) -> Config:
    """Configs whose state is alike: a search asks for one on many meshes."""
    return dataclasses.replace(config, mesh=MeshConfig(), training=dataclasses.replace(config.training, microbatches=1))


@functools.lru_cache(maxsize=8)
def _abstract(config):
    """Parameters counted; and path, shape, bytes of a number and sharding of every array of the state."""
    shapes = jax.eval_shape(lambda: initial_state(config, config.model.vocab_size))
    leaves = []

    def add(path, leaf, spec):
        names = tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)
        # A key is two 32-bit numbers.
        size = 8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        leaves.append((names, leaf.shape, size, spec))

    jax.tree_util.tree_map_with_path(add, shapes, state_specs(shapes))
    return count_parameters(config, config.model.vocab_size), leaves


# Memory


def _training_memory(config: Config, stacks: tuple[Share, ...], state: dict[str, list[Leaf]]) -> dict[str, int]:
    """Parameters, optimizer state and the rest of the state; gradients; and the activations of the fullest moment: when
    the loss is formed, or inside the backward pass of one block of layers."""
    share = stacks[-1]
    total = lambda name: sum(leaf.bytes for leaf in state.get(name, ()))
    rest = sum(total(name) for name in state if name not in ("params", "opt_state"))
    # Gradients are of the compute dtype until the optimizer reads them; accumulated ones are fp32.
    gradients = sum(leaf.numbers * min(share.item, leaf.itemsize) for leaf in state["params"])
    accumulated = total("params") if config.training.microbatches > 1 else 0
    kept = sum(_kept_bytes(config, each) for each in stacks)
    if share.given:  # what the encoder made, and its gradient, to which every layer of the decoder adds
        kept += 2 * share.rows * share.given * config.model.d_model * share.item
    block, table = max(_block_bytes(config, each) for each in stacks), _table_bytes(config, share, state)
    loss = table + _logits_bytes(config, share)
    body = gradients + block + _gathered_bytes(share, state)
    # Where the loss is formed there are no gradients of this microbatch yet.
    working = max(loss, body) - gradients if loss > body else body - gradients
    return {"parameters": total("params"), "optimizer state": total("opt_state"), "other state and batch":
            rest + _batch_bytes(config, stacks), "gradients": gradients + accumulated, "activations kept": kept,
            "activations at work": max(working, 0)}


def _inference_memory(config, stacks, state, cache):
    share = stacks[-1]
    params = sum(leaf.bytes for leaf in state["params"])
    last = share.tokens * config.model.vocab_size // share.sizes["tensor"] * 4
    layer = max(_layer_bytes(config, each, kind) for each in stacks for kind in set(each.kinds))
    work = max(layer + _gathered_bytes(share, state), _table_bytes(config, share, state) + last)
    return {"parameters": params, "key/value cache": cache, "other state and batch": sum(each.tokens for each in stacks) * 8,
            "activations at work": work}


def _batch_bytes(config, stacks):
    """What the step reads of a batch, of all microbatches: int32 arrays of ids, targets, segments and positions, and one of bool,
    two or three of bool under other objectives than the causal one; an encoder has no targets."""
    data, tokens = config.data, [share.tokens * config.training.microbatches for share in stacks]
    # Relative positions are those in the row.
    positions = config.attention.positions != "relative" or config.moe.router == "hash"
    if data.target_length:
        return tokens[0] * ((2 + positions) * 4 + 1) + tokens[1] * ((3 + positions) * 4 + 1)
    masks = 1 + (data.objective != "causal") + (data.prefix_attention == "bidirectional")
    return tokens[0] * ((3 + positions) * 4 + masks)


def _cache_bytes(config: Config, share: Share) -> int:
    model, attention = config.model, config.attention
    numbers = 2 * model.num_kv_heads // share.sizes["tensor"] * model.head_dim
    if attention.kind == "latent":
        numbers = attention.latent_rank + attention.rope_dim
    slots = sum(slots_of(attention, kind.attention.span, share.row) + share.given for kind in share.kinds)
    return slots * share.rows * numbers * share.item


def blocks(config: Config, share: Share) -> list[tuple[tuple[LayerKind, ...], int]]:
    """((kind of each layer), how often) of the blocks that are rematerialised as one, in order; those of multi-token
    prediction last."""
    layers = share.kinds
    prefix, period, repeats = stack_pattern(config, layers)
    body = layers[prefix:prefix + period]
    single = (*layers[prefix + period * repeats:], *layers[-1:] * config.model.mtp_depth)
    return [*(((m,), 1) for m in layers[:prefix]), (body, repeats), *(((m,), 1) for m in single)]


def _kept_bytes(config, share):
    """What waits for the backward pass: with rematerialisation the input of every block, and products for 'dots'."""
    stream = share.tokens * config.model.d_model * share.item
    joined = 4 * config.model.mtp_depth * stream  # of each depth two normed inputs, their embedding, the block's input
    if config.attention.positions == "relative":  # what is added to scores, and its gradient
        joined += 2 * config.model.num_heads // share.sizes["tensor"] * share.row**2 * 4
    if config.model.remat == "none":
        return joined + sum(repeats * sum(_layer_bytes(config, share, m) for m in layers) for layers, repeats in blocks(config, share))
    kept = joined + sum(repeats for _, repeats in blocks(config, share)) * stream
    if config.model.remat == "dots":
        kept += sum(repeats * sum(_product_bytes(config, share, m) for m in layers) for layers, repeats in blocks(config, share))
    return kept


def _block_bytes(config, share):
    """The most that the backward pass of one block has at work: its activations – kept already without rematerialisation –
    and the gradients of one layer's, which are as large again."""
    most = 0
    for layers, _ in blocks(config, share):
        recomputed = sum(_layer_bytes(config, share, m) for m in layers) if config.model.remat != "none" else 0
        most = max(most, recomputed + max(_hidden_bytes(config, share, m.is_moe) for m in layers))
    return most


def _layer_bytes(config: Config, share: Share, kind: LayerKind) -> int:
    """Activations of one layer that its backward pass reads."""
    model, tensor, span = config.model, share.sizes["tensor"], kind.attention.span
    stream = share.tokens * model.d_model * share.item
    # Two normed inputs and the stream between them.
    attention = 3 * stream + share.tokens * _attention_numbers(config, tensor) * share.item
    keys = 0
    if span not in share.splash:
        keys = slots_of(config.attention, span, share.row) if share.length < share.row else share.row
    if kind.crosses:  # one more normed input, the stream behind it, queries and outputs; keys and values of what is given
        made = 0 if share.step == "decode" else share.rows * share.given
        of_heads = share.tokens * 2 * model.num_heads + made * 2 * model.num_kv_heads
        attention += 2 * stream + of_heads // tensor * model.head_dim * share.item
        keys += share.given
    scores = share.rows * model.num_heads // tensor * share.length * keys
    attention += scores * (4 + share.item)  # fp32 and, for the product, rounded
    return attention + _hidden_bytes(config, share, kind.is_moe)


def _attention_numbers(config, tensor):
    """Of one token: queries and keys before and after the rotation, values, the output; of latents also these, before and
    after their norms, and the keys' parts."""
    model, attention = config.model, config.attention
    heads, kv_heads, head = model.num_heads // tensor, model.num_kv_heads // tensor, model.head_dim
    if attention.kind == "latent":
        of_heads = heads * (2 * head + 2 * head - attention.rope_dim + 2 * attention.value_dim)
        return of_heads + 2 * (attention.query_rank + attention.latent_rank + attention.rope_dim)
    more = (attention.qk_norm != "none") * (heads + kv_heads) + (attention.clip_qkv > 0) * (heads + 2 * kv_heads)
    return head * (3 * heads + 3 * kv_heads + more)


def _hidden_bytes(config: Config, share: Share, is_moe: bool) -> int:
    """The feed-forward part: every branch and the hidden layer; of experts also their buffers, on the way there and back."""
    model, moe, tensor = config.model, config.moe, share.sizes["tensor"]
    dense = lambda width, name: share.tokens * width // tensor * len(activation(name).branches + ("h",)) * share.item
    if not is_moe:
        return dense(model.d_ff, model.activation)
    width = max(width for width, _ in moe.width_classes)
    rows = share.slots(config)
    total = rows * width // tensor * len(activation(moe.activation).branches + ("h",)) * share.item
    # Filling, the exchange with its own copies, and the transposition leave one buffer each, there and back.
    total += 8 * rows * model.d_model * share.item
    total += share.tokens * math.ceil(computed_choices(config)) * model.d_model * 4  # what each token gets back, fp32
    if moe.residual_ffn != "none":
        total += dense(model.d_ff, model.activation)
    if moe.num_shared_experts:
        total += dense(moe.shared_width, moe.activation)
    return total


def _product_bytes(config, share, kind):
    """Results of products with weights, which remat='dots' keeps."""
    model, moe, tensor = config.model, config.moe, share.sizes["tensor"]
    of_heads, latents = model.head_dim * (model.num_heads + 2 * model.num_kv_heads), 0
    if config.attention.kind == "latent":
        rope = config.attention.rope_dim
        of_heads = model.num_heads * (2 * model.head_dim - rope + config.attention.value_dim)
        latents = config.attention.query_rank + config.attention.latent_rank + rope
    attention = share.tokens * (of_heads // tensor + latents + model.d_model)
    if kind.crosses:
        attention += share.tokens * (model.num_heads * model.head_dim // tensor + model.d_model)
        attention += share.rows * share.given * 2 * model.num_kv_heads * model.head_dim // tensor
    if not kind.is_moe:
        return (attention + share.tokens * (len(activation(model.activation).branches) * model.d_ff // tensor
                                            + model.d_model)) * share.item
    width = max(width for width, _ in moe.width_classes)
    rows = share.slots(config)
    experts = rows * (len(activation(moe.activation).branches) * width // tensor + model.d_model)
    return (attention + experts) * share.item


def _logits_bytes(config, share):
    """Logits, their gradient, and that in the compute dtype; of the next token and of each further one."""
    return (1 + config.model.mtp_depth) * share.tokens * config.model.vocab_size // share.sizes["tensor"] * (4 + 4 + share.item)


def _table_bytes(config, share, state):
    """The tables complete along D; the one that rows are picked from is whole on every device."""
    tables = {leaf.path[-1]: leaf for leaf in state["params"] if leaf.path[1] == "embedding"}
    whole = math.prod(tables["embedding_VD"].shape)
    logits = tables.get("w_logits_DV", tables["embedding_VD"])
    return (whole + math.prod(logits.shape) // logits.parts("fsdp")) * share.item


def _gathered_bytes(share, state):
    """The weights of the layer that has most, complete along D, and their gradients before they are shared out."""
    layers: dict[tuple[str, ...], int] = {}
    for leaf in state["params"]:
        if "fsdp" in leaf.spec and "embedding" not in leaf.path:
            place = leaf.path[: leaf.path.index("layers") + 2] if "layers" in leaf.path else leaf.path
            layers[place] = layers.get(place, 0) + math.prod(leaf.shape) // leaf.parts("fsdp") // leaf.repeats
    return 2 * share.item * max(layers.values(), default=0)


# Floating-point operations


def _inference_flops(config: Config, share: Share) -> tuple[float, float]:
    """(model, hardware) of one step on all devices; ``share`` is the decoder's."""
    data, vocab_size, last = config.data, config.model.vocab_size, share.step == "decode"
    if share.given:
        encoder, decoder = pair_flops_per_token(config, vocab_size, 0 if last else 1, last)
        forward = data.batch_size * (decoder if last else data.sequence_length * encoder + decoder)
        return forward, forward
    tokens = data.batch_size * share.length
    forward = forward_flops_per_token(config, vocab_size, data.sequence_length, last) * tokens
    return forward, forward + (0 if last else tokens * _hidden_scores(config, share))


def _training_flops(config: Config, stacks: tuple[Share, ...]) -> tuple[float, float]:
    """(model, hardware) of one step on all devices."""
    vocab_size, tokens = config.model.vocab_size, config.tokens_per_step
    model = training_flops_per_token(config, vocab_size) * tokens
    hardware = hardware_flops_per_token(config, vocab_size) * tokens
    of_stack = lambda function: sum(config.data.batch_size * each.length * function(config, each) for each in stacks)
    extra = of_stack(_hidden_scores) + of_stack(_one_hot)
    output = (1 + config.model.mtp_depth) * 2 * config.model.d_model * vocab_size
    layers = hardware / 3 - config.data.batch_size * stacks[-1].length * output
    hardware += 3 * extra
    if config.model.remat == "block":
        hardware += layers + extra
    elif config.model.remat == "dots":  # what is not a product with weights: scores and values
        hardware += 2 * score_weights(config) * of_stack(_seen) + extra
    return model, hardware


def _seen(config, share):
    """Keys that a token sees in all layers, the mean over a row."""
    crossed = sum(kind.crosses for kind in share.kinds) * share.given
    return crossed + sum(seen_keys(config, span, share.row, share.is_encoder) for span in _spans(config, share))


def _hidden_scores(config, share):
    """Per token: plain attention also computes the scores that nobody may see."""
    if share.is_encoder:
        return 0
    hidden = sum(share.row - seen_keys(config, span, share.row) for span in _spans(config, share) if span not in share.splash)
    return 2 * score_weights(config) * hidden


def _spans(config, share):
    """What each layer that runs sees."""
    layers = [kind.attention.span for kind in share.kinds]
    return [*layers, *layers[-1:] * (config.model.mtp_depth if share.step == "train" else 0)]


def trained_mixtures(config: Config, share: Share) -> int:
    """The stack's MoE layers that a step runs: in training also those of multi-token prediction."""
    return share.mixtures + (len(config.trained_moe_layers) - len(config.moe_layers) if share.step == "train" else 0)


def _one_hot(config, share):
    """Per token: filling and emptying buffers by products with one-hot matrices."""
    if share.dispatch != "einsum" or not config.moe_layers:
        return 0
    moe, tokens = config.moe, group_tokens(config, share.length)
    slots = moe.num_experts * ROUTERS[moe.router].capacity(tokens, moe, moe.capacity_factor)
    per_layer = 2 * 2 * slots * config.model.d_model + 2 * 2 * tokens * slots * moe.experts_per_token
    return trained_mixtures(config, share) * per_layer
