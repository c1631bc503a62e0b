"""No number depends on the mesh: outputs, losses, drops, gradient norms and parameters after five SGD steps are
those of one device (B39, B44-B50), on a set of meshes and settings in which every two that can meet do.

What a run computes is in RUNS, and each is computed once on one device. How it is computed (mesh, dispatcher, who
brings tokens to experts, what is recomputed) is in CASES, and must make no difference.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tiny

from moe_jax.nn.moe import RoutingMode
from moe_jax.sharding import AXES, resolve_mesh
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.evaluate import put_batch
from moe_jax.training.state import abstract_state, state_specs
from moe_jax.training.step import forward, train_step


class Run(NamedTuple):
    """What is computed; all of it may change the numbers."""

    buffers: str  # 'tight': choices are dropped; 'roomy': few are; 'dropless'
    balance_scope: str
    scan_layers: bool
    microbatches: int
    group_size: int  # tokens, of sequences of 8
    shared_experts: int
    bias_rate: float


RUNS = {
    "a": Run("tight", "group", True, 2, 8, 1, 1e-3),
    "b": Run("tight", "document", True, 1, 4, 0, 0.0),
    "c": Run("tight", "global", False, 1, 16, 1, 0.0),
    "d": Run("roomy", "group", False, 2, 16, 0, 0.0),
    "e": Run("roomy", "document", False, 1, 8, 1, 0.0),
    "f": Run("roomy", "global", True, 2, 4, 0, 1e-3),
    "g": Run("dropless", "group", False, 1, 4, 1, 1e-3),
    "h": Run("dropless", "document", True, 2, 16, 0, 1e-3),
    "i": Run("dropless", "global", True, 1, 8, 0, 0.0),
}


class Case(NamedTuple):
    """How a run is computed."""

    data: int
    fsdp: int
    expert: int
    tensor: int
    run: str
    dispatch: str
    expert_parallelism: str
    remat: str

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(AXES, self))


CASES = [
    Case(1, 1, 2, 1, "g", "dropless", "shard_map", "none"),
    Case(2, 2, 1, 1, "f", "gather", "compiler", "none"),
    Case(1, 1, 2, 4, "h", "dropless", "none", "dots"),
    Case(1, 1, 4, 2, "i", "dropless", "none", "block"),
    Case(1, 1, 8, 1, "b", "gather", "compiler", "none"),
    Case(1, 2, 1, 4, "c", "einsum", "shard_map", "block"),
    Case(1, 2, 1, 4, "g", "dropless", "compiler", "none"),
    Case(1, 2, 2, 2, "a", "gather", "shard_map", "none"),
    Case(1, 2, 4, 1, "d", "gather", "none", "none"),
    Case(1, 4, 1, 2, "g", "dropless", "none", "dots"),
    Case(1, 4, 2, 1, "e", "gather", "compiler", "block"),
    Case(1, 4, 2, 1, "f", "einsum", "shard_map", "none"),
    Case(2, 1, 1, 4, "e", "gather", "shard_map", "none"),
    Case(2, 1, 4, 1, "b", "einsum", "compiler", "dots"),
    Case(2, 1, 4, 1, "g", "dropless", "shard_map", "block"),
    Case(2, 2, 1, 2, "e", "gather", "compiler", "dots"),
    Case(2, 2, 2, 1, "d", "gather", "compiler", "block"),
    Case(2, 4, 1, 1, "c", "einsum", "none", "block"),
    Case(4, 1, 1, 2, "a", "einsum", "compiler", "none"),
    Case(4, 1, 1, 2, "c", "gather", "shard_map", "dots"),
    Case(4, 1, 2, 1, "b", "gather", "shard_map", "dots"),
    Case(4, 2, 1, 1, "e", "einsum", "none", "block"),
    Case(4, 2, 1, 1, "i", "dropless", "compiler", "block"),
]

STEPS, ROWS, LENGTH, EXPERTS, EMPTY = 5, 32, 8, 8, 3
CAPACITY = {"tight": 0.75, "roomy": 2.0, "dropless": 1.0}
# The bias keeps everyone away from one expert of every layer; on eight expert devices that device has nothing to do.
BIAS_LE = np.where(np.arange(EXPERTS) == EMPTY, -9.0, 0.0)[None].repeat(2, 0).astype(np.float32)


def lengths_of(step):
    """Valid tokens of each row: padding everywhere; one of eight shards masked whole; one of two; all but one of eight,
    and there all rows but one; no padding (B50)."""
    rows = np.arange(ROWS)
    ragged = np.random.default_rng(step).integers(1, LENGTH + 1, ROWS)
    kept = {1: rows // 4 != 2, 2: rows >= ROWS // 2, 3: rows == 25}.get(step, rows >= 0)
    return np.where(kept, LENGTH if step == 4 else ragged, 0)


BATCHES = [tiny.batch(ROWS, LENGTH, seed=step, lengths=lengths_of(step), segments=2) for step in range(STEPS)]


def base(**settings):
    return tiny.config(**dict(dict(
        model_num_layers=2, model_num_heads=8, model_num_kv_heads=8, model_head_dim=2, moe_every=1,
        moe_num_experts=EXPERTS, data_batch_size=ROWS, data_sequence_length=LENGTH, moe_balance_weight=0.1,
        moe_router_jitter=0.05, optimizer_clip_norm=1.0), **settings))


def config_of(run, case=None):
    """The run, on one device as simply as can be or as the case says."""
    how = {}
    if case:
        how = {f"mesh_{axis}": size for axis, size in case.sizes.items()}
        how |= dict(moe_expert_parallelism=case.expert_parallelism, model_remat=case.remat)
        if case.dispatch == "dropless" and case.expert_parallelism == "shard_map":
            how |= dict(moe_row_exchange_factor=0.25)  # rows travel in several rounds
    dispatch = case.dispatch if case else "dropless" if run.buffers == "dropless" else "gather"
    return base(model_scan_layers=run.scan_layers, training_microbatches=run.microbatches,
                moe_group_size=run.group_size, moe_num_shared_experts=run.shared_experts, moe_dispatch=dispatch,
                moe_balance_scope=run.balance_scope, moe_capacity_factor=CAPACITY[run.buffers],
                moe_bias_update_rate=run.bias_rate, **how)


# Running and comparing


@functools.lru_cache(maxsize=None)
def observed_step(config):
    """``(state, batch) -> state, metrics, forward pass with every assignment recorded``, one program."""
    def step(state, batch):
        key = jax.random.fold_in(state["rng"], state["step"] + state["skipped"])
        output = forward(config, tiny.VOCAB, state["params"], batch, RoutingMode.training(config, record=True),
                         state["router_bias_LE"], key)
        routing = output.statistics.routing_G
        seen = {"logits_BSV": output.logits_BSV, "gate_N": routing.gate_N, "token_N": routing.token_N,
                "expert_N": routing.expert_N, "kept_N": output.statistics.kept_GN}
        return *train_step(state, batch, config, tiny.VOCAB), seen

    return jax.jit(step, compiler_options=tiny.QUICK)


def trained(config, mesh=tiny.ONE, batches=BATCHES, **changes):
    """What was seen in each step, on the host, and the state after the last, on the mesh."""
    history, state = [], tiny.state(config, mesh, **changes)
    with jax.set_mesh(mesh):
        for batch in batches:
            state, metrics, seen = observed_step(config)(state, put_batch(batch, mesh))
            history.append(jax.device_get(metrics | {"seen": seen, "after": {k: state[k] for k in KEPT}}))
    return history, state


# What is counted or chosen is equal; the rest up to the rounding of sums in another order.
EXACT = ("counts_LE", "first_LE", "kept_LE", "tokens_L", "token_N", "expert_N", "kept_N", "tokens", "applied",
         "learning_rate", "step", "skipped", "router_bias_LE")
KEPT = ("params", "router_bias_LE", "step", "skipped")


def assert_same(history, expected):
    """Step by step, choices first and parameters last, so that the message names what differed first."""
    exact = lambda name: name.rsplit(".", 1)[-1] in EXACT
    for step, (found, wanted) in enumerate(zip(history, expected, strict=True)):
        found, wanted = tiny.leaves(found), tiny.leaves(wanted)
        assert found.keys() == wanted.keys()
        for name in sorted(wanted, key=lambda name: (not exact(name), "params" in name)):
            message = f"step {step}: {name}"
            assert np.isfinite(found[name]).all(), message
            if exact(name):
                np.testing.assert_array_equal(found[name], wanted[name], err_msg=message)
            else:
                atol = 1e-5 if name.startswith("seen") else 1e-6  # logits and gates; losses, sums, norms, parameters
                np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=atol, err_msg=message)


@functools.lru_cache(maxsize=None)
def on_one_device(name):
    return trained(config_of(RUNS[name]), router_bias_LE=BIAS_LE)[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case)))
def test_b09_b39_b44_b46_b50_five_sgd_steps_are_those_of_one_device(case):
    config = config_of(RUNS[case.run], case)
    mesh = tiny.mesh(**resolve_mesh(config, math.prod(case.sizes.values())))
    assert dict(mesh.shape) == case.sizes
    history, state = trained(config, mesh, router_bias_LE=BIAS_LE)
    assert_same(history, on_one_device(case.run))
    check_empty_expert(config, history)
    check_norms(config, history)
    tiny.assert_replicas_agree(state)
    check_places(state, mesh)


def check_empty_expert(config, history):
    """Without a token its gradient is exactly zero; that of the others is not."""
    before, after = tiny.leaves(tiny.params(config)), tiny.leaves(history[-1]["after"]["params"])
    experts = [name for name in before if name.endswith(("_EDF", "_EFD"))]
    assert len(experts) >= 3
    for name in experts:
        moved_E = np.abs(after[name] - before[name]).max((-1, -2)).reshape(-1, EXPERTS).max(0)
        assert moved_E[EMPTY] == 0 and (np.delete(moved_E, EMPTY) > 0).all(), (name, moved_E)


def check_norms(config, history):
    """The reported norms are those of what SGD took off the parameters, all experts' included."""
    rate, clip = config.optimizer.learning_rate, config.optimizer.clip_norm
    states = [tiny.params(config), *(metrics["after"]["params"] for metrics in history)]
    for metrics, before, after in zip(history, states, states[1:]):
        before, after = tiny.leaves(before), tiny.leaves(after)
        squares = {name: np.sum(((before[name] - after[name]) / rate).astype(np.float64) ** 2) for name in before}
        scale = min(1.0, clip / metrics["grad_norm"])
        routers = sum(square for name, square in squares.items() if "w_router" in name)
        np.testing.assert_allclose(math.sqrt(sum(squares.values())), metrics["grad_norm"] * scale, rtol=1e-3)
        np.testing.assert_allclose(math.sqrt(routers), metrics["router_grad_norm"] * scale, rtol=1e-2)


