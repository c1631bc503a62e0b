"""Pre-norm layers in order, some of whose feed-forward networks are mixtures of experts, and the scan over those that repeat."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import Config, LayerAttention
from moe_jax.nn.attention import Attention
from moe_jax.nn.cross_attention import CrossAttention
from moe_jax.nn.initializers import normal
from moe_jax.nn.latent_attention import LatentAttention
from moe_jax.nn.mlp import MLP
from moe_jax.nn.moe import MoELayer, MoEStatistics, RoutingMode
from moe_jax.nn.norms import norm
from moe_jax.nn.positions import relative_bias
from moe_jax.product import PRODUCT


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What sets a layer apart from the others: layers of one kind have the same parameters.

    is_moe: its feed-forward network is a mixture. attention: what it sees. crosses: it looks at an encoder's output too.
    """

    is_moe: bool
    attention: LayerAttention = LayerAttention()
    crosses: bool = False


class Layer(nnx.Module):
    """x += attention(norm(x)); x += ffn(norm(x)), where ffn is an MLP or a mixture of experts; in between, of a decoder with
    an encoder, x += cross_attention(norm(x), encoded).

    Beside the mixture every token may pass a dense FFN (``moe.residual_ffn``): in parallel, x += moe(norm(x)) +
    ffn(norm(x)) (OpenMoE's paper, eq. 4), or after it, x += moe(norm(x)); x += ffn(norm'(x)) (OpenMoE's code, ST-MoE).
    """

    def __init__(self, config: Config, kind: LayerKind, rngs: nnx.Rngs):
        model, is_moe = config.model, kind.is_moe
        self.is_moe = is_moe
        self.attention_norm = norm(model)
        attention = LatentAttention if config.attention.kind == "latent" else Attention
        self.attention = attention(model, rngs, config.attention, kind.attention)
        self.span = kind.attention.span
        self.crosses = kind.crosses
        if kind.crosses:
            self.cross_norm = norm(model)
            self.cross_attention = CrossAttention(model, rngs, config.attention)
        self.ffn_norm = norm(model)
        if is_moe:
            self.moe = MoELayer(config, rngs)
        self.residual_ffn = config.moe.residual_ffn if is_moe else "none"
        if self.residual_ffn == "sequential":
            self.residual_norm = norm(model)
        if self.residual_ffn != "none":
            self.residual = MLP(model.d_model, model.d_ff, model.activation, model.init_scale, rngs, model.mlp_bias)
        if not is_moe:
            self.mlp = MLP(model.d_model, model.d_ff, model.activation, model.init_scale, rngs, model.mlp_bias)

    def __call__(self, x_BSD, inputs: "Inputs", mode, cache, bias_E, key, replay_BSK=None):
        """``cache``: the attention's, or, with an encoder, that and the cross-attention's."""
        cache, crossed = cache if self.crosses and cache is not None else (cache, None)
        mask_BST = inputs.masks.get(self.span, inputs.mask_BST)
        y_BSD, cache = self.attention(inputs.present(self.attention_norm(x_BSD)), inputs.positions_BS, mask_BST, cache,
                                      inputs.index, inputs.attended_BS, inputs.bias_BHST)
        x_BSD = x_BSD + y_BSD
        if self.crosses:
            y_BSD, crossed = self.cross_attention(self.cross_norm(x_BSD), inputs.encoded_BTD, inputs.crossed_mask_BST, crossed)
            x_BSD = x_BSD + y_BSD
            cache = None if crossed is None else (cache, crossed)
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

    def empty_cache(self, batch: int, slots: int, given: int = 0, stacked: tuple[int, ...] = ()) -> Any:
        """What it keeps of ``slots`` tokens, and of ``given`` ones of an encoder, zeros; of so many layers, if there are several in
        one."""
        cache = self.attention.empty_cache(batch, slots, stacked)
        return (cache, self.cross_attention.empty_cache(batch, given, stacked)) if self.crosses else cache


@functools.partial(jax.tree_util.register_dataclass, meta_fields=(),
                   data_fields=("token_ids_BS", "positions_BS", "mask_BST", "valid_BS", "previous_ids_BS", "index",
                                "present_BS", "segment_ids_BS", "undropped_BS", "attended_BS", "bias_BHST",
                                "encoded_BTD", "crossed_mask_BST", "masks"))
