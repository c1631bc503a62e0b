"""Parameters and floating-point operations of a config, counted without allocating anything.

*Active* parameters are those one token multiplies with: K of the E experts, shared experts, everything dense. Where a
token's experts cost unequally much – some are wider, some do not compute – this is the mean over tokens under a balanced
load. Model FLOPs count active parameters only; buffers padded to a capacity are the hardware's business (B56).
"""

import dataclasses

import jax

from moe_jax.config import Config
from moe_jax.nn.activations import activation
from moe_jax.routing import ROUTERS
from moe_jax.routing.expert_choice import mean_experts
from moe_jax.training.state import initial_params


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """total: all. active: per token that is read or written, embeddings included once; multi-token prediction, which is for
    training alone, left out. embedding: the table and the output layer."""

    total: int
    active: int
    embedding: int


def expert_parameters(config: Config) -> float:
    """Parameters of one feed-forward expert; the mean, if they are not alike."""
    width, moe = config.model.d_model, config.moe
    biases = (activation(moe.activation).matrices - 1) * mean_width(config) + width if moe.expert_bias else 0
    return expert_weights(config) + biases


def expert_weights(config: Config) -> float:
    """Those of its matrices, which FLOPs count."""
    return activation(config.moe.activation).matrices * config.model.d_model * mean_width(config)


def mean_width(config: Config) -> float:
    """F, the mean over experts; an int if they are alike."""
    moe = config.moe
    if not moe.expert_widths:
        return moe.d_ff
    return sum(width * count for width, count in moe.width_classes) / moe.num_experts


def computed_choices(config: Config) -> float:
    """Of a token's K choices those of feed-forward experts, under a load as the balancing loss wants it: an expert without
    computation gets 1 / ``moe.zero_expert_weight`` times the choices of another. An int if there are none."""
    moe = config.moe
    if moe.router == "expert_choice":
        return mean_experts(moe, moe.capacity_factor)
    if not moe.num_zero_computation:
        return moe.experts_per_token
    return moe.experts_per_token * moe.num_experts / (moe.num_experts + moe.num_zero_computation / moe.zero_expert_weight)


def count_parameters(config: Config, vocab_size: int) -> ParameterCount:
    """Counts by shapes of the real model (``jax.eval_shape``)."""
    shapes = jax.eval_shape(lambda: initial_params(config, vocab_size, jax.random.key(0)))
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    active = total - sum(leaf.size for leaf in jax.tree.leaves(shapes.get("mtp", ())))
    if config.moe_layers:
        idle = max(config.moe.num_copies - computed_choices(config), 0)
        active = round(active - len(config.moe_layers) * idle * expert_parameters(config))
    return ParameterCount(total, active, sum(leaf.size for leaf in jax.tree.leaves(shapes["embedding"])))


def forward_flops_per_token(config: Config, vocab_size: int, length: int) -> float:
    """Multiply-adds count two: 2 per active matrix parameter, plus attention over the causal half of ``length``.

    Per layer: projections 2·D·d·(2H + 2H_kv); scores and values 2·2·H·d·(length/2); FFN 2·matrices·D·F; a MoE layer
    K times that of an expert, shared experts and their gate 2·D, a residual FFN if it has one, the router, if it learns,
    2·D·E (with two levels 2·D·(E + X)) and constant experts 2·3·D each. Output layer 2·D·V. Norms, biases, softmax and the embedding
    look-up are left out. A layer of an LSTM has 2·4·2·D² in the place of attention, and no FFN but its mixture.
    """
    return _flops(config, vocab_size, length, config.model.num_layers, len(config.moe_layers), 1)


def _flops(config: Config, vocab_size: int, length: int, layers: int, moe_layers: int, outputs: int) -> float:
    """Of so many layers, of which so many have experts, and so many times the output layer."""
    model, moe = config.model, config.moe
    heads = model.num_heads + model.num_kv_heads
    attention = 2 * model.d_model * model.head_dim * 2 * heads + 2 * model.num_heads * model.head_dim * length
    dense = 2 * activation(model.activation).matrices * model.d_model * model.d_ff
    dense_layers = layers - (moe_layers if moe.residual_ffn == "none" else 0)
    if model.architecture == "lstm":
        attention, dense_layers = 2 * 4 * 2 * model.d_model**2, 0
    total = layers * attention + dense_layers * dense + outputs * 2 * model.d_model * vocab_size
    if moe_layers:
        shared = moe.shared_width * activation(moe.activation).matrices * model.d_model + moe.shared_gate * model.d_model
        router = moe.num_routed_experts * ROUTERS[moe.router].learned + (moe.num_groups if ROUTERS[moe.router].two_levels else 0)
        per_layer = computed_choices(config) * expert_weights(config) + shared
        per_layer += model.d_model * (router + 3 * moe.num_constant_experts)
        total += moe_layers * 2 * per_layer
    return float(total)


def training_flops_per_token(config: Config, vocab_size: int) -> float:
    """Forward and twice that backward, without recomputation. Multi-token prediction adds a layer, an output layer and a
    matrix [2D, D] for each depth."""
    length, depth = config.data.sequence_length, config.model.mtp_depth
    further = _flops(config, vocab_size, length, depth, len(config.trained_moe_layers) - len(config.moe_layers), depth)
    join = depth * 2 * 2 * config.model.d_model**2
    return 3 * (forward_flops_per_token(config, vocab_size, length) + further + join)


def hardware_flops_per_token(config: Config, vocab_size: int) -> float:
    """As :func:`training_flops_per_token` with every buffer slot computed, filled or not."""
    flops, moe = training_flops_per_token(config, vocab_size), config.moe
    if not config.moe_layers or moe.dispatch == "dropless":
        return flops
    tokens = group_tokens(config)
    slots = tokens * moe.num_experts
    if moe.dispatch != "reference":
        slots = moe.num_experts * ROUTERS[moe.router].capacity(tokens, moe, moe.capacity_factor)
    extra = slots / tokens - computed_choices(config)
    return flops + 3 * 2 * len(config.trained_moe_layers) * extra * expert_weights(config)


def group_tokens(config: Config) -> int:
    """T: tokens in one routing group of a training batch."""
    if config.moe.group_over == "batch":
        return config.sequences_per_group
    if config.moe.group_over == "all":
        return config.sequences_per_group * config.data.sequence_length
    return config.moe.group_size or config.data.sequence_length
