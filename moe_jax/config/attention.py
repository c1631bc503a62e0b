"""The section ``attention`` of a config: everything about attention but its sizes. Field comments: ``configs/base.py``."""

import dataclasses

from moe_jax.config.checks import at_least, choice, nearest_multiples, require

# What a layer's queries see: all before them, the last of it, or what lies in their own chunk.
SPANS = ("full", "sliding", "chunked")

_ROPE_SCALING = {
    "linear": (),
    "llama3": ("rope_low_factor", "rope_high_factor"),
    "yarn": ("rope_beta_fast", "rope_beta_slow", "rope_truncate", "rope_mscale", "rope_mscale_all_dim",
             "rope_attention_factor"),
}
_LATENT = ("query_rank", "latent_rank", "rope_dim", "value_dim")


@dataclasses.dataclass(frozen=True)
class LayerAttention:
    """What one layer's attention sees (``span``, of :data:`SPANS`), and whether its queries and keys are rotated."""

    span: str = "full"
    rotated: bool = True


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Attention of all layers; ``layers`` says in what they differ."""

    kind: str = "heads"
    layers: str = "full"
    window: int = 0
    chunk: int = 0
    bias: str = "none"
    sinks: bool = False
    clip_qkv: float = 0.0
    qk_norm: str = "none"
    positions: str = "rotary"
    rope_pairs: str = "half"
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_original_length: int = 0
    rope_low_factor: float = 1.0
    rope_high_factor: float = 4.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_truncate: bool = True
    rope_mscale: float = 0.0
    rope_mscale_all_dim: float = 0.0
    rope_attention_factor: float = 0.0
    temperature_scale: float = 0.0
    temperature_floor: int = 8192
    query_rank: int = 0
    latent_rank: int = 0
    rope_dim: int = 0
    value_dim: int = 0
    relative_buckets: int = 32
    relative_distance: int = 128
    first_position: int = 0

    def __post_init__(self):
        choice("attention", self, "kind", ("heads", "latent"))
        choice("attention", self, "bias", ("none", "qkv", "all"))
        choice("attention", self, "qk_norm", ("none", "head", "all_heads", "unscaled"))
        choice("attention", self, "positions", ("rotary", "relative", "sinusoidal", "none"))
        choice("attention", self, "rope_pairs", ("half", "interleaved"))
        choice("attention", self, "rope_scaling", ("none", *_ROPE_SCALING))
        at_least("attention", self, 0, "window", "chunk", "clip_qkv", "rope_original_length", "rope_mscale",
                 "rope_mscale_all_dim", "rope_attention_factor", "temperature_scale", *_LATENT)
        at_least("attention", self, 1, "rope_factor", "temperature_floor")
        at_least("attention", self, 4, "relative_buckets", "relative_distance")
        at_least("attention", self, 0, "first_position")
        self._check_layers()
        self._check_positions()
        self._check_scaling()
        self._check_latent()

    def _check_layers(self):
        pattern = self.pattern
        for span, field in (("sliding", "window"), ("chunked", "chunk")):
            value, used = getattr(self, field), any(layer.span == span for layer in pattern)
            require(used or value == 0, f"attention.{field}", value,
                    f"has no effect: attention.layers={self.layers!r} has no {span} layer; set it to 0, or add one.")
            require(not used or value > 0, f"attention.{field}", value,
                    f"attention.layers={self.layers!r} has {span} layers, which need it above 0: tokens.")
        unrotated = any(not layer.rotated for layer in pattern)
        require(self.temperature_scale == 0 or unrotated, "attention.temperature_scale", self.temperature_scale,
                f"acts in ':nope' layers, of which attention.layers={self.layers!r} has none; set it to 0.0, or add one.")
        self._unused("temperature_floor", self.temperature_scale > 0, "attention.temperature_scale above 0")

    def _check_positions(self):
        rotary, rotated = self.positions == "rotary", any(layer.rotated for layer in self.pattern)
        require(rotary or all(layer.rotated for layer in self.pattern), "attention.layers", self.layers,
                f"':nope' has no effect with attention.positions={self.positions!r}, which rotates no layer; leave it out.")
        require(self.qk_norm != "unscaled" or (rotary and rotated), "attention.qk_norm", self.qk_norm,
                f"acts in rotated layers, of which attention.positions={self.positions!r} and attention.layers="
                f"{self.layers!r} leave none; set it to 'none', 'head' or 'all_heads'.")
        for field in ("rope_pairs", "rope_scaling"):
            self._unused(field, rotary and rotated, "a rotated layer (attention.positions='rotary')")
        for field in ("relative_buckets", "relative_distance"):
            self._unused(field, self.positions == "relative", "attention.positions='relative'")
        require(self.relative_distance > self.relative_buckets // 2, "attention.relative_distance", self.relative_distance,
                f"must be above half of attention.relative_buckets={self.relative_buckets}: so many distances have a bucket of "
                f"their own.")
        require(self.relative_buckets % 2 == 0, "attention.relative_buckets", self.relative_buckets,
                "must be even: an encoder's are shared by keys before and behind the query.")
        require(self.positions != "relative" or all(layer.span == "full" for layer in self.pattern), "attention.layers",
                self.layers, "limits what is seen, but attention.positions='relative' counts places from a row's first; set it "
                "to 'full'.")
        self._unused("first_position", self.positions == "sinusoidal", "attention.positions='sinusoidal'")

    def _check_scaling(self):
        scaling = self.rope_scaling
        self._unused("rope_factor", scaling != "none", "attention.rope_scaling")
        self._unused("rope_original_length", scaling not in ("none", "linear"), "attention.rope_scaling='llama3' or 'yarn'")
        for name, fields in _ROPE_SCALING.items():
            for field in fields:
                self._unused(field, scaling == name, f"attention.rope_scaling={name!r}")
        if scaling in ("none", "linear"):
            return
        require(self.rope_original_length > 0, "attention.rope_original_length", self.rope_original_length,
                f"attention.rope_scaling={scaling!r} needs the length, in tokens, that the model was trained with before.")
        require(self.rope_low_factor <= self.rope_high_factor, "attention.rope_low_factor", self.rope_low_factor,
                f"must be at most attention.rope_high_factor={self.rope_high_factor}.")
        for field in ("rope_low_factor", "rope_beta_fast", "rope_beta_slow"):
            require(getattr(self, field) > 0, f"attention.{field}", getattr(self, field), "must be above 0.")

    def _check_latent(self):
        if self.kind == "heads":
            for field in _LATENT:
                self._unused(field, False, "attention.kind='latent'")
            return
        for field in ("latent_rank", "rope_dim", "value_dim"):
            require(getattr(self, field) > 0, f"attention.{field}", getattr(self, field),
                    "must be above 0 with attention.kind='latent'.")
        require(self.rope_dim % 2 == 0, "attention.rope_dim", self.rope_dim,
                f"must be even (rotary embedding pairs dimensions); nearest legal values: "
                f"{nearest_multiples(self.rope_dim, 2)}.")
        require(self.positions == "rotary", "attention.positions", self.positions,
                "attention.kind='latent' has one rotary key for all heads; set it to 'rotary'.")
        require(self.bias != "qkv", "attention.bias", self.bias, "attention.kind='latent' has no biases of values; set it to 'all' "
                "(of latents, the shared key and the output), or 'none'.")
        for field, why in (("qk_norm", "has norms of its own, on the latents"),
                           ("clip_qkv", "clips nothing")):
            value, default = getattr(self, field), getattr(AttentionConfig, field)
            require(value == default, f"attention.{field}", value,
                    f"attention.kind='latent' {why}; set it to {default!r}.")

    def _unused(self, field: str, used: bool, by: str):
        value, default = getattr(self, field), getattr(AttentionConfig, field)
        require(used or value == default, f"attention.{field}", value,
                f"has no effect without {by}; set that, or attention.{field}={default!r}.")

    @property
    def pattern(self) -> tuple[LayerAttention, ...]:
        """The entries of ``layers``."""
        return tuple(self._entry(entry.strip()) for entry in self.layers.split(","))

    def _entry(self, entry: str) -> LayerAttention:
        span, colon, rest = entry.partition(":")
        require(span in SPANS and (not colon or rest == "nope"), "attention.layers", self.layers,
                f"cannot be read at {entry!r}; wanted are {', '.join(map(repr, SPANS))}, each with ':nope' behind it for a "
                f"layer without rotary positions, separated by commas.")
        return LayerAttention(span, not colon)

    def of_layers(self, num_layers: int) -> tuple[LayerAttention, ...]:
        """The pattern, repeated over so many layers."""
        pattern = self.pattern
        return tuple(pattern[i % len(pattern)] for i in range(num_layers))
