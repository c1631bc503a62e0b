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


# Total and active parameters in billions; a figure that a paper rounds to two digits is recomputed to four. The counts
# themselves are worked out by hand in test_families.py.
@pytest.mark.parametrize("name, total, active", [
    ("mixtral_8x7b", 46.70, 12.88),  # published 46.7, 12.9
    ("olmoe_1b_7b", 6.919, 1.282),  # published 6.9, 1.3
    ("deepseek_moe_16b", 16.38, 2.829),  # published 16.4, 2.8
    ("deepseek_v3", 671, 37.55),  # published 671, and 37 without the table whose rows are looked up
    ("switch_base", 7.44, 0.2488),  # published 7
    ("switch_c", 1571, 1.795),  # published 1571
    ("st_moe_32b", 269, 35.06),  # published 269
    # GLaM: 1.2 T and 96.6 are published; 32·64·2·D·F + 32·3·D·F + 64·4·D·128·128 + 256000·D
    ("glam_64b_64e", 1162, 96.6),
    # OpenMoE by its code (four matrices, two tables); without the tables 2.75 and 8.46 are active.
    ("openmoe_8b", 11.86, 2.75 + 1.050),
    ("openmoe_34b", 46.3, 8.46 + 1.575),
])
def test_parameters_are_the_published_ones(name, total, active):
    ours = counted(published(name, mtp_depth=0))
    assert ours[:2] == pytest.approx((total, active), rel=0.005)


# All of them


def published_names():
    """The configs that head their file with a citation."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if "arXiv:" in path.read_text() or "JMLR" in path.read_text())


NAMES = published_names()


def test_all_published_sizes_are_here():
    assert NAMES == ["deepseek_moe_16b", "deepseek_v3", "glam_64b_64e", "mixtral_8x7b", "olmoe_1b_7b", "openmoe_34b",
                     "openmoe_8b", "st_moe_32b", "switch_base", "switch_c"]


# Those that can be planned: the configs above, and some whose training is chosen here.
PLANNED = sorted(path.stem for path in CONFIGS.glob("*.py") if "--slice=" in path.read_text())


@pytest.mark.parametrize("name", PLANNED)
def test_a_published_config_fits_the_slice_that_its_head_names(name):
    command = next(line for line in (CONFIGS / f"{name}.py").read_text().splitlines() if "--slice=" in line)
    assert f"--config=configs/{name}.py" in command
    slice_ = parse_slice(command.split("--slice=")[1].strip())
    sizes = resolve_mesh(published(name), slice_.devices)
    assert math.prod(sizes.values()) == slice_.devices


@pytest.mark.parametrize("name", PLANNED)
def test_a_published_config_is_listed_in_the_readme(name):
    assert f"configs/{name}.py" in (CONFIGS.parent / "README.md").read_text()


def shrunk(config: Config) -> Config:
    """The config with one period of layers and small dimensions, on one device and in one piece; every option is kept."""
    model, moe, data, attention = config.model, config.moe, config.data, config.attention
    leading, every = min(moe.first_dense_layers, 1), min(moe.every, 2)
    replace = dataclasses.replace
    if attention.kind == "latent":
        attention = replace(attention, query_rank=8, latent_rank=8, rope_dim=2, value_dim=4)
    return Config(
        replace(model, num_layers=leading + every, encoder_layers=min(model.encoder_layers, every), d_model=16, num_heads=2,
                head_dim=4, d_ff=32, vocab_size=tiny.VOCAB, num_kv_heads=2 if model.num_kv_heads == model.num_heads else 1),
        replace(moe, num_experts=8 if moe.num_groups == 1 else 2 * moe.num_groups, first_dense_layers=leading, every=every,
                d_ff=16, experts_per_token=min(moe.experts_per_token, 4),
                group_size=moe.group_size // data.sequence_length * 16),
        replace(data, batch_size=2 * config.sequences_per_group, sequence_length=16, target_length=min(data.target_length, 8)),
        replace(config.mesh, data=1, fsdp=1, expert=1, tensor=1), config.optimizer, replace(config.training, microbatches=1),
        attention=attention)


def random_state(config):
    """As ``initial_state``, drawn by NumPy: nothing is compiled for it."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: initial_state(config, tiny.VOCAB))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), {**shapes, "rng": None})
    draw = lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32)
    state = {**zeros, "params": jax.tree.map(draw, shapes["params"]), "rng": jax.random.key(0)}
    return tiny.placed(state, tiny.ONE, state_specs(state)), state["params"]


# These are openmoe_8b and switch_base with other numbers: in small, nearly the same programs.
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("openmoe_34b", "switch_c")])
def test_a_published_config_takes_a_step_when_shrunk(name):
    config = shrunk(published(name))
    rows = config.data.batch_size
    start, params = random_state(config)
    pair = config.model.encoder_layers > 0
    state, metrics = tiny.step(config, start, tiny.pair(rows, 16, 8) if pair else tiny.batch(rows=rows))
    assert metrics["applied"] and int(state["step"]) == 1
    assert 0.5 < metrics["sums"]["loss/ce"] / math.log(tiny.VOCAB) < 4
    encoder, decoder = len(config.encoder_moe_layers), len(config.trained_moe_layers) - len(config.encoder_moe_layers)
    # Of a further token, the last of each row has none to predict.
    tokens_L = np.array([16] * encoder + [8 if pair else 16] * (decoder - config.model.mtp_depth) + [15] * config.model.mtp_depth)
    choices_L = rows * tokens_L * config.moe.experts_per_token
    counts_L = metrics["routing"]["counts_LE"].sum(axis=1)
    if config.moe.second_policy == "all":
        assert counts_L.tolist() == choices_L[:len(counts_L)].tolist()
    else:
        assert (choices_L / 2 <= counts_L).all() and (counts_L <= choices_L).all()
    if config.moe.dispatch == "dropless":
        assert metrics["routing"]["kept_LE"].sum(axis=1).tolist() == choices_L[:len(counts_L)].tolist()
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), params, jax.device_get(state["params"]))
    assert [name for name, flag in tiny.leaves(moved).items() if not flag] == [], "parameters that the step did not move"
