"""Placement of experts: EPLB's own example, packing against brute force, and models that compute the same afterwards."""

import dataclasses
import functools
import itertools
import json
import re
import shutil

import jax
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings, strategies as st
from running import config_of, corpus, lines, moe_jax, overrides, read_json, run_here, saved_steps

from moe_jax.analysis.placement import measured_loads
from moe_jax.config import ConfigError
from moe_jax.dispatch.placement import (
    Placement, imbalance, in_order, pack, place, renumber, replicate, round_copies, to_copies)
from moe_jax.models.decoder import moe_layer_paths
from moe_jax.nn.moe import RoutingMode
from moe_jax.routing.assignment import Routing
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.named_arrays import flatten
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.rearrange import check_placeable, check_renumberable, renumbered, with_copies
from moe_jax.training.state import initial_params, initial_state, state_specs
from moe_jax.training.step import check_trainable

__all__ = ["corpus", "moe_jax"]
MANY = settings(max_examples=60, deadline=None, derandomize=True)

# The README of EPLB: two layers of 12 experts; 16 copies, 4 groups, 2 nodes, 8 devices.
EPLB_LE = np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
                    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])
EPLB_LP = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


# The algorithm.


def test_eplbs_own_example():
    placement = place(EPLB_LE, copies=16, devices=8, nodes=2, groups=4)
    assert placement.expert_LP.tolist() == EPLB_LP
    # Layer 0, device 4: experts 10 (183 over two copies) and 9 (56) give 147.5; the mean is 1033/8.
    assert placement.load_LX(EPLB_LE)[0, 4] == 183 / 2 + 56
    np.testing.assert_allclose(imbalance(placement.load_LX(EPLB_LE))[0], 156 / (1033 / 8))  # device 6: 90 + 132/2
    assert placement.copies_LEJ()[0, [5, 6]].tolist() == [[0, 2, 16, 16, 16], [1, 16, 16, 16, 16]]


def test_nodes_that_do_not_divide_the_groups_play_no_part():
    everywhere = place(EPLB_LE, 16, 8).expert_LP
    np.testing.assert_array_equal(place(EPLB_LE, 16, 8, nodes=2, groups=3).expert_LP, everywhere)
    assert (everywhere != EPLB_LP).any()


