"""Configs: what cannot work is refused at the start, in one line that names key, value and the nearest legal values."""

import ast
import dataclasses
import re
import tokenize
from pathlib import Path

import pytest

from configs.base import get_config
from moe_jax.config import (
    SECTIONS,
    Config,
    ConfigError,
    DataConfig,
    LayerAttention,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainingConfig,
    differences,
    known_keys,
    load_config,
    nearest_divisors,
    nearest_multiples,
    resolve,
    with_defaults,
)
from moe_jax.sharding import resolve_mesh
from moe_jax.training.step import check_trainable

BASE = Path(__file__).parents[1] / "configs" / "base.py"

# What expert choice needs; the defaults are those of top_k.
EXPERT_CHOICE = dict(router="expert_choice", balance_weight=0.0, allow_noncausal_routing=True)


def refusal(config):
    """The message with which ``config`` is refused: one line."""
    with pytest.raises(ConfigError) as error:
        resolve(config)
    message = str(error.value)
    assert "\n" not in message
    return message


# Keys and types


@pytest.mark.parametrize("config, words", [
    ({"moe": {"num_expert": 4}}, ["moe.num_expert:", "Did you mean moe.num_experts"]),
    ({"modle": {}}, ["modle:", "Did you mean model or"]),
    ({"num_experts": 4}, ["num_experts:", "Did you mean moe.num_experts"]),  # right name, no section
    ({"model": {"num_experts": 4}}, ["model.num_experts:", "Did you mean moe.num_experts"]),  # wrong section
    ({"zzz": {}}, ["zzz:", "Sections are model, attention, moe, data, mesh, optimizer, training"]),
    ({"moe": 8}, ["moe=8", "is a section", "moe.num_experts"]),
])
def test_an_unknown_key_is_refused_with_the_nearest_name(config, words):
    message = refusal(config)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("section, key, value, wanted, given", [
    ("moe", "num_experts", True, "int", "bool"),
    ("moe", "num_experts", "8", "int", "str"),
    ("moe", "num_experts", 8.0, "int", "float"),
    ("moe", "num_experts", None, "int", "NoneType"),
    ("moe", "capacity_factor", "1.25", "float", "str"),
    ("moe", "capacity_factor", True, "float", "bool"),
    ("model", "scan_layers", 1, "bool", "int"),
    ("data", "source", 1, "str", "int"),
])
def test_a_wrong_type_is_refused_with_both_types(section, key, value, wanted, given):
    assert refusal({section: {key: value}}) == f"{section}.{key}={value!r}: must be of type {wanted}, not {given}."


def test_an_int_is_a_float_without_loss():
    factor = resolve({"moe": {"capacity_factor": 2}}).moe.capacity_factor
    assert factor == 2.0 and type(factor) is float


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_float_must_be_finite(value):
    assert "must be a finite number" in refusal({"optimizer": {"learning_rate": value}})


@pytest.mark.parametrize("section, key, allowed", [
    ("model", "activation", "swiglu geglu reglu silu gelu relu"),
    ("model", "dtype", "float32 bfloat16"),
    ("model", "remat", "none block dots"),
    ("moe", "activation", "swiglu geglu reglu silu gelu relu"),
    ("moe", "router", "top_k expert_choice hash balanced all sinkhorn s_base base reinforce replay"),
    ("moe", "gate_order", "softmax_then_top_k top_k_then_softmax"),
    ("moe", "fill_order", "token_major choice_major batch_prioritized"),
    ("moe", "dispatch", "reference einsum gather dropless"),
    ("moe", "eval_dispatch", "reference einsum gather dropless"),
    ("moe", "capacity_counts", "choices tokens"),
    ("moe", "group_over", "sequence batch"),
    ("moe", "balance_loss", "switch first_choice gshard st_moe"),
    ("moe", "balance_scope", "group microbatch global"),
    ("optimizer", "name", "adamw adafactor sgd"),
    ("optimizer", "schedule", "constant cosine rsqrt wsd"),
    ("training", "nonfinite", "stop skip"),
])
def test_a_word_that_is_no_choice_is_refused_with_the_choices(section, key, allowed):
    first = allowed.split()[0]
    message = refusal({section: {key: first + "x"}})
    assert message.startswith(f"{section}.{key}='{first}x': allowed are")
    assert all(repr(word) in message for word in allowed.split()), message
    assert f"Did you mean {first!r}?" in message


