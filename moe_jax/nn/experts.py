"""E feed-forward networks side by side, written once for every dispatcher."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.dispatch.products import Products
from moe_jax.nn.activations import CLAMP, activation
from moe_jax.nn.initializers import kernel
from moe_jax.sharding import gathered


class Experts(nnx.Module):
    """The parameters of E experts. Each is drawn on its own: no two start equal (B47). Biases start at 0."""

    def __init__(self, num_experts: int, d_model: int, d_ff: int, activation_name: str, init_scale: float,
                 rngs: nnx.Rngs, bias: bool = False, clamp: tuple[float, float] = CLAMP):
        self.activation_name, self.bias, self.clamp = activation_name, bias, clamp
        for branch in activation(activation_name).branches:
            setattr(self, f"w_{branch}_EDF", kernel(rngs, (num_experts, d_model, d_ff), d_model, init_scale))
        self.w_out_EFD = kernel(rngs, (num_experts, d_ff, d_model), d_ff, init_scale)
        if bias:
            for branch in activation(activation_name).branches:
                setattr(self, f"b_{branch}_EF", nnx.Param(jnp.zeros((num_experts, d_ff), jnp.float32)))
            self.b_out_ED = nnx.Param(jnp.zeros((num_experts, d_model), jnp.float32))

    def weights(self, dtype: jnp.dtype) -> dict[str, jax.Array]:
        """The weights as they are used: compute dtype, complete along D, still one share of E per device."""
        branches = activation(self.activation_name).branches
        names = ["w_out_EFD", *(f"w_{branch}_EDF" for branch in branches)]
        if self.bias:
            names += ["b_out_ED", *(f"b_{branch}_EF" for branch in branches)]
        return {name: gathered(getattr(self, name)[...], name.rsplit("_", 1)[1], dtype) for name in names}

    def function(self, products: Products, weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        """Every row through its expert; see :mod:`moe_jax.dispatch.products` for the forms ``x`` may take.

        A slot without a token gives what the biases make of 0; no gate ever takes it up.
        """
        def affine(x, branch, letters):
            y = products.matmul(x, weights[f"w_{branch}_{letters}"], letters)
            bias = f"b_{branch}_E{letters[-1]}"
            return products.add(y, weights[bias], bias.rsplit("_", 1)[1]) if self.bias else y

        kind = activation(self.activation_name, self.clamp)
        h = kind.hidden(*(affine(x, branch, "EDF") for branch in kind.branches))
        return affine(h, "out", "EFD")


def split_interleaved(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``(gate, in)`` of a weight or bias whose last dimension holds their columns in turn, gate first.

    GPT-OSS's ``gate_up_proj [E, D, 2F]`` gives ``w_gate_EDF, w_in_EDF``, its bias ``[E, 2F]`` ``b_gate_EF, b_in_EF``.
    """
    return weight[..., ::2], weight[..., 1::2]


def interleaved(gate: jax.Array, linear: jax.Array) -> jax.Array:
    """The inverse of :func:`split_interleaved`."""
    return jnp.stack([gate, linear], axis=-1).reshape(*gate.shape[:-1], 2 * gate.shape[-1])
