"""Expert functions, their biases and the FFN beside the experts, against NumPy in fp64.

Gradients are compared with central differences of the NumPy functions, entry by entry.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from test_moe_layer import numpy_layer

from moe_jax.config import ACTIVATIONS, ConfigError
from moe_jax.dispatch.products import BatchedProducts, GroupedProducts, bias_by_blocks, bias_by_gather
from moe_jax.models.stack import Inputs, Layer, LayerKind
from moe_jax.nn.activations import activation
from moe_jax.nn.experts import Experts, interleaved, split_interleaved
from moe_jax.nn.mlp import MLP
from moe_jax.nn.moe import MoELayer, RoutingMode


def draw(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def gelu_tanh(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x):
    return x / 2 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def relu(x):
    return np.where(x > 0, x, 0)


def gpt_oss(gate, linear):
    gate, linear = np.minimum(gate, 7), np.minimum(np.maximum(linear, -7), 7)
    return (linear + 1) * gate * sigmoid(1.702 * gate)


# Branches in the order of the function's arguments.
NUMPY = {
    "relu": (("in",), relu),
    "relu_squared": (("in",), lambda x: relu(x) ** 2),
    "gelu": (("in",), gelu_tanh),
    "gelu_exact": (("in",), gelu_erf),
    "silu": (("in",), silu),
    "swiglu": (("gate", "in"), lambda g, h: silu(g) * h),
    "geglu": (("gate", "in"), lambda g, h: gelu_tanh(g) * h),
    "geglu_exact": (("gate", "in"), lambda g, h: gelu_erf(g) * h),
    "reglu": (("gate", "in"), lambda g, h: relu(g) * h),
    "glu": (("gate", "in"), lambda g, h: sigmoid(g) * h),
    "bilinear": (("gate", "in"), lambda g, h: g * h),
    "swiglu_clamped": (("gate", "in"), gpt_oss),
    "swiglu_linear": (("linear", "gate", "in"), lambda a, b, h: a * silu(b) * h),
}


def differences(function, arrays, step=1e-6):
    """Central differences of a scalar function of a dict of fp64 arrays, by every entry of every array."""
    slopes = {name: np.zeros(array.shape) for name, array in arrays.items()}
    for name, array in arrays.items():
        for index in np.ndindex(array.shape):
            centre = array[index]
            array[index] = centre + step
            above = function(arrays)
            array[index] = centre - step
            below = function(arrays)
            array[index] = centre
            slopes[name][index] = (above - below) / (2 * step)
    return slopes


def doubles(arrays):
    return {name: np.asarray(array, np.float64) for name, array in arrays.items()}


def test_every_activation_of_the_config_is_compared_here():
    assert set(NUMPY) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_hidden_layer_and_its_gradient(name):
    branches, function = NUMPY[name]
    kind = activation(name)
    assert kind.branches == branches and kind.matrices == len(branches) + 1
    # Far enough from 0 that GPT-OSS's clamps act on a good share of the numbers.
    given = {branch: draw(40, seed=i, scale=5.0) for i, branch in enumerate(branches)}
    np.testing.assert_allclose(kind.hidden(*given.values()), function(*doubles(given).values()), rtol=1e-5, atol=1e-5)
    found = jax.grad(lambda arrays: jnp.sum(kind.hidden(*(arrays[b] for b in branches)) * draw(40, seed=9)))(given)
    wanted = differences(lambda arrays: np.sum(function(*arrays.values()) * draw(40, seed=9)), doubles(given))
    for branch in branches:
        np.testing.assert_allclose(found[branch], wanted[branch], rtol=1e-4, atol=1e-4, err_msg=branch)


def test_gelu_exact_is_not_the_tanh_approximation():
    # x/2 · (1 + erf(x/√2)) at 1: 0.841345; the approximation gives 0.841192.
    values = [float(activation(name).hidden(jnp.float32(1.0))) for name in ("gelu_exact", "gelu")]
    np.testing.assert_allclose(values, [0.841345, 0.841192], atol=2e-6)


def test_gpt_oss_cuts_the_gate_above_only_and_the_linear_branch_on_both_sides():
    hidden = activation("swiglu_clamped").hidden
    far = hidden(jnp.array([9.0, 9.0, -9.0]), jnp.array([8.0, -8.0, 8.0]))
    # g = 7, 7, -9; u = 7, -7, 7: (u + 1) g σ(1.702 g).
    wanted = [8 * 7 * sigmoid(1.702 * 7), -6 * 7 * sigmoid(1.702 * 7), 8 * -9 * sigmoid(-1.702 * 9)]
    np.testing.assert_allclose(far, wanted, rtol=1e-5)


# Networks. E = 3 experts, of which the middle one has no rows; 7 rows, the last two of nobody.

NUM_EXPERTS, WIDTH, HIDDEN = 3, 3, 4
SIZES_E = np.array([3, 0, 2], np.int32)
OWNER_N = [0, 0, 0, 2, 2]


def drawn_weights(name, bias, scale=1.0):
    weights = {f"w_{branch}_EDF": draw(NUM_EXPERTS, WIDTH, HIDDEN, seed=i, scale=scale)
               for i, branch in enumerate(NUMPY[name][0])}
    weights["w_out_EFD"] = draw(NUM_EXPERTS, HIDDEN, WIDTH, seed=5)
    if bias:
        weights |= {f"b_{branch}_EF": draw(NUM_EXPERTS, HIDDEN, seed=10 + i) for i, branch in enumerate(NUMPY[name][0])}
        weights["b_out_ED"] = draw(NUM_EXPERTS, WIDTH, seed=15)
    return weights


def numpy_ffn(name, weights, expert, x_TD):
    """Expert ``expert`` of the weights on rows, row by row."""
    branches, function = NUMPY[name]
    bias = lambda key: weights[key][expert] if key in weights else 0.0
    rows = []
    for x in x_TD:
        h = function(*(x @ weights[f"w_{branch}_EDF"][expert] + bias(f"b_{branch}_EF") for branch in branches))
        rows.append(h @ weights["w_out_EFD"][expert] + bias("b_out_ED"))
    return np.stack(rows)


@dataclasses.dataclass(frozen=True)
class OneExpert:
    """Products for rows of one expert, of any rank, with that expert's own matrices: as a loop over blocks has them."""

    def matmul(self, x, w_DF, letters):
        assert letters in ("EDF", "EFD") and w_DF.ndim == 2
        return jnp.dot(x, w_DF)

    def add(self, x, b_F, letters):
        assert letters in ("EF", "ED") and b_F.ndim == 1
        return x + b_F.reshape((1,) * (x.ndim - 1) + b_F.shape)


