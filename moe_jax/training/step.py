"""One optimizer step: ``train_step(state, batch) -> state, metrics``, a plain function that a test can call."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from moe_jax.config import Config, ConfigError
from moe_jax.models.decoder import Output, of_stacks
from moe_jax.models.encoder_decoder import Given
from moe_jax.nn.moe import MoEStatistics, RoutingMode
from moe_jax.nn.multi_token import ahead, sees_ahead
from moe_jax.routing import ROUTERS
from moe_jax.routing.balance import balance_loss, extra_loss, extra_weights, router_z_loss, updated_bias
from moe_jax.routing.policy import policy_losses, policy_weights, running_mean, uniform_guess, updated_running_mean
from moe_jax.sharding import TOKEN_AXES, compiler_options
from moe_jax.training.losses import cross_entropy, smoothed_cross_entropy
from moe_jax.training.optimizer import make_optimizer, schedule
from moe_jax.training.state import TrainState, model_graph, state_specs

Batch = dict[str, jax.Array]


def forward(config: Config, vocab_size: int, params: Any, batch: Batch, mode: RoutingMode, bias_LE: jax.Array,
            key: jax.Array | None = None, further: bool = False) -> Output:
    """The model on a batch as ``moe_jax.data.batches`` makes it; ``further``: with multi-token prediction, if it has any."""
    model = nnx.merge(model_graph(config, vocab_size), params)
    if config.model.encoder_layers:
        return model(batch["input_ids"], batch["positions"], batch["segment_ids"], batch["valid"], mode, bias_LE, key,
                     given=Given.of(batch))
    return model(batch["input_ids"], batch["positions"], batch["segment_ids"], batch["valid"], mode, bias_LE, key,
                 in_prefix_BS=batch.get("in_prefix"),
                 next_ids_BS=batch["target_ids"] if further and config.model.mtp_depth else None)


def targets_of(batch: Batch) -> jax.Array:
    """Where a token is to be predicted, bool ``[B, S]``: every valid one, if the objective gives none."""
    return batch.get("is_target", batch["valid"])


def further_targets_of(batch: Batch, depth: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What depth ``depth`` = 1, 2, … of multi-token prediction predicts, each ``[B, S]``: the ids so many places after the
    next; where such a token is, of the same document; and where it is to be predicted."""
    valid_BS = sees_ahead(batch["segment_ids"], batch["valid"], depth)
    return ahead(batch["target_ids"], depth), valid_BS, valid_BS & ahead(targets_of(batch), depth)


@functools.partial(jax.tree_util.register_dataclass, meta_fields=(), data_fields=("tokens", "targets", "further_tokens_D",
                                                                                  "further_targets_D", "given"))
@dataclasses.dataclass(frozen=True)
class Totals:
    """Of the global batch, fp32: what losses are divided by. Valid tokens and targets; the same by depth of multi-token
    prediction, ``[D]``, None without; valid tokens of an encoder, None without."""

    tokens: jax.Array
    targets: jax.Array
    further_tokens_D: jax.Array | None = None
    further_targets_D: jax.Array | None = None
    given: jax.Array | None = None

    @classmethod
    def of(cls, config: Config, batch: Batch) -> "Totals":
        count = lambda mask_BS: jnp.sum(mask_BS, dtype=jnp.float32)
        tokens = count(batch["valid"])
        targets = count(batch["is_target"]) if "is_target" in batch else tokens
        if config.model.encoder_layers:
            return cls(tokens, targets, given=count(batch["encoder_valid"]))
        depths = [further_targets_of(batch, depth)[1:] for depth in range(1, config.model.mtp_depth + 1)]
        if not depths:
            return cls(tokens, targets)
        return cls(tokens, targets, *(jnp.stack([count(mask_BS) for mask_BS in masks]) for masks in zip(*depths)))

    def routed(self, config: Config) -> jax.Array:
        """Tokens that MoE layers route: of all layers alike, or, with those of multi-token prediction or of an encoder, of each,
        ``[L]``."""
        if config.model.encoder_layers:
            return self._routed_by_stack(config)
        if config.moe.padding != "nowhere":
            return jnp.float32(config.tokens_per_step)
        further = len(config.trained_moe_layers) - len(config.moe_layers)
        if not further:
            return self.tokens
        return jnp.concatenate([jnp.broadcast_to(self.tokens, (len(config.moe_layers),)), self.further_tokens_D])


    def _routed_by_stack(self, config):
        given, written = self.given, self.tokens
        if config.moe.padding != "nowhere":
            data = config.data
            given, written = (jnp.float32(data.batch_size * length) for length in (data.sequence_length, data.target_length))
        counts = (given, config.encoder_moe_layers), (written, config.decoder_moe_layers)
        return jnp.concatenate([jnp.broadcast_to(count, (len(layers),)) for count, layers in counts])


