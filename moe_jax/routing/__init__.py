"""Deciding: router logits -> :class:`Routing`. No parameters, no devices, one group of tokens at a time.

A new router is one function, one line in ``ROUTERS``, one test (docs/adding_a_router.md).
"""

import dataclasses
from typing import Callable

from moe_jax.config import ConfigError, MoEConfig
from moe_jax.routing.assignment import RouterInputs, Routing, expert_capacity
from moe_jax.routing.debug import (
    all_experts, all_experts_capacity, all_experts_is_causal, check_all_experts, check_round_robin, round_robin,
    round_robin_is_causal)
from moe_jax.routing.hashing import check_hash, hash_is_causal, hashed
from moe_jax.routing.hierarchical import OPTIONS as HIERARCHICAL_OPTIONS, check_hierarchical, hierarchical
from moe_jax.routing.expert_choice import (
    check_expert_choice, expert_choice, expert_choice_capacity, expert_choice_is_causal)
from moe_jax.routing.policy import OPTIONS as POLICY_OPTIONS, check_reinforce, draws as policy_draws, reinforce
from moe_jax.routing.replay import check_replay, replay
from moe_jax.routing.transport import base, check_base, check_s_base, check_sinkhorn, is_causal as balances_in_training
from moe_jax.routing.transport import check_transport, s_base, sinkhorn, transport_expert_choice, transport_top_k
from moe_jax.routing.token_choice import OPTIONS, check_top_k, draws, noisy_top_k, top_k, top_k_is_causal


def _capacity(tokens: int, moe: MoEConfig, factor: float) -> int:
    if moe.expert_capacity:
        return min(tokens, moe.expert_capacity)
    # A zero-computation expert gets 1/τ times the load of another where the balancing loss is lowest (Jin et al. 2024).
    experts = moe.num_experts + moe.num_zero_computation / moe.zero_expert_weight
    return expert_capacity(tokens, experts, moe.experts_per_token, factor, moe.capacity_counts,
                           moe.min_capacity, moe.capacity_rounding, moe.capacity_multiple)


@dataclasses.dataclass(frozen=True)
class Router:
    """A routing algorithm as the layer sees it.

    Attributes:
      route: ``(inputs: RouterInputs, moe) -> Routing`` for one group.
      is_causal: ``moe -> bool``: True if a token's output cannot depend on later tokens of its sequence (A6).
      check: raises ConfigError for options that cannot work with this router.
      capacity: ``(tokens, moe, factor) -> slots per expert``.
      fixed_choices: every valid token makes exactly ``moe.experts_per_token`` choices; metrics check that they do.
      causal_option: the setting that makes it causal, for the error message.
      uses_key: draws random numbers while training, or ``moe -> bool`` where that depends on the options.
      learned: has a matrix, whose product is ``RouterInputs.logits_TE``; else the logits are None.
      learned_noise: has a second matrix, whose product is ``RouterInputs.noise_logits_TE``.
      two_levels: has matrices for groups of experts too, whose products are ``RouterInputs.group_logits_TX`` ….
      zero_experts: scores zero-computation experts like the others.
      evaluation_is_causal: as ``is_causal``, of a router that chooses otherwise in evaluation than in training.
      is_policy: is trained by policy gradients; in training ``Routing.policy`` says what they need.
      by_number: an expert's number has a meaning: experts given other numbers would get other tokens.
      options: fields of MoEConfig that it reads; other routers refuse them, unless they name them as well.
    """

    route: Callable[..., Routing]
    is_causal: Callable[[MoEConfig], bool]
    check: Callable[[MoEConfig], None] = lambda moe: None
    capacity: Callable[[int, MoEConfig, float], int] = _capacity
    fixed_choices: bool = True
    causal_option: str = "moe.fill_order='token_major'"
    uses_key: bool | Callable[[MoEConfig], bool] = False
    learned: bool = True
    learned_noise: bool = False
    two_levels: bool = False
    zero_experts: bool = False
    evaluation_is_causal: Callable[[MoEConfig], bool] | None = None
    is_policy: bool = False
    by_number: bool = False
    options: tuple[str, ...] = ()

    def draws(self, moe: MoEConfig) -> bool:
        return self.uses_key(moe) if callable(self.uses_key) else self.uses_key


PLAN_OPTIONS = ("transport_plan", "transport_gate", "transport_rate", "transport_tolerance", "transport_iterations",
                "importance_weight")

