"""Experts across devices: every way to them equals the per-token loop, in value and gradient, on any mesh.

The loop and its inputs are those of ``tests/test_dispatch.py``. XLA has no ragged all-to-all for CPUs, so here it is
made of an all-gather; that it compiles for TPUs is seen in the table of collectives (``tests/test_collectives.py``).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from test_dispatch import D, F, arbitrary, assert_equal, expected, from_choices, problem, random_choices

from moe_jax.config import ConfigError, MoEConfig, resolve
from moe_jax.dispatch import dispatcher, expert_parallel
from moe_jax.nn.experts import Experts
from moe_jax.routing.assignment import Routing
from moe_jax.sharding import TOKEN_AXES, gathered, parameter_spec, varying_like

G, T, E = 8, 11, 8

LISTS = {
    "top 2": from_choices(random_choices(G, T, E, 2, masked=0.2), "token_major"),
    # One device gets everything: rounds upon rounds. Expert 3 is the only one with tokens.
    "one expert takes all": from_choices(np.tile(np.array([3, E]), (G, T, 1)), "choice_major"),
    "arbitrary list": arbitrary(G, T, E, 21),
    "all masked": from_choices(np.full((G, T, 2), E), "token_major"),
}
MESHES = {name: tiny.mesh(**sizes) for name, sizes in {
    "expert 8": dict(expert=8),
    "data 2, expert 4": dict(data=2, expert=4),
    "fsdp 2, expert 2, tensor 2": dict(fsdp=2, expert=2, tensor=2),
    "data 4, tensor 2": dict(data=4, tensor=2),
}.items()}

# name: dispatch and the dispatcher's options; a factor of 0.3 leaves most rows to further rounds.
WAYS = {
    "buffers, compiler": ("gather", dict(expert_parallelism="compiler")),
    "buffers, shard_map": ("gather", dict(expert_parallelism="shard_map")),
    "buffers, none": ("gather", dict(expert_parallelism="none")),
    "one-hot buffers, shard_map": ("einsum", dict(expert_parallelism="shard_map")),
    "dropless, padded": ("dropless", dict(row_exchange="padded")),
    "dropless, padded, in rounds": ("dropless", dict(row_exchange="padded", row_exchange_factor=0.3)),
    "dropless, ragged": ("dropless", dict(row_exchange="ragged")),
    "dropless, ragged, in rounds": ("dropless", dict(row_exchange="ragged", row_exchange_factor=0.3)),
    "dropless, none": ("dropless", dict(expert_parallelism="none")),
}


def ragged_by_gathering(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name,
                        axis_index_groups=None):
    """What ``jax.lax.ragged_all_to_all`` is documented to do: device s writes ``send_sizes[d]`` of its rows from
    ``input_offsets[d]`` on into the output of device d, from ``output_offsets[d]`` on."""
    groups = axis_index_groups or [list(range(jax.lax.axis_size(axis_name)))]
    rank = {device: place for group in groups for place, device in enumerate(group)}
    me, rows = jnp.array([rank[d] for d in sorted(rank)])[jax.lax.axis_index(axis_name)], jnp.arange(operand.shape[0])
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name, axis_index_groups=axis_index_groups)
    operands, first, size, into = gather(operand), *(gather(a)[:, me] for a in (input_offsets, send_sizes, output_offsets))
    for s in range(operands.shape[0]):
        sent = rows < size[s]
        source = jnp.where(sent, first[s] + rows, operand.shape[0])
        target = jnp.where(sent, into[s] + rows, output.shape[0])
        taken = operands[s].at[source].get(mode="fill", fill_value=0)
        output = varying_like(output, taken).at[target].set(taken, mode="drop")
    # The receiver's own idea of what it gets must be the sender's.
    return jnp.where(jnp.all(recv_sizes == size), output, jnp.nan)


@pytest.fixture
def ragged(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_by_gathering)
    monkeypatch.setattr("moe_jax.dispatch.exchanges_ragged", lambda: True)


def run(mesh, dispatch, options, capacity, lists, x_GTD, weights, dy_GTD, bias=None):
    """(y, kept, gradients of x, gates and weights) on the mesh; ``bias``: of every expert's products, ``b_…`` leaves."""
    weights = weights | (bias or {})
    letters = {name: name.rsplit("_", 1)[1] for name in weights}
    with jax.set_mesh(mesh):
        experts = Experts(1, 1, 1, "swiglu", 1.0, nnx.Rngs(0), bias is not None)

        def loss(x_GTD, gate_GN, weights, token_GN, expert_GN, dy_GTD):
            routing_G = Routing(token_GN, expert_GN, gate_GN, None, lists.choices, lists.order, lists.gate_on)
            weights = {name: gathered(weight, letters[name], x_GTD.dtype) for name, weight in weights.items()}
            y_GTD, kept_GN = dispatcher(dispatch, MoEConfig(**options))(x_GTD, routing_G, experts.function, weights, E, capacity)
            return jnp.sum(y_GTD * dy_GTD), (y_GTD, kept_GN)

        tokens = lambda a: jax.device_put(a, NamedSharding(mesh, P(TOKEN_AXES)))
        weights = {name: jax.device_put(w, NamedSharding(mesh, parameter_spec(name, w.ndim))) for name, w in weights.items()}
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=tiny.QUICK)
        (_, (y, kept)), (dx, dgate, dw) = jax.device_get(step(tokens(x_GTD), tokens(lists.gate_GN), weights, *map(
            tokens, (lists.token_GN, lists.expert_GN, dy_GTD))))
    return y, kept, dx, dgate, dw


