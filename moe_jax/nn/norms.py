"""Normalisation, computed in fp32."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig


class RMSNorm(nnx.Module):
    """x / rms(x) · scale (Zhang & Sennrich 2019), over one dimension, or over all of ``letters``: ``Hd``, heads together."""

    def __init__(self, width: int | tuple[int, ...], epsilon: float, letters: str = "D"):
        self.letters, self.epsilon = letters, epsilon
        setattr(self, f"scale_{letters}", nnx.Param(jnp.ones(width, jnp.float32)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., D]`` to the same shape and dtype."""
        scale_D = getattr(self, f"scale_{self.letters}")[...]
        normalised = _unit_mean_square(x.astype(jnp.float32), self.epsilon, len(self.letters))
        return (normalised * scale_D.reshape((1,) * (x.ndim - scale_D.ndim) + scale_D.shape)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x − mean) / √(variance + epsilon) · scale + bias (Ba et al. 2016)."""

    def __init__(self, width: int, epsilon: float):
        self.epsilon = epsilon
        self.scale_D = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias_D = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., D]`` to the same shape and dtype."""
        x_fp32 = x.astype(jnp.float32)
        centred = _unit_mean_square(x_fp32 - jnp.mean(x_fp32, axis=-1, keepdims=True), self.epsilon)
        lead = (1,) * (x.ndim - 1)
        scale_D, bias_D = self.scale_D[...], self.bias_D[...]
        return (centred * scale_D.reshape(*lead, -1) + bias_D.reshape(*lead, -1)).astype(x.dtype)


def norm(model: ModelConfig) -> RMSNorm | LayerNorm:
    """The norm of the residual stream that ``model.norm`` names."""
    return {"rms": RMSNorm, "layer": LayerNorm}[model.norm](model.d_model, model.norm_epsilon)


def unscaled(x: jax.Array, epsilon: float) -> jax.Array:
    """x / rms(x) over the last dimension, without weights."""
    return _unit_mean_square(x.astype(jnp.float32), epsilon).astype(x.dtype)


def _unit_mean_square(x_fp32, epsilon, dimensions=1):
    """Over the last ``dimensions``."""
    mean_square = jnp.mean(x_fp32**2, axis=tuple(range(-dimensions, 0)), keepdims=True)
    return x_fp32 * jax.lax.rsqrt(mean_square + epsilon)
