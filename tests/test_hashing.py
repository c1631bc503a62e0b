"""Fixed routes: hashes, tables and what is refused; and the debug routers. By hand and against NumPy loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax.config import ConfigError, MoEConfig
from moe_jax.data.token_store import SplitTokens, TokenStore
from moe_jax.inference.generate import Sampling, generate
from moe_jax.nn.moe import RoutingMode
from moe_jax.routing import ROUTERS, RouterInputs, check_router, hash_tables
from moe_jax.routing.assignment import assign_slots
from moe_jax.routing.hashing import load_table, scrambled
from moe_jax.training.flops import count_parameters, forward_flops_per_token
from moe_jax.training.state import initial_params

NO_LOSSES = dict(balance_weight=0.0, router_z_weight=0.0)


def hash_config(function="random", num_experts=8, experts_per_token=1, **options):
    return MoEConfig(num_experts=num_experts, experts_per_token=experts_per_token, router="hash", hash_function=function,
                     **NO_LOSSES, **options)


@functools.lru_cache(maxsize=None)
def jitted(moe):
    return jax.jit(lambda inputs: ROUTERS[moe.router].route(inputs, moe))


def route(moe, ids=None, previous=None, positions=None, valid=None, logits=None):
    ids = np.zeros(len(logits) if logits is not None else len(positions), np.int32) if ids is None else ids
    as_ids = lambda x: jnp.asarray(ids if x is None else x, jnp.int32)
    valid = np.ones(len(ids), bool) if valid is None else valid
    logits = np.zeros((len(ids), moe.num_experts)) if logits is None else logits
    return jax.device_get(jitted(moe)(RouterInputs(
        jnp.asarray(logits, jnp.float32), jnp.asarray(valid), jnp.zeros(moe.num_experts), as_ids(ids), as_ids(positions),
        None, as_ids(previous))))


# Hashes


def python_scrambled(value, seed):
    """MurmurHash3's finaliser on Python integers."""
    mask = 2**32 - 1
    bits = (value & mask) ^ (seed * 0x9E3779B9 & mask)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ bits >> shift) * factor & mask
    return bits ^ bits >> 16


def test_the_scramble_is_the_finaliser_of_murmurhash3():
    assert python_scrambled(1, 0) == 0x514E28B7  # its published fmix32(1)
    values = np.array([0, 1, 2, 31999, 2**31 - 1], np.int32)
    for seed in (0, 1, 7000):
        assert jax.jit(scrambled)(values, seed).tolist() == [python_scrambled(int(v), seed) for v in values]


def test_each_function_looks_at_what_it_is_named_after():
    rng = np.random.default_rng(0)
    ids, previous, positions = rng.integers(0, 1000, (3, 64))
    found = {name: route(hash_config(name, hash_seed=0 if name == "position" else 3), ids, previous, positions).expert_N
             for name in ("random", "previous_token", "bigram", "position")}
    assert found["random"].tolist() == [python_scrambled(int(i), 3) % 8 for i in ids]
    assert found["previous_token"].tolist() == [python_scrambled(int(i), 3) % 8 for i in previous]
    assert found["bigram"].tolist() == [
        python_scrambled(int(i) ^ python_scrambled(int(p), 4), 3) % 8 for i, p in zip(ids, previous)]
    assert found["position"].tolist() == [int(p) % 8 for p in positions]


@pytest.mark.parametrize("function", ["random", "previous_token", "bigram"])
def test_a_hash_spreads_ids_evenly_and_differently_for_every_seed(function):
    ids = np.arange(8000)
    one, other = (route(hash_config(function, hash_seed=seed), ids, ids[::-1]).expert_N for seed in (0, 1))
    # 1000 expected each; the standard deviation of a random spread is 30.
    assert np.abs(np.bincount(one, minlength=8) - 1000).max() < 120
    assert 0.08 < np.mean(one == other) < 0.17  # 1/8 by chance


