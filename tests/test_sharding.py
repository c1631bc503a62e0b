"""Where arrays lie, and which meshes are refused. That no number depends on it: tests/test_mesh_invariance.py."""

import re

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from moe_jax.config import ConfigError
from moe_jax.sharding import ACTIVATIONS, EXPERT_BUFFERS, PARAMETERS, gathered, make_mesh, parameter_spec, resolve_mesh, spec

TOKENS = ("data", "fsdp", "expert")


# The tables


@pytest.mark.parametrize("letters, table, expected", [
    ("EDF", PARAMETERS, P("expert", "fsdp", "tensor")),
    ("EFD", PARAMETERS, P("expert", "tensor", "fsdp")),
    ("DHd", PARAMETERS, P("fsdp", "tensor", None)),
    ("VD", PARAMETERS, P("tensor", "fsdp")),
    ("BSD", ACTIVATIONS, P(TOKENS, None, None)),
    ("BSHd", ACTIVATIONS, P(TOKENS, None, "tensor", None)),
    ("BSV", ACTIVATIONS, P(TOKENS, None, "tensor")),
    ("GTD", ACTIVATIONS, P(TOKENS, None, None)),
    ("GECD", EXPERT_BUFFERS, P(("data", "fsdp"), "expert", None, None)),
    ("GECF", EXPERT_BUFFERS, P(("data", "fsdp"), "expert", None, "tensor")),
])
def test_a_spec_is_read_letter_by_letter(letters, table, expected):
    assert spec(letters, table) == expected


def test_an_axis_that_two_letters_want_is_the_first_ones():
    assert parameter_spec("w_latent_DR", 2) == P("fsdp", None)
    assert parameter_spec("w_key_RHd", 4) == P(None, "fsdp", "tensor", None)
    assert parameter_spec("scale_R", 1) == parameter_spec("bias_D", 2) == P()


def test_every_mesh_axis_is_used_and_no_spec_uses_one_twice():
    used = {axis for table in (PARAMETERS, ACTIVATIONS) for axes in table.values() for axis in np.atleast_1d(axes)}
    assert used == {"data", "fsdp", "expert", "tensor"}
    for letters, table in (("EDF", PARAMETERS), ("VD", PARAMETERS), ("GECF", EXPERT_BUFFERS), ("BSV", ACTIVATIONS)):
        axes = [axis for part in spec(letters, table) if part for axis in np.atleast_1d(part)]
        assert len(axes) == len(set(axes)), letters


@pytest.mark.parametrize("settings", [dict(), dict(moe_num_shared_experts=1), dict(moe_num_experts=0),
                                      dict(model_tie_embedding=True, model_activation="gelu", moe_activation="relu")])
