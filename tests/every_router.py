"""Every router in every variant of its options, and what tests of all of them share.

``VARIANTS`` is the one table; ``tests/test_properties.py`` fails when a router of ``moe_jax.routing.ROUTERS`` is not in it.
Shapes: G groups, T tokens in a group, E experts, K experts per token, N assignments, D and F the widths.
"""

import dataclasses
import functools
import os
import tempfile

import jax
import numpy as np
from hypothesis import settings
from test_dispatch import Lists
from test_routing import numpy_slots, numpy_softmax
from tiny import QUICK

from moe_jax.config import Config, MoEConfig
from moe_jax.nn.moe import RoutingMode
from moe_jax.routing import ROUTERS, RouterInputs
from moe_jax.routing.balance import RouterStatistics

# T is no multiple of any tile and E no power of two; neither divides the other. X: groups of a two-level router.
G, T, E, D, X = 6, 13, 6, 8, 3
IDS = 40  # token ids 0 … 39

# Few examples: each property is tried for every variant. The same ones on every machine.
FEW = settings(max_examples=5, deadline=None, derandomize=True)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A router, the options that make it somebody's, and what is special about it.

    Attributes:
      router: a name in ``ROUTERS``.
      options: fields of MoEConfig beside the number of experts.
      chooses: what decides who goes where: a token's own 'logits', a 'draw' by them in training, a 'plan' made for the whole
        group (where ``plans_always`` is False in training only), the 'experts', nothing that was learned ('fixed'), or a
        'rule' that these tests do not know: the router's own test does.
      draws_by_key: training draws random numbers that cannot be handed in instead.
      by_place: the experts of a token depend on its place among the others: by design, or because what an expert has
        left over after its plan goes to the first token.
    """

    router: str
    options: dict
    chooses: str = "logits"
    draws_by_key: bool = False
    by_place: bool = False
    plans_always: bool = False

    @property
    def moe(self) -> MoEConfig:
        return _moe(self.router, tuple(self.options.items()))

    def config(self, **changes) -> Config:
        """A whole config that allows looking ahead; raises ConfigError where the variant could not be trained."""
        moe = dataclasses.replace(self.moe, **{"allow_noncausal_routing": True, **changes})
        # What to replay comes with a call, so a config names the router that was recorded.
        return Config(moe=dataclasses.replace(moe, router="top_k") if self.router == "replay" else moe)

    def mode(self, dispatch: str, training: bool) -> RoutingMode:
        return RoutingMode(dispatch, 1.0, noise=training, router="replay" if self.router == "replay" else "")

    def is_causal(self, dispatch: str, training: bool) -> bool:
        """What the model says of itself."""
        return self.mode(dispatch, training).is_causal(self.config())

    @property
    def modes(self) -> tuple[bool, ...]:
        """Training; and evaluation, where the router does something else there."""
        plans = self.chooses == "plan" and not self.plans_always
        return (True, False) if plans or ROUTERS[self.router].draws(self.moe) else (True,)

    @property
    def moves(self) -> bool:
        """The mode in which a token's random numbers move with it: training, if they can be handed in."""
        return not self.draws_by_key

    @property
    def two_levels(self) -> bool:
        return ROUTERS[self.router].two_levels

    def slots(self, factor: float) -> int:
        return ROUTERS[self.router].capacity(T, self.moe, factor)


@functools.lru_cache(maxsize=None)
def _moe(router, options):
    options = dict(options)
    if options.get("hash_function") == "balanced":
        options["hash_table"] = hash_table()
    return MoEConfig(**{"num_experts": E, "min_capacity": 1, "balance_weight": 0.0, "router": router, **options})


@functools.lru_cache(maxsize=None)
def hash_table() -> str:
    """A file with one expert per token id."""
    handle, path = tempfile.mkstemp(suffix=".npy", dir=os.environ["MOE_JAX_TEST_SESSION"])
    with os.fdopen(handle, "wb") as file:
        np.save(file, np.random.default_rng(0).integers(0, E, IDS))
    return path


def top_k(choices=2, router="top_k", draws_by_key=False, **options):
    return Variant(router, dict(experts_per_token=choices, **options), draws_by_key=draws_by_key)


def hashed(function="random", choices=1, **options):
    options = dict(experts_per_token=choices, hash_function=function, router_z_weight=0.0, **options)
    return Variant("hash", options, chooses="fixed")


