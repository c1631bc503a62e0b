"""The MoE layer: shared experts, groups, noise, what it reports, and what it exchanges between devices."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from flax import nnx

from moe_jax.nn.groups import GroupLayout
from moe_jax.nn.moe import MoELayer, RoutingMode
from moe_jax.sharding import ACTIVATIONS, parameter_spec, spec
from moe_jax.training.step import check_statistics


def layer(config):
    return MoELayer(config, nnx.Rngs(params=0))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.lru_cache(maxsize=None)
def compiled(graph, num_experts, mode):
    return jax.jit(lambda state, x_BSD, valid_BS, key: nnx.merge(graph, state)(x_BSD, valid_BS, mode,
                                                                               jnp.zeros(num_experts), key))


def apply(module, x_BSD, mode, valid_BS=None, key=None):
    """(y_BSD, statistics) on the host."""
    graph, state = nnx.split(module)
    valid_BS = np.ones(x_BSD.shape[:2], bool) if valid_BS is None else valid_BS
    key = jax.random.key(0) if key is None else key
    with jax.set_mesh(tiny.ONE):
        return jax.device_get(compiled(graph, module.config.moe.num_experts, mode)(state, x_BSD, valid_BS, key))


def numpy_layer(module, x_BSD):
    """Σ over a token's K best experts of probability · expert(x), plus the shared expert; token by token in fp64."""
    moe = module.config.moe
    weight = lambda parameter: np.asarray(parameter[...], np.float64)
    silu = lambda v: v / (1 + np.exp(-v))

    def swiglu(x, w_gate, w_in, w_out):
        return (silu(x @ w_gate) * (x @ w_in)) @ w_out

    experts, y_BSD = module.experts, np.zeros(x_BSD.shape)
    for index in np.ndindex(x_BSD.shape[:2]):
        x = x_BSD[index].astype(np.float64)
        logits = x @ weight(module.w_router_DE)
        probability = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        for e in np.argsort(-logits, kind="stable")[: moe.experts_per_token]:
            y_BSD[index] += probability[e] * swiglu(x, *(weight(w)[e] for w in (
                experts.w_gate_EDF, experts.w_in_EDF, experts.w_out_EFD)))
        if moe.num_shared_experts:
            y_BSD[index] += swiglu(x, *(weight(w) for w in (
                module.shared.w_gate_DF, module.shared.w_in_DF, module.shared.w_out_FD)))
    return y_BSD


SHARED = tiny.config(moe_num_shared_experts=2)


