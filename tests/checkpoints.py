"""Small random checkpoints of every family, written as their own programs lay them out, with options of all kinds."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from moe_jax.interop.huggingface import to_config
from moe_jax.interop.reading import parameter_shapes, tensors_of
from moe_jax.interop.safetensors_files import write_file

FOLDER = Path(__file__).parents[2] / "shared" / "oracles" / "hf"

_SIZES = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=24,
              rms_norm_eps=1e-5, max_position_embeddings=64, torch_dtype="bfloat16", eos_token_id=3)
_LATENT = dict(intermediate_size=20, moe_intermediate_size=8, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2,
               v_head_dim=3, num_key_value_heads=4, num_experts_per_tok=2)
_YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=16)
# name -> settings as a hub checkpoint has them
VARIANTS = {
    "mixtral": dict(model_type="mixtral", intermediate_size=12, num_local_experts=3, num_experts_per_tok=2),
    "mixtral_window_tied": dict(model_type="mixtral", intermediate_size=12, num_local_experts=4, num_experts_per_tok=2, head_dim=6,
                                sliding_window=5, tie_word_embeddings=True, num_key_value_heads=None,
                                rope_scaling=dict(rope_type="linear", factor=4.0)),
    "olmoe": dict(model_type="olmoe", intermediate_size=12, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
                  clip_qkv=0.5, attention_bias=True),
    "qwen2": dict(model_type="qwen2_moe", intermediate_size=20, moe_intermediate_size=8, shared_expert_intermediate_size=12,
                  num_experts=4, num_experts_per_tok=2, mlp_only_layers=[1], use_sliding_window=True, sliding_window=4,
                  max_window_layers=2, head_dim=6),
    "qwen3_dense": dict(model_type="qwen3_moe", intermediate_size=20, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2,
                        mlp_only_layers=[0, 1, 2]),
    "qwen3": dict(model_type="qwen3_moe", intermediate_size=20, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2,
                  decoder_sparse_step=2, head_dim=6, attention_bias=True, rope_scaling=dict(_YARN, attention_factor=1.2)),
    "deepseek_v1": dict(model_type="deepseek", intermediate_size=20, moe_intermediate_size=8, n_routed_experts=4,
                        n_shared_experts=3, num_experts_per_tok=2, first_k_dense_replace=0, moe_layer_freq=2,
                        norm_topk_prob=True),
    "deepseek_v2": dict(_LATENT, model_type="deepseek_v2", n_routed_experts=6, n_shared_experts=2, first_k_dense_replace=2,
                        q_lora_rank=5, topk_method="group_limited_greedy", n_group=3, topk_group=2, routed_scaling_factor=3.0,
                        rope_scaling=dict(_YARN, mscale=0.7, mscale_all_dim=1.0)),
    "deepseek_v2_lite": dict(_LATENT, model_type="deepseek_v2", n_routed_experts=4, n_shared_experts=None, q_lora_rank=None,
                             topk_method="greedy", tie_word_embeddings=True),
    "deepseek_v3": dict(_LATENT, model_type="deepseek_v3", n_routed_experts=8, n_shared_experts=1, q_lora_rank=5,
                        first_k_dense_replace=1, n_group=4, topk_group=2, rope_interleave=False, norm_topk_prob=False, attention_bias=True),
    "deepseek_v3_one_expert": dict(_LATENT | dict(num_experts_per_tok=1), model_type="deepseek_v3", n_routed_experts=4,
                                   n_shared_experts=2, q_lora_rank=None, first_k_dense_replace=0, n_group=1, topk_group=1),

    "llama4": dict(model_type="llama4_text", intermediate_size=8, intermediate_size_mlp=20, head_dim=4, num_local_experts=4,
                   num_experts_per_tok=1, interleave_moe_layer_step=2, attention_chunk_size=6, no_rope_layer_interval=2,
                   rope_scaling=dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                     original_max_position_embeddings=16), attn_temperature_tuning=4),
    "gpt_oss": dict(model_type="gpt_oss", intermediate_size=12, head_dim=4, num_local_experts=4, num_experts_per_tok=2,
                    sliding_window=4, swiglu_limit=2.0),
    "gpt_oss_plain": dict(model_type="gpt_oss", intermediate_size=12, head_dim=4, num_local_experts=4, num_experts_per_tok=1,
                          attention_bias=False, layer_types=["full_attention"] * 3, rope_scaling=dict(rope_type="default")),
}


def settings(name: str, **more) -> dict:
    """``config.json`` of a variant."""
    return {**_SIZES, **VARIANTS[name], **more}


def write(folder: Path, settings: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """A random checkpoint with these settings; its tensors, bf16 but for those that are always fp32."""
    family, config = to_config(settings)
    _, needed = tensors_of(family, config, parameter_shapes(config, config.model.vocab_size))
    random = np.random.default_rng(seed)
    dtype = lambda tensor: np.dtype(tensor.dtype or ml_dtypes.bfloat16)
    tensors = {name: random.standard_normal(tensor.shape, np.float32).astype(dtype(tensor)) for name, tensor in needed.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(settings))
    return tensors