# ``Output.statistics``.
Statistics = MoEStatistics | tuple[MoEStatistics | None, ...] | None


def check_statistics(config: Config, statistics: Statistics, training: bool = False) -> None:
    """Refuses to go on unless every MoE layer handed in its statistics (B08: losses lost under scan), in ``training`` also
    those of multi-token prediction."""
    found, layers = sum(part.kept_GE.shape[0] for part in of_stacks(statistics)), config.moe_layers
    if training:
        layers = config.trained_moe_layers
    if found != len(layers):
        raise RuntimeError(f"{found} layers returned routing statistics, but the model has {len(layers)} MoE "
                           f"layers {layers}; their balancing losses would be missing")


def routing_losses(config: Config, statistics: Statistics, total_tokens: jax.Array,
                   global_counts: Any = None) -> tuple[jax.Array, jax.Array]:
    """(balance, router z), each the mean over MoE layers, before their weights; 0 for a dense model.

    Each layer's loss is formed on its own and only then averaged: opposite imbalances do not cancel (B01).

    Args:
      total_tokens: that the layers route in the global batch, ``[]`` or ``[L]``.
      global_counts: statistics pooled over the global batch; None: each microbatch's own.
    """
    check_statistics(config, statistics, training=True)
    if not of_stacks(statistics):
        return jnp.zeros(()), jnp.zeros(())
    balance = lambda s, total, *counts: balance_loss(s, config.moe, total, *counts)
    balance_L = _over_layers(balance, statistics, total_tokens, global_counts)
    z_L = _over_layers(router_z_loss, statistics, total_tokens)
    return jnp.mean(balance_L), jnp.mean(z_L)


def _over_layers(loss, statistics, total_tokens, global_counts=None):
    """``loss(statistics, total[, counts])`` of each layer, ``[L]``."""
    parts, first = [], 0
    for part in of_stacks(statistics):
        here = slice(first, first + part.kept_GE.shape[0])
        whole = () if global_counts is None else (jax.tree.map(lambda leaf: leaf[here], global_counts),)
        if jnp.ndim(total_tokens) == 0:
            parts.append(jax.vmap(lambda s, *counts: loss(s, total_tokens, *counts))(part.router, *whole))
        else:
            parts.append(jax.vmap(lambda total, s, *counts: loss(s, total, *counts))(total_tokens[here], part.router, *whole))
        first = here.stop
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def extra_losses(config: Config, statistics: Statistics, total_tokens: jax.Array,
                 global_counts: Any = None) -> dict[str, jax.Array]:
    """The extra balancing losses that have a weight, each the mean over MoE layers, before their weights."""
    if not of_stacks(statistics):
        return {}
    loss = lambda name: lambda s, total, *counts: extra_loss(name, s, config.moe, total, *counts)
    return {name: jnp.mean(_over_layers(loss(name), statistics, total_tokens, global_counts))
            for name in extra_weights(config.moe)}


def _policy(config, vocab_size, statistics, ce_BS, weight_BS, mean_reward):
    """Losses and metrics of a router that is trained by its rewards, the log-likelihoods of the targets; else empty."""
    if statistics is None or not ROUTERS[config.moe.router].is_policy:
        return {}, {}, {}
    level = uniform_guess(vocab_size) if mean_reward is None else mean_reward
    losses, advantages = policy_losses(statistics.policy_BS, -ce_BS, weight_BS, config.moe, level)
    return losses, {"policy/reward": -jnp.sum(weight_BS * ce_BS)}, advantages


