"""The published sizes of the families in ``families.py``: dimensions, and how many parameters they come to.

Counts are in billions, of all parameters and of those that one token multiplies with, both tables and everything dense
included (:func:`moe_jax.training.flops.count_parameters`); blocks of multi-token prediction are left out. They are recomputed
from the dimensions; ``published`` is what the authors say, who count in different ways.
"""

import dataclasses
from typing import Any, Mapping

Settings = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Preset:
    """One published size.

    Attributes:
      settings: over the family's own, by section.
      total, active: parameters in billions.
      published: the authors' figures, and what of the dimensions is not from a paper or a checkpoint's config.
    """

    settings: Settings
    total: float
    active: float
    published: str


def _dimensions(layers: int, width: int, heads: int, head_dim: int, d_ff: int, vocab_size: int, kv_heads: int = 0,
                **more: Any) -> dict[str, Any]:
    return dict(num_layers=layers, d_model=width, num_heads=heads, num_kv_heads=kv_heads or heads, head_dim=head_dim, d_ff=d_ff,
                vocab_size=vocab_size, **more)


def _preset(total: float, active: float, published: str, model: Mapping[str, Any], moe: Mapping[str, Any],
            **sections: Mapping[str, Any]) -> Preset:
    return Preset({"model": model, "moe": moe, **sections}, total, active, published)


def _experts(count: int, width: int, chosen: int | None = None, **more: Any) -> dict[str, Any]:
    return dict(num_experts=count, d_ff=width, **({} if chosen is None else {"experts_per_token": chosen}), **more)


# Shazeer et al. 2017, tables 1 and 7: two LSTMs of 512 units and experts of width 1024 between them; 793,471 words.
def _shazeer(experts: int, total: float, active: float, published: str, **more: Any) -> Preset:
    model = dict(num_layers=2, d_model=512, vocab_size=793_472)
    return _preset(total, active, published, model, _experts(experts, 1024, 4, **more))


_TWO_LEVELS = dict(router="hierarchical", gate_order="softmax_then_top_k", groups_per_token=2)
SHAZEER = {
    "moe_32": _shazeer(32, 0.8503, 0.8209, "37.8 M without the tables"),
    "moe_256": _shazeer(256, 1.0854, 0.8212, "272.9 M without the tables"),
    "moe_256_h": _shazeer(256, 1.0854, 0.8211, "272.9 M without the tables", **_TWO_LEVELS, num_groups=16),
    "moe_1024_h": _shazeer(1024, 1.8915, 0.8220, "1,079.0 M without the tables", **_TWO_LEVELS, num_groups=16),
    "moe_4096_h": _shazeer(4096, 5.1159, 0.8251, "4,303.4 M without the tables", **_TWO_LEVELS, num_groups=16),
}


