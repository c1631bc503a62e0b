"""One list of assignments, and the one rule about who fits (agreements A1 and A2 of docs/architecture.md)."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.sharding import lowering_platform


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("token_N", "expert_N", "gate_N", "statistics", "policy"), meta_fields=("choices_per_token", "order", "gate_on"))
@dataclasses.dataclass(frozen=True)
class Routing:
    """N assignments for one group of T tokens: token ``token_N[i]`` goes to expert ``expert_N[i]`` with weight
    ``gate_N[i]``.

    The order of the list is the order in which expert buffers fill. ``expert_N == E`` means *nowhere*: padding, or a
    choice not taken. So does everything above; ``E + 1 + e`` moreover uses up a slot of expert e (:func:`in_queue`).

    Attributes:
      token_N: int32, 0 … T-1.
      expert_N: int32, 0 … E.
      gate_N: fp32 combine weights; the only field that carries gradients besides ``statistics`` and ``policy``.
      statistics: :class:`moe_jax.routing.balance.RouterStatistics` of the group.
      choices_per_token: K if every token stands in the list exactly K times (a promise that lets dispatchers
        replace scatters by gathers and reshapes), else None.
      gate_on: whether the gate multiplies the expert's 'output', or its 'input' (Llama-4), which for a nonlinear expert
        is something else; dispatchers see to it.
      policy: :class:`moe_jax.routing.policy.PolicyTerms` of the group's tokens where the router is a policy in training.
      order: 'token_major' if ``token_N`` is 0,0,1,1,… ; 'choice_major' if it is 0,1,…,0,1,… ; '' for any other order.
    """

    token_N: jax.Array
    expert_N: jax.Array
    gate_N: jax.Array
    statistics: Any
    choices_per_token: int | None = None
    order: str = ""
    gate_on: str = "output"
    policy: Any = None


@functools.partial(
    jax.tree_util.register_dataclass, meta_fields=("training", "per_token", "capacity_factor"),
    data_fields=("logits_TE", "valid_T", "bias_E", "token_ids_T", "positions_T", "key", "previous_ids_T",
                 "replay_expert_TK", "noise_logits_TE", "noise_TE", "group_logits_TX", "group_noise_logits_TX",
                 "group_noise_TX"))
@dataclasses.dataclass(frozen=True)
class RouterInputs:
    """What a router may look at: one group of T tokens.

    Attributes:
      logits_TE: fp32.
      valid_T: bool; False for padding, which must go nowhere.
      bias_E: fp32 selection bias (loss-free balancing), zeros if unused: belongs in the choice, never in the gate.
      token_ids_T, positions_T: int32, the tokens' ids and positions in their documents.
      key: for random choices while training; None in evaluation, where a router must not draw.
      previous_ids_T: int32, the id one position earlier in the same document; 0 for a document's first token.
      replay_expert_TK: int32, recorded choices to follow (E = nowhere), for the router ``replay``.
      training: static; False in evaluation and generation, for routers that choose differently there.
      noise_logits_TE: fp32 x·W_noise, for routers whose entry says ``learned_noise``; None in evaluation.
      noise_TE: standard normal draws to use instead of drawing by ``key``, to reproduce another implementation.
      capacity_factor: static; of this call, for routers in which experts choose.
      per_token: static; hand it on to ``router_statistics`` (``moe.balance_scope='sequence'``, ``'document'``).
      group_logits_TX, group_noise_logits_TX, group_noise_TX: the same for the groups of a two-level router.
    """

    logits_TE: jax.Array
    valid_T: jax.Array
    bias_E: jax.Array | None = None
    token_ids_T: jax.Array | None = None
    positions_T: jax.Array | None = None
    key: jax.Array | None = None
    previous_ids_T: jax.Array | None = None
    replay_expert_TK: jax.Array | None = None
    training: bool = False
    noise_logits_TE: jax.Array | None = None
    noise_TE: jax.Array | None = None
    per_token: bool = False
    capacity_factor: float | None = None
    group_logits_TX: jax.Array | None = None
    group_noise_logits_TX: jax.Array | None = None
    group_noise_TX: jax.Array | None = None


def slots_per_expert(choices: int, num_experts: int, factor: float, rounding: str = "up", minimum: int = 1,
                     multiple: int = 1) -> int:
    """factor · choices / E as a whole number of slots, at least ``minimum``, then up to a multiple of ``multiple``.

    Args:
      choices: what the slots are for: K·T in V-MoE, T in flaxformer and for expert choice.
      rounding: ``'up'``, or ``'nearest'`` with halves to the even number (Python's ``round``).
    """
    slots = factor * choices / num_experts
    # Less a hair: in floating point 1.1 · 100 / 10 is a little above 11 and would be given a 12th slot.
    slots = math.ceil(slots * (1 - 1e-12)) if rounding == "up" else round(slots)
    return -(-max(slots, minimum) // multiple) * multiple


def expert_capacity(tokens: int, num_experts: int, experts_per_token: int, factor: float, counts: str,
                    minimum: int, rounding: str = "default", multiple: int = 1) -> int:
    """Slots per expert for a group of ``tokens`` tokens (who counts what: docs/conventions.md, Capacity).

    ``counts='choices'``: ceil(factor·K·T/E), as V-MoE; a factor of 1 holds a balanced load exactly.
    ``counts='tokens'``: round(factor·T/E), as flaxformer, ST-MoE and OpenMoE's training; K is absent.
    ``counts='group'``: ceil(factor·T), as NLLB-MoE in evaluation; E is absent, too.
    ``rounding`` 'up' or 'nearest' instead of the one named here; ``multiple``: see :func:`slots_per_expert`.

    Never more than T (an expert meets a token once: B38) and at least ``minimum`` where T allows.
    """
    if counts == "group":
        # Not less a hair, as there: ceil(0.07 · 100) is 8 in fairseq and transformers.
        slots = math.ceil(factor * tokens) if rounding != "nearest" else round(factor * tokens)
        return min(tokens, -(-max(slots, minimum) // multiple) * multiple)
    if rounding == "default":
        rounding = "up" if counts == "choices" else "nearest"
    choices = experts_per_token * tokens if counts == "choices" else tokens
    return min(tokens, slots_per_expert(choices, num_experts, factor, rounding, minimum, multiple))


def assign_slots(expert_N: jax.Array, num_experts: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Who gets which buffer slot: one stable count down the list.

    Args:
      expert_N: int32 expert of each assignment in filling order; ``num_experts`` means nowhere, ``num_experts + 1 + e``
        nowhere but through the queue of expert e: the count advances and the slot stays empty.

    Returns:
      slot_N: int32 number of earlier assignments to the same expert (a dropped one still advances the count).
      kept_N: bool, True where the assignment has an expert and its slot is below ``capacity``.
    """
    queue_N = jnp.where(expert_N > num_experts, expert_N - num_experts - 1, expert_N)
    count = _count_by_sorting if lowering_platform() == "cpu" else _count_by_comparing
    slot_N = count(queue_N, num_experts)
    return slot_N, (expert_N < num_experts) & (slot_N < capacity)


def _count_by_comparing(expert_N, num_experts):
    """What accelerators like: they compare N·E numbers at once, and a sort compiles for many seconds."""
    one_hot_NE = expert_N[:, None] == jnp.arange(num_experts)[None, :]
    count_NE = jnp.cumsum(one_hot_NE, axis=0, dtype=jnp.int32)
    return jnp.sum(jnp.where(one_hot_NE, count_NE - 1, 0), axis=1)


def _count_by_sorting(expert_N, num_experts):
    """What CPUs like: work that does not grow with E."""
    source_N, place = sorted_by_expert(expert_N, num_experts), jnp.arange(expert_N.shape[0], dtype=jnp.int32)
    size_E = assignments_per_expert(expert_N, num_experts)
    first_N = (jnp.cumsum(size_E) - size_E).at[expert_N[source_N]].get(mode="fill", fill_value=0)
    slot_N = jnp.zeros_like(place).at[source_N].set(place - first_N, unique_indices=True)
    return jnp.where(expert_N < num_experts, slot_N, 0)


def sorted_by_expert(expert_N: jax.Array, num_experts: int) -> jax.Array:
    """Assignments in the order of their experts, each expert's in the order of the list; nowhere comes last."""
    assignments = expert_N.shape[0]
    if (num_experts + 1) * assignments >= 2**31:
        return jnp.argsort(expert_N, stable=True).astype(jnp.int32)
    # One array of distinct keys sorts four times as fast as pairs.
    return jnp.sort(expert_N * assignments + jnp.arange(assignments, dtype=jnp.int32)) % assignments


def assignments_per_expert(expert_N: jax.Array, num_experts: int) -> jax.Array:
    """int32 ``[E]``; nowhere is not counted."""
    return jnp.zeros(num_experts, jnp.int32).at[expert_N].add(1, mode="drop")


def in_queue(expert_N: jax.Array, num_experts: int) -> jax.Array:
    """What stands in a list for a choice of ``expert_N`` that is not made and passes the expert's queue all the same."""
    return num_experts + 1 + expert_N


def at_experts(value_TE: jax.Array, expert_TK: jax.Array) -> jax.Array:
    """value_TE at the chosen experts, [T, K]; 0 for nowhere. By comparison, so that the gradient is no scatter."""
    chosen_TKE = expert_TK[:, :, None] == jnp.arange(value_TE.shape[-1])[None, None, :]
    return jnp.sum(jnp.where(chosen_TKE, value_TE[:, None, :], 0.0), axis=-1)


def token_choice_list(expert_TK: jax.Array, gate_TK: jax.Array, order: str, statistics: Any,
                      priority_T: jax.Array | None = None) -> Routing:
    """The list of a router in which every token chose K experts (best first).

    ``order``:
      ``'token_major'``: token by token, each with all its choices. Who is dropped never depends on a later token.
      ``'choice_major'``: all first choices by position, then all second choices … (GShard Algorithm 1, Switch,
        flaxformer). With K > 1 a token's second choice waits for *later* tokens' first choices: not causal.
      ``'batch_prioritized'``: as choice_major with tokens by falling ``priority_T``, equal ones by position (V-MoE,
        Riquelme et al. 2021 §4.1). ``top_k`` and ``replay`` hand in the highest or the sum of a token's K raw scores
        (``moe.priority``), 0 for padding; where nothing is handed in it is the token's first gate.
    """
    tokens, choices = expert_TK.shape
    token_T = jnp.arange(tokens, dtype=jnp.int32)
    if order == "token_major":
        token_N = jnp.repeat(token_T, choices, total_repeat_length=tokens * choices)
        return Routing(token_N, expert_TK.reshape(-1), gate_TK.reshape(-1), statistics, choices, order)
    if order == "batch_prioritized":
        priority_T = jax.lax.stop_gradient(gate_TK[:, 0] if priority_T is None else priority_T)
        token_T = jnp.argsort(-priority_T, stable=True).astype(jnp.int32)
        expert_TK, gate_TK = expert_TK[token_T], gate_TK[token_T]
    return Routing(jnp.tile(token_T, choices), expert_TK.T.reshape(-1), gate_TK.T.reshape(-1), statistics, choices,
                   "" if order == "batch_prioritized" else order)
