"""Mixtral, OLMoE, Qwen2-MoE and Qwen3-MoE: Llamas with a softmax router whose tensors differ in names only."""

from typing import Any

from moe_jax.config import Config
from moe_jax.interop.common import (
    LAYER, Overrides, attention_rules, balance, dense_rules, expert_rules, experts, frame_rules, heads, moe_layers, named_experts,
    rotary, size_settings, sizes)
from moe_jax.interop.layouts import Same
from moe_jax.interop.settings import Settings
from moe_jax.interop.table import Family, Rule


def _all_sliding(window: int | None) -> Overrides:
    return {"attention.layers": "sliding", "attention.window": window} if window else {}


def _window(config: Config) -> int | None:
    return config.attention.window or None


# Mixtral (Jiang et al. 2024).

def _mixtral_config(settings: Settings) -> Overrides:
    return {
        **sizes(settings, theta=1e6, epsilon=1e-5), **heads(settings, kv_heads=8), **rotary(settings),
        **_all_sliding(settings.get("sliding_window")),
        **experts(settings.number("num_local_experts", 8), settings.number("num_experts_per_tok", 2), every=1,
                  d_ff=settings.number("intermediate_size"), gate_order="top_k_then_softmax"),
        **balance(settings, 0.001)}


def _mixtral_settings(config: Config, vocab_size: int) -> dict[str, Any]:
    return {**size_settings(config, vocab_size), "intermediate_size": config.moe.d_ff, "sliding_window": _window(config),
            "num_local_experts": config.moe.num_experts, "num_experts_per_tok": config.moe.experts_per_token,
            "router_aux_loss_coef": config.moe.balance_weight}


def _mixtral_rules(config: Config) -> list[Rule]:
    # w1 is the gate, w3 the other branch, w2 the output.
    return [*frame_rules(config), *attention_rules(config),
            *expert_rules(config, f"{LAYER}.block_sparse_moe", names=("w1", "w3", "w2"))]


MIXTRAL = Family("Mixtral", ("mixtral",), ("MixtralForCausalLM",), _mixtral_config, _mixtral_settings, _mixtral_rules,
                 balances=True)


# OLMoE (Muennighoff et al. 2024).

def _olmoe_config(settings: Settings) -> Overrides:
    return {
        **sizes(settings, epsilon=1e-5), **heads(settings), **rotary(settings),
        "attention.qk_norm": "all_heads", "attention.clip_qkv": float(settings.value("clip_qkv", 0.0)),
        "attention.bias": "all" if settings.value("attention_bias", False) else "none",
        **experts(settings.number("num_experts", 64), settings.number("num_experts_per_tok", 8), every=1,
                  d_ff=settings.number("intermediate_size"), renormalize=bool(settings.value("norm_topk_prob", False))),
        **balance(settings, 0.01)}


def _olmoe_settings(config: Config, vocab_size: int) -> dict[str, Any]:
    settings = size_settings(config, vocab_size)
    del settings["head_dim"]  # it has none: the width of a head is hidden_size / num_attention_heads
    return {**settings, "intermediate_size": config.moe.d_ff, "attention_bias": config.attention.bias == "all",
            "clip_qkv": config.attention.clip_qkv or None, "num_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.experts_per_token, "norm_topk_prob": config.moe.renormalize,
            "router_aux_loss_coef": config.moe.balance_weight}


def _olmoe_rules(config: Config) -> list[Rule]:
    return [*frame_rules(config), *attention_rules(config), *expert_rules(config)]


OLMOE = Family("OLMoE", ("olmoe",), ("OlmoeForCausalLM",), _olmoe_config, _olmoe_settings, _olmoe_rules, balances=True)


# Qwen2-MoE and Qwen3-MoE.

def _qwen_layers(settings: Settings, num_experts: int) -> Overrides:
    dense, step = settings.value("mlp_only_layers", []), settings.number("decoder_sparse_step", 1)
    count = settings.number("num_hidden_layers")
    chosen = [i for i in range(count) if i not in dense and num_experts > 0 and (i + 1) % step == 0]
    return moe_layers(chosen, count)


def _qwen_experts(settings: Settings, num_experts: int, chosen: int, **more: Any) -> Overrides:
    return {**experts(num_experts, chosen, d_ff=settings.number("moe_intermediate_size"),
                      renormalize=bool(settings.value("norm_topk_prob", False)), **more),
            **balance(settings, 0.001), **_qwen_layers(settings, num_experts)}


def _qwen2_config(settings: Settings) -> Overrides:
    shared = settings.number("shared_expert_intermediate_size", 5632)
    return {
        **sizes(settings), **heads(settings, kv_heads=16), **rotary(settings), **_qwen2_windows(settings),
        "attention.bias": "qkv" if settings.value("qkv_bias", True) else "none",
        **_qwen_experts(settings, settings.number("num_experts", 60), settings.number("num_experts_per_tok", 4),
                        num_shared_experts=1, shared_d_ff=shared, shared_gate=True)}


