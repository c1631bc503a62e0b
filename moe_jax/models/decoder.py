"""A decoder-only language model: pre-norm blocks, some of whose feed-forward networks are mixtures of experts."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import Config
from moe_jax.nn.attention import Attention
from moe_jax.nn.embedding import Embedding
from moe_jax.nn.mlp import MLP
from moe_jax.nn.moe import MoELayer, MoEStatistics, RoutingMode
from moe_jax.nn.multi_token import FurtherToken, ahead, sees_ahead
from moe_jax.nn.norms import RMSNorm
from moe_jax.product import PRODUCT
from moe_jax.sharding import ACTIVATIONS, spec


class Layer(nnx.Module):
    """x += attention(norm(x)); x += ffn(norm(x)), where ffn is an MLP or a mixture of experts.

    Beside the mixture every token may pass a dense FFN (``moe.residual_ffn``): in parallel, x += moe(norm(x)) +
    ffn(norm(x)) (OpenMoE's paper, eq. 4), or after it, x += moe(norm(x)); x += ffn(norm'(x)) (OpenMoE's code, ST-MoE).
    """

    def __init__(self, config: Config, is_moe: bool, rngs: nnx.Rngs):
        model = config.model
        self.is_moe = is_moe
        self.attention_norm = RMSNorm(model.d_model, model.norm_epsilon)
        self.attention = Attention(model, rngs)
        self.ffn_norm = RMSNorm(model.d_model, model.norm_epsilon)
        if is_moe:
            self.moe = MoELayer(config, rngs)
        self.residual_ffn = config.moe.residual_ffn if is_moe else "none"
        if self.residual_ffn == "sequential":
            self.residual_norm = RMSNorm(model.d_model, model.norm_epsilon)
        if self.residual_ffn != "none":
            self.residual = MLP(model.d_model, model.d_ff, model.activation, model.init_scale, rngs)
        if not is_moe:
            self.mlp = MLP(model.d_model, model.d_ff, model.activation, model.init_scale, rngs)

    def __call__(self, x_BSD, inputs: "Inputs", mode, cache, bias_E, key, replay_BSK=None):
        y_BSD, cache = self.attention(inputs.present(self.attention_norm(x_BSD)), inputs.positions_BS, inputs.mask_BST,
                                      cache, inputs.index, inputs.attended_BS)
        x_BSD = x_BSD + y_BSD
        statistics, normed_BSD = None, inputs.present(self.ffn_norm(x_BSD))
        if self.is_moe:
            y_BSD, statistics = self.moe(normed_BSD, inputs.valid_BS, mode, bias_E, key,
                                         inputs.token_ids_BS, inputs.positions_BS, inputs.previous_ids_BS, replay_BSK,
                                         segment_ids_BS=inputs.segment_ids_BS, undropped_BS=inputs.undropped_BS)
        else:
            y_BSD = self.mlp(normed_BSD)
        if self.residual_ffn == "parallel":
            y_BSD = y_BSD + self.residual(normed_BSD)
        x_BSD = x_BSD + y_BSD
        if self.residual_ffn == "sequential":
            x_BSD = x_BSD + self.residual(inputs.present(self.residual_norm(x_BSD)))
        return x_BSD, cache, statistics


@functools.partial(jax.tree_util.register_dataclass, meta_fields=(),
                   data_fields=("token_ids_BS", "positions_BS", "mask_BST", "valid_BS", "previous_ids_BS", "index",
                                "present_BS", "segment_ids_BS", "undropped_BS", "attended_BS"))
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What every layer sees beside the residual stream; ``present_BS`` only where padding is routed, ``undropped_BS``
    only where devices drop choices, ``attended_BS`` only where it says all that the mask says: segments, 0 for padding."""

    token_ids_BS: jax.Array
    positions_BS: jax.Array
    mask_BST: jax.Array
    valid_BS: jax.Array
    previous_ids_BS: jax.Array
    index: jax.Array | int = 0
    present_BS: jax.Array | None = None
    segment_ids_BS: jax.Array | None = None
    undropped_BS: jax.Array | None = None
    attended_BS: jax.Array | None = None

    def present(self, x_BSD: jax.Array) -> jax.Array:
        """x where there is text, 0 elsewhere."""
        return x_BSD if self.present_BS is None else jnp.where(self.present_BS[:, :, None], x_BSD, 0)


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


class Block(nnx.Module):
    """One period of the layer pattern, e.g. dense, dense, dense, MoE: the body of the scan over layers."""

    def __init__(self, config: Config, pattern: tuple[bool, ...], rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(config, is_moe, rngs) for is_moe in pattern])

    def __call__(self, x_BSD, inputs, mode, caches, bias_ME, keys, replay_MBSK=None):
        """``bias_ME``, replays and statistics lead with M, this block's MoE layers; ``caches`` is a list over layers."""
        statistics, new_caches, moe = [], [], 0
        for i, layer in enumerate(self.layers):
            key = None if keys is None else keys[i]
            bias_E = bias_ME[moe] if layer.is_moe else None
            replay_BSK = replay_MBSK[moe] if layer.is_moe and replay_MBSK is not None else None
            x_BSD, cache, stats = layer(x_BSD, inputs, mode, caches[i], bias_E, key, replay_BSK)
            new_caches.append(cache)
            if layer.is_moe:
                moe += 1
                statistics.append(stats)
        return x_BSD, new_caches, statistics


