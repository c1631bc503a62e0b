"""A decoder-only language model: pre-norm blocks, some of whose feed-forward networks are mixtures of experts."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import Config
from moe_jax.models.stack import Block, Inputs, LayerKind, Runner, Stack, concatenated, stack_pattern
from moe_jax.nn.cache import limited_mask
from moe_jax.nn.embedding import Embedding
from moe_jax.nn.moe import MoEStatistics, RoutingMode
from moe_jax.nn.multi_token import FurtherToken, ahead, sees_ahead
from moe_jax.nn.positions import sinusoidal
from moe_jax.sharding import ACTIVATIONS, spec


def text_positions(input_ids_BS: jax.Array, valid_BS: jax.Array) -> jax.Array:
    """Positions that flaxformer's T5 decoder, hence OpenMoE, does not blank, bool ``[B, S]``: the id or the next one is
    not 0, or it is the first. (A valid token is never blanked here; there, one that is a document alone would be.)"""
    token_BS = input_ids_BS > 0
    next_BS = jnp.pad(token_BS[:, 1:], ((0, 0), (0, 1)))
    return valid_BS | token_BS | next_BS | (jnp.arange(input_ids_BS.shape[1]) == 0)[None, :]


def left_neighbours(input_ids_BS: jax.Array, positions_BS: jax.Array) -> jax.Array:
    """The id before each token in its document, 0 for the first."""
    return jnp.where(positions_BS == 0, 0, jnp.pad(input_ids_BS[:, :-1], ((0, 0), (1, 0))))


def attention_mask(segment_ids_BS: jax.Array, key_segment_ids_BT: jax.Array, valid_BS: jax.Array, index: jax.Array | int = 0,
                   in_prefix_BS: jax.Array | None = None) -> jax.Array:
    """Where query s may see key t, bool ``[B, S, T]``: in its own segment, no later than itself or both in its prefix.

    Args:
      index: the place of the first query among the keys; 0 with a prefix.
      in_prefix_BS: the tokens of each segment that are given, which see each other; None: there are none.
    """
    query_S = jnp.arange(segment_ids_BS.shape[1]) + index
    causal_ST = query_S[:, None] >= jnp.arange(key_segment_ids_BT.shape[1])[None, :]
    same_BST = segment_ids_BS[:, :, None] == key_segment_ids_BT[:, None, :]
    seen_BST = causal_ST[None]
    if in_prefix_BS is not None:
        in_prefix_BT = jnp.pad(in_prefix_BS, ((0, 0), (0, key_segment_ids_BT.shape[1] - in_prefix_BS.shape[1])))
        seen_BST = seen_BST | in_prefix_BS[:, :, None] & in_prefix_BT[:, None, :]
    return same_BST & seen_BST & valid_BS[:, :, None]


def limited_masks(config: Config, *arguments: Any) -> dict[str, jax.Array]:
    """:func:`moe_jax.nn.cache.limited_mask` of each span that layers are limited to."""
    spans = sorted({layer.span for layer in config.attention_layers} - {"full"})
    return {span: limited_mask(config.attention, span, *arguments) for span in spans}


def decoder_kinds(config: Config) -> tuple[LayerKind, ...]:
    """The kinds of the decoder's layers."""
    return tuple(LayerKind(i in config.decoder_moe_layers, attention, config.model.encoder_layers > 0)
                 for i, attention in enumerate(config.attention_layers))


def encoder_kinds(config: Config) -> tuple[LayerKind, ...]:
    """The kinds of an encoder's layers; none without one."""
    return tuple(LayerKind(i in config.encoder_moe_layers) for i in range(config.model.encoder_layers))


