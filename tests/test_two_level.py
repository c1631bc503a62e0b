"""Experts on nodes of several devices: a token crosses to a node once, and nothing else changes.

Eight CPU devices as X nodes; the yardstick is ``reference`` on one of them, which ``test_dispatch`` holds to a loop.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from test_dispatch import D, LETTERS, from_choices, problem, random_choices
from tiny import ONE, QUICK, VOCAB, batch, config, grads, mesh, params

from moe_jax import sharding
from moe_jax.config import ConfigError
from moe_jax.dispatch import dispatcher
from moe_jax.dispatch.chunks import in_chunks
from moe_jax.dispatch.dropless import dropless
from moe_jax.dispatch.expert_parallel import Exchange
from moe_jax.dispatch.two_level import levels, visited_nodes
from moe_jax.nn.experts import Experts
from moe_jax.planning.hlo import collectives
from moe_jax.routing.assignment import Routing
from moe_jax.sharding import COMPILER_OPTIONS, compiler_options, gathered, per_device, resolve_mesh
from moe_jax.training.evaluate import put_batch
from moe_jax.training.state import abstract_state
from moe_jax.training.step import jitted_train_step

G, T, E, K = 8, 12, 16, 4
ROOT = Path(__file__).parents[1]
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="libtpu is not installed (pip install '.[tpu]')")


def near(seed=0):
    """Every token chooses among the experts of two of eight devices."""
    rng = np.random.default_rng(seed)
    device_GTM = np.argsort(rng.random((G, T, 8)), axis=-1)[..., :2]
    return (2 * device_GTM[..., :, None] + np.arange(2)).reshape(G, T, K)


def crowded():
    """Every first choice is expert 5; one device's tokens all go nowhere."""
    expert_GTK = random_choices(G, T, E, K, 1)
    expert_GTK[..., 0] = 5
    expert_GTK[..., 1:] = np.where(expert_GTK[..., 1:] == 5, E, expert_GTK[..., 1:])
    expert_GTK[3] = E
    return expert_GTK


LISTS = {
    "random, masked": random_choices(G, T, E, K, masked=0.3),
    "empty experts": random_choices(G, T, 5, K, 2) * 3,  # 0, 3, 6, 9, 12
    "one expert takes all": crowded(),
    "two devices a token": near(),
}


@functools.lru_cache(maxsize=None)
def compiled(mesh, exchange, order, gate_on="output"):
    with jax.set_mesh(ONE):
        experts = Experts(1, 1, 1, "swiglu", 1.0, nnx.Rngs(0))

    def loss(x_GTD, gate_GN, weights, token_GN, expert_GN, dy_GTD):
        routing_G = Routing(token_GN, expert_GN, gate_GN, None, K, order, gate_on)
        weights = {name: gathered(weight, LETTERS[name], "float32") for name, weight in weights.items()}
        dispatch = dispatcher("reference")
        if exchange is not None:
            dispatch = in_chunks(functools.partial(dropless, exchange=exchange), 2)  # where a device has two groups
        y_GTD, kept_GN = dispatch(x_GTD, routing_G, experts.function, weights, E, 0)
        return jnp.sum(y_GTD * dy_GTD), (y_GTD, kept_GN)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICK)


def run(mesh, exchange, expert_GTK, order="token_major", gate_on="output"):
    lists, (x, weights, dy) = from_choices(expert_GTK, order), problem(G, T, E)
    with jax.set_mesh(mesh):
        weights = {name: jax.device_put(w, P("expert")) for name, w in weights.items()}
        function = compiled(mesh, exchange, lists.order, gate_on)
        (_, (y, kept)), grads = jax.device_get(function(x, lists.gate_GN, weights, lists.token_GN, lists.expert_GN, dy))
    return y, kept, grads


def assert_equal(found, wanted):
    assert np.abs(wanted[0]).max() > 0.05
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(1.0, np.abs(other).max()), rtol=0)


# name: mesh sizes, nodes, factor of the buffers. Small ones are filled several times, at both levels.
MESHES = {
    "2 nodes of 4": (dict(expert=8), 2, 2.0),
    "4 nodes of 2, small buffers": (dict(expert=8), 4, 0.25),
    "data 2, 2 nodes of 1, tensor 2": (dict(data=2, expert=2, tensor=2), 2, 1.0),
}


@pytest.mark.parametrize("case", MESHES)
def test_two_levels_equal_the_reference_in_value_and_gradient(case):
    sizes, nodes, factor = MESHES[case]
    for expert_GTK in LISTS.values():
        assert_equal(run(mesh(**sizes), Exchange(False, factor, nodes), expert_GTK), run(ONE, None, expert_GTK))


def test_parts_in_any_order_with_gates_on_the_input_equal_the_reference():
    """Llama-4's gate multiplies what an expert reads, so it travels with the row. Two parts of one group on each device."""
    found, wanted = (run(*where, LISTS["random, masked"], "batch_prioritized", "input") for where in (
        (mesh(expert=4), Exchange(False, 1.0, 2)), (ONE, None)))
    assert_equal(found, wanted)


