"""configs/*_tiny.py: every family trains on eight devices, its loss falls, and it goes on from a checkpoint as if it had not
stopped."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from moe_jax import families
from moe_jax.config import Config, load_config
from moe_jax.data.batches import open_data
from moe_jax.sharding import make_mesh, resolve_mesh
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.evaluate import put_batch
from moe_jax.training.state import abstract_state, initial_state, table_size
from moe_jax.training.step import train_step

CONFIGS = Path(__file__).parents[1] / "configs"
# Less text than a user trains on, and a rate at which twenty steps say something.
SMALL = {"data.max_bytes": 200_000, "data.sequence_length": 32, "data.batch_size": 16, "optimizer.learning_rate": 0.01,
         "optimizer.warmup_steps": 2, "optimizer.schedule": "constant", "training.num_steps": 20}
# Quick ones that have between them: heads and latents, buffers and rows, an encoder, an LSTM.
QUICK = ("deepseek_v3_tiny", "switch_tiny", "shazeer_tiny")
NAMES = [*(f"{name}_tiny" for name in families.FAMILIES), "shazeer_hierarchical_tiny"]


def load(name: str, **settings) -> Config:
    return load_config(str(CONFIGS / f"{name}.py"), [f"--config.{key}={value}" for key, value in settings.items()])


def test_every_family_has_its_tiny_config_and_the_table_knows_it():
    for name in families.FAMILIES:
        assert load(f"{name}_tiny") == families.config(name)


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_twenty_steps_on_eight_devices_lower_the_loss_and_resume(name, tmp_path):
    rows = {"data.target_length": 8} if load(name).model.encoder_layers else {}
    config = load(name, **SMALL, **rows)
    data = open_data(config.data, str(tmp_path))
    vocab_size, mesh = table_size(config, data.vocabulary.vocab_size), make_mesh(resolve_mesh(config, 8))
    with jax.set_mesh(mesh), Checkpointer(tmp_path / "checkpoints") as checkpointer:
        step = jax.jit(functools.partial(train_step, config=config, vocab_size=vocab_size), compiler_options=tiny.QUICK)

        def steps(state, first, last):
            losses = []
            for number in range(first, last):
                state, metrics = step(state, put_batch(data.train.batch(number), mesh))
                assert metrics["applied"]
                losses.append(float(metrics["sums"]["loss/ce"]))
            return state, losses

        wanted = abstract_state(config, vocab_size, mesh)
        new_state = jax.jit(lambda: initial_state(config, vocab_size), compiler_options=tiny.QUICK,
                            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, wanted))
        state, before = steps(new_state(), 0, 10)
        checkpointer.save(10, state, {})
        checkpointer.wait()
        state, after = steps(state, 10, 20)
        restored = checkpointer.restore(wanted)
        again, resumed = steps(restored.state, 10, 20)
    assert restored.step == 10 and resumed == after
    tiny.assert_equal(jax.device_get(again["params"]), jax.device_get(state["params"]))
    assert np.mean(after[-3:]) < np.mean(before[:3]) - 0.3, (before, after)
