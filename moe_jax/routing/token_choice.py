"""Every token chooses its K best experts."""

import jax
import jax.numpy as jnp

from moe_jax.config import ConfigError, MoEConfig
from moe_jax.routing.assignment import RouterInputs, Routing, at_experts, in_queue, token_choice_list
from moe_jax.routing.balance import router_statistics
from moe_jax.routing.limits import check_limits, choices_made, in_best_groups, tokens_reaching
from moe_jax.routing.scores import SCORES, chance_above, learned_noise_std, rankable, shares, without_nan

# Fields of MoEConfig that these routers read and others refuse.
OPTIONS = ("renormalize_after_drops", "score", "route_scale", "second_policy", "second_threshold", "second_in_queue",
           "num_groups", "groups_per_token", "group_score", "priority", "padding", "importance_weight", "load_weight",
           "device_weight", "communication_weight", "device_capacity_factor", "allow_untrained_router")


def top_k(inputs: RouterInputs, moe: MoEConfig) -> Routing:
    """Top-K by router score: Switch (K=1), GShard, ST-MoE, V-MoE, OpenMoE, Mixtral, OLMoE, Qwen3, DeepSeek, Llama-4 …

    ``moe.score``, ``moe.gate_order``, ``moe.renormalize`` and ``moe.route_scale`` name the gates in use
    (docs/conventions.md). With ``moe.router_noise`` = x, N(0, (x/E)²) is added to the logits in training (V-MoE, Riquelme
    et al. 2021 §2): the noisy scores choose and weigh, the clean ones make the importance loss.

    Returns:
      Routing with N = T·K; ties go to the lowest expert.
    """
    clean_TE = without_nan(inputs.logits_TE)
    noise_TE = _standard_noise(inputs) if moe.router_noise > 0 else None
    if noise_TE is None:
        return choose(inputs, moe, clean_TE, SCORES[moe.score](clean_TE))
    std_TE = jnp.full(clean_TE.shape, moe.router_noise / moe.num_routed_experts, jnp.float32)
    noisy_TE = clean_TE + std_TE * noise_TE
    return choose(inputs, moe, noisy_TE, SCORES[moe.score](noisy_TE), shares(SCORES[moe.score](clean_TE)),
                  load_over_all(clean_TE, noisy_TE, std_TE, moe.experts_per_token))


def noisy_top_k(inputs: RouterInputs, moe: MoEConfig) -> Routing:
    """H = x·W + ε·softplus(x·W_noise), ε ~ N(0, 1), in training (Shazeer et al. 2017 eq. 3–5); H = x·W in evaluation.

    Importance is the sum of the gates themselves, load by :func:`load_over_others`. The paper's gates are those of
    ``moe.gate_order='top_k_then_softmax'``.
    """
    clean_TE = without_nan(inputs.logits_TE)
    noise_TE, load_TE, noisy_TE = _standard_noise(inputs), None, clean_TE
    if noise_TE is not None:
        std_TE = learned_noise_std(jnp.where(inputs.valid_T[:, None], inputs.noise_logits_TE, 0.0))
        noisy_TE = clean_TE + std_TE * noise_TE
        load_TE = load_over_others(clean_TE, noisy_TE, std_TE, moe.experts_per_token)
    return choose(inputs, moe, noisy_TE, SCORES[moe.score](noisy_TE), load_TE=load_TE, importance_of_gates=True)


