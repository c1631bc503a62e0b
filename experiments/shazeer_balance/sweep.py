"""Shazeer et al. 2017, table 6, with their own model: an LSTM with noisy top-k gating, importance and load losses."""

import functools

import jax
import numpy as np

from configs.shazeer_tiny import get_config as shazeer_tiny
from experiments.base import get_config as base
from moe_jax.sweeps import Scale, Sweep, equal, falls


def get_config():
    """Two LSTMs of 64 units with 32 experts between them, on the text and the schedule of the other experiments."""
    config, shared = shazeer_tiny(), base()
    config.model.update(d_model=64, dropout=0.0)
    config.moe.update(num_experts=32, d_ff=128, importance_weight=0.0, load_weight=0.0)
    for section in ("data", "mesh", "optimizer", "training"):
        config[section].update(shared[section])
    config.training.output_z_weight = 0.0
    return config


def weights(importance, load):
    return {"moe.importance_weight": importance, "moe.load_weight": load}


def measure(model):
    """Of importance and load, each summed over a batch as the losses see it: their coefficient of variation, and the largest
    load over the mean; means over validation batches. Noise is drawn as in training: without it there is no such load."""
    from moe_jax.nn.moe import RoutingMode
    from moe_jax.training.evaluate import put_batch
    from moe_jax.training.step import forward

    run, mode = model.run, RoutingMode.training(model.config)

    @jax.jit
    def sums(params, batch, bias_LE, key):
        router = forward(run.config, run.vocab_size, params, batch, mode, bias_LE, key).statistics.router
        return router.importance_E.sum(axis=1), router.load_E.sum(axis=1)

    found = {"cv_importance": [], "cv_load": [], "load_ratio": []}
    with jax.set_mesh(run.mesh):
        for number, batch in enumerate(model.batches()):
            importance_LE, load_LE = map(np.asarray, sums(model.params, put_batch(batch, run.mesh), model.bias_LE,
                                                          jax.random.key(number)))
            found["cv_importance"].append(variation(importance_LE))
            found["cv_load"].append(variation(load_LE))
            found["load_ratio"].append(np.mean(load_LE.max(axis=1) / load_LE.mean(axis=1)))
    return {name: float(np.mean(values)) for name, values in found.items()}


def variation(value_LE):
    return np.mean(value_LE.std(axis=1) / value_LE.mean(axis=1))




ordered = functools.partial(falls, paper="Shazeer et al. 2017, table 6")

SWEEP = Sweep(
    number=18,
    title="Importance and load losses in an LSTM",
    question="What do the two balancing losses of Shazeer et al. 2017 do in their own model?",
    paper="Shazeer et al. 2017, table 6",
    config=get_config,
    arms={
        "off": weights(0.0, 0.0),
        "importance": weights(0.2, 0.0),
        "load": weights(0.0, 0.2),
        "weak": weights(0.01, 0.01),
        "both": weights(0.1, 0.1),
        "strong": weights(1.0, 1.0),
    },
    expected=(
        ordered("cv_importance", "off", "weak", "both", "strong"),
        ordered("cv_load", "off", "weak", "both", "strong"),
        ordered("load_ratio", "off", "weak", "both", "strong"),
        ordered("cv_importance", "load", "importance"),
        ordered("cv_load", "importance", "load"),
        ordered("ce", "off", "weak"),
        equal("ce", "weak", "both", within=0.02, paper="Shazeer et al. 2017, table 6"),
        equal("ce", "both", "strong", within=0.02, paper="Shazeer et al. 2017, table 6"),
    ),
    metrics=("ce", "cv_importance", "cv_load", "load_ratio", "dead_experts"),
    published={"off": 39.8, "importance": 35.6, "load": 35.7, "weak": 35.7, "both": 35.6, "strong": 35.7},
    published_metric="perplexity",
    measure=measure,
    scales={
        "smoke": Scale(1, {"model.d_model": 16, "moe.num_experts": 8, "moe.d_ff": 16, "data.sequence_length": 32,
                           "data.batch_size": 4, "data.vocabulary": "bytes", "data.source": "synthetic",
                           "data.max_bytes": 200_000,
                           "optimizer.warmup_steps": 2, "training.num_steps": 6, "training.eval_batches": 2,
                           "training.log_every": 1, "training.checkpoint_every": 6, "moe.eval_dispatch": "reference"}),
        "quick": Scale(3, {"training.num_steps": 500}),
        "full": Scale(5, {"training.num_steps": 1000}),
    },
)
