"""Which experts a token may choose from, which of its choices are made, and which a device has room for."""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.config import ConfigError, MoEConfig, nearest_divisors
from moe_jax.routing.assignment import Routing
from moe_jax.routing.scores import rankable


def in_best_groups(ranked_TE: jax.Array, score_TE: jax.Array, moe: MoEConfig) -> jax.Array:
    """[T, E] bool: the experts of the ``moe.groups_per_token`` best of ``moe.num_groups`` groups; all if that is 0.

    Groups are equal runs of consecutive experts: those of one device or node. A group is worth
      ``'max'``: its best rank – device-limited routing (DeepSeek-V2 §2.2.2);
      ``'top_sum'``: the sum of its K/M best scores – node-limited routing (DeepSeek-V3 §2.1.2), with the selection bias
        in them as in the published code;
      ``'top_2_sum'``: the sum of its two best, whatever K and M are, as that code has it (for its 8/4 the same).

    Args:
      ranked_TE: what experts are chosen by. score_TE: the scores, with their bias if there is one.
    """
    if not moe.groups_per_token:
        return jnp.ones(ranked_TE.shape, bool)
    tokens, experts = ranked_TE.shape
    if moe.group_score == "max":
        value_TX = jnp.max(ranked_TE.reshape(tokens, moe.num_groups, -1), axis=-1)
    else:
        best = 2 if moe.group_score == "top_2_sum" else max(1, moe.experts_per_token // moe.groups_per_token)
        best = min(best, experts // moe.num_groups)
        value_TX = jnp.sum(jax.lax.top_k(score_TE.reshape(tokens, moe.num_groups, -1), best)[0], axis=-1)
    _, group_TM = jax.lax.top_k(rankable(value_TX), moe.groups_per_token)
    allowed_TX = jnp.any(group_TM[:, :, None] == jnp.arange(moe.num_groups)[None, None, :], axis=1)
    return jnp.repeat(allowed_TX, experts // moe.num_groups, axis=1, total_repeat_length=experts)


def tokens_reaching(expert_TK: jax.Array, moe: MoEConfig) -> jax.Array:
    """[T, X] bool: which tokens made a choice in which group of experts; from ``expert_TK == E`` on it is nowhere."""
    group_TK = expert_TK // (moe.num_experts // moe.num_groups)
    return jnp.any(group_TK[:, :, None] == jnp.arange(moe.num_groups)[None, None, :], axis=1)


def choices_made(gate_TK: jax.Array, moe: MoEConfig, key: jax.Array | None) -> jax.Array:
    """[T, K] bool: the first choice always, the others by ``moe.second_policy``.

    ``'all'``, ``'none'``; ``'threshold'``: gate > ``moe.second_threshold``; ``'random'``: with probability
    min(1, gate / threshold) while training – 0.2 in Mesh-TensorFlow and ST-MoE (Zoph et al. 2022 §C.2), 0.5 is
    GShard's 2·g > U(0, 1) (Lepikhin et al. 2020 Algorithm 1) – and all in evaluation, where nothing is drawn.
    The gate is the one of the config, renormalised or not, before ``moe.route_scale``.
    """
    gate_TK = jax.lax.stop_gradient(gate_TK)
    first_TK = jnp.broadcast_to(jnp.arange(gate_TK.shape[1]) == 0, gate_TK.shape)
    if moe.second_policy == "none":
        return first_TK
    if moe.second_policy == "threshold":
        return first_TK | (gate_TK > moe.second_threshold)
    if moe.second_policy == "random" and key is not None:
        return first_TK | (gate_TK > moe.second_threshold * jax.random.uniform(key, gate_TK.shape))
    return jnp.ones(gate_TK.shape, bool)


def within_device_budget(routing: Routing, valid_T: jax.Array, exempt_T: jax.Array | None, moe: MoEConfig) -> Routing:
    """The list without what exceeds the devices' budgets (DeepSeek-V2, "Token-Dropping Strategy"): training only.

    A device is one of ``moe.num_groups`` runs of experts; its budget ceil(``moe.device_capacity_factor`` · K · valid
    tokens / devices) choices of one group of tokens. Beyond it the choices with the lowest gates go nowhere; among equal
    ones those that stand later in the list. Choices of exempt tokens are never dropped; they use the budget first.
    """
    devices, experts = moe.num_groups, moe.num_experts
    device_N = routing.expert_N // (experts // devices)  # devices, or more: nowhere
    # The hair: 1.1 · 100 / 10 is a little above 11 in floating point.
    budget = jnp.ceil(moe.device_capacity_factor * moe.experts_per_token * jnp.sum(valid_T, dtype=jnp.float32)
                      / devices * (1 - 1e-6))
    exempt_N = jnp.zeros(device_N.shape, bool) if exempt_T is None else exempt_T[routing.token_N]
    order_N = jnp.lexsort((-jax.lax.stop_gradient(routing.gate_N), ~exempt_N))
    is_NX = device_N[order_N][:, None] == jnp.arange(devices)[None, :]
    rank_N = jnp.sum(jnp.where(is_NX, jnp.cumsum(is_NX, axis=0, dtype=jnp.int32), 0), axis=1)  # from 1; 0: nowhere
    over_N = jnp.zeros_like(exempt_N).at[order_N].set(rank_N > budget) & ~exempt_N
    return dataclasses.replace(routing, expert_N=jnp.where(over_N, experts, routing.expert_N),
                               gate_N=jnp.where(over_N, 0.0, routing.gate_N))


def check_limits(moe: MoEConfig) -> None:
    """Refuses groups that do not fit, and options without effect."""
    groups, limit = moe.num_groups, moe.groups_per_token
    if moe.num_experts % groups:
        raise ConfigError(f"moe.num_groups={groups}: must divide moe.num_experts={moe.num_experts}; nearest legal values: "
                          f"{nearest_divisors(groups, moe.num_experts)}.")
    if limit > groups:
        raise ConfigError(f"moe.groups_per_token={limit}: there are only moe.num_groups={groups}; legal: 0 (no limit) to "
                          f"{groups}.")
    if limit and limit * (moe.num_experts // groups) < moe.experts_per_token:
        raise ConfigError(f"moe.groups_per_token={limit}: {limit} groups of {moe.num_experts // groups} experts have no "
                          f"moe.experts_per_token={moe.experts_per_token} to choose; allow more groups.")
    if groups > 1 and not (limit or moe.device_weight or moe.device_capacity_factor):
        raise ConfigError(f"moe.num_groups={groups}: has no effect without moe.groups_per_token, moe.device_weight or "
                          f"moe.device_capacity_factor; set one of them, or moe.num_groups=1.")
    if groups > 1 and moe.num_zero_computation:
        raise ConfigError(f"moe.num_groups={groups}: groups are the experts of one device, and zero-computation experts "
                          f"(moe.num_identity_experts …) lie on none; set it to 1, or leave those experts out.")
    for field, needs, wanted in (
            ("group_score", bool(limit), "moe.groups_per_token"),
            ("device_weight", groups > 1, "moe.num_groups above 1"),
            ("device_capacity_factor", groups > 1, "moe.num_groups above 1"),
            # Random choices are all made in evaluation.
            ("second_in_queue", moe.second_policy != "all" and not {
                moe.dispatch, moe.dispatch if moe.second_policy == "random" else moe.eval_dispatch} <= {
                    "dropless", "reference"}, "moe.second_policy other than 'all' and a dispatcher with buffers"),
            ("communication_weight", groups > 1 and bool(limit), "moe.num_groups above 1 and moe.groups_per_token"),
            ("second_policy", moe.experts_per_token > 1, "moe.experts_per_token above 1"),
            ("second_threshold", moe.second_policy in ("threshold", "random"),
             "moe.second_policy='threshold' or 'random'"),
            ("priority", moe.fill_order == "batch_prioritized" and moe.experts_per_token > 1,
             "moe.fill_order='batch_prioritized' and moe.experts_per_token above 1")):
        value, default = getattr(moe, field), getattr(MoEConfig, field)
        if value != default and not needs:
            raise ConfigError(f"moe.{field}={value!r}: has no effect without {wanted}; set that, or moe.{field}={default!r}.")