@pytest.mark.parametrize("section, key, value", [
    ("model", "num_layers", 0), ("model", "d_model", 0), ("model", "vocab_size", -1), ("model", "rope_theta", 0.0),
    ("model", "norm_epsilon", 0.0), ("moe", "num_experts", -1), ("moe", "experts_per_token", 0), ("moe", "every", 0),
    ("moe", "first", -2), ("moe", "capacity_factor", 0.0), ("moe", "eval_capacity_factor", -1.0),
    ("moe", "router_jitter", 1.0), ("moe", "router_jitter", -0.1), ("moe", "balance_weight", -0.01),
    ("moe", "min_capacity", 0), ("data", "batch_size", 0), ("data", "sequence_length", 1),
    ("data", "validation_fraction", 0.0), ("data", "validation_fraction", 1.0), ("mesh", "tensor", 0),
    ("mesh", "data", -1), ("optimizer", "learning_rate", 0.0), ("optimizer", "beta1", 1.5),
    ("optimizer", "clip_norm", -1.0), ("training", "num_steps", 0), ("training", "microbatches", 0),
    ("training", "label_smoothing", 1.0), ("training", "ema_decay", 1.0),
])
def test_a_number_out_of_range_is_refused_by_key_and_value(section, key, value):
    assert refusal({section: {key: value}}).startswith(f"{section}.{key}={value!r}: must ")


def test_num_kv_heads_must_divide_num_heads():
    # 12 heads: the divisors around 5 are 4 and 6.
    message = refusal({"model": {"num_heads": 12, "num_kv_heads": 5}})
    assert message.startswith("model.num_kv_heads=5") and "nearest legal values: 4, 6" in message


def test_head_dim_must_be_even():
    message = refusal({"model": {"head_dim": 7}})
    assert message.startswith("model.head_dim=7") and "6, 8" in message


# Combinations that cannot work


def moe(**options):
    return {"moe": options}


@pytest.mark.parametrize("options, words", [
    (dict(experts_per_token=1, renormalize=True), ["moe.experts_per_token=1", "no gradient", "moe.renormalize=False"]),
    (dict(experts_per_token=1, gate_order="top_k_then_softmax"),
     ["moe.experts_per_token=1", "no gradient", "softmax_then_top_k"]),
])
def test_b23_one_expert_per_token_refuses_normalised_gates(options, words):
    message = refusal(moe(**options))
    assert all(word in message for word in words), message
    resolve(moe(**{**options, "experts_per_token": 2}))
    imported = resolve(moe(**options, allow_untrained_router=True))
    with pytest.raises(ConfigError, match="moe.allow_untrained_router=True: with one expert .* To train it, let gates be scores"):
        check_trainable(imported)
    for other in (dict(options, experts_per_token=2), dict(experts_per_token=1), dict(EXPERT_CHOICE)):
        assert refusal(moe(**other, allow_untrained_router=True)).startswith("moe.allow_untrained_router=True: ")


def test_renormalize_is_refused_where_it_has_no_effect():
    assert "moe.renormalize=True: has no effect" in refusal(moe(renormalize=True, gate_order="top_k_then_softmax"))
    resolve(moe(renormalize=True))


def test_a_token_cannot_choose_more_experts_than_there_are():
    assert "moe.experts_per_token=5" in refusal(moe(num_experts=4, experts_per_token=5))
    resolve(moe(num_experts=4, experts_per_token=4))


@pytest.mark.parametrize("key, value, wanted", [
    ("balance_weight", 0.01, 0.0), ("renormalize", True, False),
    ("gate_order", "top_k_then_softmax", "softmax_then_top_k"), ("bias_update_rate", 0.1, 0.0),
])
def test_expert_choice_refuses_options_without_a_meaning(key, value, wanted):
    message = refusal(moe(**{**EXPERT_CHOICE, key: value}))
    assert message.startswith(f"moe.{key}={value!r}") and message.endswith(f"set it to {wanted!r}.")
    resolve(moe(**EXPERT_CHOICE))


BUFFERS, NO_BUFFERS = dict(dispatch="gather", eval_dispatch="dropless"), dict(dispatch="dropless", eval_dispatch="dropless")


