"""Following recorded choices with live gates: routing replay (Zheng et al. 2025 "R2"; Ma et al. 2025 "R3")."""

import jax
import jax.numpy as jnp

from moe_jax.config import ConfigError, MoEConfig
from moe_jax.routing.assignment import RouterInputs, Routing, at_experts, token_choice_list
from moe_jax.routing.balance import router_statistics
from moe_jax.routing.limits import tokens_reaching
from moe_jax.routing.scores import SCORES, shares, without_nan


def replay(inputs: RouterInputs, moe: MoEConfig) -> Routing:
    """The recorded experts, weighted by *this* router: gradients reach its logits, none the choice.

    With ``moe.gate_order='top_k_then_softmax'`` (or renormalised) gates are g_i = M_i e^{s_i} / Σ_j M_j e^{s_j}, M the
    replayed mask and s the logits at hand (R3). The other gates of ``top_k`` (``moe.score``, ``moe.route_scale`` …) are
    made as it makes them, so that a router that replays its own choices computes what it would have computed. One
    exception: a second choice that ``moe.second_policy`` did not make is not recorded, so it has no share in normalised
    gates here.

    Returns:
      Routing with N = T·K, choices in the recorded order.

    Raises:
      ValueError: no recorded choices were handed in, or the config's router has gates of another kind.
    """
    if other := _other_gates(moe):
        raise ValueError(f"router 'replay' makes the gates of top_k; those of moe.router={moe.router!r} are {other}")
    if inputs.replay_expert_TK is None:
        raise ValueError("router 'replay' has nothing to replay: call the model with replay_LBSK "
                         "(moe_jax.routing.replay.recorded_experts)")
    valid_T = inputs.valid_T
    logits_TE = without_nan(inputs.logits_TE)
    score_TE = SCORES[moe.score](logits_TE)
    expert_TK = jnp.where(valid_T[:, None], inputs.replay_expert_TK, moe.num_routed_experts).astype(jnp.int32)
    chosen_TK = expert_TK < moe.num_routed_experts
    raw_TK = at_experts(score_TE, expert_TK)
    if moe.gate_order == "top_k_then_softmax":
        logit_TK = jnp.where(chosen_TK, at_experts(logits_TE, expert_TK), -jnp.inf)
        # A token without choices: any finite row, masked below, so that no NaN arises in the gradient.
        gate_TK = jax.nn.softmax(jnp.where(jnp.any(chosen_TK, axis=-1, keepdims=True), logit_TK, 0.0), axis=-1)
    else:
        gate_TK = shares(raw_TK) if moe.renormalize else raw_TK
    gate_TK = jnp.where(chosen_TK, moe.route_scale * gate_TK, 0.0)
    share_TE = score_TE if moe.score == "softmax" else shares(score_TE)
    statistics = router_statistics(inputs.logits_TE, share_TE, expert_TK.reshape(-1), valid_T,
                                   reached_TX=tokens_reaching(expert_TK, moe), per_token=inputs.per_token)
    priority_T = jnp.max(raw_TK, axis=-1) if moe.priority == "max" else jnp.sum(raw_TK, axis=-1)
    return token_choice_list(expert_TK, gate_TK, moe.fill_order, statistics, jnp.where(valid_T, priority_T, 0.0))


def _other_gates(moe: MoEConfig) -> str:
    """What the gates of the config's router are, if a replay would make others; else ''."""
    if moe.router == "hierarchical":
        return "products of two levels, which recorded experts do not tell apart"
    if moe.router == "base" or moe.router == "sinkhorn" and moe.experts_per_token == 1:
        return "sigmoids of the logits"
    if moe.router == "transport_top_k" and moe.transport_gate == "plan":
        return "entries of a plan that is made with the choice; record with moe.transport_gate='softmax'"
    return ""


def check_replay(moe: MoEConfig) -> None:
    """A run cannot be configured to replay: what it should replay comes with each call."""
    raise ConfigError(f"moe.router={moe.router!r}: is chosen by the call, not by the config: give the model "
                      f"RoutingMode(router='replay') and replay_LBSK, and set moe.router to the router that was recorded.")


def choices_by_token(routing: Routing) -> jax.Array:
    """The experts of one group's list as ``[T, K]``: :func:`by_token`."""
    return by_token(routing, routing.expert_N)


def by_token(routing: Routing, value_N: jax.Array) -> jax.Array:
    """What belongs to the entries of one group's list as ``[T, K]``, a token's in the order in which they stand in the list.

    Raises:
      ValueError: the router did not give every token K places in the list (expert choice).
    """
    choices = routing.choices_per_token
    if choices is None:
        raise ValueError("only routers that give every token K choices can be replayed; in this list a token may stand "
                         "any number of times (expert_choice)")
    if routing.order == "token_major":
        return value_N.reshape(-1, choices)
    if routing.order == "choice_major":
        return value_N.reshape(choices, -1).T
    return value_N[jnp.argsort(routing.token_N, stable=True)].reshape(-1, choices)


def recorded_experts(routing_LG: Routing, layout) -> jax.Array:
    """What ``replay_LBSK`` wants, int32 ``[L, B, S, K]``, from the ``statistics.routing_G`` of a model that was called
    with ``RoutingMode(record=True)``; E = nowhere. Dropped choices are among them: who is dropped is counted anew.

    Args:
      layout: the :class:`moe_jax.nn.groups.GroupLayout` of the recorded call: ``GroupLayout(B, S, config)``.
    """
    layers = []
    for layer in range(routing_LG.expert_N.shape[0]):
        routing_G = jax.tree.map(lambda leaf: leaf[layer], routing_LG)
        layers.append(layout.join(jax.vmap(choices_by_token)(routing_G)))
    return jnp.stack(layers)