# Lepikhin et al. 2020, table 3; from memory: widths, heads and that 36 layers are those of both stacks.
def _gshard(layers: int, experts: int, total: float, active: float, published: str) -> Preset:
    return _preset(total, active, published, _dimensions(layers // 2, 1024, 16, 128, 8192, 64_000, encoder_layers=layers // 2),
                   _experts(experts, 8192, group_size=2048, min_capacity=1))


_GSHARD_SOURCE = "; widths, heads, vocabulary, the split into two stacks and groups of 2,048 tokens from memory"
GSHARD = {
    "600b": _gshard(36, 2048, 619.4, 1.528, "600 B" + _GSHARD_SOURCE),
    "150b": _gshard(36, 512, 155.5, 1.500, "150 B" + _GSHARD_SOURCE),
    "37b": _gshard(36, 128, 39.54, 1.493, "37 B" + _GSHARD_SOURCE),
}


# Fedus et al. 2022, table 9. The routers start with the variance of the kernels, 0.1 / d_model.
def _switch(layers: int, width: int, heads: int, d_ff: int, experts: int, activation: str, total: float, active: float,
            published: str, every: int = 2) -> Preset:
    model = _dimensions(layers, width, heads, 64, d_ff, 32_128, encoder_layers=layers, activation=activation)
    return _preset(total, active, published, model, _experts(experts, d_ff, every=every, activation=activation,
                                                             router_init=round((0.1 / width) ** 0.5, 5)))


SWITCH = {
    "base": _switch(12, 768, 12, 2048, 128, "geglu", 7.440, 0.2488, "7 B"),
    "large": _switch(24, 1024, 16, 2816, 128, "geglu", 27.15, 0.7863, "26 B"),
    "xxl": _switch(24, 4096, 64, 10_240, 128, "geglu", 394.7, 11.15, "395 B, which are 128 experts; the table says 64"),
    "c": _switch(15, 2080, 32, 6144, 2048, "relu", 1571.4, 1.795, "1,571 B", every=1),
}


# Du et al. 2022, table 4. Heads of the smaller ones from memory.
def _glam(layers: int, width: int, heads: int, head_dim: int, d_ff: int, experts: int, total: float, active: float,
          published: str) -> Preset:
    return _preset(total, active, published, _dimensions(layers, width, heads, head_dim, d_ff, 256_000),
                   _experts(experts, d_ff))


GLAM = {
    "0.1b_64e": _glam(12, 768, 12, 64, 3072, 64, 2.080, 0.3243, "1.9 B, 145 M, without the table; heads from memory"),
    "1.7b_64e": _glam(24, 2048, 16, 128, 8192, 64, 27.30, 2.338, "27 B, 1.88 B, without the table; heads from memory"),
    "8b_64e": _glam(32, 4096, 32, 128, 16_384, 64, 143.9, 10.72, "143 B, 9.8 B, without the table; heads from memory"),
    "64b_64e": _glam(64, 8192, 128, 128, 32_768, 64, 1162.0, 96.6, "1.2 T, 96.6 B"),
}

# Zhou et al. 2022: GLaM's, in which every MoE layer sees the later tokens of the text.
EXPERT_CHOICE = {name: dataclasses.replace(GLAM[name], settings={
    "model": GLAM[name].settings["model"] | {"tie_embedding": True},
    "moe": GLAM[name].settings["moe"] | {"allow_noncausal_routing": True}}) for name in ("0.1b_64e", "8b_64e")}


# Zoph et al. 2022, table 2; flaxformer's gin files say what "27 layers" are.
def _st_moe(width: int, heads: int, head_dim: int, d_ff: int, experts: int, total: float, active: float,
            published: str) -> Preset:
    return _preset(total, active, published, _dimensions(24, width, heads, head_dim, d_ff, 32_128, encoder_layers=24),
                   _experts(experts, d_ff))


ST_MOE = {
    "large": _st_moe(1024, 16, 64, 2816, 32, 4.105, 0.9912, "4.1 B; heads from memory"),
    "32b": _st_moe(5120, 64, 128, 20_480, 64, 269.1, 35.06, "269 B, 32 B"),
}


# Xue et al. 2024: by the paper's counts, and by the code's (reference: the gin files of its fork of flaxformer).
def _openmoe(layers: int, every: int, width: int, heads: int, head_dim: int, d_ff: int, experts: int, total: float,
             active: float, published: str, group_size: int = 4096, z_weight: float = 1e-4) -> Preset:
    return _preset(total, active, published, _dimensions(layers, width, heads, head_dim, d_ff, 256_384),
                   _experts(experts, d_ff, every=every, group_size=group_size, router_z_weight=z_weight))


OPENMOE = {
    "code": {
        "base": _openmoe(12, 4, 768, 12, 64, 2048, 16, 0.7997, 0.5354, "650 M, 142 M"),
        "8b": _openmoe(24, 6, 2048, 24, 128, 8192, 32, 11.86, 3.802, "8.7 B, 2.1 B"),
        "34b": _openmoe(32, 4, 3072, 24, 128, 12_288, 32, 46.3, 10.03, "34 B, 6.0 B", 8192, 1e-3),
    },
    "paper": {
        "base": _openmoe(12, 4, 768, 12, 64, 3072, 16, 0.6499, 0.3527, "650 M, 142 M"),
        "8b": _openmoe(24, 6, 2048, 24, 128, 8192, 32, 8.780, 2.740, "8.7 B, 2.1 B"),
        "34b": _openmoe(32, 4, 3072, 24, 128, 12_288, 32, 34.6, 7.42, "34 B, 6.0 B", 8192),
    },
}

MIXTRAL = {
    "8x7b": _preset(46.70, 12.88, "46.7 B, 12.9 B", _dimensions(32, 4096, 32, 128, 14_336, 32_000, 8),
                    _experts(8, 14_336)),
    "8x22b": _preset(140.6, 39.16, "141 B, 39 B; dimensions from memory",
                     _dimensions(56, 6144, 48, 128, 16_384, 32_768, 8), _experts(8, 16_384)),
}

# Yang et al. 2024; dimensions from memory of the released configs.
QWEN_2 = {
    "a2.7b": _preset(14.32, 2.69, "14.3 B, 2.7 B; dimensions from memory", _dimensions(24, 2048, 16, 128, 5632, 151_936),
                     _experts(60, 1408, 4, shared_d_ff=5632)),
    "57b_a14b": _preset(57.41, 14.25, "57 B, 14 B; dimensions from memory", _dimensions(28, 3584, 28, 128, 18_944, 151_936, 4),
                        _experts(64, 2560, 8, shared_d_ff=20_480)),
}
QWEN_3 = {
    "30b_a3b": _preset(30.53, 3.353, "30.5 B, 3.3 B", _dimensions(48, 2048, 32, 128, 6144, 151_936, 4), _experts(128, 768)),
    "235b_a22b": _preset(235.1, 22.19, "235 B, 22 B; dimensions from memory",
                         _dimensions(94, 4096, 64, 128, 12_288, 151_936, 4), _experts(128, 1536)),
}

DEEPSEEK_MOE = {
    "16b": _preset(16.38, 2.829, "16.4 B, 2.8 B", _dimensions(28, 2048, 16, 128, 10_944, 102_400),
                   _experts(64, 1408, 6, num_shared_experts=2)),
    "145b": _preset(144.5, 22.06, "144.6 B, 22.2 B; the widths, 1,408 and 11,264, are those that come to that",
                    _dimensions(62, 4096, 32, 128, 11_264, 102_400), _experts(128, 1408, 12, num_shared_experts=4)),
}


def _latent(query_rank: int) -> dict[str, Any]:
    return dict(query_rank=query_rank, latent_rank=512, rope_dim=64, value_dim=128)


DEEPSEEK_2 = {
    "236b": _preset(235.7, 21.38, "236 B, 21 B", _dimensions(60, 5120, 128, 192, 12_288, 102_400),
                    _experts(160, 1536, 6, num_groups=8, groups_per_token=3, route_scale=16.0, device_weight=0.05,
                             communication_weight=0.02, balance_weight=3e-3),
                    attention=_latent(1536)),
    "lite": _preset(15.71, 2.661, "15.7 B, 2.4 B", _dimensions(27, 2048, 16, 192, 10_944, 102_400),
                    _experts(64, 1408, 6, balance_weight=1e-3), attention=_latent(0)),
}
DEEPSEEK_3 = {
    "671b": _preset(671.0, 37.55, "671 B, 37 B", _dimensions(61, 7168, 128, 192, 18_432, 129_280),
                    _experts(256, 2048, 8, num_groups=8, groups_per_token=4, first_dense_layers=3), attention=_latent(1536)),
}

OLMOE = {
    "1b_7b": _preset(6.919, 1.282, "6.9 B, 1.3 B", _dimensions(16, 2048, 16, 128, 1024, 50_304), _experts(64, 1024)),
}


# Llama-4, text part; rotary and temperature settings of the released configs from memory.
_LLAMA_4_SIZES = _dimensions(48, 5120, 40, 128, 16_384, 202_048, 8)
LLAMA_4 = {
    "scout": _preset(107.8, 17.17, "109 B with vision, 17 B", _LLAMA_4_SIZES, _experts(16, 8192, every=1),
                     attention=dict(qk_norm="unscaled", rope_scaling="llama3", rope_factor=16.0, rope_original_length=8192,
                                    rope_high_factor=1.0)),
    "maverick": _preset(400.7, 17.18, "400 B with vision, 17 B", _LLAMA_4_SIZES, _experts(128, 8192)),
}

GPT_OSS = {
    "20b": _preset(20.91, 4.187, "21 B, 3.6 B without the table that is read", _dimensions(24, 2880, 64, 64, 2880, 201_088, 8),
                   _experts(32, 2880)),
    "120b": _preset(116.8, 5.712, "117 B, 5.1 B without the table that is read",
                    _dimensions(36, 2880, 64, 64, 2880, 201_088, 8), _experts(128, 2880)),
}

# NLLB Team 2022.
NLLB = {
    "54b": _preset(54.50, 3.751, "54.5 B; dimensions from memory",
                   _dimensions(24, 2048, 16, 128, 8192, 256_206, encoder_layers=24), _experts(128, 8192)),
}


# Gale et al. 2023, table 1: Megatron's GPT-2 with 64 experts in every layer.
def _megablocks(layers: int, width: int, total: float, active: float, published: str) -> Preset:
    return _preset(total, active, published, _dimensions(layers, width, width // 64, 64, 4 * width, 51_200),
                   _experts(64, 4 * width))


MEGABLOCKS = {
    "xs": _megablocks(6, 512, 0.8390, 0.0453, "839 M"),
    "small": _megablocks(12, 768, 3.695, 0.1250, "3,693 M"),
    "medium": _megablocks(24, 1024, 13.05, 0.3563, "13,041 M"),
}