def layer_pattern(is_moe: tuple[bool, ...]) -> tuple[int, int, int]:
    """``(prefix, period, repeats)`` of a list of layers: the split that leaves the fewest distinct layers to compile.

    Layers ``prefix … prefix + period·repeats`` repeat with ``period``; the rest stands alone. OpenMoE's every-4th gives
    (0, 4, L/4), DeepSeekMoE's dense first layer gives (1, 1, L-1).
    """
    total, best = len(is_moe), (0, len(is_moe), 1)
    cost = total
    for prefix in range(total):
        for period in range(1, total - prefix + 1):
            repeats = 1
            while is_moe[prefix + repeats * period : prefix + (repeats + 1) * period] == is_moe[prefix : prefix + period]:
                repeats += 1
            distinct = total - period * (repeats - 1)
            if repeats > 1 and distinct < cost:
                best, cost = (prefix, period, repeats), distinct
    return best


def config_pattern(config: Config) -> tuple[tuple[bool, ...], tuple[int, int, int]]:
    """Which layers of the model are mixtures, and their :func:`layer_pattern`."""
    is_moe = tuple(i in config.moe_layers for i in range(config.model.num_layers))
    return is_moe, layer_pattern(is_moe) if config.model.scan_layers else (0, len(is_moe), 1)


def layer_paths(config: Config) -> dict[str, tuple[int, ...]]:
    """Where the parameters of layers lie: ``'body/layers/1'`` -> which layers, 0 … ``num_layers`` − 1, and from there on those of
    multi-token prediction. Arrays below ``body`` are stacked over these; elsewhere there is one of them, and no leading
    dimension."""
    is_moe, (prefix, period, repeats) = config_pattern(config)
    end = prefix + period * repeats
    return {**{f"first/{i}/layers/0": (i,) for i in range(prefix)},
            **{f"body/layers/{i}": tuple(prefix + i + period * r for r in range(repeats)) for i in range(period)},
            **{f"last/{i - end}/layers/0": (i,) for i in range(end, len(is_moe))},
            **{f"mtp/{i}/block/layers/0": (len(is_moe) + i,) for i in range(config.model.mtp_depth)}}


def moe_layer_paths(config: Config) -> dict[str, tuple[int, ...]]:
    """The same of MoE layers: ``'body/layers/1/moe'`` -> which of them, 0 … L − 1."""
    number = {layer: n for n, layer in enumerate(config.moe_layers)}
    return {f"{where}/moe": tuple(number[layer] for layer in layers) for where, layers in layer_paths(config).items()
            if layers[0] in number}


@functools.partial(jax.tree_util.register_dataclass, meta_fields=(),
                   data_fields=("logits_BSV", "statistics", "cache", "further_logits"))
@dataclasses.dataclass(frozen=True)
class Output:
    """Logits in fp32; ``statistics``: MoEStatistics whose leaves lead with L, the MoE layers in order (None if dense).

    ``further_logits``: ``[B, S, V]`` of each depth of multi-token prediction, if asked for; its layers are then the last in
    ``statistics``.
    """

    logits_BSV: jax.Array
    statistics: MoEStatistics | None
    cache: Any = None
    further_logits: tuple[jax.Array, ...] = ()