def _qwen2_windows(settings: Settings) -> Overrides:
    """Its windows, if on at all, are those of every other layer below ``max_window_layers``."""
    on, window = settings.value("use_sliding_window", False), settings.value("sliding_window", 4096)
    last, types = settings.value("max_window_layers", 28), settings.value("layer_types", None)
    if types is None:
        types = ["sliding_attention" if on and i % 2 == 0 and i < last else "full_attention"
                 for i in range(settings.number("num_hidden_layers"))]
    return layer_types(settings, types, window if on else 0)


def layer_types(settings: Settings, types: list[str], window: int = 0, chunk: int = 0,
                rotated: list[bool] | None = None) -> Overrides:
    """What each layer's attention sees, of the names that transformers has for it, in as short a pattern as repeats."""
    names = {"full_attention": "full", "sliding_attention": "sliding", "chunked_attention": "chunked"}
    count = settings.number("num_hidden_layers")
    unknown = sorted(set(types) - set(names))
    if unknown or len(types) != count:
        raise settings.refuse("layer_types", f"must name one of {', '.join(names)} for each of num_hidden_layers={count} "
                              f"layers" + (f"; {', '.join(unknown)} is not known here." if unknown else "."))
    spans = [names[kind] for kind in types]
    spans = [span if {"sliding": window, "chunked": chunk}.get(span, 1) else "full" for span in spans]
    entries = [span + ("" if turn else ":nope") for span, turn in zip(spans, rotated or [True] * count)]
    period = next(p for p in range(1, count + 1) if all(entries[i] == entries[i % p] for i in range(count)))
    pattern = entries[:period]
    return {"attention.layers": ",".join(pattern),
            **({"attention.window": window} if any("sliding" in entry for entry in pattern) else {}),
            **({"attention.chunk": chunk} if any("chunked" in entry for entry in pattern) else {})}


def layer_type_names(config: Config) -> list[str]:
    """The inverse of :func:`layer_types`."""
    return [f"{layer.span}_attention" for layer in config.attention.of_layers(config.model.num_layers)]


def _qwen_settings(config: Config, vocab_size: int) -> dict[str, Any]:
    moe = config.moe
    dense = [i for i in range(config.model.num_layers) if i not in config.moe_layers]
    return {**size_settings(config, vocab_size), "moe_intermediate_size": moe.d_ff, "num_experts": named_experts(config),
            "num_experts_per_tok": moe.experts_per_token, "norm_topk_prob": moe.renormalize, "decoder_sparse_step": 1,
            "mlp_only_layers": dense, "router_aux_loss_coef": moe.balance_weight}


def _qwen2_settings(config: Config, vocab_size: int) -> dict[str, Any]:
    types = layer_type_names(config)
    return {**_qwen_settings(config, vocab_size), "qkv_bias": config.attention.bias == "qkv",
            "shared_expert_intermediate_size": config.moe.shared_width, "layer_types": types,
            "use_sliding_window": "sliding_attention" in types, "sliding_window": config.attention.window}


def _qwen3_config(settings: Settings) -> Overrides:
    count = settings.number("num_local_experts", settings.value("num_experts", 128))
    window = settings.value("sliding_window", 4096) if settings.value("use_sliding_window", False) else None
    settings.get("max_window_layers")
    return {
        **sizes(settings), **heads(settings, kv_heads=4), **rotary(settings), **_all_sliding(window),
        "attention.qk_norm": "head", "attention.bias": "all" if settings.value("attention_bias", False) else "none",
        **_qwen_experts(settings, count, settings.number("num_experts_per_tok", 8))}


def _qwen3_settings(config: Config, vocab_size: int) -> dict[str, Any]:
    return {**_qwen_settings(config, vocab_size), "attention_bias": config.attention.bias == "all",
            "use_sliding_window": config.attention.window > 0, "sliding_window": _window(config)}


def _qwen2_rules(config: Config) -> list[Rule]:
    gate = Rule(f"{LAYER}.mlp.shared_expert_gate.weight", ("{layer}/moe/w_shared_gate_D",), Same(row=True),
                config.moe_layers)
    return [*_qwen3_rules(config), gate]


def _qwen3_rules(config: Config) -> list[Rule]:
    return [*frame_rules(config), *attention_rules(config), *dense_rules(config), *expert_rules(config)]


QWEN2_MOE = Family("Qwen2-MoE", ("qwen2_moe",), ("Qwen2MoeForCausalLM",), _qwen2_config, _qwen2_settings, _qwen2_rules,
                   balances=True)
QWEN3_MOE = Family("Qwen3-MoE", ("qwen3_moe",), ("Qwen3MoeForCausalLM",), _qwen3_config, _qwen3_settings, _qwen3_rules,
                   balances=True)
