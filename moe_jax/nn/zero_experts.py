"""Experts without a feed-forward network: a token may choose to be left as it is, or not to be touched (MoE++)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import Config
from moe_jax.nn.initializers import kernel, normal
from moe_jax.routing.assignment import Routing
from moe_jax.sharding import over_groups

_EXACT = jax.lax.Precision.HIGHEST


class ZeroComputationExperts(nnx.Module):
    """Identity experts give x (LongCat-Flash; MoE++ "copy"), zero experts nothing, constant experts α1·x + α2·v with
    (α1, α2) = softmax(x·W) and a learned v (Jin et al. 2024, "MoE++": zero, copy and constant experts).

    They stand behind the feed-forward experts in the router's list, in this order. Their work is done where the token
    lies: it is never sent anywhere, takes no slot, and nobody is dropped. J counts these experts, or the constant ones.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.moe, width = config.moe, config.model.d_model
        if self.moe.num_constant_experts:
            self.w_constant_DJA = kernel(rngs, (width, self.moe.num_constant_experts, 2), width, config.model.init_scale)
            self.constant_JD = normal(rngs, (self.moe.num_constant_experts, width), 1.0)

    def __call__(self, x_GTD: jax.Array, routing_G: Routing) -> jax.Array:
        """Σ gate · expert(x) over the assignments to these experts, [G, T, D] in x's dtype; summed in fp32."""
        moe, x = self.moe, x_GTD.astype(jnp.float32)
        gate_GTJ = over_groups(functools.partial(_gates, first=moe.num_copies, count=moe.num_zero_computation),
                               routing_G, x_GTD[:, :, 0])
        kept_GT = jnp.sum(gate_GTJ[:, :, : moe.num_identity_experts], axis=-1)
        if not moe.num_constant_experts:
            return (kept_GT[:, :, None] * x).astype(x_GTD.dtype)
        alpha_GTJA = jax.nn.softmax(jnp.einsum("GTD,DJA->GTJA", x, self.w_constant_DJA[...], precision=_EXACT), axis=-1)
        share_GTJA = gate_GTJ[:, :, -moe.num_constant_experts :, None] * alpha_GTJA
        kept_GT = kept_GT + jnp.sum(share_GTJA[:, :, :, 0], axis=-1)
        constant_GTD = jnp.einsum("GTJ,JD->GTD", share_GTJA[:, :, :, 1], self.constant_JD[...], precision=_EXACT)
        return (kept_GT[:, :, None] * x + constant_GTD).astype(x_GTD.dtype)


def _gates(routing, x_T, first, count):
    """What each token's choices of the experts from ``first`` on weigh, [T, J]."""
    expert_N = jnp.where((routing.expert_N >= first) & (routing.expert_N < first + count), routing.expert_N - first, count)
    return jnp.zeros((x_T.shape[0], count), jnp.float32).at[routing.token_N, expert_N].add(routing.gate_N, mode="drop")
