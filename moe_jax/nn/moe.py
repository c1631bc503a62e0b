"""The mixture-of-experts layer: owns the parameters, asks ``routing/`` who goes where and ``dispatch/`` to move them."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import Config, MoEConfig
from moe_jax.dispatch import dispatcher
from moe_jax.dispatch.grouped_matmul import choose
from moe_jax.dispatch.placement import round_copies, to_copies
from moe_jax.nn.experts import Experts
from moe_jax.nn.groups import GroupLayout
from moe_jax.nn.initializers import normal
from moe_jax.nn.mlp import MLP
from moe_jax.nn.zero_experts import ZeroComputationExperts
from moe_jax.routing import ROUTERS
from moe_jax.routing.assignment import RouterInputs, Routing, assign_slots, in_queue
from moe_jax.routing.balance import RouterStatistics, pooled
from moe_jax.routing.limits import within_device_budget
from moe_jax.routing.policy import PolicyTerms
from moe_jax.routing.scores import multiplicative_jitter
from moe_jax.sharding import ACTIVATIONS, over_groups, per_device, spec


@functools.partial(jax.tree_util.register_dataclass, meta_fields=(),
                   data_fields=("input_BSD", "entropy_BS", "confidence_BS", "logit_norm_BS"))
@dataclasses.dataclass(frozen=True)
class RouterView:
    """What a router saw and made of it, token by token.

    Attributes:
      input_BSD: what enters the router (and the experts).
      entropy_BS, confidence_BS: of its scores as shares of 1, as :class:`RouterStatistics` has them: entropy in nats and
        the largest share. Of routers without parameters, of what stands in for scores.
      logit_norm_BS: Euclidean norm of the logits; None of routers without parameters.
    """

    input_BSD: jax.Array
    entropy_BS: jax.Array
    confidence_BS: jax.Array
    logit_norm_BS: jax.Array | None


@functools.partial(jax.tree_util.register_dataclass, meta_fields=(), data_fields=("logits_BSE", "combine_BSE", "output_BSD"))
@dataclasses.dataclass(frozen=True)
class MoETrace:
    """What a layer computed, token by token, to compare it with another implementation.

    Attributes:
      logits_BSE: of the router; None of routers without parameters.
      combine_BSE: the gates that were applied; 0 for experts not chosen and for choices dropped.
      output_BSD: the layer's output, that of experts that every token passes included.
    """

    logits_BSE: jax.Array | None
    combine_BSE: jax.Array
    output_BSD: jax.Array


@functools.partial(jax.tree_util.register_dataclass, meta_fields=(),
                   data_fields=("router", "kept_GE", "routing_G", "kept_GN", "policy_BS", "copies_GP", "view", "trace"))
@dataclasses.dataclass(frozen=True)
class MoEStatistics:
    """What one layer reports beside its output; a scan over layers stacks it.

    Attributes:
      router: sums per group, leaves ``[G, ...]``; per sequence or document if that is the scope of the balancing losses
        (``[B, ...]``, ``[B·S, ...]`` with zeros where there is no document).
      kept_GE: choices each expert really computed, after drops.
      routing_G, kept_GN: every assignment and whether it was computed; None unless asked for (``record``).
      policy_BS: per token, of a router that is a policy in training, else None.
      copies_GP: choices each copy of an expert really computed; None without ``moe.expert_copies``.
      view: of the router, token by token; None unless asked for (``inspect``).
      trace: of the layer, token by token; None unless asked for (``trace``).
    """

    router: RouterStatistics
    kept_GE: jax.Array
    routing_G: Routing | None = None
    kept_GN: jax.Array | None = None
    policy_BS: PolicyTerms | None = None
    copies_GP: jax.Array | None = None
    view: RouterView | None = None
    trace: MoETrace | None = None


# Dispatchers that compute every assignment.
WITHOUT_DROPS = ("dropless", "reference")


@dataclasses.dataclass(frozen=True)
class RoutingMode:
    """How a call of the model routes; static.

    Attributes:
      dispatch: a name in ``moe_jax.dispatch.DISPATCHERS``.
      capacity_factor: for dispatchers with buffers.
      record: also return every assignment.
      noise: route as in training: draw the router's noise (needs a key), balance where a router does so only there.
      router: a name in ``moe_jax.routing.ROUTERS`` instead of the config's; '' = the config's.
      inspect: also return what each router saw and made of it (:class:`RouterView`).
      trace: also return what each layer computed (:class:`MoETrace`, ``Output.layers_LBSD``).
    """

    dispatch: str
    capacity_factor: float
    record: bool = False
    noise: bool = False
    router: str = ""
    inspect: bool = False
    trace: bool = False

    @classmethod
    def training(cls, config: Config, record: bool = False) -> "RoutingMode":
        return cls(config.moe.dispatch, config.moe.capacity_factor, record, noise=True)

    @classmethod
    def evaluation(cls, config: Config, record: bool = False) -> "RoutingMode":
        return cls(config.moe.eval_dispatch, config.moe.eval_capacity_factor, record)

    @classmethod
    def dropless(cls) -> "RoutingMode":
        return cls("dropless", 1.0)

    @classmethod
    def causal(cls, config: Config, record: bool = False) -> "RoutingMode":
        """What a model can do when it writes one token at a time: nothing is dropped, and a router that compares tokens,
        later ones of the text or those of other rows, gives way to token choice. In an encoder alone it may stay."""
        if config.encoder_moe_layers and not config.decoder_moe_layers:
            return cls("dropless", config.moe.eval_capacity_factor, record)
        mode = cls("dropless", 1.0, record)
        return dataclasses.replace(mode, router="top_k") if mode.compares_tokens(config) else mode

    def compares_tokens(self, config: Config) -> bool:
        """Whether a token's experts depend on other tokens of its text or batch."""
        return not self._is_causal(dataclasses.replace(config.moe, group_over="sequence"))

    def is_causal(self, config: Config) -> bool:
        """Whether no token's output depends on later tokens. Where nothing is dropped the fill order plays no part; an encoder
        looks ahead whatever its router does."""
        return not config.decoder_moe_layers or self._is_causal(config.moe)

    def _is_causal(self, moe: MoEConfig) -> bool:
        # Asked about this mode's dispatcher, whatever the config trains and evaluates with.
        moe = dataclasses.replace(moe, dispatch=self.dispatch, eval_dispatch=self.dispatch)
        if self.dispatch in WITHOUT_DROPS:
            moe = dataclasses.replace(moe, fill_order="token_major")
        if not self.noise:
            moe = dataclasses.replace(moe, device_capacity_factor=0.0)
        if moe.is_dense:
            return True
        router = ROUTERS[self.router or moe.router]
        return (router.is_causal if self.noise else router.evaluation_is_causal or router.is_causal)(moe)


