"""Every collective of a step, by formula: what the layers exchange, over which axes, how many bytes, how often.

Per step of one device, in the form of :class:`moe_jax.planning.hlo.Collective`. A compiler may join several into one; it does
not change their bytes. Collectives of a few numbers (losses, norms of gradients, statistics) are left out, and so are rounds
of a dropless exchange beyond the first. An exchange at two levels (``mesh.expert_nodes``) is counted as if it had one.
"""

import math
from typing import Iterator

from moe_jax.config import Config
from moe_jax.planning.formulas import Leaf, Share, blocks, exchanged_rows, trained_mixtures
from moe_jax.planning.hlo import Collective, sent_bytes
from moe_jax.planning.slices import Slice
from moe_jax.routing import ROUTERS
from moe_jax.sharding import TOKEN_AXES
from moe_jax.training.flops import group_tokens

_NAMES = {2: "bf16", 4: "f32"}


def step_collectives(config: Config, slice_: Slice, stacks: tuple[Share, ...],
                     state: dict[str, list[Leaf]]) -> tuple[Collective, ...]:
    """Those of one step; ``stacks`` and ``state`` are of :func:`moe_jax.planning.formulas.shares` and ``state_leaves``."""
    makers = [_Maker(config, slice_, share) for share in stacks]
    found = list(_weights(makers[-1], state["params"]))
    for make in makers:
        found += [*_relative_positions(make), *_experts(make), *_tensor(make)]
    return tuple(each for each in found if each.bytes * each.count)


class _Maker:
    """Makes records of one stack; ``times`` are executions in one microbatch, or in the one pass of inference."""

    def __init__(self, config: Config, slice_: Slice, share: Share):
        self.config, self.slice, self.share = config, slice_, share
        self.training = share.step == "train"
        self.microbatches = config.training.microbatches if self.training else 1

    def __call__(self, kind: str, axes: tuple[str, ...], shape: tuple[int, ...], item: int, times: int, scope: str,
                 dtype: str = "") -> Collective:
        axes = self.share.axes(*axes)
        devices, dtype = self.share.devices(axes), dtype or _NAMES[item]
        text = f"{dtype}[{','.join(map(str, shape))}]"
        return Collective(kind, axes, dtype, sent_bytes(kind, math.prod(shape) * item, devices), text,
                          times * self.microbatches, scope=scope, devices=devices,
                          between_slices=self.slice.num_slices > 1 and self.config.mesh.slice_axis in axes)

    def moe_layers(self) -> int:
        return trained_mixtures(self.config, self.share)

    def passes(self) -> int:
        """Forward, and forward again in the backward pass."""
        return self.share.passes

    def both_ways(self) -> int:
        """Of an exchange whose gradient is an exchange."""
        return self.passes() + (1 if self.training else 0)


# Parameters: gathered before use, their gradients summed


def _weights(make: _Maker, params: list[Leaf]) -> Iterator[Collective]:
    for leaf in params:
        name = ".".join(leaf.path[1:])
        if leaf.path[-1] == "embedding_VD":
            yield from _table(make, leaf, name)
            continue
        if leaf.path[1] == "mtp" and not make.training or leaf.path[1] == "encoder" and make.share.step == "decode":
            continue
        layer = "layers" in leaf.path
        # [D_fsdp, F_tensor] -> all-gather -> [D, F_tensor], in the compute dtype
        if "fsdp" in leaf.spec:
            shape = _shape(leaf, leaf.parts())
            times = leaf.repeats * (make.passes() if layer else 1)
            yield make("all-gather", ("fsdp",), shape, make.share.item, times, name)
            if "_E" in leaf.path[-1] and _gathers_experts(make):
                whole = _shape(leaf, leaf.parts("fsdp"))
                yield make("all-gather", ("expert",), whole, make.share.item, times, name)
        if make.training:
            yield from _gradient(make, leaf, name)


def _table(make, leaf, name):
    """Rows are picked from the whole table; a tied one is gathered along D once more, for the logits."""
    item, training, times = make.share.item, make.training, _predictions(make)
    shared = make.share.given > 0 and not make.config.model.encoder_embedding  # an encoder reads its rows from it too
    yield make("all-gather", ("fsdp", "tensor"), _shape(leaf, leaf.parts()), item, 1, f"{name}: rows")
    if make.config.model.tie_embedding and leaf.path[1] == "embedding":
        yield make("all-gather", ("fsdp",), _shape(leaf, leaf.parts()), item, 1, f"{name}: logits")
        if training:
            yield make("all-reduce", TOKEN_AXES, _shape(leaf, leaf.parts("fsdp")), item, times, f"gradient of {name}: logits")
    if training:
        shape = _shape(leaf, leaf.parts("fsdp", "tensor"))
        yield make("all-reduce", TOKEN_AXES, shape, item, times + shared, f"gradient of {name}: rows")


def _predictions(make):
    """How often a training step uses the tables: for the next token, and for each further one. XLA gathers them once."""
    return 1 + make.config.model.mtp_depth