def choose(inputs: RouterInputs, moe: MoEConfig, logits_TE: jax.Array, score_TE: jax.Array,
           importance_TE: jax.Array | None = None, load_TE: jax.Array | None = None,
           importance_of_gates: bool = False) -> Routing:
    """The K experts of each token with the highest ``score_TE``, and their gates.

    The selection bias of loss-free balancing is added to the scores for the *choice* only, never to the gate (B33).

    Args:
      logits_TE: without NaN; they rank as the scores do and tell apart what rounding in softmax ties (B26).
      importance_TE, load_TE: see :func:`moe_jax.routing.balance.router_statistics`.
      importance_of_gates: the importance is the gates (Shazeer et al. 2017 eq. 6).
    """
    valid_T1 = inputs.valid_T[:, None]
    ranked_TE, biased_TE = logits_TE, score_TE
    if inputs.bias_E is not None:
        # A bias that is no longer updated acts all the same (DeepSeek-V3's last phase); without one logits rank, B26.
        biased_TE = score_TE + inputs.bias_E[None, :]
        by_logit_TE = jnp.isnan(inputs.logits_TE) | ~jnp.any(inputs.bias_E != 0)
        ranked_TE = jnp.where(by_logit_TE, logits_TE, biased_TE)
    ranked_TE = jnp.where(in_best_groups(ranked_TE, biased_TE, moe), ranked_TE, -jnp.inf)
    _, expert_TK = jax.lax.top_k(rankable(ranked_TE), moe.experts_per_token)
    raw_TK = at_experts(score_TE, expert_TK)
    gate_TK = _gates(raw_TK, at_experts(logits_TE, expert_TK), moe)
    made_TK = valid_T1 & choices_made(gate_TK, moe, _key(inputs, 1))
    gate_TK = jnp.where(made_TK, moe.route_scale * gate_TK, 0.0)
    if importance_of_gates:
        chosen_TKE = expert_TK[:, :, None] == jnp.arange(moe.num_routed_experts)[None, None, :]
        importance_TE = jnp.sum(jnp.where(chosen_TKE, gate_TK[:, :, None], 0.0), axis=1)
    not_made_TK = moe.num_routed_experts
    if moe.second_in_queue:
        not_made_TK = jnp.where(valid_T1, in_queue(expert_TK, moe.num_routed_experts), not_made_TK)
    expert_TK = jnp.where(made_TK, expert_TK, not_made_TK).astype(jnp.int32)
    if moe.padding == "takes_slots":
        # flaxformer's scatter router: probabilities of padding are zero, so by the tie rule it takes the first experts.
        expert_TK = jnp.where(valid_T1, expert_TK, jnp.arange(moe.experts_per_token, dtype=jnp.int32)[None, :])
    share_TE = score_TE if moe.score == "softmax" else shares(score_TE)
    statistics = router_statistics(inputs.logits_TE, share_TE, expert_TK.reshape(-1), inputs.valid_T, logits_TE,
                                   importance_TE, load_TE, tokens_reaching(expert_TK, moe), moe.padding != "nowhere",
                                   inputs.per_token)
    # By raw score, whatever the gate is made of (V-MoE §4.1: max of the scores, or their sum).
    priority_T = jnp.max(raw_TK, axis=-1) if moe.priority == "max" else jnp.sum(raw_TK, axis=-1)
    return token_choice_list(expert_TK, gate_TK, moe.fill_order, statistics, jnp.where(inputs.valid_T, priority_T, 0.0))


def _gates(raw_TK, logits_TK, moe):
    if moe.gate_order == "top_k_then_softmax":
        return jax.nn.softmax(logits_TK, axis=-1)
    return shares(raw_TK) if moe.renormalize else raw_TK


def _key(inputs, purpose):
    return None if inputs.key is None else jax.random.fold_in(inputs.key, purpose + 1)  # 1 is the layer's jitter


def _standard_noise(inputs):
    """The given draws, new ones, or None in evaluation."""
    if inputs.noise_TE is not None or inputs.key is None:
        return inputs.noise_TE
    return jax.random.normal(_key(inputs, 2), inputs.logits_TE.shape, jnp.float32)