@pytest.mark.parametrize("dispatch", ["gather", "einsum", "dropless", "reference"])
def test_output_is_the_gated_sum_of_the_chosen_experts_plus_the_shared_one(dispatch):
    module, x_BSD = layer(SHARED), draw(2, 6, 16)
    assert module.shared.w_in_DF[...].shape == (16, 2 * 16)  # two shared experts are one of twice the width
    y_BSD, statistics = apply(module, x_BSD, RoutingMode(dispatch, 2.0))  # 2.0 · 2 · 6 / 4: room for all six tokens
    np.testing.assert_allclose(y_BSD, numpy_layer(module, x_BSD), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(statistics.kept_GE, statistics.router.choices_E)


def test_a_token_without_a_slot_gets_the_shared_expert_only():
    module, x_BSD = layer(SHARED), np.repeat(draw(1, 1, 16), 6, axis=1)  # six equal tokens want the same two experts
    y_BSD, statistics = apply(module, x_BSD, RoutingMode("gather", 1e-6))  # one slot per expert
    assert statistics.kept_GE.sum() == 2
    without_experts = apply(module, x_BSD, RoutingMode("gather", 1e-6), valid_BS=np.zeros((1, 6), bool))[0]
    np.testing.assert_allclose(y_BSD[:, 1:], without_experts[:, 1:], rtol=1e-6)
    np.testing.assert_allclose(y_BSD[:, 0], numpy_layer(module, x_BSD)[:, 0], rtol=1e-4, atol=1e-5)


def test_a_layer_in_which_no_token_is_valid_is_zero_and_counts_nothing():
    module = layer(tiny.config())
    y_BSD, statistics = apply(module, draw(2, 6, 16), RoutingMode("gather", 1.0), valid_BS=np.zeros((2, 6), bool))
    np.testing.assert_array_equal(y_BSD, 0.0)
    for leaf in jax.tree.leaves(statistics):
        np.testing.assert_array_equal(leaf, 0.0)


# Groups


def grouped(config, batch, length):
    """Which (row, position) pairs make each group."""
    layout = GroupLayout(batch, length, config)
    with jax.set_mesh(tiny.ONE):
        number_BS = jnp.arange(batch * length).reshape(batch, length)
        number_GT = jax.jit(layout.split)(number_BS)
        np.testing.assert_array_equal(jax.jit(layout.join)(number_GT), number_BS)
    return np.asarray(number_GT).tolist()


@pytest.mark.parametrize("settings, batch, length, expected", [
    (dict(), 2, 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),  # one row
    (dict(moe_group_size=2), 2, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),  # half a row
    (dict(moe_group_size=8), 4, 4, [[*range(8)], [*range(8, 16)]]),  # two rows, one after the other
    (dict(moe_group_over="batch"), 4, 2, [[0, 2, 4, 6], [1, 3, 5, 7]]),  # one position of all rows
    (dict(moe_group_over="batch", moe_group_size=2), 4, 2, [[0, 2], [1, 3], [4, 6], [5, 7]]),  # of two rows
])
def test_groups_are_made_of(settings, batch, length, expected):
    config = tiny.config(data_sequence_length=length, data_batch_size=batch, **settings)
    assert grouped(config, batch, length) == expected


def test_groups_adapt_to_shapes_the_config_does_not_know():
    config = tiny.config(data_sequence_length=8, data_batch_size=4, moe_group_size=16)  # two rows of 8
    assert grouped(config, 3, 8) == [[*range(24)]]  # three rows: all of them
    assert grouped(config, 4, 1) == [[0, 1], [2, 3]]  # generation: one token of two rows
    short = tiny.config(data_sequence_length=8, moe_group_size=4)
    assert grouped(short, 1, 6) == [[*range(6)]]  # a length that 4 does not divide is one group


# Noise


def test_jitter_is_drawn_in_training_only_and_follows_the_key():
    module, x_BSD = layer(tiny.config(moe_router_jitter=0.3)), draw(2, 6, 16)
    train = RoutingMode("dropless", 1.0, noise=True)
    first, again = (apply(module, x_BSD, train, key=jax.random.key(1))[1] for _ in range(2))
    other = apply(module, x_BSD, train, key=jax.random.key(2))[1]
    tiny.assert_equal(first, again)
    assert not np.array_equal(first.router.probability_E, other.router.probability_E)
    calm = [apply(module, x_BSD, RoutingMode("dropless", 1.0), key=jax.random.key(k))[1] for k in (1, 2)]
    tiny.assert_equal(*calm)


def test_jitter_moves_the_router_and_not_what_the_experts_see():
    """With one expert, whose gate is always 1, noise in the router changes nothing."""
    module, x_BSD = layer(tiny.config(moe_num_experts=1, moe_experts_per_token=1, moe_router_jitter=0.5)), draw(2, 6, 16)
    noisy, statistics = apply(module, x_BSD, RoutingMode("dropless", 1.0, noise=True))
    calm, calm_statistics = apply(module, x_BSD, RoutingMode("dropless", 1.0))
    assert statistics.router.logit_max.max() != calm_statistics.router.logit_max.max()
    np.testing.assert_array_equal(noisy, calm)


# Precision


def test_the_router_in_bfloat16_rounds_its_input_its_weights_and_its_logits_and_nothing_else():
    x_BSD, mode = draw(2, 6, 16), RoutingMode("dropless", 1.0, record=True)
    round_16 = lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)
    gates = {}
    for dtype in ("float32", "bfloat16"):
        module = layer(tiny.config(moe_router_dtype=dtype))
        _, statistics = apply(module, x_BSD, mode)
        gates[dtype] = np.sort(statistics.routing_G.gate_N.reshape(2, 6, 2))
    logits_BSE = round_16(round_16(x_BSD) @ round_16(module.w_router_DE[...]))
    p_BSE = np.exp(logits_BSE) / np.exp(logits_BSE).sum(-1, keepdims=True)
    np.testing.assert_allclose(gates["bfloat16"], np.sort(p_BSE)[..., -2:], rtol=1e-5)
    assert np.abs(gates["float32"] - gates["bfloat16"]).max() > 1e-3