def loss_fn(params: Any, config: Config, vocab_size: int, batch: Batch, bias_LE: jax.Array, key: jax.Array,
            totals: Totals, global_counts: Any = None,
            mean_reward: jax.Array | None = None) -> tuple[jax.Array, dict[str, Any]]:
    """A microbatch's share of the global batch's loss.

    Everything is divided by ``totals`` of the *global* batch, what is predicted by its targets, what is routed by its valid
    tokens: the shares add up to the loss of the whole batch, however it was cut and however unequally it is padded
    (B10–B13).

    Returns:
      total, exactly ce + output_z_weight·z + balance_weight·balance + router_z_weight·router_z + mtp_weight·mtp + the extra
      balancing losses and those of a policy times their weights (B04), with ce label-smoothed if asked for; and the parts,
      unweighted, with ``loss/ce`` always the plain cross-entropy and ``loss/mtp`` that of further tokens, the mean over
      depths, only if the model predicts any.
    """
    training, moe = config.training, config.moe
    output = forward(config, vocab_size, params, batch, RoutingMode.training(config), bias_LE, key, further=True)
    weight_BS = targets_of(batch).astype(jnp.float32) / jnp.maximum(totals.targets, 1.0)
    ce_BS, log_z_BS = cross_entropy(output.logits_BSV, batch["target_ids"])
    smoothed_BS = smoothed_cross_entropy(output.logits_BSV, ce_BS, log_z_BS, training.label_smoothing)
    output_z = jnp.sum(weight_BS * log_z_BS**2)
    routed = totals.routed(config)
    balance, router_z = routing_losses(config, output.statistics, routed, global_counts)
    extra = extra_losses(config, output.statistics, routed, global_counts)
    policy, reward, advantages = _policy(config, vocab_size, output.statistics, ce_BS, weight_BS, mean_reward)
    extra, weights = extra | policy, extra_weights(moe) | policy_weights(moe)
    if output.further_logits:
        extra["mtp"], weights["mtp"] = _further_loss(output.further_logits, batch, totals), training.mtp_weight
    total = (jnp.sum(weight_BS * smoothed_BS) + training.output_z_weight * output_z
             + moe.balance_weight * balance + moe.router_z_weight * router_z
             + sum(weights[name] * value for name, value in extra.items()))
    parts = {"loss/ce": jnp.sum(weight_BS * ce_BS), "loss/output_z": output_z, "loss/balance": balance,
             "loss/router_z": router_z, "loss/total": total, **{f"loss/{name}": extra[name] for name in extra}, **reward}
    return total, {"sums": jax.lax.stop_gradient(parts), "routing": routing_sums(output.statistics) | advantages}


def _further_loss(logits, batch, totals):
    """Cross-entropy of multi-token prediction, the mean over depths (DeepSeek-V3 eq. 24–25)."""
    losses = []
    for depth, logits_BSV in enumerate(logits, start=1):
        ids_BS, _, counted_BS = further_targets_of(batch, depth)
        weight_BS = counted_BS.astype(jnp.float32) / jnp.maximum(totals.further_targets_D[depth - 1], 1.0)
        losses.append(jnp.sum(weight_BS * cross_entropy(logits_BSV, ids_BS)[0]))
    return sum(losses) / len(losses)


def routing_sums(statistics: Statistics) -> dict[str, jax.Array]:
    """Per-layer sums over groups, without gradient; add them over microbatches (``logit_max_L``: take the maximum)."""
    parts = [_routing_sums(part) for part in of_stacks(statistics)]
    if len(parts) < 2:
        return parts[0] if parts else {}
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _routing_sums(statistics):
    router = statistics.router
    sums = {"counts_LE": router.choices_E, "first_LE": router.first_choices_E, "kept_LE": statistics.kept_GE,
            "entropy_L": router.entropy, "confidence_L": router.confidence, "tokens_L": router.tokens}
    if statistics.copies_GP is not None:
        sums["copies_LP"] = statistics.copies_GP
    sums = {name: jnp.sum(leaf, axis=1) for name, leaf in sums.items()}
    return jax.lax.stop_gradient({**sums, "logit_max_L": jnp.max(router.logit_max, axis=1)})


def add_routing_sums(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.maximum(a[name], b[name]) if name == "logit_max_L" else a[name] + b[name] for name in a}