@pytest.mark.parametrize("options, causal", [
    (dict(fill_order="token_major", **BUFFERS), True),
    (dict(fill_order="choice_major", **BUFFERS), False),
    (dict(fill_order="choice_major", dispatch="dropless", eval_dispatch="einsum"), False),  # in evaluation it would
    (dict(fill_order="choice_major", experts_per_token=1, **BUFFERS), True),
    (dict(fill_order="choice_major", **NO_BUFFERS), True),  # nobody is dropped, so nobody waits
    (dict(fill_order="choice_major", dispatch="dropless", eval_dispatch="reference"), True),
    (dict(fill_order="batch_prioritized", **BUFFERS), False),
    (dict(fill_order="batch_prioritized", experts_per_token=1, **BUFFERS), False),
    (dict(fill_order="batch_prioritized", **NO_BUFFERS), True),
    (dict(fill_order="batch_prioritized", group_over="batch", **BUFFERS), True),
    (dict(router="expert_choice", balance_weight=0.0), False),
    (dict(router="expert_choice", balance_weight=0.0, **NO_BUFFERS), False),
    (dict(router="expert_choice", balance_weight=0.0, group_over="batch"), True),
])
def test_b52_b53_a_router_that_sees_later_tokens_is_refused_unless_allowed(options, causal):
    resolve(moe(**options, allow_noncausal_routing=True))
    if causal:
        resolve(moe(**options))
    else:
        message = refusal(moe(**options))
        assert "depend on later tokens" in message and "moe.allow_noncausal_routing=True" in message
        # The message names a cure, and it helps.
        key, value = re.search(r"Use moe\.(\w+)='(\w+)'", message).groups()
        resolve(moe(**{**options, key: value}))


# Which layers


@pytest.mark.parametrize("layers, every, first, expected", [
    (4, 2, -1, (1, 3)),
    (4, 2, 0, (0, 2)),
    (6, 3, -1, (2, 5)),
    (6, 3, 1, (1, 4)),
    (5, 3, -1, (2,)),  # the incomplete last period has none
    (5, 3, 1, (1, 4)),
    (3, 1, -1, (0, 1, 2)),
    (4, 4, -1, (3,)),
])
def test_moe_layers_follow_every_and_first(layers, every, first, expected):
    assert Config(ModelConfig(num_layers=layers), MoEConfig(every=every, first=first)).moe_layers == expected


@pytest.mark.parametrize("layers, every, first, leading, expected", [
    (5, 1, -1, 1, (1, 2, 3, 4)),  # DeepSeekMoE-16B
    (5, 1, -1, 3, (3, 4)),  # DeepSeek-V3
    (6, 2, 0, 2, (2, 4)),  # the period is counted from the first layer all the same
    (6, 2, -1, 2, (3, 5)),
    (6, 2, -1, 5, (5,)),
])
def test_the_first_dense_layers_are_dense(layers, every, first, leading, expected):
    moe = MoEConfig(every=every, first=first, first_dense_layers=leading)
    assert Config(ModelConfig(num_layers=layers), moe).moe_layers == expected


@pytest.mark.parametrize("layers, every, leading, words", [
    (4, 2, 1, "first_dense_layers=1: has no effect: .*the first 1 layers are dense anyway; set it to 0, or to more than 1"),
    (4, 1, 4, "first_dense_layers=4: leaves no MoE layer among model.num_layers=4; set it to at most 3"),
    (5, 2, 4, "first_dense_layers=4: leaves no MoE layer among model.num_layers=5; set it to at most 3"),
    (4, 1, -1, "first_dense_layers=-1: must be at least 0"),
])
def test_first_dense_layers_that_change_nothing_or_everything_are_refused(layers, every, leading, words):
    with pytest.raises(ConfigError, match=words):
        Config(ModelConfig(num_layers=layers), MoEConfig(every=every, first_dense_layers=leading))


@pytest.mark.parametrize("text, expected", [("1,3", (1, 3)), ("4", (4,)), ("3, 0,1", (0, 1, 3)), ("0,1,2,3,4", (0, 1, 2, 3, 4))])
def test_moe_layers_can_be_named_one_by_one(text, expected):
    assert Config(ModelConfig(num_layers=5), MoEConfig(layers=text)).moe_layers == expected


@pytest.mark.parametrize("options, words", [
    (dict(layers="1,5"), "moe.layers='1,5': names layer 5, but model.num_layers=5; the last is 4"),
    (dict(layers="1,1"), "moe.layers='1,1': wanted are the indices of different layers"),
    (dict(layers="1;2"), "moe.layers='1;2': wanted are the indices of different layers"),
    (dict(layers="-1"), "moe.layers='-1': wanted are the indices of different layers"),
    (dict(layers="1,3", every=1), "moe.every=1: has no effect beside moe.layers='1,3'.* set it to 2, or moe.layers=''"),
    (dict(layers="1,3", first=0), "moe.first=0: has no effect beside moe.layers='1,3'"),
    (dict(encoder_layers="1"), "moe.encoder_layers='1': names layers of an encoder, but model.encoder_layers=0"),
    (dict(layers="1,3", first_dense_layers=2), "moe.first_dense_layers=2: has no effect beside moe.layers='1,3'"),
])
def test_lists_of_moe_layers_that_cannot_be_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Config(ModelConfig(num_layers=5), MoEConfig(**options))


