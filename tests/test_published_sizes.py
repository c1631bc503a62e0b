"""The published models in configs/: parameters against the papers or against hand counts, and one step of each in small.

Nothing of a model's size is allocated: parameters are counted by shapes.
"""

import dataclasses
import importlib
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from moe_jax.config import Config, resolve
from moe_jax.planning.slices import parse_slice
from moe_jax.sharding import resolve_mesh
from moe_jax.training.flops import count_parameters
from moe_jax.training.state import initial_state, state_specs

CONFIGS = Path(__file__).parents[1] / "configs"
BILLION = 1e9


def published(name, **model) -> Config:
    config = resolve(importlib.import_module(f"configs.{name}").get_config())
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def counted(config):
    """(total, active, active without the tables), in billions."""
    count = count_parameters(config, config.model.vocab_size)
    return tuple(n / BILLION for n in (count.total, count.active, count.active - count.embedding))


# Total and active parameters in billions. A figure that a paper rounds to two digits is recomputed to four: FFNs and experts
# are matrices·D·F, attention 2·D·d·(H + H_kv), tables V·D. The others of these models – encoder-decoders and latent
# attention – are counted below, by hand, as what they are.
@pytest.mark.parametrize("name, total, active", [
    ("mixtral_8x7b", 46.70, 12.88),  # published 46.7, 12.9
    ("olmoe_1b_7b", 6.919, 1.282),  # published 6.9, 1.3
    ("deepseek_moe_16b", 16.38, 2.829),  # published 16.4, 2.8
    # GLaM: 1.2 T and 96.6 are published; 32·64·2·D·F + 32·3·D·F + 64·4·D·128·128 + 256000·D
    ("glam_64b_64e", 1162, 96.6),
    # OpenMoE by its code (four matrices, two tables); without the tables 2.75 and 8.46 are active.
    ("openmoe_8b", 11.86, 2.75 + 1.050),
    ("openmoe_34b", 46.3, 8.46 + 1.575),
])
def test_parameters_are_the_published_ones(name, total, active):
    ours = counted(published(name))
    assert ours[:2] == pytest.approx((total, active), rel=0.005)


@pytest.mark.parametrize("name, total", [("openmoe_8b", 8.78), ("openmoe_34b", 34.6)])
def test_openmoe_has_its_papers_parameters_with_three_matrices_and_one_table(name, total):
    """The paper's 8.7 and 34 B, recomputed to three digits."""
    config = published(name, activation="swiglu", tie_embedding=True)
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, activation="swiglu"))
    assert counted(config)[0] == pytest.approx(total, rel=0.005)


def encoder_decoder(width, heads, head, ffn, matrices, layers, sparse, experts, extra=0, vocab=32_128):
    """(total, active with K=1 chosen) parameters of a T5 with ``layers`` layers in each stack, ``sparse`` of them with
    experts and ``extra`` more feed-forward networks; without norms and relative positions."""
    attention = 4 * width * heads * head
    network = matrices * width * ffn
    dense = 2 * vocab * width + (layers + 2 * layers) * attention + 2 * (layers - sparse + extra) * network
    dense += 2 * sparse * width * experts  # routers
    return dense + 2 * sparse * experts * network, dense + 2 * sparse * network


# Fedus et al. 2022, table 9: 7 B and 1571 B; Zoph et al. 2022, table 2: 269 B, whose 24 + 24 layers and 6 + 6 sparse ones,
# each with one more network, are those of flaxformer's st_moe_32b.gin.
SWITCH_BASE = encoder_decoder(768, 12, 64, 2048, 3, layers=12, sparse=6, experts=128)
SWITCH_C = encoder_decoder(2080, 32, 64, 6144, 2, layers=15, sparse=15, experts=2048)
ST_MOE = encoder_decoder(5120, 64, 128, 20_480, 3, layers=24, sparse=6, experts=64, extra=6)


def test_the_hand_counts_of_encoder_decoders_are_the_published_figures():
    assert SWITCH_BASE[0] / BILLION == pytest.approx(7, abs=0.5)
    assert SWITCH_C[0] / BILLION == pytest.approx(1571, rel=0.001)
    assert ST_MOE[0] / BILLION == pytest.approx(269, rel=0.001)
    # The same reading of "27 layers" gives ST-MoE-L's 4.1 B.
    st_moe_l = encoder_decoder(1024, 16, 64, 2816, 3, layers=24, sparse=6, experts=32, extra=6)
    assert st_moe_l[0] / BILLION == pytest.approx(4.1, rel=0.005)


@pytest.mark.parametrize("name, counts, second_choice", [
    ("switch_base", SWITCH_BASE, 0), ("switch_c", SWITCH_C, 0), ("st_moe_32b", ST_MOE, 12 * 3 * 5120 * 20_480)])
def test_a_decoder_of_both_stacks_has_the_encoder_decoders_parameters(name, counts, second_choice):
    """Half again as many heads stand for the cross-attention; ``second_choice``: active besides one expert per layer."""
    config = published(name)
    total, active = counts[0], counts[1] + second_choice
    assert counted(config)[:2] == pytest.approx((total / BILLION, active / BILLION), rel=0.0005)