def _microbatches(batch: Batch, count: int) -> Batch:
    """``[B, ...]`` to ``[M, B/M, ...]``. Microbatch m holds rows m, m+M, …: the same rows on any number of devices."""
    def split(x):
        rest = x.shape[1:]
        x = x.reshape(x.shape[0] // count, count, *rest, out_sharding=P(TOKEN_AXES))
        return jnp.moveaxis(x, 1, 0)
    return jax.tree.map(split, batch)


def gradients(params: Any, config: Config, vocab_size: int, batch: Batch, bias_LE: jax.Array, key: jax.Array,
              mean_reward: jax.Array | None = None) -> tuple[Any, dict[str, Any]]:
    """Gradients of the global batch's loss and its parts, accumulated over ``training.microbatches``.

    ``mean_reward`` is that of earlier steps, for ``moe.policy_baseline='running'``; None: no step yet.
    """
    count = config.training.microbatches
    totals = Totals.of(config, batch)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if count == 1:
        (_, metrics), grads = grad_fn(params, config, vocab_size, batch, bias_LE, key, totals, None, mean_reward)
        return grads, metrics
    parts, keys = _microbatches(batch, count), jax.random.split(key, count)
    counts = _global_counts(params, config, vocab_size, parts, bias_LE, keys) if _needs_counts(config) else None

    def one(part, key):
        (_, metrics), grads = grad_fn(params, config, vocab_size, part, bias_LE, key, totals, counts, mean_reward)
        return grads, metrics

    def step(carry, scanned):
        grads_sum, metrics_sum = carry
        grads, metrics = one(*scanned)
        return (jax.tree.map(jnp.add, grads_sum, grads),
                {"sums": jax.tree.map(jnp.add, metrics_sum["sums"], metrics["sums"]),
                 "routing": add_routing_sums(metrics_sum["routing"], metrics["routing"])}), None

    # From zeros, not from the first microbatch: the model would stand in the program twice, and compile twice as long.
    shapes = jax.eval_shape(lambda parts, keys: one(jax.tree.map(lambda x: x[0], parts), keys[0]), parts, keys)
    start = jax.tree_util.tree_map_with_path(_nothing_yet, shapes)
    return jax.lax.scan(step, start, (parts, keys))[0]


def _nothing_yet(path, shape):
    """What a sum over microbatches, or a maximum of logits, begins with."""
    value = -jnp.inf if getattr(path[-1], "key", "") == "logit_max_L" else 0
    return jnp.full(shape.shape, value, shape.dtype, out_sharding=shape.sharding)


def _needs_counts(config: Config) -> bool:
    weighted = config.moe.balance_weight > 0 or extra_weights(config.moe)
    return bool(config.moe_layers and weighted) and config.moe.balance_scope == "global"


def _global_counts(params, config, vocab_size, parts, bias_LE, keys):
    """Statistics pooled over the global batch, by a forward pass over all microbatches before the gradients.

    The price of ``balance_scope='global'`` with accumulation: an exact loss instead of a running estimate (B12).
    """
    def step(_, scanned):
        part, key = scanned
        output = forward(config, vocab_size, params, part, RoutingMode.training(config), bias_LE, key, further=True)
        pooled = [jax.tree.map(lambda leaf: jnp.sum(leaf, axis=1), part.router) for part in of_stacks(output.statistics)]
        return None, pooled[0] if len(pooled) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pooled)

    _, pooled = jax.lax.scan(step, None, (parts, keys))
    return jax.lax.stop_gradient(jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), pooled))


def check_trainable(config: Config) -> None:
    """Refuses, with ConfigError, copies of experts, each of which would get the gradients of its own tokens only, and a router
    that would get none (B23)."""
    if config.moe.expert_copies:
        raise ConfigError(f"moe.expert_copies={config.moe.expert_copies}: copies of experts are for evaluation and generation "
                          f"(moe-jax eval --placement=…); in training they would grow apart. Set it to 0.")
    if config.moe.allow_untrained_router:
        raise ConfigError("moe.allow_untrained_router=True: with one expert per token and a gate that is always 1 the router gets no "
                          "gradient from the task, so that such a model is for evaluation and generation. To train it, let gates be "
                          "scores: moe.allow_untrained_router=False, moe.renormalize=False, "
                          "moe.gate_order='softmax_then_top_k'.")


