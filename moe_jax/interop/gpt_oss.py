"""GPT-OSS."""

from typing import Any

from moe_jax.config import Config
from moe_jax.interop.classic import layer_type_names, layer_types
from moe_jax.interop.common import (
    LAYER, Overrides, attention_rules, balance, experts, frame_rules, heads, rotary, size_settings, sizes)
from moe_jax.interop.layouts import SAME, Halves
from moe_jax.interop.settings import Settings
from moe_jax.interop.table import Family, Rule

# What the class has where a checkpoint does not say.
_ROPE = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
         "original_max_position_embeddings": 4096}


def _config(settings: Settings) -> Overrides:
    count = settings.number("num_hidden_layers")
    types = settings.value("layer_types", ["full_attention" if i % 2 else "sliding_attention" for i in range(count)])
    settings.get("hidden_act")  # is not looked at: experts are clamped SwiGLUs
    return {
        **sizes(settings, theta=1.5e5, epsilon=1e-5, activation="swiglu"),
        **heads(settings, kv_heads=8), **rotary(settings, _ROPE),
        **layer_types(settings, types, window=settings.get("sliding_window", 128) or 0), "attention.sinks": True,
        "attention.bias": "all" if settings.value("attention_bias", True) else "none",
        **experts(settings.number("num_local_experts", settings.value("num_experts", 128)),
                  settings.number("num_experts_per_tok", 4), every=1, d_ff=settings.number("intermediate_size"),
                  gate_order="top_k_then_softmax", activation="swiglu_clamped", expert_bias=True, router_bias=True,
                  activation_limit=float(settings.value("swiglu_limit", 7.0)),
                  activation_alpha=float(settings.value("swiglu_alpha", 1.702))),
        **balance(settings, 0.001)}


def _settings(config: Config, vocab_size: int) -> dict[str, Any]:
    moe, common = config.moe, size_settings(config, vocab_size)
    rope = common["rope_scaling"] or {"rope_type": "default"}  # none would be the class's own
    return {**common, "rope_scaling": rope, "intermediate_size": moe.d_ff, "hidden_act": "silu",
            "num_local_experts": moe.num_experts, "num_experts_per_tok": moe.experts_per_token,
            "attention_bias": config.attention.bias == "all", "layer_types": layer_type_names(config),
            "sliding_window": config.attention.window or None, "swiglu_limit": moe.activation_limit,
            "swiglu_alpha": moe.activation_alpha, "router_aux_loss_coef": moe.balance_weight}


def _rules(config: Config) -> list[Rule]:
    layers, here, ours = config.moe_layers, f"{LAYER}.mlp", "{layer}/moe"
    in_turn = Halves(interleaved=True)
    return [*frame_rules(config), *attention_rules(config),
            Rule(f"{here}.router.weight", (f"{ours}/w_router_DE",), layers=layers),
            Rule(f"{here}.router.bias", (f"{ours}/b_router_E",), SAME, layers),
            Rule(f"{here}.experts.gate_up_proj", (f"{ours}/experts/w_gate_EDF", f"{ours}/experts/w_in_EDF"), in_turn, layers,
                 experts=True),
            Rule(f"{here}.experts.gate_up_proj_bias", (f"{ours}/experts/b_gate_EF", f"{ours}/experts/b_in_EF"), in_turn,
                 layers, experts=True),
            Rule(f"{here}.experts.down_proj", (f"{ours}/experts/w_out_EFD",), SAME, layers, experts=True),
            Rule(f"{here}.experts.down_proj_bias", (f"{ours}/experts/b_out_ED",), SAME, layers, experts=True)]


GPT_OSS = Family("GPT-OSS", ("gpt_oss",), ("GptOssForCausalLM",), _config, _settings, _rules, balances=True)
