"""Formulas against compiled programs: the training step on eight CPU devices, and on a TPU slice where libtpu is installed.

State bytes and the exchange of tokens are exact, gathers and sums too; what the formulas miss of the rest is asserted.
"""

import collections
import dataclasses
import math

import jax
import pytest
import tiny

from moe_jax.inference import generate
from moe_jax.planning.compiled import abstract_batch
from moe_jax.planning.formulas import estimate, state_leaves
from moe_jax.planning.hlo import collectives
from moe_jax.planning.operations import work
from moe_jax.planning.slices import larger_slices, parse_slice
from moe_jax.planning.suggestions import suggestions
from moe_jax.sharding import AXES
from moe_jax.training.state import abstract_state
from moe_jax.training.step import jitted_train_step

V5E = parse_slice("v5e-8")


def config(**settings):
    """No two products of its dimensions are equal, so that bytes tell what moves; Adam, so that there is optimizer state."""
    values = dict(model_num_layers=3, model_d_model=48, model_num_heads=4, model_num_kv_heads=2, model_head_dim=8,
                  model_d_ff=80, model_vocab_size=tiny.VOCAB, model_remat="block", moe_num_experts=8, moe_every=1,
                  moe_d_ff=56, data_batch_size=16, data_sequence_length=16, optimizer_name="adamw", optimizer_clip_norm=1.0)
    return tiny.config(**values | settings)


PAIR = dict(data_objective="span_corruption", data_target_length=6, attention_positions="relative", data_sequence_length=16)


@dataclasses.dataclass(frozen=True)
class Case:
    config: object
    sizes: dict

    @classmethod
    def of(cls, sizes, **settings):
        return cls(config(**settings), {axis: sizes.get(axis, 1) for axis in AXES})


CASES = {
    "buffers": Case.of({"data": 2, "expert": 4}),
    "all axes": Case.of({"fsdp": 2, "expert": 2, "tensor": 2}, model_num_layers=5, moe_every=2, moe_first_dense_layers=2,
                        moe_num_shared_experts=1, moe_shared_d_ff=48, moe_shared_gate=True, moe_router_bias=True,
                        model_remat="none"),
    "rows": Case.of({"fsdp": 4, "expert": 2}, moe_dispatch="dropless", moe_row_exchange="padded", moe_every=2,
                    model_num_layers=4, training_microbatches=3, data_batch_size=48),
    "further tokens": Case.of({"fsdp": 2, "expert": 2, "tensor": 2}, model_mtp_depth=2, model_remat="none", data_batch_size=8,
                              data_objective="ul2", data_prefix_attention="bidirectional"),
    "latents": Case.of({"fsdp": 2, "expert": 2, "tensor": 2}, model_num_kv_heads=4, model_head_dim=10, attention_kind="latent",
                       model_remat="none", attention_query_rank=20, attention_latent_rank=14, attention_rope_dim=4, attention_value_dim=6),
    "windows": Case.of({"fsdp": 2, "expert": 2, "tensor": 2}, model_num_layers=4, attention_layers="sliding,full",
                       attention_window=5, attention_sinks=True, attention_bias="all", attention_qk_norm="head",
                       model_remat="none"),
    "two stacks": Case.of({"fsdp": 2, "expert": 2, "tensor": 2}, **PAIR, model_encoder_layers=4, model_num_layers=4, moe_every=2,
                          model_remat="none"),
    "two tables": Case.of({"fsdp": 4, "expert": 2}, **PAIR | dict(attention_positions="sinusoidal"), model_encoder_layers=4,
                          model_num_layers=4, moe_every=2, moe_encoder_layers="1,3", moe_layers="0,2", model_encoder_embedding=True,
                          moe_dispatch="dropless", moe_row_exchange="padded", model_remat="none", training_microbatches=2,
                          data_batch_size=32),
}


@pytest.fixture(scope="module", params=CASES)
def compiled(request):
    """(case, arguments in bytes, program text) of the training step on CPU devices."""
    case = CASES[request.param]
    mesh = tiny.mesh(**case.sizes)
    with jax.set_mesh(mesh):
        state = abstract_state(case.config, tiny.VOCAB, mesh)
        lowered = jitted_train_step(case.config, tiny.VOCAB).lower(state, abstract_batch(case.config, mesh))
        program = lowered.compile(compiler_options=tiny.QUICK)
    return case, program.memory_analysis().argument_size_in_bytes, program.as_text(), mesh


def added(found):
    """{(kind, axes, dtype): (executions, bytes)} of collectives that move more than a few numbers."""
    sums = collections.defaultdict(lambda: [0, 0])
    for each in found:
        if each.bytes >= 512 and not each.conditional:
            entry = sums[each.kind, each.axes, each.dtype]
            entry[0], entry[1] = entry[0] + each.count, entry[1] + each.count * each.bytes
    return {key: tuple(value) for key, value in sums.items()}