@pytest.mark.parametrize("name, bias", [*((name, True) for name in ACTIVATIONS), ("gelu", False), ("swiglu", False)])
def test_experts_in_every_form_equal_numpy_in_value_and_gradient(name, bias):
    function = Experts(NUM_EXPERTS, WIDTH, HIDDEN, name, 1.0, nnx.Rngs(params=0), bias).function
    weights, x_ND = drawn_weights(name, bias, scale=2.0), draw(7, WIDTH, seed=20)
    x_ETD, r_ETD = (draw(NUM_EXPERTS, 2, WIDTH, seed=seed) for seed in (21, 23))
    r_ND = draw(7, WIDTH, seed=22)

    @jax.jit
    def run(weights, x_ND, x_ETD):
        def forms(weights, x_ND, x_ETD):
            one = function(OneExpert(), jax.tree.map(lambda w: w[2], weights), x_ND[None, 3:5])
            return (function(GroupedProducts(jnp.asarray(SIZES_E)), weights, x_ND),
                    function(BatchedProducts(), weights, x_ETD), one)

        losses = (lambda *a: jnp.sum(forms(*a)[0] * r_ND), lambda *a: jnp.sum(forms(*a)[1] * r_ETD))
        return forms(weights, x_ND, x_ETD), [jax.grad(loss, argnums=(0, 1, 2))(weights, x_ND, x_ETD) for loss in losses]

    (grouped_ND, batched_ETD, one), ((d_grouped, d_ND, _), (d_batched, _, d_ETD)) = run(weights, x_ND, x_ETD)
    exact = doubles(weights)
    grouped = lambda w, x: np.stack([numpy_ffn(name, w, e, x[i:i + 1])[0] for i, e in enumerate(OWNER_N)])
    batched = lambda w, x: np.stack([numpy_ffn(name, w, e, x[e]) for e in range(NUM_EXPERTS)])
    close = lambda found, wanted, key="": np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4, err_msg=key)
    close(grouped_ND[:5], grouped(exact, x_ND))
    close(batched_ETD, batched(exact, x_ETD))
    close(one[0], grouped(exact, x_ND)[3:])
    if not bias:
        np.testing.assert_array_equal(grouped_ND[5:], 0.0)
    # Rows of nobody are never read; their gradient is 0 and they have no part in any other.
    owned = differences(lambda a: np.sum(grouped(a, a["x"]) * r_ND[:5]), {**exact, "x": x_ND.astype(np.float64)})
    spread = differences(lambda a: np.sum(batched(a, a["x"]) * r_ETD), {**exact, "x": x_ETD.astype(np.float64)})
    close(d_ND, owned.pop("x"), "grouped x")
    close(d_ETD, spread.pop("x"), "batched x")
    for key in weights:
        close(d_grouped[key], owned[key], key)
        close(d_batched[key], spread[key], key)
        np.testing.assert_array_equal(d_grouped[key][1], 0.0, err_msg=key)


