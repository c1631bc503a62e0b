"""Keys and values of earlier tokens, and which of them a layer's queries see.

A layer that sees everything has a slot for every token. One that sees a window or a chunk keeps the last R tokens in a ring:
token i in slot i mod R, over token i − R, which nobody sees any more. Tokens are counted alike in all rows of a batch,
padding on the left included; a row's positions start where its text does. Arrays are ``[B, T, ...]``: keys and values of
heads, or latents.
"""

import jax
import jax.numpy as jnp

from moe_jax.config import AttentionConfig
from moe_jax.sharding import ACTIVATIONS, spec


def reach(attention: AttentionConfig, span: str) -> int:
    """How many tokens a query of such layers sees at most, itself included; 0: any number."""
    return {"full": 0, "sliding": attention.window, "chunked": attention.chunk}[span]


def slots_of(attention: AttentionConfig, span: str, tokens: int) -> int:
    """How many slots such layers have for ``tokens`` tokens."""
    return min(reach(attention, span) or tokens, tokens)


def written(cache: jax.Array, new: jax.Array, index: jax.Array | int, is_ring: bool) -> tuple[jax.Array, jax.Array]:
    """The cache with ``new`` ``[B, S, ...]`` in it, tokens ``index`` … ``index + S − 1``; and the keys (or values) that their
    queries are shown: those of :func:`shown_tokens`."""
    new = new.astype(cache.dtype)
    length = new.shape[1]
    if not is_ring:
        cache = jax.lax.dynamic_update_slice_in_dim(cache, new, index, axis=1)
        return cache, cache
    size = cache.shape[1]
    if length == 1:
        cache = jax.lax.dynamic_update_slice_in_dim(cache, new, index % size, axis=1)
        return cache, cache
    shown = new if _is_start(index) else jnp.concatenate([cache, new], axis=1)
    token_R = _ring_tokens(index + length - 1, size)
    latest = jnp.take(new, jnp.clip(token_R - index, 0, length - 1), axis=1, mode="clip")
    is_new_R = (token_R >= index).reshape(-1, *(1,) * (new.ndim - 2))
    return jnp.where(is_new_R[None], latest, cache), shown


def shown_tokens(size: int, length: int, index: jax.Array | int) -> jax.Array:
    """The tokens, ``[T]``, whose keys :func:`written` shows to the queries of tokens ``index`` … ``index + length − 1``, of a
    ring of ``size`` slots; below 0: none. Several at once are shown what the ring held before them and their own keys."""
    if length == 1:
        return _ring_tokens(index, size)
    own_S = index + jnp.arange(length)
    if _is_start(index):
        return own_S
    return jnp.concatenate([_ring_tokens(index - 1, size), own_S])


def limited_mask(attention: AttentionConfig, span: str, positions_BS: jax.Array, segment_ids_BS: jax.Array,
                 key_segment_ids_BT: jax.Array, valid_BS: jax.Array, index: jax.Array | int = 0,
                 cached: bool = False) -> jax.Array:
    """Where queries of sliding or chunked layers may see keys, bool ``[B, S, T]``: in their own segment, no later than
    themselves, and within :func:`reach`.

    Args:
      key_segment_ids_BT: of all tokens so far, in their order, 0 where there is none.
      index: the token that the first query is.
      cached: keys are those of :func:`shown_tokens`; else there is one for each of T.
    """
    tokens, length = key_segment_ids_BT.shape[1], segment_ids_BS.shape[1]
    query_S = index + jnp.arange(length)
    key_T = shown_tokens(slots_of(attention, span, tokens), length, index) if cached else jnp.arange(tokens)
    if cached:
        # [B, all tokens] -> [B, T]
        key_segment_ids_BT = jnp.take(key_segment_ids_BT, jnp.clip(key_T, 0, tokens - 1), axis=1, mode="clip")
    distance_ST = query_S[:, None] - key_T[None, :]
    same_BST = segment_ids_BS[:, :, None] == key_segment_ids_BT[:, None, :]
    if span == "sliding":
        near_BST = (distance_ST < attention.window)[None]
    else:
        # In a segment positions are consecutive, so the key's is as far from the query's as its place.
        key_positions_BST = positions_BS[:, :, None] - distance_ST[None]
        near_BST = key_positions_BST // attention.chunk == positions_BS[:, :, None] // attention.chunk
    return same_BST & near_BST & (distance_ST >= 0)[None] & (key_T >= 0)[None, None, :] & valid_BS[:, :, None]


def empty(letters: str, shape: tuple[int, ...], dtype: jnp.dtype, stacked: tuple[int, ...] = ()) -> jax.Array:
    """Zeros ``[*stacked, *shape]``, where activations of these letters lie on the mesh in context."""
    return jax.reshard(jnp.zeros((*stacked, *shape), dtype), jax.P(*(None,) * len(stacked), *spec(letters, ACTIVATIONS)))


def _is_start(index):
    """Whether it is known, where the program is made, that there is nothing before."""
    return isinstance(index, int) and index == 0


def _ring_tokens(last, size):
    """The token in each slot of a ring once ``last`` is written, ``[R]``; below 0: none."""
    return last - (last - jnp.arange(size)) % size
