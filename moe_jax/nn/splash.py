"""Attention by JAX's Pallas kernel for TPUs, which never holds the scores of a whole sequence ("splash": Dao et al. 2022's
algorithm, masked blocks skipped)."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from moe_jax.config import AttentionConfig
from moe_jax.sharding import TOKEN_AXES

# The kernel's lanes: lengths are multiples of it.
_LANES = 128

# What it may take at a time, largest first.
_BLOCKS = (512, 256, 128)


def unfit(length: int, head_dim: int, platform: str, attention: AttentionConfig = AttentionConfig(), span: str = "full") -> str:
    """Why the kernel cannot serve queries and keys of ``length`` tokens in such layers there, or ''."""
    if platform != "tpu":
        return f"it runs on tpu, and this program is compiled for {platform}"
    if length % _LANES:
        return f"it takes lengths that are multiples of {_LANES}, and this one is {length}"
    if head_dim % 64:
        return f"it takes heads whose width is a multiple of 64, and model.head_dim is {head_dim}"
    if attention.kind == "latent" and attention.value_dim % 64:
        return f"it takes values whose width is a multiple of 64, and attention.value_dim is {attention.value_dim}"
    if span == "chunked":
        return "it counts places in a row, and the chunks of attention.layers are of positions in a document"
    if attention.positions == "relative":
        return "it adds nothing to scores, and attention.positions is 'relative'"
    return ""


def splash(query_BSHd: jax.Array, key_BSHd: jax.Array, value_BSHd: jax.Array, segment_ids_BS: jax.Array, scale: float,
           interpret: bool = False, window: int = 0, sink_H: jax.Array | None = None) -> jax.Array:
    """Causal attention inside segments, ``softmax(scale · q·k) v``; each device its own sequences and heads.

    Equal to the plain one wherever a token is. Padding (segment 0) sees padding, and what it computes nobody may use.

    Args:
      key_BSHd, value_BSHd: may have fewer heads: query head h uses key/value head h // (H / H_kv). Values may be of another
        width.
      window: keys that a query sees, itself included; 0: all.
      sink_H: a logit per head that takes part in the softmax and has no value.
      interpret: run the kernel's steps one by one, on any platform; for tests.

    Returns:
      [B, S, H, d]
    """
    heads, rows = P(TOKEN_AXES, None, "tensor"), P(TOKEN_AXES)

    def local(query_bShd, key_bShd, value_bShd, segment_ids_bS, *sink):
        kernel = _kernel(query_bShd.shape[2], query_bShd.shape[1], interpret, window, *sink)
        # Heads first; the kernel does not scale.
        query_bhSd = jnp.swapaxes(query_bShd.astype(jnp.float32) * scale, 1, 2).astype(query_bShd.dtype)
        out_bhSd = jax.vmap(kernel)(query_bhSd, jnp.swapaxes(key_bShd, 1, 2), jnp.swapaxes(value_bShd, 1, 2),
                                    segment_ids_bS)
        return jnp.swapaxes(out_bhSd, 1, 2)

    # Pallas kernels do not say on which devices their results differ (check_vma); here on all, nothing is replicated.
    given = [*(jax.reshard(x, heads) for x in (query_BSHd, key_BSHd, value_BSHd)), jax.reshard(segment_ids_BS, rows)]
    sinks = () if sink_H is None else (P("tensor"),)
    given += [jax.reshard(sink_H.astype(jnp.float32), where) for where in sinks]
    return jax.shard_map(local, in_specs=(heads, heads, heads, rows, *sinks), out_specs=heads, check_vma=False)(*given)


def block_of(length: int) -> int:
    """Queries, and keys, that the kernel takes at a time."""
    return next(size for size in _BLOCKS if length % size == 0)


def _kernel(heads, length, interpret, window=0, sink_h=None):
    """``(q_HSd, k_hSd, v_hSd, segment_ids_S) -> out_HSd`` with its gradient."""
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq",
             "block_kv_dq")
    shape = (length, length)
    one = library.LocalMask(shape, (window - 1, 0), offset=0) if window else library.CausalMask(shape)
    mask = library.MultiHeadMask([one for _ in range(heads)])
    kernel = library.make_splash_mha(mask, head_shards=1, q_seq_shards=1, interpret=interpret,
                                     block_sizes=library.BlockSizes(**dict.fromkeys(names, block_of(length))))
    return lambda q, k, v, ids: kernel(q, k, v, library.SegmentIds(q=ids, kv=ids), sinks=sink_h)
