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


def attention_weights(config: Config) -> int:
    """Parameters of the matrices of one layer's attention: D·d·(2H + 2H_kv), or those to and from latents."""
    model, attention = config.model, config.attention
    width, heads, head = model.d_model, model.num_heads, model.head_dim
    if attention.kind == "heads":
        return width * head * 2 * (heads + model.num_kv_heads)
    rank, rope, value = attention.latent_rank, attention.rope_dim, attention.value_dim
    query = attention.query_rank * (width + heads * head) if attention.query_rank else width * heads * head
    return query + width * (rank + rope) + rank * heads * (head - rope + value) + heads * value * width


def score_weights(config: Config, absorbed: bool = False) -> int:
    """Multiply-adds of one query and one key it sees, scores and values of all heads: H·(d + d_value). Single tokens read
    latents as they are (``absorbed``): H·(2R + d_rope)."""
    model, attention = config.model, config.attention
    if attention.kind == "heads":
        return 2 * model.num_heads * model.head_dim
    if absorbed:
        return model.num_heads * (2 * attention.latent_rank + attention.rope_dim)
    return model.num_heads * (model.head_dim + attention.value_dim)


def seen_keys(config: Config, span: str, length: int, last: bool = False) -> float:
    """Keys that a query of such layers sees in a text of ``length`` tokens, the mean over the text, where a query counts half
    for itself; or how many the ``last`` one sees."""
    reach = min({"full": length, "sliding": config.attention.window, "chunked": config.attention.chunk}[span], length)
    if span == "chunked":
        rest = length % reach
        return (rest or reach) if last else (length // reach * reach**2 + rest**2) / (2 * length)
    return reach if last else reach - reach**2 / (2 * length)


def forward_flops_per_token(config: Config, vocab_size: int, length: int, last: bool = False) -> float:
    """Multiply-adds count two: 2 per active matrix parameter, plus attention over the causal half of ``length``, or of the
    ``last`` of so many tokens, which sees all.

    Per layer: projections 2·D·d·(2H + 2H_kv) (:func:`attention_weights`); scores and values 2·2·H·d·(length/2)
    (:func:`score_weights`, :func:`seen_keys`); FFN 2·matrices·D·F; a MoE layer
    K times that of an expert, shared experts and their gate 2·D, a residual FFN if it has one, the router, if it learns,
    2·D·E (with two levels 2·D·(E + X)) and constant experts 2·3·D each. Output layer 2·D·V. Norms, biases, softmax and the embedding
    look-up are left out. A layer of an LSTM has 2·4·2·D² in the place of attention, and no FFN but its mixture.

    Of an encoder–decoder, whose rows have the lengths of the config, the mean over tokens of both sides: the encoder sees
    all of its row; cross-attention adds 2·D·d·2H and 2·2·H·d·S to every layer of a decoder's token, and 2·D·d·2H_kv to an
    encoder's.
    """
    if config.model.encoder_layers:
        given, written = config.data.sequence_length, config.data.target_length
        encoder, decoder = pair_flops_per_token(config, vocab_size)
        return (given * encoder + written * decoder) / (given + written)
    spans = [layer.span for layer in config.attention_layers]
    return _flops(config, vocab_size, length, spans, len(config.moe_layers), 1, last)


def pair_flops_per_token(config: Config, vocab_size: int, written: int = 0, last: bool = False) -> tuple[float, float]:
    """Those of an encoder–decoder, forward: of a token that the encoder reads, with the keys and values that are made of it for
    the decoder, and of one of ``written`` that the decoder writes (0: ``data.target_length``), or the ``last`` of them."""
    model, given = config.model, config.data.sequence_length
    written = written or config.data.target_length
    encoder = _flops(config, vocab_size, given, ["full"] * model.encoder_layers, len(config.encoder_moe_layers), 0, last=True)
    decoder = _flops(config, vocab_size, written, ["full"] * model.num_layers, len(config.decoder_moe_layers), 1, last)
    encoder += model.num_layers * 2 * model.d_model * model.head_dim * 2 * model.num_kv_heads
    decoder += model.num_layers * (2 * model.d_model + 2 * given) * model.head_dim * 2 * model.num_heads
    return encoder, decoder


def _flops(config: Config, vocab_size: int, length: int, spans: list[str], moe_layers: int, outputs: int,
           last: bool = False) -> float:
    """Of layers with these spans, of which so many have experts, and so many times the output layer."""
    model, moe, layers = config.model, config.moe, len(spans)
    seen = sum(seen_keys(config, span, length, last) for span in spans)
    attention = layers * 2 * attention_weights(config) + 2 * score_weights(config, last) * seen
    dense = 2 * activation(model.activation).matrices * model.d_model * model.d_ff
    dense_layers = layers - (moe_layers if moe.residual_ffn == "none" else 0)
    if model.architecture == "lstm":
        attention, dense_layers = layers * 2 * 4 * 2 * model.d_model**2, 0
    total = attention + dense_layers * dense + outputs * 2 * model.d_model * vocab_size
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
    spans, moe_layers = [config.attention_layers[-1].span] * depth, len(config.trained_moe_layers) - len(config.moe_layers)
    further = _flops(config, vocab_size, length, spans, moe_layers, depth)
    join = depth * 2 * 2 * config.model.d_model**2
    return 3 * (forward_flops_per_token(config, vocab_size, length) + further + join)


def hardware_flops_per_token(config: Config, vocab_size: int) -> float:
    """As :func:`training_flops_per_token` with every buffer slot computed, filled or not."""
    flops, moe = training_flops_per_token(config, vocab_size), config.moe
    if not config.moe_layers or moe.dispatch == "dropless":
        return flops
    given, written = config.data.sequence_length, config.data.target_length
    extra = len(config.trained_moe_layers) * _extra_slots(config, group_tokens(config))
    if written:
        stacks = (given, len(config.encoder_moe_layers)), (written, len(config.decoder_moe_layers))
        extra = sum(length * layers * _extra_slots(config, group_tokens(config, length)) for length, layers in stacks)
        extra /= given + written
    return flops + 3 * 2 * extra * expert_weights(config)


def _extra_slots(config, tokens):
    """Per token of a group of so many: slots that are computed beyond the choices."""
    moe = config.moe
    slots = tokens * moe.num_experts
    if moe.dispatch != "reference":
        slots = moe.num_experts * ROUTERS[moe.router].capacity(tokens, moe, moe.capacity_factor)
    return slots / tokens - computed_choices(config)


def group_tokens(config: Config, length: int = 0) -> int:
    """T: tokens in one routing group of a training batch, whose rows have ``length`` tokens; 0: those of a decoder, or of what an
    encoder is given."""
    length, sequences = length or config.data.sequence_length, config.sequences_per_group
    if config.moe.group_over == "batch":
        return sequences
    if config.moe.group_over == "all":
        return sequences * length
    # A group of several rows has as many rows of the other length.
    return sequences * length if config.moe.group_size > config.data.sequence_length else min(config.moe.group_size or length, length)