@pytest.mark.parametrize("sizes", [(3, 0, 4), (0, 0, 2), (7, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("rows", [None, bias_by_blocks, bias_by_gather])
def test_a_grouped_bias_is_added_to_the_rows_of_its_expert_only(sizes, rows):
    x_NF, bias_EF = draw(7, 4), draw(3, 4, seed=1)
    by_rows = lambda x, bias, sizes: x + rows(bias, sizes, 7)
    add = jax.jit(by_rows if rows else lambda x, bias, sizes: GroupedProducts(sizes).add(x, bias, "EF"))
    pulled, pull = jax.vjp(lambda x, bias: add(x, bias, jnp.array(sizes, jnp.int32)), x_NF, bias_EF)
    owner_N = np.repeat(range(3), sizes)
    np.testing.assert_allclose(pulled[: len(owner_N)], x_NF[: len(owner_N)] + bias_EF[owner_N], rtol=1e-6)
    np.testing.assert_array_equal(pulled[len(owner_N):], x_NF[len(owner_N):])
    d_NF = draw(7, 4, seed=2)
    d_x, d_bias = pull(jnp.asarray(d_NF))
    np.testing.assert_array_equal(d_x, d_NF)
    wanted = [d_NF[: len(owner_N)][owner_N == e].sum(0) for e in range(3)]
    np.testing.assert_allclose(d_bias, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [bias_by_blocks, bias_by_gather])
def test_the_gradient_of_a_bf16_bias_is_summed_in_fp32(rows):
    # 1000 ones: bf16 sums stop at 256.
    sizes, bias_EF = jnp.array([1000, 0]), jnp.zeros((2, 3), jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda bias: jnp.sum(rows(bias, sizes, 1000))))(bias_EF)
    np.testing.assert_array_equal(gradient.astype(jnp.float32), [[1000] * 3, [0] * 3])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["gelu_exact", "swiglu_clamped", "swiglu_linear"])
def test_the_dense_ffn_takes_the_same_names(name, bias):
    with jax.set_mesh(tiny.ONE):
        mlp = MLP(WIDTH, HIDDEN, name, 1.0, nnx.Rngs(params=0), bias)
        weights = {key: weight[0] for key, weight in drawn_weights(name, bias).items()}
        for key, weight in weights.items():
            parameter = getattr(mlp, key.replace("_E", "_"))
            assert parameter[...].shape == weight.shape
            parameter[...] = weight
        graph, state = nnx.split(mlp)
        assert len(jax.tree.leaves(state)) == len(weights)
        x_BSD, r_BSD = draw(2, 3, WIDTH, seed=20), draw(2, 3, WIDTH, seed=21)
        run = jax.jit(jax.value_and_grad(lambda state, x: jnp.sum(nnx.merge(graph, state)(x) * r_BSD), argnums=(0, 1)))
        value, (d_state, d_BSD) = run(state, x_BSD)
    first = {key: weight[None] for key, weight in weights.items()}
    loss = lambda a: np.sum(numpy_ffn(name, a, 0, a["x"].reshape(6, WIDTH)) * r_BSD.reshape(6, WIDTH))
    exact = doubles({**first, "x": x_BSD})
    np.testing.assert_allclose(value, loss(exact), rtol=1e-4)
    wanted = differences(loss, exact)
    np.testing.assert_allclose(d_BSD, wanted.pop("x"), rtol=1e-4, atol=1e-4)
    for key in weights:
        found = d_state[key.replace("_E", "_")][...]
        np.testing.assert_allclose(found, wanted[key][0], rtol=1e-4, atol=1e-4, err_msg=key)


def test_gpt_oss_weights_are_split_by_columns_in_turn():
    """An expert on GPT-OSS's own layout, gate and linear columns in turn, by its own formula."""
    gate_up_EDI, bias_EI = draw(2, 3, 8, seed=1, scale=3.0), draw(2, 8, seed=2)
    down_EFD, down_bias_ED, x_ETD = draw(2, 4, 3, seed=3), draw(2, 3, seed=4), draw(2, 5, 3, seed=5)
    (w_gate, w_in), (b_gate, b_in) = split_interleaved(gate_up_EDI), split_interleaved(bias_EI)
    experts = Experts(2, 3, 4, "swiglu_clamped", 1.0, nnx.Rngs(params=0), bias=True)
    weights = {"w_gate_EDF": w_gate, "w_in_EDF": w_in, "w_out_EFD": down_EFD, "b_gate_EF": b_gate, "b_in_EF": b_in,
               "b_out_ED": down_bias_ED}
    y_ETD = experts.function(BatchedProducts(), jax.tree.map(jnp.asarray, weights), jnp.asarray(x_ETD))
    h_ETI = np.einsum("etd,edi->eti", x_ETD.astype(np.float64), gate_up_EDI) + bias_EI[:, None]
    gate, up = np.minimum(h_ETI[..., 0::2], 7), np.clip(h_ETI[..., 1::2], -7, 7)
    wanted = np.einsum("etf,efd->etd", (up + 1) * gate * sigmoid(1.702 * gate), down_EFD) + down_bias_ED[:, None]
    np.testing.assert_allclose(y_ETD, wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(interleaved(w_gate, w_in), gate_up_EDI)
    np.testing.assert_array_equal(interleaved(b_gate, b_in), bias_EI)


def test_experts_compute_in_the_dtype_of_their_input():
    with jax.set_mesh(tiny.ONE):
        experts = Experts(NUM_EXPERTS, WIDTH, HIDDEN, "swiglu_clamped", 1.0, nnx.Rngs(params=0), bias=True)
        weights = jax.device_get(experts.weights(jnp.bfloat16))
    weights = jax.tree.map(jnp.asarray, weights)
    x = jnp.ones((7, WIDTH), jnp.bfloat16)
    assert experts.function(GroupedProducts(jnp.asarray(SIZES_E)), weights, x).dtype == jnp.bfloat16
    assert experts.function(BatchedProducts(), weights, x[None, :2].repeat(3, 0)).dtype == jnp.bfloat16


# Biases in the layer

BIASED = dict(moe_expert_bias=True, moe_activation="gelu", moe_num_shared_experts=1)


def with_biases(tree, seed=0):
    """The tree with its biases, which start at 0, drawn; every other leaf as it is."""
    rng = np.random.default_rng(seed)
    drawn = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: drawn(leaf) if path[-1].key.startswith("b_") else leaf, tree)


def layer_gradients(dispatch, factor=8.0):
    """(y, kept, gradients) of one layer with biases."""
    config = tiny.config(**BIASED)
    with jax.set_mesh(tiny.ONE):
        graph, state = nnx.split(MoELayer(config, nnx.Rngs(params=0)))
        state = with_biases(state.to_pure_dict())
        x_BSD, r_BSD = draw(2, 6, 16), draw(2, 6, 16, seed=1)

        def loss(state, x_BSD):
            y_BSD, statistics = nnx.merge(graph, state)(x_BSD, jnp.ones((2, 6), bool), RoutingMode(dispatch, factor),
                                                        jnp.zeros(4))
            return jnp.sum(y_BSD * r_BSD), (y_BSD, statistics.kept_GE)

        gradients, (y_BSD, kept_GE) = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, x_BSD)
        return jax.device_get((y_BSD, kept_GE, gradients)), state


