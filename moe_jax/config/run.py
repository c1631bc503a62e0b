"""A run's whole config: its sections, and what must fit together among them."""

import dataclasses
from typing import Any

from moe_jax.config.attention import AttentionConfig, LayerAttention
from moe_jax.config.checks import choice, nearest_divisors, nearest_multiples, require
from moe_jax.config.encoder_decoder import check_encoder_decoder
from moe_jax.config.lstm import check_lstm
from moe_jax.config.moe import MoEConfig
from moe_jax.config.sections import DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. The sections are independent; what must fit together is checked here."""

    model: ModelConfig = ModelConfig()
    # By keyword only, so that sections keep the places they had before there was this one.
    attention: AttentionConfig = dataclasses.field(default=AttentionConfig(), kw_only=True)
    moe: MoEConfig = MoEConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()

    def __post_init__(self):
        batch, microbatches = self.data.batch_size, self.training.microbatches
        require(batch % microbatches == 0, "training.microbatches", microbatches,
                f"must divide data.batch_size={batch}; nearest legal values: {nearest_divisors(microbatches, batch)}.")
        if self.optimizer.schedule != "rsqrt":
            require(self.optimizer.warmup_steps <= self.training.num_steps, "optimizer.warmup_steps",
                    self.optimizer.warmup_steps,
                    f"exceeds training.num_steps={self.training.num_steps}; the run would end inside its warm-up.")
        self._check_objective()
        self._check_attention()
        if self.model.architecture == "lstm":
            check_lstm(self)
        if not self.moe.is_dense:
            self._check_moe()
        check_encoder_decoder(self)

    def _check_moe(self):
        self._check_layers()
        require(self.model.attention != "splash" or self.moe.padding == "nowhere", "model.attention", self.model.attention,
                f"sees padding otherwise than the plain one, and moe.padding={self.moe.padding!r} makes that matter; set it "
                f"to 'auto' or 'plain', or moe.padding='nowhere'.")
        self._check_groups()
        # Imported here because the tables of names live with the code they name, and that code reads this module.
        from moe_jax.dispatch import DISPATCHERS
        from moe_jax.dispatch.grouped_matmul import IMPLEMENTATIONS
        from moe_jax.routing import ROUTERS, check_router
        from moe_jax.routing.balance import BALANCE_LOSSES
        choice("moe", self.moe, "router", tuple(ROUTERS))
        choice("moe", self.moe, "dispatch", tuple(DISPATCHERS))
        choice("moe", self.moe, "eval_dispatch", tuple(DISPATCHERS))
        choice("moe", self.moe, "grouped_matmul", ("auto", *IMPLEMENTATIONS))
        choice("moe", self.moe, "balance_loss", tuple(BALANCE_LOSSES))
        check_router(self.moe, in_decoder=len(self.decoder_moe_layers) > 0)
        require(self.moe.router_init > 0 or ROUTERS[self.moe.router].learned_noise, "moe.router_init", self.moe.router_init,
                "leaves all experts alike: only routers with learned noise, noisy_top_k and hierarchical, tell them apart then; "
                "set it above 0.")
        require(self.model.mtp_depth == 0 or not ROUTERS[self.moe.router].is_policy, "model.mtp_depth", self.model.mtp_depth,
                f"adds layers whose rewards are not those of the next token, from which moe.router={self.moe.router!r} learns; "
                f"set it to 0, or another router.")
        self._check_exchange()

    def _check_objective(self):
        require(self.model.attention != "splash" or self.data.prefix_attention == "causal", "model.attention",
                self.model.attention, "knows causal attention only, but data.prefix_attention='bidirectional'; set it to 'auto' "
                "or 'plain', or data.prefix_attention='causal'.")
        require(self.training.mtp_weight == TrainingConfig.mtp_weight or self.model.mtp_depth > 0, "training.mtp_weight",
                self.training.mtp_weight, f"has no effect without model.mtp_depth above 0; set that, or training.mtp_weight="
                f"{TrainingConfig.mtp_weight}.")
        require(self.model.mtp_depth == 0 or self.training.mtp_weight > 0, "training.mtp_weight", self.training.mtp_weight,
                f"leaves the blocks of model.mtp_depth={self.model.mtp_depth} untrained; set it above 0, or "
                f"model.mtp_depth=0.")
        require(self.model.mtp_depth < self.data.sequence_length, "model.mtp_depth", self.model.mtp_depth,
                f"looks so many tokens further, which must be fewer than data.sequence_length={self.data.sequence_length}.")

    def _check_attention(self):
        model, attention = self.model, self.attention
        entries = len(attention.pattern)
        require(entries <= model.num_layers, "attention.layers", attention.layers,
                f"names {entries} layers, but model.num_layers={model.num_layers}; leave out what no layer takes.")
        require(model.rope_theta == ModelConfig.rope_theta or attention.positions == "rotary", "model.rope_theta",
                model.rope_theta, f"has no effect with attention.positions={attention.positions!r}; set it to "
                f"{ModelConfig.rope_theta}.")
        require(attention.positions != "sinusoidal" or model.d_model > 3, "model.d_model", model.d_model,
                "has no room for two frequencies of attention.positions='sinusoidal'; set it to 4 or more.")
        limited = any(layer.span != "full" for layer in attention.pattern)
        require(self.data.prefix_attention == "causal" or not limited, "attention.layers", attention.layers,
                "sliding and chunked layers look back only, but data.prefix_attention='bidirectional'; set it to 'full', or "
                "data.prefix_attention='causal'.")
        require(not model.mlp_bias or self.has_dense_networks, "model.mlp_bias", model.mlp_bias,
                "has no effect: every layer's network is a mixture (whose biases are moe.expert_bias); set it to False.")
        if attention.kind == "heads":
            require(model.head_dim % 2 == 0 or attention.positions != "rotary", "model.head_dim", model.head_dim,
                    f"must be even (rotary embedding pairs dimensions); nearest legal values: "
                    f"{nearest_multiples(model.head_dim, 2)}.")
            return
        require(model.num_kv_heads == model.num_heads, "model.num_kv_heads", model.num_kv_heads,
                f"has no effect with attention.kind='latent', where heads share one latent; set it to model.num_heads="
                f"{model.num_heads}.")
        require(attention.rope_dim < model.head_dim, "attention.rope_dim", attention.rope_dim,
                f"is part of model.head_dim={model.head_dim}, the rest of which is not rotated; set it below that.")

    @property
    def has_dense_networks(self) -> bool:
        """Whether a layer has a dense feed-forward network, alone or beside its experts."""
        layers = self.model.encoder_layers + self.model.num_layers
        return self.moe.residual_ffn != "none" or len(self.moe_layers) < layers

    def _check_exchange(self):
        # Imported here as above.
        from moe_jax.routing import ROUTERS
        moe, nodes = self.moe, self.mesh.expert_nodes
        require(moe.exchange_chunks == 1 or moe.dispatch != "reference", "moe.exchange_chunks", moe.exchange_chunks,
                "has no effect with moe.dispatch='reference', under which no rows travel; set it to 1, or another dispatch.")
        if nodes == 1:
            return
        require(moe.dispatch == "dropless", "mesh.expert_nodes", nodes,
                f"is for tokens that travel row by row, but moe.dispatch={moe.dispatch!r} sends buffers of fixed capacity, a slot "
                f"for each choice; set moe.dispatch='dropless', or mesh.expert_nodes=1.")
        require(moe.expert_parallelism != "none", "mesh.expert_nodes", nodes,
                "has no effect with moe.expert_parallelism='none', under which no rows travel; set it to 1, or another "
                "moe.expert_parallelism.")
        require(ROUTERS[moe.router].fixed_choices, "mesh.expert_nodes", nodes,
                f"a token takes its choices along, of which moe.router={moe.router!r} makes any number; set it to 1, or a "
                f"router in which tokens choose.")

    def _check_layers(self):
        moe = self.moe
        require(not moe.encoder_layers or self.model.encoder_layers > 0, "moe.encoder_layers", moe.encoder_layers,
                "names layers of an encoder, but model.encoder_layers=0; set it to '', or model.encoder_layers.")
        for field, total in (("layers", "num_layers"), ("encoder_layers", "encoder_layers")):
            explicit, count = moe.explicit_layers(field), getattr(self.model, total)
            require(not explicit or explicit[-1] < count, f"moe.{field}", getattr(moe, field),
                    f"names layer {explicit and explicit[-1]}, but model.{total}={count}; the last is {count - 1}.")
        self._check_rule()
        if moe.layers:
            require(len(self.moe_layers) > 0, "moe.layers", moe.layers, "leaves no MoE layer; name one, or set moe.num_experts=0 "
                    "for a dense model.")
            return
        require(self.model.num_layers > self.moe_offset, "moe.every", moe.every,
                f"gives no MoE layer among model.num_layers={self.model.num_layers}; set moe.every to at most "
                f"{self.model.num_layers}, or moe.num_experts=0 for a dense model.")
        self._check_first_dense_layers()

    def _check_rule(self):
        """Refuses moe.every, moe.first and moe.first_dense_layers where all MoE layers are named."""
        moe = self.moe
        if not moe.layers or self.model.encoder_layers and not moe.encoder_layers:
            return
        for field in ("every", "first", "first_dense_layers"):
            value, default = getattr(moe, field), getattr(MoEConfig, field)
            require(value == default, f"moe.{field}", value, f"has no effect beside moe.layers={moe.layers!r}, which names the "
                    f"MoE layers one by one; set it to {default!r}, or moe.layers=''.")

    def _check_first_dense_layers(self):
        moe, leading = self.moe, self.moe.first_dense_layers
        require(leading == 0 or leading > self.moe_offset, "moe.first_dense_layers", leading,
                f"has no effect: with moe.every={moe.every} and moe.first={moe.first} the first {self.moe_offset} layers are "
                f"dense anyway; set it to 0, or to more than {self.moe_offset}.")
        last = range(self.moe_offset, self.model.num_layers, moe.every)[-1]
        require(leading <= last, "moe.first_dense_layers", leading,
                f"leaves no MoE layer among model.num_layers={self.model.num_layers}; set it to at most {last}, or "
                f"moe.num_experts=0 for a dense model.")

    def _check_groups(self):
        length, size, target = self.data.sequence_length, self.moe.group_size, self.data.target_length
        if size and self.moe.group_over == "sequence":
            require(length % size == 0 or size % length == 0, "moe.group_size", size,
                    f"must divide data.sequence_length={length} or be a multiple of it; nearest legal values: "
                    f"{nearest_divisors(size, length) if size < length else nearest_multiples(size, length)}.")
            require(size >= length or target <= size or target % size == 0, "moe.group_size", size,
                    f"must divide data.target_length={target} too, where that is longer; nearest legal values of "
                    f"data.target_length: {nearest_multiples(target, size)}.")
        require(size == 0 or self.moe.group_over != "all", "moe.group_size", size,
                "has no effect with moe.group_over='all'; set it to 0.")
        sequences, microbatch = self.sequences_per_group, self.data.batch_size // self.training.microbatches
        require(microbatch % sequences == 0, "moe.group_size", size,
                f"one group spans {sequences} sequences, which must divide the {microbatch} sequences of a microbatch; "
                f"nearest legal numbers of sequences: {nearest_divisors(sequences, microbatch)}.")

    @property
    def sequences_per_group(self) -> int:
        """How many sequences one routing group touches. A group never spans two devices. (A decoder's groups, behind an
        encoder, are of as many sequences as the encoder's.)"""
        if self.moe.group_over in ("batch", "all"):
            return self.moe.group_size or self.data.batch_size // self.training.microbatches
        return max(1, self.moe.group_size // self.data.sequence_length)

    @property
    def nodes_per_token(self) -> int:
        """How many of ``mesh.expert_nodes`` nodes a token's choices reach at most, by ``moe.groups_per_token``; 0: any number.

        Groups of experts limit nodes if no group lies on parts of two nodes."""
        moe, nodes = self.moe, self.mesh.expert_nodes
        if moe.num_groups % nodes == 0:
            return min(moe.groups_per_token, nodes)
        return moe.groups_per_token * nodes // moe.num_groups if nodes % moe.num_groups == 0 else 0

    @property
    def attention_layers(self) -> tuple[LayerAttention, ...]:
        """What the attention of each of the model's layers sees."""
        return self.attention.of_layers(self.model.num_layers)

    @property
    def moe_offset(self) -> int:
        """Index of an MoE layer in each period of ``moe.every`` layers."""
        return self.moe.first % self.moe.every

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers, ascending; empty for a dense model. An encoder's layers are counted first, then the
        decoder's."""
        return (*self.encoder_moe_layers, *(self.model.encoder_layers + i for i in self.decoder_moe_layers))

    @property
    def encoder_moe_layers(self) -> tuple[int, ...]:
        """Those of the encoder, counted from its first layer; empty without one."""
        return self._stack_moe_layers("encoder_layers", self.model.encoder_layers)

    @property
    def decoder_moe_layers(self) -> tuple[int, ...]:
        """Those of the decoder, counted from its first layer."""
        return self._stack_moe_layers("layers", self.model.num_layers)

    def _stack_moe_layers(self, field: str, num_layers: int) -> tuple[int, ...]:
        if self.moe.is_dense:
            return ()
        explicit = self.moe.explicit_layers(field)
        return explicit if explicit is not None else self._periodic_layers(num_layers)

    def _periodic_layers(self, num_layers: int) -> tuple[int, ...]:
        return tuple(i for i in range(self.moe.first_dense_layers, num_layers) if i % self.moe.every == self.moe_offset)

    @property
    def trained_moe_layers(self) -> tuple[int, ...]:
        """The MoE layers that training routes through: the model's, then those of multi-token prediction, counted on from
        ``model.num_layers``. Its blocks are mixtures if the model's last layer is one."""
        layers = self.model.num_layers
        further = range(layers, layers + self.model.mtp_depth) if layers - 1 in self.decoder_moe_layers else ()
        return (*self.moe_layers, *further)

    @property
    def tokens_per_step(self) -> int:
        """Those of encoder and decoder together."""
        return self.data.batch_size * (self.data.sequence_length + self.data.target_length)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)