class Decoder(nnx.Module):
    """The language model. ``vocab_size`` is the size of the table, usually the vocabulary rounded up."""

    def __init__(self, config: Config, vocab_size: int, rngs: nnx.Rngs):
        self.config, self.vocab_size = config, vocab_size
        is_moe, self.pattern = config_pattern(config)
        prefix, period, repeats = self.pattern
        self.embedding = Embedding(config.model, vocab_size, rngs)
        self.first = nnx.List([Block(config, (m,), rngs) for m in is_moe[:prefix]])
        body = is_moe[prefix : prefix + period]
        self.body = nnx.vmap(lambda key: Block(config, body, nnx.Rngs(params=key)))(
            jax.random.split(rngs.params(), repeats))
        self.last = nnx.List([Block(config, (m,), rngs) for m in is_moe[prefix + period * repeats :]])
        self.final_norm = RMSNorm(config.model.d_model, config.model.norm_epsilon)
        # Copies of experts are for evaluation, which has no use for further tokens.
        depth = 0 if config.moe.expert_copies else config.model.mtp_depth
        self.mtp = nnx.List([FurtherToken(config.model, Block(config, is_moe[-1:], rngs), rngs) for _ in range(depth)])

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
        config = self.config
        if key_segment_ids_BT is None:
            key_segment_ids_BT = segment_ids_BS
        if previous_ids_BS is None:
            previous_ids_BS = left_neighbours(input_ids_BS, positions_BS)
        # Where padding is routed or counted, what attention makes of it matters, and there the mask says more.
        alone = (cache is None or isinstance(index, int) and index == 0) and config.moe.padding == "nowhere"
        alone = alone and in_prefix_BS is None
        mask_BST = attention_mask(segment_ids_BS, key_segment_ids_BT, valid_BS, index, in_prefix_BS)
        inputs = Inputs(input_ids_BS, positions_BS, mask_BST, valid_BS, previous_ids_BS, index,
                        text_positions(input_ids_BS, valid_BS) if config.moe.padding == "routed" else None,
                        segment_ids_BS, _undropped(config, valid_BS, mode, key),
                        jnp.where(valid_BS, segment_ids_BS, 0) if alone else None)
        if bias_LE is None:
            bias_LE = jnp.zeros((len(config.trained_moe_layers), max(config.moe.num_routed_experts, 1)), jnp.float32)
        keys = None
        if mode.noise and key is not None:
            keys = jax.random.split(key, config.model.num_layers)
        x_BSD = self.embedding.encode(input_ids_BS, jnp.dtype(config.model.dtype))
        x_BSD, cache, statistics = self._run_layers(x_BSD, inputs, mode, cache, bias_LE, keys, replay_LBSK)
        logits_BSV = self.embedding.decode(inputs.present(self.final_norm(x_BSD)))
        if next_ids_BS is None:
            return Output(logits_BSV, statistics, cache)
        further, more = self._further(x_BSD, next_ids_BS, inputs, mode, bias_LE[len(config.moe_layers):], key, in_prefix_BS)
        return Output(logits_BSV, _concatenated([statistics, *more]), cache, further)

    def _further(self, x_BSD, next_ids_BS, inputs, mode, bias_LE, key, in_prefix_BS):
        """Logits ``[B, S, V]`` of each depth of multi-token prediction, and its statistics."""
        logits, statistics, config = [], [], self.config
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
                attended_BS=None if inputs.attended_BS is None else jnp.where(valid_BS, segment_ids_BS, 0))
            keys = None
            if mode.noise and key is not None:  # other keys than those of the layers and of _undropped
                keys = jax.random.fold_in(key, config.model.num_layers + depth)[None]
            x_BSD = module.join(x_BSD, self.embedding.encode(ids_BS, x_BSD.dtype))
            run = _Runner(config, inputs, mode, bias_LE[depth - 1 : depth], keys, None)
            x_BSD, _, stats = run.block(module.block, x_BSD, [None])
            logits.append(self.embedding.decode(inputs.present(module.final_norm(x_BSD))))
            statistics.append(stats)
        return tuple(logits), statistics

    def _run_layers(self, x_BSD, inputs, mode, cache, bias_LE, keys, replay_LBSK):
        prefix, period, repeats = self.pattern
        run = _Runner(self.config, inputs, mode, bias_LE, keys, replay_LBSK)
        caches = cache if cache is not None else run.no_cache(prefix, period, repeats, len(self.last))
        first, body, last = caches["first"], caches["body"], caches["last"]
        statistics, new_first, new_last = [], [], []
        for block, block_cache in zip(self.first, first):
            x_BSD, block_cache, stats = run.block(block, x_BSD, block_cache)
            new_first.append(block_cache)
            statistics.append(stats)
        x_BSD, body, stats = run.repeated(self.body, x_BSD, body, period, repeats)
        statistics.append(stats)
        for block, block_cache in zip(self.last, last):
            x_BSD, block_cache, stats = run.block(block, x_BSD, block_cache)
            new_last.append(block_cache)
            statistics.append(stats)
        new_cache = {"first": new_first, "body": body, "last": new_last} if cache is not None else None
        return x_BSD, new_cache, _concatenated(statistics)

    def empty_cache(self, batch: int, slots: int) -> dict[str, Any]:
        """Keys and values for ``slots`` tokens, zeros; put where the batch lies by the caller's jit."""
        model = self.config.model
        shape = (batch, slots, model.num_kv_heads, model.head_dim)
        pair = lambda *lead: tuple(jnp.zeros((*lead, *shape), jnp.dtype(model.dtype)) for _ in range(2))
        prefix, period, repeats = self.pattern
        return {"first": [[pair()] for _ in range(prefix)],
                "body": [pair(repeats) for _ in range(period)],
                "last": [[pair()] for _ in range(len(self.last))]}


