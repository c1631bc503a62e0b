"""Causal self-attention with grouped key/value heads. What sets one model's apart from another's are options of it."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import AttentionConfig, ConfigError, LayerAttention, ModelConfig
from moe_jax.nn import cache as caches
from moe_jax.nn.initializers import kernel
from moe_jax.nn.norms import RMSNorm, unscaled
from moe_jax.nn.positions import rotate, temperature
from moe_jax.nn.splash import splash, unfit
from moe_jax.product import product
from moe_jax.sharding import ACTIVATIONS, gathered, lowering_platform, spec

# Score of a key that may not be seen: exp() of it is 0, and unlike minus infinity it leaves no NaN behind.
_HIDDEN = -1e30

# One layer's keys and values, each [B, T, H_kv, d], of T slots (moe_jax/nn/cache.py), or its latents.
LayerCache = tuple[jax.Array, jax.Array]

_PLAIN, _FULL = AttentionConfig(), LayerAttention()


class Attention(nnx.Module):
    """softmax(q·k/√d) v, or softmax(q·k) v (``model.scaled_attention=False``); query head h uses key/value head
    h // (H / H_kv) (Ainslie et al. 2023). Variants: the config's section ``attention``, docs/conventions.md."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, attention: AttentionConfig = _PLAIN, layer: LayerAttention = _FULL):
        self.config, self.attention, self.layer = config, attention, layer
        width, heads, kv_heads, head = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        # Scores that are not divided by √d start as small as if they were: the queries are (Raffel et al. 2020).
        query_scale = config.init_scale if config.scaled_attention else config.init_scale / head
        self.w_query_DHd = kernel(rngs, (width, heads, head), width, query_scale)
        self.w_key_DHd = kernel(rngs, (width, kv_heads, head), width, config.init_scale)
        self.w_value_DHd = kernel(rngs, (width, kv_heads, head), width, config.init_scale)
        self.w_out_HdD = kernel(rngs, (heads, head, width), heads * head, config.init_scale)
        zeros = lambda *shape: nnx.Param(jnp.zeros(shape, jnp.float32))
        if attention.bias != "none":
            self.b_query_Hd, self.b_key_Hd, self.b_value_Hd = zeros(heads, head), zeros(kv_heads, head), zeros(kv_heads, head)
        if attention.bias == "all":
            self.b_out_D = zeros(width)
        if attention.qk_norm in ("head", "all_heads"):
            shape, letters = ((head,), "d") if attention.qk_norm == "head" else ((heads, head), "Hd")
            self.query_norm = RMSNorm(shape, config.norm_epsilon, letters)
            self.key_norm = RMSNorm((kv_heads, *shape[1:]) if letters == "Hd" else shape, config.norm_epsilon, letters)
        if attention.sinks:
            self.sink_H = zeros(heads)

    def __call__(self, x_BSD: jax.Array, positions_BS: jax.Array, mask_BST: jax.Array,
                 cache: LayerCache | None = None, index: jax.Array | int = 0, segment_ids_BS: jax.Array | None = None,
                 bias_BHST: jax.Array | None = None) -> tuple[jax.Array, LayerCache | None]:
        """Attends from S queries to T keys.

        Args:
          mask_BST: bool, True where query s may see key t. With a cache of a layer that does not see everything, the keys are
            those of :func:`moe_jax.nn.cache.shown_tokens`.
          cache: keys and values of earlier calls; this call's are those of tokens ``index`` on. Without it T = S.
          segment_ids_BS: where queries see keys of this call only, and the mask says no more than "the same segment, not later,
            and within the layer's reach", the segments (0 = padding); a kernel may then be used. None: the mask is
            something else.
          bias_BHST: added to the scores, fp32; B may be 1.

        Returns:
          [B, S, D], and the cache with this call's keys and values in it.
        """
        dtype, config = x_BSD.dtype, self.config
        query_BSHd = self._query_or_key(x_BSD, positions_BS, "query")
        if self.attention.temperature_scale and not self.layer.rotated:
            query_BSHd = query_BSHd * temperature(positions_BS, self.attention)[:, :, None, None].astype(dtype)
        key_BTHd = key_BSHd = self._query_or_key(x_BSD, positions_BS, "key")
        value_BTHd = value_BSHd = self._clipped(self._projected(x_BSD, "value"))
        if cache is not None:
            is_ring = self.layer.span != "full"
            key_cache, key_BTHd = caches.written(cache[0], key_BTHd, index, is_ring)
            value_cache, value_BTHd = caches.written(cache[1], value_BTHd, index, is_ring)
            cache = (key_cache, value_cache)
        here, shown = (query_BSHd, key_BSHd, value_BSHd), (key_BTHd.astype(dtype), value_BTHd.astype(dtype))
        scale = config.head_dim**-0.5 if config.scaled_attention else 1.0
        out_BSHd = attended(self, here, shown, mask_BST, segment_ids_BS, scale, cache is None, bias_BHST)
        return projected_out(self, out_BSHd), cache

    def empty_cache(self, batch: int, tokens: int, stacked: tuple[int, ...] = ()) -> LayerCache:
        """Zeros for so many tokens, ``[*stacked, B, T, H_kv, d]``, on the mesh in context."""
        slots = caches.slots_of(self.attention, self.layer.span, tokens)
        shape = (batch, slots, self.config.num_kv_heads, self.config.head_dim)
        return tuple(caches.empty("BTHd", shape, jnp.dtype(self.config.dtype), stacked) for _ in range(2))

    def _projected(self, x_BSD, name):
        weight = gathered(getattr(self, f"w_{name}_DHd")[...], "DHd", x_BSD.dtype)
        y_BSHd = product(x_BSD, weight, "BSD,DHd->BSHd", spec("BSHd", ACTIVATIONS))
        if self.attention.bias == "none":
            return y_BSHd
        return y_BSHd + gathered(getattr(self, f"b_{name}_Hd")[...], "Hd", x_BSD.dtype)[None, None]

    def _query_or_key(self, x_BSD, positions_BS, name):
        attention = self.attention
        y_BSHd = self._projected(x_BSD, name)
        if attention.qk_norm in ("head", "all_heads"):
            y_BSHd = getattr(self, f"{name}_norm")(y_BSHd)
        y_BSHd = self._clipped(y_BSHd)
        if attention.positions != "rotary" or not self.layer.rotated:
            return y_BSHd
        y_BSHd = rotate(y_BSHd, positions_BS, self.config.rope_theta, attention)
        return unscaled(y_BSHd, self.config.norm_epsilon) if attention.qk_norm == "unscaled" else y_BSHd

    def _clipped(self, y_BSHd):
        limit = self.attention.clip_qkv
        return jnp.clip(y_BSHd, -limit, limit) if limit else y_BSHd