def test_every_parameters_name_ends_in_a_letter_for_each_dimension(settings):
    config = tiny.config(**settings)
    sizes = {"D": {16}, "d": {4}, "H": {4, 2}, "V": {32}, "E": {4}, "F": {32, 16}}
    with jax.set_mesh(tiny.ONE):
        shapes = jax.eval_shape(lambda: tiny.initial_params(config, tiny.VOCAB, jax.random.key(0)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name, letters = path[-1].key, path[-1].key.rsplit("_", 1)[1]
        stacked = leaf.ndim - len(letters)
        assert stacked == (1 if path[0].key == "body" else 0), name
        for letter, size in zip(letters, leaf.shape[stacked:]):
            assert size in sizes[letter], name
        where = parameter_spec(name, leaf.ndim)
        if name in ("w_router_DE", "scale_D"):
            assert where == P(), name
        else:
            assert where == P(*[None] * stacked, *spec(letters, PARAMETERS)), name


def test_a_parameter_is_gathered_over_fsdp_only_and_in_the_compute_dtype():
    mesh = tiny.mesh(fsdp=2, expert=2, tensor=2)
    with jax.set_mesh(mesh):
        weight = jax.device_put(np.ones((4, 8, 6), np.float32), jax.sharding.NamedSharding(mesh, spec("EDF", PARAMETERS)))
        used = jax.jit(lambda w: gathered(w, "EDF", np.dtype("bfloat16")))(weight)
    assert used.dtype == "bfloat16" and used.sharding.spec == P("expert", None, "tensor")


# Which mesh


@pytest.mark.parametrize("devices, settings, expected", [
    (1, dict(), (1, 1, 1, 1)),
    (2, dict(), (1, 1, 2, 1)),
    (8, dict(), (2, 1, 4, 1)),
    (8, dict(mesh_expert_limit=2), (4, 1, 2, 1)),
    (8, dict(moe_num_experts=8, mesh_expert_limit=0), (1, 1, 8, 1)),
    (8, dict(moe_num_experts=6), (4, 1, 2, 1)),  # 4 does not divide 6 experts
    (8, dict(moe_num_experts=0), (8, 1, 1, 1)),
    (8, dict(mesh_data=4), (4, 1, 2, 1)),
    (8, dict(mesh_fsdp=2, mesh_tensor=2), (1, 2, 2, 2)),
    (8, dict(mesh_expert=1), (8, 1, 1, 1)),
])
def test_automatic_axes_fill_the_devices(devices, settings, expected):
    assert tuple(resolve_mesh(tiny.config(**settings), devices).values()) == expected


@pytest.mark.parametrize("devices, settings, message", [
    (8, dict(mesh_fsdp=3), r"mesh.fsdp=3 .* does not divide 8 devices"),
    (8, dict(mesh_data=3), r"data=3 .* does not match 8 devices"),
    (8, dict(mesh_data=2, mesh_expert=2), r"does not match 8 devices"),
    (8, dict(moe_num_experts=6, mesh_expert=4), r"moe.num_experts=6 does not divide over mesh.expert=4"),
    (8, dict(data_batch_size=4), r"data.batch_size=4 .* do not divide over data x fsdp x expert = 8"),
    (8, dict(training_microbatches=2), r"gives 4 sequences"),
    (2, dict(mesh_tensor=2, model_d_ff=33), r"model.d_ff=33 does not divide over mesh.tensor=2"),
    (4, dict(mesh_tensor=4), r"model.num_kv_heads=2 does not divide over mesh.tensor=4"),
    (2, dict(mesh_tensor=2, moe_d_ff=17), r"moe.d_ff=17 does not divide over mesh.tensor=2"),
    (2, dict(mesh_fsdp=2, model_d_model=15), r"model.d_model=15 does not divide over mesh.fsdp=2"),
    (8, dict(moe_group_size=32), r"moe.group_size=32 spans 2 sequences, .* holds 1"),
])
def test_b49_a_mesh_that_does_not_divide_is_refused_by_name(devices, settings, message):
    with pytest.raises(ConfigError, match=message):
        resolve_mesh(tiny.config(**settings), devices)


@pytest.mark.parametrize("devices, settings", [
    (8, dict(moe_num_experts=6, mesh_expert=4)), (8, dict(moe_num_experts=6, mesh_expert=8)),
    (8, dict(moe_num_experts=12, mesh_expert=8, mesh_data=1)), (2, dict(moe_num_experts=3, mesh_expert=2)),
    (8, dict(moe_num_experts=4, mesh_expert=8)), (8, dict(moe_num_experts=2, mesh_expert=4, mesh_tensor=2)),
    (4, dict(moe_d_ff=18, mesh_tensor=4, model_num_kv_heads=4)),
    (8, dict(model_d_ff=36, mesh_tensor=8, model_num_heads=8, model_num_kv_heads=8, mesh_data=1)),
    (8, dict(model_d_model=18, mesh_fsdp=4)), (6, dict(model_d_model=16, mesh_fsdp=3, data_batch_size=24)),
    (8, dict(data_batch_size=12)), (8, dict(data_batch_size=36, training_microbatches=3)),
], ids=str)
def test_b49_what_a_refusal_calls_legal_is_legal_and_the_nearest(devices, settings):
    def refusal(**changes):
        try:
            resolve_mesh(tiny.config(**{**settings, **changes}), devices)
        except ConfigError as error:
            return str(error)
        return ""

    message = refusal()
    found = re.findall(r"(?:nearest legal|of) (?:values of )?(\w+)\.(\w+): ([\d, ]*\d)", message)
    assert found, message
    for section, field, values in found:
        values = [int(value) for value in values.split(",")]
        free = {} if section != "mesh" else {"mesh_data": 0}
        legal = [value for value in range(1, 2 * max(values) + 1)
                 if not refusal(**free, **{f"{section}_{field}": value})]
        now = settings[f"{section}_{field}"]
        below, above = [value for value in legal if value < now][-1:], [value for value in legal if value > now][:1]
        assert values == below + above, (message, legal)


def test_a_tensor_axis_that_does_not_divide_the_table_is_refused():
    with pytest.raises(ConfigError, match="model.vocab_size=33 does not divide over mesh.tensor=2"):
        resolve_mesh(tiny.config(mesh_tensor=2, model_vocab_size=33), 2)


def test_a_mesh_takes_the_first_devices_it_needs():
    mesh = make_mesh({"data": 2, "fsdp": 1, "expert": 1, "tensor": 1})
    assert list(mesh.devices.reshape(-1)) == jax.devices()[:2]