def load_over_others(clean_TE: jax.Array, noisy_TE: jax.Array, std_TE: jax.Array, choices: int) -> jax.Array:
    """P(x, e): the chance that e is among the K best if its own noise alone is drawn again (Shazeer 2017 eq. 8–9).

    The threshold is the K-th highest noisy logit of the *other* experts: of all for an expert that was not chosen, the
    next one for one that was. With K = E every expert is always chosen.
    """
    if choices == clean_TE.shape[-1]:
        return jnp.ones_like(clean_TE)
    _, best_TK = jax.lax.top_k(rankable(noisy_TE), choices + 1)
    value_TK = at_experts(noisy_TE, best_TK)
    chosen_TE = jnp.any(best_TK[:, :choices, None] == jnp.arange(clean_TE.shape[-1])[None, None, :], axis=1)
    threshold_TE = jnp.where(chosen_TE, value_TK[:, choices:], value_TK[:, choices - 1:choices])
    return chance_above(clean_TE, threshold_TE, std_TE)


def load_over_all(clean_TE: jax.Array, noisy_TE: jax.Array, std_TE: jax.Array, choices: int) -> jax.Array:
    """As :func:`load_over_others` with the K-th highest noisy logit as threshold for every expert, as V-MoE's code."""
    _, best_TK = jax.lax.top_k(rankable(noisy_TE), choices)
    return chance_above(clean_TE, at_experts(noisy_TE, best_TK[:, choices - 1:]), std_TE)


def check_top_k(moe: MoEConfig) -> None:
    """Refuses gate options that cannot work together."""
    normalised = moe.renormalize or moe.gate_order == "top_k_then_softmax"
    if normalised and moe.renormalize_after_drops:
        raise ConfigError("moe.renormalize_after_drops=True: the gates would be divided by their sum twice; set "
                          "moe.renormalize=False and moe.gate_order='softmax_then_top_k', or it to False.")
    normalised = normalised or moe.renormalize_after_drops
    untrained = moe.experts_per_token == 1 and normalised
    if untrained and not moe.allow_untrained_router:
        raise ConfigError(
            "moe.experts_per_token=1: with one expert per token a renormalised gate is always 1 and the router gets no "
            "gradient from the task (top_k_then_softmax renormalises too); set moe.renormalize=False and "
            "moe.gate_order='softmax_then_top_k', or use 2 experts per token.")
    if moe.allow_untrained_router and not untrained:
        raise ConfigError("moe.allow_untrained_router=True: has no effect: this router gets a gradient from the task; set it to "
                          "False.")
    if moe.renormalize and moe.gate_order == "top_k_then_softmax":
        raise ConfigError("moe.renormalize=True: has no effect with moe.gate_order='top_k_then_softmax', whose gates "
                          "already sum to 1; set moe.renormalize=False.")
    if moe.score != "softmax" and moe.gate_order == "top_k_then_softmax":
        raise ConfigError(f"moe.score={moe.score!r}: has no effect on the gates of moe.gate_order='top_k_then_softmax'; "
                          f"set moe.gate_order='softmax_then_top_k' (scores, then the K best).")
    if moe.load_weight and moe.router == "top_k" and not moe.router_noise:
        raise ConfigError(f"moe.load_weight={moe.load_weight}: the load loss needs a router with noise; set "
                          f"moe.router_noise (V-MoE: 1.0) or moe.router='noisy_top_k', or moe.load_weight=0.0.")
    check_limits(moe)


def draws(moe: MoEConfig) -> bool:
    """Whether training draws random numbers."""
    return moe.router == "noisy_top_k" or moe.router_noise > 0 or moe.second_policy == "random"


def top_k_is_causal(moe: MoEConfig) -> bool:
    """Token choice looks at one token; only *who is dropped* can depend on later ones (B53)."""
    if moe.device_capacity_factor > 0 and moe.group_over != "batch":
        return False
    if moe.group_over == "batch" or {moe.dispatch, moe.eval_dispatch} <= {"dropless", "reference"}:
        return True
    if moe.fill_order == "choice_major":
        # Only second choices wait for later tokens' first ones.
        return moe.experts_per_token == 1 or moe.second_policy == "none"
    return moe.fill_order == "token_major"
