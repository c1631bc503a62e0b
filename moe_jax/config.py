"""What a run is: frozen dataclasses that check themselves.

A config file (``configs/*.py``) defines ``get_config()`` and returns an ml-collections ConfigDict with one level of
nesting. :func:`resolve` turns it into a :class:`Config`; from there on no code sees a ConfigDict. An unknown key, a
wrong type, an impossible value or combination raises :class:`ConfigError` that names the key, the value, the
constraint and the nearest legal values.
"""

import dataclasses
import difflib
import math
from typing import Any, Mapping


class ConfigError(ValueError):
    """A setting that cannot work; the message is one line for the person who wrote it."""


def _require(condition: bool, key: str, value: Any, constraint: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value!r}: {constraint}")


def _choice(section: str, config: Any, field: str, allowed: tuple[str, ...]) -> None:
    value = getattr(config, field)
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{section}.{field}={value!r}: allowed are {', '.join(map(repr, allowed))}.{hint}")


def _at_least(section: str, config: Any, minimum: float, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        _require(value >= minimum, f"{section}.{field}", value, f"must be at least {minimum}.")


def nearest_divisors(value: int, total: int) -> str:
    """The divisors of ``total`` next to ``value``, for an error message: ``'2, 4'``."""
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    below = [d for d in divisors if d <= value][-1:]
    above = [d for d in divisors if d > value][:1]
    return ", ".join(map(str, below + above))


def nearest_multiples(value: int, step: int) -> str:
    """The positive multiples of ``step`` next to ``value``, for an error message: ``'8, 16'``."""
    below = value // step * step
    return ", ".join(str(v) for v in (below, below + step) if v > 0)


# What each computes: moe_jax/nn/activations.py.
ACTIVATIONS = ("swiglu", "geglu", "geglu_exact", "reglu", "glu", "bilinear", "swiglu_clamped", "swiglu_linear",
               "silu", "gelu", "gelu_exact", "relu", "relu_squared")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder. Field comments: ``configs/base.py``."""

    num_layers: int = 4
    d_model: int = 128
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 32
    d_ff: int = 512
    activation: str = "swiglu"
    attention: str = "auto"
    scaled_attention: bool = True
    tie_embedding: bool = False
    vocab_size: int = 0
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-6
    init_scale: float = 1.0
    embedding_init: float = 1.0
    dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True

    def __post_init__(self):
        _at_least("model", self, 1, "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff")
        _at_least("model", self, 0, "vocab_size")
        _choice("model", self, "activation", ACTIVATIONS)
        _choice("model", self, "dtype", ("float32", "bfloat16"))
        _choice("model", self, "attention", ("auto", "plain", "splash"))
        _choice("model", self, "remat", ("none", "block", "dots"))
        _require(self.num_heads % self.num_kv_heads == 0, "model.num_kv_heads", self.num_kv_heads,
                 f"must divide model.num_heads={self.num_heads} (grouped-query attention); "
                 f"nearest legal values: {nearest_divisors(self.num_kv_heads, self.num_heads)}.")
        _require(self.head_dim % 2 == 0, "model.head_dim", self.head_dim,
                 f"must be even (rotary embedding pairs dimensions); nearest legal values: "
                 f"{nearest_multiples(self.head_dim, 2)}.")
        for field in ("norm_epsilon", "init_scale", "embedding_init", "rope_theta"):
            _require(getattr(self, field) > 0, f"model.{field}", getattr(self, field), "must be above 0.")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The mixture-of-experts layers of the model. ``num_experts=0`` makes the model dense."""

    num_experts: int = 8
    experts_per_token: int = 2
    every: int = 2
    first: int = -1
    first_dense_layers: int = 0
    d_ff: int = 512
    activation: str = "swiglu"
    expert_bias: bool = False
    num_shared_experts: int = 0
    residual_ffn: str = "none"
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

    def __post_init__(self):
        _at_least("moe", self, 0, "num_experts", "num_shared_experts", "router_jitter", "router_noise", "balance_weight",
                  "importance_weight", "load_weight", "device_weight", "communication_weight", "router_z_weight",
                  "bias_update_rate", "group_size", "groups_per_token", "num_identity_experts", "num_zero_experts",
                  "num_constant_experts", "device_capacity_factor", "undropped_sequences", "first_dense_layers")
        _at_least("moe", self, 1, "experts_per_token", "every", "d_ff", "min_capacity", "num_groups", "capacity_multiple",
                  "exchange_chunks")
        _at_least("moe", self, -1, "first")
        _choice("moe", self, "activation", ACTIVATIONS)
        _choice("moe", self, "score", ("softmax", "sigmoid"))
        _choice("moe", self, "gate_order", ("softmax_then_top_k", "top_k_then_softmax"))
        _choice("moe", self, "gate_on", ("output", "input"))
        _choice("moe", self, "second_policy", ("all", "none", "threshold", "random"))
        _choice("moe", self, "group_score", ("max", "top_sum"))
        _choice("moe", self, "priority", ("max", "sum"))
        _choice("moe", self, "bias_update", ("sign", "magnitude"))
        _choice("moe", self, "fill_order", ("token_major", "choice_major", "batch_prioritized"))
        _choice("moe", self, "capacity_counts", ("choices", "tokens"))
        _choice("moe", self, "capacity_rounding", ("default", "up", "nearest"))
        _choice("moe", self, "padding", ("nowhere", "in_means", "takes_slots", "routed"))
        _choice("moe", self, "expert_parallelism", ("compiler", "shard_map", "none"))
        _choice("moe", self, "row_exchange", ("auto", "padded", "ragged"))
        _choice("moe", self, "residual_ffn", ("none", "parallel", "sequential"))
        _choice("moe", self, "group_over", ("sequence", "batch"))
        _choice("moe", self, "balance_scope", ("group", "sequence", "document", "microbatch", "global"))
        _choice("moe", self, "policy_sampling", ("sample", "greedy"))
        _choice("moe", self, "policy_baseline", ("learned", "running", "none"))
        _at_least("moe", self, 0, "policy_weight", "policy_entropy_weight", "policy_baseline_weight")
        _require(0 <= self.policy_baseline_decay < 1, "moe.policy_baseline_decay", self.policy_baseline_decay,
                 "must be at least 0 and below 1.")
        for field in ("capacity_factor", "eval_capacity_factor", "router_init", "route_scale", "second_threshold",
                      "zero_expert_weight", "row_exchange_factor"):
            _require(getattr(self, field) > 0, f"moe.{field}", getattr(self, field), "must be above 0.")
        _require(self.router_jitter < 1, "moe.router_jitter", self.router_jitter, "must be below 1.")
        for field in ("bias_update", "bias_centered"):
            value, default = getattr(self, field), getattr(MoEConfig, field)
            _require(value == default or self.bias_update_rate > 0, f"moe.{field}", value,
                     f"has no effect without moe.bias_update_rate above 0; set that, or moe.{field}={default!r}.")
        for field in ("row_exchange", "row_exchange_factor", "exchange_chunks"):
            value, default = getattr(self, field), getattr(MoEConfig, field)
            _require(value == default or self.expert_parallelism != "none", f"moe.{field}", value,
                     f"has no effect with moe.expert_parallelism='none', under which no rows travel; set moe.{field}="
                     f"{default!r}, or another moe.expert_parallelism.")
        if self.num_experts == 0:
            return
        _require(self.experts_per_token <= self.num_routed_experts, "moe.experts_per_token", self.experts_per_token,
                 f"a token cannot choose more than moe.num_experts={self.num_experts} experts"
                 + (f" and {self.num_zero_computation} without computation." if self.num_zero_computation else "."))
        self._check_kinds_of_experts()
        _require(self.balance_scope != "document" or self.padding == "nowhere", "moe.padding", self.padding,
                 "counts padding, which belongs to no document; set it to 'nowhere', or moe.balance_scope='sequence'.")
        _require(self.undropped_sequences <= 1, "moe.undropped_sequences", self.undropped_sequences, "must be at most 1.")
        _require(self.undropped_sequences == MoEConfig.undropped_sequences or self.device_capacity_factor > 0,
                 "moe.undropped_sequences", self.undropped_sequences,
                 f"has no effect without moe.device_capacity_factor above 0; set that, or moe.undropped_sequences="
                 f"{MoEConfig.undropped_sequences}.")
        _choice("moe", self, "hash_function",
                ("random", "bigram", "previous_token", "position", "balanced", "clustered", "dispersed"))
        _at_least("moe", self, 0, "hash_seed", "experts_per_token_cap")
        _at_least("moe", self, 1, "transport_iterations")
        _choice("moe", self, "transport_plan", ("entropic", "quadratic", "k_sparse"))
        _choice("moe", self, "transport_gate", ("softmax", "plan"))
        _require(self.transport_rate > 0, "moe.transport_rate", self.transport_rate, "must be above 0.")
        _require(self.transport_tolerance > 0, "moe.transport_tolerance", self.transport_tolerance, "must be above 0.")
        _require(0 < self.cap_entropy <= 1, "moe.cap_entropy", self.cap_entropy, "must be above 0 and at most 1.")
        _require(self.residual_ffn != "parallel" or self.num_shared_experts == 0, "moe.residual_ffn", self.residual_ffn,
                 f"is one more feed-forward network that every token passes beside the routed experts, as are "
                 f"moe.num_shared_experts={self.num_shared_experts}; use one of the two, or residual_ffn='sequential'.")
        _require(self.first < self.every, "moe.first", self.first,
                 f"counts within a period of moe.every={self.every} layers; legal: -1 (the last of each period) to "
                 f"{self.every - 1}.")

    def _check_kinds_of_experts(self):
        widths = self.width_classes
        if self.expert_widths:
            count = sum(count for _, count in widths)
            _require(count == self.num_experts, "moe.expert_widths", self.expert_widths,
                     f"names {count} experts, but moe.num_experts={self.num_experts}; the counts must add up to it.")
            for field in ("dispatch", "eval_dispatch"):
                _require(getattr(self, field) in ("dropless", "reference"), f"moe.{field}", getattr(self, field),
                         "fills one buffer [E, C, D] whose experts must be alike, but moe.expert_widths gives them "
                         "unequal widths; set it to 'dropless' (or 'reference').")
        _require(self.expert_copies == 0 or self.expert_copies >= self.num_experts, "moe.expert_copies", self.expert_copies,
                 f"every expert needs a copy; set it to at least moe.num_experts={self.num_experts}, or to 0.")
        _require(self.expert_copies == 0 or not self.expert_widths, "moe.expert_copies", self.expert_copies,
                 f"copies lie in one array and must be alike, but moe.expert_widths={self.expert_widths!r} gives experts unequal "
                 f"widths; set it to 0.")
        _require(self.zero_expert_weight == 1 or self.num_zero_computation > 0, "moe.zero_expert_weight",
                 self.zero_expert_weight, "has no effect without moe.num_identity_experts, moe.num_zero_experts or "
                 "moe.num_constant_experts; add one of them, or set it to 1.0.")
        _require(self.num_constant_experts == 0 or self.gate_on == "output", "moe.gate_on", self.gate_on,
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
            _require(legal, "moe.expert_widths", self.expert_widths,
                     f"cannot be read at {entry.strip()!r}; wanted is width*count, separated by commas: '256*4,512*2'.")
            classes.append((int(width), int(count)))
        return tuple(classes)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text and how it becomes batches."""

    source: str = "standard_library"
    vocabulary: str = "bytes"
    domain_weights: str = ""
    sequence_length: int = 256
    batch_size: int = 16
    validation_fraction: float = 0.05
    max_bytes: int = 0
    cache_dir: str = ""
    seed: int = 0
    streaming: bool = False
    text_field: str = "text"

    def __post_init__(self):
        _at_least("data", self, 1, "batch_size")
        _at_least("data", self, 2, "sequence_length")
        _at_least("data", self, 0, "max_bytes", "seed")
        _require(0 < self.validation_fraction < 1, "data.validation_fraction", self.validation_fraction,
                 "must lie between 0 and 1.")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices lie on each mesh axis. 0 = automatic, for ``data`` and ``expert`` only."""

    data: int = 0
    fsdp: int = 1
    expert: int = 0
    tensor: int = 1
    expert_limit: int = 4
    expert_nodes: int = 1
    slice_axis: str = "data"

    def __post_init__(self):
        _at_least("mesh", self, 0, "data", "expert", "expert_limit")
        _at_least("mesh", self, 1, "fsdp", "tensor", "expert_nodes")
        _choice("mesh", self, "slice_axis", ("data", "fsdp", "expert", "tensor"))


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optax chain: clip, rule, schedule."""

    name: str = "adamw"
    learning_rate: float = 3e-3
    schedule: str = "cosine"
    warmup_steps: int = 50
    decay_steps: int = 0
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    momentum: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self):
        _choice("optimizer", self, "name", ("adamw", "adafactor", "sgd"))
        _choice("optimizer", self, "schedule", ("constant", "cosine", "rsqrt", "wsd"))
        _require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "must be above 0.")
        _at_least("optimizer", self, 0, "warmup_steps", "decay_steps", "weight_decay", "clip_norm", "momentum")
        for field in ("beta1", "beta2", "final_fraction"):
            value = getattr(self, field)
            _require(0 <= value <= 1, f"optimizer.{field}", value, "must lie between 0 and 1.")
        _require(self.name == "sgd" or self.momentum == 0, "optimizer.momentum", self.momentum,
                 f"is used by sgd only, not by {self.name!r}; set it to 0.")
        _require(self.schedule == "wsd" or self.decay_steps == 0, "optimizer.decay_steps", self.decay_steps,
                 f"is used by schedule='wsd' only, not by {self.schedule!r}; set it to 0.")
        _require(self.schedule != "wsd" or self.decay_steps > 0, "optimizer.decay_steps", self.decay_steps,
                 "schedule='wsd' (warm-up, stable, decay) needs the length of its decay: at least 1.")
        _require(self.schedule != "rsqrt" or self.warmup_steps > 0, "optimizer.warmup_steps", self.warmup_steps,
                 "schedule='rsqrt' is 1/sqrt(max(step, warmup_steps)) and needs at least 1.")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The loop around the step."""

    num_steps: int = 300
    microbatches: int = 1
    output_z_weight: float = 1e-4
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 20
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    nonfinite: str = "stop"
    max_skipped_steps: int = 10
    tensorboard: bool = True
    wandb: bool = False
    profile_start: int = 0
    profile_steps: int = 0
    sample_prompts: str = "def |import |The "
    sample_length: int = 128
    seed: int = 0

    def __post_init__(self):
        _at_least("training", self, 1, "num_steps", "microbatches", "log_every", "eval_every", "eval_batches",
                  "checkpoint_every", "keep_checkpoints")
        _at_least("training", self, 0, "output_z_weight", "sample_length", "max_skipped_steps", "seed",
                  "profile_start", "profile_steps")
        _require(self.seed < 2**32, "training.seed", self.seed, "must be below 2**32.")
        _choice("training", self, "nonfinite", ("stop", "skip"))
        for field in ("ema_decay", "label_smoothing"):
            value = getattr(self, field)
            _require(0 <= value < 1, f"training.{field}", value, "must be at least 0 and below 1.")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. The sections are independent; what must fit together is checked here."""

    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()

    def __post_init__(self):
        batch, microbatches = self.data.batch_size, self.training.microbatches
        _require(batch % microbatches == 0, "training.microbatches", microbatches,
                 f"must divide data.batch_size={batch}; nearest legal values: {nearest_divisors(microbatches, batch)}.")
        if self.optimizer.schedule != "rsqrt":
            _require(self.optimizer.warmup_steps <= self.training.num_steps, "optimizer.warmup_steps",
                     self.optimizer.warmup_steps,
                     f"exceeds training.num_steps={self.training.num_steps}; the run would end inside its warm-up.")
        if self.moe.is_dense:
            return
        _require(self.model.num_layers > self.moe_offset, "moe.every", self.moe.every,
                 f"gives no MoE layer among model.num_layers={self.model.num_layers}; set moe.every to at most "
                 f"{self.model.num_layers}, or moe.num_experts=0 for a dense model.")
        self._check_first_dense_layers()
        _require(self.model.attention != "splash" or self.moe.padding == "nowhere", "model.attention", self.model.attention,
                 f"sees padding otherwise than the plain one, and moe.padding={self.moe.padding!r} makes that matter; set it "
                 f"to 'auto' or 'plain', or moe.padding='nowhere'.")
        self._check_groups()
        # Imported here because the tables of names live with the code they name, and that code reads this module.
        from moe_jax.dispatch import DISPATCHERS
        from moe_jax.dispatch.grouped_matmul import IMPLEMENTATIONS
        from moe_jax.routing import ROUTERS, check_router
        from moe_jax.routing.balance import BALANCE_LOSSES
        _choice("moe", self.moe, "router", tuple(ROUTERS))
        _choice("moe", self.moe, "dispatch", tuple(DISPATCHERS))
        _choice("moe", self.moe, "eval_dispatch", tuple(DISPATCHERS))
        _choice("moe", self.moe, "grouped_matmul", ("auto", *IMPLEMENTATIONS))
        _choice("moe", self.moe, "balance_loss", tuple(BALANCE_LOSSES))
        check_router(self.moe)
        self._check_exchange()

    def _check_exchange(self):
        # Imported here as above.
        from moe_jax.routing import ROUTERS
        moe, nodes = self.moe, self.mesh.expert_nodes
        _require(moe.exchange_chunks == 1 or moe.dispatch != "reference", "moe.exchange_chunks", moe.exchange_chunks,
                 "has no effect with moe.dispatch='reference', under which no rows travel; set it to 1, or another dispatch.")
        if nodes == 1:
            return
        _require(moe.dispatch == "dropless", "mesh.expert_nodes", nodes,
                 f"is for tokens that travel row by row, but moe.dispatch={moe.dispatch!r} sends buffers of fixed capacity, a slot "
                 f"for each choice; set moe.dispatch='dropless', or mesh.expert_nodes=1.")
        _require(moe.expert_parallelism != "none", "mesh.expert_nodes", nodes,
                 "has no effect with moe.expert_parallelism='none', under which no rows travel; set it to 1, or another "
                 "moe.expert_parallelism.")
        _require(ROUTERS[moe.router].fixed_choices, "mesh.expert_nodes", nodes,
                 f"a token takes its choices along, of which moe.router={moe.router!r} makes any number; set it to 1, or a "
                 f"router in which tokens choose.")

    def _check_first_dense_layers(self):
        moe, leading = self.moe, self.moe.first_dense_layers
        _require(leading == 0 or leading > self.moe_offset, "moe.first_dense_layers", leading,
                 f"has no effect: with moe.every={moe.every} and moe.first={moe.first} the first {self.moe_offset} layers are "
                 f"dense anyway; set it to 0, or to more than {self.moe_offset}.")
        last = range(self.moe_offset, self.model.num_layers, moe.every)[-1]
        _require(leading <= last, "moe.first_dense_layers", leading,
                 f"leaves no MoE layer among model.num_layers={self.model.num_layers}; set it to at most {last}, or "
                 f"moe.num_experts=0 for a dense model.")

    def _check_groups(self):
        length, size = self.data.sequence_length, self.moe.group_size
        if size and self.moe.group_over == "sequence":
            _require(length % size == 0 or size % length == 0, "moe.group_size", size,
                     f"must divide data.sequence_length={length} or be a multiple of it; nearest legal values: "
                     f"{nearest_divisors(size, length) if size < length else nearest_multiples(size, length)}.")
        sequences, microbatch = self.sequences_per_group, self.data.batch_size // self.training.microbatches
        _require(microbatch % sequences == 0, "moe.group_size", size,
                 f"one group spans {sequences} sequences, which must divide the {microbatch} sequences of a microbatch; "
                 f"nearest legal numbers of sequences: {nearest_divisors(sequences, microbatch)}.")

    @property
    def sequences_per_group(self) -> int:
        """How many sequences one routing group touches. A group never spans two devices."""
        if self.moe.group_over == "batch":
            return self.moe.group_size or self.data.batch_size // self.training.microbatches
        return max(1, self.moe.group_size // self.data.sequence_length)

    @property
    def nodes_per_token(self) -> int:
        """How many of ``mesh.expert_nodes`` nodes a token's choices reach at most, by ``moe.groups_per_token``; 0: any number.

        Groups of experts limit nodes if no group lies on parts of two nodes."""
        moe, nodes = self.moe, self.mesh.expert_nodes
        if moe.num_groups % nodes == 0:
            return min(moe.groups_per_token, nodes)
        return moe.groups_per_token * nodes // moe.num_groups if nodes % moe.num_groups == 0 else 0

    @property
    def moe_offset(self) -> int:
        """Index of an MoE layer in each period of ``moe.every`` layers."""
        return self.moe.first % self.moe.every

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers, ascending; empty for a dense model."""
        if self.moe.is_dense:
            return ()
        return tuple(i for i in range(self.moe.first_dense_layers, self.model.num_layers)
                     if i % self.moe.every == self.moe_offset)

    @property
    def tokens_per_step(self) -> int:
        return self.data.batch_size * self.data.sequence_length

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)


SECTIONS = {field.name: field.default.__class__ for field in dataclasses.fields(Config)}


def known_keys() -> list[str]:
    """Every legal key, dotted: ``'moe.num_experts'``."""
    return [f"{section}.{field.name}" for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)]


