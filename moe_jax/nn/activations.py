"""What a feed-forward network does between its products: from products of its input to its hidden layer.

A plain activation has one input matrix, a gated one multiplies act(gate) with a second product (Shazeer 2020). Dense
networks (``nn/mlp.py``) and experts (``nn/experts.py``) take them by the same names.
"""

import dataclasses
import functools
from typing import Callable

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Activation:
    """``branches`` name the input matrices ``w_<branch>`` and biases ``b_<branch>``; ``hidden`` takes their products of
    the input in this order and gives the hidden layer, element by element."""

    branches: tuple[str, ...]
    hidden: Callable[..., jax.Array]

    @property
    def matrices(self) -> int:
        """Of the whole network: input matrices and the output matrix."""
        return len(self.branches) + 1


# (limit, alpha) of GPT-OSS: beyond the limit it cuts gates (above) and the linear branch (both sides); its sigmoid has the
# steepness of GELU's.
CLAMP = (7.0, 1.702)


def clamped_swiglu(gate: jax.Array, linear: jax.Array, limit: float = CLAMP[0], alpha: float = CLAMP[1]) -> jax.Array:
    """(u + 1) · g · σ(αg) with g = min(gate, limit), u = linear cut to ±limit (GPT-OSS; g is not cut below)."""
    gate = jnp.minimum(gate, limit)
    return (jnp.clip(linear, -limit, limit) + 1) * gate * jax.nn.sigmoid(alpha * gate)


def relu_squared(x: jax.Array) -> jax.Array:
    """max(x, 0)² (So et al. 2021, Primer)."""
    return jnp.square(jax.nn.relu(x))


gelu_exact = functools.partial(jax.nn.gelu, approximate=False)
gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)


def _plain(act: Callable[[jax.Array], jax.Array]) -> Activation:
    return Activation(("in",), act)


def _gated(act: Callable[[jax.Array], jax.Array]) -> Activation:
    return Activation(("gate", "in"), lambda gate, linear: act(gate) * linear)


# The names are those of moe_jax.config.ACTIVATIONS.
_ACTIVATIONS = {
    "relu": _plain(jax.nn.relu),
    "relu_squared": _plain(relu_squared),
    "gelu": _plain(gelu_tanh),  # as flaxformer, V-MoE and GPT-2
    "gelu_exact": _plain(gelu_exact),  # with erf, as Hendrycks & Gimpel 2016 and PyTorch's default
    "silu": _plain(jax.nn.silu),
    "swiglu": _gated(jax.nn.silu),
    "geglu": _gated(gelu_tanh),
    "geglu_exact": _gated(gelu_exact),
    "reglu": _gated(jax.nn.relu),
    "glu": _gated(jax.nn.sigmoid),
    "bilinear": _gated(lambda gate: gate),
    "swiglu_clamped": Activation(("gate", "in"), clamped_swiglu),
    # OpenMoE's ('swiglu', 'linear'): flaxformer's swiglu halves a product of width 2F, a · silu(b), and the whole is
    # gated once more.
    "swiglu_linear": Activation(("linear", "gate", "in"), lambda a, b, linear: a * jax.nn.silu(b) * linear),
}


def activation(name: str, clamp: tuple[float, float] = CLAMP) -> Activation:
    """By its name in the config; ``clamp``: limit and alpha of ``swiglu_clamped`` (:func:`clamped_swiglu`)."""
    kind = _ACTIVATIONS[name]
    if kind.hidden is clamped_swiglu:
        return dataclasses.replace(kind, hidden=functools.partial(clamped_swiglu, limit=clamp[0], alpha=clamp[1]))
    return kind