def test_the_gate_is_one_and_padding_goes_nowhere():
    routing = route(hash_config(), np.arange(6), valid=np.array([1, 1, 0, 1, 0, 1], bool))
    assert (routing.expert_N == 8).tolist() == [False, False, True, False, True, False]
    assert routing.gate_N.tolist() == [1, 1, 0, 1, 0, 1]
    statistics = routing.statistics
    assert statistics.tokens == 4 and statistics.choices_E.sum() == 4 and statistics.entropy == 0
    np.testing.assert_array_equal(statistics.choices_E, statistics.first_choices_E)
    np.testing.assert_array_equal(statistics.choices_E, statistics.probability_E)


def test_multihash_gives_every_hash_its_own_pool_of_experts():
    ids = np.arange(4000)
    expert_TK = route(hash_config(num_experts=12, experts_per_token=3), ids).expert_N.reshape(-1, 3)
    for k in range(3):
        assert expert_TK[:, k].tolist() == [python_scrambled(int(i), 1000 * k) % 4 + 4 * k for i in ids]
    # Independent hashes: every pair of slices occurs, 250 times each on average.
    pairs = np.bincount(expert_TK[:, 0] * 4 + expert_TK[:, 1] - 4, minlength=16)
    assert pairs.min() > 150


def test_multihash_is_the_concatenation_of_slices():
    """Slices of the hidden layer side by side, each chosen by its own hash, give the sum of narrow experts (§3.4)."""
    rng = np.random.default_rng(0)
    w_in_EDF, w_out_EFD, x_D = rng.normal(size=(4, 5, 3)), rng.normal(size=(4, 3, 5)), rng.normal(size=5)
    first, second = 1, 2  # of pools {0, 1} and {2, 3}
    wide_in, wide_out = np.concatenate(w_in_EDF[[first, second]], 1), np.concatenate(w_out_EFD[[first, second]], 0)
    summed = sum(np.maximum(x_D @ w_in_EDF[e], 0) @ w_out_EFD[e] for e in (first, second))
    np.testing.assert_allclose(np.maximum(x_D @ wide_in, 0) @ wide_out, summed)


@pytest.mark.parametrize("function", ["random", "bigram"])
def test_the_model_trains_with_fixed_routes_and_has_no_router_to_train(function):
    config = tiny.config(moe_router="hash", moe_hash_function=function, moe_experts_per_token=1, moe_balance_weight=0.0,
                         moe_router_z_weight=0.0, moe_num_experts=4)
    params, batch = tiny.params(config), tiny.batch()
    grads, metrics = tiny.grads(config, params, batch)
    assert not any("w_router" in name for name in tiny.leaves(grads))
    experts = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(grads) if "w_in_EDF" in str(path)]
    assert all(np.abs(leaf).max() > 0 for leaf in experts)
    np.testing.assert_array_equal(metrics["routing"]["counts_LE"][0], metrics["routing"]["counts_LE"][1])
    if function == "random":
        _, metrics = tiny.step(config, tiny.state(config), batch)
        assert metrics["applied"] and metrics["router_grad_norm"] == 0


def test_the_parameters_of_a_new_model_have_no_router_and_flops_count_none():
    options = dict(moe_experts_per_token=1, moe_balance_weight=0.0, moe_router_z_weight=0.0)
    hashed, learned = tiny.config(moe_router="hash", **options), tiny.config(**options)
    shapes = [jax.eval_shape(lambda c=config: initial_params(c, tiny.VOCAB, jax.random.key(0))) for config in (hashed, learned)]
    names = [{".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)
              for path, _ in jax.tree_util.tree_leaves_with_path(tree)} for tree in shapes]
    assert names[0] < names[1] and all(name.endswith("w_router_DE") for name in names[1] - names[0])
    router, layers = 16 * 4, 2
    assert count_parameters(learned, 32).active - count_parameters(hashed, 32).active == layers * router
    assert forward_flops_per_token(learned, 32, 16) - forward_flops_per_token(hashed, 32, 16) == layers * 2 * router