# Who crosses how often


def sent(expert_TK, nodes):
    """(token, node) of every row that leaves for a node, by :func:`visited_nodes`."""
    visits = jax.device_get(visited_nodes(jnp.asarray(expert_TK), E, nodes))
    there = visits.expert_N < nodes
    return list(zip(visits.token_N[there].tolist(), visits.expert_N[there].tolist()))


@pytest.mark.parametrize("nodes", [2, 4, 8])
@pytest.mark.parametrize("case", LISTS)
def test_a_token_leaves_once_for_each_node_with_an_expert_of_its_choice(case, nodes):
    for expert_TK in LISTS[case]:
        wanted = {(t, e // (E // nodes)) for t, chosen in enumerate(expert_TK.tolist()) for e in chosen if e < E}
        rows = sent(expert_TK, nodes)
        assert len(rows) == len(set(rows)) and set(rows) == wanted


def test_fewer_rows_cross_than_one_by_one():
    """By hand: K = 4 choices on one of two devices each. Token 0 has experts 0, 1 (node 0) and 14, 15 (node 1): two rows
    for four choices. Of all 96 tokens' 384 choices, one row each crosses in a one-level exchange."""
    assert sent(np.array([[14, 0, 15, 1]]), 2) == [(0, 0), (0, 1)]
    rows = sum(len(sent(expert_TK, 8)) for expert_TK in LISTS["two devices a token"])
    assert rows == 2 * G * T and LISTS["two devices a token"].size == 2 * rows


def test_rows_arrive_with_their_choices_at_the_device_of_their_rank():
    """2 nodes of 4: what device 1 has for node 1 comes to device 5 and to nobody else."""
    with jax.set_mesh(mesh(expert=8)):
        between, within = levels(2)
        assert between.groups == ((0, 4), (1, 5), (2, 6), (3, 7)) and within.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
        went = jax.jit(lambda x: per_device(between.exchange, x))(np.arange(16))  # device d sends 2d to node 0, 2d + 1 to 1
        stayed = jax.jit(lambda x: per_device(lambda x: within.number()[None] + 0 * x[:1], x))(np.arange(8))
    assert np.asarray(went).tolist() == [0, 8, 2, 10, 4, 12, 6, 14, 1, 9, 3, 11, 5, 13, 7, 15]
    assert np.asarray(stayed).tolist() == [0, 1, 2, 3] * 2


def test_the_compiled_program_exchanges_along_ranks_and_within_nodes_only():
    """By hand: between nodes 2 · 12 rows, every token to both, and as many messages of 2 · 4 choices and gates, which are as
    wide as a row of 8; one by one, twice the mean load of 48 / 8 choices for each of 8 devices, in eights: 8 · 16 rows."""
    found = {nodes: exchanges(nodes) for nodes in (1, 2)}
    assert {each.devices for each in found[2]} == {2, 4} and {each.devices for each in found[1]} == {8}
    rows = lambda nodes, devices: [each.bytes for each in found[nodes] if each.devices == devices and each.dtype == "f32"
                                   and each.shape.endswith(f",{D}]") and not each.conditional]
    # Rows and messages there, rows back; of what is in the buffer, this device's own part stays.
    assert rows(2, 2) == 3 * [2 * T * D * 4 // 2]
    assert rows(1, 8) == 2 * [8 * 16 * D * 4 * 7 // 8]


def exchanges(nodes):
    """The all-to-alls of the forward pass."""
    lists, (x, weights, dy) = from_choices(LISTS["random, masked"], "token_major"), problem(G, T, E)
    function = compiled(mesh(expert=8), Exchange(False, 2.0, nodes), lists.order)
    forward = jax.jit(lambda *arguments: function.__wrapped__(*arguments)[0], compiler_options=QUICK)
    with jax.set_mesh(mesh(expert=8)):
        text = forward.lower(x, lists.gate_GN, weights, lists.token_GN, lists.expert_GN, dy).compile().as_text()
    return [each for each in collectives(text, mesh(expert=8)) if each.kind == "all-to-all"]


# What is refused


@pytest.mark.parametrize("settings, message", [
    (dict(moe_dispatch="gather"), "moe.dispatch='gather' sends buffers of fixed capacity"),
    (dict(moe_dispatch="dropless", moe_expert_parallelism="none"), "no rows travel"),
    (dict(moe_dispatch="dropless", moe_router="expert_choice", moe_balance_weight=0.0,
          moe_allow_noncausal_routing=True), "makes any number"),
])
def test_nodes_are_refused_where_no_token_travels_with_its_choices(settings, message):
    with pytest.raises(ConfigError, match=message):
        config(mesh_expert_nodes=2, **settings)


def test_nodes_must_divide_the_expert_axis():
    nodes = dict(moe_dispatch="dropless", moe_num_experts=8, mesh_expert_limit=0)
    with pytest.raises(ConfigError, match=r"mesh.expert_nodes=3 does not divide mesh.expert=4; nearest legal values: 2, 4"):
        resolve_mesh(config(mesh_expert=4, mesh_expert_nodes=3, **nodes), 8)
    assert resolve_mesh(config(mesh_expert_nodes=2, **nodes), 8)["expert"] == 8
    with pytest.raises(ConfigError, match="mesh.expert_nodes=2 does not divide mesh.expert=1"):
        resolve_mesh(config(mesh_expert_nodes=2, **nodes), 1)


@pytest.mark.parametrize("groups, limit, nodes, wanted", [(8, 4, 8, 4), (8, 4, 4, 4), (8, 2, 4, 2), (2, 1, 4, 2), (1, 0, 4, 0)])
def test_the_limit_of_groups_bounds_the_nodes_of_a_token(groups, limit, nodes, wanted):
    run = config(moe_dispatch="dropless", moe_num_experts=8, moe_num_groups=groups, moe_groups_per_token=limit,
                 moe_experts_per_token=1, mesh_expert_nodes=nodes)
    assert run.nodes_per_token == wanted


# The layer, and parts of its tokens


def test_a_layer_in_parts_gives_outputs_gradients_and_drops_of_the_whole_on_one_device():
    """Two groups on each device, one of eight devices without tokens."""
    common = dict(model_num_layers=2, moe_num_experts=4, moe_num_shared_experts=1, moe_group_size=8, data_batch_size=8,
                  moe_dispatch="gather", moe_capacity_factor=0.75)
    whole, parts = config(**common), config(**common, moe_exchange_chunks=2)
    data = batch(rows=8, length=16, lengths=[16, 16, 16, 0, 16, 5, 16, 16])
    wanted, found = (grads(c, params(whole), data, on) for c, on in ((whole, ONE), (parts, mesh(data=2, expert=4))))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(1.0, np.abs(other).max()), rtol=0)
    assert wanted[1]["routing"]["kept_LE"].sum() < wanted[1]["routing"]["counts_LE"].sum()


def test_parts_are_whole_groups():
    chunks = dict(moe_dispatch="gather", moe_group_size=4, data_batch_size=8, moe_num_experts=4)
    assert resolve_mesh(config(moe_exchange_chunks=4, mesh_expert=4, **chunks), 8)  # 1 row of 16 tokens on a device
    with pytest.raises(ConfigError, match="moe.exchange_chunks=3 does not divide the 4 groups .* nearest legal values: 2, 4"):
        resolve_mesh(config(moe_exchange_chunks=3, mesh_expert=4, **chunks), 8)
    with pytest.raises(ConfigError, match="moe.exchange_chunks=2: has no effect with moe.dispatch='reference'"):
        config(moe_exchange_chunks=2, moe_dispatch="reference")
    with pytest.raises(ConfigError, match="moe.exchange_chunks=2: has no effect with moe.expert_parallelism='none'"):
        config(moe_exchange_chunks=2, moe_expert_parallelism="none")


@needs_libtpu
def test_on_tpus_experts_and_shared_experts_compute_while_rows_travel():
    """Scheduled programs for v5e:4x4. In two parts: experts' products (ETD, ETF) of one part beside the rows of the other,
    forward and backward. In one: the shared experts' (BSD, BSF) beside the routed ones' rows."""
    parts, whole = programs_for_tpu(dict(moe_exchange_chunks=2), dict(moe_num_shared_experts=1))
    assert len(parts) == 8 and len(whole) == 4  # there and back, forward and backward, of each part
    for direction in ("forward", "backward"):
        beside = [product for way, inside in parts for product in inside or () if way == direction]
        assert any(product.startswith("ET") for product in beside), (direction, parts)
        beside = [product for way, inside in whole for product in inside or () if way == direction]
        assert any(product.startswith("BS") for product in beside), (direction, whole)


def programs_for_tpu(*settings):
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))), JAX_PLATFORMS="cpu")
    done = subprocess.run([sys.executable, ROOT / "tests" / "exchange_tpu.py", *map(json.dumps, settings)], env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()[-len(settings):]]


def test_the_training_step_is_compiled_with_the_options_of_its_platform(monkeypatch):
    monkeypatch.setitem(sharding.COMPILER_OPTIONS, "cpu", {"xla_tpu_enable_async_all_to_all": True})
    with jax.set_mesh(ONE):
        assert compiler_options() == COMPILER_OPTIONS["cpu"]
        step, c = jitted_train_step(config(), VOCAB), config()
        with pytest.raises(Exception, match="xla_tpu_enable_async_all_to_all"):  # which a CPU does not know
            step.lower(abstract_state(c, VOCAB, ONE), put_batch(batch(), ONE)).compile()
