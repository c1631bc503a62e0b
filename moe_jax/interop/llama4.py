"""Llama-4, its text model: alone, or as the language model in a checkpoint that also sees."""

from typing import Any

from moe_jax.config import Config
from moe_jax.interop.classic import layer_type_names, layer_types
from moe_jax.interop.common import (
    LAYER, Overrides, attention_rules, balance, dense_rules, experts, frame_rules, gated_rules, heads, moe_layers, named_experts,
    rotary, size_settings, sizes)
from moe_jax.interop.layouts import SAME, Halves
from moe_jax.interop.settings import Settings
from moe_jax.interop.table import Family, Rule


def text_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the text model; what it leaves to the whole checkpoint is taken from there."""
    if "text_config" not in settings:
        return settings
    whole = {name: settings[name] for name in ("tie_word_embeddings", "torch_dtype", "dtype", "quantization_config")
             if name in settings}
    return whole | settings["text_config"]


def _prefix(settings: dict[str, Any]) -> str:
    return "language_model." if "text_config" in settings else ""


def _config(settings: Settings) -> Overrides:
    count = settings.number("num_hidden_layers")
    rotated = _rotated(settings, count)
    tuned = settings.value("attn_temperature_tuning", True)  # true, or a number that is not 0
    scale, floor = float(settings.value("attn_scale", 0.1)), int(settings.value("floor_scale", 8192))
    chosen = _moe_layers(settings, count)
    return {
        **sizes(settings, "intermediate_size_mlp", theta=5e5, epsilon=1e-5), **heads(settings, kv_heads=8),
        **_windows(settings, count, rotated),
        "attention.bias": "all" if settings.value("attention_bias", False) else "none",
        "attention.qk_norm": "unscaled" if settings.value("use_qk_norm", True) and any(rotated) else "none",
        **({"attention.rope_pairs": "interleaved", **rotary(settings)} if any(rotated) else {}),
        **({"attention.temperature_scale": scale, "attention.temperature_floor": floor}
           if tuned and scale and not all(rotated) else {}),
        **experts(settings.number("num_local_experts", 16), settings.number("num_experts_per_tok", 1),
                  d_ff=settings.number("intermediate_size"), num_shared_experts=1, score="sigmoid", gate_on="input"),
        **balance(settings, 0.001), **moe_layers(chosen, count)}


def _rotated(settings: Settings, count: int) -> list[bool]:
    """1 in ``no_rope_layers`` means that the layer is rotated."""
    interval, given = settings.number("no_rope_layer_interval", 4), settings.value("no_rope_layers", [])
    if given and len(given) < count:
        raise settings.refuse("no_rope_layers", f"must have an entry for each of num_hidden_layers={count} layers.")
    return [bool(given[i]) if given else (i + 1) % interval != 0 for i in range(count)]


def _moe_layers(settings: Settings, count: int) -> list[int]:
    step = settings.number("interleave_moe_layer_step", 1)
    return sorted(settings.value("moe_layers", list(range(step - 1, count, step))))


def _windows(settings: Settings, count: int, rotated: list[bool]) -> Overrides:
    types = settings.value("layer_types", None)
    if types is None:
        types = ["chunked_attention" if turn else "full_attention" for turn in rotated]
    return layer_types(settings, types, chunk=settings.get("attention_chunk_size", 8192) or 0, rotated=rotated)


def _settings(config: Config, vocab_size: int) -> dict[str, Any]:
    attention, moe = config.attention, config.moe
    of_layers = attention.of_layers(config.model.num_layers)
    return {**size_settings(config, vocab_size, "intermediate_size_mlp"), "intermediate_size": moe.d_ff,
            "num_local_experts": named_experts(config), "num_experts_per_tok": moe.experts_per_token,
            "moe_layers": list(config.moe_layers), "no_rope_layers": [int(layer.rotated) for layer in of_layers],
            "layer_types": layer_type_names(config),
            "attention_chunk_size": attention.chunk or 8192,  # transformers asks for one, also where no layer is chunked
            "use_qk_norm": attention.qk_norm == "unscaled", "attention_bias": attention.bias == "all",
            "attn_temperature_tuning": attention.temperature_scale > 0, "attn_scale": attention.temperature_scale,
            "floor_scale": attention.temperature_floor, "router_aux_loss_coef": moe.balance_weight}


def _rules(config: Config) -> list[Rule]:
    layers, here, ours = config.moe_layers, f"{LAYER}.feed_forward", "{layer}/moe"
    return [*frame_rules(config), *attention_rules(config), *dense_rules(config, here),
            Rule(f"{here}.router.weight", (f"{ours}/w_router_DE",), layers=layers),
            Rule(f"{here}.experts.gate_up_proj", (f"{ours}/experts/w_gate_EDF", f"{ours}/experts/w_in_EDF"), Halves(), layers,
                 experts=True),
            Rule(f"{here}.experts.down_proj", (f"{ours}/experts/w_out_EFD",), SAME, layers, experts=True),
            *gated_rules(f"{here}.shared_expert", f"{ours}/shared", layers)]


LLAMA4 = Family("Llama-4 (text)", ("llama4_text", "llama4"), ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"), _config,
                _settings, _rules, ignored=lambda config: (r"(?!language_model\.)(vision_model|multi_modal_projector)\..*",),
                prefix=_prefix, model_settings=text_settings)
