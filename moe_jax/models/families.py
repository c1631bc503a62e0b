"""The published mixture-of-experts systems: each is a row of settings, made of the same parts.

A family is data. Its row says what all of its models share (``common``), what its published sizes are (``presets``) and what
a small one looks like that trains on a laptop (``tiny``); a model is ``common`` with a preset over it. How a size was
trained – batch, optimizer, steps – is the business of ``configs/``, which start from these rows. Where
commands take a config, a size without a file there is named: ``--config=mixtral:8x22b``.

    from moe_jax import families
    families.config("mixtral", "8x7b")         # a Config
    families.settings("deepseek_v3", "671b")   # the same as nested dicts, to change and resolve

Dimensions are those of the papers and released checkpoints; where some are from memory, the preset says so.
"""

import copy
import dataclasses
import difflib
from typing import Any, Mapping

from moe_jax.config import Config, ConfigError, resolve
from moe_jax.models.presets import (
    DEEPSEEK_2, DEEPSEEK_3, DEEPSEEK_MOE, EXPERT_CHOICE, GLAM, GPT_OSS, GSHARD, LLAMA_4, MEGABLOCKS, MIXTRAL, NLLB, OLMOE,
    OPENMOE, QWEN_2, QWEN_3, SHAZEER, ST_MOE, SWITCH, Preset, Settings)