def layer_paths(config: Config) -> dict[str, tuple[int, ...]]:
    """Where the parameters of layers lie: ``'body/layers/1'`` -> which layers, 0 … ``num_layers`` − 1, and from there on those of
    multi-token prediction. Arrays below ``body`` are stacked over these; elsewhere there is one of them, and no leading
    dimension. An encoder's layers come first, and are counted first."""
    if config.model.architecture == "lstm":
        return {f"layers/{i}": (i,) for i in range(config.model.num_layers)}
    encoder, model = encoder_kinds(config), config.model
    return {**{f"encoder/{where}": layers for where, layers in stack_paths(config, encoder).items()},
            **{where: tuple(len(encoder) + i for i in layers)
               for where, layers in stack_paths(config, decoder_kinds(config)).items()},
            **{f"mtp/{i}/block/layers/0": (model.num_layers + i,) for i in range(model.mtp_depth)}}


def is_stacked(where: str) -> bool:
    """Whether the arrays there (:func:`layer_paths`) are of several layers, which lead."""
    return "body/" in where


def stack_paths(config: Config, kinds: tuple[LayerKind, ...]) -> dict[str, tuple[int, ...]]:
    """:func:`layer_paths` of one stack, without what stands before it."""
    if not kinds:
        return {}
    prefix, period, repeats = stack_pattern(config, kinds)
    end = prefix + period * repeats
    return {**{f"first/{i}/layers/0": (i,) for i in range(prefix)},
            **{f"body/layers/{i}": tuple(prefix + i + period * r for r in range(repeats)) for i in range(period)},
            **{f"last/{i - end}/layers/0": (i,) for i in range(end, len(kinds))}}


def moe_layer_paths(config: Config) -> dict[str, tuple[int, ...]]:
    """The same of MoE layers: ``'body/layers/1/moe'`` -> which of them, 0 … L − 1."""
    number = {layer: n for n, layer in enumerate(config.moe_layers)}
    return {f"{where}/moe": tuple(number[layer] for layer in layers) for where, layers in layer_paths(config).items()
            if layers[0] in number}


@functools.partial(jax.tree_util.register_dataclass, meta_fields=(),
                   data_fields=("logits_BSV", "statistics", "cache", "further_logits", "layers_LBSD", "encoder_layers_LBTD"))
@dataclasses.dataclass(frozen=True)
class Output:
    """Logits in fp32; ``statistics``: MoEStatistics whose leaves lead with L, the MoE layers in order (None if dense); of an
    encoder–decoder, whose groups are not alike, a pair (:func:`of_stacks`).

    ``further_logits``: ``[B, S, V]`` of each depth of multi-token prediction, if asked for; its layers are then the last in
    ``statistics``. ``layers_LBSD``: for ``mode.trace``, the stream behind each layer, before the last norm;
    ``encoder_layers_LBTD`` the same of an encoder.
    """

    logits_BSV: jax.Array
    statistics: MoEStatistics | tuple[MoEStatistics | None, ...] | None
    cache: Any = None
    further_logits: tuple[jax.Array, ...] = ()
    layers_LBSD: jax.Array | None = None
    encoder_layers_LBTD: jax.Array | None = None


def of_stacks(statistics: Any) -> list[MoEStatistics]:
    """``Output.statistics`` as those of each stack that has MoE layers, the encoder's first."""
    parts = statistics if isinstance(statistics, tuple) else (statistics,)
    return [part for part in parts if part is not None]


