"""Positions: rotary ones (Su et al. 2021) and the scaling of their frequencies for longer texts; relative ones (T5); sines added
to the embeddings."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import AttentionConfig
from moe_jax.sharding import ACTIVATIONS, spec

_PLAIN = AttentionConfig()


def rotate(x_BSHd: jax.Array, positions_BS: jax.Array, theta: float, attention: AttentionConfig = _PLAIN) -> jax.Array:
    """Rotates queries or keys by their positions; angles and products in fp32.

    Dimension i is paired with i + d/2, or with its neighbour (``attention.rope_pairs='interleaved'``). The pair's angle is
    position · theta^(-2i/d), or as :func:`scaled_frequencies` says.
    """
    half = x_BSHd.shape[-1] // 2
    if attention.rope_scaling == "none":
        frequency, magnitude = theta ** (-jnp.arange(half, dtype=jnp.float32) / half), 1.0
    else:
        scaled, magnitude = scaled_frequencies(2 * half, theta, attention)
        frequency = jnp.asarray(scaled, jnp.float32)
    angle_BS1d = positions_BS[:, :, None, None].astype(jnp.float32) * frequency[None, None, None, :]
    sin, cos = jnp.sin(angle_BS1d), jnp.cos(angle_BS1d)
    if magnitude != 1:
        sin, cos = sin * magnitude, cos * magnitude
    x = x_BSHd.astype(jnp.float32)
    if attention.rope_pairs == "half":
        first, second = jnp.split(x, 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    else:
        first, second = x[..., ::2], x[..., 1::2]
        rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)
    return rotated.astype(x_BSHd.dtype)


def scaled_frequencies(dim: int, theta: float, attention: AttentionConfig) -> tuple[np.ndarray, float]:
    """Radians per position of each of the ``dim / 2`` pairs, and what sine and cosine are multiplied by.

    ``attention.rope_scaling``: 'linear' (Chen et al. 2023) divides all frequencies by ``rope_factor``, 'llama3' (Llama 3.1) those
    of long waves; 'yarn' (Peng et al. 2023) does so where a pair makes few turns in the original length.
    """
    frequency = theta ** (-2.0 * np.arange(dim // 2) / dim)
    if attention.rope_scaling == "linear":
        return frequency / attention.rope_factor, 1.0
    if attention.rope_scaling == "llama3":
        return _llama3(frequency, attention), 1.0
    return _yarn(frequency, dim, theta, attention), _yarn_magnitude(attention)


def _llama3(frequency, attention):
    low, high = attention.rope_low_factor, attention.rope_high_factor
    waves = attention.rope_original_length * frequency / (2 * math.pi)  # in the original length
    # Equal bounds, as those of Llama-4 Scout, leave nothing between them.
    kept = np.clip((waves - low) / (high - low), 0, 1) if high > low else (waves >= low).astype(np.float64)
    return frequency * (kept + (1 - kept) / attention.rope_factor)


def _yarn(frequency, dim, theta, attention):
    def pair_with(turns):
        """The (fractional) pair that makes so many turns in the original length."""
        return dim * math.log(attention.rope_original_length / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = pair_with(attention.rope_beta_fast), pair_with(attention.rope_beta_slow)
    if attention.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)  # the released codes' bound, though there are dim / 2 pairs
    high += 0.001 if low == high else 0
    stretched = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    return frequency * (1 - stretched) + frequency / attention.rope_factor * stretched


def yarn_mscale(factor: float, weight: float) -> float:
    """YaRN's m: 0.1 · weight · ln(factor) + 1, 1 where nothing is stretched."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _yarn_magnitude(attention):
    factor, whole, part = attention.rope_factor, attention.rope_mscale, attention.rope_mscale_all_dim
    if attention.rope_attention_factor:
        return attention.rope_attention_factor
    if whole and part:
        return yarn_mscale(factor, whole) / yarn_mscale(factor, part)
    return yarn_mscale(factor, 1.0)


def temperature(positions_BS: jax.Array, attention: AttentionConfig) -> jax.Array:
    """What queries are multiplied by in layers without rotary positions, fp32 ``[B, S]``: 1 + scale · ln(1 + ⌊(position + 1) /
    floor⌋) (Llama-4)."""
    steps_BS = jnp.floor((positions_BS.astype(jnp.float32) + 1) / attention.temperature_floor)
    return 1 + attention.temperature_scale * jnp.log1p(steps_BS)


def relative_bias(table_XH: jax.Array, queries: int, keys: int, index: jax.Array | int, attention: AttentionConfig,
                  both_sides: bool) -> jax.Array:
    """What is added to the scores of queries ``index`` … ``index + S − 1`` against keys 0 … T − 1, fp32 ``[1, H, S, T]``: the
    table's row of the bucket of their distance (Raffel et al. 2020 §2.1).

    Distances are of places in the row, which inside a segment are those of positions.

    Args:
      both_sides: half of the buckets are for keys behind the query; else those are alike, and nobody may see them.
    """
    behind_ST = jnp.arange(keys)[None, :] - (index + jnp.arange(queries))[:, None]
    count = attention.relative_buckets // 2 if both_sides else attention.relative_buckets
    bucket_of = jnp.asarray(_bucket_of_distance(count, attention.relative_distance))
    distance_ST = jnp.abs(behind_ST) if both_sides else jnp.maximum(-behind_ST, 0)
    bucket_ST = bucket_of[jnp.minimum(distance_ST, attention.relative_distance)]
    if both_sides:
        bucket_ST = bucket_ST + jnp.where(behind_ST > 0, count, 0)
    table_XH = table_XH.astype(jnp.float32)
    bias_STH = table_XH.at[bucket_ST].get(out_sharding=spec("STH", {"H": ACTIVATIONS["H"]}))
    return jnp.moveaxis(bias_STH, 2, 0)[None]


@functools.lru_cache(maxsize=None)
def _bucket_of_distance(count: int, furthest: int) -> np.ndarray:
    """int32 ``[furthest + 1]``: half of ``count`` buckets hold one distance each, the others logarithmically more; from
    ``furthest`` on all are in the last."""
    exact = count // 2
    distance = np.arange(furthest + 1)
    # In fp32, as T5's codes: where the logarithm is a whole number, rounding decides.
    share = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(furthest / exact))
    further = exact + (share * np.float32(count - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(further, count - 1)).astype(np.int32)


def sinusoidal(positions_BS: jax.Array, width: int, first: int = 0) -> jax.Array:
    """Sines, then cosines, of (first + position) · 10000^(-i / (n - 1)), i < n = ⌊width/2⌋, fp32 ``[B, S, D]``; 0 in the last
    place of an odd width (fairseq's and tensor2tensor's form of Vaswani et al. 2017 §3.5)."""
    half = width // 2
    frequency = np.exp(np.arange(half) * -(math.log(10_000.0) / (half - 1))).astype(np.float32)
    angle_BSF = (first + positions_BS).astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    parts = [jnp.sin(angle_BSF), jnp.cos(angle_BSF)]
    return jnp.concatenate(parts + [jnp.zeros_like(angle_BSF[:, :, :1])] * (width % 2), axis=-1)