def test_a_decoder_of_deepseek_v3s_size_has_its_parameters():
    """671 B, 37 B active, with latent attention: d_c 512, d'_c 1536, 128 heads of 128 + 64 (DeepSeek-V3 §4.2)."""
    width, expert = 7168, 3 * 7168 * 2048
    latent = width * 1536 + 1536 * 128 * 192 + width * (512 + 64) + 512 * 128 * 256 + 128 * 128 * width
    dense = 61 * latent + 3 * 3 * width * 18_432 + 58 * (expert + 256 * width) + 2 * 129_280 * width
    total, active = dense + 58 * 256 * expert, dense + 58 * 8 * expert
    assert total / BILLION == pytest.approx(671, rel=0.001)
    # The published 37 B leave the table out whose rows are looked up.
    assert (active - 129_280 * width) / BILLION == pytest.approx(37, abs=0.5)
    config = published("deepseek_v3_like")
    assert counted(config)[:2] == pytest.approx((total / BILLION, active / BILLION), rel=0.0005)
    ours = 2 * width * config.model.head_dim * (config.model.num_heads + config.model.num_kv_heads)
    assert ours == pytest.approx(latent, rel=0.001)


# All of them


def published_names():
    """The configs that head their file with a citation."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if "arXiv:" in path.read_text() or "JMLR" in path.read_text())


NAMES = published_names()


def test_all_published_sizes_are_here():
    assert NAMES == ["deepseek_moe_16b", "deepseek_v3_like", "glam_64b_64e", "mixtral_8x7b", "olmoe_1b_7b", "openmoe_34b",
                     "openmoe_8b", "st_moe_32b", "switch_base", "switch_c"]


@pytest.mark.parametrize("name", NAMES)
def test_a_published_config_fits_the_slice_that_its_head_names(name):
    command = next(line for line in (CONFIGS / f"{name}.py").read_text().splitlines() if "--slice=" in line)
    assert f"--config=configs/{name}.py" in command
    slice_ = parse_slice(command.split("--slice=")[1].strip())
    sizes = resolve_mesh(published(name), slice_.devices)
    assert math.prod(sizes.values()) == slice_.devices


@pytest.mark.parametrize("name", NAMES)
def test_a_published_config_is_listed_in_the_readme(name):
    assert f"configs/{name}.py" in (CONFIGS.parent / "README.md").read_text()


def shrunk(config: Config) -> Config:
    """The config with one period of layers and small dimensions, on one device and in one piece; every option is kept."""
    model, moe, data = config.model, config.moe, config.data
    leading, every = min(moe.first_dense_layers, 1), min(moe.every, 2)
    replace = dataclasses.replace
    return Config(
        replace(model, num_layers=leading + every, d_model=16, num_heads=2, head_dim=4, d_ff=32, vocab_size=tiny.VOCAB,
                num_kv_heads=2 if model.num_kv_heads == model.num_heads else 1),
        replace(moe, num_experts=8 if moe.num_groups == 1 else 2 * moe.num_groups, first_dense_layers=leading, every=every,
                d_ff=16, experts_per_token=min(moe.experts_per_token, 4),
                group_size=moe.group_size // data.sequence_length * 16),
        replace(data, batch_size=2 * config.sequences_per_group, sequence_length=16),
        replace(config.mesh, data=1, fsdp=1, expert=1, tensor=1), config.optimizer, replace(config.training, microbatches=1))


def random_state(config):
    """As ``initial_state``, drawn by NumPy: nothing is compiled for it."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: initial_state(config, tiny.VOCAB))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), {**shapes, "rng": None})
    draw = lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32)
    state = {**zeros, "params": jax.tree.map(draw, shapes["params"]), "rng": jax.random.key(0)}
    return tiny.placed(state, tiny.ONE, state_specs(state)), state["params"]


# openmoe_34b is openmoe_8b with other numbers: in small, the same program.
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "openmoe_34b"])
def test_a_published_config_takes_a_step_when_shrunk(name):
    config = shrunk(published(name))
    rows = config.data.batch_size
    start, params = random_state(config)
    state, metrics = tiny.step(config, start, tiny.batch(rows=rows))
    assert metrics["applied"] and int(state["step"]) == 1
    assert 0.5 < metrics["sums"]["loss/ce"] / math.log(tiny.VOCAB) < 4
    choices = rows * 16 * config.moe.experts_per_token
    counts_L = metrics["routing"]["counts_LE"].sum(axis=1)
    if config.moe.second_policy == "all":
        assert counts_L.tolist() == [choices] * len(config.moe_layers)
    else:
        assert (choices / 2 <= counts_L).all() and (counts_L <= choices).all()
    if config.moe.dispatch == "dropless":
        assert metrics["routing"]["kept_LE"].sum(axis=1).tolist() == [choices] * len(config.moe_layers)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), params, jax.device_get(state["params"]))
    assert [name for name, flag in tiny.leaves(moved).items() if not flag] == [], "parameters that the step did not move"