VARIANTS = {
    "plain": top_k(),
    "switch": top_k(1, fill_order="choice_major"),
    "every expert chosen": top_k(E),
    "mixtral": top_k(gate_order="top_k_then_softmax"),
    "qwen": top_k(renormalize=True),
    "gshard": top_k(renormalize=True, second_policy="random", second_threshold=0.5, fill_order="choice_major",
                    draws_by_key=True),
    "gshard, queue": top_k(renormalize=True, second_policy="random", second_threshold=0.5, fill_order="choice_major",
                           second_in_queue=True, draws_by_key=True),
    "st_moe threshold": top_k(renormalize=True, second_policy="threshold", second_threshold=0.4),
    "first choices only": top_k(second_policy="none", fill_order="choice_major"),
    "v_moe": top_k(router_noise=1.0, fill_order="batch_prioritized", importance_weight=0.005, load_weight=0.005),
    "batch prioritized by sum": top_k(fill_order="batch_prioritized", priority="sum"),
    "deepseek v2": top_k(num_groups=3, groups_per_token=2, route_scale=16.0, device_weight=0.05, communication_weight=0.02),
    "deepseek v3": top_k(score="sigmoid", renormalize=True, route_scale=2.5, bias_update_rate=0.001, num_groups=3,
                         groups_per_token=2, group_score="top_sum"),
    "llama 4": top_k(1, score="sigmoid", gate_on="input"),
    "padding in means": top_k(padding="in_means"),
    "padding takes slots": top_k(padding="takes_slots"),
    "shazeer": top_k(router="noisy_top_k", gate_order="top_k_then_softmax", importance_weight=0.1, load_weight=0.1),
    "shazeer, one expert": top_k(1, router="noisy_top_k"),
    "hierarchical": Variant("hierarchical", dict(experts_per_token=4, num_groups=X, groups_per_token=2,
                                                 importance_weight=0.1, load_weight=0.1)),
    "reinforce": Variant("reinforce", dict(experts_per_token=1), chooses="draw", draws_by_key=True),
    "reinforce, greedy": Variant("reinforce", dict(experts_per_token=1, policy_sampling="greedy")),
    "hash": hashed(),
    "hash, bigram": hashed("bigram"),
    "hash, previous token": hashed("previous_token"),
    "hash, position": hashed("position"),
    "hash, table": hashed("balanced"),
    "multihash": hashed(choices=2, fill_order="choice_major"),
    "balanced": Variant("balanced", dict(experts_per_token=2), chooses="fixed", by_place=True),
    "all": Variant("all", dict(experts_per_token=E), chooses="fixed"),
    "sinkhorn": Variant("sinkhorn", dict(experts_per_token=1), chooses="plan"),
    "sinkhorn, two experts": Variant("sinkhorn", dict(experts_per_token=2), chooses="plan"),
    "s_base": Variant("s_base", dict(experts_per_token=1), chooses="plan"),
    "base": Variant("base", dict(experts_per_token=1), chooses="plan"),
    "entropic plan": Variant("transport_top_k", dict(experts_per_token=2, fill_order="batch_prioritized", priority="sum"),
                             chooses="plan", plans_always=True),
    "quadratic plan": Variant("transport_top_k", dict(experts_per_token=2, transport_plan="quadratic"),
                              chooses="plan", plans_always=True),
    "plan as gates": Variant("transport_top_k", dict(experts_per_token=2, transport_gate="plan"),
                             chooses="plan", plans_always=True),
    "replay": Variant("replay", dict(experts_per_token=2), chooses="fixed"),
    "replay, r3": Variant("replay", dict(experts_per_token=2, gate_order="top_k_then_softmax"), chooses="fixed"),
    "expert choice": Variant("expert_choice", dict(experts_per_token=2), chooses="experts"),
    "expert choice, capped": Variant("expert_choice", dict(experts_per_token=2, experts_per_token_cap=3),
                                     chooses="experts", by_place=True),
    "expert choice by a plan": Variant("transport_expert_choice", dict(experts_per_token=2), chooses="experts"),
    "expert choice by a sparse plan": Variant(
        "transport_expert_choice", dict(experts_per_token=2, transport_plan="k_sparse"), chooses="experts", by_place=True),
}


def variants(*chooses: str) -> list[str]:
    return [name for name, variant in VARIANTS.items() if variant.chooses in chooses]


# What routers may look at


LEARNED = ("logits", "noise_logits", "group_logits", "group_noise_logits")
PER_TOKEN = (*LEARNED, "valid", "ids", "previous", "positions", "replay", "noise", "group_noise", "x")