def train_step(state: TrainState, batch: Batch, config: Config, vocab_size: int) -> tuple[TrainState, dict[str, Any]]:
    """One optimizer step on the global batch.

    A loss or gradient that is not finite leaves everything but ``skipped`` as it was (R8); with
    ``training.nonfinite='stop'`` so do all later steps, and the loop ends the run. The decision is made once, from the
    global loss and norm, so all devices agree.

    Returns:
      The new state, and metrics: ``sums`` (loss parts), ``routing`` (see :func:`routing_sums`), ``grad_norm``,
      ``router_grad_norm``, ``learning_rate``, ``tokens`` (valid ones, of encoder and decoder), ``applied`` (bool), and
      ``targets`` where not every token is one, ``routed_tokens_L`` where not all layers route all (multi-token prediction,
      an encoder).
    """
    check_trainable(config)
    key = jax.random.fold_in(state["rng"], state["step"] + state["skipped"])
    mean_reward = None
    if "policy_baseline" in state:
        mean_reward = running_mean(state["policy_baseline"], uniform_guess(vocab_size))
    grads, metrics = gradients(state["params"], config, vocab_size, batch, state["router_bias_LE"], key, mean_reward)
    grad_norm = optax.global_norm(grads)
    applied = jnp.isfinite(metrics["sums"]["loss/total"]) & jnp.isfinite(grad_norm)
    if config.training.nonfinite == "stop":
        applied &= state["skipped"] == 0
    new = _updated(state, grads, metrics, config)
    new = jax.tree.map(lambda after, before: jnp.where(applied, after, before), new, {k: state[k] for k in new})
    new["rng"] = state["rng"]
    new["skipped"] = state["skipped"] + jnp.where(applied, 0, 1).astype(jnp.int32)
    metrics |= {
        "grad_norm": grad_norm,
        "router_grad_norm": optax.global_norm([leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
                                               if path[-1].key.startswith(("w_router", "b_router"))]),
        "learning_rate": schedule(config.optimizer, config.training.num_steps)(state["step"]),
        "tokens": jnp.sum(batch["valid"], dtype=jnp.float32),
        "applied": applied,
    }
    totals = Totals.of(config, batch)
    if totals.given is not None:
        metrics["tokens"] += totals.given
    if "is_target" in batch or totals.given is not None:
        metrics["targets"] = totals.targets
    if jnp.ndim(totals.routed(config)):
        metrics["routed_tokens_L"] = totals.routed(config)
    return new, metrics


def _updated(state, grads, metrics, config):
    """Parameters, optimizer state, EMA and router bias after the step."""
    specs = state_specs(state)
    decay = config.training.ema_decay

    # Optax's reductions and factored moments know no explicit shardings: here the compiler decides in between.
    @functools.partial(jax.sharding.auto_axes, out_sharding=(specs["params"], specs["opt_state"], specs.get("ema")))
    def update(grads, opt_state, params, ema):
        optimizer = make_optimizer(config.optimizer, config.training.num_steps)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        if decay:
            ema = optax.incremental_update(params, ema, 1.0 - decay)
        return params, opt_state, ema

    params, opt_state, ema = update(grads, state["opt_state"], state["params"], state.get("ema"))
    new = {"step": state["step"] + 1, "params": params, "opt_state": opt_state,
           "router_bias_LE": state["router_bias_LE"]}
    if decay:
        new["ema"] = ema
    if config.moe_layers and config.moe.bias_update_rate > 0:
        new["router_bias_LE"] = updated_bias(state["router_bias_LE"], metrics["routing"]["counts_LE"],
                                             config.moe.bias_update_rate, config.moe.bias_update,
                                             config.moe.bias_centered)
    if "policy_baseline" in state:
        new["policy_baseline"] = updated_running_mean(
            state["policy_baseline"], metrics["sums"]["policy/reward"], metrics["routing"]["tokens_L"][0],
            config.moe.policy_baseline_decay)
    return new


def jitted_train_step(config: Config, vocab_size: int):
    """``(state, batch) -> (state, metrics)``, compiled; the old state's memory is reused for the new."""
    return jax.jit(functools.partial(train_step, config=config, vocab_size=vocab_size), donate_argnums=0,
                   compiler_options=compiler_options())