@dataclasses.dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
      title, paper: for people.
      needs: what it is made of beyond a router, experts and full attention.
      common: settings of all its models, by section.
      presets: its published sizes.
      tiny: settings over ``common`` of a small model with a vocabulary of bytes.
    """

    title: str
    paper: str
    needs: str
    common: Settings
    presets: Mapping[str, Preset]
    tiny: Settings


def merged(*layers: Settings) -> dict[str, dict[str, Any]]:
    """Nested settings, later ones over earlier ones; the arguments stay as they are."""
    result: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, values in copy.deepcopy(dict(layer)).items():
            result.setdefault(section, {}).update(values)
    return result


def settings(family: str, size: str = "tiny") -> dict[str, dict[str, Any]]:
    """The settings of one model by section, for :func:`moe_jax.config.resolve`; those not named are as in ``configs/base.py``.

    Raises:
      ConfigError: there is no such family, or it has no such size.
    """
    row = FAMILIES.get(family)
    if row is None:
        raise ConfigError(f"There is no family {family!r}{_near(family, FAMILIES)}; there are {', '.join(FAMILIES)}.")
    if size == "tiny":
        return merged(row.common, row.tiny)
    if size not in row.presets:
        raise ConfigError(f"{row.title} has no size {size!r}{_near(size, row.presets)}; it has "
                          f"{', '.join([*row.presets, 'tiny'])}.")
    return merged(row.common, row.presets[size].settings)


def filled_in(family: str, size: str) -> dict[str, dict[str, Any]]:
    """What a run or a plan of a published size needs and its row does not say: precision, recomputation, batch, optimizer. They
    are nobody's figures, only such as models of this kind are trained with; nothing for a tiny size. Raises: as
    :func:`settings`."""
    row = settings(family, size)
    if size == "tiny":
        return {}
    model = {"dtype": "bfloat16"}
    if row["model"].get("architecture") != "lstm":  # whose layers are kept as they are
        model["remat"] = "block"
    wanted = {"model": model, "data": {"sequence_length": 4096, "batch_size": 1024}, "optimizer": {"name": "adamw"}}
    return {section: {name: value for name, value in values.items() if name not in row.get(section, {})}
            for section, values in wanted.items()}


def run_settings(name: str) -> dict[str, dict[str, Any]]:
    """The settings of a run of ``'mixtral:8x7b'``, family and size, by section: :func:`settings` and :func:`filled_in`.

    Raises:
      ConfigError: as :func:`settings`.
    """
    family, _, size = name.partition(":")
    try:
        return merged(settings(family, size), filled_in(family, size))
    except ConfigError as error:
        raise ConfigError(f"--config={name}: {error} A model without a config file is named as family:size, e.g. "
                          f"mixtral:8x7b.") from None


def is_name(text: str) -> bool:
    """Whether it is written like ``'mixtral:8x7b'``, or is a family's name, and not like a file's."""
    return not text.endswith(".py") and (":" in text or text in FAMILIES)


def config(family: str, size: str = "tiny") -> Config:
    """The checked :class:`Config` of one model. Raises: as :func:`settings`."""
    return resolve(settings(family, size))


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


# What several rows say.

# A minute or two of training on a laptop.
_TRAINING: Settings = {
    "data": dict(sequence_length=128, batch_size=16), "optimizer": dict(warmup_steps=20),
    "training": dict(num_steps=200, eval_every=50, checkpoint_every=50, sample_length=64),
}
_NARROW: Settings = merged(_TRAINING, {
    "model": dict(num_layers=2, d_model=64, num_heads=4, num_kv_heads=4, head_dim=16, d_ff=128),
    "moe": dict(num_experts=8, d_ff=64),
})


def _tiny(**sections: Mapping[str, Any]) -> Settings:
    return merged(_NARROW, sections)


# T5 (Raffel et al. 2020): relative positions, no division by sqrt(d), rows of text with hidden spans.
_T5 = {"attention": dict(positions="relative"), "model": dict(scaled_attention=False, init_scale=0.1),
       "data": dict(objective="span_corruption", sequence_length=512, target_length=114)}


def _t5_tiny(**sections: Mapping[str, Any]) -> Settings:
    return merged(_tiny(model=dict(encoder_layers=2), data=dict(target_length=29)), sections)


# DeepSeek-V2 and V3, after their texts were made longer.
_LATENT = dict(kind="latent", rope_pairs="interleaved", rope_scaling="yarn", rope_factor=40.0, rope_original_length=4096)


FAMILIES: dict[str, Family] = {
    "shazeer": Family(
        "Shazeer 2017", "arXiv:1701.06538", "LSTMs; noisy top-k gating, flat and at two levels",
        {"model": dict(architecture="lstm", dropout=0.1, embedding_init=0.1),
         "moe": dict(router="noisy_top_k", gate_order="top_k_then_softmax", experts_per_token=4, every=2, first=0,
                     activation="relu", router_init=0.0, dispatch="dropless", balance_weight=0.0, router_z_weight=0.0,
                     importance_weight=0.1, load_weight=0.1, balance_scope="global"),
         "optimizer": dict(weight_decay=0.0), "training": dict(output_z_weight=0.0)},
        SHAZEER,
        merged(_TRAINING, {"model": dict(num_layers=2, d_model=64), "moe": dict(num_experts=16, d_ff=128)})),
    "gshard": Family(
        "GShard", "arXiv:2006.16668", "encoder–decoder; random second expert, capacity 2·T/E",
        {"model": dict(activation="relu"), "attention": dict(positions="sinusoidal"),
         "moe": dict(activation="relu", renormalize=True, second_policy="random", second_threshold=0.5, second_in_queue=True,
                     fill_order="choice_major", allow_noncausal_routing=True, capacity_factor=1.0, balance_loss="gshard",
                     router_z_weight=0.0),
         "data": dict(objective="span_corruption", sequence_length=512, target_length=114)},
        GSHARD, _t5_tiny()),
    "switch": Family(
        "Switch Transformer", "JMLR 23(120)", "T5's encoder–decoder; top-1, jitter, span corruption",
        merged(_T5, {"moe": dict(experts_per_token=1, fill_order="choice_major", router_jitter=0.01, router_z_weight=0.0)}),
        SWITCH, _t5_tiny(model=dict(activation="relu"), moe=dict(activation="relu"))),
    "glam": Family(
        "GLaM", "arXiv:2112.06905", "top-2 decoder; GEGLU in dense layers, plain experts",
        {"model": dict(activation="geglu", tie_embedding=True),
         "moe": dict(activation="gelu", renormalize=True, fill_order="choice_major", allow_noncausal_routing=True,
                     capacity_factor=2.0, capacity_counts="tokens", balance_loss="first_choice", balance_weight=0.01,
                     router_z_weight=0.0)},
        GLAM, _tiny()),
    "st_moe": Family(
        "ST-MoE", "arXiv:2202.08906", "T5's encoder–decoder; a dense FFN after the experts, router z loss",
        merged(_T5, {
            "model": dict(activation="geglu"),
            "moe": dict(activation="geglu", every=4, residual_ffn="sequential", renormalize=True, second_policy="random",
                        second_threshold=0.2, fill_order="choice_major", allow_noncausal_routing=True, eval_dispatch="gather",
                        capacity_counts="tokens", balance_loss="first_choice", router_z_weight=1e-3)}),
        ST_MOE, _t5_tiny(moe=dict(every=2))),
    "v_moe": Family(
        "V-MoE", "arXiv:2106.05974", "its routing, batch-prioritised, in an encoder of text; no images",
        merged(_T5, {"moe": dict(
            layers="none", router_noise=1.0, fill_order="batch_prioritized", capacity_factor=1.05, capacity_multiple=4,
            balance_weight=0.0, importance_weight=0.005, load_weight=0.005, activation="gelu", expert_bias=True)}),
        {}, _t5_tiny()),
    "expert_choice": Family(
        "Expert Choice", "arXiv:2202.09368",
        "experts choose their tokens: in an encoder, or in GLaM's decoder, where that looks ahead",
        {"model": dict(activation="geglu"),
         "moe": dict(router="expert_choice", activation="gelu", capacity_factor=2.0, capacity_counts="tokens",
                     balance_weight=0.0, router_z_weight=0.0)},
        EXPERT_CHOICE, merged(_T5, _t5_tiny(moe=dict(layers="none")))),
    "openmoe_paper": Family(
        "OpenMoE, as the paper", "arXiv:2402.01739", "a dense FFN beside the experts; three matrices, one table",
        {"model": dict(activation="swiglu", tie_embedding=True, scaled_attention=False, init_scale=0.1),
         "moe": dict(activation="swiglu", residual_ffn="parallel", fill_order="choice_major", allow_noncausal_routing=True,
                     eval_dispatch="gather", capacity_counts="tokens", balance_loss="st_moe"),
         "data": dict(sequence_length=2048), "training": dict(output_z_weight=1e-3)},
        OPENMOE["paper"], _tiny()),
    "openmoe_code": Family(
        "OpenMoE, as the code", "arXiv:2402.01739", "a dense FFN after the experts; four matrices, two tables, padding routed",
        {"model": dict(activation="swiglu_linear", scaled_attention=False, init_scale=0.1),
         "moe": dict(activation="swiglu_linear", residual_ffn="sequential", fill_order="choice_major",
                     allow_noncausal_routing=True, padding="routed", eval_dispatch="gather", capacity_counts="tokens",
                     balance_loss="st_moe"),
         "data": dict(sequence_length=2048)},
        OPENMOE["code"], _tiny()),
    "mixtral": Family(
        "Mixtral", "arXiv:2401.04088", "grouped-query attention; top-2 of eight in every layer",
        {"model": dict(activation="swiglu", rope_theta=1e6, norm_epsilon=1e-5),
         "moe": dict(every=1, activation="swiglu", gate_order="top_k_then_softmax", balance_loss="st_moe",
                     balance_weight=0.02, router_z_weight=0.0)},
        MIXTRAL, _tiny(model=dict(num_kv_heads=2))),
    "qwen2_moe": Family(
        "Qwen2-MoE", "arXiv:2407.10671", "biases of queries, keys and values; a shared expert with a gate",
        {"model": dict(rope_theta=1e6), "attention": dict(bias="qkv"),
         "moe": dict(every=1, num_shared_experts=1, shared_gate=True, balance_loss="st_moe", balance_weight=1e-3,
                     router_z_weight=0.0)},
        QWEN_2, _tiny(model=dict(num_kv_heads=2), moe=dict(experts_per_token=4, shared_d_ff=96))),
    "qwen3_moe": Family(
        "Qwen3-MoE", "arXiv:2505.09388", "norms of queries and keys, head by head; top-8 renormalised",
        {"model": dict(rope_theta=1e6), "attention": dict(qk_norm="head"),
         "moe": dict(every=1, experts_per_token=8, renormalize=True, balance_scope="global", balance_loss="st_moe",
                     balance_weight=1e-3, router_z_weight=0.0)},
        QWEN_3, _tiny(model=dict(num_kv_heads=2), moe=dict(num_experts=16, experts_per_token=4))),
    "deepseek_moe": Family(
        "DeepSeekMoE", "arXiv:2401.06066", "many narrow experts beside shared ones; the first layer dense",
        {"moe": dict(every=1, first_dense_layers=1, num_shared_experts=2, dispatch="dropless", balance_scope="sequence",
                     balance_weight=1e-3, router_z_weight=0.0)},
        DEEPSEEK_MOE, _tiny(model=dict(num_layers=3), moe=dict(num_experts=16, experts_per_token=4, d_ff=32))),
    "deepseek_v2": Family(
        "DeepSeek-V2", "arXiv:2405.04434", "latent attention, YaRN; device-limited routing and its three balances",
        {"attention": dict(_LATENT, rope_mscale=0.707, rope_mscale_all_dim=0.707),
         "moe": dict(every=1, first_dense_layers=1, num_shared_experts=2, balance_scope="sequence", router_z_weight=0.0)},
        {"236b": DEEPSEEK_2["236b"]},
        _tiny(model=dict(num_layers=3, head_dim=24), attention=dict(query_rank=32, latent_rank=32, rope_dim=8, value_dim=16),
              moe=dict(num_experts=16, experts_per_token=4, d_ff=32, num_groups=4, groups_per_token=3, route_scale=2.0,
                       device_weight=0.05, communication_weight=0.02, balance_weight=3e-3))),
    "deepseek_v2_lite": Family(
        "DeepSeek-V2-Lite", "arXiv:2405.04434", "latent attention with plain queries, YaRN",
        {"attention": dict(_LATENT, rope_mscale=0.707, rope_mscale_all_dim=0.707),
         "moe": dict(every=1, first_dense_layers=1, num_shared_experts=2, dispatch="dropless", balance_scope="sequence",
                     router_z_weight=0.0)},
        {"16b": DEEPSEEK_2["lite"]},
        _tiny(model=dict(num_layers=3, head_dim=24), attention=dict(latent_rank=32, rope_dim=8, value_dim=16),
              moe=dict(num_experts=16, experts_per_token=4, d_ff=32))),
    "deepseek_v3": Family(
        "DeepSeek-V3", "arXiv:2412.19437",
        "latent attention, YaRN; node-limited sigmoid routing, balanced by bias; a further token",
        {"model": dict(mtp_depth=1),
         "attention": dict(_LATENT, rope_mscale=1.0, rope_mscale_all_dim=1.0),
         "moe": dict(every=1, num_shared_experts=1, score="sigmoid", renormalize=True, route_scale=2.5,
                     group_score="top_2_sum", bias_update_rate=1e-3, balance_scope="sequence", balance_weight=1e-4,
                     router_z_weight=0.0)},
        DEEPSEEK_3,
        _tiny(model=dict(num_layers=3, head_dim=24), attention=dict(query_rank=32, latent_rank=32, rope_dim=8, value_dim=16),
              moe=dict(num_experts=16, experts_per_token=4, d_ff=32, num_groups=4, groups_per_token=2,
                       first_dense_layers=1))),
    "olmoe": Family(
        "OLMoE", "arXiv:2409.02060", "norms of queries and keys over all heads; top-8 of 64, nothing dropped",
        {"model": dict(norm_epsilon=1e-5), "attention": dict(qk_norm="all_heads"),
         "moe": dict(every=1, experts_per_token=8, dispatch="dropless", balance_weight=0.01, router_z_weight=1e-3)},
        OLMOE, _tiny(moe=dict(num_experts=16, experts_per_token=4, d_ff=32))),
    "llama4": Family(
        "Llama-4 (text)", "ai.meta.com/blog/llama-4-multimodal-intelligence",
        "chunked attention, layers without rotary positions and their temperature; gate on the input",
        {"model": dict(rope_theta=5e5, norm_epsilon=1e-5),
         "attention": dict(layers="chunked,chunked,chunked,full:nope", chunk=8192, rope_pairs="interleaved",
                           temperature_scale=0.1),
         "moe": dict(experts_per_token=1, num_shared_experts=1, score="sigmoid", gate_on="input", balance_weight=1e-3,
                     router_z_weight=0.0)},
        LLAMA_4,
        _tiny(model=dict(num_layers=4, num_kv_heads=2),
              attention=dict(chunk=32, qk_norm="unscaled", temperature_floor=32))),
    "gpt_oss": Family(
        "GPT-OSS", "arXiv:2508.10925", "sinks, alternating windows, biases everywhere, clamped SwiGLU, YaRN",
        {"model": dict(rope_theta=1.5e5, norm_epsilon=1e-5),
         "attention": dict(layers="sliding,full", window=128, sinks=True, bias="all", rope_scaling="yarn", rope_factor=32.0,
                           rope_original_length=4096, rope_truncate=False),
         "moe": dict(every=1, experts_per_token=4, gate_order="top_k_then_softmax", router_bias=True, expert_bias=True,
                     activation="swiglu_clamped", balance_loss="st_moe", balance_weight=1e-3, router_z_weight=0.0)},
        GPT_OSS, _tiny(model=dict(num_kv_heads=2), attention=dict(window=32))),
    "nllb_moe": Family(
        "NLLB-MoE", "arXiv:2207.04672", "encoder–decoder with biases and layer norms; gates shared among the choices kept",
        {"model": dict(norm="layer", norm_epsilon=1e-5, embedding_scale=True, mlp_bias=True, activation="relu",
                       tie_embedding=True, scaled_tied_logits=False, embedding_init=0.02),
         "attention": dict(positions="sinusoidal", first_position=2, bias="all"),
         "moe": dict(every=4, activation="relu", expert_bias=True, renormalize_after_drops=True, output_dropout=0.2,
                     fill_order="choice_major", allow_noncausal_routing=True, balance_loss="st_moe", balance_weight=1e-2,
                     router_z_weight=0.0),
         "data": dict(objective="span_corruption", sequence_length=512, target_length=114)},
        NLLB, _t5_tiny(moe=dict(every=2))),
    "dmoe": Family(
        "MegaBlocks dMoE", "arXiv:2211.15841", "nothing dropped: rows sorted by expert, products of unequal groups",
        {"model": dict(activation="gelu", norm="layer", norm_epsilon=1e-5, tie_embedding=True),
         "attention": dict(bias="all"),
         "moe": dict(every=1, experts_per_token=1, activation="gelu", expert_bias=True, dispatch="dropless",
                     balance_weight=0.01, router_z_weight=0.0)},
        MEGABLOCKS, _tiny()),
}
