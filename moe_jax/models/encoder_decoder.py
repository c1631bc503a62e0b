"""An encoder–decoder (T5, GShard, Switch, NLLB): the encoder reads what is given, from both sides; the decoder writes, looking
at what it has written and, by cross-attention, at what the encoder made of what is given."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moe_jax.config import Config
from moe_jax.models.decoder import Decoder, Output, embedded, encoder_kinds, left_neighbours, undropped
from moe_jax.models.stack import Inputs, Stack
from moe_jax.nn.embedding import Embedding
from moe_jax.nn.moe import MoEStatistics, RoutingMode


@functools.partial(jax.tree_util.register_dataclass, meta_fields=(),
                   data_fields=("ids_BT", "positions_BT", "segment_ids_BT", "valid_BT"))
@dataclasses.dataclass(frozen=True)
class Given:
    """What the encoder reads, each ``[B, T]``: as the decoder's arguments of these names. A segment of the decoder sees the
    encoder's segment of the same number."""

    ids_BT: jax.Array
    positions_BT: jax.Array
    segment_ids_BT: jax.Array
    valid_BT: jax.Array

    @classmethod
    def of(cls, batch: dict[str, jax.Array]) -> "Given":
        """That of a batch as ``moe_jax.data.batches`` makes it."""
        return cls(*(batch[f"encoder_{name}"] for name in ("input_ids", "positions", "segment_ids", "valid")))


def seen_from(queries_BS: jax.Array, given: Given, any_segment_BS: jax.Array | None = None) -> jax.Array:
    """Where tokens of these segments see the encoder's, bool ``[B, S, T]``: text of their own segment, or, where
    ``any_segment_BS`` says so, of any."""
    same_BST = queries_BS[:, :, None] == given.segment_ids_BT[:, None, :]
    if any_segment_BS is not None:
        same_BST = same_BST | any_segment_BS[:, :, None]
    return same_BST & given.valid_BT[:, None, :]


class Encoder(Stack):
    """The layers that look to both sides; ``embedding`` is a table of its own, if the config wants one."""

    def __init__(self, config: Config, vocab_size: int, rngs: nnx.Rngs):
        if config.model.encoder_embedding:
            tied = dataclasses.replace(config.model, tie_embedding=True)  # a table without an output layer
            self.embedding = Embedding(tied, vocab_size, rngs)
        super().__init__(config, encoder_kinds(config), rngs, both_sides=True)

    def __call__(self, given: Given, embedding: Embedding, mode: RoutingMode, bias_LE: jax.Array,
                 key: jax.Array | None = None) -> tuple[jax.Array, MoEStatistics | None, jax.Array | None]:
        """What the decoder looks at, [B, T, D], statistics that lead with L, and for ``mode.trace`` the stream behind each layer.

        Args:
          embedding: the decoder's, for an encoder without its own.
          bias_LE: of the encoder's MoE layers. key: as in :class:`Decoder`.
        """
        config = self.config
        # In other codes padding looks at text, which matters where it is routed like text.
        any_segment_BS = ~given.valid_BT if config.moe.padding == "as_text" else None
        inputs = Inputs(given.ids_BT, given.positions_BT, seen_from(given.segment_ids_BT, given, any_segment_BS),
                        given.valid_BT, left_neighbours(given.ids_BT, given.positions_BT), segment_ids_BS=given.segment_ids_BT,
                        undropped_BS=undropped(config, given.valid_BT, mode, key))
        keys = None
        if mode.noise and key is not None:
            keys = jax.random.split(key, config.model.encoder_layers)
        x_BTD = embedded(self.embedding if config.model.encoder_embedding else embedding, inputs, config)
        x_BTD, _, statistics, layers_LBTD = self.run_layers(x_BTD, inputs, mode, None, bias_LE, keys)
        return self.final_norm(x_BTD), statistics, layers_LBTD


class EncoderDecoder(Decoder):
    """A :class:`Decoder` whose layers also look at an encoder's output."""

    def __init__(self, config: Config, vocab_size: int, rngs: nnx.Rngs):
        super().__init__(config, vocab_size, rngs)
        self.encoder = Encoder(config, vocab_size, rngs)

    def __call__(self, input_ids_BS: jax.Array, positions_BS: jax.Array, segment_ids_BS: jax.Array, valid_BS: jax.Array,
                 mode: RoutingMode, bias_LE: jax.Array | None = None, key: jax.Array | None = None, cache: Any = None,
                 key_segment_ids_BT: jax.Array | None = None, index: jax.Array | int = 0,
                 previous_ids_BS: jax.Array | None = None, *, given: Given, encode: bool = True) -> Output:
        """Logits for the next token at every position of the decoder.

        Args: as in :class:`Decoder`, of the decoder; MoE layers, in ``bias_LE`` too, are the encoder's, then the decoder's.
          given: what the encoder reads.
          encode: static; False: the cache has what is made of ``given`` from an earlier call.

        Returns:
          ``Output``; ``statistics`` is a pair, the encoder's (None if it is dense, or did not run) and the decoder's.
        """
        config, moe_layers = self.config, len(self.config.encoder_moe_layers)
        if bias_LE is None:
            bias_LE = jnp.zeros((len(config.moe_layers), max(config.moe.num_routed_experts, 1)), jnp.float32)
        encoder_key, decoder_key = (None, None) if key is None else jax.random.split(key)
        encoded_BTD = statistics = layers_LBTD = None
        if encode:
            encoded_BTD, statistics, layers_LBTD = self.encoder(given, self.embedding, mode, bias_LE[:moe_layers], encoder_key)
        inputs = self.inputs_of(input_ids_BS, positions_BS, segment_ids_BS, valid_BS, mode, decoder_key, cache is not None,
                                key_segment_ids_BT, index, previous_ids_BS)
        inputs = dataclasses.replace(inputs, encoded_BTD=encoded_BTD, crossed_mask_BST=seen_from(segment_ids_BS, given))
        output, _ = self.decode(inputs, mode, bias_LE[moe_layers:], decoder_key, cache)
        return dataclasses.replace(output, statistics=(statistics, output.statistics), encoder_layers_LBTD=layers_LBTD)