class Decoder(Stack):
    """The language model. ``vocab_size`` is the size of the table, usually the vocabulary rounded up."""

    def __init__(self, config: Config, vocab_size: int, rngs: nnx.Rngs):
        self.vocab_size, kinds = vocab_size, decoder_kinds(config)
        self.embedding = Embedding(config.model, vocab_size, rngs)
        super().__init__(config, kinds, rngs)
        # Copies of experts are for evaluation, which has no use for further tokens.
        depth = 0 if config.moe.expert_copies else config.model.mtp_depth
        self.mtp = nnx.List([FurtherToken(config.model, Block(config, kinds[-1:], rngs), rngs) for _ in range(depth)])

    def __call__(self, input_ids_BS: jax.Array, positions_BS: jax.Array, segment_ids_BS: jax.Array,
                 valid_BS: jax.Array, mode: RoutingMode, bias_LE: jax.Array | None = None,
                 key: jax.Array | None = None, cache: Any = None, key_segment_ids_BT: jax.Array | None = None,
                 index: jax.Array | int = 0, previous_ids_BS: jax.Array | None = None,
                 replay_LBSK: jax.Array | None = None, in_prefix_BS: jax.Array | None = None,
                 next_ids_BS: jax.Array | None = None) -> Output:
        """Logits for the next token at every position.

        Args:
          segment_ids_BS: tokens see earlier tokens of their own segment only.
          valid_BS: False for padding.
          bias_LE: selection bias of the MoE layers, zeros if None.
          key: for router noise.
          cache: from :meth:`empty_cache` or an earlier call; with it come ``index``, the slot of the first token of
            this call, and ``key_segment_ids_BT``, the segment of every slot (0 = empty).
          previous_ids_BS: the id before each token in its document, 0 for the first, for routers that look at it. None:
            the left neighbour in ``input_ids_BS``, right unless a cache holds earlier tokens.
          replay_LBSK: recorded choices (:func:`moe_jax.routing.replay.recorded_experts`) for ``mode.router='replay'``.
          in_prefix_BS: True where text is given, not to be predicted: there tokens see all of their segment's prefix, also
            what comes later. With a cache only in the call that fills it from slot 0. None: causal attention.
          next_ids_BS: the targets, for multi-token prediction; without a cache. None: there is none.
        """
        inputs = self.inputs_of(input_ids_BS, positions_BS, segment_ids_BS, valid_BS, mode, key, cache is not None,
                                key_segment_ids_BT, index, previous_ids_BS, in_prefix_BS)
        output, x_BSD = self.decode(inputs, mode, bias_LE, key, cache, replay_LBSK)
        if next_ids_BS is None:
            return output
        further, more = self._further(x_BSD, next_ids_BS, inputs, mode, bias_LE[len(self.config.moe_layers):], key, in_prefix_BS)
        return dataclasses.replace(output, statistics=concatenated([output.statistics, *more]), further_logits=further)

    def inputs_of(self, input_ids_BS, positions_BS, segment_ids_BS, valid_BS, mode, key, cached, key_segment_ids_BT, index,
                  previous_ids_BS, in_prefix_BS=None) -> Inputs:
        """What the layers see; arguments as in a call."""
        config = self.config
        if key_segment_ids_BT is None:
            key_segment_ids_BT = segment_ids_BS
        if previous_ids_BS is None:
            previous_ids_BS = left_neighbours(input_ids_BS, positions_BS)
        # Where padding is routed or counted, what attention makes of it matters, and there the mask says more.
        alone = (not cached or isinstance(index, int) and index == 0) and config.moe.padding == "nowhere"
        alone = alone and in_prefix_BS is None
        mask_BST = attention_mask(segment_ids_BS, key_segment_ids_BT, valid_BS, index, in_prefix_BS)
        return Inputs(input_ids_BS, positions_BS, mask_BST, valid_BS, previous_ids_BS, index,
                      text_positions(input_ids_BS, valid_BS) if config.moe.padding == "routed" else None,
                      segment_ids_BS, undropped(config, valid_BS, mode, key),
                      jnp.where(valid_BS, segment_ids_BS, 0) if alone else None,
                      masks=limited_masks(config, positions_BS, segment_ids_BS, key_segment_ids_BT, valid_BS, index, cached))

    def decode(self, inputs: Inputs, mode: RoutingMode, bias_LE: jax.Array | None, key: jax.Array | None, cache: Any,
               replay_LBSK: jax.Array | None = None) -> tuple[Output, jax.Array]:
        """The output of a call, and the stream before the last norm."""
        config = self.config
        if bias_LE is None:
            bias_LE = jnp.zeros((len(config.trained_moe_layers), max(config.moe.num_routed_experts, 1)), jnp.float32)
        keys = None
        if mode.noise and key is not None:
            keys = jax.random.split(key, config.model.num_layers)
        x_BSD = embedded(self.embedding, inputs, config)
        x_BSD, cache, statistics, layers_LBSD = self.run_layers(x_BSD, inputs, mode, cache, bias_LE, keys, replay_LBSK)
        logits_BSV = self.embedding.decode(inputs.present(self.final_norm(x_BSD)))
        return Output(logits_BSV, statistics, cache, layers_LBSD=layers_LBSD), x_BSD

    def _further(self, x_BSD, next_ids_BS, inputs, mode, bias_LE, key, in_prefix_BS):
        """Logits ``[B, S, V]`` of each depth of multi-token prediction, and its statistics."""
        logits, statistics, config = [], [], self.config
        inputs = self.with_relative_bias(inputs)
        ids_BS, segment_ids_BS, present_valid_BS = inputs.token_ids_BS, inputs.segment_ids_BS, inputs.valid_BS
        for depth, module in enumerate(self.mtp, start=1):
            previous_ids_BS, ids_BS = ids_BS, ahead(next_ids_BS, depth - 1)
            # Where there is no token to predict there is none to route, and nobody later in the document to see it.
            valid_BS = sees_ahead(segment_ids_BS, present_valid_BS, depth)
            # In the prefix are those whose newest token, so many places further, is: others know of targets.
            given_BS = None if in_prefix_BS is None else in_prefix_BS & ahead(in_prefix_BS, depth) & valid_BS
            inputs = dataclasses.replace(
                inputs, token_ids_BS=ids_BS, previous_ids_BS=previous_ids_BS, valid_BS=valid_BS,
                mask_BST=attention_mask(segment_ids_BS, segment_ids_BS, valid_BS, 0, given_BS),
                undropped_BS=None if inputs.undropped_BS is None else inputs.undropped_BS & valid_BS,
                attended_BS=None if inputs.attended_BS is None else jnp.where(valid_BS, segment_ids_BS, 0),
                masks=limited_masks(config, inputs.positions_BS, segment_ids_BS, segment_ids_BS, valid_BS))
            keys = None
            if mode.noise and key is not None:  # other keys than those of the layers and of undropped
                keys = jax.random.fold_in(key, config.model.num_layers + depth)[None]
            x_BSD = module.join(x_BSD, self.embedding.encode(ids_BS, x_BSD.dtype))
            run = Runner(config, inputs, mode, bias_LE[depth - 1 : depth], keys, None)
            x_BSD, _, stats, _ = run.block(module.block, x_BSD, [None])
            logits.append(self.embedding.decode(inputs.present(module.final_norm(x_BSD))))
            statistics.append(stats)
        return tuple(logits), statistics


