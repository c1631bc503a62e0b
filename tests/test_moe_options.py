"""A router with a bias, shared experts of their own width and with a gate, limits of the clamped SwiGLU: one layer against
NumPy in fp64, in value and gradient; and the model on a mesh against one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from test_experts import differences, doubles, draw, sigmoid, with_biases

from moe_jax.config import ConfigError
from moe_jax.nn.moe import MoELayer, RoutingMode
from moe_jax.sharding import parameter_spec

# Widths small enough for central differences of every number. The limit cuts a good share of gates and linear branches.
LIMIT, ALPHA = 0.8, 1.3
WIDTHS = dict(model_d_model=6, model_num_heads=1, model_num_kv_heads=1, model_head_dim=4, moe_d_ff=4, moe_router_init=1.0)
CASES = {
    "gpt_oss": dict(moe_router_bias=True, moe_expert_bias=True, moe_gate_order="top_k_then_softmax",
                    moe_activation="swiglu_clamped", moe_activation_limit=LIMIT, moe_activation_alpha=ALPHA),
    "qwen2_moe": dict(moe_num_shared_experts=1, moe_shared_d_ff=7, moe_shared_gate=True),
    "all": dict(moe_router_bias=True, moe_num_shared_experts=2, moe_shared_d_ff=3, moe_shared_gate=True, moe_score="sigmoid",
                moe_renormalize=True, moe_activation="swiglu_clamped", moe_activation_limit=LIMIT, moe_activation_alpha=ALPHA),
}


def numpy_ffn(moe, x, w, expert=None):
    """One network: an expert's, or the shared ones'; biases where there are any."""
    letters = ("EF", "ED", "EDF", "EFD") if expert is not None else ("F", "D", "DF", "FD")
    take = lambda name, letters: w[f"{name}_{letters}"] if expert is None else w[f"{name}_{letters}"][expert]
    bias = lambda name, letters: take(name, letters) if f"{name}_{letters}" in w else 0.0
    gate, linear = (x @ take(f"w_{branch}", letters[2]) + bias(f"b_{branch}", letters[0]) for branch in ("gate", "in"))
    if moe.activation == "swiglu_clamped":
        gate, linear = np.minimum(gate, moe.activation_limit), np.clip(linear, -moe.activation_limit, moe.activation_limit)
        hidden = (linear + 1) * gate * sigmoid(moe.activation_alpha * gate)
    else:
        hidden = gate * sigmoid(gate) * linear
    return hidden @ take("w_out", letters[3]) + bias("b_out", letters[1])


def numpy_layer(moe, a, x_ND):
    """Row by row; ``a``: the layer's parameters by name, those of its networks by 'experts.…' and 'shared.…'."""
    networks = {kind: {name.split(".")[1]: w for name, w in a.items() if name.startswith(kind)} for kind in ("experts", "shared")}
    y_ND = np.zeros(x_ND.shape)
    for row, x in enumerate(x_ND):
        logits = x @ a["w_router_DE"] + a.get("b_router_E", 0.0)
        chosen = np.argsort(-logits, kind="stable")[:moe.experts_per_token]
        if moe.score == "sigmoid":
            gates = sigmoid(logits)[chosen]
            gates = gates / gates.sum()
        elif moe.gate_order == "top_k_then_softmax":
            gates = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
        else:
            gates = np.exp(logits[chosen]) / np.exp(logits).sum()
        for gate, e in zip(gates, chosen):
            y_ND[row] += gate * numpy_ffn(moe, x, networks["experts"], e)
        if moe.num_shared_experts:
            y_ND[row] += sigmoid(x @ a["w_shared_gate_D"]) * numpy_ffn(moe, x, networks["shared"])
    return y_ND


@pytest.mark.parametrize("dispatch", ["gather", "dropless"])
@pytest.mark.parametrize("case", CASES)
def test_the_layer_and_its_gradient_are_those_of_numpy(case, dispatch):
    config = tiny.config(**WIDTHS, **CASES[case])
    with jax.set_mesh(tiny.ONE):
        graph, state = nnx.split(MoELayer(config, nnx.Rngs(params=0)))
        state = with_biases(state.to_pure_dict(), seed=3)
        x_BSD, r_BSD = draw(2, 4, 6, seed=1), draw(2, 4, 6, seed=2)

        def loss(state, x_BSD):
            y_BSD, _ = nnx.merge(graph, state)(x_BSD, jnp.ones((2, 4), bool), RoutingMode(dispatch, 8.0), jnp.zeros(4))
            return jnp.sum(y_BSD * r_BSD), y_BSD

        (_, y_BSD), (d_state, d_BSD) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(state, x_BSD)
    exact = doubles({**tiny.leaves(state), "x": x_BSD.reshape(8, 6)})
    np.testing.assert_allclose(y_BSD.reshape(8, 6), numpy_layer(config.moe, exact, exact["x"]), rtol=1e-4, atol=1e-5)
    wanted = differences(lambda a: np.sum(numpy_layer(config.moe, a, a["x"]) * r_BSD.reshape(8, 6)), exact)
    np.testing.assert_allclose(d_BSD.reshape(8, 6), wanted.pop("x"), rtol=1e-3, atol=1e-4)
    found = tiny.leaves(d_state)
    assert found.keys() == wanted.keys()
    for name, slope in wanted.items():
        np.testing.assert_allclose(found[name], slope, rtol=1e-3, atol=1e-4, err_msg=name)
        assert np.abs(slope).max() > 1e-3, name


