"""Attention as the families have it, and options that none of them has together; settings for :func:`tiny.config`."""

_LATENT = dict(model_num_kv_heads=4, model_head_dim=10, attention_kind="latent", attention_latent_rank=6, attention_rope_dim=4,
               attention_value_dim=8)
_YARN = dict(attention_rope_scaling="yarn", attention_rope_factor=8.0, attention_rope_original_length=16, model_rope_theta=100.0,
             attention_rope_beta_fast=2.0, attention_rope_beta_slow=0.3)

VARIANTS = {
    "plain": {},
    "unscaled scores, no positions": dict(model_scaled_attention=False, attention_positions="none"),
    "Mixtral": dict(attention_layers="sliding", attention_window=5),
    "OLMoE": dict(model_num_kv_heads=4, attention_qk_norm="all_heads", attention_clip_qkv=0.7),
    "all heads' norm of grouped heads": dict(attention_qk_norm="all_heads"),
    "Qwen2": dict(attention_bias="qkv"),
    "Qwen3": dict(attention_qk_norm="head", model_head_dim=6, attention_rope_scaling="linear", attention_rope_factor=3.0),
    "GPT-OSS": dict(attention_bias="all", attention_sinks=True, attention_layers="sliding,full", attention_window=4,
                    attention_rope_truncate=False, **_YARN),
    "Llama-4": dict(attention_layers="chunked,chunked,full:nope", attention_chunk=4, attention_qk_norm="unscaled",
                    attention_rope_pairs="interleaved", attention_rope_scaling="llama3", attention_rope_factor=8.0,
                    attention_rope_original_length=16, attention_temperature_scale=0.3, attention_temperature_floor=3,
                    model_head_dim=8, model_rope_theta=100.0),
    "DeepSeek-V2-Lite": dict(attention_rope_pairs="interleaved", **_LATENT),
    "DeepSeek-V3": dict(attention_query_rank=8, attention_rope_pairs="interleaved", attention_rope_mscale=1.0,
                        attention_rope_mscale_all_dim=0.7, **_YARN, **_LATENT),
    "latents with biases and sinks, in windows and without positions": dict(
        attention_query_rank=8,
        attention_layers="sliding,chunked:nope", attention_window=3, attention_chunk=5, attention_sinks=True, attention_bias="all",
        attention_rope_attention_factor=1.2, attention_temperature_scale=0.2, attention_temperature_floor=2, **_YARN, **_LATENT),
}
