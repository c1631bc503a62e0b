"""Bugs of other MoE code bases that belong to no single module here, and the page that says where each one is guarded."""

import ast
import contextlib
import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.config import SECTIONS, resolve
from moe_jax.nn.moe import MoELayer, RoutingMode
from moe_jax.routing.balance import EXTRA_LOSSES, balance_loss
from moe_jax.sharding import TOKEN_AXES
from moe_jax.training.run import RunError, check_workdir, read_config, record_config
from moe_jax.training.state import initial_params
from moe_jax.training.step import gradients

ROOT = Path(__file__).parents[1]


# The page


def codes_of_tests():
    """{'B01': {'tests/test_balance.py', …}} by the names of tests."""
    found = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for name in re.findall(r"^def test_(\w+)", path.read_text(), re.MULTILINE):
            for code in re.findall(r"(?:^|_)[bB](\d\d)(?=_)", name):
                found.setdefault(f"B{code}", set()).add(f"tests/{path.name}")
    return found


def test_the_page_names_the_tests_of_every_bug():
    page = (ROOT / "docs" / "known_bugs.md").read_text()
    listed = {code: re.findall(r"`(tests/\w+\.py)`", rest) for code, rest in re.findall(r"^\| (B\d\d) \|(.*)$", page, re.MULTILINE)}
    found = codes_of_tests()
    assert [code for code in (f"B{number:02}" for number in range(1, 44)) if code not in found] == []
    missing = {code: sorted(files - set(listed.get(code, ()))) for code, files in found.items()}
    assert {code: files for code, files in missing.items() if files} == {}
    for code, files in listed.items():
        for file in files:
            assert file in found.get(code, ()) or re.search(rf"\b{code}\b", (ROOT / file).read_text()), (code, file)


# Losses


SMALL = dict(model_num_layers=1, moe_every=1, data_sequence_length=8, moe_balance_weight=0.5)


def test_b03_the_balancing_losses_do_not_depend_on_what_is_logged():
    """The traced program of losses and gradients is letter for letter the same."""
    loud = dict(training_log_every=1, training_eval_every=1, training_tensorboard=False, training_wandb=True,
                training_profile_start=1, training_profile_steps=1, training_sample_length=0)
    programs = []
    for logging in ({}, loud, dict(moe_balance_weight=0.25)):
        config = tiny.config(**{**SMALL, **logging})
        with jax.set_mesh(tiny.ONE):
            program = jax.make_jaxpr(lambda params, batch, key, config=config: gradients(
                params, config, tiny.VOCAB, batch, tiny.no_bias(config), key))(
                    tiny.params(config), tiny.batch(length=8), jax.random.key(0))
            programs.append(re.sub(r" at 0x\w+", "", str(program)))
    assert programs[0] == programs[1]
    assert programs[0] != programs[2]  # the loss is in it


@pytest.fixture(scope="module")
def lopsided():
    """Statistics of one layer, whose router prefers two of four experts, under every dispatcher and capacity."""
    config = tiny.config(model_num_layers=1, moe_every=1, moe_balance_weight=1.0)
    modes = [RoutingMode("gather", 0.25), RoutingMode("gather", 2.0), RoutingMode("einsum", 2.0),
             RoutingMode("gather", 2.0, record=True), RoutingMode("dropless", 1.0), RoutingMode("reference", 1.0)]
    x_BSD = np.random.default_rng(0).normal(size=(2, 16, 16)).astype(np.float32)
    with jax.set_mesh(tiny.ONE):
        graph, state = nnx.split(MoELayer(config, nnx.Rngs(0)))
        state = state.to_pure_dict()
        router_DE = np.zeros((16, 4), np.float32)
        router_DE[:, :2] = np.linspace(0.1, 0.4, 16)[:, None] * np.sign(x_BSD.mean((0, 1)))[:, None]
        x_BSD = np.abs(x_BSD) * np.sign(router_DE[:, 0])

        @jax.jit
        def statistics(x_BSD):
            layer = nnx.merge(graph, {**state, "w_router_DE": router_DE})
            return [layer(x_BSD, jnp.ones((2, 16), bool), mode, jnp.zeros(4))[1] for mode in modes]

        return config, jax.device_get(statistics(x_BSD))


def test_b15_shares_are_of_tokens_not_of_buffer_slots(lopsided):
    """A buffer padded to its capacity has as many slots for every expert: counted there, every share would be even."""
    config, found = lopsided
    assert found[1].kept_GE.sum() == 2 * 16 * 2 > found[0].kept_GE.sum()  # room for all; too little
    losses = [float(balance_loss(one.router, config.moe, jnp.float32(32))) for one in found]
    np.testing.assert_array_equal(losses, losses[0])
    assert losses[0] > 1.5  # 2 of 4 experts take all
    assert found[0].router.choices_E.sum(0).tolist() == [32, 32, 0, 0]


