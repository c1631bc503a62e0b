"""The dense feed-forward network."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.nn.activations import CLAMP, activation
from moe_jax.nn.initializers import kernel
from moe_jax.product import product
from moe_jax.sharding import ACTIVATIONS, gathered, spec


class MLP(nnx.Module):
    """act(x W_gate) · (x W_in) W_out, or act(x W_in) W_out for a plain activation; ``bias`` adds one to each."""

    def __init__(self, d_model: int, d_ff: int, activation_name: str, init_scale: float, rngs: nnx.Rngs,
                 bias: bool = False, clamp: tuple[float, float] = CLAMP):
        self.activation_name, self.bias, self.clamp = activation_name, bias, clamp
        for branch in activation(activation_name).branches:
            setattr(self, f"w_{branch}_DF", kernel(rngs, (d_model, d_ff), d_model, init_scale))
        self.w_out_FD = kernel(rngs, (d_ff, d_model), d_ff, init_scale)
        if bias:
            for branch in activation(activation_name).branches:
                setattr(self, f"b_{branch}_F", nnx.Param(jnp.zeros(d_ff, jnp.float32)))
            self.b_out_D = nnx.Param(jnp.zeros(d_model, jnp.float32))

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        """[B, S, D] to the same shape; F lies on ``tensor``, whose partial sums the second product adds up."""
        kind = activation(self.activation_name, self.clamp)
        h_BSF = kind.hidden(*(self._product(x_BSD, branch, "DF") for branch in kind.branches))
        return self._product(h_BSF, "out", "FD")

    def _product(self, x_BSD, branch, letters):
        inner, outer = letters
        weight = gathered(getattr(self, f"w_{branch}_{letters}")[...], letters, x_BSD.dtype)
        y_BSF = product(x_BSD, weight, f"BS{inner},{letters}->BS{outer}", spec(f"BS{outer}", ACTIVATIONS))
        if not self.bias:
            return y_BSF
        return y_BSF + gathered(getattr(self, f"b_{branch}_{outer}")[...], outer, x_BSD.dtype)[None, None, :]
