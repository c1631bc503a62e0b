"""DeepSeekMoE (V1), DeepSeek-V2 and its Lite, DeepSeek-V3."""

import logging
from typing import Any

from moe_jax.config import Config
from moe_jax.interop.common import (
    LAYER, Overrides, all_layers, attention_rules, dense_rules, expert_rules, experts, frame_rules, heads, moe_layers, named_experts,
    rotary, size_settings, sizes)
from moe_jax.interop.layouts import PER_HEAD, SAME, Halves, Linear
from moe_jax.interop.settings import Settings
from moe_jax.interop.table import BIAS, Family, Rule

log = logging.getLogger("moe_jax")


def _layers(settings: Settings, first_dense: int) -> Overrides:
    """Mixtures are the layers from ``first_k_dense_replace`` on whose index ``moe_layer_freq`` divides."""
    count, frequency = settings.number("num_hidden_layers"), settings.number("moe_layer_freq", 1)
    first_dense = settings.value("first_k_dense_replace", first_dense)
    return moe_layers([i for i in range(first_dense, count) if i % frequency == 0], count)


def _experts(settings: Settings, first_dense: int, shared: int, **more: Any) -> Overrides:
    count = settings.number("n_routed_experts")
    return {**experts(count, settings.number("num_experts_per_tok"), d_ff=settings.number("moe_intermediate_size"),
                      num_shared_experts=settings.get("n_shared_experts", shared) or 0, **more),
            **_layers(settings, first_dense)}


def _expert_settings(config: Config) -> dict[str, Any]:
    moe, layers = config.moe, config.moe_layers
    frequency = layers[1] - layers[0] if len(layers) > 1 else 1
    return {"moe_intermediate_size": moe.d_ff, "n_routed_experts": named_experts(config),
            "num_experts_per_tok": moe.experts_per_token,
            "n_shared_experts": moe.num_shared_experts or None, "norm_topk_prob": moe.renormalize,
            "first_k_dense_replace": layers[0] if layers else config.model.num_layers, "moe_layer_freq": frequency}


# V1 (Dai et al. 2024): the attention of Llama.

def _v1_config(settings: Settings) -> Overrides:
    settings.only("scoring_func", ("softmax",), "is not how this family's router scores")
    # Its code normalises where there is more than one gate.
    normalised = bool(settings.value("norm_topk_prob", False)) and settings.number("num_experts_per_tok") > 1
    return {
        **sizes(settings), **heads(settings), **rotary(settings),
        "attention.bias": "all" if settings.value("attention_bias", False) else "none",
        **_experts(settings, 0, 0, renormalize=normalised,
                   balance_weight=float(settings.value("aux_loss_alpha", 0.001)))}


def _v1_settings(config: Config, vocab_size: int) -> dict[str, Any]:
    return {**size_settings(config, vocab_size), **_expert_settings(config), "scoring_func": "softmax",
            "attention_bias": config.attention.bias == "all", "aux_loss_alpha": config.moe.balance_weight}


def _v1_rules(config: Config) -> list[Rule]:
    return [*frame_rules(config), *attention_rules(config), *_network_rules(config)]


def _network_rules(config: Config) -> list[Rule]:
    return [*dense_rules(config), *expert_rules(config, shared="shared_experts")]


DEEPSEEK_V1 = Family("DeepSeekMoE", ("deepseek",), ("DeepseekForCausalLM",), _v1_config, _v1_settings, _v1_rules)


# V2 and V3: latent attention.

def _latent(settings: Settings) -> Overrides:
    count, nope, rope = (settings.number("num_attention_heads"), settings.number("qk_nope_head_dim", 128),
                         settings.number("qk_rope_head_dim", 64))
    settings.get("num_key_value_heads"), settings.get("head_dim")  # as many as heads; the width of the rotary part
    return {
        "model.num_heads": count, "model.num_kv_heads": count, "model.head_dim": nope + rope, "attention.kind": "latent",
        "attention.bias": "all" if settings.value("attention_bias", False) else "none",
        "attention.query_rank": settings.get("q_lora_rank", 1536) or 0, "attention.rope_dim": rope,
        "attention.latent_rank": settings.number("kv_lora_rank", 512), "attention.value_dim": settings.number("v_head_dim", 128),
        "attention.rope_pairs": "interleaved" if settings.value("rope_interleave", True) else "half"}


def _groups(settings: Settings, groups: int | None, chosen: int | None, score: str) -> Overrides:
    """Routing limited to groups of experts; without effect, hence left out, if all of them may be chosen."""
    groups, chosen = settings.get("n_group", groups) or 1, settings.get("topk_group", chosen) or 1
    if chosen >= groups:
        return {}
    return {"moe.num_groups": groups, "moe.groups_per_token": chosen, "moe.group_score": score}


def _latent_settings(config: Config, vocab_size: int) -> dict[str, Any]:
    attention, moe = config.attention, config.moe
    settings = size_settings(config, vocab_size)
    del settings["head_dim"]
    return {**settings, **_expert_settings(config), "attention_bias": attention.bias == "all", "q_lora_rank": attention.query_rank or None,
            "kv_lora_rank": attention.latent_rank, "qk_rope_head_dim": attention.rope_dim,
            "qk_nope_head_dim": config.model.head_dim - attention.rope_dim, "v_head_dim": attention.value_dim,
            "rope_interleave": attention.rope_pairs == "interleaved", "routed_scaling_factor": moe.route_scale,
            "n_group": moe.num_groups if moe.groups_per_token else 1, "topk_group": moe.groups_per_token or 1}


