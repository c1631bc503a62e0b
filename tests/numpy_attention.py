"""Attention layers in NumPy and fp64, number by number: slow, obvious, and written without looking at moe_jax.

A layer's parameters are a flat dictionary: ``{'w_query_DHd': …, 'query_norm.scale_d': …}``. A text is one row of packed
documents: each token's position in its document and its document's number, 0 for padding.
"""

import math

import numpy as np


def frequencies(width, model, attention):
    """Radians per position of each pair, and what sine and cosine are multiplied by."""
    theta, factor, length = model.rope_theta, attention.rope_factor, attention.rope_original_length
    plain = [theta ** (-2 * i / width) for i in range(width // 2)]
    if attention.rope_scaling == "none":
        return plain, 1.0
    if attention.rope_scaling == "linear":
        return [frequency / factor for frequency in plain], 1.0
    if attention.rope_scaling == "llama3":
        low, high, found = attention.rope_low_factor, attention.rope_high_factor, []
        for frequency in plain:
            wave = 2 * math.pi / frequency
            share = min(max((length / wave - low) / (high - low), 0), 1)
            found.append(frequency * (share + (1 - share) / factor))
        return found, 1.0
    turn = lambda r: width * math.log(length / (2 * math.pi * r)) / (2 * math.log(theta))
    low, high = turn(attention.rope_beta_fast), turn(attention.rope_beta_slow)
    if attention.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    found = []
    for i, frequency in enumerate(plain):
        ramp = min(max((i - low) / (high - low), 0), 1)
        found.append(frequency * (1 - ramp) + frequency / factor * ramp)
    if attention.rope_attention_factor:
        return found, attention.rope_attention_factor
    if attention.rope_mscale and attention.rope_mscale_all_dim:
        return found, mscale(factor, attention.rope_mscale) / mscale(factor, attention.rope_mscale_all_dim)
    return found, mscale(factor, 1)


def mscale(factor, weight):
    return 1 if factor <= 1 else 0.1 * weight * math.log(factor) + 1


def rotated(x_Sd, position_S, model, attention):
    width = x_Sd.shape[1]
    angles, magnitude = frequencies(width, model, attention)
    out = np.zeros(x_Sd.shape)
    for s, position in enumerate(position_S):
        for i, frequency in enumerate(angles):
            j, k = (i, i + width // 2) if attention.rope_pairs == "half" else (2 * i, 2 * i + 1)
            cos, sin = math.cos(position * frequency) * magnitude, math.sin(position * frequency) * magnitude
            out[s, j] = x_Sd[s, j] * cos - x_Sd[s, k] * sin
            out[s, k] = x_Sd[s, k] * cos + x_Sd[s, j] * sin
    return out


def rms_norm(x, scale, epsilon):
    """Over all dimensions of ``scale``."""
    axes = tuple(range(-np.ndim(scale), 0))
    return x / np.sqrt(np.mean(x**2, axis=axes, keepdims=True) + epsilon) * scale


def sees(s, t, position_S, document_S, attention, span):
    """Whether the query of token s sees the key of token t."""
    if document_S[s] != document_S[t] or document_S[s] == 0 or t > s:
        return False
    if span == "sliding":
        return s - t < attention.window
    if span == "chunked":
        return position_S[s] // attention.chunk == position_S[t] // attention.chunk
    return True


def attention_layer(parameters, model, attention, layer, x_SD, position_S, document_S):
    """``[S, D]``; rows of padding are 0."""
    project = heads_of if attention.kind == "heads" else latents_of
    query_SHd, key_SHd, value_SHd, scale = project(parameters, model, attention, layer, x_SD, position_S)
    if attention.temperature_scale and not layer.rotated:
        for s, position in enumerate(position_S):
            query_SHd[s] *= 1 + attention.temperature_scale * math.log(1 + (position + 1) // attention.temperature_floor)
    heads, group = query_SHd.shape[1], query_SHd.shape[1] // key_SHd.shape[1]
    y_SD = np.zeros((len(x_SD), parameters["w_out_HdD"].shape[-1]))
    for s in range(len(x_SD)):
        seen = [t for t in range(len(x_SD)) if sees(s, t, position_S, document_S, attention, layer.span)]
        for h in range(heads if seen else 0):
            weights = [math.exp(scale * float(query_SHd[s, h] @ key_SHd[t, h // group])) for t in seen]
            total = sum(weights) + (math.exp(parameters["sink_H"][h]) if attention.sinks else 0)
            mean_d = sum(w / total * value_SHd[t, h // group] for w, t in zip(weights, seen))
            y_SD[s] += mean_d @ parameters["w_out_HdD"][h]
        if seen and attention.bias == "all":
            y_SD[s] += parameters["b_out_D"]
    return y_SD


def heads_of(parameters, model, attention, layer, x_SD, position_S):
    made = {}
    for name in ("query", "key", "value"):
        y_SHd = np.einsum("SD,DHd->SHd", x_SD, parameters[f"w_{name}_DHd"])
        if attention.bias != "none":
            y_SHd = y_SHd + parameters[f"b_{name}_Hd"]
        if attention.qk_norm == "head" and name != "value":
            y_SHd = rms_norm(y_SHd, parameters[f"{name}_norm.scale_d"], model.norm_epsilon)
        if attention.qk_norm == "all_heads" and name != "value":
            y_SHd = rms_norm(y_SHd, parameters[f"{name}_norm.scale_Hd"], model.norm_epsilon)
        if attention.clip_qkv:
            y_SHd = np.minimum(np.maximum(y_SHd, -attention.clip_qkv), attention.clip_qkv)
        if name != "value" and attention.positions == "rotary" and layer.rotated:
            for h in range(y_SHd.shape[1]):
                y_SHd[:, h] = rotated(y_SHd[:, h], position_S, model, attention)
            if attention.qk_norm == "unscaled":
                y_SHd = rms_norm(y_SHd, np.ones(y_SHd.shape[-1]), model.norm_epsilon)
        made[name] = y_SHd
    return *made.values(), model.head_dim**-0.5 if model.scaled_attention else 1.0


def latents_of(parameters, model, attention, layer, x_SD, position_S):
    if attention.query_rank:
        latent_SR = rms_norm(x_SD @ parameters["w_query_DR"] + parameters.get("b_query_R", 0), parameters["query_norm.scale_R"], 1e-6)
        query_SHd = np.einsum("SR,RHd->SHd", latent_SR, parameters["w_query_RHd"])
    else:
        query_SHd = np.einsum("SD,DHd->SHd", x_SD, parameters["w_query_DHd"])
    latent_SR = rms_norm(x_SD @ parameters["w_latent_DR"] + parameters.get("b_latent_R", 0), parameters["latent_norm.scale_R"], 1e-6)
    value_SHd = np.einsum("SR,RHd->SHd", latent_SR, parameters["w_value_RHd"])
    shared_Sd = x_SD @ parameters["w_key_rope_Dd"] + parameters.get("b_key_rope_d", 0)
    plain = model.head_dim - attention.rope_dim
    if layer.rotated:
        shared_Sd = rotated(shared_Sd, position_S, model, attention)
        for h in range(model.num_heads):
            query_SHd[:, h, plain:] = rotated(query_SHd[:, h, plain:], position_S, model, attention)
    key_SHd = np.zeros(query_SHd.shape)
    key_SHd[:, :, :plain] = np.einsum("SR,RHd->SHd", latent_SR, parameters["w_key_RHd"])
    key_SHd[:, :, plain:] = shared_Sd[:, None]
    scale = model.head_dim**-0.5 if model.scaled_attention else 1.0
    if attention.rope_scaling == "yarn":
        scale *= mscale(attention.rope_factor, attention.rope_mscale_all_dim) ** 2
    return query_SHd, key_SHd, value_SHd, scale