def test_a_hash_is_its_own_causal_twin():
    """What it is evaluated with where nothing may be known of later tokens: the same routes, not a router it has not got."""
    config = tiny.config(moe_router="hash", moe_fill_order="choice_major", moe_balance_weight=0.0,
                         moe_router_z_weight=0.0, moe_allow_noncausal_routing=True)
    assert RoutingMode.causal(config) == RoutingMode.dropless()
    assert RoutingMode.causal(tiny.config()) == RoutingMode.dropless()
    with pytest.raises(ValueError, match="no router to ask"):
        tiny.output(config, tiny.params(config), tiny.batch(), RoutingMode("dropless", 1.0, router="top_k"))


def test_generation_knows_the_token_before():
    """With a cache the model sees one token at a time; a bigram's first half comes from outside."""
    config = tiny.config(moe_router="hash", moe_hash_function="bigram", moe_experts_per_token=1, moe_balance_weight=0.0,
                         moe_router_z_weight=0.0)
    params, prompts = tiny.params(config), [[5, 9, 3], [7], [2, 4, 6, 8, 10, 12]]
    with jax.set_mesh(tiny.ONE):
        found = generate(tiny.placed(params, tiny.ONE), config, tiny.VOCAB, prompts, 8, Sampling(temperature=0.0), eos_id=-1)
    for prompt, sample in zip(prompts, found):
        # The whole text at once: every sampled token is the likeliest one behind those before it.
        text = [0, *prompt, *sample]
        row, valid = np.zeros((1, 16), np.int32), np.arange(16)[None] < len(text)
        row[0, :len(text)] = text
        batch = {"input_ids": row, "valid": valid, "segment_ids": valid.astype(np.int32),
                 "positions": np.where(valid, np.arange(16)[None], 0).astype(np.int32)}
        logits = tiny.logits(config, params, batch)[0, len(prompt):len(text) - 1, 1:]
        assert (np.argmax(logits, -1) + 1).tolist() == sample


# Tables


def saved(tmp_path, table):
    path = str(tmp_path / "table.npy")
    hash_tables.save(path, table)
    return path


def test_a_table_is_looked_up(tmp_path):
    path = saved(tmp_path, np.array([2, 0, 1, 1]))
    moe = hash_config("balanced", num_experts=3, hash_table=path)
    check_router(moe)
    assert route(moe, np.array([0, 3, 1, 2, 0])).expert_N.tolist() == [2, 1, 0, 1, 2]


def test_balanced_fills_the_emptiest_expert_with_the_commonest_token_by_hand():
    # By count: id 3 (50) to expert 0; id 0 (30) to 1; id 4 (20) to 2; id 1 (15) to 2 (20 < 30 < 50); id 2 (5) to 1.
    # Expert 2 now holds 35 and 1 holds 35.
    assert hash_tables.balanced(np.array([30, 15, 5, 50, 20]), 3).tolist() == [1, 2, 1, 0, 2]


def test_balanced_evens_out_zipfs_law_better_than_chance():
    counts_V = (1e6 / np.arange(1, 2001)).astype(np.int64)
    load = lambda table: np.bincount(table, counts_V, minlength=8) / counts_V.sum() * 8
    chance = np.array([python_scrambled(i, 0) % 8 for i in range(2000)])
    assert load(hash_tables.balanced(counts_V, 8)).max() < 1.001 < 1.2 < load(chance).max()


def test_ids_that_never_occur_are_spread_by_number():
    table_V = hash_tables.balanced(np.array([7, 0, 0, 0, 0, 0, 7, 0]), 2)
    assert np.bincount(table_V).tolist() == [4, 4]


def test_token_counts_are_those_of_the_training_split():
    split = lambda tokens: SplitTokens(np.array(tokens, np.uint16), np.array([0, len(tokens)]), np.zeros(1), np.zeros(1), "")
    store = TokenStore("", "", ["text"], {"train": split([5, 1, 1, 5, 5]), "validation": split([2, 2])}, {})
    assert hash_tables.token_counts(store, 7).tolist() == [0, 2, 0, 0, 0, 3, 0]