def attended(module: nnx.Module, here: tuple[jax.Array, jax.Array, jax.Array], shown: tuple[jax.Array, jax.Array],
             mask_BST: jax.Array, segment_ids_BS: jax.Array | None, scale: float, required: bool,
             bias_BHST: jax.Array | None = None) -> jax.Array:
    """Attention of a layer by what its config and this call allow: the kernel, or the plain one; ``[B, S, H, d]``.

    Args:
      module: an attention layer: its ``config``, ``attention``, ``layer`` and perhaps ``sink_H``.
      here: this call's queries, keys and values. shown: the keys and values that the mask is of, a cache's among them.
      required: refuse where model.attention='splash' cannot be.
    """
    query_BSHd, key_BSHd, value_BSHd = here
    sink_H = module.sink_H[...] if module.attention.sinks else None
    if segment_ids_BS is None or bias_BHST is not None:
        return attend(query_BSHd, *shown, mask_BST, scale, sink_H, bias_BHST)
    if uses_splash(module.config, query_BSHd.shape[1], required, module.attention, module.layer):
        return splash(query_BSHd, key_BSHd, value_BSHd, segment_ids_BS, scale,
                      window=caches.reach(module.attention, module.layer.span), sink_H=sink_H)
    return attend(query_BSHd, key_BSHd, value_BSHd, mask_BST[:, :, : query_BSHd.shape[1]], scale, sink_H)


