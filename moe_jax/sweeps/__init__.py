"""Ablations: arms trained on the same seeds, compared pair by pair. ``experiments/README.md`` has a guide."""

from moe_jax.sweeps.definition import (
    Continue, Evaluate, Order, Scale, Sweep, Train, Upcycle, equal, falls, minus, reported, rises)
from moe_jax.sweeps.model import TrainedModel

__all__ = ["Continue", "Evaluate", "Order", "Scale", "Sweep", "Train", "TrainedModel", "Upcycle", "equal", "falls", "minus",
           "reported", "rises"]