def test_the_encoders_moe_layers_follow_the_same_rule_or_are_named():
    model, data = ModelConfig(num_layers=6, encoder_layers=4), DataConfig(objective="span_corruption", target_length=64)
    by_rule = Config(model, MoEConfig(every=2, first=1), data)
    assert by_rule.decoder_moe_layers == (1, 3, 5) and by_rule.encoder_moe_layers == (1, 3)
    assert by_rule.moe_layers == (1, 3, 5, 7, 9)  # the encoder's four layers are counted first
    assert Config(model, MoEConfig(encoder_layers="0,2"), data).encoder_moe_layers == (0, 2)
    assert Config(ModelConfig(num_layers=6)).encoder_moe_layers == ()
    encoder = Config(model, MoEConfig(layers="none", fill_order="batch_prioritized"), data)
    assert encoder.decoder_moe_layers == () and encoder.encoder_moe_layers == (1, 3)  # which may look ahead
    assert Config(model, MoEConfig(encoder_layers="none"), data).encoder_moe_layers == ()
    mixed = Config(model, MoEConfig(layers="0", every=4), data)
    assert mixed.moe_layers == (3, 4)  # the rule is the encoder's, the list the decoder's
    with pytest.raises(ConfigError, match="moe.every=4: has no effect beside moe.layers='0'"):
        Config(model, MoEConfig(layers="0", encoder_layers="1", every=4), data)
    for moe in (MoEConfig(layers="none", encoder_layers="none"), MoEConfig(layers="none", encoder_layers="4")):
        with pytest.raises(ConfigError, match="moe.layers='none': leaves no MoE layer|moe.encoder_layers='4': names layer 4"):
            Config(model, moe, data)
    with pytest.raises(ConfigError, match="moe.encoder_layers='0,4': names layer 4, but model.encoder_layers=4; the last is 3"):
        Config(model, MoEConfig(encoder_layers="0,4"), data)


def test_a_dense_model_has_no_moe_layers_and_ignores_the_other_moe_settings():
    config = resolve(moe(num_experts=0, experts_per_token=99, router="top_k"))
    assert config.moe_layers == () and config.moe.is_dense


def test_a_model_whose_pattern_gives_no_moe_layer_is_refused():
    message = refusal({"model": {"num_layers": 3}, "moe": {"every": 4}})
    assert message.startswith("moe.every=4") and "at most 3" in message
    resolve({"model": {"num_layers": 4}, "moe": {"every": 4}})


def test_first_must_lie_in_the_period():
    message = refusal(moe(every=2, first=2))
    assert message.startswith("moe.first=2") and "to 1" in message


# Batches, microbatches, groups


def test_microbatches_must_divide_the_batch():
    # 16 sequences: the divisors around 5 are 4 and 8.
    message = refusal({"data": {"batch_size": 16}, "training": {"microbatches": 5}})
    assert message.startswith("training.microbatches=5") and "data.batch_size=16" in message and "4, 8" in message


@pytest.mark.parametrize("size, legal", [(3, "2, 4"), (12, "8, 16"), (5, "4, 8")])
def test_a_group_is_a_part_of_a_sequence_or_several(size, legal):
    message = refusal({"data": {"sequence_length": 8}, "moe": {"group_size": size}})
    assert message.startswith(f"moe.group_size={size}") and f"nearest legal values: {legal}." in message


@pytest.mark.parametrize("size, sequences", [(0, 1), (4, 1), (8, 1), (16, 2), (64, 8)])
def test_sequences_per_group(size, sequences):
    config = resolve({"data": {"sequence_length": 8, "batch_size": 8}, "moe": {"group_size": size}})
    assert config.sequences_per_group == sequences


def test_a_group_cannot_span_two_microbatches():
    # Groups of 32 tokens are 4 sequences of 8; 8 sequences in 4 microbatches are 2 each.
    config = {"data": {"sequence_length": 8, "batch_size": 8}, "moe": {"group_size": 32},
              "training": {"microbatches": 4}}
    message = refusal(config)
    assert "moe.group_size=32" in message and "4 sequences" in message and "2 sequences of a microbatch" in message
    config["training"]["microbatches"] = 2
    resolve(config)