# Every way on every mesh, and every list on one or another of them.
PAIRS = [(list(LISTS)[(i + j) % len(LISTS)], way, mesh) for i, way in enumerate(WAYS) for j, mesh in enumerate(MESHES)]


@pytest.mark.parametrize("case, way, mesh", PAIRS)
def test_every_way_equals_the_per_token_loop_in_value_and_gradient(case, way, mesh, ragged):
    dispatch, options = WAYS[way]
    data = problem(G, T, E)
    found = run(MESHES[mesh], dispatch, options, 3, LISTS[case], *data)
    assert_equal(found, expected(dispatch, E, 3, LISTS[case], *data))


@pytest.mark.parametrize("way", ["buffers, shard_map", "dropless, padded, in rounds", "dropless, none"])
def test_gates_on_the_input_and_biases_count_once(way, ragged):
    """With F over ``tensor`` an expert's output is a sum over devices; its bias must not be added by each."""
    dispatch, options = WAYS[way]
    rng = np.random.default_rng(3)
    bias = {name: rng.normal(size=(E, width)).astype(np.float32) for name, width in (
        ("b_in_EF", F), ("b_gate_EF", F), ("b_out_ED", D))}
    lists = dataclasses.replace(LISTS["top 2"], gate_on="input")
    data = problem(G, T, E)
    wanted = run(tiny.ONE, "reference" if dispatch == "dropless" else dispatch, {}, 3, lists, *data, bias)
    found = run(MESHES["fsdp 2, expert 2, tensor 2"], dispatch, options, 3, lists, *data, bias)
    assert_equal(found, wanted)
    for name in bias:
        np.testing.assert_allclose(found[4][name], wanted[4][name], atol=2e-5 * np.abs(wanted[4][name]).max())
        assert np.abs(wanted[4][name]).max() > 0.05


def test_the_rows_beyond_a_round_do_travel_in_further_ones():
    """35 rows for one device, 8 at once: without further rounds 27 of each device's rows would be missing."""
    T, counted = 35, []
    lists, data = from_choices(np.tile(np.array([3, E]), (G, T, 1)), "choice_major"), problem(G, T, E)
    original = expert_parallel._padded_round

    def counting(number, *args, **kwargs):
        jax.debug.callback(lambda n: counted.append(int(n)), number)
        return original(number, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_parallel, "_padded_round", counting)
        found = run(MESHES["expert 8"], *WAYS["dropless, padded, in rounds"], 0, lists, *data)
    assert set(counted) == {0, 1, 2, 3, 4}
    assert_equal(found, expected("dropless", E, 0, lists, *data))


def test_ragged_rows_are_refused_where_xla_has_no_such_exchange():
    with jax.set_mesh(MESHES["expert 8"]):
        assert not expert_parallel.exchanges_ragged()
        with pytest.raises(ConfigError, match="row_exchange='ragged': XLA has no ragged all-to-all for cpu"):
            dispatcher("dropless", MoEConfig(row_exchange="ragged"))


@pytest.mark.parametrize("field, value", [("row_exchange", "ragged"), ("row_exchange_factor", 3.0)])
def test_options_of_an_exchange_are_refused_where_there_is_none(field, value):
    with pytest.raises(ConfigError, match=f"moe.{field}=.*has no effect with moe.expert_parallelism='none'"):
        resolve({"moe": {"expert_parallelism": "none", field: value}})
