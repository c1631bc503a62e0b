"""How much of the next token a model reads out of the routing: what a router that compares tokens gives away."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from moe_jax.nn.moe import RoutingMode
from moe_jax.sharding import compiler_options
from moe_jax.training.evaluate import put_batch
from moe_jax.training.losses import cross_entropy
from moe_jax.training.run import Run
from moe_jax.training.step import forward

_SEED = 0  # of the places that are looked at


def future_leakage(run: Run, params: Any, bias_LE: jax.Array, batches: Iterable[dict[str, np.ndarray]], mode: RoutingMode,
                   cuts: int = 8) -> float:
    """Mean loss of a token after which another text goes on, less its loss in its own text; nats per token.

    A row is cut before a token, and what follows the cut is taken from another row. To a causal model it makes no
    difference what follows, so the result is 0. Where experts choose among the tokens of a text it is what the model has
    learned to read out of their choice (Zhou et al. 2022 name the problem among their limitations); before it has, the
    result lies about 0.

    Args:
      cuts: different places at which each batch is cut, all rows of it at the same.

    Raises:
      ValueError: the model has an encoder; a group takes all rows of a batch, so that no other text is left that it has not
        seen; or there is nothing to look at.
    """
    config = run.config
    if config.model.encoder_layers:
        raise ValueError(f"model.encoder_layers={config.model.encoder_layers}: what a decoder's router may see of later tokens is "
                         f"measured on text that one stack reads; an encoder sees all of its own anyway")
    shift = 1 if config.moe.group_over == "batch" else config.sequences_per_group
    if shift >= config.data.batch_size:
        raise ValueError(f"a group takes {shift} sequences, all of data.batch_size={config.data.batch_size}: what follows in one "
                         f"row cannot be exchanged with a row of another group; set moe.group_size smaller")

    def losses(params, batch, bias_LE):
        return cross_entropy(forward(config, run.vocab_size, params, batch, mode, bias_LE).logits_BSV, batch["target_ids"])[0]

    compiled = jax.jit(losses, compiler_options=compiler_options())

    def losses_of(batch: dict[str, np.ndarray]) -> np.ndarray:
        return jax.device_get(compiled(params, put_batch(batch, run.mesh, config.data.batch_size), bias_LE))

    difference, tokens = 0.0, 0
    random, places = np.random.default_rng(_SEED), np.arange(1, config.data.sequence_length)
    for batch in batches:
        own_BS = losses_of(batch)
        for cut in random.choice(places, min(cuts, len(places)), replace=False):
            after_B = batch["segment_ids"][:, cut]  # where a document ends, the next token is not in the row
            inside_B = batch["valid"][:, cut] & (after_B == batch["segment_ids"][:, cut - 1])
            other_BS = losses_of({name: _exchanged(values, cut, shift) for name, values in batch.items()})
            difference += float(np.sum((other_BS - own_BS)[inside_B, cut - 1], dtype=np.float64))
            tokens += int(inside_B.sum())
    if not tokens:
        raise ValueError("no token is followed by another of its document, so there is nothing that could leak")
    return difference / tokens


def _exchanged(values_BS: np.ndarray, cut: int, shift: int) -> np.ndarray:
    """Every row up to the cut, and from there on the row ``shift`` before it; its target before the cut stays its own."""
    return np.concatenate([values_BS[:, :cut], np.roll(values_BS, shift, axis=0)[:, cut:]], axis=1)