@dataclasses.dataclass(frozen=True)
class Inputs:
    """What every layer sees beside the residual stream; ``present_BS`` only where padding is routed, ``undropped_BS``
    only where devices drop choices, ``attended_BS`` only where it says all that the mask says: segments, 0 for padding.
    ``masks``, by span, stand for ``mask_BST`` in layers that do not see everything. ``bias_BHST`` is that of relative
    positions (B = 1). In a decoder with an encoder, ``encoded_BTD`` is its output – None where the cache holds what is made of
    it – and ``crossed_mask_BST`` says who may see what of it."""

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
    bias_BHST: jax.Array | None = None
    encoded_BTD: jax.Array | None = None
    crossed_mask_BST: jax.Array | None = None
    masks: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def present(self, x_BSD: jax.Array) -> jax.Array:
        """x where there is text, 0 elsewhere."""
        return x_BSD if self.present_BS is None else jnp.where(self.present_BS[:, :, None], x_BSD, 0)


class Block(nnx.Module):
    """One period of the layer pattern, e.g. dense, dense, dense, MoE: the body of the scan over layers."""

    def __init__(self, config: Config, kinds: tuple[LayerKind, ...], rngs: nnx.Rngs):
        self.layers = nnx.List([Layer(config, kind, rngs) for kind in kinds])

    def __call__(self, x_BSD, inputs, mode, caches, bias_ME, keys, replay_MBSK=None):
        """``bias_ME``, replays and statistics lead with M, this block's MoE layers; ``caches`` is a list over layers.

        Returns the stream, the caches, the statistics, and, for ``mode.trace``, the stream behind each layer."""
        statistics, new_caches, streams, moe = [], [], [], 0
        for i, layer in enumerate(self.layers):
            key = None if keys is None else keys[i]
            bias_E = bias_ME[moe] if layer.is_moe else None
            replay_BSK = replay_MBSK[moe] if layer.is_moe and replay_MBSK is not None else None
            x_BSD, cache, stats = layer(x_BSD, inputs, mode, caches[i], bias_E, key, replay_BSK)
            new_caches.append(cache)
            streams.append(x_BSD)
            if layer.is_moe:
                moe += 1
                statistics.append(stats)
        return x_BSD, new_caches, statistics, jnp.stack(streams) if mode.trace else None


def layer_pattern(kinds: tuple[Any, ...]) -> tuple[int, int, int]:
    """``(prefix, period, repeats)`` of a list of layers: the split that leaves the fewest distinct layers to compile.

    Layers ``prefix … prefix + period·repeats`` repeat with ``period``; the rest stands alone. OpenMoE's every-4th gives
    (0, 4, L/4), DeepSeekMoE's dense first layer gives (1, 1, L-1).
    """
    total, best = len(kinds), (0, len(kinds), 1)
    cost = total
    for prefix in range(total):
        for period in range(1, total - prefix + 1):
            repeats = 1
            while kinds[prefix + repeats * period : prefix + (repeats + 1) * period] == kinds[prefix : prefix + period]:
                repeats += 1
            distinct = total - period * (repeats - 1)
            if repeats > 1 and distinct < cost:
                best, cost = (prefix, period, repeats), distinct
    return best


def stack_pattern(config: Config, kinds: tuple[LayerKind, ...]) -> tuple[int, int, int]:
    """The :func:`layer_pattern` of a stack; all of one period where layers are not scanned over."""
    return layer_pattern(kinds) if config.model.scan_layers else (0, len(kinds), 1)


