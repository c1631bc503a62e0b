"""A decoder's attention to what its encoder made of the text it was given."""

import jax
from flax import nnx

from moe_jax.config import AttentionConfig, ModelConfig
from moe_jax.nn.attention import Attention, LayerCache, attend, projected_out


class CrossAttention(Attention):
    """:class:`Attention` with the options of the config and without positions, whose keys and values are an encoder's."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, attention: AttentionConfig):
        # What acts on unrotated queries and keys; "unscaled" norms are of rotated ones.
        qk_norm = "none" if attention.qk_norm == "unscaled" else attention.qk_norm
        acting = AttentionConfig(positions="none", bias=attention.bias, sinks=attention.sinks, clip_qkv=attention.clip_qkv,
                                 qk_norm=qk_norm)
        super().__init__(config, rngs, acting)

    def __call__(self, x_BSD: jax.Array, encoded_BTD: jax.Array | None, mask_BST: jax.Array,
                 cache: LayerCache | None = None) -> tuple[jax.Array, LayerCache | None]:
        """Attends from S tokens of the decoder to T of the encoder.

        Args:
          encoded_BTD: the encoder's output; None: its keys and values are in the cache.
          mask_BST: bool, True where token s may see the encoder's token t.

        Returns:
          [B, S, D], and with a cache the keys and values, [B, T, H_kv, d] each.
        """
        query_BSHd = self._query_or_key(x_BSD, None, "query")
        if encoded_BTD is None:
            key_BTHd, value_BTHd = (part.astype(x_BSD.dtype) for part in cache)
        else:
            key_BTHd = self._query_or_key(encoded_BTD, None, "key")
            value_BTHd = self._clipped(self._projected(encoded_BTD, "value"))
        if cache is not None:
            cache = key_BTHd.astype(cache[0].dtype), value_BTHd.astype(cache[1].dtype)
        sink_H = self.sink_H[...] if self.attention.sinks else None
        scale = self.config.head_dim**-0.5 if self.config.scaled_attention else 1.0
        return projected_out(self, attend(query_BSHd, key_BTHd, value_BTHd, mask_BST, scale, sink_H)), cache