def blobs():
    rng = np.random.default_rng(0)
    centre = 10 * np.eye(4)
    group_V = rng.permutation(np.repeat(np.arange(4), 10))
    return group_V, centre[group_V] + rng.normal(size=(40, 4))


def test_clustered_puts_similar_tokens_together_and_dispersed_apart():
    group_V, embedding_VD = blobs()
    together, apart = hash_tables.clustered(embedding_VD, 4), hash_tables.dispersed(embedding_VD, 4)
    for group in range(4):
        assert len(set(together[group_V == group])) == 1
        assert sorted(np.bincount(apart[group_V == group], minlength=4)) == [2, 2, 3, 3]  # 10 tokens over 4 experts
    assert sorted(set(together)) == [0, 1, 2, 3]
    assert np.bincount(apart).tolist() == [10] * 4


def test_clusters_are_never_empty_and_follow_the_seed():
    # Two distinct rows, three clusters: one of the equal rows is split off.
    x = np.array([[0.0], [0.0], [1.0]])
    assert sorted(set(hash_tables.clusters(x, 3).tolist())) == [0, 1, 2]
    _, embedding_VD = blobs()
    np.testing.assert_array_equal(hash_tables.clusters(embedding_VD, 6, 1), hash_tables.clusters(embedding_VD, 6, 1))
    with pytest.raises(ValueError, match="num_clusters=41"):
        hash_tables.clusters(embedding_VD, 41)


# What is refused


def refusal(moe):
    with pytest.raises(ConfigError) as error:
        check_router(moe)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("field, value", [
    ("balance_weight", 0.01), ("router_z_weight", 1e-4), ("bias_update_rate", 1e-3), ("router_jitter", 0.01),
    ("router_dtype", "bfloat16"), ("renormalize", True), ("gate_order", "top_k_then_softmax"), ("fill_order", "batch_prioritized")])
def test_settings_of_a_learned_router_are_refused(field, value):
    message = refusal(dataclasses.replace(hash_config(), **{field: value}))
    assert message.startswith(f"moe.{field}={value!r}") and "set it to" in message
    check_router(hash_config())


@pytest.mark.parametrize("options, words", [
    (dict(hash_table="x.npy"), ["moe.hash_table='x.npy'", "has no effect"]),
    (dict(function="balanced"), ["moe.hash_table=''", "hash_tables"]),
    (dict(function="clustered", hash_table="t.npy", hash_seed=1), ["moe.hash_seed=1", "no effect"]),
    (dict(function="dispersed", hash_table="t.npy", experts_per_token=2), ["moe.experts_per_token=2", "one expert"]),
    (dict(function="balanced", hash_table="/nowhere/t.npy"), ["/nowhere/t.npy", "cannot be read", "No such file"]),
    (dict(experts_per_token=3), ["moe.experts_per_token=3", "nearest legal values: 2, 4"]),
    (dict(function="position", experts_per_token=2), ["moe.experts_per_token=2", "position"]),
    (dict(function="position", hash_seed=5), ["moe.hash_seed=5", "set it to 0"]),
])
def test_a_table_too_many_or_too_few_is_refused(options, words):
    message = refusal(hash_config(**options))
    assert all(word in message for word in words), message


def test_a_broken_table_is_refused_by_name(tmp_path):
    text = tmp_path / "text.npy"
    text.write_text("not an array")
    archive = str(tmp_path / "two.npz")
    np.savez(archive, a=np.zeros(2), b=np.zeros(2))
    np.save(tmp_path / "float.npy", np.zeros(3))
    np.save(tmp_path / "square.npy", np.zeros((3, 3), int))
    for path, words in [(str(text), "cannot be read"), (archive, ".npz archive"), (tmp_path / "float.npy", "float64 [3]"),
                        (tmp_path / "square.npy", "int64 [3, 3]"), (saved(tmp_path, [0, 8]), "experts 0 to 8"),
                        (str(tmp_path), "cannot be read")]:
        with pytest.raises(ConfigError) as error:
            load_table(str(path), 8)
        assert words in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_hash_options_are_refused_with_other_routers():
    assert "is read by moe.router='hash' only" in refusal(MoEConfig(hash_seed=1))