class MoELayer(nnx.Module):
    """Router, E experts, and optionally experts that every token passes (shared experts, DeepSeekMoE §3.2)."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model, moe = config.model, config.moe
        self.config = config
        router = ROUTERS[moe.router]
        if router.learned:
            self.w_router_DE = normal(rngs, (model.d_model, moe.num_routed_experts), moe.router_init)
        if moe.router_bias:
            self.b_router_E = nnx.Param(jnp.zeros(moe.num_routed_experts))
        if router.learned_noise:
            # Shazeer et al. 2017 §A
            self.w_router_noise_DE = nnx.Param(jnp.zeros((model.d_model, moe.num_routed_experts)))
        if router.two_levels:
            self.w_router_group_DX = normal(rngs, (model.d_model, moe.num_groups), moe.router_init)
            self.w_router_group_noise_DX = nnx.Param(jnp.zeros((model.d_model, moe.num_groups)))
        self.learns_baseline = ROUTERS[moe.router].is_policy and moe.policy_baseline == "learned"
        if self.learns_baseline:
            self.w_value_D, self.b_value = nnx.Param(jnp.zeros(model.d_model)), nnx.Param(jnp.zeros(()))
        clamp = (moe.activation_limit, moe.activation_alpha)
        experts = [Experts(count, model.d_model, width, moe.activation, model.init_scale, rngs, moe.expert_bias, clamp)
                   for width, count in moe.width_classes]
        self.experts = nnx.List(experts) if moe.expert_widths else experts[0]
        for width, count in moe.width_classes:
            # Refused now, not when the first dropless evaluation is traced.
            rows_ND, weight_EDF = (jax.ShapeDtypeStruct(shape, jnp.dtype(model.dtype))
                                   for shape in ((1, model.d_model), (count, model.d_model, width)))
            choose(moe.grouped_matmul, rows_ND, weight_EDF)
        if moe.expert_copies:
            # Given by moe_jax.training.rearrange.with_copies, with the weights of the copies.
            self.copies_EJ = nnx.Param(jnp.asarray(round_copies(moe.num_experts, moe.expert_copies)))
        if moe.num_shared_experts:
            # n shared experts side by side are one FFN of n times the width.
            self.shared = MLP(model.d_model, moe.shared_width, moe.activation, model.init_scale, rngs, moe.expert_bias, clamp)
        if moe.shared_gate:
            self.w_shared_gate_D = normal(rngs, (model.d_model,), moe.router_init)
        if moe.num_zero_computation:
            self.zero_computation = ZeroComputationExperts(config, rngs)

    def __call__(self, x_BSD: jax.Array, valid_BS: jax.Array, mode: RoutingMode, bias_E: jax.Array,
                 key: jax.Array | None = None, token_ids_BS: jax.Array | None = None,
                 positions_BS: jax.Array | None = None, previous_ids_BS: jax.Array | None = None,
                 replay_BSK: jax.Array | None = None,
                 noise_BSE: jax.Array | None = None, segment_ids_BS: jax.Array | None = None,
                 undropped_BS: jax.Array | None = None) -> tuple[jax.Array, MoEStatistics]:
        """The layer's output (without residual) and its statistics.

        Args:
          valid_BS: False for padding, which is sent nowhere and counted nowhere.
          bias_E: selection bias (loss-free balancing), zeros if unused.
          key: for the router's noise, if ``mode.noise`` and the router has any.
          token_ids_BS, positions_BS, previous_ids_BS: for routers that look at them.
          replay_BSK: recorded choices to follow, where the router is ``replay``.
          noise_BSE: standard normal draws for the router to use instead of its own, to reproduce another implementation.
          segment_ids_BS: the document of each token in its row, 1, 2, …, for ``moe.balance_scope='document'``.
          undropped_BS: tokens that ``moe.device_capacity_factor`` never drops; None: there are none.
        """
        moe, router = self.config.moe, ROUTERS[mode.router or self.config.moe.router]
        groups = GroupLayout(*valid_BS.shape, self.config)
        inputs_G = self._router_inputs(groups, x_BSD, valid_BS, mode, bias_E, key, token_ids_BS, positions_BS,
                                       previous_ids_BS, replay_BSK, noise_BSE)
        x_GTD, valid_GT = groups.split(x_BSD), inputs_G.valid_T
        # [G, ...] per device: routing sorts and counts inside one group, which lies on one device.
        routing_G = over_groups(lambda inputs: router.route(inputs, moe), inputs_G)
        policy_BS = self._policy(routing_G.policy, x_BSD, valid_BS, groups)
        routing_G = dataclasses.replace(routing_G, gate_on=moe.gate_on, policy=None)
        capacity = router.capacity(x_GTD.shape[1], moe, mode.capacity_factor)
        listed_G = dataclasses.replace(routing_G, statistics=None)
        if moe.device_capacity_factor and mode.noise:
            undropped_GT = None if undropped_BS is None else groups.split(undropped_BS)
            listed_G = over_groups(functools.partial(within_device_budget, moe=moe), listed_G, valid_GT, undropped_GT)
        if moe.second_in_queue and mode.dispatch in WITHOUT_DROPS:  # no buffers, no queues
            listed_G = dataclasses.replace(listed_G, expert_N=jnp.minimum(listed_G.expert_N, moe.num_routed_experts))
        if moe.expert_copies:
            listed_G = self._to_copies(listed_G)
        if moe.renormalize_after_drops:  # by the buffers as they are: copies have slots of their own
            slots = capacity if mode.dispatch not in WITHOUT_DROPS else x_GTD.shape[1]
            gate_GN = over_groups(functools.partial(shared_among_kept, num_experts=moe.num_copies, capacity=slots,
                                                    tokens=x_GTD.shape[1]), listed_G)
            listed_G, routing_G = (dataclasses.replace(each, gate_N=gate_GN) for each in (listed_G, routing_G))
        y_GTD, kept_GN = self._experts(x_GTD, listed_G, dispatcher_of(self.config, mode.dispatch), capacity)
        y_BSD = groups.join(y_GTD)
        if moe.output_dropout:
            y_BSD = self._dropped_out(y_BSD, mode, key)
        if moe.num_shared_experts:
            y_BSD = y_BSD + self._shared(x_BSD)
        kept_GE = over_groups(functools.partial(_count, num_experts=moe.num_routed_experts), routing_G.expert_N, kept_GN)
        in_scope = self._in_scope(routing_G.statistics, groups, segment_ids_BS, mode.inspect)
        statistics = MoEStatistics(in_scope, kept_GE, policy_BS=policy_BS)
        if moe.expert_copies:
            count = functools.partial(_count, num_experts=moe.expert_copies)
            statistics = dataclasses.replace(statistics, copies_GP=over_groups(count, listed_G.expert_N, kept_GN))
        if mode.record:
            statistics = dataclasses.replace(
                statistics, routing_G=dataclasses.replace(routing_G, statistics=None), kept_GN=kept_GN)
        if mode.inspect:
            statistics = dataclasses.replace(statistics, view=_view(x_BSD, routing_G.statistics, inputs_G, groups))
        if mode.trace:
            combine_GTE = over_groups(functools.partial(_combine, tokens=x_GTD.shape[1], num_experts=moe.num_routed_experts),
                                      dataclasses.replace(routing_G, statistics=None), kept_GN)
            logits_BSE = None if inputs_G.logits_TE is None else groups.join(inputs_G.logits_TE)
            statistics = dataclasses.replace(statistics, trace=MoETrace(logits_BSE, groups.join(combine_GTE), y_BSD))
        return y_BSD, statistics

    def choices(self, x_BSD: jax.Array, valid_BS: jax.Array, mode: RoutingMode, bias_E: jax.Array, token_ids_BS: jax.Array,
                positions_BS: jax.Array, previous_ids_BS: jax.Array) -> Routing:
        """Where the layer would send these tokens, leaves ``[G, ...]``; nothing is computed of them. Arguments as above."""
        router, groups = ROUTERS[mode.router or self.config.moe.router], GroupLayout(*valid_BS.shape, self.config)
        inputs_G = self._router_inputs(groups, x_BSD, valid_BS, mode, bias_E, None, token_ids_BS, positions_BS,
                                       previous_ids_BS)
        return over_groups(lambda inputs: dataclasses.replace(router.route(inputs, self.config.moe), statistics=None),
                           inputs_G)

    def _router_inputs(self, groups, x_BSD, valid_BS, mode, bias_E, key, token_ids_BS, positions_BS, previous_ids_BS,
                       replay_BSK=None, noise_BSE=None):
        """What the router looks at, every leaf led by G."""
        moe, router = self.config.moe, ROUTERS[mode.router or self.config.moe.router]
        if moe.padding in ("routed", "as_text"):
            valid_BS = jnp.ones_like(valid_BS)
        x_GTD, valid_GT = groups.split(x_BSD), groups.split(valid_BS)
        key_G = self._group_keys(x_GTD.shape[0], mode, key, router)
        logits = self._logits(x_GTD, key_G, router)
        bias_GE = jnp.broadcast_to(bias_E, (x_GTD.shape[0], moe.num_routed_experts), out_sharding=spec("GE", ACTIVATIONS))
        token_ids_GT, positions_GT, previous_ids_GT, replay_GTK, noise_GTE = (
            None if ids is None else groups.split(ids)
            for ids in (token_ids_BS, positions_BS, previous_ids_BS, replay_BSK, noise_BSE))
        return RouterInputs(valid_T=valid_GT, bias_E=bias_GE, token_ids_T=token_ids_GT, positions_T=positions_GT,
                            key=key_G if router.draws(moe) else None, previous_ids_T=previous_ids_GT,
                            replay_expert_TK=replay_GTK, training=mode.noise, noise_TE=noise_GTE,
                            per_token=mode.inspect or moe.balance_scope in ("sequence", "document"),
                            capacity_factor=mode.capacity_factor, **logits)

    def _shared(self, x_BSD):
        """What the shared experts add, times σ(x·w) if they have a gate of their own (Qwen2-MoE); the gate in fp32 (A5)."""
        y_BSD = self.shared(x_BSD)
        if not self.config.moe.shared_gate:
            return y_BSD
        gate_BS = jax.nn.sigmoid(jnp.einsum("BSD,D->BS", x_BSD.astype(jnp.float32), self.w_shared_gate_D[...],
                                            precision=jax.lax.Precision.HIGHEST))
        return y_BSD * gate_BS[:, :, None].astype(y_BSD.dtype)

    def _dropped_out(self, y_BSD, mode, key):
        """Training: 0 for a random ``moe.output_dropout`` of the tokens; else what that comes to on average."""
        rate = self.config.moe.output_dropout
        if not mode.noise or key is None:
            return y_BSD * (1 - rate)
        # Folded with a number that no use of the key inside a group has (``_group_keys`` splits it).
        kept_BS = jax.random.bernoulli(jax.random.fold_in(key, 2**31), 1 - rate, y_BSD.shape[:2])
        return jnp.where(jax.reshard(kept_BS, spec("BS", ACTIVATIONS))[:, :, None], y_BSD, 0)

    def _to_copies(self, routing_G):
        """The lists with copies in the place of experts; the g-th group begins with the g-th copy of each."""
        moe = self.config.moe

        def local(routing_G, number_G, copies_EJ):
            one = lambda routing, number: to_copies(routing, copies_EJ, moe.expert_copies, moe.num_routed_experts, number)
            return jax.vmap(one)(routing_G, number_G)

        number_G = jnp.arange(routing_G.expert_N.shape[0], dtype=jnp.int32)
        return per_device(local, routing_G, number_G, replicated=(self.copies_EJ[...],))

    def _experts(self, x_GTD, routing_G, dispatch, capacity):
        """The routed experts' part of the output and which assignments were computed, class by class: experts of one
        width are dispatched together, those without computation not at all."""
        moe, first = self.config.moe, 0
        total = moe.num_copies + moe.num_zero_computation
        y_GTD, kept_GN = jnp.zeros_like(x_GTD), jnp.zeros_like(routing_G.expert_N, bool)
        for experts, (_, count) in zip(self.experts if moe.expert_widths else [self.experts], moe.width_classes):
            part_G = part_of(routing_G, first, count, total)
            y, kept = dispatch(x_GTD, part_G, experts.function, experts.weights(x_GTD.dtype), count, capacity)
            if count == total:
                return y, kept
            y_GTD, kept_GN, first = y_GTD + y, kept_GN | kept, first + count
        if moe.num_zero_computation:
            y_GTD = y_GTD + self.zero_computation(x_GTD, routing_G)
            kept_GN |= (routing_G.expert_N >= first) & (routing_G.expert_N < total)
        return y_GTD, kept_GN

    def _in_scope(self, statistics_G, groups, segment_ids_BS, inspect):
        """The router's sums, per group or – of every token's terms – per sequence or document."""
        scope = self.config.moe.balance_scope
        if not inspect and scope not in ("sequence", "document"):
            return statistics_G
        if statistics_G.tokens.ndim != 2:
            asks = "inspect=True" if inspect else f"moe.balance_scope={scope!r}"
            raise ValueError(f"{asks}: moe.router={self.config.moe.router!r} reports sums over groups; let it call "
                             f"router_statistics with per_token=inputs.per_token")
        if scope not in ("sequence", "document"):
            return over_groups(pooled, statistics_G)
        terms_BS = jax.tree.map(groups.join, statistics_G)
        if scope == "sequence":
            return over_groups(pooled, terms_BS)
        if segment_ids_BS is None:
            raise ValueError("moe.balance_scope='document' needs to know which token is of which document: call the layer "
                             "with segment_ids_BS")

        def rows(terms_BS, segment_ids_BS):
            # At most as many documents as positions; padding (segment 0) has terms of zero.
            length = segment_ids_BS.shape[1]
            sums = jax.vmap(lambda terms, ids: pooled(terms, jnp.maximum(ids - 1, 0), length))(terms_BS, segment_ids_BS)
            return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), sums)

        return per_device(rows, terms_BS, segment_ids_BS)

    def _group_keys(self, groups, mode, key, router):
        """One key per group – the same for the same group on any mesh – or None where nothing is drawn."""
        if not mode.noise or not (router.draws(self.config.moe) or self.config.moe.router_jitter > 0):
            return None
        return jax.reshard(jax.random.split(key, groups), spec("G", ACTIVATIONS))

    def _policy(self, policy_GT, x_BSD, valid_BS, groups):
        """What a policy reports of each token, with its learned baseline, in the layout of the loss; None of others.

        The baseline looks at the layer's input, and its error teaches it alone: the trunk is not bent to be predictable.
        """
        if policy_GT is None:
            return None
        policy_BS = jax.tree.map(groups.join, policy_GT)
        if not self.learns_baseline:
            return policy_BS
        value_BS = jnp.einsum("BSD,D->BS", jax.lax.stop_gradient(x_BSD).astype(jnp.float32), self.w_value_D[...],
                              precision=jax.lax.Precision.HIGHEST) + self.b_value[...]
        return dataclasses.replace(policy_BS, value=jnp.where(valid_BS, value_BS, 0.0))

    def _logits(self, x_GTD, key_G, router):
        """Router logits, and those of its noise (None in evaluation), by their names in RouterInputs; in fp32 whatever
        the compute dtype (A5): the TPU's default product would round to bf16. ``moe.router_dtype`` may ask for that."""
        x_GTD, rounded = x_GTD.astype(jnp.float32), lambda x: x
        if self.config.moe.router_dtype == "bfloat16":
            # Not a cast there and back, which XLA takes for excess.
            rounded = functools.partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
        if key_G is not None and self.config.moe.router_jitter > 0:
            jitter = functools.partial(multiplicative_jitter, epsilon=self.config.moe.router_jitter)
            # Folded, so that jitter and a router that draws do not share their numbers.
            x_GTD = over_groups(lambda x, key: jitter(x, jax.random.fold_in(key, 1)), x_GTD, key_G)
        x_GTD = rounded(x_GTD)

        def product(w_DE, b_E=None):
            y_GTE = jnp.einsum("GTD,DE->GTE", x_GTD, rounded(w_DE), precision=jax.lax.Precision.HIGHEST)
            return rounded(y_GTE if b_E is None else y_GTE + rounded(b_E)[None, None, :])

        if not router.learned:
            return {"logits_TE": None}
        if not hasattr(self, "w_router_DE"):
            raise ValueError(f"the layer has no router to ask: moe.router={self.config.moe.router!r} has no parameters")
        bias_E = self.b_router_E[...] if self.config.moe.router_bias else None
        logits = {"logits_TE": product(self.w_router_DE[...], bias_E)}
        if router.two_levels:
            logits["group_logits_TX"] = product(self.w_router_group_DX[...])
        if router.learned_noise and key_G is not None:
            logits["noise_logits_TE"] = product(self.w_router_noise_DE[...])
            if router.two_levels:
                logits["group_noise_logits_TX"] = product(self.w_router_group_noise_DX[...])
        return logits