def test_groups_over_the_batch_are_as_many_sequences_as_asked_for_or_the_whole_microbatch():
    config = {"data": {"batch_size": 8}, "moe": {"group_over": "batch"}, "training": {"microbatches": 2}}
    assert resolve(config).sequences_per_group == 4
    config["moe"]["group_size"] = 2
    assert resolve(config).sequences_per_group == 2
    config["moe"]["group_size"] = 3
    assert "nearest legal numbers of sequences: 2, 4" in refusal(config)


@pytest.mark.parametrize("optimizer, words", [
    (dict(momentum=0.9), ["optimizer.momentum=0.9", "sgd only"]),
    (dict(decay_steps=10), ["optimizer.decay_steps=10", "wsd"]),
    (dict(schedule="wsd"), ["optimizer.decay_steps=0", "wsd"]),
    (dict(schedule="rsqrt", warmup_steps=0), ["optimizer.warmup_steps=0", "rsqrt"]),
    (dict(warmup_steps=301), ["optimizer.warmup_steps=301", "training.num_steps=300"]),
])
def test_optimizer_settings_without_effect_or_sense_are_refused(optimizer, words):
    message = refusal({"optimizer": optimizer})
    assert all(word in message for word in words), message


@pytest.mark.parametrize("value, total, expected", [(5, 12, "4, 6"), (4, 12, "4, 6"), (13, 12, "12"), (0, 6, "1"), (1, 1, "1")])
def test_nearest_divisors(value, total, expected):
    assert nearest_divisors(value, total) == expected


@pytest.mark.parametrize("value, step, expected", [(12, 8, "8, 16"), (3, 8, "8"), (16, 8, "16, 24")])
def test_nearest_multiples(value, step, expected):
    assert nearest_multiples(value, step) == expected


# The mesh


def mesh_refusal(config, devices):
    with pytest.raises(ConfigError) as error:
        resolve_mesh(resolve(config), devices)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("experts, limit, devices, data, expert", [
    (8, 4, 1, 1, 1),
    (8, 4, 2, 1, 2),
    (8, 4, 4, 1, 4),
    (8, 4, 8, 2, 4),  # expert_limit
    (8, 0, 8, 1, 8),  # no limit
    (6, 4, 8, 4, 2),  # gcd(6, 8) = 2
    (5, 4, 8, 8, 1),  # 5 and 8 share nothing: every device holds all experts
    (6, 4, 4, 2, 2),
    (12, 3, 6, 2, 3),
    (16, 3, 8, 4, 2),  # the largest common divisor up to 3
])
def test_automatic_axes_give_the_expert_axis_what_divides_both(experts, limit, devices, data, expert):
    config = resolve({"moe": {"num_experts": experts}, "mesh": {"expert_limit": limit}, "data": {"batch_size": 24}})
    assert resolve_mesh(config, devices) == {"data": data, "fsdp": 1, "expert": expert, "tensor": 1}


@pytest.mark.parametrize("mesh, devices, expected", [
    (dict(data=2), 8, dict(data=2, fsdp=1, expert=4, tensor=1)),
    (dict(data=4), 8, dict(data=4, fsdp=1, expert=2, tensor=1)),
    (dict(expert=2), 8, dict(data=4, fsdp=1, expert=2, tensor=1)),
    (dict(fsdp=2), 8, dict(data=1, fsdp=2, expert=4, tensor=1)),
    (dict(tensor=2, fsdp=2), 8, dict(data=1, fsdp=2, expert=2, tensor=2)),
    (dict(data=1, expert=1, tensor=4), 4, dict(data=1, fsdp=1, expert=1, tensor=4)),
])
def test_fixed_axes_leave_the_rest_to_the_automatic_ones(mesh, devices, expected):
    assert resolve_mesh(resolve({"mesh": mesh}), devices) == expected


@pytest.mark.parametrize("unused", [{}, dict(expert_widths="16*4")], ids=str)
def test_a_dense_model_spreads_over_data_alone(unused):
    assert resolve_mesh(resolve(moe(num_experts=0, **unused)), 8) == dict(data=8, fsdp=1, expert=1, tensor=1)