def test_the_function_is_one_of_those_that_exist():
    with pytest.raises(ConfigError, match="Did you mean 'bigram'"):
        MoEConfig(hash_function="bigrams")


@pytest.mark.parametrize("order", ["token_major", "choice_major"])
def test_causal_in_any_order_because_hashes_never_compete_for_a_slot(order):
    moe = hash_config(experts_per_token=2, fill_order=order)
    check_router(moe)
    assert ROUTERS["hash"].is_causal(moe)


# Debug routers


def debug_config(router, num_experts=4, experts_per_token=2, **options):
    return MoEConfig(num_experts=num_experts, experts_per_token=experts_per_token, router=router, **options)


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


@pytest.mark.parametrize("order", ["token_major", "choice_major"])
def test_balanced_deals_experts_out_in_turn_and_skips_padding(order):
    logits, valid = np.random.default_rng(0).normal(size=(6, 5)), np.array([1, 0, 1, 1, 1, 0], bool)
    moe = debug_config("balanced", 5, 2, fill_order=order, allow_noncausal_routing=True)
    check_router(moe)
    routing = route(moe, logits=logits, valid=valid)
    place = np.lexsort((np.arange(12), routing.token_N))
    assert routing.expert_N[place].reshape(6, 2).tolist() == [[0, 1], [5, 5], [2, 3], [4, 0], [1, 2], [5, 5]]
    gates = routing.gate_N[place].reshape(6, 2)
    np.testing.assert_allclose(gates[3], softmax(logits)[3, [4, 0]], rtol=1e-6)
    assert (gates[~valid] == 0).all()
    assert routing.statistics.choices_E.tolist() == [2, 2, 2, 1, 1]


def test_balanced_loads_differ_by_one_at_most_so_nobody_is_dropped_at_factor_one():
    for tokens, experts, choices in ((37, 5, 2), (16, 8, 4), (9, 3, 3)):
        moe = debug_config("balanced", experts, choices, min_capacity=1)
        routing = route(moe, logits=np.zeros((tokens, experts)))
        load = np.bincount(routing.expert_N, minlength=experts)
        assert load.max() - load.min() <= 1
        capacity = ROUTERS["balanced"].capacity(tokens, moe, 1.0)
        assert assign_slots(jnp.asarray(routing.expert_N), experts, capacity)[1].all()


def test_all_sends_every_token_to_every_expert_with_its_softmax_score():
    logits, valid = np.random.default_rng(1).normal(size=(5, 3)), np.array([1, 1, 0, 1, 1], bool)
    moe = debug_config("all", 3, 3)
    check_router(moe)
    routing = route(moe, logits=logits, valid=valid)
    assert routing.token_N.tolist() == np.repeat(np.arange(5), 3).tolist()
    np.testing.assert_array_equal(routing.expert_N.reshape(5, 3), np.where(valid[:, None], [[0, 1, 2]], 3))
    np.testing.assert_allclose(routing.gate_N.reshape(5, 3), softmax(logits) * valid[:, None], rtol=1e-6)
    assert ROUTERS["all"].capacity(5, moe, 0.1) == 5


@pytest.mark.parametrize("router, options, words", [
    ("all", dict(experts_per_token=2), "set it to moe.num_experts=4"),
    ("all", dict(experts_per_token=4, renormalize=True), "moe.renormalize=True"),
    ("all", dict(experts_per_token=4, fill_order="batch_prioritized"), "moe.fill_order"),
    ("balanced", dict(bias_update_rate=0.1), "moe.bias_update_rate=0.1"),
    ("balanced", dict(gate_order="top_k_then_softmax"), "moe.gate_order"),
    ("balanced", dict(fill_order="choice_major"), "depend on later tokens"),
])
def test_debug_routers_refuse_what_has_no_meaning(router, options, words):
    assert words in refusal(debug_config(router, **options))
