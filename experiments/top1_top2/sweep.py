"""Switch Transformer, table 1: top-1 against top-2 over capacity factors, per step and per second."""

import time

import jax
import numpy as np

from experiments.base import SCALES, get_config
from moe_jax.sweeps import Sweep, falls, reported
from moe_jax.training.evaluate import put_batch
from moe_jax.training.state import new_state
from moe_jax.training.step import jitted_train_step

# Reached by every arm at scales quick and full, by none of them early. (Smoke: at once.)
LOSS = 4.2
TIMED_STEPS = 24


def measure(model) -> dict[str, float]:
    """Time of a training step, and steps and time until the training loss is below LOSS.

    Processor seconds: those of the wall depend on what else the machine does.
    """
    seconds = seconds_per_step(model)
    steps = steps_to_loss(model.lines, LOSS)
    return {"cpu_seconds_per_step": seconds, "steps_to_loss": steps, "cpu_seconds_to_loss": steps * seconds}


def seconds_per_step(model) -> float:
    run = model.run
    state, step = new_state(run.config, run.vocab_size, run.mesh), jitted_train_step(run.config, run.vocab_size)
    batches = [put_batch(run.data.train.batch(number), run.mesh) for number in range(4)]
    seconds = []
    for number in range(TIMED_STEPS + 2):
        started = time.process_time()
        state, metrics = step(state, batches[number % 4])
        jax.block_until_ready((state, metrics))
        seconds.append(time.process_time() - started)
    return float(np.median(seconds[2:]))  # the first compiles


def steps_to_loss(lines, loss: float) -> float:
    """The first step at which the mean of ten lines of training loss is below ``loss``; the last if none is."""
    lines = [line for line in lines if line["kind"] == "train"]
    for end in range(1, len(lines) + 1):
        if np.mean([line["loss/ce"] for line in lines[max(0, end - 10) : end]]) < loss:
            return lines[end - 1]["step"]
    return lines[-1]["step"]


# As in the paper, experts have cf·T/E slots whatever the number of choices.
SWEEP = Sweep(
    number=15,
    title="Top-1 against top-2",
    question="Is one expert per token as good as two, and cheaper?",
    paper="Fedus et al. 2022 (Switch), table 1",
    config=get_config,
    settings={"moe.num_experts": 16, "moe.capacity_counts": "tokens", "moe.renormalize": False},
    arms={
        "dense": {"moe.num_experts": 0},
        **{f"top2_{factor}": {"moe.experts_per_token": 2, "moe.renormalize": True, "moe.capacity_factor": float(factor)}
           for factor in ("2", "1.25", "1")},
        **{f"top1_{factor}": {"moe.experts_per_token": 1, "moe.capacity_factor": float(factor)} for factor in ("2", "1.25", "1")},
    },
    expected=(
        falls("ce", "dense", "top1_1"),
        falls("ce", "top2_1", "top1_1"),
        falls("ce", "top2_1.25", "top1_1.25"),
        reported("ce", "top2_2", "top1_2"),
        falls("cpu_seconds_per_step", "top2_2", "top1_2"),
        falls("cpu_seconds_per_step", "top2_1.25", "top1_1.25"),
        falls("cpu_seconds_per_step", "top2_1", "top1_1"),
        falls("cpu_seconds_to_loss", "top2_1.25", "top1_1.25"),
        falls("cpu_seconds_to_loss", "top2_1", "top1_1"),
        reported("cpu_seconds_to_loss", "top2_2", "top1_2"),
        reported("cpu_seconds_to_loss", "dense", "top1_1"),
    ),
    metrics=("ce", "train/drop_fraction", "cpu_seconds_per_step", "steps_to_loss", "cpu_seconds_to_loss"),
    published={"dense": "-1.731 / never / 1600", "top2_2": "-1.547 / 68.7 / 840", "top1_2": "-1.554 / 72.8 / 860",
               "top2_1.25": "-1.559 / 80.7 / 790", "top1_1.25": "-1.553 / 65.0 / 910", "top2_1": "-1.572 / 80.1 / 860",
               "top1_1": "-1.561 / 62.8 / 1000"},
    published_metric="neg. log-perplexity / hours to -1.50 / examples per second",
    scales=SCALES,
    measure=measure,
)
