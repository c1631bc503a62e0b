"""From OptimizerConfig to an optax chain: clip, rule, schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from moe_jax.config import OptimizerConfig


def schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step (0 is the first).

    ``'rsqrt'``: peak · sqrt(warmup / max(step, warmup)): flat, then falling, as T5 and OpenMoE; there is no ramp.
    ``'wsd'``: linear warm-up, stable, linear decay over the last ``decay_steps`` (Hu et al. 2024).
    The others warm up linearly.
    """
    peak, warmup, final = config.learning_rate, config.warmup_steps, config.learning_rate * config.final_fraction
    if config.schedule == "rsqrt":
        return lambda step: peak * jnp.sqrt(warmup / jnp.maximum(step, warmup).astype(jnp.float32))
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, num_steps - warmup), config.final_fraction)
    elif config.schedule == "wsd":
        stable = max(0, num_steps - warmup - config.decay_steps)
        after = optax.linear_schedule(peak, final, config.decay_steps, transition_begin=stable)
    else:
        after = optax.constant_schedule(peak)
    if warmup == 0:
        return after
    # The first step already moves: (step + 1) / warmup.
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Global-norm clipping over *all* parameters (B46), then the rule.

    Weight decay is decoupled, times the learning rate (Loshchilov & Hutter 2019) for every rule, and spares norm
    scales and biases. Adafactor is T5X's: no momentum, update clipping at 1, learning rate times parameter scale, decay exponent
    0.8, second moments factored over the two largest dimensions (so every expert keeps its own while E is below D and
    F). Parameter scale and update clipping are per array: layers that are scanned together, and experts, share theirs.
    """
    decay = optax.add_decayed_weights(config.weight_decay, _decayed) if config.weight_decay else optax.identity()
    rate = optax.scale_by_learning_rate(schedule(config, num_steps))
    if config.name == "adamw":
        rule = optax.chain(optax.scale_by_adam(config.beta1, config.beta2, config.epsilon), decay, rate)
    elif config.name == "adafactor":
        # Not optax.adafactor: its weight decay is not times the learning rate, so that 0.1 halves weights in 7 steps.
        rule = optax.chain(optax.scale_by_factored_rms(decay_rate=0.8), optax.clip_by_block_rms(1.0),
                           optax.scale_by_param_block_rms(), decay, rate)
    else:
        momentum = optax.trace(config.momentum) if config.momentum else optax.identity()
        rule = optax.chain(momentum, decay, rate)
    if config.clip_norm:
        rule = optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)
    return rule


def _decayed(parameters: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path[-1].key.startswith(("scale_", "bias_", "b_", "sink_")), parameters)