@pytest.mark.parametrize("config, devices, words", [
    # 3 experts over 2 devices
    ({"moe": {"num_experts": 3}, "mesh": {"expert": 2}}, 2,
     ["moe.num_experts=3", "mesh.expert=2", "moe.num_experts: 2, 4", "mesh.expert: 1."]),
    # 12 sequences over 8 devices: 8 or 16 would do
    ({"data": {"batch_size": 12}}, 8, ["data.batch_size=12", "= 8 devices", "data.batch_size: 8, 16"]),
    # 16 sequences in 4 microbatches of 4, 8 devices: a multiple of 32 would do
    ({"training": {"microbatches": 4}}, 8, ["data.batch_size=16", "training.microbatches=4", "data.batch_size: 32"]),
    ({"model": {"num_heads": 6, "num_kv_heads": 6}, "mesh": {"tensor": 4}}, 4,
     ["model.num_heads=6", "mesh.tensor=4", "model.num_heads: 4, 8", "mesh.tensor: 2."]),
    ({"model": {"num_kv_heads": 2}, "mesh": {"tensor": 4}}, 4, ["model.num_kv_heads=2", "mesh.tensor=4", "mesh.tensor: 2"]),
    ({"model": {"d_ff": 510}, "mesh": {"tensor": 4}}, 4, ["model.d_ff=510", "mesh.tensor=4", "508, 512"]),
    ({"moe": {"d_ff": 510}, "mesh": {"tensor": 4}}, 4, ["moe.d_ff=510", "mesh.tensor=4", "508, 512"]),
    ({"model": {"d_model": 129}, "mesh": {"fsdp": 2}}, 2, ["model.d_model=129", "mesh.fsdp=2", "128, 130"]),
    ({"mesh": {"fsdp": 3}}, 8, ["mesh.fsdp=3", "8 devices", "2, 4"]),
    ({"mesh": {"data": 2, "expert": 2}}, 8, ["data=2", "expert=2", "8 devices", "must be 8", "mesh.expert: 2, 4"]),
    ({"mesh": {"data": 3}}, 8, ["data=3", "8 devices", "mesh.data=0 fills in the rest"]),
    # groups of 4 sequences, but 16 sequences over 8 devices are 2 each
    ({"moe": {"group_size": 1024}}, 8, ["moe.group_size=1024", "4 sequences", "holds 2", "numbers of sequences: 2."]),
])
def test_b49_a_mesh_that_does_not_divide_is_refused_with_the_nearest_legal_values(config, devices, words):
    message = mesh_refusal(config, devices)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_the_default_config_runs_on_any_of_the_usual_device_counts(devices):
    sizes = resolve_mesh(resolve(get_config()), devices)
    product = 1
    for size in sizes.values():
        product *= size
    assert product == devices


# configs/base.py


def base_lines():
    """``{'moe.num_experts': (line number, value)}`` of every assignment to a field in configs/base.py."""
    found = {}
    for node in ast.walk(ast.parse(BASE.read_text())):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            target = node.targets[0]
            if target.value.id != "config":
                key = f"{target.value.id}.{target.attr}"
                assert key not in found, f"{key} is set twice"
                found[key] = node.end_lineno, ast.literal_eval(node.value)
    return found


def test_base_config_has_exactly_the_keys_of_the_dataclasses_in_their_order():
    assert list(base_lines()) == known_keys()


def test_base_config_repeats_the_defaults_of_the_dataclasses():
    assert get_config().to_dict() == Config().to_dict()
    assert resolve(get_config()) == Config()


def test_every_field_of_the_base_config_has_a_comment():
    with tokenize.open(BASE) as file:
        comments = {token.start[0]: token.string for token in tokenize.generate_tokens(file.readline)
                    if token.type == tokenize.COMMENT}
    bare = [key for key, (line, _) in base_lines().items() if len(comments.get(line, "")) < 5]
    assert bare == []


def test_field_types_are_plain():
    # resolve() compares types by identity: an annotation such as `int | None` or a string would refuse every value.
    kinds = {field.type for kind in SECTIONS.values() for field in dataclasses.fields(kind)}
    assert kinds <= {int, float, bool, str}


# Attention


