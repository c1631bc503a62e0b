"""A long short-term memory layer (Hochreiter & Schmidhuber 1997, with forget gates), over packed documents."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import ModelConfig
from moe_jax.nn.initializers import kernel
from moe_jax.product import product
from moe_jax.sharding import ACTIVATIONS, gathered, spec

# What the cell remembers after a token: output h and memory c, each fp32 [B, F].
LSTMState = tuple[jax.Array, jax.Array]

# The forget gates start open, so that the memory, and the gradient through it, lasts (Jozefowicz et al. 2015).
_FORGET_BIAS = 1.0


class LSTM(nnx.Module):
    """c' = σ(f)·c + σ(i)·tanh(g); h' = σ(o)·tanh(c'), where (i, f, g, o) = x·W + h·U + b.

    As many units as the model is wide. Letters: Q the four gates, F units, which lie on ``tensor``.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width = config.d_model
        self.w_input_DQF = kernel(rngs, (width, 4, width), width, config.init_scale)
        self.w_recurrent_DQF = kernel(rngs, (width, 4, width), width, config.init_scale)
        self.b_QF = nnx.Param(jnp.zeros((4, width), jnp.float32).at[1].set(_FORGET_BIAS))

    def __call__(self, x_BSD: jax.Array, starts_BS: jax.Array, state: LSTMState | None = None) -> tuple[jax.Array, LSTMState]:
        """Reads S tokens, one after the other.

        Args:
          starts_BS: True where a document starts: nothing of what came before is remembered.
          state: after the token before the first; None: nothing.

        Returns:
          The outputs, ``[B, S, D]``, and the state after the last token.
        """
        dtype = x_BSD.dtype
        # The inputs' products of all tokens at once; time leads from here on.
        weight_DQF = gathered(self.w_input_DQF[...], "DQF", dtype)
        z_SBQF = product(x_BSD, weight_DQF, "BSD,DQF->SBQF", spec("SBQF", ACTIVATIONS), jnp.float32)
        z_SBQF = z_SBQF + gathered(self.b_QF[...], "QF", jnp.float32)[None, None]
        if state is None:
            state = empty_state(x_BSD.shape[0], x_BSD.shape[2])
        keep_SB = (~starts_BS).T.astype(jnp.float32)
        h_SBF, state = _recurrence(z_SBQF, gathered(self.w_recurrent_DQF[...], "DQF", dtype), keep_SB, state)
        # [S, B, F_tensor] -> all-gather -> [B, S, D]
        return jax.reshard(jnp.swapaxes(h_SBF, 0, 1).astype(dtype), spec("BSD", ACTIVATIONS)), state


def empty_state(batch: int, width: int) -> LSTMState:
    """The state before any token, zeros, where the batch lies."""
    zeros_BF = jnp.zeros((batch, width), jnp.float32, out_sharding=spec("BF", ACTIVATIONS))
    return zeros_BF, zeros_BF


# The recurrence has a gradient of its own: JAX's would add up that of the weights token by token, reading and writing all
# of them each time, and on several devices exchange them each time. So they are one product over all tokens at the end.


@jax.custom_vjp
def _recurrence(z_SBQF, weight_DQF, keep_SB, state):
    h_SBF, state, _ = _forward_scan(z_SBQF, weight_DQF, keep_SB, state)
    return h_SBF, state


def _forward_scan(z_SBQF, weight_DQF, keep_SB, state):
    def step(state, scanned):
        z_BQF, keep_B = scanned
        h_BF, c_BF = (part_BF * keep_B[:, None] for part_BF in state)
        z_BQF = z_BQF + _recurrent(h_BF, weight_DQF)
        gates_BQF = _activated(z_BQF)
        i_BF, f_BF, g_BF, o_BF = _four(gates_BQF)
        new_c_BF = f_BF * c_BF + i_BF * g_BF
        new_h_BF = o_BF * jnp.tanh(new_c_BF)
        return (new_h_BF, new_c_BF), (new_h_BF, gates_BQF, h_BF, c_BF, new_c_BF)

    state, (h_SBF, *kept) = jax.lax.scan(step, state, (z_SBQF, keep_SB))
    return h_SBF, state, kept


def _recurrence_forward(z_SBQF, weight_DQF, keep_SB, state):
    h_SBF, state, kept = _forward_scan(z_SBQF, weight_DQF, keep_SB, state)
    return (h_SBF, state), (weight_DQF, keep_SB, kept)


def _recurrence_backward(residuals, d):
    weight_DQF, keep_SB, (gates_SBQF, before_SBF, c_before_SBF, c_SBF) = residuals
    d_h_SBF, d_state = d

    def step(d_state, scanned):
        d_h_BF, gates_BQF, keep_B, c_before_BF, c_BF = scanned
        i_BF, f_BF, g_BF, o_BF = _four(gates_BQF)
        d_h_BF, tanh_BF = d_h_BF + d_state[0], jnp.tanh(c_BF)
        d_c_BF = d_state[1] + d_h_BF * o_BF * (1 - tanh_BF**2)
        # By gate: the gradient of its value times the slope of its sigmoid or tanh.
        d_z_BQF = jnp.stack([d_c_BF * g_BF * i_BF * (1 - i_BF), d_c_BF * c_before_BF * f_BF * (1 - f_BF),
                             d_c_BF * i_BF * (1 - g_BF**2), d_h_BF * tanh_BF * o_BF * (1 - o_BF)], axis=1)
        # Sums over the units of all devices, of which each keeps its own: reduce-scatter over tensor.
        d_before_BF = jnp.einsum("BQF,DQF->BD", d_z_BQF.astype(weight_DQF.dtype), weight_DQF,
                                 out_sharding=spec("BF", ACTIVATIONS), preferred_element_type=jnp.float32)
        return (d_before_BF * keep_B[:, None], d_c_BF * f_BF * keep_B[:, None]), d_z_BQF

    scanned = (d_h_SBF, gates_SBQF, keep_SB, c_before_SBF, c_SBF)
    d_state, d_z_SBQF = jax.lax.scan(step, d_state, scanned, reverse=True)
    dtype = weight_DQF.dtype
    before_SBD = jax.reshard(before_SBF, spec("SBD", ACTIVATIONS)).astype(dtype)
    d_weight_DQF = jnp.einsum("SBD,SBQF->DQF", before_SBD, d_z_SBQF.astype(dtype), out_sharding=spec("DQF", ACTIVATIONS),
                              preferred_element_type=jnp.float32)
    return d_z_SBQF, d_weight_DQF.astype(dtype), jnp.zeros_like(keep_SB), d_state


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def _recurrent(h_BF, weight_DQF):
    # [B, F_tensor] -> all-gather -> [B, D]: every unit sees all outputs.
    h_BD = jax.reshard(h_BF.astype(weight_DQF.dtype), spec("BD", ACTIVATIONS))
    return jnp.einsum("BD,DQF->BQF", h_BD, weight_DQF, out_sharding=spec("BQF", ACTIVATIONS),
                      preferred_element_type=jnp.float32)


def _activated(z_BQF):
    """Sigmoid of the gates i, f, o; tanh of g."""
    is_g_1Q1 = (jnp.arange(4) == 2)[None, :, None]
    return jnp.where(is_g_1Q1, jnp.tanh(z_BQF), jax.nn.sigmoid(z_BQF))


def _four(gates_BQF):
    return tuple(gates_BQF[:, q] for q in range(4))