def check_places(state, mesh):
    """Every leaf still lies where the tables say."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for (path, leaf), spec in zip(leaves, jax.tree.leaves(state_specs(state)), strict=True):
        assert leaf.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), leaf.ndim), path


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_runs_drop_starve_clip_and_pad(name):
    history, run = on_one_device(name), RUNS[name]
    counts, kept = (np.sum([metrics["routing"][key] for metrics in history], axis=0)
                    for key in ("counts_LE", "kept_LE"))
    assert (counts[:, EMPTY] == 0).all() and (np.delete(counts, EMPTY, axis=1) > 0).all()
    dropped = 1 - kept.sum() / counts.sum()
    assert {"tight": 0.1 < dropped < 0.9, "roomy": 0 < dropped < 0.1, "dropless": dropped == 0}[run.buffers], dropped
    norms = [metrics["grad_norm"] for metrics in history]
    clip = config_of(run).optimizer.clip_norm
    assert min(norms) < clip < max(norms), norms
    check_empty_expert(config_of(run), history)
    check_norms(config_of(run), history)


def test_some_batch_leaves_a_shard_of_every_cut_without_a_valid_token():
    for shards in (2, 4, 8):
        cut = [batch["valid"].reshape(shards, -1).any(1) for batch in BATCHES]
        assert any(not one.all() and one.any() for one in cut), shards
    assert all(batch["valid"].any() for batch in BATCHES) and BATCHES[-1]["valid"].all()


# Which two meet

OPTIONS = {"dispatch": ("gather", "einsum", "dropless"), "expert_parallelism": ("compiler", "shard_map", "none"),
           "remat": ("none", "block", "dots"), "buffers": ("tight", "roomy", "dropless"),
           "balance_scope": ("group", "document", "global"), "scan_layers": (True, False), "microbatches": (1, 2),
           "group_size": (LENGTH // 2, LENGTH, 2 * LENGTH), "shared_experts": (0, 1), "bias_rate": (0.0, 1e-3),
           **{axis: (1, 2, "more") for axis in AXES}}


def factors(case):
    """Everything that was chosen for a case; of a mesh axis, whether it has 1, 2 or more devices."""
    sizes = {axis: size if size < 3 else "more" for axis, size in case.sizes.items()}
    return {**RUNS[case.run]._asdict(), **{k: v for k, v in case._asdict().items() if k in OPTIONS}, **sizes}


def can_meet(one, other):
    dropless = [choice for choice in (one, other) if choice[0] in ("dispatch", "buffers")]
    more = [choice for choice in (one, other) if choice[1] == "more"]
    return len(more) < 2 and (len(dropless) < 2 or len({value == "dropless" for _, value in dropless}) == 1)


def test_every_two_settings_that_can_meet_do():
    met = {frozenset(pair) for case in CASES for pair in itertools.combinations(factors(case).items(), 2)}
    choices = [[(name, value) for value in values] for name, values in OPTIONS.items()]
    wanted = [frozenset(pair) for one, other in itertools.combinations(choices, 2)
              for pair in itertools.product(one, other) if can_meet(*pair)]
    assert len(wanted) > 600
    assert [sorted(map(str, pair)) for pair in wanted if pair not in met] == []
    assert {math.prod(case.sizes.values()) for case in CASES} == {2, 4, 8}


# Fewer experts than devices, and layers of another kind


class Special(NamedTuple):
    sizes: dict[str, int]  # of the mesh, as eight devices and this much of a `tensor` axis give it by themselves
    what: dict[str, Any]
    how: dict[str, Any]


SPECIAL = {
    "one expert": Special(dict(data=8), dict(moe_num_experts=1, moe_experts_per_token=1, moe_dispatch="dropless"),
                          dict(moe_expert_parallelism="shard_map")),
    "two experts, both for everyone": Special(
        dict(data=2, expert=2, tensor=2), dict(moe_num_experts=2, moe_experts_per_token=2, moe_capacity_factor=0.75),
        dict(moe_expert_parallelism="shard_map")),
    "expert choice over two rows, tied, expert biases": Special(
        dict(expert=4, tensor=2),
        dict(moe_router="expert_choice", moe_balance_weight=0.0, moe_router_jitter=0.0, moe_group_over="batch",
             moe_group_size=2, model_tie_embedding=True, moe_expert_bias=True, moe_num_experts=4), {}),
    "two nodes, in two parts": Special(
        dict(data=2, expert=4), dict(moe_dispatch="dropless", moe_num_shared_experts=1),
        dict(mesh_expert_nodes=2, moe_exchange_chunks=2, moe_row_exchange_factor=0.25, model_remat="block")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECIAL)
def test_b39_b44_b50_layers_of_another_kind_are_those_of_one_device(name):
    sizes, what, how = SPECIAL[name]
    config = base(model_num_layers=1, mesh_tensor=sizes.get("tensor", 1), **what, **how)
    assert resolve_mesh(config, 8) == dict.fromkeys(AXES, 1) | sizes
    history, state = trained(config, tiny.mesh(**sizes))
    assert_same(history, trained(base(model_num_layers=1, **what))[0])
    check_norms(config, history)
    tiny.assert_replicas_agree(state)


# Checkpoints


@pytest.mark.parametrize("written, read", [
    (dict(data=2, expert=4), dict(fsdp=2, expert=2, tensor=2)), (dict(expert=8), dict()),
    (dict(), dict(expert=8)), (dict(fsdp=2, tensor=4), dict(data=2, fsdp=2, expert=2))], ids=str)
def test_b48_every_device_reads_the_experts_that_are_its_own(tmp_path, written, read):
    """Expert e's weights are e, plus another number for every element of it."""
    config = base()

    def labelled(path, leaf):
        if not path[-1].key.endswith(("_EDF", "_EFD")):
            return leaf
        inside = np.arange(math.prod(leaf.shape[-2:]), dtype=np.float32).reshape(leaf.shape[-2:]) / 2**12
        return np.broadcast_to(np.arange(EXPERTS, dtype=np.float32)[:, None, None] + inside, leaf.shape)

    labels = jax.tree_util.tree_map_with_path(labelled, tiny.params(config))
    mesh = tiny.mesh(**written)
    with jax.set_mesh(mesh), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tiny.state(config, mesh, params=labels), {})
    mesh = tiny.mesh(**read)
    with jax.set_mesh(mesh):
        restored = Checkpointer(tmp_path, read_only=True).restore(abstract_state(config, tiny.VOCAB, mesh)).state
    tiny.assert_equal(jax.device_get(restored["params"]), labels)
    check_places(restored, mesh)
    for name, leaf in ((path[-1].key, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(restored["params"])):
        if name.endswith(("_EDF", "_EFD")):
            for shard in leaf.addressable_shards:
                wanted = np.arange(EXPERTS)[shard.index[-3]]
                assert len(wanted) == EXPERTS // read.get("expert", 1)
                np.testing.assert_array_equal(np.asarray(shard.data).min((0, -1, -2)) // 1, wanted)
