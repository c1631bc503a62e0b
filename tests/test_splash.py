"""Attention by the kernel: held to the plain one in value and gradient, step by step on CPUs (``interpret``).

Compiled for TPUs: ``test_compiled_plan.py``.
"""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from moe_jax.config import AttentionConfig, ConfigError, LayerAttention, ModelConfig, resolve
from moe_jax.nn import attention, splash
from moe_jax.nn.attention import uses_splash
from moe_jax.sharding import ACTIVATIONS, spec

IN_STEPS = functools.partial(splash.splash, interpret=True)


@pytest.mark.parametrize("shape, sizes", [
    # B, S, H, H_kv, d: heads shared four to one; blocks that are wholly hidden.
    ((2, 256, 4, 1, 64), {}),
    # Sequences over data, heads over tensor: two query heads and one key/value head on each device.
    ((2, 128, 4, 2, 128), {"data": 2, "tensor": 2}),
])
def test_the_kernel_is_the_plain_one(shape, sizes):
    """Packed documents and padding: outputs where there is a token, and the gradients of queries, keys and values."""
    batch, length, heads, kv_heads, head = shape
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(batch, length, heads, head)), jnp.float32)
    query, key, value = draw(heads), draw(kv_heads), draw(kv_heads)
    segments_BS = np.sort(rng.integers(1, 4, (batch, length)), axis=1).astype(np.int32)
    segments_BS[1, -20:] = 0
    valid_BS = segments_BS > 0
    d_out = draw(heads) * valid_BS[:, :, None, None]
    same_BST = segments_BS[:, :, None] == segments_BS[:, None, :]
    mask_BST = same_BST & np.tril(np.ones((length, length), bool)) & valid_BS[:, :, None]

    def result(attend, mesh):
        def loss(query, key, value):
            out = attend(query, key, value)
            return jnp.sum(out * d_out), out

        with jax.set_mesh(mesh):
            (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
        return [np.asarray(out) * valid_BS[:, :, None, None], *map(np.asarray, grads)]

    plain = result(lambda q, k, v: attention.attend(q, k, v, mask_BST, head**-0.5), tiny.ONE)
    kernel = result(lambda q, k, v: IN_STEPS(q, k, v, jnp.asarray(segments_BS), head**-0.5), tiny.mesh(**sizes))
    for one, other in zip(plain, kernel):
        assert np.abs(one).max() > 0.1
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("window, value, sizes", [(100, 64, {}), (0, 128, {"data": 2, "tensor": 2})])
def test_the_kernel_is_the_plain_one_in_windows_with_sinks_and_values_of_another_width(window, value, sizes):
    """Gradients of the sinks too, which every device has a part of."""
    length, heads, kv_heads, head = 128, 4, 2, 64
    rng = np.random.default_rng(0)
    draw = lambda heads, width: jnp.asarray(rng.normal(size=(2, length, heads, width)), jnp.float32)
    given = draw(heads, head), draw(kv_heads, head), draw(kv_heads, value), jnp.asarray(rng.normal(size=heads), jnp.float32)
    segments_BS = np.sort(rng.integers(1, 3, (2, length)), axis=1).astype(np.int32)
    distance_ST = np.arange(length)[:, None] - np.arange(length)[None]
    mask_BST = (segments_BS[:, :, None] == segments_BS[:, None, :]) & (distance_ST >= 0) & (distance_ST < (window or length))
    d_out = draw(heads, value)

    def result(attend, mesh):
        def loss(query, key, value, sink_H):
            out = attend(query, key, value, sink_H)
            return jnp.sum(out * d_out), out

        with jax.set_mesh(mesh):
            (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*given)
        return [np.asarray(out), *map(np.asarray, grads)]

    plain = result(lambda q, k, v, sink: attention.attend(q, k, v, mask_BST, head**-0.5, sink), tiny.ONE)
    kernel = result(lambda q, k, v, sink: IN_STEPS(q, k, v, jnp.asarray(segments_BS), head**-0.5, window=window, sink_H=sink),
                    tiny.mesh(**sizes))
    for one, other in zip(plain, kernel):
        assert np.abs(one).max() > 0.1
        np.testing.assert_allclose(one, other, atol=5e-5)


def test_a_model_gives_the_same_logits_and_gradients_by_the_kernel(monkeypatch):
    """A layer that is recomputed; a row of two documents with padding behind."""
    settings = dict(model_num_layers=1, model_head_dim=64, model_num_heads=1, model_num_kv_heads=1, model_remat="block",
                    moe_num_experts=0, data_sequence_length=128, data_batch_size=1)
    config, batch, calls = tiny.config(**settings), tiny.batch(rows=1, length=128, lengths=[70], segments=2), []
    params = tiny.params(config)
    plain = tiny.grads(config, params, batch)

    def counted(*arguments, **options):
        calls.append(arguments)
        return IN_STEPS(*arguments, **options)

    monkeypatch.setattr(attention, "lowering_platform", lambda: "tpu")
    monkeypatch.setattr(attention, "splash", counted)
    kernel = tiny.grads(tiny.config(**settings, model_attention="splash"), params, batch)
    assert calls
    for one, other in zip(*map(jax.tree.leaves, (plain, kernel))):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_prompts_are_read_by_it_into_a_cache_and_single_tokens_written_by_the_plain_one(monkeypatch):
    config = ModelConfig(d_model=8, num_heads=2, num_kv_heads=1, head_dim=64, init_scale=1.0)
    x_BSD = jnp.asarray(np.random.default_rng(0).normal(size=(1, 129, 8)), jnp.float32)
    positions_BS, segments_BS = jnp.arange(129)[None], jnp.ones((1, 129), jnp.int32)
    causal_ST = np.tril(np.ones((129, 129), bool))[None]
    monkeypatch.setattr(attention, "lowering_platform", lambda: "tpu")
    monkeypatch.setattr(attention, "splash", IN_STEPS)

    def read(x_BSD):
        module = attention.Attention(config, nnx.Rngs(params=0))
        empty = tuple(jax.reshard(jnp.zeros((1, 129, 1, 64)), spec("BSHd", ACTIVATIONS)) for _ in range(2))
        whole_BSD, _ = module(x_BSD, positions_BS, causal_ST)
        prompt_BSD, cache = module(x_BSD[:, :128], positions_BS[:, :128], causal_ST[:, :128], empty, 0, segments_BS[:, :128])
        last_BSD, _ = module(x_BSD[:, 128:], positions_BS[:, 128:], causal_ST[:, 128:], cache, 128)
        return whole_BSD, prompt_BSD, last_BSD

    with jax.set_mesh(tiny.ONE):
        whole_BSD, prompt_BSD, last_BSD = jax.jit(read)(x_BSD)
    np.testing.assert_allclose(whole_BSD, np.concatenate([prompt_BSD, last_BSD], axis=1), atol=2e-5)


def test_auto_takes_it_where_it_can_and_splash_says_why_it_cannot(monkeypatch):
    def uses(length=256, required=True, **settings):
        return uses_splash(resolve({"model": settings}).model, length, required)

    with jax.set_mesh(tiny.ONE):
        assert not uses(head_dim=64)
        with pytest.raises(ConfigError, match="attention='splash': it runs on tpu, and this program is compiled for cpu"):
            uses(head_dim=64, attention="splash")
    monkeypatch.setattr(attention, "lowering_platform", lambda: "tpu")
    assert uses(head_dim=64) and uses(head_dim=128, attention="splash") and not uses(head_dim=64, attention="plain")
    assert not uses(head_dim=32) and not uses(length=200, head_dim=64)
    with pytest.raises(ConfigError, match="multiples of 128, and this one is 200"):
        uses(length=200, head_dim=64, attention="splash")
    with pytest.raises(ConfigError, match="multiple of 64, and model.head_dim is 96"):
        uses(head_dim=96, attention="splash")
    # Prompts have any length: those that it does not take are read by the plain one.
    assert not uses(length=16, head_dim=64, attention="splash", required=False)


def test_layers_that_it_does_not_compute_are_left_to_the_plain_one(monkeypatch):
    monkeypatch.setattr(attention, "lowering_platform", lambda: "tpu")

    def uses(implementation="splash", span="full", **settings):
        return uses_splash(ModelConfig(head_dim=64, attention=implementation), 256, True, AttentionConfig(**settings),
                           LayerAttention(span))

    assert uses(sinks=True, bias="all", qk_norm="head") and uses(span="sliding", layers="sliding", window=100)
    latent = dict(kind="latent", latent_rank=8, rope_dim=8)
    assert uses(**latent, value_dim=128) and not uses("auto", **latent, value_dim=24)
    with pytest.raises(ConfigError, match="values whose width is a multiple of 64, and attention.value_dim is 24"):
        uses(**latent, value_dim=24)
    assert not uses("auto", "chunked", layers="chunked", chunk=8)
    with pytest.raises(ConfigError, match="counts places in a row, and the chunks of attention.layers are of positions"):
        uses("splash", "chunked", layers="chunked", chunk=8)
    with pytest.raises(ConfigError, match="adds nothing to scores, and attention.positions is 'relative'"):
        uses(positions="relative")


def test_where_padding_matters_it_is_refused_and_auto_is_plain():
    with pytest.raises(ConfigError, match="model.attention='splash': sees padding otherwise.*moe.padding='routed'"):
        resolve({"model": {"attention": "splash"}, "moe": {"padding": "routed"}})
    with pytest.raises(ConfigError, match="model.attention='flash': allowed are 'auto', 'plain', 'splash'"):
        resolve({"model": {"attention": "flash"}})


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install '.[tpu]')")
def test_compiled_for_a_tpu_it_computes_the_blocks_of_the_window():
    script = pathlib.Path(__file__).resolve().with_name("splash_tpu.py")
    environment = os.environ | dict(
        TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE="v5litepod-4",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_LOG_DIR="disabled", TPU_MIN_LOG_LEVEL="3", JAX_PLATFORMS="cpu",
        PYTHONPATH=str(script.parents[1]))
    done = subprocess.run([sys.executable, script, "v5e:2x2"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    # Two sequences and two heads on a device; 1,024 tokens are two blocks, of which a window of 600 hides one of four. Forward
    # and backward two, three and four products of a pair of blocks, of the width of queries (192) or of values (64).
    pairs, widths = 2 * 2 * 3 * 512 * 512, (192 + 64) + (2 * 192 + 64) + (2 * 192 + 2 * 64)
    assert int(done.stdout.splitlines()[-1]) == 2 * pairs * widths
