"""The sections of a config but ``moe`` and ``attention``: frozen dataclasses that check themselves.

Field comments: ``configs/base.py``."""

import dataclasses

from moe_jax.config.checks import at_least, choice, nearest_divisors, require

# What each computes: moe_jax/nn/activations.py.
ACTIVATIONS = ("swiglu", "geglu", "geglu_exact", "reglu", "glu", "bilinear", "swiglu_clamped", "swiglu_linear",
               "silu", "gelu", "gelu_exact", "relu", "relu_squared")

# What each makes of a text: moe_jax/data/objectives.py.
OBJECTIVES = ("causal", "prefix_lm", "span_corruption", "ul2", "openmoe")


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
    scaled_tied_logits: bool = True
    embedding_scale: bool = False
    vocab_size: int = 0
    rope_theta: float = 10_000.0
    norm: str = "rms"
    norm_epsilon: float = 1e-6
    mlp_bias: bool = False
    init_scale: float = 1.0
    embedding_init: float = 1.0
    dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True
    mtp_depth: int = 0
    encoder_layers: int = 0
    encoder_embedding: bool = False
    architecture: str = "transformer"
    dropout: float = 0.0

    def __post_init__(self):
        at_least("model", self, 1, "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff")
        at_least("model", self, 0, "vocab_size", "mtp_depth", "encoder_layers")
        choice("model", self, "norm", ("rms", "layer"))
        choice("model", self, "architecture", ("transformer", "lstm"))
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be at least 0 and below 1.")
        require(self.dropout == 0 or self.architecture == "lstm", "model.dropout", self.dropout,
                f"is that of model.architecture='lstm' and has no effect with {self.architecture!r}; set it to 0.0.")
        choice("model", self, "activation", ACTIVATIONS)
        choice("model", self, "dtype", ("float32", "bfloat16"))
        choice("model", self, "attention", ("auto", "plain", "splash"))
        choice("model", self, "remat", ("none", "block", "dots"))
        require(self.num_heads % self.num_kv_heads == 0, "model.num_kv_heads", self.num_kv_heads,
                f"must divide model.num_heads={self.num_heads} (grouped-query attention); "
                f"nearest legal values: {nearest_divisors(self.num_kv_heads, self.num_heads)}.")
        require(self.scaled_tied_logits or self.tie_embedding, "model.scaled_tied_logits", self.scaled_tied_logits,
                "has no effect without model.tie_embedding=True; set that, or model.scaled_tied_logits=True.")
        for field in ("norm_epsilon", "init_scale", "embedding_init", "rope_theta"):
            require(getattr(self, field) > 0, f"model.{field}", getattr(self, field), "must be above 0.")


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
    objective: str = "causal"
    span_mean: float = 3.0
    span_rate: float = 0.15
    sentinels: int = 0
    prefix_attention: str = "causal"
    target_length: int = 0

    def __post_init__(self):
        at_least("data", self, 1, "batch_size")
        at_least("data", self, 2, "sequence_length")
        at_least("data", self, 0, "max_bytes", "seed", "target_length")
        require(0 < self.validation_fraction < 1, "data.validation_fraction", self.validation_fraction,
                "must lie between 0 and 1.")
        self._check_objective()

    def _check_objective(self):
        choice("data", self, "objective", OBJECTIVES)
        choice("data", self, "prefix_attention", ("causal", "bidirectional"))
        at_least("data", self, 1, "span_mean")
        at_least("data", self, 0, "sentinels")
        require(0 < self.span_rate < 1, "data.span_rate", self.span_rate, "must lie between 0 and 1.")
        for field in ("span_mean", "span_rate"):
            value, default = getattr(self, field), getattr(DataConfig, field)
            require(value == default or self.objective == "span_corruption", f"data.{field}", value,
                    f"has no effect with data.objective={self.objective!r}; set it to {default!r}, or data.objective="
                    f"'span_corruption'.")
        require(self.sentinels == 0 or self.objective not in ("causal", "prefix_lm"), "data.sentinels", self.sentinels,
                f"has no effect with data.objective={self.objective!r}, which hides no spans; set it to 0.")
        require(self.prefix_attention == "causal" or self.objective != "causal", "data.prefix_attention",
                self.prefix_attention, "has no effect with data.objective='causal', in which nothing is given; set it to "
                "'causal', or another data.objective.")
        require(self.target_length == 0 or self.objective != "causal", "data.objective", self.objective,
                f"gives an encoder nothing to read, but data.target_length={self.target_length} is the length of the rows that a "
                f"decoder writes behind one; set it to one of {', '.join(map(repr, OBJECTIVES[1:]))}.")
        require(self.target_length == 0 or self.prefix_attention == "causal", "data.prefix_attention", self.prefix_attention,
                "has no effect with data.target_length above 0: what is given goes to the encoder, which sees all of it; set it "
                "to 'causal'.")
        require(not self.streaming or self.objective == "causal", "data.objective", self.objective,
                "is made of rows of the token store, which data.streaming=True passes by; set data.streaming=False.")


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
        at_least("mesh", self, 0, "data", "expert", "expert_limit")
        at_least("mesh", self, 1, "fsdp", "tensor", "expert_nodes")
        choice("mesh", self, "slice_axis", ("data", "fsdp", "expert", "tensor"))


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
        choice("optimizer", self, "name", ("adamw", "adafactor", "sgd"))
        choice("optimizer", self, "schedule", ("constant", "cosine", "rsqrt", "wsd"))
        require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "must be above 0.")
        at_least("optimizer", self, 0, "warmup_steps", "decay_steps", "weight_decay", "clip_norm", "momentum")
        for field in ("beta1", "beta2", "final_fraction"):
            value = getattr(self, field)
            require(0 <= value <= 1, f"optimizer.{field}", value, "must lie between 0 and 1.")
        require(self.name == "sgd" or self.momentum == 0, "optimizer.momentum", self.momentum,
                f"is used by sgd only, not by {self.name!r}; set it to 0.")
        require(self.schedule == "wsd" or self.decay_steps == 0, "optimizer.decay_steps", self.decay_steps,
                f"is used by schedule='wsd' only, not by {self.schedule!r}; set it to 0.")
        require(self.schedule != "wsd" or self.decay_steps > 0, "optimizer.decay_steps", self.decay_steps,
                "schedule='wsd' (warm-up, stable, decay) needs the length of its decay: at least 1.")
        require(self.schedule != "rsqrt" or self.warmup_steps > 0, "optimizer.warmup_steps", self.warmup_steps,
                "schedule='rsqrt' is 1/sqrt(max(step, warmup_steps)) and needs at least 1.")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The loop around the step."""

    num_steps: int = 300
    microbatches: int = 1
    output_z_weight: float = 1e-4
    label_smoothing: float = 0.0
    mtp_weight: float = 0.3
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
        at_least("training", self, 1, "num_steps", "microbatches", "log_every", "eval_every", "eval_batches",
                 "checkpoint_every", "keep_checkpoints")
        at_least("training", self, 0, "output_z_weight", "mtp_weight", "sample_length", "max_skipped_steps", "seed",
                 "profile_start", "profile_steps")
        require(self.seed < 2**32, "training.seed", self.seed, "must be below 2**32.")
        choice("training", self, "nonfinite", ("stop", "skip"))
        for field in ("ema_decay", "label_smoothing"):
            value = getattr(self, field)
            require(0 <= value < 1, f"training.{field}", value, "must be at least 0 and below 1.")
