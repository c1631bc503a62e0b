"""Causal self-attention with grouped key/value heads and rotary positions."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ConfigError, ModelConfig
from moe_jax.nn.initializers import kernel
from moe_jax.nn.positions import rotate
from moe_jax.nn.splash import splash, unfit
from moe_jax.product import product
from moe_jax.sharding import ACTIVATIONS, gathered, lowering_platform, spec

# Score of a key that may not be seen: exp() of it is 0, and unlike minus infinity it leaves no NaN behind.
_HIDDEN = -1e30

# One layer's keys and values, each [B, T, H_kv, d]; T slots of which the mask tells which are filled.
LayerCache = tuple[jax.Array, jax.Array]


class Attention(nnx.Module):
    """softmax(q·k/√d) v, or softmax(q·k) v (``model.scaled_attention=False``); query head h uses key/value head
    h // (H / H_kv) (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        width, heads, kv_heads, head = config.d_model, config.num_heads, config.num_kv_heads, config.head_dim
        # Scores that are not divided by √d start as small as if they were: the queries are (Raffel et al. 2020).
        query_scale = config.init_scale if config.scaled_attention else config.init_scale / head
        self.w_query_DHd = kernel(rngs, (width, heads, head), width, query_scale)
        self.w_key_DHd = kernel(rngs, (width, kv_heads, head), width, config.init_scale)
        self.w_value_DHd = kernel(rngs, (width, kv_heads, head), width, config.init_scale)
        self.w_out_HdD = kernel(rngs, (heads, head, width), heads * head, config.init_scale)

    def __call__(self, x_BSD: jax.Array, positions_BS: jax.Array, mask_BST: jax.Array,
                 cache: LayerCache | None = None, index: jax.Array | int = 0,
                 segment_ids_BS: jax.Array | None = None) -> tuple[jax.Array, LayerCache | None]:
        """Attends from S queries to T keys.

        Args:
          mask_BST: bool, True where query s may see key t.
          cache: keys and values of earlier calls; this call's are written from slot ``index`` on. Without it T = S.
          segment_ids_BS: where queries see keys of this call only, and the mask says no more than "the same segment, and not
            later", the segments (0 = padding); a kernel may then be used. None: the mask is something else.

        Returns:
          [B, S, D], and the cache with this call's keys and values in it.
        """
        dtype, config = x_BSD.dtype, self.config
        heads = spec("BSHd", ACTIVATIONS)

        def project(weight):
            return product(x_BSD, gathered(weight[...], "DHd", dtype), "BSD,DHd->BSHd", heads)

        query_BSHd = rotate(project(self.w_query_DHd), positions_BS, config.rope_theta)
        key_BTHd = key_BSHd = rotate(project(self.w_key_DHd), positions_BS, config.rope_theta)
        value_BTHd = value_BSHd = project(self.w_value_DHd)
        if cache is not None:
            key_BTHd = jax.lax.dynamic_update_slice_in_dim(cache[0], key_BTHd.astype(cache[0].dtype), index, axis=1)
            value_BTHd = jax.lax.dynamic_update_slice_in_dim(cache[1], value_BTHd.astype(cache[1].dtype), index, axis=1)
            cache = (key_BTHd, value_BTHd)
        scale = config.head_dim**-0.5 if config.scaled_attention else 1.0
        if segment_ids_BS is None:
            out_BSHd = _attend(query_BSHd, key_BTHd.astype(dtype), value_BTHd.astype(dtype), mask_BST, scale)
        elif uses_splash(config, x_BSD.shape[1], required=cache is None):
            out_BSHd = splash(query_BSHd, key_BSHd, value_BSHd, segment_ids_BS, scale)
        else:
            out_BSHd = _attend(query_BSHd, key_BSHd, value_BSHd, mask_BST[:, :, : x_BSD.shape[1]], scale)
        y_BSD = product(out_BSHd, gathered(self.w_out_HdD[...], "HdD", dtype), "BSHd,HdD->BSD",
                        spec("BSD", ACTIVATIONS))
        return y_BSD, cache


def uses_splash(config: ModelConfig, length: int, required: bool = True) -> bool:
    """Whether self-attention over ``length`` tokens runs by the kernel, in the program that is being traced.

    Args:
      required: refuse where model.attention='splash' cannot be. Not of prompts, which have any length.

    Raises:
      ConfigError: it cannot.
    """
    if config.attention == "plain":
        return False
    why = unfit(length, config.head_dim, lowering_platform())
    if why and required and config.attention == "splash":
        raise ConfigError(f"model.attention='splash': {why}; 'auto' then takes the plain one.")
    return not why


def _attend(query_BSHd, key_BTHd, value_BTHd, mask_BST, scale):
    """Plain attention; scores and softmax in fp32. A query that may see nothing (padding) gets a mean, not NaN."""
    batch, queries, num_heads, head = query_BSHd.shape
    kv_heads = key_BTHd.shape[2]
    # Heads first: with the batch dimensions of a product in front, XLA on CPU needs no transposed copies (4x faster
    # forward and backward). Key/value head h serves queries h·g … h·g+g-1.
    query_BHgSd = jnp.swapaxes(query_BSHd, 1, 2).reshape(batch, kv_heads, num_heads // kv_heads, queries, head)
    key_BHTd, value_BHTd = jnp.swapaxes(key_BTHd, 1, 2), jnp.swapaxes(value_BTHd, 1, 2)
    score_BHgST = jnp.einsum("BHgSd,BHTd->BHgST", query_BHgSd, key_BHTd, preferred_element_type=jnp.float32)
    # Added, which leaves nothing of the score: a query that sees nothing weighs all keys alike and, as in other codes
    # (OpenMoE's routes such queries), has a gradient.
    score_BHgST = score_BHgST * scale + jnp.where(mask_BST, 0.0, _HIDDEN)[:, None, None]
    weight_BHgST = jax.nn.softmax(score_BHgST, axis=-1).astype(value_BHTd.dtype)
    out_BHgSd = jnp.einsum("BHgST,BHTd->BHgSd", weight_BHgST, value_BHTd)
    return jnp.swapaxes(out_BHgSd.reshape(batch, num_heads, queries, head), 1, 2)