def test_the_experts_see_what_the_router_rounds_for_itself():
    """One expert, whose gate is always 1."""
    x_BSD = draw(2, 6, 16)
    outputs = [apply(layer(tiny.config(moe_num_experts=1, moe_experts_per_token=1, moe_router_dtype=dtype)), x_BSD,
                     RoutingMode("dropless", 1.0))[0] for dtype in ("float32", "bfloat16")]
    np.testing.assert_array_equal(*outputs)


# What is reported


def test_recorded_assignments_agree_with_the_counts():
    module, x_BSD = layer(tiny.config()), draw(2, 6, 16)
    y_BSD, statistics = apply(module, x_BSD, RoutingMode("gather", 0.5, record=True))
    plain_y, plain = apply(module, x_BSD, RoutingMode("gather", 0.5))
    assert plain.routing_G is None and plain.kept_GN is None
    np.testing.assert_array_equal(y_BSD, plain_y)
    for g in range(2):
        expert_N, kept_N = statistics.routing_G.expert_N[g], statistics.kept_GN[g]
        np.testing.assert_array_equal(np.bincount(expert_N, minlength=4), statistics.router.choices_E[g])
        np.testing.assert_array_equal(np.bincount(expert_N[kept_N], minlength=4), statistics.kept_GE[g])
    # 0.5 · 2 · 6 / 4 = 1.5, rounded up: 2 slots per expert
    assert statistics.kept_GE.max() == 2 and statistics.kept_GE.sum() < statistics.router.choices_E.sum() == 24


def test_check_statistics_accepts_one_layer_per_moe_layer():
    config = tiny.config(model_num_layers=2)  # one MoE layer
    _, statistics = apply(layer(config), draw(2, 6, 16), RoutingMode("gather", 0.5))
    check_statistics(config, jax.tree.map(lambda leaf: leaf[None], statistics))


# The exchange: data 2 x expert 4, bf16


@functools.lru_cache(maxsize=None)
def eight_devices(dispatch, backward):
    """(function, abstract arguments) of one layer and the mesh they lie on."""
    config = tiny.config(data_batch_size=16, moe_num_experts=8, moe_capacity_factor=1.0)
    mesh, mode = tiny.mesh(data=2, expert=4), RoutingMode(dispatch, 1.0)
    graph, state = nnx.split(nnx.eval_shape(lambda: layer(config)))

    def abstract(shape, dtype, where):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, where))

    state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: abstract(leaf.shape, leaf.dtype, parameter_spec(path[-1].key, leaf.ndim)), state.to_pure_dict())
    x_BSD, valid_BS = (abstract(*kind, spec("B", ACTIVATIONS)) for kind in (((16, 16, 16), jnp.bfloat16), ((16, 16), bool)))

    def forward(state, x_BSD, valid_BS):
        return nnx.merge(graph, state)(x_BSD, valid_BS, mode, jnp.zeros(8))[0]

    def loss(state, x_BSD, valid_BS):
        return jnp.sum(forward(state, x_BSD, valid_BS).astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(loss, argnums=(0, 1)) if backward else forward), (state, x_BSD, valid_BS), mesh


