"""Multi-token prediction (DeepSeek-V3 §2.2): the token after the next, and further ones, each by a block of its own."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.nn.initializers import kernel
from moe_jax.nn.norms import norm
from moe_jax.product import product
from moe_jax.sharding import ACTIVATIONS, gathered, spec


def ahead(values_BS: jax.Array, places: int) -> jax.Array:
    """What stands so many places later in the row; 0 or False past its end."""
    return jnp.pad(values_BS[:, places:], ((0, 0), (0, places)))


def sees_ahead(segment_ids_BS: jax.Array, valid_BS: jax.Array, places: int) -> jax.Array:
    """Where so many places later there is a token of the same document, bool ``[B, S]``."""
    return valid_BS & ahead(valid_BS, places) & (segment_ids_BS == ahead(segment_ids_BS, places))


class FurtherToken(nnx.Module):
    """One depth: h' = M[RMSNorm(h); RMSNorm(Emb(the token just predicted))], a transformer block, a norm for the shared output
    layer (eq. 21–23). Embedding and output layer are the model's; the last norm is this depth's own, as in the released
    weights.

    ``w_join_JDO``: M, its J = 2 halves for the state and for the embedding; O = D.
    """

    def __init__(self, model: ModelConfig, block: nnx.Module, rngs: nnx.Rngs):
        width = model.d_model
        self.state_norm, self.token_norm = norm(model), norm(model)
        self.w_join_JDO = kernel(rngs, (2, width, width), 2 * width, model.init_scale)
        self.block = block
        self.final_norm = norm(model)

    def join(self, x_BSD: jax.Array, token_BSD: jax.Array) -> jax.Array:
        """The block's input, of the stream so far, before its last norm, and the embeddings of the tokens that follow."""
        w_JDO = gathered(self.w_join_JDO[...], "JDO", x_BSD.dtype)
        halves = (self.state_norm(x_BSD), w_JDO[0]), (self.token_norm(token_BSD), w_JDO[1])
        state_BSD, token_BSD = (product(y_BSD, w_DO, "BSD,DO->BSO", spec("BSD", ACTIVATIONS)) for y_BSD, w_DO in halves)
        return state_BSD + token_BSD