def unknown_key(key: str) -> ConfigError:
    """The error for a key that does not exist, with the nearest ones that do."""
    keys = known_keys()
    tail = key.rsplit(".", 1)[-1]
    near = [k for k in keys if k.rsplit(".", 1)[-1] == tail]
    if "." not in key:
        near += difflib.get_close_matches(key, SECTIONS, n=1, cutoff=0.5)
    near += [k for k in difflib.get_close_matches(key, keys, n=3, cutoff=0.5) if k not in near]
    hint = f" Did you mean {' or '.join(near[:3])}?" if near else f" Sections are {', '.join(SECTIONS)}."
    return ConfigError(f"{key}: there is no such setting.{hint}")


def _typed(key: str, value: Any, kind: type) -> Any:
    """``value`` as ``kind`` if nothing is lost by it, else ConfigError."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{key}={value!r}: must be of type {kind.__name__}, not {type(value).__name__}.")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{key}={value!r}: must be a finite number.")
    return value


def resolve(config: Mapping[str, Any]) -> Config:
    """Turns a ConfigDict (or nested dict) into a checked :class:`Config`.

    Raises:
      ConfigError: unknown section or key, wrong type, illegal value or combination.
    """
    config = config.to_dict() if hasattr(config, "to_dict") else config
    sections = {}
    for section, values in config.items():
        if section not in SECTIONS:
            raise unknown_key(section)
        if not isinstance(values, Mapping):
            raise ConfigError(f"{section}={values!r}: is a section and holds settings, e.g. "
                              f"{section}.{dataclasses.fields(SECTIONS[section])[0].name}.")
        types = {field.name: field.type for field in dataclasses.fields(SECTIONS[section])}
        for name in values:
            if name not in types:
                raise unknown_key(f"{section}.{name}")
        sections[section] = SECTIONS[section](
            **{name: _typed(f"{section}.{name}", value, types[name]) for name, value in values.items()})
    return Config(**sections)


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The settings in which two ``Config.to_dict()`` differ, one line each: ``'moe.num_experts: 8 -> 16'``."""
    lines = []
    for section in sorted(set(ours) | set(theirs)):
        left, right = ours.get(section, {}), theirs.get(section, {})
        for name in sorted(set(left) | set(right)):
            if left.get(name) != right.get(name):
                lines.append(f"{section}.{name}: {left.get(name)!r} -> {right.get(name)!r}")
    return lines
