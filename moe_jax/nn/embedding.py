"""Token ids to vectors and vectors to logits."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.nn.initializers import kernel, normal
from moe_jax.product import product
from moe_jax.sharding import ACTIVATIONS, gathered, spec


class Embedding(nnx.Module):
    """The table, and the output layer (the same table if tied)."""

    def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
        self.config = config
        self.embedding_VD = normal(rngs, (vocab_size, config.d_model), config.embedding_init)
        if not config.tie_embedding:
            self.w_logits_DV = kernel(rngs, (config.d_model, vocab_size), config.d_model, 1.0)

    def encode(self, ids_BS: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """[B, S] ids to [B, S, D]. The table is gathered whole: rows are picked where the tokens are."""
        table_VD = jax.reshard(self.embedding_VD[...].astype(dtype), spec("VD", {}))
        x_BSD = table_VD.at[ids_BS].get(out_sharding=spec("BSD", ACTIVATIONS))
        return x_BSD * self.config.d_model**0.5 if self.config.embedding_scale else x_BSD

    def decode(self, x_BSD: jax.Array) -> jax.Array:
        """[B, S, D] to fp32 logits [B, S, V]. Tied: scaled by 1/√D, since the table's rows are not small, unless
        ``model.scaled_tied_logits=False``."""
        if self.config.tie_embedding:
            weight_VD = gathered(self.embedding_VD[...], "VD", x_BSD.dtype)
            logits_BSV = product(x_BSD, weight_VD, "BSD,VD->BSV", spec("BSV", ACTIVATIONS), jnp.float32)
            return logits_BSV * self.config.d_model**-0.5 if self.config.scaled_tied_logits else logits_BSV
        weight_DV = gathered(self.w_logits_DV[...], "DV", x_BSD.dtype)
        return product(x_BSD, weight_DV, "BSD,DV->BSV", spec("BSV", ACTIVATIONS), jnp.float32)
