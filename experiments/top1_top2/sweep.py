"""Switch Transformer, table 1: top-1 against top-2 over capacity factors, per step and per second."""

import time

import jax
import numpy as np

from experiments.base import SCALES, get_config
from moe_jax.sweeps import Evaluate, Sweep, falls, reported
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
    if model.config != model.trained_config:  # evaluated with buffers: its training has been measured
        return {}
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


FACTORS = ("2", "1.25", "1")


def _arms():
    """Each model is evaluated dropless and, ``_buffers``, with the buffers that it was trained with."""
    kinds = {"top2": {"moe.experts_per_token": 2, "moe.renormalize": True}, "top1": {"moe.experts_per_token": 1}}
    arms = {"dense": {"moe.num_experts": 0}}
    for kind, settings in kinds.items():
        for factor in FACTORS:
            arms[f"{kind}_{factor}"] = {**settings, "moe.capacity_factor": float(factor)}
            arms[f"{kind}_{factor}_buffers"] = Evaluate(
                f"{kind}_{factor}", {"moe.eval_dispatch": "gather", "moe.eval_capacity_factor": float(factor)})
    return arms


# As in the paper, experts have cf·T/E slots whatever the number of choices.
SWEEP = Sweep(
    number=15,
    title="Top-1 against top-2",
    question="Is one expert per token as good as two, and cheaper?",
    paper="Fedus et al. 2022 (Switch), table 1",
    config=get_config,
    settings={"moe.num_experts": 16, "moe.capacity_counts": "tokens", "moe.renormalize": False},
    arms=_arms(),
    expected=(
        falls("ce", "dense", "top1_1_buffers"),
        falls("ce", "top2_1_buffers", "top1_1_buffers"),
        falls("ce", "top2_1.25_buffers", "top1_1.25_buffers"),
        reported("ce", "top2_2_buffers", "top1_2_buffers"),
        reported("ce", "top2_1", "top1_1"),
        reported("ce", "top2_1.25", "top1_1.25"),
        reported("ce", "top2_2", "top1_2"),
        falls("cpu_seconds_per_step", "top2_2", "top1_2"),
        falls("cpu_seconds_per_step", "top2_1.25", "top1_1.25"),
        falls("cpu_seconds_per_step", "top2_1", "top1_1"),
        falls("cpu_seconds_to_loss", "top2_1.25", "top1_1.25"),
        falls("cpu_seconds_to_loss", "top2_1", "top1_1"),
        reported("cpu_seconds_to_loss", "top2_2", "top1_2"),
        reported("cpu_seconds_to_loss", "dense", "top1_1"),
    ),
    metrics=("ce", "drop_fraction", "train/drop_fraction", "cpu_seconds_per_step", "steps_to_loss", "cpu_seconds_to_loss"),
    published={"dense": "-1.731 / never / 1600", "top2_2_buffers": "-1.547 / 68.7 / 840", "top1_2_buffers": "-1.554 / 72.8 / 860",
               "top2_1.25_buffers": "-1.559 / 80.7 / 790", "top1_1.25_buffers": "-1.553 / 65.0 / 910",
               "top2_1_buffers": "-1.572 / 80.1 / 860", "top1_1_buffers": "-1.561 / 62.8 / 1000"},
    published_metric="neg. log-perplexity / hours to -1.50 / examples per second",
    scales=SCALES,
    measure=measure,
)
