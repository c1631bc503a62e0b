"""Every variant of attention: a layer against NumPy in value and gradient; prompts and single tokens against the whole text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from attention_variants import VARIANTS
from flax import nnx
from jax.sharding import NamedSharding
from numpy_attention import attention_layer
from token_by_token import by_steps_and_at_once

from moe_jax.inference.generate import lowered
from moe_jax.models.decoder import Decoder, attention_mask, limited_masks
from moe_jax.nn import cache as caches
from moe_jax.nn.attention import Attention
from moe_jax.nn.latent_attention import LatentAttention
from moe_jax.planning.formulas import estimate
from moe_jax.planning.operations import work
from moe_jax.planning.slices import parse_slice
from moe_jax.sharding import ACTIVATIONS, AXES, parameter_spec, spec
from moe_jax.training.state import initial_params

# Two documents and padding in a row of 16.
POSITIONS = np.array([*range(9), *range(5), 0, 0], np.int32)
DOCUMENTS = np.array([1] * 9 + [2] * 5 + [0] * 2, np.int32)

LAYERS = [(name, layer) for name, settings in VARIANTS.items()
          for layer in dict.fromkeys(tiny.config(**settings).attention.pattern)]
IDS = [f"{name}: {layer.span}{'' if layer.rotated else ', not rotated'}" for name, layer in LAYERS]


def drawn_layer(config, layer, seed=0):
    """The module's graph, and parameters none of which is 0 or 1."""
    kind = LatentAttention if config.attention.kind == "latent" else Attention
    graph, state = nnx.split(kind(config.model, nnx.Rngs(params=0), config.attention, layer))
    rng = np.random.default_rng(seed)
    return graph, jax.tree.map(lambda leaf: leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), state)


@functools.lru_cache(maxsize=None)
def computed(name, layer):
    """Output, output weighted at random, and that number's gradient by the input and the parameters; and by NumPy."""
    config, rng = tiny.config(**VARIANTS[name]), np.random.default_rng(1)
    x_SD, d_SD = rng.normal(size=(16, 16)), rng.normal(size=(16, 16)) * (DOCUMENTS > 0)[:, None]
    with jax.set_mesh(tiny.ONE):
        graph, state = drawn_layer(config, layer)
        one_row = tuple(jnp.asarray(a)[None] for a in (POSITIONS, DOCUMENTS, DOCUMENTS, DOCUMENTS > 0))
        mask_BST = limited_masks(config, *one_row).get(layer.span, attention_mask(*one_row[1:]))

        def value(state, x_SD):
            x_BSD = jax.reshard(x_SD[None], spec("BSD", ACTIVATIONS))
            y_SD = jax.reshard(nnx.merge(graph, state)(x_BSD, one_row[0], mask_BST)[0], jax.P())[0]
            return jnp.sum(y_SD * d_SD.astype(np.float32)), y_SD

        both = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True), compiler_options=tiny.QUICK)
        (_, y_SD), grads = both(state, jnp.asarray(x_SD, jnp.float32))
    flat = lambda tree: {key.removesuffix(".value"): np.asarray(leaf, np.float64) for key, leaf in tiny.leaves(tree).items()}
    parameters, gradients = flat(state), flat(grads[0]) | {"x": np.asarray(grads[1], np.float64)}

    def by_numpy(changes):
        changed = {key: value + changes.get(key, 0) for key, value in parameters.items()}
        return attention_layer(changed, config.model, config.attention, layer, x_SD + changes.get("x", 0), POSITIONS, DOCUMENTS)

    return np.asarray(y_SD), gradients, by_numpy, d_SD


@pytest.mark.parametrize("name, layer", LAYERS, ids=IDS)
def test_a_layer_is_the_one_in_numpy(name, layer):
    y_SD, _, by_numpy, _ = computed(name, layer)
    np.testing.assert_allclose(y_SD[DOCUMENTS > 0], by_numpy({})[DOCUMENTS > 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, layer", LAYERS, ids=IDS)
def test_its_gradient_is_that_of_differences(name, layer):
    """Along a random direction of every parameter."""
    _, gradients, by_numpy, d_SD = computed(name, layer)
    rng = np.random.default_rng(2)
    for key, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        step = 1e-4 * direction
        wanted = np.sum((by_numpy({key: step}) - by_numpy({key: -step})) * d_SD) / 2e-4
        np.testing.assert_allclose(np.sum(gradient * direction), wanted, rtol=2e-3, atol=2e-3, err_msg=key)
        # The key's bias (without a rotation) adds the same to all scores of a query, which changes nothing.
        assert np.abs(gradient).max() > 1e-4 or key == "b_key_Hd", key


# Prompts and single tokens

def model_config(name, **settings):
    """A dense model with each kind of layer of the variant."""
    pattern = tiny.config(**VARIANTS[name]).attention.pattern
    return tiny.config(model_num_layers=max(2, len(pattern)), moe_num_experts=0, **VARIANTS[name], **settings)


def drawn_params(config):
    """None of them 0 or 1, so that biases, sinks and norms act."""
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), tiny.params(config))


@pytest.mark.parametrize("name", VARIANTS)
def test_prompts_and_single_tokens_give_the_logits_of_the_whole_text(name):
    config = model_config(name)
    found, wanted = by_steps_and_at_once(config, drawn_params(config))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["OLMoE", "GPT-OSS", "Llama-4", "DeepSeek-V3"])
