"""Options of the model beside attention and experts: norms, biases, embeddings; against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from numpy_attention import attention_layer

from moe_jax.nn.norms import LayerNorm
from moe_jax.training.optimizer import _decayed


def layer_norm(x, scale, bias, epsilon):
    """(x - mean) / sqrt(variance + epsilon) · scale + bias."""
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * scale + bias


def test_a_layer_norm_takes_the_mean_off_and_adds_its_bias():
    x = np.random.default_rng(0).normal(2.0, 3.0, size=(2, 5, 8)).astype(np.float32)
    norm = LayerNorm(8, 0.1)
    norm.scale_D[...], norm.bias_D[...] = jnp.linspace(0.5, 2, 8), jnp.linspace(-1, 1, 8)
    wanted = layer_norm(x.astype(np.float64), np.linspace(0.5, 2, 8), np.linspace(-1, 1, 8), 0.1)
    np.testing.assert_allclose(norm(jnp.asarray(x)), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled logits", "logits as they are"])
def test_layer_norms_biases_and_a_scaled_table_are_those_in_numpy(scaled):
    """A dense model of one layer, whole: NLLB's options, and a tied table."""
    config = tiny.config(model_num_layers=1, model_num_kv_heads=4, model_norm="layer", model_mlp_bias=True, model_activation="relu",
                         model_embedding_scale=True, model_tie_embedding=True, model_scaled_tied_logits=scaled,
                         attention_bias="all", moe_num_experts=0)
    rng, batch = np.random.default_rng(0), tiny.batch(rows=1, length=6)
    params = jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), tiny.params(config))
    # Layers that are scanned over are stacked; here there is one.
    body = {name.removeprefix("layers.0."): leaf[0].astype(np.float64) for name, leaf in tiny.leaves(params["body"]).items()}
    table_VD = params["embedding"]["embedding_VD"].astype(np.float64)
    norm = lambda x, name, of=body: layer_norm(x, of[f"{name}.scale_D"], of[f"{name}.bias_D"], config.model.norm_epsilon)

    x_SD = table_VD[batch["input_ids"][0]] * 4.0  # √16
    attention = {name.removeprefix("attention."): leaf for name, leaf in body.items() if name.startswith("attention.")}
    x_SD = x_SD + attention_layer(attention, config.model, config.attention, config.attention_layers[0],
                                  norm(x_SD, "attention_norm"), batch["positions"][0], batch["segment_ids"][0])
    hidden_SF = np.maximum(norm(x_SD, "ffn_norm") @ body["mlp.w_in_DF"] + body["mlp.b_in_F"], 0)
    x_SD = x_SD + hidden_SF @ body["mlp.w_out_FD"] + body["mlp.b_out_D"]
    last = {f"final_norm.{name}": np.asarray(leaf, np.float64) for name, leaf in params["final_norm"].items()}
    wanted = norm(x_SD, "final_norm", last) @ table_VD.T * (0.25 if scaled else 1.0)
    np.testing.assert_allclose(tiny.logits(config, params, batch)[0], wanted, rtol=1e-4, atol=1e-4)


def test_weight_decay_spares_norms_biases_and_sinks():
    names = ["scale_D", "scale_Hd", "bias_D", "b_query_Hd", "sink_H", "w_query_DHd", "w_latent_DR", "embedding_VD"]
    assert {name for name, decays in _decayed(dict.fromkeys(names, 0)).items() if decays} == set(names[5:])