def test_b03_recording_routes_changes_no_statistic(lopsided):
    _, found = lopsided
    plain, recorded = found[1], found[3]
    assert plain.routing_G is None and recorded.routing_G is not None
    tiny.assert_equal(recorded.router, plain.router)


@pytest.mark.parametrize("scope, sizes", [
    ("group", dict(data=8)), ("microbatch", dict(fsdp=8)), ("global", dict(expert=4, data=2)),
    ("group", dict(tensor=2, expert=2, fsdp=2))], ids=str)
def test_b22_every_loss_is_a_scalar_that_lies_on_no_axis_of_any_mesh(sizes, scope):
    """Traced only: on an explicit mesh a loss with the sharding of tokens or experts is an error, or has a spec."""
    config = tiny.config(**SMALL, moe_balance_scope=scope, moe_router_noise=1.0, moe_num_groups=2, moe_groups_per_token=1,
                         **{f"moe_{name}_weight": 0.1 for name in ("importance", "load", "device", "communication")})
    mesh, specs = tiny.mesh(**sizes), {}
    batch = tiny.batch(length=8)

    def traced(params, batch):
        _, metrics = gradients(params, config, tiny.VOCAB, batch, tiny.no_bias(config), jax.random.key(0))
        specs.update({name: jax.typeof(value) for name, value in metrics["sums"].items()})
        return metrics["sums"]

    with jax.set_mesh(mesh):
        params = jax.eval_shape(lambda: initial_params(config, tiny.VOCAB, jax.random.key(0)))
        rows = jax.sharding.NamedSharding(mesh, P(TOKEN_AXES))
        batch = {name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=rows) for name, value in batch.items()}
        jax.jit(traced).trace(params, batch)
    assert set(specs) >= {"loss/total", "loss/balance", "loss/router_z", "loss/importance", "loss/communication"}
    for name, kind in specs.items():
        assert kind.shape == () and kind.sharding.spec == P() and not kind.sharding.spec.unreduced, (name, kind)


# Coefficients


def test_b34_no_coefficient_of_a_loss_is_lost_on_its_way_through_a_run_directory(tmp_path):
    """One that is missing counts as its default. (Those of imported checkpoints: tests/test_convert.py.)"""
    coefficients = [f"{section}.{field.name}" for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)
                    if re.search(r"_weight$|_rate$|label_smoothing$", field.name) and field.type is float]
    assert {"moe.balance_weight", "moe.router_z_weight", "moe.bias_update_rate", "training.output_z_weight",
            *(f"moe.{name}_weight" for name in EXTRA_LOSSES)} <= set(coefficients)
    config = tiny.config(moe_balance_weight=0.123, moe_router_z_weight=0.234, moe_importance_weight=0.345,
                         moe_device_weight=0.456, moe_num_groups=2, moe_bias_update_rate=0.0567,
                         training_output_z_weight=0.678, training_label_smoothing=0.089)
    record_config(tmp_path, config)
    assert resolve(read_config(tmp_path)) == config
    for key in coefficients:
        section, name = key.split(".")
        stored = config.to_dict()
        del stored[section][name]  # as an importer that knows nothing of training would write it
        (tmp_path / "config.json").write_text(json.dumps(stored))
        lost = getattr(getattr(config, section), name) != getattr(SECTIONS[section], name)
        with pytest.raises(RunError, match=re.escape(key)) if lost else contextlib.nullcontext():
            check_workdir(tmp_path, config, allow_config_change=False)


# Devices


def test_b45_nothing_is_differentiated_inside_a_shard_map_that_does_not_check_what_varies():
    """With ``check_vma=False`` the gradient of a sum over devices, taken inside, is silently wrong. Two functions turn the
    check off, each for one library kernel: ``sharding.unmarked``, called by rules that state its gradient
    (``jax.custom_vjp``), and ``splash``, where nothing is summed over devices and nothing with a gradient is replicated.
    """
    unchecked, calls = [], 0
    for path in sorted((ROOT / "moe_jax").rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "shard_map":
                    calls += 1
                    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    if given.get("check_vma", "True") != "True" or "check_rep" in given:
                        unchecked.append((path.name, function.name))
    assert calls > 1
    assert unchecked == [("splash.py", "splash"), ("sharding.py", "unmarked")]
    assert not re.search(r"\bp(sum|mean|max|min)\b|all_(gather|to_all)", (ROOT / "moe_jax" / "nn" / "splash.py").read_text())