def test_the_limit_of_the_clamped_swiglu_acts_in_these_cases():
    """Without it the comparison above would say nothing of it."""
    config = tiny.config(**WIDTHS, **CASES["gpt_oss"])
    with jax.set_mesh(tiny.ONE):
        weights = doubles(tiny.leaves(with_biases(nnx.split(MoELayer(config, nnx.Rngs(params=0)))[1].to_pure_dict(), seed=3)))
    x_ND = draw(8, 6, seed=1)
    unlimited = tiny.config(**WIDTHS, **{**CASES["gpt_oss"], "moe_activation_limit": 1e3})
    assert np.abs(numpy_layer(config.moe, weights, x_ND) - numpy_layer(unlimited.moe, weights, x_ND)).max() > 0.05


def test_a_routers_bias_is_in_what_its_losses_see():
    """With weights of 0 the logits are the bias alone: z loss log² Σ e^b, and the K largest are chosen by every token."""
    config = tiny.config(moe_router_bias=True)
    with jax.set_mesh(tiny.ONE):
        module = MoELayer(config, nnx.Rngs(params=0))
        module.w_router_DE[...], module.b_router_E[...] = jnp.zeros((16, 4)), jnp.asarray([0.5, -1.0, 2.0, 0.0])
        graph, state = nnx.split(module)
        run = jax.jit(lambda state, x: nnx.merge(graph, state)(x, jnp.ones((1, 6), bool), RoutingMode.dropless(), jnp.zeros(4)))
        _, statistics = run(state, draw(1, 6, 16))
    b_E = np.array([0.5, -1.0, 2.0, 0.0])
    router = jax.device_get(statistics.router)
    np.testing.assert_allclose(router.logsumexp_squared, 6 * np.log(np.exp(b_E).sum()) ** 2, rtol=1e-5)
    np.testing.assert_allclose(router.probability_E, 6 * np.exp(b_E)[None] / np.exp(b_E).sum(), rtol=1e-5)
    np.testing.assert_array_equal(router.choices_E, [[6, 0, 6, 0]])


def test_the_defaults_add_no_parameter():
    """Checkpoints of runs before these options load as they are."""
    with jax.set_mesh(tiny.ONE):
        plain = MoELayer(tiny.config(moe_num_shared_experts=2), nnx.Rngs(params=0))
        names = set(tiny.leaves(nnx.split(plain)[1].to_pure_dict()))
        assert names == {"w_router_DE", *(f"experts.w_{n}" for n in ("gate_EDF", "in_EDF", "out_EFD")),
                         *(f"shared.w_{n}" for n in ("gate_DF", "in_DF", "out_FD"))}
        gated = MoELayer(tiny.config(moe_num_shared_experts=2, moe_shared_gate=True, moe_router_bias=True), nnx.Rngs(params=0))
        assert set(tiny.leaves(nnx.split(gated)[1].to_pure_dict())) - names == {"w_shared_gate_D", "b_router_E"}
    assert parameter_spec("b_router_E", 1) == parameter_spec("w_shared_gate_D", 2) == jax.P()


MESH_OPTIONS = dict(model_num_layers=2, moe_dispatch="dropless", moe_router_bias=True, moe_num_shared_experts=1,
                    moe_shared_d_ff=24, moe_shared_gate=True, moe_activation="swiglu_clamped", moe_activation_limit=1.0)


@pytest.mark.slow
def test_the_gradients_do_not_know_the_mesh():
    config = tiny.config(**MESH_OPTIONS)
    params, batch = with_biases(tiny.params(config)), tiny.batch(lengths=[16, 9, 16, 16, 3, 16, 16, 12])
    wanted, _ = tiny.grads(config, params, batch)
    found, _ = tiny.grads(config, params, batch, mesh=tiny.mesh(fsdp=2, expert=2, tensor=2))
    tiny.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert all(np.abs(leaf).max() > 0 for name, leaf in tiny.leaves(wanted).items() if "router" in name or "shared" in name)


# What could not act is refused.


@pytest.mark.parametrize("settings, words", [
    (dict(moe_shared_d_ff=8), r"moe.shared_d_ff=8: has no effect without moe.num_shared_experts above 0"),
    (dict(moe_shared_gate=True), r"moe.shared_gate=True: has no effect without moe.num_shared_experts above 0"),
    (dict(moe_activation_limit=3.0), r"moe.activation_limit=3.0: is read by moe.activation='swiglu_clamped' only"),
    (dict(moe_activation_alpha=1.0), r"moe.activation_alpha=1.0: is read by moe.activation='swiglu_clamped' only"),
    (dict(moe_activation="swiglu_clamped", moe_activation_limit=0.0), r"moe.activation_limit=0.0: must be above 0"),
    (dict(moe_router="hash", moe_experts_per_token=1, moe_router_bias=True),
     r"moe.router_bias=True: .* moe.router='hash' has none"),
])
def test_options_that_could_not_act_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        tiny.config(**settings)