def test_eight_devices_compute_what_one_does(name):
    """Gradients of the loss, and single tokens behind prompts."""
    config, mesh = model_config(name, data_batch_size=8), tiny.mesh(data=2, fsdp=2, tensor=2)
    params, batch = drawn_params(config), tiny.batch(rows=8, length=16, lengths=[16, 9, 16, 3, 12, 16, 16, 5], segments=2)
    one, eight = (tiny.grads(config, params, batch, where)[0] for where in (tiny.ONE, mesh))
    tiny.assert_close(eight, one, rtol=1e-4, atol=1e-5)
    found, wanted = by_steps_and_at_once(config, params, mesh)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_a_call_of_several_tokens_behind_others_sees_what_the_ring_held():
    """Tokens 0 to 5, then 6 to 11, then one by one; index known to the program only as it runs."""
    config, x_BSD = tiny.config(**VARIANTS["Mixtral"]), jnp.asarray(np.random.default_rng(0).normal(size=(1, 14, 16)), jnp.float32)
    positions_BS, ones_BS = jnp.arange(14)[None], jnp.ones((1, 14), jnp.int32)

    def call(module, x_BSD, cache, index):
        index, length = jnp.asarray(index), x_BSD.shape[1]
        here = jax.lax.dynamic_slice_in_dim(positions_BS, index, length, 1)
        filled_BT = (positions_BS < index + length).astype(jnp.int32)
        mask = limited_masks(config, here, ones_BS[:, :length], filled_BT, here >= 0, index, True)["sliding"]
        return module(x_BSD, here, mask, cache, index)

    def run(x_BSD):
        module = Attention(config.model, nnx.Rngs(params=0), config.attention, config.attention.pattern[0])
        x_BSD = jax.reshard(x_BSD, spec("BSD", ACTIVATIONS))
        whole_BSD = module(x_BSD, positions_BS, limited_masks(config, positions_BS, ones_BS, ones_BS, ones_BS > 0)["sliding"])[0]
        cache, parts = module.empty_cache(1, 14), []
        assert cache[0].shape[1] == 5
        for start, end in ((0, 6), (6, 12), (12, 13), (13, 14)):
            y_BSD, cache = call(module, x_BSD[:, start:end], cache, start)
            parts.append(y_BSD)
        return whole_BSD, jnp.concatenate(parts, axis=1)

    with jax.set_mesh(tiny.ONE):
        whole_BSD, parts_BSD = jax.jit(run, compiler_options=tiny.QUICK)(x_BSD)
    np.testing.assert_allclose(parts_BSD, whole_BSD, atol=1e-5)


@pytest.mark.parametrize("length, index", [(1, 0), (3, 0), (6, 0), (1, 7), (3, 7), (6, 2)])
def test_the_tokens_named_are_those_whose_keys_are_shown(length, index):
    """A ring of four slots; a token's key is its number."""
    ring_BR = jnp.full((1, 4), -1.0)
    for token in range(index):
        ring_BR, _ = caches.written(ring_BR, jnp.full((1, 1), token), token, True)
    _, shown_BT = caches.written(ring_BR, index + jnp.arange(length)[None], index, True)
    np.testing.assert_array_equal(shown_BT[0], np.maximum(caches.shown_tokens(4, length, index), -1))


@pytest.mark.parametrize("name", ["plain", "Llama-4", "GPT-OSS", "DeepSeek-V3", "latents with biases and sinks, in windows and without positions"])
def test_a_cache_holds_what_the_planner_counts(name):
    """Windows and chunks no more than themselves, latents one vector and one key per token."""
    config = model_config(name, model_vocab_size=tiny.VOCAB, data_sequence_length=12, data_batch_size=4)
    with jax.set_mesh(tiny.ONE):
        cache = jax.eval_shape(lambda: Decoder(config, tiny.VOCAB, nnx.Rngs(0)).empty_cache(4, 12))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert estimate(config, parse_slice("v5e-1"), dict.fromkeys(AXES, 1), "decode").kv_cache_bytes == held
    per_token = 2 * 2 * config.model.head_dim if config.attention.kind == "heads" else 6 + 4
    if name in ("GPT-OSS", "latents with biases and sinks, in windows and without positions", "DeepSeek-V3"):
        slots = {"GPT-OSS": 4 + 12, "DeepSeek-V3": 12 + 12}.get(name, 3 + 5)
        assert held == 4 * slots * per_token * 4


@pytest.mark.parametrize("name", ["plain", "Mixtral", "GPT-OSS", "Llama-4", "DeepSeek-V2-Lite", "DeepSeek-V3"])
@pytest.mark.parametrize("step", ["prefill", "decode"])
def test_the_planner_counts_the_operations_of_the_compiled_program(name, step):
    """Products; on a CPU, where attention is the plain one: hidden scores are computed too."""
    config = model_config(name, model_vocab_size=tiny.VOCAB, data_sequence_length=64, data_batch_size=2)
    with jax.set_mesh(tiny.ONE):
        params = jax.eval_shape(lambda: initial_params(config, tiny.VOCAB, jax.random.key(0)))
        placed = jax.tree_util.tree_map_with_path(lambda path, leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(tiny.ONE, parameter_spec(path[-1].key, leaf.ndim))), params)
        bias_LE = jax.ShapeDtypeStruct((0, 1), jnp.float32)
        text = lowered(step, config, tiny.VOCAB, placed, bias_LE, 2, 64).compile(compiler_options=tiny.QUICK).as_text()
    wanted = estimate(config, parse_slice("v5e-1"), dict.fromkeys(AXES, 1), step).hardware_flops
    assert work(text).flops == pytest.approx(wanted, rel=0.02)