def test_a_node_holds_whole_groups():
    for row in place(EPLB_LE, 16, 8, nodes=2, groups=4).expert_LP:
        first, second = ({int(expert) // 3 for expert in half} for half in (row[:8], row[8:]))
        assert len(first) == len(second) == 2 and not first & second


loads = lambda layers, experts: st.lists(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts), min_size=layers,
                                         max_size=layers).map(np.array)


@MANY
@given(st.data())
def test_every_expert_has_a_copy_and_every_device_equally_many(data):
    devices, each = data.draw(st.sampled_from((1, 2, 4))), data.draw(st.sampled_from((2, 3, 5)))
    groups, nodes = data.draw(st.sampled_from((1, 2, 4))), data.draw(st.sampled_from((1, 2, 4)))
    copies = devices * each
    experts = data.draw(st.sampled_from([n for n in range(1, copies + 1) if n % groups == 0] or [groups]))
    load_LE = data.draw(loads(2, experts))
    if copies < experts or devices % nodes and groups % nodes == 0:
        with pytest.raises(ConfigError):
            place(load_LE, copies, devices, nodes, groups)
        return
    placement = place(load_LE, copies, devices, nodes, groups)
    assert placement.expert_LP.shape == (2, copies)
    assert all(set(row) == set(range(experts)) for row in placement.expert_LP.tolist())
    np.testing.assert_allclose(placement.load_LX(load_LE).sum(axis=1), load_LE.sum(axis=1))
    table_LEJ = placement.copies_LEJ()
    for layer, expert in np.ndindex(2, experts):
        mine = table_LEJ[layer, expert][table_LEJ[layer, expert] < copies]
        np.testing.assert_array_equal(mine, np.flatnonzero(placement.expert_LP[layer] == expert))


@MANY
@given(load_E=st.lists(st.integers(0, 50), min_size=1, max_size=4), more=st.integers(0, 4))
def test_replication_makes_the_largest_load_per_copy_as_small_as_can_be(load_E, more):
    load_E = np.array(load_E)
    expert_P, load_P = replicate(load_E, load_E.size + more)
    count_E = np.bincount(expert_P, minlength=load_E.size)
    np.testing.assert_allclose(load_P, (load_E / count_E)[expert_P])
    every_count = (count for count in itertools.product(range(1, more + 2), repeat=load_E.size)
                   if sum(count) == load_E.size + more)
    np.testing.assert_allclose(load_P.max(), min((load_E / np.array(count)).max() for count in every_count))


def best_largest(load_N, packs):
    """The smallest possible load of the fullest pack, by trying everything."""
    def largest(items, packs):
        if packs == 1:
            return load_N[list(items)].sum()
        size, first = len(items) // packs, items[0]
        parts = ((first, *others) for others in itertools.combinations(items[1:], size - 1))
        return min(max(load_N[list(part)].sum(), largest([i for i in items if i not in part], packs - 1)) for part in parts)

    return largest(list(range(len(load_N))), packs)


@MANY
@given(shape=st.sampled_from([(2, 3), (3, 2), (2, 4), (4, 2)]), data=st.data())
def test_packing_stays_within_a_third_of_the_optimum(shape, data):
    load_N = data.draw(loads(1, shape[0] * shape[1]))[0]
    packs = pack(load_N, shape[0])
    assert sorted(packs.reshape(-1).tolist()) == list(range(load_N.size)) and packs.shape == shape
    assert load_N[packs].sum(axis=1).max() <= 4 / 3 * best_largest(load_N, shape[0]) + 1e-9


@MANY
@given(load_LE=loads(3, 12), devices=st.sampled_from([1, 2, 3, 4, 6, 12]), groups=st.sampled_from([1, 2, 4]),
       nodes=st.sampled_from([1, 2]))
def test_other_numbers_never_make_it_worse_and_keep_groups_together(load_LE, devices, groups, nodes):
    if devices % nodes and groups % nodes == 0 or groups % devices and devices % groups:
        with pytest.raises(ConfigError):
            renumber(load_LE, devices, nodes, groups)
        return
    placement = renumber(load_LE, devices, nodes, groups)
    np.testing.assert_array_equal(np.sort(placement.expert_LP, axis=1), np.tile(np.arange(12), (3, 1)))
    group_LXM = (placement.expert_LP // (12 // groups)).reshape(3, groups, -1)
    assert (group_LXM == group_LXM[:, :, :1]).all()
    before, after = imbalance(in_order(3, 12, devices).load_LX(load_LE)), imbalance(placement.load_LX(load_LE))
    assert (after <= before).all()
    np.testing.assert_array_equal(placement.expert_LP[after == before], np.tile(np.arange(12), ((after == before).sum(), 1)))


def test_ties_go_to_the_lowest_number():
    assert pack(np.ones(6), 3).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert replicate(np.ones(3), 5)[0].tolist() == [0, 1, 2, 0, 1]
    assert place(np.zeros((1, 4)), 4, 2).expert_LP.tolist() == [[0, 1, 2, 3]]
    assert imbalance(np.zeros((1, 4))).tolist() == [1.0]


@pytest.mark.parametrize("numbers, words", [
    (dict(copies=13, devices=8), "redundant=1: 12 experts and 1 redundant copies are 13.*devices=8.*redundant: 4"),
    (dict(copies=10, devices=2), "redundant=-2.*redundant: 0"),
    (dict(copies=16, devices=5), "redundant=4.*redundant: 3, 8"),
    (dict(copies=16, devices=0), "devices=0: must be at least 1"),
    (dict(copies=15, devices=3, nodes=2, groups=4), "nodes=2: must divide devices=3; nearest legal values: 1, 3"),
    (dict(copies=16, devices=8, groups=5), "groups=5: must divide 12 experts; nearest legal values: 4, 6"),
])
def test_numbers_that_do_not_divide_are_refused_with_those_that_do(numbers, words):
    with pytest.raises(ConfigError, match=words):
        place(EPLB_LE, **numbers)


def test_groups_that_devices_would_tear_apart_are_refused():
    with pytest.raises(ConfigError, match="devices=6: .*moe.num_groups=4.*legal values: 1, 2, 4, 12"):
        renumber(EPLB_LE, 6, groups=4)


@pytest.mark.parametrize("load_LE", [np.ones(4), np.ones((0, 4)), -np.ones((1, 4)), np.full((1, 4), np.nan)])
def test_loads_that_are_none_are_refused(load_LE):
    with pytest.raises(ValueError, match="wanted is \\[layers, experts\\]"):
        place(load_LE, 4, 2)


# From experts to copies.


def test_an_experts_assignments_go_round_its_copies_by_hand():
    # Copies 0 … 4 are of experts 1, 0, 1, 2, 1; E = 3 and one expert without computation, 3; 4 is nowhere.
    table_EJ = Placement(np.array([[1, 0, 1, 2, 1]]), 1).copies_LEJ()[0]
    expert_N = np.array([1, 0, 1, 3, 4, 1, 4 + 1 + 1, 1, 4 + 1 + 3, 2])
    routing = Routing(np.arange(10), jax.numpy.asarray(expert_N), np.ones(10), None)
    # Expert 1: copies 0, 2, 4, then one that passes the queue of copy 0, then copy 2. Without computation: 5; nowhere: 6.
    assert to_copies(routing, table_EJ, 5, 4).expert_N.tolist() == [0, 1, 2, 5, 6, 4, 6 + 1 + 0, 2, 6 + 1 + 5, 3]
    assert to_copies(routing, table_EJ, 5, 4, first=1).expert_N.tolist() == [2, 1, 4, 5, 6, 0, 6 + 1 + 2, 4, 6 + 1 + 5, 3]


def test_the_first_copies_of_a_model_cover_every_expert():
    assert round_copies(3, 5).tolist() == [[0, 3, 5], [1, 4, 5], [2, 5, 5]]


# Models with copies.


@functools.lru_cache(maxsize=None)
def _drawn(config):
    shapes = jax.eval_shape(lambda: initial_params(config, tiny.VOCAB, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


def drawn(config):
    """Parameters, quickly; in a tree of the caller's own."""
    return jax.tree.map(lambda leaf: leaf, _drawn(config))


def copied(config, placement):
    """(config, parameters) of the same model with copies."""
    params = drawn(config)
    copies = placement.expert_LP.shape[1]
    changed = dataclasses.replace(config, moe=dataclasses.replace(config.moe, expert_copies=copies))
    return changed, with_copies(params, config, placement)


def uneven(config, copies, devices, groups=1):
    """A placement by uneven loads, another one in every layer."""
    load_LE = np.random.default_rng(0).integers(1, 100, (len(config.moe_layers), config.moe.num_experts)) ** 2
    return place(load_LE, copies, devices, groups=groups)


LENGTHS = [16, 9, 16, 16, 1, 16, 12, 0]
SIX = dict(moe_num_experts=6, model_num_layers=4, moe_every=2)
COPIED = {
    "experts do not divide over the devices, copies do": (SIX, dict(data=2, expert=4), 8),
    "one copy each, in another order": (SIX, dict(fsdp=2, expert=2, tensor=2), 6),
    "leading and trailing layers, biases, experts without computation": (
        dict(moe_num_experts=6, model_num_layers=5, moe_every=2, moe_first=0, moe_expert_bias=True, moe_num_zero_experts=1,
             moe_num_identity_experts=1), dict(expert=4), 8),
    "no layers repeat, groups of one token": (
        dict(moe_num_experts=6, model_num_layers=2, moe_every=1, model_scan_layers=False, moe_group_size=1), {}, 9),
}


@pytest.mark.parametrize("name", COPIED)
def test_copies_compute_what_the_experts_compute(name):
    changes, mesh, copies = COPIED[name]
    config, mesh = tiny.config(**changes), tiny.mesh(**mesh)
    placement = uneven(config, copies, devices=1)
    batch = tiny.batch(lengths=LENGTHS)
    expected = tiny.output(config, drawn(config), batch, tiny.DROPLESS)
    with_more, params = copied(config, placement)
    found = tiny.output(with_more, params, batch, tiny.DROPLESS, mesh=mesh)
    np.testing.assert_allclose(found.logits_BSV, expected.logits_BSV, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.statistics.kept_GE, expected.statistics.kept_GE)
    np.testing.assert_array_equal(found.statistics.router.choices_E, expected.statistics.router.choices_E)
    assert expected.statistics.copies_GP is None
    for layer, (copies_GP, kept_GE) in enumerate(zip(found.statistics.copies_GP, expected.statistics.kept_GE)):
        for expert in range(6):
            mine_GJ = np.asarray(copies_GP)[:, placement.expert_LP[layer] == expert]
            np.testing.assert_array_equal(mine_GJ.sum(axis=1), kept_GE[:, expert])
            assert (np.ptp(mine_GJ, axis=1) <= 1).all()  # round and round
            # Groups begin at copies by turns: none is left out where groups are short.
            assert mine_GJ.sum() < 12 or (mine_GJ.sum(axis=0) > 0).all()


def test_with_buffers_copies_drop_no_choice_that_was_kept_before():
    config = tiny.config(**SIX, moe_second_policy="threshold", moe_second_threshold=0.3, moe_second_in_queue=True,
                         moe_renormalize=True)
    tight = RoutingMode("gather", 0.5, record=True)
    batch = tiny.batch(lengths=LENGTHS)
    before = tiny.output(config, drawn(config), batch, tight).statistics
    found = tiny.output(*copied(config, uneven(config, 8, 2)), batch, tight, mesh=tiny.mesh(expert=4)).statistics
    # The second layer's input differs by what the first kept more.
    np.testing.assert_array_equal(found.routing_G.expert_N[0], before.routing_G.expert_N[0])
    assert (np.asarray(found.kept_GN[0]) >= np.asarray(before.kept_GN[0])).all()
    assert np.asarray(found.kept_GE)[0].sum() > np.asarray(before.kept_GE)[0].sum()


def test_copies_are_not_trained():
    with pytest.raises(ConfigError, match="moe.expert_copies=6: copies of experts are for evaluation and generation"):
        check_trainable(tiny.config(moe_expert_copies=6))


@pytest.mark.parametrize("options, words", [
    (dict(moe_expert_copies=3), "moe.expert_copies=3: every expert needs a copy; .*at least moe.num_experts=4, or to 0"),
    (dict(moe_expert_copies=-1), "moe.expert_copies=-1"),
    (dict(moe_expert_copies=6, moe_expert_widths="8*4", moe_dispatch="dropless"), "moe.expert_copies=6: copies lie in one"),
])
def test_copies_that_cannot_be_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        tiny.config(**options)


# Experts with other numbers.


def shuffled(config, seed=0):
    """Experts in another order in every layer; whole groups."""
    rng, moe = np.random.default_rng(seed), config.moe
    def layer():
        groups = rng.permutation(np.arange(moe.num_experts).reshape(moe.num_groups, -1))
        return np.concatenate([rng.permutation(group) for group in groups])
    return Placement(np.stack([layer() for _ in config.moe_layers]), 1)


def as_renumbered(state, config, placement, mesh=tiny.ONE):
    """The state with its experts renumbered, on the mesh again."""
    flat = renumbered(flatten(state), config, placement)
    tree = jax.tree.unflatten(jax.tree.structure(state), [flat[path] for path in flatten(state)])
    return tiny.placed(tree, mesh, state_specs(tree))


RENUMBERED = {
    "adam, running mean, bias, buffers, experts without computation": dict(
        optimizer_name="adamw", training_ema_decay=0.9, moe_bias_update_rate=0.01, moe_router_jitter=0.1, moe_score="sigmoid",
        optimizer_clip_norm=0.1, moe_capacity_factor=0.7, moe_num_identity_experts=1, moe_num_constant_experts=1),
    "groups, biases, momentum, no layers repeat": dict(
        moe_num_groups=2, moe_groups_per_token=1, moe_device_weight=0.1, moe_expert_bias=True, optimizer_momentum=0.9,
        model_num_layers=2, moe_every=1, model_scan_layers=False),
}


@pytest.mark.parametrize("name", RENUMBERED)
def test_training_goes_on_with_experts_of_other_numbers(name):
    config = tiny.config(**RENUMBERED[name])
    placement, batches = shuffled(config), [tiny.batch(seed=seed, lengths=LENGTHS) for seed in range(3)]
    state, _ = tiny.step(config, tiny.state(config), batches[0])
    other = as_renumbered(state, config, placement)
    assert any((np.asarray(new) != np.asarray(old)).any()
               for new, old in zip(jax.tree.leaves(other["params"]), jax.tree.leaves(state["params"])))
    without_weights = np.arange(config.moe.num_experts, config.moe.num_routed_experts)
    order_LE = np.concatenate([placement.expert_LP, np.tile(without_weights, (len(config.moe_layers), 1))], axis=1)
    for batch in batches[1:]:
        state, metrics = tiny.step(config, state, batch)
        other, found = tiny.step(config, other, batch)
        for loss in metrics["sums"]:
            np.testing.assert_allclose(found["sums"][loss], metrics["sums"][loss], rtol=2e-5, atol=1e-6, err_msg=loss)
        np.testing.assert_array_equal(found["routing"]["counts_LE"],
                                      np.take_along_axis(np.asarray(metrics["routing"]["counts_LE"]), order_LE, axis=1))
    expected = as_renumbered(state, config, placement)
    for part in ("params", "opt_state", "router_bias_LE", *(["ema"] if "ema" in state else [])):
        for path, leaf in flatten({part: expected[part]}).items():
            np.testing.assert_allclose(flatten({part: other[part]})[path], leaf, rtol=1e-3, atol=2e-5, err_msg=path)


def test_two_levels_give_their_groups_other_numbers_too():
    config = tiny.config(model_num_layers=2, moe_every=1, moe_router="hierarchical", moe_num_experts=8, moe_num_groups=4,
                         moe_groups_per_token=2, moe_experts_per_token=4, moe_load_weight=0.1)
    placement, batch = shuffled(config), tiny.batch()
    assert (placement.expert_LP[:, ::2] // 2 != np.arange(4)).any()
    params = drawn(config)
    state = {"params": params, "router_bias_LE": np.zeros((2, 8))}
    flat = renumbered(flatten(state), config, placement)
    other = jax.tree.unflatten(jax.tree.structure(state), [flat[path] for path in flatten(state)])["params"]
    np.testing.assert_allclose(tiny.logits(config, other, batch), tiny.logits(config, params, batch), rtol=1e-5, atol=1e-5)


def test_adafactors_factored_moments_follow():
    # 128 experts of width 4: moments of router and experts are means over D, and over E.
    config = tiny.config(model_num_layers=4, moe_every=2, moe_num_experts=128, moe_d_ff=4, model_d_model=130,
                         optimizer_name="adafactor", optimizer_learning_rate=0.01, optimizer_weight_decay=0.1)
    shapes = jax.eval_shape(lambda: initial_state(config, 32))["params"]
    rng, optimizer = np.random.default_rng(0), make_optimizer(config.optimizer, 10)
    draw = lambda: jax.tree.map(lambda leaf: jax.numpy.asarray(rng.normal(size=leaf.shape).astype(np.float32)), shapes)
    only = lambda tree: {"body": {"layers": {1: {"moe": tree["body"]["layers"][1]["moe"]}}}}
    params, grads, placement = only(draw()), [only(draw()) for _ in range(2)], shuffled(config)

    def renumber_all(params, opt_state):
        flat = flatten({"params": params, "opt_state": opt_state})
        new = renumbered({**flat, "router_bias_LE": np.zeros((2, 128))}, config, placement)
        leaves = [jax.numpy.asarray(new[path]) for path in flat]
        return jax.tree.unflatten(jax.tree.structure((opt_state, params)), leaves)[::-1]

    @jax.jit
    def update(params, opt_state, grads):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = update(params, optimizer.init(params), grads[0])
    moments = {path: leaf.shape for path, leaf in flatten(state[1]).items() if "v_" in path}
    assert {(2, 128), (2, 130), (2, 128, 4), (2, 130, 4)} <= set(moments.values())
    other = update(*renumber_all(*state), renumber_all(grads[1], state[1])[0])
    tiny.assert_close(other, renumber_all(*update(*state, grads[1])), rtol=1e-4)


@pytest.mark.parametrize("options, words", [
    (dict(moe_router="hash", moe_experts_per_token=1, moe_balance_weight=0.0, moe_router_z_weight=0.0), "by their numbers"),
    (dict(moe_router="balanced"), "by their numbers"),
    (dict(moe_padding="takes_slots"), "moe.padding='takes_slots'"),
])
def test_where_a_number_has_a_meaning_it_stays(options, words):
    with pytest.raises(ConfigError, match=words):
        check_renumberable(tiny.config(**options))


@pytest.mark.parametrize("options, words", [
    (dict(moe_num_experts=0), "moe.num_experts=0: the model has no experts to place"),
    (dict(moe_expert_widths="8*2,16*2", moe_dispatch="dropless"), "moe.expert_widths='8\\*2,16\\*2': experts of unequal width"),
])
def test_models_without_experts_that_are_alike_are_not_placed(options, words):
    with pytest.raises(ConfigError, match=words):
        check_placeable(tiny.config(**options))


def test_copies_and_torn_groups_are_no_other_numbers():
    config = tiny.config(moe_num_groups=2, moe_groups_per_token=1)
    flat = flatten(tiny.state(config))
    for expert_E, words in ((np.array([0, 2, 1, 3]), "tears groups"), (np.array([0, 1, 2, 3, 3, 3]), "6 copies of 4 experts")):
        with pytest.raises(ValueError, match=words):
            renumbered(flat, config, Placement(np.tile(expert_E, (2, 1)), 1))


def test_paths_of_moe_layers_are_those_of_the_parameters():
    for changes in ({}, dict(model_num_layers=5, moe_first=0), dict(model_num_layers=3, moe_every=1, model_scan_layers=False)):
        config = tiny.config(**changes)
        paths = moe_layer_paths(config)
        params = jax.eval_shape(lambda config=config: initial_state(config, 32))["params"]
        found = {path.split("/moe/")[0] + "/moe" for path in flatten(params) if "/moe/" in path}
        assert found == set(paths)
        assert sorted(layer for layers in paths.values() for layer in layers) == list(range(len(config.moe_layers)))


# The command.


SETTINGS = dict(moe__balance_weight=0.0, moe__bias_update_rate=0.0, moe__num_experts=6, training__num_steps=8)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A complete run of eight steps, checkpoints at 4 and 8."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    assert run_here("train", *overrides(corpus, **SETTINGS), f"--workdir={workdir}") == 0
    return workdir


def test_place_shows_the_imbalance_before_and_after_and_eval_measures_it(moe_jax, run, tmp_path):
    out = tmp_path / "placement.json"
    placed = moe_jax("place", f"--workdir={run}", "--devices=4", "--redundant=2", f"--out={out}")
    assert placed.code == 0, placed.err
    assert "do not divide over 4 devices" in placed.out  # 6 experts
    found = read_json(out)
    assert found["imbalance_before"] is None and len(found["imbalance_after"]) == len(found["layers"]) == 1
    assert (tmp_path / "placement.png").read_bytes()[:4] == b"\x89PNG"
    placed = moe_jax("place", f"--workdir={run}", "--devices=2", "--redundant=2", f"--out={out}")
    found = read_json(out)
    assert f"{found['imbalance_before'][0]:.3f}" in placed.out and f"{found['imbalance_after'][0]:.3f}" in placed.out
    with np.load(run / "routing" / "evaluation.npz") as arrays:
        assert found["load"] == arrays["counts_LE"].tolist()
        assert found["expert_of_copy"] == place(arrays["counts_LE"], 8, 2).expert_LP.tolist()

    plain = json.loads(moe_jax("eval", f"--workdir={run}", "--json", "--batches=2").out)
    evaluated = json.loads(moe_jax("eval", f"--workdir={run}", "--json", "--batches=2", f"--placement={out}").out)
    assert evaluated["ce"] == pytest.approx(plain["ce"], rel=1e-5) and evaluated["tokens"] == plain["tokens"]
    measured = evaluated["placement"]
    # Measured on the same held-out batches; copies share an expert's choices but for one per group.
    assert measured["imbalance_without"] == pytest.approx(found["imbalance_before"])
    assert measured["imbalance_with"] == pytest.approx(found["imbalance_after"], abs=0.05)
    assert "imbalance_with" not in plain
    told = moe_jax("eval", f"--workdir={run}", "--batches=2", f"--placement={out}").out
    assert "8 copies of experts on 2 devices" in told and f"{measured['imbalance_with'][0]:.3f}" in told
    words = ("generate", f"--workdir={run}", "--temperature=0", "--max-tokens=8", "--prompt=apple")
    assert moe_jax(*words, f"--placement={out}").out == moe_jax(*words).out


def test_a_run_goes_on_with_its_experts_in_another_order(moe_jax, run, corpus, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(run, half)
    shutil.rmtree(half / "checkpoints" / "step_0000000008")
    for name in ("complete.json", "evaluation.json", "report.html", "routing"):
        shutil.rmtree(half / name, ignore_errors=True) if name == "routing" else (half / name).unlink()
    new, out = tmp_path / "new", tmp_path / "order.json"
    placed = moe_jax("place", f"--workdir={half}", "--devices=3", f"--out={out}", f"--apply={new}")
    assert placed.code == 0 and "step 4" in placed.out, placed.err
    assert "training batches of step 1 to 8" in placed.out  # nothing was evaluated
    order = read_json(out)["expert_of_copy"][0]
    assert order != list(range(6)) and read_json(new / "expert_order.json")["expert_order"] == [order]
    assert saved_steps(new) == [4] and not Checkpointer(new / "checkpoints", read_only=True).verify(4)
    assert saved_steps(half) == [4] and not (half / "expert_order.json").exists()
    again = moe_jax("train", *overrides(corpus, **SETTINGS), f"--workdir={new}")
    assert again.code == 0 and "Resumed from the checkpoint of step 4" in again.err, again.err
    assert [line["step"] for line in lines(new)] == list(range(1, 9))
    for line, expected in zip(lines(new), lines(run), strict=True):
        for loss in ("loss/ce", "loss/total", "grad_norm"):
            assert line[loss] == pytest.approx(expected[loss], rel=1e-4), (line["step"], loss)
        # The curve before the change speaks of the new numbers too.
        np.testing.assert_allclose(line["expert_load"][0], np.array(expected["expert_load"])[0, order], atol=0.02)
    refused = moe_jax("eval", f"--workdir={new}", f"--placement={out}")
    assert refused.code == 1 and "the run was renumbered by moe-jax place --apply" in refused.error
    twice = moe_jax("place", f"--workdir={half}", "--devices=3", f"--out={out}", f"--apply={new}")
    assert twice.code == 1 and "is there already" in twice.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "new", "order.json", "order.png"]


def test_a_place_without_recorded_routing_is_refused(moe_jax, run, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    shutil.rmtree(bare / "routing")
    (bare / "metrics.jsonl").unlink()
    outcome = moe_jax("place", f"--workdir={bare}", "--devices=2", f"--out={tmp_path / 'p.json'}")
    assert outcome.code == 1 and "has no recorded routing" in outcome.error and not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("words, message", [
    (["--devices=4"], "redundant=0: 6 experts and 0 redundant copies are 6.*nearest legal values of redundant: 2"),
    (["--devices=4", "--redundant=3"], "redundant=3: .*: 2, 6"),
    (["--devices=0"], "devices=0: must be at least 1"),
    (["--devices=2", "--redundant=-2"], "--redundant=-2: must be at least 0"),
    (["--devices=2", "--nodes=2"], "--nodes=2: nodes get whole groups.*must divide moe.num_groups=1; legal values: 1"),
    (["--devices=2", "--redundant=2", "--apply=elsewhere"], "--apply=elsewhere: copies would grow apart in training"),
    (["--devices=2", "--out=placement.txt"], "--out=placement.txt: must end in .json"),
    (["--devices=2", "--out=no/such/folder.json"], "--out=no/such/folder.json: there is no folder"),
])
def test_a_placement_that_cannot_be_is_one_line_and_writes_nothing(moe_jax, run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    outcome = moe_jax("place", f"--workdir={run}", *words)
    assert outcome.code == 1 and re.search(message, outcome.error), outcome.error
    assert not list(tmp_path.iterdir())


def test_a_placement_of_another_run_or_a_damaged_one_is_refused(moe_jax, run, tmp_path):
    out = tmp_path / "placement.json"
    assert moe_jax("place", f"--workdir={run}", "--devices=2", f"--out={out}").code == 0
    good = read_json(out)

    def refused(change):
        value = json.loads(json.dumps(good))
        change(value)
        out.write_text(json.dumps(value))
        outcome = moe_jax("eval", f"--workdir={run}", f"--placement={out}")
        assert outcome.code == 1
        return outcome.error

    error = refused(lambda value: value["run"]["config"]["moe"].update(num_experts=8))
    assert "was made for another run" in error and "moe.num_experts: 8 -> 6" in error
    assert "attention.bias: 'qkv' -> 'none'" in refused(lambda value: value["run"]["config"]["attention"].update(bias="qkv"))
    assert "training.seed: 5 -> 0" in refused(lambda value: value["run"].update(seed=5))
    assert "holds no placement of this version" in refused(lambda value: value.update(format=2))
    assert "is damaged (KeyError: 'load')" in refused(lambda value: value.pop("load"))
    assert "a layer lacks one of the experts" in refused(lambda value: value["expert_of_copy"][0].__setitem__(0, 17))
    assert "do not divide over 4 devices" in refused(lambda value: value.update(devices=4))
    # One of before there was that section is as good.
    assert "do not divide" in refused(lambda value: (value["run"]["config"].pop("attention"), value.update(devices=4)))
    assert "are not of 1 layers of 6 experts" in refused(lambda value: value["load"].append(value["load"][0]))
    out.write_text(out.read_text()[:100])
    assert "is no JSON" in moe_jax("eval", f"--workdir={run}", f"--placement={out}").error
    missing = moe_jax("eval", f"--workdir={run}", f"--placement={tmp_path / 'nowhere.json'}")
    assert missing.code == 1 and "No such file" in missing.error
    assert "give --placement" in moe_jax("eval", f"--workdir={run}", "--config.moe.expert_copies=8").error


def test_damaged_recordings_are_named(moe_jax, run, corpus, tmp_path):
    config = config_of(corpus, **SETTINGS)
    assert measured_loads(run, config)[1].endswith("choices per layer on held-out text")
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    (broken / "routing" / "evaluation.npz").write_bytes(b"PK nothing")
    outcome = moe_jax("place", f"--workdir={broken}", "--devices=2", f"--out={tmp_path / 'p.json'}")
    assert outcome.code == 1 and "evaluation.npz" in outcome.error
    np.savez(broken / "routing" / "evaluation.npz", counts_LE=np.ones((1, 5)))
    outcome = moe_jax("place", f"--workdir={broken}", "--devices=2", f"--out={tmp_path / 'p.json'}")
    assert outcome.code == 1 and "does not hold the loads of 6 experts in 1 layers" in outcome.error
