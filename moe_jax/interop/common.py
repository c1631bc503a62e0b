"""What the rows of decoder-only families have in common: sizes, rotary positions, layers, and the tensors of a Llama."""

from collections.abc import Sequence
from typing import Any

from moe_jax.config import Config
from moe_jax.interop.layouts import FLAT, SAME, Linear
from moe_jax.interop.settings import Settings
from moe_jax.interop.table import Rule

Overrides = dict[str, Any]

# The gated feed-forward network around each of torch's activations.
_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu_exact", "gelu_new": "geglu", "gelu_pytorch_tanh": "geglu",
          "relu": "reglu", "sigmoid": "glu"}


def sizes(settings: Settings, d_ff: str = "intermediate_size", theta: float = 10_000.0, epsilon: float = 1e-6,
          activation: str = "") -> Overrides:
    """Of a pre-norm decoder with RMSNorm and gated networks. ``d_ff``: name of the dense layers' width; ``theta``,
    ``epsilon``: what the family has where the settings do not say; ``activation``: ours, whatever they say."""
    tied = bool(settings.value("tie_word_embeddings", False))
    if not activation:
        hidden = settings.value("hidden_act", "silu")
        if hidden not in _GATED:
            raise settings.refuse("hidden_act", f"has no gated counterpart here; supported: {', '.join(_GATED)}.")
        activation = _GATED[hidden]
    settings.only("mlp_bias", (False, None), "gives the feed-forward layers biases, which this family's do not have here")
    return {
        "model.num_layers": settings.number("num_hidden_layers"), "model.d_model": settings.number("hidden_size"),
        "model.d_ff": settings.number(d_ff), "model.activation": activation, "moe.activation": activation,
        "model.norm_epsilon": float(settings.value("rms_norm_eps", epsilon)), "model.rope_theta": _theta(settings, theta),
        "model.vocab_size": settings.number("vocab_size"), "model.tie_embedding": tied,
        **({"model.scaled_tied_logits": False} if tied else {}),
    }