def dispatcher_of(config: Config, name: str) -> Callable:
    """The dispatcher ``name`` with the config's options.

    Raises:
      ConfigError: the devices of the mesh in context cannot exchange rows as the config says.
    """
    return dispatcher(name, config.moe, config.mesh.expert_nodes, config.nodes_per_token)


def shared_among_kept(routing: Routing, num_experts: int, capacity: int, tokens: int) -> jax.Array:
    """Gates divided by the sum of those of the token's choices that find a slot, fp32 ``[N]`` (NLLB-MoE)."""
    _, kept_N = assign_slots(routing.expert_N, num_experts, capacity)
    gate_N = jnp.where(kept_N, routing.gate_N, 0.0)
    total_T = jnp.zeros(tokens, jnp.float32).at[routing.token_N].add(gate_N)
    # A lone gate so small that it would count as nothing must not divide by itself.
    return gate_N / jnp.maximum(total_T, jnp.finfo(jnp.float32).eps)[routing.token_N]


def part_of(routing: Routing, first: int, count: int, total: int) -> Routing:
    """The list as ``count`` experts from ``first`` on see it, counted from 0: whoever goes elsewhere goes nowhere."""
    if count == total:
        return routing
    here = lambda expert_N: (expert_N >= first) & (expert_N < first + count)
    expert_N = routing.expert_N - first
    passing_N = routing.expert_N - (total + 1)  # see `in_queue`
    expert_N = jnp.where(here(routing.expert_N), expert_N,
                         jnp.where(here(passing_N), in_queue(passing_N - first, count), count))
    return dataclasses.replace(routing, expert_N=expert_N)


def _view(x_BSD, terms_GT, inputs_G, groups):
    """The RouterView of the terms of every token."""
    norm_BS = None
    if inputs_G.logits_TE is not None:
        norm_BS = groups.join(jnp.sqrt(jnp.sum(inputs_G.logits_TE**2, axis=-1)))
    return RouterView(x_BSD, groups.join(terms_GT.entropy), groups.join(terms_GT.confidence), norm_BS)


def _combine(routing, kept_N, tokens, num_experts):
    """[T, E]: the gate of every choice that was computed."""
    gates_TE = jnp.zeros((tokens, num_experts), routing.gate_N.dtype)
    return gates_TE.at[routing.token_N, routing.expert_N].add(jnp.where(kept_N, routing.gate_N, 0.0), mode="drop")


def _count(expert_N, kept_N, num_experts):
    return jnp.sum((expert_N[:, None] == jnp.arange(num_experts)[None, :]) & kept_N[:, None], axis=0, dtype=jnp.float32)