@pytest.fixture(scope="module")
def reference_layer():
    return layer_gradients("reference")


@pytest.mark.parametrize("dispatch", ["gather", "einsum", "dropless"])
def test_every_dispatcher_gives_biases_their_value_and_gradient(dispatch, reference_layer):
    (wanted_y, _, wanted), _ = reference_layer
    (y_BSD, _, gradients), _ = layer_gradients(dispatch)
    np.testing.assert_allclose(y_BSD, wanted_y, rtol=1e-4, atol=1e-5)
    tiny.assert_close(gradients, wanted, rtol=1e-4, atol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in tiny.leaves(wanted).values())


def test_biases_of_the_layer_equal_numpy(reference_layer):
    (y_BSD, _, (d_state, _)), state = reference_layer
    state = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state)
    x_BSD, y_numpy = draw(2, 6, 16), np.zeros((2, 6, 16))
    experts, shared, d_out_ED = state["experts"], state["shared"], np.zeros((4, 16))
    for index in np.ndindex(2, 6):
        x = x_BSD[index].astype(np.float64)
        logits = x @ state["w_router_DE"]
        gate_E = np.exp(logits) / np.exp(logits).sum()
        for e in np.argsort(-logits)[:2]:
            h = gelu_tanh(x @ experts["w_in_EDF"][e] + experts["b_in_EF"][e])
            y_numpy[index] += gate_E[e] * (h @ experts["w_out_EFD"][e] + experts["b_out_ED"][e])
            d_out_ED[e] += gate_E[e] * draw(2, 6, 16, seed=1)[index]
        y_numpy[index] += gelu_tanh(x @ shared["w_in_DF"] + shared["b_in_F"]) @ shared["w_out_FD"] + shared["b_out_D"]
    np.testing.assert_allclose(y_BSD, y_numpy, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_state["experts"]["b_out_ED"], d_out_ED, rtol=1e-4, atol=1e-5)