def test_formulas_match_the_program_compiled_for_cpus(compiled):
    case, arguments, text, mesh = compiled
    guess = estimate(case.config, V5E, case.sizes)
    # The program's arguments are the state and what is read of the batch: where text comes from is for the metrics, and relative
    # positions are those in the row.
    unread = ("domain_ids", "document_ids", *(["positions"] if case.config.attention.positions == "relative" else []))
    state = sum(leaf.bytes for leaves in state_leaves(case.config, case.sizes).values() for leaf in leaves)
    batch = abstract_batch(case.config, mesh)
    batch = {name: leaf for name, leaf in batch.items() if name.removeprefix("encoder_") not in unread}
    rows = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in batch.values())
    assert arguments == state + rows
    held = guess.memory_bytes
    assert held["parameters"] + held["optimizer state"] + held["other state and batch"] == arguments
    # Tokens to experts and back: exact in number and bytes.
    ours, theirs = added(guess.collectives), added(collectives(text, mesh))
    exchange = ("all-to-all", ("expert",), "f32")
    assert ours[exchange] == theirs[exchange]
    # Weights, in bytes: XLA joins some, and gathers over two axes in turn.
    gathered = lambda found: sum(sent for (kind, *_), (_, sent) in found.items() if kind == "all-gather")
    # Where layers or microbatches are not scanned it shares some.
    assert gathered(ours) == pytest.approx(gathered(theirs), rel=0.02)
    # CPUs do not scatter what they reduce: twice the bytes.
    reduced = lambda found: sum(sent * (2 if kind == "reduce-scatter" else 1) for (kind, axes, _), (_, sent) in found.items()
                                if kind in ("all-reduce", "reduce-scatter") and axes != ("tensor",))
    # What is added to scores they reduce in each of a stack's layers, TPUs once.
    relative = sum(each.bytes * each.count for each in guess.collectives if each.scope == "gradient of relative positions")
    assert reduced(ours) + (case.config.model.num_layers - 1) * relative == pytest.approx(reduced(theirs), rel=0.02)
    # As many sums over `tensor`; on CPUs the branches of a layer are summed one by one, on TPUs added up first.
    along = ("all-reduce", ("tensor",), "f32")
    if not case.config.model.encoder_layers:
        assert ours.get(along, (0, 0))[0] == theirs.get(along, (0, 0))[0]
        return
    # Of two stacks it joins sums of several layers. With every branch summed alone the bytes are the same: queries, keys and
    # values of self-attention, keys and values of what is given, two branches of SwiGLU backward.
    branches = {"gradient of what heads read": 3, "gradient of what the encoder made": 2, "feed-forward, dense": 1.5,
                "experts": 1.5}
    alone = sum(each.bytes * each.count * branches.get(each.scope, 1) for each in guess.collectives
                if each.axes == ("tensor",) and each.bytes >= 512)
    assert alone == pytest.approx(theirs.get(along, (0, 0))[1])
    if case.config.moe.dispatch != "dropless":  # whose loops end where the data say
        assert work(text).flops * math.prod(case.sizes.values()) == pytest.approx(guess.hardware_flops, rel=0.02)


def test_an_encoder_reads_prompts_and_a_decoder_writes_as_the_formulas_say():
    """FLOPs of the compiled programs, and the cache: the decoder's own slots, and keys and values of what was read."""
    pair = config(**PAIR, model_encoder_layers=2, model_num_layers=2, moe_num_experts=0)
    sizes = {axis: 2 if axis == "data" else 1 for axis in AXES}
    mesh = tiny.mesh(**sizes)
    with jax.set_mesh(mesh):
        state = abstract_state(pair, tiny.VOCAB, mesh)
        for step in ("prefill", "decode"):
            lowered = generate.lowered(step, pair, tiny.VOCAB, state["params"], state["router_bias_LE"], 16, 16, 6)
            program, guess = lowered.compile(compiler_options=tiny.QUICK), estimate(pair, V5E, sizes, step)
            assert work(program.as_text()).flops * 2 == pytest.approx(guess.model_flops, rel=0.002)
            # Layers, rows, slots, keys and values, heads, width, fp32.
            assert guess.kv_cache_bytes == 2 * 8 * (6 + 16) * 2 * 2 * 8 * 4
    # The cache is written in place, with some numbers beside it for each row and slot.
    assert guess.kv_cache_bytes <= program.memory_analysis().alias_size_in_bytes < 1.05 * guess.kv_cache_bytes


def test_a_mesh_with_more_shares_is_suggested_and_fits():
    """Where the compiler is said to need so much more that the step fills 1.2 devices."""
    case = CASES["buffers"]
    needed = estimate(case.config, V5E, case.sizes).peak_bytes
    correction = 1.2 * V5E.hbm_bytes_per_device / needed
    found = list(suggestions(case.config, V5E, case.sizes, "train", correction))
    assert found and list(suggestions(case.config, V5E, case.sizes, "train")) == []
    for each in found:
        assert each.settings and each.estimate.peak_bytes * correction <= V5E.hbm_bytes_per_device
        assert each.estimate == estimate(each.config, each.slice, each.sizes)
    assert any(word.startswith("--mesh=") for word in found[0].settings)


def test_on_a_larger_slice_what_helps_is_changed_too_and_named_once():
    """Of a step that is rematerialised already and six times too large."""
    case = Case.of({"fsdp": 2, "expert": 4}, data_batch_size=128, moe_d_ff=448)
    correction = 6 * V5E.hbm_bytes_per_device / estimate(case.config, V5E, case.sizes).peak_bytes
    (found,) = suggestions(case.config, V5E, case.sizes, "train", correction)
    names = [setting.partition("=")[0] for setting in found.settings]
    assert names == ["--slice", "--mesh", "--config.training.microbatches"] and found.slice.chips == 32
    assert math.prod(found.sizes.values()) == 32 and found.estimate.peak_bytes * correction <= V5E.hbm_bytes_per_device


def test_larger_slices_ascend():
    chips = [slice_.chips for slice_ in larger_slices(V5E)]
    assert chips == sorted(chips) and chips[0] == 16