class Stack(nnx.Module):
    """Layers and the norm behind them: ``first`` and ``last`` stand alone, ``body`` is scanned over."""

    def __init__(self, config: Config, kinds: tuple[LayerKind, ...], rngs: nnx.Rngs, both_sides: bool = False):
        """``both_sides``: of an encoder, whose relative positions (``relative_bias_XH``, X buckets) know later from earlier."""
        self.config, self.pattern, self.both_sides = config, stack_pattern(config, kinds), both_sides
        prefix, period, repeats = self.pattern
        self.first = nnx.List([Block(config, (kind,), rngs) for kind in kinds[:prefix]])
        body = kinds[prefix : prefix + period]
        self.body = nnx.vmap(lambda key: Block(config, body, nnx.Rngs(params=key)))(
            jax.random.split(rngs.params(), repeats))
        self.last = nnx.List([Block(config, (kind,), rngs) for kind in kinds[prefix + period * repeats :]])
        self.final_norm = norm(config.model)
        if config.attention.positions == "relative":
            shape = config.attention.relative_buckets, config.model.num_heads
            self.relative_bias_XH = normal(rngs, shape, config.model.d_model**-0.5)

    def run_layers(self, x_BSD: jax.Array, inputs: Inputs, mode: RoutingMode, cache: Any, bias_LE: jax.Array,
                   keys: jax.Array | None = None, replay_LBSK: jax.Array | None = None):
        """All layers, without the norm behind them.

        Args:
          cache: from :meth:`empty_cache` or an earlier call; None: there is none.
          bias_LE, replay_LBSK: of the stack's MoE layers in order. keys: one for each of its layers.

        Returns:
          The stream [B, S, D], the cache with this call's tokens in it, statistics that lead with L (None if dense), and for
          ``mode.trace`` the stream behind each layer, [L, B, S, D], with L all layers of the stack.
        """
        inputs = self.with_relative_bias(inputs)
        prefix, period, repeats = self.pattern
        run = Runner(self.config, inputs, mode, bias_LE, keys, replay_LBSK)
        caches = cache if cache is not None else run.no_cache(prefix, period, repeats, len(self.last))
        first, body, last = caches["first"], caches["body"], caches["last"]
        statistics, streams, new_first, new_last = [], [], [], []
        for block, block_cache in zip(self.first, first):
            x_BSD, block_cache, stats, stream = run.block(block, x_BSD, block_cache)
            new_first.append(block_cache)
            statistics.append(stats)
            streams.append(stream)
        x_BSD, body, stats, stream = run.repeated(self.body, x_BSD, body, period, repeats)
        statistics.append(stats)
        streams.append(stream)
        for block, block_cache in zip(self.last, last):
            x_BSD, block_cache, stats, stream = run.block(block, x_BSD, block_cache)
            new_last.append(block_cache)
            statistics.append(stats)
            streams.append(stream)
        new_cache = {"first": new_first, "body": body, "last": new_last} if cache is not None else None
        return x_BSD, new_cache, concatenated(statistics), jnp.concatenate(streams) if mode.trace else None

    def with_relative_bias(self, inputs: "Inputs") -> "Inputs":
        """With the bias of relative positions, if the stack has them."""
        if self.config.attention.positions != "relative":
            return inputs
        queries, keys = inputs.mask_BST.shape[1:]
        return dataclasses.replace(inputs, bias_BHST=relative_bias(self.relative_bias_XH[...], queries, keys, inputs.index,
                                                                   self.config.attention, self.both_sides))

    def empty_cache(self, batch: int, slots: int, given: int = 0) -> dict[str, Any]:
        """What the layers keep of ``slots`` tokens, and of ``given`` ones of an encoder, zeros, on the mesh in context."""
        of = lambda block, *stacked: [layer.empty_cache(batch, slots, given, stacked) for layer in block.layers]
        return {"first": [of(block) for block in self.first], "body": of(self.body, self.pattern[2]),
                "last": [of(block) for block in self.last]}


class Runner:
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
        """One block that is not repeated; statistics lead with M, the streams behind its layers with their number."""
        moe_layers = sum(layer.is_moe for layer in block.layers)
        bias_ME, keys, replay_MBSK = self._take(len(block.layers), moe_layers)
        graph, state = nnx.split(block)

        def apply(state, x_BSD, inputs, caches, bias_ME, keys, replay_MBSK):
            return nnx.merge(graph, state)(x_BSD, inputs, self.mode, caches, bias_ME, keys, replay_MBSK)

        apply = _rematerialised(apply, self.config.model.remat)
        x_BSD, caches, statistics, stream = apply(state, x_BSD, self.inputs, caches, bias_ME, keys, replay_MBSK)
        return x_BSD, caches, _stacked(statistics), stream

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
            x_BSD, caches, statistics, stream = block(x_BSD, self.inputs, self.mode, caches, bias_ME, keys, replay_MBSK)
            return x_BSD, (caches, _stacked(statistics), stream)

        step = _rematerialised(step, self.config.model.remat)
        x_BSD, (caches, statistics, stream) = jax.lax.scan(step, x_BSD, (state, caches, bias_RME, keys, replay))
        # [R, M, ...] -> [L, ...]: layers in order.
        statistics, stream = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), (statistics, stream))
        return x_BSD, caches, statistics, stream


def concatenated(statistics: list[MoEStatistics | None]) -> MoEStatistics | None:
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