def test_a_token_without_a_slot_gets_no_expert_bias():
    """One slot per expert; the others' buffers hold the biases' value of 0, which nobody reads."""
    (y_BSD, kept_GE, _), state = layer_gradients("gather", factor=1e-6)
    assert kept_GE.max() == 1
    config = tiny.config(**BIASED)
    with jax.set_mesh(tiny.ONE):
        graph, _ = nnx.split(MoELayer(config, nnx.Rngs(params=0)))
        nothing, _ = jax.jit(lambda state, x: nnx.merge(graph, state)(
            x, jnp.zeros((2, 6), bool), RoutingMode("gather", 1.0), jnp.zeros(4)))(state, draw(2, 6, 16))
    alone = np.isclose(y_BSD, nothing, rtol=1e-5, atol=1e-6).all(-1)
    # In each row at most four tokens have a slot, at least two have none and keep the shared expert alone.
    assert (alone.sum(-1) >= 2).all() and not alone.all()


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["gather", "dropless"])
def test_b09_b44_gradients_of_biases_and_residual_ffns_do_not_know_the_mesh(dispatch):
    config = tiny.config(
        model_num_layers=2, model_activation="swiglu_linear", model_scaled_attention=False, moe_dispatch=dispatch,
        moe_activation="swiglu_clamped", moe_expert_bias=True, moe_num_shared_experts=1, moe_residual_ffn="sequential")
    params, batch = with_biases(tiny.params(config)), tiny.batch(lengths=[16, 9, 16, 16, 3, 16, 16, 12])
    wanted, _ = tiny.grads(config, params, batch)
    found, _ = tiny.grads(config, params, batch, mesh=tiny.mesh(fsdp=2, expert=2, tensor=2))
    tiny.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


# The FFN beside the experts


def numpy_norm(norm, x):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + norm.epsilon) * np.asarray(norm.scale_D[...], np.float64)