def heads(settings: Settings, kv_heads: int | None = None) -> Overrides:
    """Query and key/value heads. ``kv_heads``: where the settings do not say; None, or a null there: as many as query heads."""
    count = settings.number("num_attention_heads")
    missing = count if "num_key_value_heads" in settings.values else kv_heads or count
    return {"model.num_heads": count, "model.num_kv_heads": settings.number("num_key_value_heads", missing),
            "model.head_dim": settings.number("head_dim", settings.number("hidden_size") // count)}


def _theta(settings: Settings, default: float) -> float:
    """The base of the frequencies: of its own, or among the rotary parameters of transformers 5."""
    rope = settings.value("rope_parameters", None) or settings.value("rope_scaling", {})
    return float(rope.get("rope_theta", settings.value("rope_theta", default)))


def rotary(settings: Settings, default: dict[str, Any] | None = None) -> Overrides:
    """Scaled rotary positions. ``default``: the family's, where the settings have none.

    Raises:
      InteropError: of a kind that is not known here.
    """
    rope = settings.value("rope_parameters", None) or settings.value("rope_scaling", None) or default or {}
    settings.get("rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if float(rope.get("partial_rotary_factor") or settings.value("partial_rotary_factor", 1.0)) != 1.0:
        raise settings.refuse("partial_rotary_factor", "rotates a part of each head; only whole heads are rotated here.")
    if kind == "default":
        return {}
    name = "rope_parameters" if settings.value("rope_parameters", None) else "rope_scaling"
    if kind == "linear":
        return {"attention.rope_scaling": kind, "attention.rope_factor": float(rope["factor"])}
    original = rope.get("original_max_position_embeddings") or settings.number("max_position_embeddings")
    common = {"attention.rope_scaling": kind, "attention.rope_original_length": int(original),
              "attention.rope_factor": float(rope.get("factor") or settings.number("max_position_embeddings") / original)}
    if kind == "llama3":
        return {**common, "attention.rope_low_factor": float(rope["low_freq_factor"]),
                "attention.rope_high_factor": float(rope["high_freq_factor"])}
    if kind == "yarn":
        return {**common, "attention.rope_beta_fast": float(rope.get("beta_fast") or 32),
                "attention.rope_beta_slow": float(rope.get("beta_slow") or 1),
                "attention.rope_truncate": bool(rope.get("truncate", True)),
                "attention.rope_mscale": float(rope.get("mscale") or 0),
                "attention.rope_mscale_all_dim": float(rope.get("mscale_all_dim") or 0),
                "attention.rope_attention_factor": float(rope.get("attention_factor") or 0)}
    raise settings.refuse(name, f"is of the kind {kind!r}; supported: 'default', 'linear', 'llama3', 'yarn'.")


def rotary_settings(config: Config) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` as hub checkpoints have them."""
    attention = config.attention
    settings = {"rope_theta": config.model.rope_theta, "rope_scaling": None}
    if attention.rope_scaling == "none":
        return settings
    scaling = {"rope_type": attention.rope_scaling, "factor": attention.rope_factor}
    if attention.rope_scaling == "linear":
        return {**settings, "rope_scaling": scaling}
    scaling["original_max_position_embeddings"] = attention.rope_original_length
    if attention.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": attention.rope_low_factor, "high_freq_factor": attention.rope_high_factor}
    else:
        scaling |= {"beta_fast": attention.rope_beta_fast, "beta_slow": attention.rope_beta_slow,
                    "truncate": attention.rope_truncate}
        for name, value in (("mscale", attention.rope_mscale), ("mscale_all_dim", attention.rope_mscale_all_dim),
                            ("attention_factor", attention.rope_attention_factor)):
            scaling |= {name: value} if value else {}
    return {**settings, "rope_scaling": scaling}


def size_settings(config: Config, vocab_size: int, d_ff: str = "intermediate_size") -> dict[str, Any]:
    """The inverse of :func:`sizes` and :func:`heads`, with the rotary positions."""
    model = config.model
    return {"vocab_size": vocab_size, "hidden_size": model.d_model, d_ff: model.d_ff, "num_hidden_layers": model.num_layers,
            "num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads, "head_dim": model.head_dim,
            "hidden_act": hidden_act(model.activation), "rms_norm_eps": model.norm_epsilon,
            "tie_word_embeddings": model.tie_embedding, **rotary_settings(config)}


def hidden_act(activation: str) -> str:
    """torch's name of the activation inside a gated one of ours."""
    return next(name for name, ours in _GATED.items() if ours == activation)


def experts(count: int, chosen: int, **more: Any) -> Overrides:
    """Of layers that drop nothing, as all of these families compute; ``more`` settings of the section ``moe``.

    One expert with a gate that is normalised, hence 1, is for evaluation and generation."""
    is_one = chosen == 1 and (more.get("renormalize", False) or more.get("gate_order") == "top_k_then_softmax")
    return {"moe.num_experts": count, "moe.experts_per_token": chosen, "moe.dispatch": "dropless",
            "moe.eval_dispatch": "dropless", "moe.router_z_weight": 0.0, **{f"moe.{name}": value for name, value in more.items()},
            **({"moe.allow_untrained_router": True} if is_one else {})}


def named_experts(config: Config) -> int:
    """How many experts the settings of a checkpoint name: of a model without mixtures so many as could be chosen of."""
    return config.moe.num_experts or config.moe.experts_per_token


def balance(settings: Settings, default: float) -> Overrides:
    """The weight of the balancing loss, for further training."""
    return {"moe.balance_weight": float(settings.value("router_aux_loss_coef", default))}


def moe_layers(layers: Sequence[int], num_layers: int) -> Overrides:
    """Which layers are mixtures, in the plainest words: every so many, all but the first, or one by one."""
    layers = list(layers)
    if not layers:
        return {"moe.num_experts": 0}
    first = layers[0]
    if layers == list(range(first, num_layers)):
        return {"moe.every": 1, "moe.first_dense_layers": first}
    step = layers[1] - first if len(layers) > 1 else num_layers
    if first < step and layers == list(range(first, num_layers, step)):
        return {"moe.every": step, "moe.first": -1 if first == step - 1 else first}
    return {"moe.every": _DEFAULTS.moe.every, "moe.layers": ",".join(map(str, layers))}


_DEFAULTS = Config()


def dense_layers(config: Config) -> tuple[int, ...]:
    return tuple(i for i in range(config.model.num_layers) if i not in config.moe_layers)


def all_layers(config: Config) -> tuple[int, ...]:
    return tuple(range(config.model.num_layers))


# Tensors. Names are those of Llama, from which these families' come.

LAYER = "model.layers.{layer}"


def frame_rules(config: Config) -> list[Rule]:
    """Tables and norms."""
    layers = all_layers(config)
    rules = [Rule("model.embed_tokens.weight", ("embedding/embedding_VD",), SAME),
             Rule("model.norm.weight", ("final_norm/scale_D",), SAME),
             Rule(f"{LAYER}.input_layernorm.weight", ("{layer}/attention_norm/scale_D",), SAME, layers),
             Rule(f"{LAYER}.post_attention_layernorm.weight", ("{layer}/ffn_norm/scale_D",), SAME, layers)]
    return rules if config.model.tie_embedding else [*rules, Rule("lm_head.weight", ("embedding/w_logits_DV",))]


def attention_rules(config: Config) -> list[Rule]:
    """Separate projections for queries, keys, values and the output, with biases and norms where the config has them."""
    layers, attention, here = all_layers(config), config.attention, f"{LAYER}.self_attn"
    rules = [Rule(f"{here}.{name[0]}_proj.weight", (f"{{layer}}/attention/w_{name}_DHd",), layers=layers)
             for name in ("query", "key", "value")]
    rules.append(Rule(f"{here}.o_proj.weight", ("{layer}/attention/w_out_HdD",), Linear(inputs=2), layers))
    if attention.bias != "none":
        rules += [Rule(f"{here}.{name[0]}_proj.bias", (f"{{layer}}/attention/b_{name}_Hd",), FLAT, layers)
                  for name in ("query", "key", "value")]
    if attention.bias == "all":
        rules.append(Rule(f"{here}.o_proj.bias", ("{layer}/attention/b_out_D",), SAME, layers))
    if attention.qk_norm in ("head", "all_heads"):
        scale = "scale_d" if attention.qk_norm == "head" else "scale_Hd"
        rules += [Rule(f"{here}.{name[0]}_norm.weight", (f"{{layer}}/attention/{name}_norm/{scale}",), FLAT, layers)
                  for name in ("query", "key")]
    if attention.sinks:
        rules.append(Rule(f"{here}.sinks", ("{layer}/attention/sink_H",), SAME, layers))
    return rules


def gated_rules(key: str, ours: str, layers: Sequence[int], letters: tuple[str, str] = ("DF", "FD"),
                names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> list[Rule]:
    """A gated feed-forward network; ``letters`` of ours, ('EDF', 'EFD') for experts; ``names`` of gate, up and down."""
    gate, up, down = names
    branches = ((gate, f"w_gate_{letters[0]}"), (up, f"w_in_{letters[0]}"), (down, f"w_out_{letters[1]}"))
    return [Rule(f"{key}.{name}.weight", (f"{ours}/{weight}",), layers=tuple(layers)) for name, weight in branches]


def dense_rules(config: Config, key: str = f"{LAYER}.mlp") -> list[Rule]:
    return gated_rules(key, "{layer}/mlp", dense_layers(config))


def expert_rules(config: Config, key: str = f"{LAYER}.mlp", shared: str = "shared_expert",
                 names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> list[Rule]:
    """Router, experts one by one, and the shared expert."""
    layers = config.moe_layers
    rules = [Rule(f"{key}.gate.weight", ("{layer}/moe/w_router_DE",), layers=layers),
             *gated_rules(f"{key}.experts.{{expert}}", "{layer}/moe/experts", layers, ("EDF", "EFD"), names)]
    return rules + gated_rules(f"{key}.{shared}", "{layer}/moe/shared", layers) if config.moe.num_shared_experts else rules