def problem(variant: Variant, seed: int) -> dict[str, np.ndarray]:
    """Arrays ``[G, T, …]`` with everything any router looks at: random, every token valid."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    shape = (G, T)
    replay = np.argsort(rng.random((*shape, E)), axis=-1)[..., :variant.moe.experts_per_token]
    arrays = dict(
        logits=draw(*shape, E), valid=np.ones(shape, bool), ids=rng.integers(1, IDS, shape, dtype=np.int32),
        positions=np.tile(np.arange(T, dtype=np.int32), (G, 1)),
        replay=np.where(rng.random(replay.shape) < 0.2, E, replay).astype(np.int32),
        noise=draw(*shape, E), noise_logits=draw(*shape, E), x=draw(*shape, D), group_logits=draw(*shape, X),
        group_noise=draw(*shape, X), group_noise_logits=draw(*shape, X),
        bias=draw(G, E) / 4 if variant.moe.bias_update_rate else np.zeros((G, E), np.float32),
        seed=np.arange(G, dtype=np.uint32) + np.uint32(seed))
    return with_previous(arrays)


def with_previous(arrays):
    return {**arrays, "previous": np.pad(arrays["ids"][:, :-1], ((0, 0), (1, 0)))}


def awkward(variant: Variant, seed: int = 0) -> dict[str, np.ndarray]:
    """One group of each: random with padding; half of the experts empty; one expert takes all; nothing valid; every
    logit tied; one valid token."""
    arrays = problem(variant, seed)
    logits, valid = arrays["logits"], arrays["valid"]
    valid[0] = np.random.default_rng(seed).random(T) < 0.7
    logits[1, :, E // 2:] -= 50.0
    logits[2, :, 2] += 50.0
    valid[3] = False
    logits[3, ::2] = np.nan
    logits[4] = np.where(np.arange(E) % 2, -0.0, 0.0)
    valid[5] = np.arange(T) == 7
    arrays["replay"][1] = np.where(arrays["replay"][1] >= E // 2, E, arrays["replay"][1])
    arrays["replay"][2, :, 0], arrays["replay"][2, :, 1:] = 2, E
    arrays["ids"][1:3] = 5
    return with_previous(arrays)


def moved(arrays, place_P):
    """The tokens at other places: place p gets token ``place_P[p]`` (-1: padding, full of what would be noticed)."""
    found, index = dict(arrays), np.maximum(place_P, 0)
    poison = dict(dict.fromkeys(LEARNED, np.nan), x=np.nan, ids=7, previous=3, positions=1, noise=5.0)
    for name in PER_TOKEN:
        value = np.take(arrays[name], index, axis=1)
        if (place_P < 0).any():
            value[:, place_P < 0] = poison.get(name, 0)
        found[name] = value
    return found


# The package, compiled once per variant and mode


@functools.lru_cache(maxsize=None)
def _compiled(variant_name, training):
    variant = VARIANTS[variant_name]
    router, moe = ROUTERS[variant.router], variant.moe

    def inputs_of(learned, arrays):
        noisy, given = training and router.learned_noise, {}
        if router.learned:
            given["logits_TE"] = learned["logits"]
        if noisy:
            given["noise_logits_TE"] = learned["noise_logits"]
        if training and router.draws(moe) and not variant.draws_by_key:
            given["noise_TE"] = arrays["noise"]
        if router.two_levels:
            given["group_logits_TX"] = learned["group_logits"]
        if router.two_levels and noisy:
            given |= dict(group_noise_logits_TX=learned["group_noise_logits"], group_noise_TX=arrays["group_noise"])
        if variant.router == "replay":
            given["replay_expert_TK"] = arrays["replay"]
        key = jax.random.key(arrays["seed"]) if training and router.draws(moe) else None
        return RouterInputs(**{"logits_TE": None, **given}, valid_T=arrays["valid"], bias_E=learned["bias"],
                            token_ids_T=arrays["ids"], positions_T=arrays["positions"], key=key,
                            previous_ids_T=arrays["previous"], training=training)

    def one(learned, arrays):
        routing = router.route(inputs_of(learned, arrays), moe)
        return {"gate_N": routing.gate_N, **vars(routing.statistics)}, routing

    def everything(arrays, cotangents):
        # The backward pass makes every choice a second time.
        route = jax.checkpoint(jax.vmap(one))
        outputs, pull, routing = jax.vjp(lambda learned: route(learned, arrays),
                                         {name: arrays[name] for name in (*LEARNED, "bias")}, has_aux=True)
        fit = lambda name, value: cotangents[name][:, :np.prod(value.shape[1:], dtype=int)].reshape(value.shape)
        return outputs, routing, pull({name: fit(name, value) for name, value in outputs.items()})[0]

    return jax.jit(everything, compiler_options=QUICK)


OUTPUTS = ("gate_N", *(field.name for field in dataclasses.fields(RouterStatistics)))


def pulled(name: str, training: bool, arrays, **cotangents):
    """(gate_N and statistics, Routing, gradients of Σ output · cotangent by what is LEARNED and the bias), leading G."""
    full = {output: np.zeros((G, T * E), np.float32) for output in OUTPUTS}
    for output, value in cotangents.items():
        value = np.asarray(value, np.float32).reshape(G, -1)
        full[output][:, :value.shape[1]] = value
    return jax.device_get(_compiled(name, training)(arrays, full))


def routed(name: str, training: bool, arrays):
    """The Routing of every group, leading G, with statistics."""
    return pulled(name, training, arrays)[1]


def lists_of(routing, gate_on: str = "output") -> Lists:
    return Lists(routing.token_N, routing.expert_N, routing.gate_N, routing.choices_per_token, routing.order, gate_on)


def kept_of(lists: Lists, capacity: int) -> np.ndarray:
    """[G, N] bool: who gets a slot, one after the other down the list. ``E + 1 + e`` only passes the queue of e."""
    queues = np.where(lists.expert_GN > E, lists.expert_GN - E - 1, lists.expert_GN).tolist()
    return np.array([numpy_slots(experts, E, capacity)[1] for experts in queues]) & (lists.expert_GN < E)


# The reference: NumPy, fp64, one token at a time


def noisy_logits(variant, training):
    """``arrays -> [G, T, E]`` fp64 logits that choose and weigh, NaN as it is; of a two-level router ``[G, T, E + X]``."""
    moe, router = variant.moe, ROUTERS[variant.router]

    def level(arrays, prefix):
        logits, noise, noise_logits = (arrays[prefix + name].astype(np.float64) for name in ("logits", "noise", "noise_logits"))
        if training and router.learned_noise:
            return logits + noise * np.log1p(np.exp(noise_logits))
        return logits + noise * moe.router_noise / E if training else logits

    if not router.two_levels:
        return lambda arrays: level(arrays, "")
    return lambda arrays: np.concatenate([level(arrays, ""), level(arrays, "group_")], axis=-1)


def numpy_scores(variant, logits_E):
    """A token's scores; of a two-level router the product of both levels'."""
    if variant.two_levels:
        inside = [numpy_softmax(logits_E[e:e + E // X]) for e in range(0, E, E // X)]
        return np.repeat(numpy_softmax(logits_E[E:]), E // X) * np.concatenate(inside)
    sigmoid = variant.moe.score == "sigmoid" or variant.router == "base" or (
        variant.router == "sinkhorn" and variant.moe.experts_per_token == 1)
    return 1 / (1 + np.exp(-logits_E)) if sigmoid else numpy_softmax(logits_E)


def best(values, count):
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:count]


def numpy_choice(variant, logits_E, bias_E):
    """A token's K experts by its own logits, best first: all its choices, made or not."""
    moe, size = variant.moe, E // variant.moe.num_groups
    if variant.two_levels:
        inside = moe.experts_per_token // moe.groups_per_token
        kept = [x * size + e for x in best(logits_E[E:], moe.groups_per_token)
                for e in best(logits_E[x * size:(x + 1) * size], inside)]
        gates = dict(zip(kept, numpy_gates(variant, logits_E, np.array(kept))))
        return sorted(kept, key=lambda e: (-gates[e], e))
    score_E = numpy_scores(variant, logits_E)
    rank_E = score_E + bias_E if moe.bias_update_rate else logits_E
    if moe.groups_per_token:
        summed, biased_E = moe.group_score == "top_sum", score_E + bias_E
        ranked_E = biased_E if summed else rank_E
        count = max(1, moe.experts_per_token // moe.groups_per_token) if summed else 1
        worth = [sum(np.sort(ranked_E[e:e + size])[::-1][:count]) for e in range(0, E, size)]
        allowed = np.isin(np.arange(E) // size, best(worth, moe.groups_per_token))
        rank_E = np.where(allowed, rank_E, -np.inf)
    return best(rank_E, moe.experts_per_token)


def numpy_gates(variant, logits_E, experts):
    """The gates of a token with these experts; differentiable by differences."""
    moe = variant.moe
    if variant.router == "hash":
        return np.ones(len(experts))
    if variant.two_levels:
        groups = experts // (E // X)
        kept = sorted(set(groups.tolist()))
        outer = dict(zip(kept, numpy_softmax(logits_E[E:][kept])))
        inner = {x: np.exp(logits_E[experts[groups == x]]).sum() for x in kept}
        return np.array([outer[x] * np.exp(logits_E[e]) / inner[x] for e, x in zip(experts, groups.tolist())])
    if moe.gate_order == "top_k_then_softmax":
        return numpy_softmax(logits_E[experts])
    score = numpy_scores(variant, logits_E)[experts]
    return moe.route_scale * (score / score.sum() if moe.renormalize else score)
