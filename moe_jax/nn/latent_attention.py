"""Multi-head latent attention (DeepSeek-V2 §2.1): keys and values of all heads come from one small vector per token."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.config import AttentionConfig, LayerAttention, ModelConfig
from moe_jax.nn import cache as caches
from moe_jax.nn.attention import LayerCache, attended, projected_out, weigh
from moe_jax.nn.initializers import kernel
from moe_jax.nn.norms import RMSNorm
from moe_jax.nn.positions import rotate, temperature, yarn_mscale
from moe_jax.product import product
from moe_jax.sharding import ACTIVATIONS, TOKEN_AXES, gathered, spec

# Of the norms of latents, whatever model.norm_epsilon is (the released code of DeepSeek-V2 and V3).
_EPSILON = 1e-6


class LatentAttention(nnx.Module):
    """softmax(q·k · scale) v with c = norm(x W_latent), q = [q_nope | rotated q_rope], k = [c W_key | rotated x W_key_rope],
    v = c W_value per head; the rotary key is shared by all heads. Queries come from x, or from a latent of their own
    (``attention.query_rank``). Scale: 1/√head_dim, under YaRN times m(rope_mscale_all_dim)². With ``attention.bias='all'`` latents
    (before their norms), the shared key and the output have biases.

    The cache holds c and the shared rotary key alone. What a call computes itself is expanded into keys and values per head;
    single tokens read the cache as it is: W_key is applied to the query and W_value to the weighted mean of latents
    ("absorbed"), so that the cache's bytes are read once and no head has a copy.

    Shape letters: R the width of a latent, d of a head.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, attention: AttentionConfig, layer: LayerAttention = LayerAttention()):
        self.config, self.attention, self.layer = config, attention, layer
        width, heads, rope, init = config.d_model, config.num_heads, attention.rope_dim, config.init_scale
        query_scale = init if config.scaled_attention else init / config.head_dim
        if attention.query_rank:
            self.w_query_DR = kernel(rngs, (width, attention.query_rank), width, init)
            self.query_norm = RMSNorm(attention.query_rank, _EPSILON, "R")
            self.w_query_RHd = kernel(rngs, (attention.query_rank, heads, config.head_dim), attention.query_rank, query_scale)
        else:
            self.w_query_DHd = kernel(rngs, (width, heads, config.head_dim), width, query_scale)
        rank = attention.latent_rank
        self.w_latent_DR = kernel(rngs, (width, rank), width, init)
        self.w_key_rope_Dd = kernel(rngs, (width, rope), width, init)
        self.latent_norm = RMSNorm(rank, _EPSILON, "R")
        self.w_key_RHd = kernel(rngs, (rank, heads, config.head_dim - rope), rank, init)
        self.w_value_RHd = kernel(rngs, (rank, heads, attention.value_dim), rank, init)
        self.w_out_HdD = kernel(rngs, (heads, attention.value_dim, width), heads * attention.value_dim, init)
        if attention.bias == "all":
            zeros = lambda size: nnx.Param(jnp.zeros(size, jnp.float32))
            self.b_latent_R, self.b_key_rope_d, self.b_out_D = zeros(rank), zeros(rope), zeros(width)
            if attention.query_rank:
                self.b_query_R = zeros(attention.query_rank)
        if attention.sinks:
            self.sink_H = nnx.Param(jnp.zeros(heads, jnp.float32))

    def __call__(self, x_BSD: jax.Array, positions_BS: jax.Array, mask_BST: jax.Array, cache: LayerCache | None = None,
                 index: jax.Array | int = 0, segment_ids_BS: jax.Array | None = None,
                 bias_BHST: None = None) -> tuple[jax.Array, LayerCache | None]:
        """As :meth:`moe_jax.nn.attention.Attention.__call__`; the cache is of latents ``[B, T, R]`` and keys ``[B, T, d]``.
        Positions are rotary, so there is no bias."""
        dtype = x_BSD.dtype
        query_BSHd = self._query(x_BSD, positions_BS)
        latent_BTR = latent_BSR = self.latent_norm(self._down(x_BSD, "latent_DR"))
        key_BTd = key_BSd = self._rotated(self._down(x_BSD, "key_rope_Dd")[:, :, None], positions_BS)[:, :, 0]
        if cache is not None:
            is_ring = self.layer.span != "full"
            latent_cache, latent_BTR = caches.written(cache[0], latent_BSR, index, is_ring)
            key_cache, key_BTd = caches.written(cache[1], key_BSd, index, is_ring)
            cache = (latent_cache, key_cache)
        if cache is not None and segment_ids_BS is None:
            out_BSHd = self._absorbed(query_BSHd, latent_BTR.astype(dtype), key_BTd.astype(dtype), mask_BST)
        else:
            here = (query_BSHd, *self._expanded(latent_BSR, key_BSd))
            out_BSHd = attended(self, here, here[1:], mask_BST, segment_ids_BS, self._scale, cache is None)
        return projected_out(self, out_BSHd), cache

    def empty_cache(self, batch: int, tokens: int, stacked: tuple[int, ...] = ()) -> LayerCache:
        """Zeros for so many tokens, ``[*stacked, B, T, R]`` and ``[*stacked, B, T, d]``, on the mesh in context."""
        slots, dtype = caches.slots_of(self.attention, self.layer.span, tokens), jnp.dtype(self.config.dtype)
        return (caches.empty("BTR", (batch, slots, self.attention.latent_rank), dtype, stacked),
                caches.empty("BTd", (batch, slots, self.attention.rope_dim), dtype, stacked))

    @property
    def _scale(self):
        attention = self.attention
        scale = self.config.head_dim**-0.5 if self.config.scaled_attention else 1.0
        if attention.rope_scaling != "yarn":
            return scale
        return scale * yarn_mscale(attention.rope_factor, attention.rope_mscale_all_dim) ** 2

    def _query(self, x_BSD, positions_BS):
        dtype, heads = x_BSD.dtype, spec("BSHd", ACTIVATIONS)
        if self.attention.query_rank:
            latent_BSR = self.query_norm(self._down(x_BSD, "query_DR"))
            query_BSHd = self._up(latent_BSR, self.w_query_RHd)
        else:
            query_BSHd = product(x_BSD, gathered(self.w_query_DHd[...], "DHd", dtype), "BSD,DHd->BSHd", heads)
        plain_BSHd, rope_BSHd = self._parts(query_BSHd)
        query_BSHd = jnp.concatenate([plain_BSHd, self._rotated(rope_BSHd, positions_BS)], axis=-1)
        if self.attention.temperature_scale and not self.layer.rotated:
            query_BSHd = query_BSHd * temperature(positions_BS, self.attention)[:, :, None, None].astype(dtype)
        return query_BSHd

    def _parts(self, y_BSHd):
        """The part of head_dim that is not rotated, and the one that is."""
        plain = self.config.head_dim - self.attention.rope_dim
        return y_BSHd[..., :plain], y_BSHd[..., plain:]

    def _rotated(self, y_BSHd, positions_BS):
        return rotate(y_BSHd, positions_BS, self.config.rope_theta, self.attention) if self.layer.rotated else y_BSHd

    def _down(self, x_BSD, name):
        """From the stream to a latent, or to the shared key; whole on every device along ``tensor``."""
        kind, letters = name.rsplit("_", 1)
        weight = gathered(getattr(self, f"w_{name}")[...], letters, x_BSD.dtype)
        y_BSR = product(x_BSD, weight, f"BSD,{letters}->BS{letters[1]}", P(TOKEN_AXES, None, None))
        if self.attention.bias == "none":
            return y_BSR
        return y_BSR + gathered(getattr(self, f"b_{kind}_{letters[1]}")[...], letters[1], x_BSD.dtype)[None, None]

    def _up(self, latent_BTR, weight_RHd):
        weight_RHd = gathered(weight_RHd[...], "RHd", latent_BTR.dtype)
        return product(latent_BTR, weight_RHd, "BTR,RHd->BTHd", spec("BTHd", ACTIVATIONS))

    def _expanded(self, latent_BTR, key_BTd):
        """Keys and values of every head."""
        key_BTHd, value_BTHd = self._up(latent_BTR, self.w_key_RHd), self._up(latent_BTR, self.w_value_RHd)
        # The shared key, a copy for each head, made where the head is: its gradient is added up there before it travels.
        shape = (*key_BTHd.shape[:3], key_BTd.shape[-1])
        rope_BTHd = jax.lax.broadcast_in_dim(key_BTd, shape, (0, 1, 3), out_sharding=spec("BTHd", ACTIVATIONS))
        return jnp.concatenate([key_BTHd, rope_BTHd], axis=-1), value_BTHd

    def _absorbed(self, query_BSHd, latent_BTR, key_BTd, mask_BST):
        """The same from latents: (q W_keyᵀ)·c + q_rope·k_rope, then (Σ weight · c) W_value."""
        dtype, heads = query_BSHd.dtype, spec("BSHR", ACTIVATIONS)
        plain_BSHd, rope_BSHd = self._parts(query_BSHd)
        key_RHd, value_RHd = (gathered(w[...], "RHd", dtype) for w in (self.w_key_RHd, self.w_value_RHd))
        query_BSHR = product(plain_BSHd, key_RHd, "BSHd,RHd->BSHR", heads)
        score_BHST = jnp.einsum("BSHR,BTR->BHST", query_BSHR, latent_BTR, preferred_element_type=jnp.float32)
        score_BHST += jnp.einsum("BSHd,BTd->BHST", rope_BSHd, key_BTd, preferred_element_type=jnp.float32)
        sink_H = self.sink_H[...] if self.attention.sinks else None
        weight_BHST = weigh(score_BHST, mask_BST, self._scale, sink_H).astype(dtype)
        mean_BSHR = jnp.einsum("BHST,BTR->BSHR", weight_BHST, latent_BTR)
        return product(mean_BSHR, value_RHd, "BSHR,RHd->BSHd", spec("BSHd", ACTIVATIONS))