def _gradient(make, leaf, name):
    """[D, F_tensor], one per device -> reduced over the devices that saw other tokens -> [D_fsdp, F_tensor]."""
    expert = "_E" in leaf.path[-1] and not _gathers_experts(make)
    axes = make.share.axes(*(axis for axis in TOKEN_AXES if not (expert and axis == "expert")))
    gathered = "fsdp" in leaf.spec
    without = ("fsdp",) if expert else ("fsdp", "expert")
    shape = _shape(leaf, leaf.parts(*without))
    # Reduced and scattered where nothing else is to be reduced over; else XLA reduces to all and takes its share.
    kind = "reduce-scatter" if gathered and axes == ("fsdp",) else "all-reduce"
    times = _predictions(make) if leaf.path[-1] == "w_logits_DV" else leaf.repeats
    yield make(kind, axes, shape, make.share.item if gathered else 4, times, f"gradient of {name}")


def _relative_positions(make):
    """What is added to the scores of all rows: [H_tensor, S, S], its gradient reduced for all layers of a stack at once."""
    config, share = make.config, make.share
    if make.training and config.attention.positions == "relative":
        shape = (config.model.num_heads // share.sizes["tensor"], share.row, share.row)
        yield make("all-reduce", TOKEN_AXES, shape, 4, 1, "gradient of relative positions")


def _shape(leaf, parts):
    """Of one layer, as a flat number: how it lies on a device whose share is one of ``parts``."""
    return (math.prod(leaf.shape) // leaf.repeats // parts,)


# Tokens to experts and back


def _gathers_experts(make: _Maker) -> bool:
    """Whether tokens stay and the weights of all experts come to every device."""
    moe = make.config.moe
    return make.share.dispatch == "reference" or moe.expert_parallelism == "none"


def _experts(make: _Maker) -> Iterator[Collective]:
    config, share = make.config, make.share
    peers = share.sizes["expert"]
    if not make.moe_layers() or peers == 1 or _gathers_experts(make):
        return
    both = 2 * make.both_ways()  # there and back
    tokens = group_tokens(config, share.length)
    chunks = math.gcd(config.moe.exchange_chunks, max(share.tokens // tokens, 1)) if make.training else 1
    times = make.moe_layers() * chunks
    width = config.model.d_model
    if share.dispatch != "dropless":
        # [G, E, C, D]: experts scattered, groups gathered
        capacity = ROUTERS[config.moe.router].capacity(tokens, config.moe, config.moe.capacity_factor)
        shape = (share.tokens // tokens // chunks, config.moe.num_experts, capacity, width)
        yield make("all-to-all", ("expert",), shape, share.item, times * both, "dispatch and combine")
        return
    assignments = share.tokens // chunks * config.moe.experts_per_token
    rows = exchanged_rows(config, assignments, share.tokens // chunks, peers)
    here = config.moe.num_experts // peers
    yield make("all-to-all", ("expert",), (peers, here + 1), 4, times * make.passes(), "numbers of rows", "s32")
    if config.moe.row_exchange == "padded":
        yield make("all-to-all", ("expert",), (peers * rows, width), share.item, times * both, "rows of tokens")
    else:
        # At the most: [N, D] to [P, rows, D]. A balanced load sends as much as it has.
        shape = (min(assignments, peers * rows), width)
        yield make("ragged-all-to-all", ("expert",), shape, share.item, times * both, "rows of tokens")


# Sums over `tensor`


def _tensor(make: _Maker) -> Iterator[Collective]:
    config, share = make.config, make.share
    if share.sizes["tensor"] == 1:
        return
    model, moe, item = config.model, config.moe, share.item
    stream = (share.rows, share.length, model.d_model)
    backward = 1 if make.training else 0
    again = 1 if make.training and model.remat == "block" else 0
    layers = len(share.kinds) + (model.mtp_depth if make.training else 0)
    yield make("all-reduce", ("tensor",), stream, item, layers * (1 + again), "attention")
    yield make("all-reduce", ("tensor",), (*stream[:2], _read_by_heads(config)), item, layers * backward,
               "gradient of what heads read")
    if share.given:
        yield make("all-reduce", ("tensor",), stream, item, layers * (1 + again + backward), "cross-attention")
        yield make("all-reduce", ("tensor",), (share.rows, share.given, model.d_model), item, layers * backward,
                   "gradient of what the encoder made")
    for networks, name in ((layers - make.moe_layers(), "dense"), (make.moe_layers() * _beside(moe), "beside experts")):
        # Nobody reads the output of a block's last layer again.
        last = sum(times for pattern, times in blocks(config, share) if not pattern[-1].is_moe) if name == "dense" else 0
        yield make("all-reduce", ("tensor",), stream, item, networks * (1 + again + backward) - again * min(last, networks),
                   f"feed-forward, {name}")
    if make.moe_layers():
        buffers = share.dispatch in ("gather", "einsum") and moe.expert_parallelism == "compiler"
        shape = (share.slots(config), model.d_model) if buffers else stream
        yield make("all-reduce", ("tensor",), shape, item, make.moe_layers() * (1 + again + backward), "experts")
    if make.training and not share.is_encoder:
        outputs = _predictions(make)
        yield make("all-reduce", ("tensor",), stream[:2], 4, 3 * outputs, "loss: maximum, sum and target over the vocabulary")
        yield make("all-reduce", ("tensor",), stream, item, outputs, "gradient of the logits' input")


def _read_by_heads(config):
    """Numbers per token that the heads of one layer's attention are made of, whose gradients are sums over them: the stream, or
    latents and the rotary key."""
    attention, width = config.attention, config.model.d_model
    if attention.kind == "heads":
        return width
    return (attention.query_rank or width) + attention.latent_rank + attention.rope_dim


def _beside(moe):
    """Dense networks beside the experts of an MoE layer."""
    return (moe.residual_ffn != "none") + (moe.num_shared_experts > 0)