@functools.lru_cache(maxsize=None)
def collectives(dispatch, backward):
    """``[(operation, elements)]`` of the compiled layer."""
    function, arguments, mesh = eight_devices(dispatch, backward)
    with jax.set_mesh(mesh):
        text = function.lower(*arguments).compile().as_text()
    found = []
    # `%name = f32[2,4]{1,0} all-to-all(…`, or a tuple `(f32[…], f32[…]) all-to-all(…`, or `…-start(`.
    for shapes, operation in re.findall(r"= (\(?[a-z0-9]+\[.*?) (all-to-all|all-gather|all-reduce|reduce-scatter"
                                        r"|collective-permute|ragged-all-to-all)(?:-start)?\(", text):
        sizes = re.findall(r"[a-z]+[0-9]*\[([0-9,]*)\]", shapes)
        found.append((operation, sum(int(np.prod([int(n) for n in dims.split(",") if n])) for dims in sizes)))
    return found


def exchanged_dtypes(dispatch, backward):
    """Dtypes of the arrays whose ``expert`` axis moves from one dimension to another, in the traced program.

    XLA:CPU computes bf16 in fp32, collectives included, so the compiled program cannot tell.
    """
    function, arguments, mesh = eight_devices(dispatch, backward)

    def expert_dimension(variable):
        where = variable.aval.sharding.spec
        return [i for i, axes in enumerate(where) if axes == "expert" or isinstance(axes, tuple) and "expert" in axes]

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "reshard":
                before, after = expert_dimension(equation.invars[0]), expert_dimension(equation.outvars[0])
                if before and after and before != after:
                    yield str(equation.invars[0].aval.dtype)
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)

    with jax.set_mesh(mesh):
        return list(walk(jax.make_jaxpr(function)(*arguments).jaxpr))


def of(kind, found):
    return [c for c in found if c[0] == kind]


# Rows of x on one device: 2 sequences of 16 tokens; in buffers 2 groups · 8 experts · 4 slots, of width 16.
SLOTS_ON_DEVICE = 2 * 8 * 4 * 16


@pytest.mark.parametrize("dispatch", ["gather", "einsum"])
@pytest.mark.parametrize("backward, exchanges", [(False, 2), (True, 4)])
def test_b51_capacity_dispatch_compiles_to_two_all_to_alls_each_way(dispatch, backward, exchanges):
    found = collectives(dispatch, backward)
    assert of("all-to-all", found) == [("all-to-all", SLOTS_ON_DEVICE)] * exchanges, found
    assert not of("all-gather", found) and not of("collective-permute", found), found


@pytest.mark.parametrize("dispatch", ["gather", "einsum"])
@pytest.mark.parametrize("backward, exchanges", [(False, 2), (True, 4)])
def test_b51_what_is_exchanged_is_bf16_when_the_model_computes_in_bf16(dispatch, backward, exchanges):
    assert exchanged_dtypes(dispatch, backward) == ["bfloat16"] * exchanges


def test_forward_of_the_capacity_dispatch_has_no_other_collective():
    assert {kind for kind, _ in collectives("gather", False)} == {"all-to-all"}


def test_backward_of_the_capacity_dispatch_sums_weight_gradients_only():
    """Over `data` those of each device's 2 experts (three matrices of 16 x 16), and the router's (16 x 8)."""
    found = collectives("gather", True)
    reduced = of("all-reduce", found) + of("reduce-scatter", found)
    assert sum(elements for _, elements in reduced) == 3 * 2 * 16 * 16 + 16 * 8, found


def test_dropless_dispatch_exchanges_rows_and_gathers_nothing():
    """Rows there and back, once more in the code for further rounds; what and how much is coming, and the number of rounds
    are a few numbers."""
    found = collectives("dropless", False)
    rows = [elements for kind, elements in found if elements > 100]
    assert {kind for kind, _ in found} == {"all-to-all", "all-reduce"}, found
    assert len(rows) == 4 and len(set(rows)) == 1, found
    assert [elements for kind, elements in found if kind == "all-reduce"] == [1], found


def test_reference_dispatch_gathers_weights_and_never_tokens():
    assert {kind for kind, _ in collectives("reference", False)} == {"all-gather"}