@pytest.mark.parametrize("attention, words", [
    ({"kind": "headz"}, ["attention.kind='headz'", "'heads', 'latent'", "Did you mean 'heads'"]),
    ({"layers": "full,slidng"}, ["attention.layers=", "cannot be read at 'slidng'", "'sliding'", "':nope'"]),
    ({"layers": "full:rope"}, ["attention.layers=", "cannot be read at 'full:rope'"]),
    ({"layers": ",".join(["full"] * 5)}, ["attention.layers=", "names 5 layers", "model.num_layers=4"]),
    ({"window": 8}, ["attention.window=8", "has no sliding layer"]),
    ({"chunk": 8}, ["attention.chunk=8", "has no chunked layer"]),
    ({"layers": "sliding"}, ["attention.window=0", "which need it above 0"]),
    ({"layers": "full:nope", "positions": "none"}, ["attention.layers='full:nope'", "rotates no layer"]),
    ({"layers": "full:nope", "qk_norm": "unscaled"}, ["attention.qk_norm='unscaled'", "leave none"]),
    ({"layers": "full:nope", "rope_pairs": "interleaved"}, ["attention.rope_pairs='interleaved'", "a rotated layer"]),
    ({"temperature_scale": 0.1}, ["attention.temperature_scale=0.1", "':nope' layers"]),
    ({"temperature_floor": 4}, ["attention.temperature_floor=4", "has no effect without attention.temperature_scale"]),
    ({"rope_factor": 2.0}, ["attention.rope_factor=2.0", "has no effect without attention.rope_scaling"]),
    ({"rope_scaling": "yarn", "rope_factor": 2.0}, ["attention.rope_original_length=0", "needs the length"]),
    ({"rope_scaling": "yarn", "rope_original_length": 8, "rope_low_factor": 2.0}, ["attention.rope_low_factor", "'llama3'"]),
    ({"rope_scaling": "llama3", "rope_original_length": 8, "rope_mscale": 1.0}, ["attention.rope_mscale", "'yarn'"]),
    ({"rope_factor": 0.5}, ["attention.rope_factor=0.5", "at least 1"]),
    ({"latent_rank": 8}, ["attention.latent_rank=8", "has no effect without attention.kind='latent'"]),
    ({"kind": "latent"}, ["attention.latent_rank=0", "above 0 with attention.kind='latent'"]),
    ({"kind": "latent", "latent_rank": 8, "rope_dim": 3, "value_dim": 8}, ["attention.rope_dim=3", "even", "2, 4"]),
    ({"kind": "latent", "latent_rank": 8, "rope_dim": 32, "value_dim": 8}, ["attention.rope_dim=32", "model.head_dim=32"]),
    ({"kind": "latent", "latent_rank": 8, "rope_dim": 4, "value_dim": 8, "bias": "qkv"}, ["attention.bias='qkv'", "no biases"]),
    ({"relative_buckets": 16}, ["attention.relative_buckets=16", "has no effect without attention.positions='relative'"]),
])
def test_attention_that_cannot_be_or_would_not_act_is_refused(attention, words):
    message = refusal({"attention": attention})
    assert all(word in message for word in words), message


@pytest.mark.parametrize("config, words", [
    ({"model": {"num_kv_heads": 2}, "attention": dict(kind="latent", latent_rank=8, rope_dim=4, value_dim=8)},
     ["model.num_kv_heads=2", "share one latent", "model.num_heads=4"]),
    ({"model": {"rope_theta": 5.0}, "attention": {"positions": "none"}}, ["model.rope_theta=5.0", "has no effect"]),
    ({"model": {"head_dim": 7}}, ["model.head_dim=7", "even", "6, 8"]),
    ({"model": {"d_model": 3}, "attention": {"positions": "sinusoidal"}}, ["model.d_model=3", "set it to 4 or more"]),
    ({"model": {"scaled_tied_logits": False}}, ["model.scaled_tied_logits=False", "model.tie_embedding=True"]),
    ({"model": {"mlp_bias": True}, "moe": {"every": 1}}, ["model.mlp_bias=True", "moe.expert_bias"]),
    ({"model": {"norm": "batch"}}, ["model.norm='batch'", "'rms', 'layer'"]),
    ({"attention": dict(layers="sliding", window=4), "data": dict(objective="ul2", prefix_attention="bidirectional")},
     ["attention.layers='sliding'", "look back only"]),
])
def test_a_model_is_checked_against_its_attention(config, words):
    message = refusal(config)
    assert all(word in message for word in words), message


def test_a_pattern_of_attention_is_repeated_over_the_layers():
    config = resolve({"model": {"num_layers": 5}, "attention": dict(layers="chunked, full:nope", chunk=8)})
    assert config.attention_layers == (LayerAttention("chunked"), LayerAttention("full", False)) * 2 + (LayerAttention("chunked"),)
    assert resolve({"model": {"head_dim": 7}, "attention": {"positions": "none"}}).model.head_dim == 7


# Round trips


CHANGED = Config(
    ModelConfig(num_layers=6, d_model=64, dtype="bfloat16"), MoEConfig(num_experts=4, every=3, capacity_factor=2.0),
    DataConfig(batch_size=8), MeshConfig(data=2), OptimizerConfig(name="sgd", momentum=0.9), TrainingConfig(seed=7))


def test_a_config_survives_the_way_through_a_dict():
    assert resolve(CHANGED.to_dict()) == CHANGED
    assert differences(CHANGED.to_dict(), CHANGED.to_dict()) == []


