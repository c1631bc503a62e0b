"""Encoder–decoders: Switch Transformers and NLLB-MoE."""

import dataclasses
from collections.abc import Collection
from typing import Any

from moe_jax.config import Config
from moe_jax.interop.common import Overrides
from moe_jax.interop.layouts import FLAT, SAME, Linear
from moe_jax.interop.pair_outputs import nllb_losses, switch_losses
from moe_jax.interop.settings import InteropError, Settings
from moe_jax.interop.table import Family, Rule

# Feed-forward networks without a gate, by torch's name of the activation.
_PLAIN = {"relu": "relu", "gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "silu": "silu", "swish": "silu"}
# Input tables of the two sides, which a file may hold beside the shared one.
_TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Rows for further training: what the families were trained on is not here. Span corruption is T5's; NLLB's tokenizer has no
# sentinels.
_SPANS = {"data.objective": "span_corruption", "data.sequence_length": 512, "data.target_length": 114}
_ENDS = {"data.objective": "prefix_lm", "data.sequence_length": 512, "data.target_length": 256}


def _activation(settings: Settings, name: str) -> Overrides:
    kind = settings.value(name, "relu")
    if kind not in _PLAIN:
        raise settings.refuse(name, f"is not known here; supported: {', '.join(_PLAIN)}.")
    return {"model.activation": _PLAIN[kind], "moe.activation": _PLAIN[kind]}


def _named(layers: list[int]) -> str:
    return ",".join(map(str, layers)) or "none"


def _mixtures(encoder: list[int], decoder: list[int], experts: int) -> Overrides:
    """Which layers of the two stacks are mixtures."""
    if not encoder and not decoder:
        return {"moe.num_experts": 0}
    return {"moe.num_experts": experts, "moe.encoder_layers": _named(encoder), "moe.layers": _named(decoder)}


def _router_dtype(settings: Settings) -> Overrides:
    settings.only("router_dtype", ("float32", "bfloat16"), "is no dtype of a router here")
    return {"moe.router_dtype": settings.value("router_dtype", "float32")}


def own_tables(names: Collection[str], settings: dict[str, Any]) -> tuple[Overrides, dict[str, str]]:
    """What the names of a file's tensors say of its input tables: the config's settings that follow, and tensors to be taken for
    others.

    A side without its own table has the shared one; if tables are tied, whatever the file holds of them is the same.
    """
    encoder, decoder = (name in names for name in _TABLES)
    if settings.get("tie_word_embeddings", True) or not (encoder or decoder):
        return {}, {}
    missing = [table for table, is_there in zip(_TABLES, (encoder, decoder)) if not is_there]
    return {"model.encoder_embedding": True}, {"shared.weight": table for table in missing}


def _ignored(config: Config) -> tuple[str, ...]:
    """The tables that are not used; positions that are computed; a bias of cross-attention that T5's codes write and do not read."""
    names = ("shared.weight",) if config.model.encoder_embedding else _TABLES
    return (*(name.replace(".", r"\.") for name in names), r"(encoder|decoder)\.embed_positions\.weights",
            r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")


def _frame_rules(config: Config, norms: dict[str, str]) -> list[Rule]:
    """Tables, and the norms behind the stacks; ``norms``: name of the checkpoint's -> ours."""
    if config.model.encoder_embedding:
        rules = [Rule(_TABLES[0], ("encoder/embedding/embedding_VD",), SAME), Rule(_TABLES[1], ("embedding/embedding_VD",), SAME)]
    else:
        rules = [Rule("shared.weight", ("embedding/embedding_VD",), SAME)]
    if not config.model.tie_embedding:
        rules.append(Rule("lm_head.weight", ("embedding/w_logits_DV",)))
    return rules + [rule for name, ours in norms.items() for rule in _norm_rules(config, name, ours)]


def _norm_rules(config: Config, key: str, ours: str, layers=None, stack: str = "decoder") -> list[Rule]:
    rules = [Rule(f"{key}.weight", (f"{ours}/scale_D",), SAME, layers, stack)]
    return rules if config.model.norm == "rms" else [*rules, Rule(f"{key}.bias", (f"{ours}/bias_D",), SAME, layers, stack)]


def _attention_rules(config: Config, key: str, ours: str, layers, stack: str, names: tuple[str, str, str, str]) -> list[Rule]:
    """``names``: of queries, keys, values and the output."""
    rules = [Rule(f"{key}.{name}.weight", (f"{ours}/w_{part}_DHd",), layers=layers, stack=stack)
             for name, part in zip(names, ("query", "key", "value"))]
    rules.append(Rule(f"{key}.{names[3]}.weight", (f"{ours}/w_out_HdD",), Linear(inputs=2), layers, stack))
    if config.attention.bias == "all":
        rules += [Rule(f"{key}.{name}.bias", (f"{ours}/b_{part}_Hd",), FLAT, layers, stack)
                  for name, part in zip(names, ("query", "key", "value"))]
        rules.append(Rule(f"{key}.{names[3]}.bias", (f"{ours}/b_out_D",), SAME, layers, stack))
    return rules


def _network_rules(key: str, ours: str, layers, stack: str, names: tuple[str, str], bias: bool, expert: str = "") -> list[Rule]:
    """Two matrices; ``expert`` is 'E' where ours are stacked over experts."""
    (first, second), (inside, width) = names, (f"{expert}DF", f"{expert}F")
    rules = [Rule(f"{key}.{first}.weight", (f"{ours}/w_in_{inside}",), layers=layers, stack=stack),
             Rule(f"{key}.{second}.weight", (f"{ours}/w_out_{expert}FD",), layers=layers, stack=stack)]
    if bias:
        rules += [Rule(f"{key}.{first}.bias", (f"{ours}/b_in_{width}",), SAME, layers, stack),
                  Rule(f"{key}.{second}.bias", (f"{ours}/b_out_{expert}D",), SAME, layers, stack)]
    return rules


def _ffn_rules(config: Config, key: str, stack: str, names: tuple[str, str]) -> list[Rule]:
    """Dense layers, and routers and experts of the others."""
    moe = config.encoder_moe_layers if stack == "encoder" else config.decoder_moe_layers
    total = config.model.encoder_layers if stack == "encoder" else config.model.num_layers
    dense = tuple(i for i in range(total) if i not in moe)
    rules = _network_rules(key, "{layer}/mlp", dense, stack, names, config.model.mlp_bias) if dense else []
    if not moe:
        return rules
    rules.append(Rule(f"{key}.router.classifier.weight", ("{layer}/moe/w_router_DE",), layers=moe, stack=stack))
    if config.moe.router_bias:
        rules.append(Rule(f"{key}.router.classifier.bias", ("{layer}/moe/b_router_E",), SAME, moe, stack))
    return rules + _network_rules(f"{key}.experts.expert_{{expert}}", "{layer}/moe/experts", moe, stack, names,
                                  config.moe.expert_bias, "E")


# Switch Transformers: T5 with mixtures.


def _switch_layers(settings: Settings, layers: int, sparse: str) -> list[int]:
    """transformers: every ``layers // sparse``-th from the second on; asked for none it makes a step of all layers, asked for
    more than there are, none."""
    return _sparse_layers(layers, settings.value(sparse, 3))


def _sparse_layers(layers: int, count: int) -> list[int]:
    step = layers // count if count > 0 else layers
    return [i for i in range(layers) if step and (i % step == 1 or step == 1)]


def _switch_config(settings: Settings) -> Overrides:
    encoder = settings.number("num_layers", 12)
    decoder = settings.number("num_decoder_layers", encoder if "num_decoder_layers" in settings.values else 12)
    settings.only("is_gated_act", (False, None), "gives the feed-forward layers a gate, which transformers' Switch does not have")
    # Derived from others, or never read.
    for name in ("encoder_sparse_step", "decoder_sparse_step", "feed_forward_proj", "router_type", "add_router_probs",
                 "router_ignore_padding_tokens"):
        settings.get(name)
    tied = bool(settings.value("tie_word_embeddings", True))
    experts, heads, width = settings.number("num_experts", 8), settings.number("num_heads", 12), settings.number("d_ff", 2048)
    mixtures = _mixtures(_switch_layers(settings, encoder, "num_sparse_encoder_layers"),
                         _switch_layers(settings, decoder, "num_sparse_decoder_layers"), experts)
    routing = {
        "moe.experts_per_token": 1, "moe.expert_capacity": settings.number("expert_capacity", 64), "moe.dispatch": "gather",
        "moe.eval_dispatch": "gather", "moe.padding": "as_text", "moe.d_ff": width,
        "moe.router_bias": bool(settings.value("router_bias", False)),
        "moe.router_jitter": float(settings.value("router_jitter_noise", 0.01)),
        "moe.router_z_weight": float(settings.value("router_z_loss_coef", 0.001)),
        "moe.balance_weight": float(settings.value("router_aux_loss_coef", 0.001)), **_router_dtype(settings)}
    return {
        "model.encoder_layers": encoder, "model.num_layers": decoder, "model.d_model": settings.number("d_model", 768),
        "model.num_heads": heads, "model.num_kv_heads": heads, "model.head_dim": settings.number("d_kv", 64), "model.d_ff": width,
        "model.scaled_attention": False, "model.norm_epsilon": float(settings.value("layer_norm_epsilon", 1e-6)),
        "model.vocab_size": settings.number("vocab_size"), "model.tie_embedding": tied, **_activation(settings, "dense_act_fn"),
        "attention.positions": "relative",
        "attention.relative_buckets": settings.number("relative_attention_num_buckets", 32),
        "attention.relative_distance": settings.number("relative_attention_max_distance", 128),
        **mixtures, **(routing if mixtures["moe.num_experts"] else {}), **_SPANS}


def _sparse_count(layers: tuple[int, ...], total: int) -> int:
    """The number that :func:`_switch_layers` makes these layers of; more than there are for none.

    Raises:
      InteropError: there is no such number.
    """
    for count in (len(layers), *range(1, total + 2), 0):
        if _sparse_layers(total, count) == list(layers):
            return count
    raise InteropError(f"Switch Transformers has every so many layers as mixtures, from the second on; layers "
                       f"{', '.join(map(str, layers))} of {total} (moe.layers, moe.encoder_layers) are not of that kind.")


def _switch_settings(config: Config, vocab_size: int) -> dict[str, Any]:
    model, moe, attention = config.model, config.moe, config.attention
    return {
        "vocab_size": vocab_size, "d_model": model.d_model, "d_kv": model.head_dim, "d_ff": model.d_ff,
        "num_layers": model.encoder_layers, "num_decoder_layers": model.num_layers, "num_heads": model.num_heads,
        "num_sparse_encoder_layers": _sparse_count(config.encoder_moe_layers, model.encoder_layers),
        "num_sparse_decoder_layers": _sparse_count(config.decoder_moe_layers, model.num_layers),
        "num_experts": max(moe.num_experts, 1), "expert_capacity": moe.expert_capacity or 64, "router_bias": moe.router_bias,
        "router_jitter_noise": moe.router_jitter, "router_dtype": moe.router_dtype, "router_z_loss_coef": moe.router_z_weight,
        "router_aux_loss_coef": moe.balance_weight, "router_ignore_padding_tokens": False,
        "relative_attention_num_buckets": attention.relative_buckets,
        "relative_attention_max_distance": attention.relative_distance, "layer_norm_epsilon": model.norm_epsilon,
        "dense_act_fn": _torch_name(model.activation), "tie_word_embeddings": model.tie_embedding, "is_encoder_decoder": True,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "dropout_rate": 0.0}


def _torch_name(activation: str) -> str:
    return next(name for name, ours in _PLAIN.items() if ours == activation)


def _switch_rules(config: Config) -> list[Rule]:
    rules = _frame_rules(config, {"encoder.final_layer_norm": "encoder/final_norm", "decoder.final_layer_norm": "final_norm"})
    names = ("q", "k", "v", "o")
    for stack, prefix, total in (("encoder", "encoder/", config.model.encoder_layers), ("decoder", "", config.model.num_layers)):
        layers, block, last = tuple(range(total)), f"{stack}.block.{{layer}}.layer", 1 if stack == "encoder" else 2
        rules.append(Rule(f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                          (f"{prefix}relative_bias_XH",), SAME))
        rules += _norm_rules(config, f"{block}.0.layer_norm", "{layer}/attention_norm", layers, stack)
        rules += _attention_rules(config, f"{block}.0.SelfAttention", "{layer}/attention", layers, stack, names)
        if stack == "decoder":
            rules += _norm_rules(config, f"{block}.1.layer_norm", "{layer}/cross_norm", layers)
            rules += _attention_rules(config, f"{block}.1.EncDecAttention", "{layer}/cross_attention", layers, stack, names)
        rules += _norm_rules(config, f"{block}.{last}.layer_norm", "{layer}/ffn_norm", layers, stack)
        rules += _ffn_rules(config, f"{block}.{last}.mlp", stack, ("wi", "wo"))
    return rules


# NLLB-MoE: M2M-100 with mixtures of GShard's kind.


def _nllb_config(settings: Settings) -> Overrides:
    for encoder, decoder in (("encoder_ffn_dim", "decoder_ffn_dim"), ("encoder_attention_heads", "decoder_attention_heads")):
        settings.only(decoder, (settings.value(encoder, settings.get(decoder)),), f"is not {encoder}: the two stacks have layers of "
                      f"one shape here")
    settings.only("second_expert_policy", ("all", "random"), "draws second experts in evaluation too")
    encoder, decoder = settings.number("encoder_layers", 12), settings.number("decoder_layers", 12)
    experts, heads = settings.number("num_experts", 128), settings.number("encoder_attention_heads", 16)
    width, d_model = settings.number("encoder_ffn_dim", 4096), settings.number("d_model", 1024)
    tied = bool(settings.value("tie_word_embeddings", True))
    sparse = [_every(settings.get(name, 4), layers) for name, layers in (("encoder_sparse_step", encoder),
                                                                         ("decoder_sparse_step", decoder))]
    mixtures = _mixtures(*sparse, experts)
    has_dense = len(sparse[0]) + len(sparse[1]) < encoder + decoder
    return {
        "model.encoder_layers": encoder, "model.num_layers": decoder, "model.d_model": d_model, "model.num_heads": heads,
        "model.num_kv_heads": heads, "model.head_dim": d_model // heads, "model.d_ff": width, "model.norm": "layer",
        "model.norm_epsilon": 1e-5, "model.mlp_bias": has_dense, "model.vocab_size": settings.number("vocab_size"),
        "model.tie_embedding": tied, **({"model.scaled_tied_logits": False} if tied else {}),
        "model.embedding_scale": bool(settings.value("scale_embedding", True)), **_activation(settings, "activation_function"),
        "attention.bias": "all", "attention.positions": "sinusoidal", "attention.first_position": settings.value("pad_token_id", 1) + 1,
        **mixtures, **(_nllb_routing(settings, width, experts) if mixtures["moe.num_experts"] else {}), **_ENDS}


def _every(step: int | None, layers: int) -> list[int]:
    return [i for i in range(layers) if step and (i + 1) % step == 0]


def _nllb_routing(settings: Settings, width: int, experts: int) -> Overrides:
    before = bool(settings.value("normalize_router_prob_before_dropping", False))
    prioritized = bool(settings.value("batch_prioritized_routing", False))
    fraction, capacity = float(settings.value("moe_eval_capacity_token_fraction", 1.0)), settings.value("expert_capacity", 64)
    settings.get("router_z_loss_coef")  # never used
    slots: Overrides = {"moe.expert_capacity": capacity}
    if fraction > 0:  # training: 2 · ceil(T / E), fairseq's
        slots = {"moe.capacity_counts": "group", "moe.eval_capacity_factor": fraction, "moe.capacity_factor": 2.0 / experts,
                 "moe.min_capacity": 1}
    random = {"moe.second_policy": "random", "moe.second_threshold": 0.5}
    return {
        "moe.experts_per_token": 2, "moe.d_ff": width, "moe.expert_bias": True, "moe.renormalize": before,
        "moe.renormalize_after_drops": not before, "moe.group_over": "all", **slots,
        "moe.fill_order": "batch_prioritized" if prioritized else "choice_major", "moe.allow_noncausal_routing": True,
        "moe.dispatch": "gather", "moe.eval_dispatch": "gather",
        # As that setting acts, whatever it is called.
        "moe.padding": "as_text" if settings.value("router_ignore_padding_tokens", False) else "nowhere",
        "moe.output_dropout": float(settings.value("moe_token_dropout", 0.2)),
        "moe.router_bias": bool(settings.value("router_bias", False)), "moe.router_z_weight": 0.0, "moe.balance_loss": "st_moe",
        "moe.balance_weight": float(settings.value("router_aux_loss_coef", 0.001)), **_router_dtype(settings),
        **(random if settings.value("second_expert_policy", "all") == "random" else {})}


def _nllb_settings(config: Config, vocab_size: int) -> dict[str, Any]:
    model, moe, steps = config.model, config.moe, {}
    for stack, layers, total in (("encoder", config.encoder_moe_layers, model.encoder_layers),
                                 ("decoder", config.decoder_moe_layers, model.num_layers)):
        steps[f"{stack}_sparse_step"] = step = layers[0] + 1 if layers else 0
        if _every(step, total) != list(layers):
            raise InteropError(f"NLLB-MoE has every so many layers as mixtures, the last of each so many; layers "
                               f"{', '.join(map(str, layers))} of the {stack}'s {total} are not of that kind.")
    both = {name: value for stack in ("encoder", "decoder")
            for name, value in ((f"{stack}_ffn_dim", model.d_ff), (f"{stack}_attention_heads", model.num_heads))}
    return {
        "vocab_size": vocab_size, "d_model": model.d_model, "encoder_layers": model.encoder_layers,
        "decoder_layers": model.num_layers, **both, **steps, "activation_function": _torch_name(model.activation),
        "scale_embedding": model.embedding_scale, "tie_word_embeddings": model.tie_embedding,
        "max_position_embeddings": 1024, "num_experts": max(moe.num_experts, 1), "expert_capacity": moe.expert_capacity or 64,
        "moe_eval_capacity_token_fraction": 0.0 if moe.expert_capacity else moe.eval_capacity_factor,
        "normalize_router_prob_before_dropping": moe.renormalize,
        "batch_prioritized_routing": moe.fill_order == "batch_prioritized", "moe_token_dropout": moe.output_dropout,
        "router_bias": moe.router_bias, "router_dtype": moe.router_dtype, "router_aux_loss_coef": moe.balance_weight,
        "router_ignore_padding_tokens": moe.padding == "as_text",
        "second_expert_policy": "random" if moe.second_policy == "random" else "all", "is_encoder_decoder": True,
        "pad_token_id": config.attention.first_position - 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}


def _nllb_rules(config: Config) -> list[Rule]:
    rules = _frame_rules(config, {"encoder.layer_norm": "encoder/final_norm", "decoder.layer_norm": "final_norm"})
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    for stack, total in (("encoder", config.model.encoder_layers), ("decoder", config.model.num_layers)):
        layers, here = tuple(range(total)), f"{stack}.layers.{{layer}}"
        rules += _norm_rules(config, f"{here}.self_attn_layer_norm", "{layer}/attention_norm", layers, stack)
        rules += _attention_rules(config, f"{here}.self_attn", "{layer}/attention", layers, stack, names)
        if stack == "decoder":
            rules += _norm_rules(config, f"{here}.cross_attention_layer_norm", "{layer}/cross_norm", layers)
            rules += _attention_rules(config, f"{here}.cross_attention", "{layer}/cross_attention", layers, stack, names)
        rules += _norm_rules(config, f"{here}.ff_layer_norm", "{layer}/ffn_norm", layers, stack)
        rules += _ffn_rules(config, f"{here}.ffn", stack, ("fc1", "fc2"))
    return [_in_model(rule) for rule in rules]


def _in_model(rule: Rule) -> Rule:
    """All but the head lie below ``model.``."""
    return rule if rule.key.startswith("lm_head") else dataclasses.replace(rule, key=f"model.{rule.key}")


def _nllb_tables(names: Collection[str], settings: dict[str, Any]) -> tuple[Overrides, dict[str, str]]:
    overrides, renamed = own_tables({name.removeprefix("model.") for name in names}, settings)
    return overrides, {f"model.{old}": f"model.{new}" for old, new in renamed.items()}


SWITCH = Family("Switch Transformers", ("switch_transformers",), ("SwitchTransformersForConditionalGeneration",), _switch_config,
                _switch_settings, _switch_rules, _ignored, pair_losses=switch_losses, tables=own_tables)
NLLB_MOE = Family("NLLB-MoE", ("nllb-moe",), ("NllbMoeForConditionalGeneration",), _nllb_config, _nllb_settings, _nllb_rules,
                  lambda config: tuple(rf"model\.{name}" for name in _ignored(config)), pair_losses=nllb_losses, tables=_nllb_tables)
