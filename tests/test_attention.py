"""Attention, rotary positions and the norm against NumPy (against OpenMoE's own code: ``test_openmoe_oracles.py``)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import NamedSharding

from moe_jax.config import AttentionConfig, ModelConfig
from moe_jax.nn.attention import Attention
from moe_jax.nn.norms import RMSNorm
from moe_jax.nn.positions import rotate, scaled_frequencies
from moe_jax.sharding import ACTIVATIONS, spec


@pytest.fixture(autouse=True)
def one_device():
    with jax.set_mesh(tiny.ONE):
        yield


def attention(width=8, heads=4, kv_heads=2, head=6):
    config = ModelConfig(d_model=width, num_heads=heads, num_kv_heads=kv_heads, head_dim=head, init_scale=1.0)
    return Attention(config, nnx.Rngs(params=0))


def attend(module, x_BSD, mask_BST, positions_BS=None):
    if positions_BS is None:
        positions_BS = np.broadcast_to(np.arange(x_BSD.shape[1], dtype=np.int32), x_BSD.shape[:2])
    return np.asarray(jax.jit(lambda x: module(x, positions_BS, mask_BST)[0])(x_BSD))


def causal(batch, length):
    return np.broadcast_to(np.tril(np.ones((length, length), bool)), (batch, length, length))


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def numpy_rotate(x_Sd, position_S, theta=10_000.0):
    """Pair (i, i + d/2) turned by the angle position · theta^(-2i/d)."""
    half = x_Sd.shape[1] // 2
    out = np.zeros(x_Sd.shape)
    for s, position in enumerate(position_S):
        for i in range(half):
            angle = position * theta ** (-2 * i / x_Sd.shape[1])
            a, b = x_Sd[s, i], x_Sd[s, i + half]
            out[s, i] = a * np.cos(angle) - b * np.sin(angle)
            out[s, i + half] = a * np.sin(angle) + b * np.cos(angle)
    return out


def numpy_attention(module, x_BSD, mask_BST):
    """Query by query and head by head in fp64."""
    query_DHd, key_DHd, value_DHd, out_HdD = (np.asarray(w[...], np.float64) for w in (
        module.w_query_DHd, module.w_key_DHd, module.w_value_DHd, module.w_out_HdD))
    heads, per_kv = query_DHd.shape[1], query_DHd.shape[1] // key_DHd.shape[1]
    y_BSD = np.zeros(x_BSD.shape)
    for b, x_SD in enumerate(x_BSD.astype(np.float64)):
        position_S = np.arange(len(x_SD))
        for h in range(heads):
            query = numpy_rotate(x_SD @ query_DHd[:, h], position_S)
            key = numpy_rotate(x_SD @ key_DHd[:, h // per_kv], position_S)
            value = x_SD @ value_DHd[:, h // per_kv]
            for s in range(len(x_SD)):
                seen = np.flatnonzero(mask_BST[b, s])
                if len(seen):
                    score = query[s] @ key[seen].T / np.sqrt(query.shape[1])
                    weight = np.exp(score - score.max())
                    y_BSD[b, s] += (weight / weight.sum()) @ value[seen] @ out_HdD[h]
    return y_BSD


# RMSNorm


def test_rmsnorm_divides_by_the_root_mean_square_and_scales():
    norm = RMSNorm(2, epsilon=0.0)
    norm.scale_D[...] = jnp.array([1.0, 10.0])
    # rms(3, 4) = sqrt((9 + 16) / 2) = 3.535534; 3 / rms = 0.848528, 4 / rms · 10 = 11.313708
    np.testing.assert_allclose(norm(jnp.array([[3.0, 4.0]])), [[0.848528, 11.313708]], rtol=1e-6)


def test_rmsnorm_of_zeros_is_zero():
    np.testing.assert_array_equal(RMSNorm(4, 1e-6)(jnp.zeros((2, 4))), 0.0)


def test_rmsnorm_computes_in_fp32_and_returns_the_dtype_it_got():
    # 300² = 90000 and eight of them are far beyond what fp16 can hold; bf16 has too few digits for the mean.
    x = (300 + jnp.arange(8.0)).astype(jnp.float16)[None]
    y = RMSNorm(8, 1e-6)(x)
    assert y.dtype == jnp.float16
    expected = np.asarray(x, np.float64) / np.sqrt(np.mean(np.asarray(x, np.float64) ** 2))
    np.testing.assert_allclose(y, expected, rtol=1e-3)


# Rotary positions


def test_rotate_turns_pairs_half_a_head_apart():
    x_BSHd = draw(1, 5, 1, 6)
    position_S = np.array([0, 1, 2, 7, 100])
    expected = numpy_rotate(x_BSHd[0, :, 0], position_S)
    actual = rotate(jnp.asarray(x_BSHd), jnp.asarray(position_S)[None], 10_000.0)[0, :, 0]
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_rotate_by_hand():
    # d = 4: pairs (0, 2) with frequency 1 and (1, 3) with frequency 100^(-1/2) = 0.1; position 2 -> angles 2 and 0.2.
    y = rotate(jnp.array([1.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4), jnp.array([[2]]), 100.0).reshape(4)
    np.testing.assert_allclose(y, [np.cos(2), np.cos(0.2), np.sin(2), np.sin(0.2)], rtol=1e-6)


def test_rotated_products_depend_on_the_distance_only():
    query, key = jnp.asarray(draw(1, 1, 1, 8)), jnp.asarray(draw(1, 1, 1, 8, seed=1))

    def score(query_position, key_position):
        turned = (rotate(query, jnp.array([[query_position]]), 100.0), rotate(key, jnp.array([[key_position]]), 100.0))
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(3, 1) == pytest.approx(score(103, 101), abs=1e-4)
    assert abs(score(3, 1) - score(4, 1)) > 1e-2


def test_rotate_keeps_angles_in_fp32_for_bf16_inputs():
    # In bf16 position 1001 would be rounded to 1000, one radian away.
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    y = rotate(x, jnp.array([[1001]]), 10_000.0)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32).reshape(2),
                               [np.cos(1001) - np.sin(1001), np.cos(1001) + np.sin(1001)], atol=1e-2)


# Attention


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_query_head_h_reads_key_value_head_h_over_group_size(kv_heads):
    module = attention(kv_heads=kv_heads)
    x_BSD, mask_BST = draw(2, 5, 8), causal(2, 5)
    np.testing.assert_allclose(attend(module, x_BSD, mask_BST), numpy_attention(module, x_BSD, mask_BST), rtol=1e-4,
                               atol=1e-5)


def test_a_query_sees_only_what_the_mask_shows():
    module, x_BSD = attention(), draw(1, 6, 8)
    segment_S = np.array([1, 1, 1, 2, 2, 2])
    mask_BST = causal(1, 6) & (segment_S[:, None] == segment_S[None, :])[None]
    together = attend(module, x_BSD, mask_BST)
    np.testing.assert_allclose(together, numpy_attention(module, x_BSD, mask_BST), rtol=1e-4, atol=1e-5)
    changed = x_BSD.copy()
    changed[:, :3] += 1.0
    np.testing.assert_array_equal(attend(module, changed, mask_BST)[:, 3:], together[:, 3:])


def test_a_query_that_sees_nothing_stays_finite_forward_and_backward():
    module, x_BSD, mask_BST = attention(), jnp.asarray(draw(1, 4, 8)), causal(1, 4).copy()
    mask_BST[:, 2:] = False
    positions_BS = jnp.arange(4)[None]

    def loss(x_BSD):
        y_BSD = module(x_BSD, positions_BS, jnp.asarray(mask_BST))[0]
        return jnp.sum(y_BSD**2), y_BSD

    gradient, y_BSD = jax.jit(jax.grad(loss, has_aux=True))(x_BSD)
    assert np.all(np.isfinite(y_BSD)) and np.all(np.isfinite(gradient))
    np.testing.assert_allclose(y_BSD[:, :2], numpy_attention(module, np.asarray(x_BSD), mask_BST)[:, :2], rtol=1e-4,
                               atol=1e-5)


def test_outputs_have_no_gradient_from_later_tokens():
    module, mask_BST = attention(), jnp.asarray(causal(1, 5))
    jacobian = jax.jit(jax.jacobian(lambda x: jnp.sum(module(x, jnp.arange(5)[None], mask_BST)[0], axis=-1)))
    influence_ST = np.abs(np.asarray(jacobian(jnp.asarray(draw(1, 5, 8))))).sum(-1)[0, :, 0]
    np.testing.assert_array_equal(np.triu(influence_ST, 1), 0.0)
    assert np.all(influence_ST[np.tril_indices(5)] > 0)


def test_scores_far_beyond_the_range_of_exp_stay_finite():
    module = attention()
    module.w_query_DHd[...] *= 1e3
    x_BSD = 10 * draw(1, 4, 8)
    np.testing.assert_allclose(attend(module, x_BSD, causal(1, 4)), numpy_attention(module, x_BSD, causal(1, 4)),
                               rtol=1e-3, atol=1e-3)


def test_a_cache_filled_in_two_calls_gives_what_one_call_gives():
    module, x_BSD = attention(), draw(2, 6, 8)
    whole = attend(module, x_BSD, causal(2, 6))
    where = NamedSharding(tiny.ONE, spec("BSHd", ACTIVATIONS))
    empty = tuple(jax.device_put(jnp.zeros((2, 6, 2, 6)), where) for _ in range(2))
    positions_BS, mask_BST = jnp.broadcast_to(jnp.arange(6), (2, 6)), causal(2, 6)
    first, cache = jax.jit(lambda x: module(x, positions_BS[:, :4], mask_BST[:, :4], empty, 0))(x_BSD[:, :4])
    second, _ = jax.jit(lambda x, cache: module(x, positions_BS[:, 4:], mask_BST[:, 4:], cache, 4))(x_BSD[:, 4:], cache)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, rtol=1e-5, atol=1e-6)


def test_attention_in_bf16_keeps_scores_in_fp32():
    # The second query is (16, 16), the keys (16, 0) and (16, 1/16): products 256 and 257, over √2 a difference of
    # 0.7071, and σ(0.7071) = 0.6698. bf16 would hold the products as 256 and 256 (σ = 0.5), or the scores as 181 and
    # 182 (σ = 0.73).
    module = attention(width=2, heads=1, kv_heads=1, head=2)
    module.w_query_DHd[...] = jnp.array([[0.0, 0.0], [16.0, 16.0]]).reshape(2, 1, 2)
    module.w_key_DHd[...] = jnp.array([[16.0, 0.0], [16.0, 1 / 16]]).reshape(2, 1, 2)
    module.w_value_DHd[...] = jnp.array([[0.0, 0.0], [1.0, 0.0]]).reshape(2, 1, 2)
    module.w_out_HdD[...] = jnp.eye(2).reshape(1, 2, 2)
    y_BSD = attend(module, jnp.eye(2, dtype=jnp.bfloat16)[None], causal(1, 2), np.zeros((1, 2), np.int32))
    assert float(y_BSD[0, 1, 0]) == pytest.approx(0.6698, abs=5e-3)


def test_equal_bounds_of_llama3s_scaling_stretch_all_or_nothing():
    """Llama-4 Scout: waves longer than the original length by the factor, the others not at all."""
    attention = AttentionConfig(rope_scaling="llama3", rope_factor=16.0, rope_original_length=64, rope_low_factor=1.0,
                                rope_high_factor=1.0)
    found, magnitude = scaled_frequencies(8, 100.0, attention)
    plain = 100.0 ** (-np.arange(4) / 4)
    assert magnitude == 1.0 and [2 * np.pi / f > 64 for f in plain] == [False, False, False, True]
    np.testing.assert_allclose(found, plain / [1, 1, 1, 16], rtol=1e-12)