def embedded(embedding: Embedding, inputs: Inputs, config: Config) -> jax.Array:
    """What enters the first layer, [B, S, D]: embeddings and, with ``attention.positions='sinusoidal'``, sines; not in padding."""
    x_BSD = embedding.encode(inputs.token_ids_BS, jnp.dtype(config.model.dtype))
    if config.attention.positions != "sinusoidal":
        return x_BSD
    added_BSD = sinusoidal(inputs.positions_BS, config.model.d_model, config.attention.first_position)
    return x_BSD + jnp.where(inputs.valid_BS[:, :, None], added_BSD, 0).astype(x_BSD.dtype)


def undropped(config: Config, valid_BS: jax.Array, mode: RoutingMode, key: jax.Array | None) -> jax.Array | None:
    """The tokens of a random ``moe.undropped_sequences`` of the rows, the same in all layers; None where devices drop
    nothing."""
    if not (config.moe.device_capacity_factor and mode.noise) or key is None:
        return None
    # The layers' keys, split from it, are those that 0 … num_layers - 1 would give.
    number = max(config.model.num_layers, config.model.encoder_layers)
    chance_B = jax.random.uniform(jax.random.fold_in(key, number), valid_BS.shape[:1])
    return valid_BS & jax.reshard(chance_B < config.moe.undropped_sequences, spec("B", ACTIVATIONS))[:, None]