def _undropped(config, valid_BS, mode, key):
    """The tokens of a random ``moe.undropped_sequences`` of the rows, the same in all layers; None where devices drop
    nothing."""
    if not (config.moe.device_capacity_factor and mode.noise) or key is None:
        return None
    # The layers' keys, split from it, are those that 0 … num_layers - 1 would give.
    chance_B = jax.random.uniform(jax.random.fold_in(key, config.model.num_layers), valid_BS.shape[:1])
    return valid_BS & jax.reshard(chance_B < config.moe.undropped_sequences, spec("B", ACTIVATIONS))[:, None]


class _Runner:
    """Walks through the layers, handing each its bias, its noise key, its cache and what it shall replay."""

    def __init__(self, config, inputs, mode, bias_LE, keys, replay_LBSK):
        self.config, self.inputs, self.mode = config, inputs, mode
        self.bias_LE, self.keys, self.replay_LBSK = bias_LE, keys, replay_LBSK
        self.layer = self.moe_layer = 0

    def no_cache(self, prefix, period, repeats, last):
        return {"first": [[None]] * prefix, "body": [None] * period, "last": [[None]] * last}

    def _take(self, layers, moe_layers):
        keys = None if self.keys is None else self.keys[self.layer : self.layer + layers]
        here = slice(self.moe_layer, self.moe_layer + moe_layers)
        replay = None if self.replay_LBSK is None else self.replay_LBSK[here]
        self.layer, self.moe_layer = self.layer + layers, self.moe_layer + moe_layers
        return self.bias_LE[here], keys, replay

    def block(self, block, x_BSD, caches):
        """One block that is not repeated; statistics lead with M."""
        moe_layers = sum(layer.is_moe for layer in block.layers)
        bias_ME, keys, replay_MBSK = self._take(len(block.layers), moe_layers)
        graph, state = nnx.split(block)

        def apply(state, x_BSD, inputs, caches, bias_ME, keys, replay_MBSK):
            return nnx.merge(graph, state)(x_BSD, inputs, self.mode, caches, bias_ME, keys, replay_MBSK)

        apply = _rematerialised(apply, self.config.model.remat)
        x_BSD, caches, statistics = apply(state, x_BSD, self.inputs, caches, bias_ME, keys, replay_MBSK)
        return x_BSD, caches, _stacked(statistics)

    def repeated(self, body, x_BSD, caches, period, repeats):
        """The repeating block by ``lax.scan`` over its stacked parameters; unrolled if there is only one."""
        graph, state = nnx.split(body)
        moe_layers = sum(layer.is_moe for layer in body.layers)
        bias_LE, keys, replay = self._take(period * repeats, moe_layers * repeats)
        bias_RME = bias_LE.reshape(repeats, moe_layers, bias_LE.shape[-1])
        # [L, B, S, K] -> [R, M, B, S, K]
        replay = None if replay is None else replay.reshape(repeats, moe_layers, *replay.shape[1:])
        keys = None if keys is None else keys.reshape(repeats, period)

        def step(x_BSD, scanned):
            state, caches, bias_ME, keys, replay_MBSK = scanned
            block = nnx.merge(graph, state)
            x_BSD, caches, statistics = block(x_BSD, self.inputs, self.mode, caches, bias_ME, keys, replay_MBSK)
            return x_BSD, (caches, _stacked(statistics))

        step = _rematerialised(step, self.config.model.remat)
        x_BSD, (caches, statistics) = jax.lax.scan(step, x_BSD, (state, caches, bias_RME, keys, replay))
        if statistics is not None:
            # [R, M, ...] -> [L, ...]: layers in order.
            statistics = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), statistics)
        return x_BSD, caches, statistics


def _concatenated(statistics: list[MoEStatistics | None]) -> MoEStatistics | None:
    """Of blocks in order, those without an MoE layer left out."""
    statistics = [s for s in statistics if s is not None]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *statistics) if statistics else None


def _stacked(statistics: list[MoEStatistics]) -> MoEStatistics | None:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *statistics) if statistics else None


def _rematerialised(function, remat: str):
    """``'none'``: keep all activations; ``'block'``: recompute the block; ``'dots'``: keep only products with weights."""
    if remat == "none":
        return function
    policy = None if remat == "block" else jax.checkpoint_policies.save_only_these_names(PRODUCT)
    return jax.checkpoint(function, policy=policy)