def numpy_mlp(mlp, x):
    weight = lambda name: np.asarray(getattr(mlp, name)[...], np.float64)
    return (silu(x @ weight("w_gate_DF")) * (x @ weight("w_in_DF"))) @ weight("w_out_FD")


def layer_without_attention(residual):
    """A layer whose attention gives 0, with norms that are told apart by their scales."""
    layer = Layer(tiny.config(moe_residual_ffn=residual), LayerKind(True), nnx.Rngs(params=0))
    layer.attention.w_out_HdD[...] = jnp.zeros_like(layer.attention.w_out_HdD[...])
    layer.ffn_norm.scale_D[...] = 1 + 0.3 * draw(16, seed=7)
    if residual == "sequential":
        layer.residual_norm.scale_D[...] = 1 + 0.3 * draw(16, seed=8)
    return layer


@pytest.mark.parametrize("residual", ["none", "parallel", "sequential"])
def test_a_residual_ffn_is_parallel_to_the_experts_or_follows_them(residual):
    x_BSD, ones_BS = draw(2, 6, 16), np.ones((2, 6), np.int32)
    with jax.set_mesh(tiny.ONE):
        layer = layer_without_attention(residual)
        inputs = Inputs(ones_BS, np.tile(np.arange(6), (2, 1)), np.ones((2, 6, 6), bool), ones_BS > 0, ones_BS)
        found = jax.jit(lambda x: layer(x, inputs, tiny.DROPLESS, None, jnp.zeros(4), None)[0])(x_BSD)
    x = x_BSD.astype(np.float64)
    normed = numpy_norm(layer.ffn_norm, x)
    if residual == "none":
        assert not hasattr(layer, "residual")
        wanted = x + numpy_layer(layer.moe, normed)
    elif residual == "parallel":
        wanted = x + numpy_layer(layer.moe, normed) + numpy_mlp(layer.residual, normed)
    else:
        x = x + numpy_layer(layer.moe, normed)
        wanted = x + numpy_mlp(layer.residual, numpy_norm(layer.residual_norm, x))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("residual", ["parallel", "sequential"])
def test_where_experts_give_nothing_the_residual_ffn_makes_the_layer_a_dense_one(residual):
    """Also in the scan over layers; the FFN has the width and the activation of the dense layers."""
    config = tiny.config(moe_residual_ffn=residual, moe_d_ff=8, moe_activation="relu", model_activation="geglu")
    params, batch = tiny.params(config), tiny.batch()
    dense = tiny.config(moe_num_experts=0, model_activation="geglu", model_num_layers=4)
    dense_params = tiny.params(dense)
    moe_layer = params["body"]["layers"][1]
    moe_layer["moe"]["experts"]["w_out_EFD"] = np.zeros_like(moe_layer["moe"]["experts"]["w_out_EFD"])
    # [2 repeats of (dense, MoE)] -> [4 repeats of (dense)], layers in order.
    pairs = {"mlp": "residual", "ffn_norm": "residual_norm" if residual == "sequential" else "ffn_norm"}
    dense_params["body"]["layers"][0] = {
        name: jax.tree.map(lambda even, odd: np.stack([even[0], odd[0], even[1], odd[1]]),
                           params["body"]["layers"][0][name], moe_layer[pairs.get(name, name)])
        for name in dense_params["body"]["layers"][0]}
    for name in ("embedding", "final_norm"):
        dense_params[name] = params[name]
    np.testing.assert_allclose(tiny.logits(config, params, batch), tiny.logits(dense, dense_params, batch), rtol=1e-4,
                               atol=1e-5)


def test_a_parallel_ffn_beside_shared_experts_is_refused():
    with pytest.raises(ConfigError, match="moe.residual_ffn='parallel'.*moe.num_shared_experts=1"):
        tiny.config(moe_residual_ffn="parallel", moe_num_shared_experts=1)
    tiny.config(moe_residual_ffn="sequential", moe_num_shared_experts=1)
    with pytest.raises(ConfigError, match="moe.residual_ffn='sequentil'.*Did you mean 'sequential'"):
        tiny.config(moe_residual_ffn="sequentil")