def test_differences_name_what_changed_and_nothing_else():
    assert differences(Config().to_dict(), CHANGED.to_dict()) == [
        "data.batch_size: 16 -> 8",
        "mesh.data: 0 -> 2",
        "model.d_model: 128 -> 64",
        "model.dtype: 'float32' -> 'bfloat16'",
        "model.num_layers: 4 -> 6",
        "moe.capacity_factor: 1.25 -> 2.0",
        "moe.every: 2 -> 3",
        "moe.num_experts: 8 -> 4",
        "optimizer.momentum: 0.0 -> 0.9",
        "optimizer.name: 'adamw' -> 'sgd'",
        "training.seed: 0 -> 7",
    ]


def test_differences_show_keys_that_only_one_side_has():
    assert differences({"moe": {"old": 1}}, {"moe": {}, "mesh": {"new": 2}}) == ["mesh.new: None -> 2", "moe.old: 1 -> None"]


def test_a_config_recorded_before_a_section_or_setting_came_has_their_defaults():
    recorded = CHANGED.to_dict()
    del recorded["attention"], recorded["model"]["norm"]
    recorded["moe"]["gone"] = 1
    assert differences(with_defaults(recorded), CHANGED.to_dict()) == ["moe.gone: 1 -> None"]
    del recorded["moe"]["gone"]
    assert resolve(recorded) == CHANGED


def test_a_config_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CHANGED.moe.num_experts = 3
    assert hash(CHANGED) == hash(resolve(CHANGED.to_dict()))  # a static argument of jit


# The command line


def loaded(*overrides):
    return load_config(str(BASE), [f"--config.{word}" for word in overrides])


def load_refusal(*overrides, path=BASE):
    with pytest.raises(ConfigError) as error:
        load_config(str(path), [f"--config.{word}" for word in overrides])
    assert "\n" not in str(error.value)
    return str(error.value)


def test_overrides_keep_the_type_of_their_field():
    config = loaded("moe.num_experts=16", "moe.capacity_factor=2", "optimizer.learning_rate=1e-4",
                    "model.scan_layers=False", "training.tensorboard=false", "training.wandb=true",
                    "data.source=files:/a b/*.txt", "data.domain_weights=code=2,docs=1", "moe.first=-1", "data.vocabulary=7")
    assert config.moe.num_experts == 16
    assert config.moe.capacity_factor == 2.0 and type(config.moe.capacity_factor) is float
    assert config.optimizer.learning_rate == 1e-4
    assert (config.model.scan_layers, config.training.tensorboard, config.training.wandb) == (False, False, True)
    assert config.data.source == "files:/a b/*.txt" and config.data.domain_weights == "code=2,docs=1"
    assert config.moe.first == -1 and config.data.vocabulary == "7"


def test_no_override_gives_the_file():
    assert loaded() == Config()


def test_the_last_of_two_overrides_wins():
    assert loaded("moe.num_experts=4", "moe.num_experts=16").moe.num_experts == 16


@pytest.mark.parametrize("override, words", [
    ("moe.num_expert=4", ["moe.num_expert:", "moe.num_experts"]),
    ("num_experts=4", ["num_experts:", "moe.num_experts"]),
    ("moe=4", ["moe:"]),
    ("moe.num_experts=four", ["moe.num_experts", "four"]),
    ("moe.num_experts=4.5", ["moe.num_experts", "4.5"]),
    ("moe.capacity_factor=much", ["moe.capacity_factor", "much"]),
    ("model.scan_layers=maybe", ["model.scan_layers", "maybe"]),
    ("moe.num_experts", ["moe.num_experts", "=1"]),
    ("moe.num_experts=-1", ["moe.num_experts=-1", "at least 0"]),
])
def test_a_bad_override_is_refused_in_one_line(override, words):
    message = load_refusal(override)
    assert all(word in message for word in words), message


def test_a_missing_config_file_is_named(tmp_path):
    message = load_refusal(path=tmp_path / "absent.py")
    assert str(tmp_path / "absent.py") in message and "no such file" in message


@pytest.mark.parametrize("text, words", [
    ("def get_config(:\n", ["SyntaxError"]),
    ("x = 1\n", ["get_config"]),
    ("import absent_module\ndef get_config(): pass\n", ["absent_module"]),
    ("def get_config():\n    from ml_collections import ConfigDict\n    return ConfigDict({'moe': {'num_expert': 4}})\n",
     ["moe.num_expert:", "moe.num_experts"]),
])
def test_a_broken_config_file_is_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "broken.py"
    path.write_text(text)
    message = load_refusal(path=path)
    assert all(word in message for word in words), message
