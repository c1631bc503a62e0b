"""The section ``moe`` of a config. Field comments: ``configs/base.py``."""

import dataclasses

from moe_jax.config.checks import at_least, choice, require
from moe_jax.config.sections import ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The mixture-of-experts layers of the model. ``num_experts=0`` makes the model dense."""

    num_experts: int = 8
    experts_per_token: int = 2
    every: int = 2
    first: int = -1
    first_dense_layers: int = 0
    layers: str = ""
    encoder_layers: str = ""
    d_ff: int = 512
    activation: str = "swiglu"
    activation_limit: float = 7.0
    activation_alpha: float = 1.702
    expert_bias: bool = False
    num_shared_experts: int = 0
    shared_d_ff: int = 0
    shared_gate: bool = False
    residual_ffn: str = "none"
    output_dropout: float = 0.0
    num_identity_experts: int = 0
    num_zero_experts: int = 0
    num_constant_experts: int = 0
    zero_expert_weight: float = 1.0
    expert_widths: str = ""
    expert_copies: int = 0
    router: str = "top_k"
    score: str = "softmax"
    gate_order: str = "softmax_then_top_k"
    renormalize: bool = False
    renormalize_after_drops: bool = False
    route_scale: float = 1.0
    gate_on: str = "output"
    second_policy: str = "all"
    second_threshold: float = 0.2
    second_in_queue: bool = False
    num_groups: int = 1
    groups_per_token: int = 0
    group_score: str = "max"
    fill_order: str = "token_major"
    priority: str = "max"
    router_init: float = 0.02
    router_bias: bool = False
    router_dtype: str = "float32"
    router_jitter: float = 0.0
    router_noise: float = 0.0
    dispatch: str = "gather"
    eval_dispatch: str = "dropless"
    grouped_matmul: str = "auto"
    expert_parallelism: str = "compiler"
    row_exchange: str = "padded"
    row_exchange_factor: float = 2.0
    exchange_chunks: int = 1
    capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    expert_capacity: int = 0
    capacity_counts: str = "choices"
    capacity_rounding: str = "default"
    capacity_multiple: int = 1
    min_capacity: int = 4
    device_capacity_factor: float = 0.0
    undropped_sequences: float = 0.1
    padding: str = "nowhere"
    group_size: int = 0
    group_over: str = "sequence"
    balance_loss: str = "switch"
    balance_scope: str = "group"
    balance_weight: float = 0.01
    importance_weight: float = 0.0
    load_weight: float = 0.0
    device_weight: float = 0.0
    communication_weight: float = 0.0
    router_z_weight: float = 1e-4
    bias_update_rate: float = 0.0
    bias_update: str = "sign"
    bias_centered: bool = False
    hash_function: str = "random"
    hash_seed: int = 0
    hash_table: str = ""
    transport_plan: str = "entropic"
    transport_gate: str = "softmax"
    transport_rate: float = 0.01
    transport_tolerance: float = 1e-4
    transport_iterations: int = 100
    experts_per_token_cap: int = 0
    cap_entropy: float = 1e-3
    policy_weight: float = 1.0
    policy_sampling: str = "sample"
    policy_entropy_weight: float = 0.01
    policy_baseline: str = "learned"
    policy_baseline_weight: float = 0.01
    policy_baseline_decay: float = 0.99
    allow_noncausal_routing: bool = False
    allow_untrained_router: bool = False

    def __post_init__(self):
        at_least("moe", self, 0, "num_experts", "num_shared_experts", "router_jitter", "router_noise", "balance_weight",
                 "importance_weight", "load_weight", "device_weight", "communication_weight", "router_z_weight",
                 "bias_update_rate", "group_size", "groups_per_token", "num_identity_experts", "num_zero_experts",
                 "num_constant_experts", "device_capacity_factor", "undropped_sequences", "first_dense_layers", "shared_d_ff",
                 "router_init", "expert_capacity", "output_dropout")
        at_least("moe", self, 1, "experts_per_token", "every", "d_ff", "min_capacity", "num_groups", "capacity_multiple",
                 "exchange_chunks")
        at_least("moe", self, -1, "first")
        choice("moe", self, "activation", ACTIVATIONS)
        choice("moe", self, "score", ("softmax", "sigmoid"))
        choice("moe", self, "gate_order", ("softmax_then_top_k", "top_k_then_softmax"))
        choice("moe", self, "gate_on", ("output", "input"))
        choice("moe", self, "router_dtype", ("float32", "bfloat16"))
        choice("moe", self, "second_policy", ("all", "none", "threshold", "random"))
        choice("moe", self, "group_score", ("max", "top_sum", "top_2_sum"))
        choice("moe", self, "priority", ("max", "sum"))
        choice("moe", self, "bias_update", ("sign", "magnitude"))
        choice("moe", self, "fill_order", ("token_major", "choice_major", "batch_prioritized"))
        choice("moe", self, "capacity_counts", ("choices", "tokens", "group"))
        choice("moe", self, "capacity_rounding", ("default", "up", "nearest"))
        choice("moe", self, "padding", ("nowhere", "in_means", "takes_slots", "routed", "as_text"))
        choice("moe", self, "expert_parallelism", ("compiler", "shard_map", "none"))
        choice("moe", self, "row_exchange", ("auto", "padded", "ragged"))
        choice("moe", self, "residual_ffn", ("none", "parallel", "sequential"))
        choice("moe", self, "group_over", ("sequence", "batch", "all"))
        choice("moe", self, "balance_scope", ("group", "sequence", "document", "microbatch", "global"))
        choice("moe", self, "policy_sampling", ("sample", "greedy"))
        choice("moe", self, "policy_baseline", ("learned", "running", "none"))
        at_least("moe", self, 0, "policy_weight", "policy_entropy_weight", "policy_baseline_weight")
        require(0 <= self.policy_baseline_decay < 1, "moe.policy_baseline_decay", self.policy_baseline_decay,
                "must be at least 0 and below 1.")
        for field in ("capacity_factor", "eval_capacity_factor", "route_scale", "second_threshold",
                      "zero_expert_weight", "row_exchange_factor", "activation_limit", "activation_alpha"):
            require(getattr(self, field) > 0, f"moe.{field}", getattr(self, field), "must be above 0.")
        require(self.router_jitter < 1, "moe.router_jitter", self.router_jitter, "must be below 1.")
        require(self.output_dropout < 1, "moe.output_dropout", self.output_dropout, "must be below 1.")
        for field in ("bias_update", "bias_centered"):
            value, default = getattr(self, field), getattr(MoEConfig, field)
            require(value == default or self.bias_update_rate > 0, f"moe.{field}", value,
                    f"has no effect without moe.bias_update_rate above 0; set that, or moe.{field}={default!r}.")
        for field in ("row_exchange", "row_exchange_factor", "exchange_chunks"):
            value, default = getattr(self, field), getattr(MoEConfig, field)
            require(value == default or self.expert_parallelism != "none", f"moe.{field}", value,
                    f"has no effect with moe.expert_parallelism='none', under which no rows travel; set moe.{field}="
                    f"{default!r}, or another moe.expert_parallelism.")
        if self.num_experts == 0:
            return
        require(self.experts_per_token <= self.num_routed_experts, "moe.experts_per_token", self.experts_per_token,
                f"a token cannot choose more than moe.num_experts={self.num_experts} experts"
                + (f" and {self.num_zero_computation} without computation." if self.num_zero_computation else "."))
        self._check_kinds_of_experts()
        self._check_capacity()
        for field in ("layers", "encoder_layers"):
            self.explicit_layers(field)
        require(self.balance_scope != "document" or self.padding == "nowhere", "moe.padding", self.padding,
                "counts padding, which belongs to no document; set it to 'nowhere', or moe.balance_scope='sequence'.")
        require(self.undropped_sequences <= 1, "moe.undropped_sequences", self.undropped_sequences, "must be at most 1.")
        require(self.undropped_sequences == MoEConfig.undropped_sequences or self.device_capacity_factor > 0,
                "moe.undropped_sequences", self.undropped_sequences,
                f"has no effect without moe.device_capacity_factor above 0; set that, or moe.undropped_sequences="
                f"{MoEConfig.undropped_sequences}.")
        choice("moe", self, "hash_function",
               ("random", "bigram", "previous_token", "position", "balanced", "clustered", "dispersed"))
        at_least("moe", self, 0, "hash_seed", "experts_per_token_cap")
        at_least("moe", self, 1, "transport_iterations")
        choice("moe", self, "transport_plan", ("entropic", "quadratic", "k_sparse"))
        choice("moe", self, "transport_gate", ("softmax", "plan"))
        require(self.transport_rate > 0, "moe.transport_rate", self.transport_rate, "must be above 0.")
        require(self.transport_tolerance > 0, "moe.transport_tolerance", self.transport_tolerance, "must be above 0.")
        require(0 < self.cap_entropy <= 1, "moe.cap_entropy", self.cap_entropy, "must be above 0 and at most 1.")
        require(self.residual_ffn != "parallel" or self.num_shared_experts == 0, "moe.residual_ffn", self.residual_ffn,
                f"is one more feed-forward network that every token passes beside the routed experts, as are "
                f"moe.num_shared_experts={self.num_shared_experts}; use one of the two, or residual_ffn='sequential'.")
        require(self.first < self.every, "moe.first", self.first,
                f"counts within a period of moe.every={self.every} layers; legal: -1 (the last of each period) to "
                f"{self.every - 1}.")

    def _check_capacity(self):
        require(not self.renormalize_after_drops or self.num_zero_computation == 0, "moe.renormalize_after_drops",
                self.renormalize_after_drops, "knows experts with slots only; set moe.num_identity_experts, moe.num_zero_experts "
                "and moe.num_constant_experts to 0, or it to False.")
        if not self.expert_capacity:
            return
        for field in ("capacity_factor", "eval_capacity_factor", "capacity_counts", "capacity_rounding", "capacity_multiple",
                      "min_capacity"):
            value, default = getattr(self, field), getattr(MoEConfig, field)
            require(value == default, f"moe.{field}", value, f"has no effect beside moe.expert_capacity={self.expert_capacity}, which "
                    f"is the number of slots itself; set it to {default!r}, or moe.expert_capacity=0.")

    def _check_kinds_of_experts(self):
        widths = self.width_classes
        for field in ("activation_limit", "activation_alpha"):
            value, default = getattr(self, field), getattr(MoEConfig, field)
            require(value == default or self.activation == "swiglu_clamped", f"moe.{field}", value,
                    f"is read by moe.activation='swiglu_clamped' only, not by {self.activation!r}; set it to {default!r}.")
        for field in ("shared_d_ff", "shared_gate"):
            value, default = getattr(self, field), getattr(MoEConfig, field)
            require(value == default or self.num_shared_experts > 0, f"moe.{field}", value,
                    f"has no effect without moe.num_shared_experts above 0; set that, or moe.{field}={default!r}.")
        if self.expert_widths:
            count = sum(count for _, count in widths)
            require(count == self.num_experts, "moe.expert_widths", self.expert_widths,
                    f"names {count} experts, but moe.num_experts={self.num_experts}; the counts must add up to it.")
            for field in ("dispatch", "eval_dispatch"):
                require(getattr(self, field) in ("dropless", "reference"), f"moe.{field}", getattr(self, field),
                        "fills one buffer [E, C, D] whose experts must be alike, but moe.expert_widths gives them "
                        "unequal widths; set it to 'dropless' (or 'reference').")
        require(self.expert_copies == 0 or self.expert_copies >= self.num_experts, "moe.expert_copies", self.expert_copies,
                f"every expert needs a copy; set it to at least moe.num_experts={self.num_experts}, or to 0.")
        require(self.expert_copies == 0 or not self.expert_widths, "moe.expert_copies", self.expert_copies,
                f"copies lie in one array and must be alike, but moe.expert_widths={self.expert_widths!r} gives experts unequal "
                f"widths; set it to 0.")
        require(self.zero_expert_weight == 1 or self.num_zero_computation > 0, "moe.zero_expert_weight",
                self.zero_expert_weight, "has no effect without moe.num_identity_experts, moe.num_zero_experts or "
                "moe.num_constant_experts; add one of them, or set it to 1.0.")
        require(self.num_constant_experts == 0 or self.gate_on == "output", "moe.gate_on", self.gate_on,
                "a constant expert weighs its input by the input, so a gate on the input would act twice; set "
                "moe.num_constant_experts=0, or moe.gate_on='output'.")

    @property
    def is_dense(self) -> bool:
        return self.num_experts == 0

    @property
    def num_zero_computation(self) -> int:
        """Experts without a feed-forward network."""
        return self.num_identity_experts + self.num_zero_experts + self.num_constant_experts

    @property
    def num_routed_experts(self) -> int:
        """E, what the router scores: ``num_experts`` feed-forward networks, then identity, zero and constant experts."""
        return self.num_experts + self.num_zero_computation

    @property
    def shared_width(self) -> int:
        """Hidden width of the shared experts, which are one network, together."""
        return self.num_shared_experts * (self.shared_d_ff or self.d_ff)

    def explicit_layers(self, field: str) -> tuple[int, ...] | None:
        """The layers that ``layers`` or ``encoder_layers`` names, ascending; () for 'none'; None where it leaves them to
        ``every`` and ``first``.

        Raises:
          ConfigError: it is no list of different numbers.
        """
        text = getattr(self, field)
        if text in ("", "none"):
            return () if text else None
        words = [word.strip() for word in text.split(",")]
        require(all(word.isdecimal() for word in words) and len({int(word) for word in words}) == len(words), f"moe.{field}",
                text, "wanted are the indices of different layers, from 0, separated by commas: '1,3,5'; or 'none'.")
        return tuple(sorted(int(word) for word in words))

    @property
    def num_copies(self) -> int:
        """P, the feed-forward experts that the devices hold: E, or ``moe.expert_copies``."""
        return self.expert_copies or self.num_experts

    @property
    def width_classes(self) -> tuple[tuple[int, int], ...]:
        """((width, how many experts, copies counted), …) in the order of their indices: ``moe.expert_widths``, or all of
        ``moe.d_ff``."""
        if not self.expert_widths:
            return ((self.d_ff, self.num_copies),)
        classes = []
        for entry in self.expert_widths.split(","):
            width, times, count = entry.partition("*")
            count = count if times else "1"
            legal = all(part.strip().isdecimal() and int(part) > 0 for part in (width, count))
            require(legal, "moe.expert_widths", self.expert_widths,
                    f"cannot be read at {entry.strip()!r}; wanted is width*count, separated by commas: '256*4,512*2'.")
            classes.append((int(width), int(count)))
        return tuple(classes)
