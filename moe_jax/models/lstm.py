"""The language model of Shazeer et al. 2017 (appendix C): embedding, LSTM, mixture of experts, LSTM, softmax."""

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import Config
from moe_jax.models.decoder import Output, left_neighbours
from moe_jax.nn.embedding import Embedding
from moe_jax.nn.lstm import LSTM, LSTMState, empty_state
from moe_jax.nn.moe import MoELayer, RoutingMode
from moe_jax.sharding import ACTIVATIONS, spec


class LSTMLayer(nnx.Module):
    """x += dropout(lstm(x)), and in an MoE layer x += dropout(sigmoid(moe(x))) after it. No norms."""

    def __init__(self, config: Config, is_moe: bool, rngs: nnx.Rngs):
        self.is_moe, self.dropout = is_moe, config.model.dropout
        self.lstm = LSTM(config.model, rngs)
        if is_moe:
            self.moe = MoELayer(config, rngs)

    def __call__(self, x_BSD, starts_BS, state, route, dropout_keys):
        """``route(layer, x_BSD)``: the mixture's output and statistics, the experts of all tokens at once."""
        y_BSD, state = self.lstm(x_BSD, starts_BS, state)
        x_BSD = x_BSD + dropout(y_BSD, self.dropout, dropout_keys, 0)
        if not self.is_moe:
            return x_BSD, state, None
        y_BSD, statistics = route(self.moe, x_BSD)
        return x_BSD + dropout(jax.nn.sigmoid(y_BSD), self.dropout, dropout_keys, 1), state, statistics


def dropout(x_BSD: jax.Array, rate: float, keys: jax.Array | None, number: int) -> jax.Array:
    """Each number 0 with probability ``rate``, else over (1 − rate), by ``keys[number]``; x itself without keys."""
    if keys is None or rate == 0:
        return x_BSD
    kept_BSD = jax.random.bernoulli(keys[number], 1 - rate, x_BSD.shape, out_sharding=spec("BSD", ACTIVATIONS))
    return jnp.where(kept_BSD, x_BSD / (1 - rate), 0).astype(x_BSD.dtype)


class LSTMModel(nnx.Module):
    """``model.num_layers`` LSTMs (``model.architecture='lstm'``), of which those of ``config.moe_layers`` have a mixture
    behind them: with two layers and ``moe.first=0``, ``moe.every=2`` the paper's. ``vocab_size`` as of the decoder.

    It is called as :class:`moe_jax.models.decoder.Decoder` is and answers as that does; a token sees earlier ones of its
    document alone, through the state, which is emptied where ``positions_BS`` is 0.
    """

    def __init__(self, config: Config, vocab_size: int, rngs: nnx.Rngs):
        self.config, self.vocab_size = config, vocab_size
        self.embedding = Embedding(config.model, vocab_size, rngs)
        self.layers = nnx.List([LSTMLayer(config, i in config.moe_layers, rngs) for i in range(config.model.num_layers)])

    def __call__(self, input_ids_BS: jax.Array, positions_BS: jax.Array, segment_ids_BS: jax.Array, valid_BS: jax.Array,
                 mode: RoutingMode, bias_LE: jax.Array | None = None, key: jax.Array | None = None,
                 cache: list[LSTMState] | None = None, key_segment_ids_BT: jax.Array | None = None,
                 index: jax.Array | int = 0, previous_ids_BS: jax.Array | None = None,
                 replay_LBSK: jax.Array | None = None, in_prefix_BS: jax.Array | None = None,
                 next_ids_BS: jax.Array | None = None) -> Output:
        """Logits for the next token at every position; arguments as those of the decoder.

        ``key`` is also for dropout, which acts where ``mode.noise`` is. The cache is each layer's state after the last token;
        where it lies (``key_segment_ids_BT``, ``index``) plays no part.

        Raises:
          ValueError: a prefix or further tokens, which this model has no use for.
        """
        del key_segment_ids_BT, index
        if in_prefix_BS is not None or next_ids_BS is not None:
            raise ValueError("model.architecture='lstm' reads from left to right and predicts the next token only; it knows no "
                             "prefix that is seen from both sides, and no multi-token prediction")
        config, number = self.config, {layer: n for n, layer in enumerate(self.config.moe_layers)}
        if previous_ids_BS is None:
            previous_ids_BS = left_neighbours(input_ids_BS, positions_BS)
        if bias_LE is None:
            bias_LE = jnp.zeros((len(config.moe_layers), max(config.moe.num_routed_experts, 1)), jnp.float32)
        layers = len(self.layers)
        noise_keys = dropout_keys = None
        if mode.noise and key is not None:
            noise_keys = jax.random.split(key, layers)
            dropout_keys = jax.random.split(jax.random.fold_in(key, layers), 2 * layers + 1)
        x_BSD = self.embedding.encode(input_ids_BS, jnp.dtype(config.model.dtype))
        x_BSD = dropout(x_BSD, config.model.dropout, dropout_keys, 2 * layers)
        starts_BS, states, statistics = positions_BS == 0, [], []
        for i, layer in enumerate(self.layers):
            def route(moe, x_BSD, i=i):
                replay_BSK = None if replay_LBSK is None else replay_LBSK[number[i]]
                noise_key = None if noise_keys is None else noise_keys[i]
                return moe(x_BSD, valid_BS, mode, bias_LE[number[i]], noise_key, input_ids_BS, positions_BS, previous_ids_BS,
                           replay_BSK, segment_ids_BS=segment_ids_BS)

            keys = None if dropout_keys is None else dropout_keys[2 * i : 2 * i + 2]
            x_BSD, state, stats = layer(x_BSD, starts_BS, None if cache is None else cache[i], route, keys)
            states.append(state)
            statistics += [] if stats is None else [stats]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *statistics) if statistics else None
        return Output(self.embedding.decode(x_BSD), stacked, states if cache is not None else None)

    def empty_cache(self, batch: int, slots: int) -> list[LSTMState]:
        """Each layer's state before the first token, whatever the number of ``slots``, where the batch lies."""
        del slots
        return [empty_state(batch, self.config.model.d_model) for _ in self.layers]