def _latent_rules(config: Config) -> list[Rule]:
    layers, here, ours = all_layers(config), f"{LAYER}.self_attn", "{layer}/attention"
    if config.attention.query_rank:
        rules = [Rule(f"{here}.q_a_proj.weight", (f"{ours}/w_query_DR",), layers=layers),
                 Rule(f"{here}.q_a_layernorm.weight", (f"{ours}/query_norm/scale_R",), SAME, layers),
                 Rule(f"{here}.q_b_proj.weight", (f"{ours}/w_query_RHd",), layers=layers)]
    else:
        rules = [Rule(f"{here}.q_proj.weight", (f"{ours}/w_query_DHd",), layers=layers)]
    return [*frame_rules(config), *rules, *(_latent_bias_rules(config) if config.attention.bias == "all" else []),
            Rule(f"{here}.kv_a_proj_with_mqa.weight", (f"{ours}/w_latent_DR", f"{ours}/w_key_rope_Dd"), layers=layers),
            Rule(f"{here}.kv_a_layernorm.weight", (f"{ours}/latent_norm/scale_R",), SAME, layers),
            Rule(f"{here}.kv_b_proj.weight", (f"{ours}/w_key_RHd", f"{ours}/w_value_RHd"), PER_HEAD, layers),
            Rule(f"{here}.o_proj.weight", (f"{ours}/w_out_HdD",), Linear(inputs=2), layers),
            *_network_rules(config)]


def _latent_bias_rules(config: Config) -> list[Rule]:
    layers, here, ours = all_layers(config), f"{LAYER}.self_attn", "{layer}/attention"
    query = [Rule(f"{here}.q_a_proj.bias", (f"{ours}/b_query_R",), SAME, layers)] if config.attention.query_rank else []
    return [*query, Rule(f"{here}.kv_a_proj_with_mqa.bias", (f"{ours}/b_latent_R", f"{ours}/b_key_rope_d"), Halves(), layers),
            Rule(f"{here}.o_proj.bias", (f"{ours}/b_out_D",), SAME, layers)]


def _v2_config(settings: Settings) -> Overrides:
    settings.only("topk_method", ("greedy", "group_limited_greedy", None), "is not how this family chooses")
    settings.only("scoring_func", ("softmax",), "is not how this family's router scores")
    settings.only("rope_interleave", (True,), "is not how this family pairs dimensions")
    if settings.value("norm_topk_prob", False):
        log.warning("%s: norm_topk_prob=True is not acted on, as in transformers; DeepSeek's own code would renormalise the gates, "
                    "and then not scale them by routed_scaling_factor", settings.where)
    limited = settings.value("topk_method", "greedy") == "group_limited_greedy"
    settings.get("n_group"), settings.get("topk_group")
    return {
        **sizes(settings), **_latent(settings), **rotary(settings), **(_groups(settings, None, None, "max") if limited else {}),
        **_experts(settings, 0, 2, route_scale=float(settings.value("routed_scaling_factor", 1.0)),
                   balance_weight=float(settings.value("aux_loss_alpha", 0.0)))}


def _v2_settings(config: Config, vocab_size: int) -> dict[str, Any]:
    settings = _latent_settings(config, vocab_size)
    del settings["rope_interleave"]
    return {**settings, "topk_method": "group_limited_greedy" if config.moe.groups_per_token else "greedy",
            "scoring_func": "softmax"}


DEEPSEEK_V2 = Family("DeepSeek-V2", ("deepseek_v2",), ("DeepseekV2ForCausalLM",), _v2_config, _v2_settings, _latent_rules)


def _v3_config(settings: Settings) -> Overrides:
    settings.only("topk_method", ("noaux_tc", None), "is not how this family chooses")
    settings.only("scoring_func", ("sigmoid",), "is not how this family's router scores")
    settings.get("num_nextn_predict_layers")
    return {
        **sizes(settings), **_latent(settings), **rotary(settings), **_groups(settings, 8, 4, "top_2_sum"),
        **_experts(settings, 3, 1, route_scale=float(settings.value("routed_scaling_factor", 2.5)), score="sigmoid",
                   renormalize=bool(settings.value("norm_topk_prob", True)), balance_weight=0.0)}


def _v3_settings(config: Config, vocab_size: int) -> dict[str, Any]:
    return {**_latent_settings(config, vocab_size), "scoring_func": "sigmoid", "topk_method": "noaux_tc",
            "num_nextn_predict_layers": 0}


def _v3_rules(config: Config) -> list[Rule]:
    bias = Rule(f"{LAYER}.mlp.gate.e_score_correction_bias", (BIAS,), SAME, config.moe_layers, dtype="float32")
    return [*_latent_rules(config), bias]


def _further_tokens(config: Config) -> tuple[str, ...]:
    """Multi-token prediction, whose layers are counted on from the model's; transformers does not load them either."""
    return (rf"model\.layers\.(?!(?:{'|'.join(map(str, all_layers(config)))})\.)\d+\..*",)


DEEPSEEK_V3 = Family("DeepSeek-V3", ("deepseek_v3",), ("DeepseekV3ForCausalLM",), _v3_config, _v3_settings, _v3_rules,
                     ignored=_further_tokens)