ROUTERS: dict[str, Router] = {
    "top_k": Router(top_k, top_k_is_causal, check_top_k, uses_key=draws, zero_experts=True,
                    options=(*OPTIONS, "router_noise")),
    "noisy_top_k": Router(noisy_top_k, top_k_is_causal, check_top_k, uses_key=True, learned_noise=True,
                          zero_experts=True, options=OPTIONS),
    "hierarchical": Router(hierarchical, top_k_is_causal, check_hierarchical, uses_key=True, learned_noise=True,
                           two_levels=True, options=HIERARCHICAL_OPTIONS),
    "hash": Router(hashed, hash_is_causal, check_hash, learned=False, by_number=True,
                   options=("hash_function", "hash_seed", "hash_table")),
    "balanced": Router(round_robin, round_robin_is_causal, check_round_robin, by_number=True),
    "all": Router(all_experts, all_experts_is_causal, check_all_experts, all_experts_capacity),
    "sinkhorn": Router(sinkhorn, balances_in_training, check_sinkhorn, causal_option="moe.group_over='batch'",
                       evaluation_is_causal=top_k_is_causal, options=("transport_tolerance", "transport_iterations")),
    "s_base": Router(s_base, balances_in_training, check_s_base, causal_option="moe.group_over='batch'",
                     evaluation_is_causal=top_k_is_causal, options=("transport_iterations",)),
    "base": Router(base, balances_in_training, check_base, causal_option="moe.group_over='batch'",
                   evaluation_is_causal=top_k_is_causal, options=("transport_iterations",)),
    "reinforce": Router(reinforce, top_k_is_causal, check_reinforce, uses_key=policy_draws, is_policy=True, zero_experts=True,
                        options=POLICY_OPTIONS),
    "transport_top_k": Router(transport_top_k, balances_in_training, check_transport,
                              causal_option="moe.group_over='batch'", options=(*PLAN_OPTIONS, "priority")),
    "transport_expert_choice": Router(transport_expert_choice, balances_in_training, check_transport,
                                      expert_choice_capacity, fixed_choices=False, options=PLAN_OPTIONS,
                                      causal_option="moe.group_over='batch'"),
    "replay": Router(replay, top_k_is_causal, check_replay, zero_experts=True, by_number=True),
    "expert_choice": Router(expert_choice, expert_choice_is_causal, check_expert_choice, expert_choice_capacity,
                            fixed_choices=False, causal_option="moe.group_over='batch'",
                            options=("experts_per_token_cap", "cap_entropy", "transport_iterations")),
}


def has_fixed_choices(moe: MoEConfig) -> bool:
    """Whether every valid token makes exactly ``moe.experts_per_token`` choices."""
    without_padding = moe.padding in ("nowhere", "in_means")
    return ROUTERS[moe.router].fixed_choices and moe.second_policy == "all" and without_padding


def check_router(moe: MoEConfig, in_decoder: bool = True) -> None:
    """Refuses options the router cannot work with, and a router that sees the future in a decoder (B52, B53)."""
    router = ROUTERS[moe.router]
    for option in sorted({option for other in ROUTERS.values() for option in other.options} - set(router.options)):
        value, default = getattr(moe, option), getattr(MoEConfig, option)
        if value != default:
            readers = ", ".join(repr(name) for name, other in ROUTERS.items() if option in other.options)
            raise ConfigError(f"moe.{option}={value!r}: is read by moe.router={readers} only, not by {moe.router!r}; "
                              f"set it to {default!r}.")
    if moe.num_zero_computation and not router.zero_experts:
        names = ", ".join(repr(name) for name, other in ROUTERS.items() if other.zero_experts and name != "replay")
        raise ConfigError(f"moe.router={moe.router!r}: has no place for identity, zero and constant experts: its choices "
                          f"are quotas, tables or groups of feed-forward experts; set moe.num_identity_experts, "
                          f"moe.num_zero_experts and moe.num_constant_experts to 0, or moe.router to one of {names}.")
    if moe.router_bias and not router.learned:
        raise ConfigError(f"moe.router_bias=True: is added to the router's logits, and moe.router={moe.router!r} has none; set it "
                          f"to False, or another router.")
    if moe.capacity_counts == "group" and router.capacity is not _capacity:
        raise ConfigError(f"moe.capacity_counts='group': a share of the group's tokens is what choices of tokens have slots of, and "
                          f"with moe.router={moe.router!r} experts choose; set it to 'choices' or 'tokens'.")
    router.check(moe)
    _check_slots(moe)
    if moe.allow_noncausal_routing or not in_decoder or router.is_causal(moe):
        return
    if moe.device_capacity_factor:
        raise ConfigError(
            f"moe.device_capacity_factor={moe.device_capacity_factor}: which choices a device drops depends on the gates of "
            f"later tokens, so training sees what a decoder cannot know. Say moe.allow_noncausal_routing=True to train so "
            f"all the same (nothing is dropped in evaluation), use moe.group_over='batch', or set it to 0.0.")
    raise ConfigError(
        f"moe.router={moe.router!r} with fill_order={moe.fill_order!r}, group_over={moe.group_over!r}: a token's output "
        f"would depend on later tokens, which a decoder cannot know. Use {router.causal_option}, or say "
        f"moe.allow_noncausal_routing=True to train it all the same (evaluation is then reported both ways).")


def _check_slots(moe: MoEConfig) -> None:
    """Refuses a way to count slots where there are none."""
    capacity = ROUTERS[moe.router].capacity
    buffers = not {moe.dispatch, moe.eval_dispatch} <= {"dropless", "reference"}
    if capacity is _capacity and buffers or capacity is expert_choice_capacity and not moe.expert_capacity:
        return
    for field in ("expert_capacity", "capacity_rounding", "capacity_multiple"):
        value, default = getattr(moe, field), getattr(MoEConfig, field)
        if value != default:
            raise ConfigError(f"moe.{field}={value!r}: has no effect with moe.router={moe.router!r}, moe.dispatch="
                              f"{moe.dispatch!r} and moe.eval_dispatch={moe.eval_dispatch!r}, where no expert has a "
                              f"number of slots to round; set it to {default!r}.")