def projected_out(module: nnx.Module, out_BSHd: jax.Array) -> jax.Array:
    """``[B, S, D]`` by the layer's ``w_out_HdD`` and, if it has one, ``b_out_D``."""
    dtype = out_BSHd.dtype
    y_BSD = product(out_BSHd, gathered(module.w_out_HdD[...], "HdD", dtype), "BSHd,HdD->BSD", spec("BSD", ACTIVATIONS))
    return y_BSD if module.attention.bias != "all" else y_BSD + gathered(module.b_out_D[...], "D", dtype)[None, None]


def uses_splash(config: ModelConfig, length: int, required: bool = True, attention: AttentionConfig = _PLAIN,
                layer: LayerAttention = _FULL) -> bool:
    """Whether self-attention over ``length`` tokens runs by the kernel, in the program that is being traced.

    Args:
      required: refuse where model.attention='splash' cannot be. Not of prompts, which have any length.

    Raises:
      ConfigError: it cannot.
    """
    if config.attention == "plain":
        return False
    why = unfit(length, config.head_dim, lowering_platform(), attention, layer.span)
    if why and required and config.attention == "splash":
        raise ConfigError(f"model.attention='splash': {why}; 'auto' then takes the plain one.")
    return not why


def attend(query_BSHd: jax.Array, key_BTHd: jax.Array, value_BTHd: jax.Array, mask_BST: jax.Array, scale: float,
           sink_H: jax.Array | None = None, bias_BHST: jax.Array | None = None) -> jax.Array:
    """Plain attention; scores and softmax in fp32. A query that may see nothing (padding) gets a mean, not NaN.

    Args:
      key_BTHd, value_BTHd: may have fewer heads; values may be of another width.
      sink_H: a logit per head that takes part in the softmax and has no value.
      bias_BHST: added to the scaled scores.

    Returns:
      [B, S, H, d]
    """
    batch, queries, num_heads, head = query_BSHd.shape
    kv_heads = key_BTHd.shape[2]
    # Heads first: with the batch dimensions of a product in front, XLA on CPU needs no transposed copies (4x faster
    # forward and backward). Key/value head h serves queries h·g … h·g+g-1.
    query_BHgSd = jnp.swapaxes(query_BSHd, 1, 2).reshape(batch, kv_heads, num_heads // kv_heads, queries, head)
    key_BHTd, value_BHTd = jnp.swapaxes(key_BTHd, 1, 2), jnp.swapaxes(value_BTHd, 1, 2)
    score_BHgST = jnp.einsum("BHgSd,BHTd->BHgST", query_BHgSd, key_BHTd, preferred_element_type=jnp.float32)
    if bias_BHST is not None:
        score_BHgST = score_BHgST * scale + bias_BHST.reshape(-1, *score_BHgST.shape[1:])
        scale = 1.0
    if sink_H is not None:
        sink_H = sink_H.reshape(kv_heads, num_heads // kv_heads)
    weight_BHgST = weigh(score_BHgST, mask_BST, scale, sink_H).astype(value_BHTd.dtype)
    out_BHgSd = jnp.einsum("BHgST,BHTd->BHgSd", weight_BHgST, value_BHTd)
    return jnp.swapaxes(out_BHgSd.reshape(batch, num_heads, queries, value_BTHd.shape[-1]), 1, 2)


def weigh(score_BHST: jax.Array, mask_BST: jax.Array, scale: float, sink_H: jax.Array | None = None) -> jax.Array:
    """softmax over T of scale · score where the mask says so, in fp32; H may be several dimensions."""
    between = tuple(range(1, score_BHST.ndim - 2))
    # Added, which leaves nothing of the score: a query that sees nothing weighs all keys alike and, as in other codes
    # (OpenMoE's routes such queries), has a gradient.
    score_BHST = score_BHST * scale + jnp.expand_dims(jnp.where(mask_BST, 0.0, _HIDDEN), between)
    weight_BHST = jax.nn.softmax(score_BHST, axis=-1)
    if sink_H is None:
        return weight_BHST
    # e^s / (Σ e^s + e^sink) = softmax(s) · σ(log Σ e^s − sink)
    total_BHS1 = jax.nn.logsumexp(score_BHST, axis=-1, keepdims=True)
    return weight_BHST * jax.nn.sigmoid(total_BHS1 - sink_H.astype(jnp.float32)[None, ..., None, None])
