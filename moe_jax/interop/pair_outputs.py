"""Stored outputs of an encoder–decoder: its batch, and the losses that ``transformers`` makes of what it computes."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import Config
from moe_jax.training.losses import cross_entropy

# Router logits by stack, each [L, B, S, E] over its MoE layers; a stack without any has none.
Logits = dict[str, jax.Array]


def batch_of_pairs(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The stored ids, each row one text that is given and one that is written."""
    ids_BT, written_BS = (stored[name].astype(np.int32) for name in ("input_ids", "decoder_input_ids"))
    seen_BT = stored["attention_mask"].astype(bool) if "attention_mask" in stored else np.ones(ids_BT.shape, bool)
    positions_BT = np.maximum(np.cumsum(seen_BT, axis=1, dtype=np.int32) - 1, 0)
    positions_BS = np.broadcast_to(np.arange(written_BS.shape[1], dtype=np.int32), written_BS.shape)
    return {"encoder_input_ids": ids_BT, "encoder_valid": seen_BT, "encoder_segment_ids": seen_BT.astype(np.int32),
            "encoder_positions": positions_BT, "input_ids": written_BS, "target_ids": stored["labels"].astype(np.int32),
            "valid": np.ones(written_BS.shape, bool), "segment_ids": np.ones_like(written_BS), "positions": positions_BS}


def switch_losses(config: Config, logits_BSV: jax.Array, router_logits: Logits, target_ids_BS: jax.Array) -> dict[str, jax.Array]:
    """Cross-entropy; of each stack the balancing loss of a row's tokens in all layers together, E · Σ_e f_e · P_e (1 under perfect
    balance), the mean over rows, and the z loss; 0 of a stack all of whose layers are mixtures; and the weighted sum."""
    losses = {"loss_ce": mean_of_targets(logits_BSV, target_ids_BS)}
    total, layers = losses["loss_ce"], {"encoder": config.model.encoder_layers, "decoder": config.model.num_layers}
    for stack, logits_LBSE in router_logits.items():
        aux = z = jnp.zeros(())
        if logits_LBSE.shape[0] < layers[stack]:
            experts = logits_LBSE.shape[-1]
            shares_LBSE = jax.nn.softmax(logits_LBSE, axis=-1)
            first_LBSE = jax.nn.one_hot(jnp.argmax(logits_LBSE, axis=-1), experts)
            mean = lambda x_LBSE: jnp.mean(x_LBSE, axis=(0, 2))
            aux = experts * jnp.mean(jnp.sum(mean(first_LBSE) * mean(shares_LBSE), axis=-1))
            z = jnp.mean(jax.nn.logsumexp(logits_LBSE, axis=-1) ** 2)
        losses |= {f"{stack}_aux_loss": aux, f"{stack}_z_loss": z}
        total = total + config.moe.balance_weight * aux + config.moe.router_z_weight * z
    return {**losses, "loss_total": total}


def nllb_losses(config: Config, logits_BSV: jax.Array, router_logits: Logits, target_ids_BS: jax.Array) -> dict[str, jax.Array]:
    """Cross-entropy; of each stack the balancing loss of the tokens of all its layers together (2 under perfect balance); and the
    weighted sum."""
    losses = {"loss_ce": mean_of_targets(logits_BSV, target_ids_BS)}
    total = losses["loss_ce"]
    for stack, logits_LBSE in router_logits.items():
        valid_BS = jnp.ones(logits_LBSE.shape[1:3], bool)
        losses[f"{stack}_aux_loss"] = pooled_balance_loss(logits_LBSE, valid_BS, config.moe.experts_per_token)
        total = total + config.moe.balance_weight * losses[f"{stack}_aux_loss"]
    return {**losses, "loss_total": total}


def pooled_balance_loss(logits_LBSE: jax.Array, valid_BS: jax.Array, experts_per_token: int) -> jax.Array:
    """The balancing loss of ``transformers``: E · Σ_e F_e · P_e, where F (choices) and P (mean softmax) are means over the
    tokens of all layers together; K under perfect balance. Ours take each layer's own means (docs/conventions.md)."""
    num_experts = logits_LBSE.shape[-1]
    shares_LBSE = jax.nn.softmax(logits_LBSE, axis=-1)
    _, expert_LBSK = jax.lax.top_k(jax.lax.stop_gradient(shares_LBSE), experts_per_token)
    chosen_LBSE = jnp.sum(jax.nn.one_hot(expert_LBSK, num_experts), axis=-2)
    weight_LBS1 = valid_BS[None, ..., None].astype(jnp.float32)
    count = logits_LBSE.shape[0] * jnp.sum(weight_LBS1)
    mean = lambda x_LBSE: jnp.sum(x_LBSE * weight_LBS1, axis=(0, 1, 2)) / count
    return num_experts * jnp.sum(mean(chosen_LBSE) * mean(shares_LBSE))


def mean_of_targets(logits_BSV: jax.Array, target_ids_BS: jax.Array) -> jax.Array:
    """Mean cross-entropy where there is a target; -100 is none."""
    is_target_BS = target_ids_BS >= 0
    loss_BS, _ = cross_entropy(logits_BSV, jnp.maximum(target_ids_BS, 0))
    return jnp.sum(jnp.where(is_target_BS, loss_BS, 0.0)) / jnp.sum(is_target_BS)
