"""Upcycling: a mixture whose experts are copies of a dense network computes what that network did, and trains on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from running import corpus, lines, moe_jax, overrides, read_json, run_here, saved_steps

from moe_jax.config import ConfigError
from moe_jax.models.decoder import layer_paths
from moe_jax.nn.mlp import MLP
from moe_jax.nn.moe import MoELayer, RoutingMode
from moe_jax.training.named_arrays import flatten, nest
from moe_jax.training.state import initial_state
from moe_jax.training.upcycle import Upcycling, check_upcyclable, upcycled

__all__ = ["corpus", "moe_jax"]

DENSE = dict(moe_num_experts=0, moe_d_ff=32, optimizer_name="adamw", training_ema_decay=0.9)
SPARSE = {**DENSE, "moe_num_experts": 4, "moe_renormalize": True}


@pytest.fixture(scope="module")
def dense():
    """(state, config) of a dense model after three steps, on the host."""
    config = tiny.config(**DENSE)
    state = tiny.state(config)
    for seed in range(3):
        state, _ = tiny.step(config, state, tiny.batch(seed=seed))
    return jax.device_get({**state, "rng": jax.random.key_data(state["rng"])}), config


def logits(config, state):
    return tiny.logits(config, state["params"], tiny.batch(seed=9))


# The function.


@pytest.mark.parametrize("settings", [
    dict(moe_score="sigmoid", moe_num_experts=8, moe_experts_per_token=3, moe_every=3, moe_first=0),
    dict(moe_gate_order="top_k_then_softmax", moe_renormalize=False, moe_expert_bias=True, model_scan_layers=False),
    dict(moe_router="hash", moe_experts_per_token=1, moe_renormalize=False, moe_every=1, moe_balance_weight=0.0,
         moe_router_z_weight=0.0)],
    ids=["sigmoid of 8, top-3, layers 0 and 3", "softmax of the chosen, biases, unrolled", "hash in every layer"])
def test_with_gates_that_sum_to_one_and_no_drops_it_is_the_dense_model(dense, settings):
    """Up to rounding: g1·y + g2·y is not y to the last bit where g1 + g2 = 1 only after rounding."""
    state, config = dense
    sparse = tiny.config(**{**SPARSE, **settings})
    new = upcycled(state, config, sparse, tiny.VOCAB)
    np.testing.assert_allclose(logits(sparse, new), logits(config, state), rtol=0, atol=2e-6)


def test_with_equal_gates_it_is_the_dense_model_bit_for_bit(dense):
    """Two gates of exactly ½: halves of the same number add up without rounding."""
    state, config = dense
    sparse = tiny.config(**SPARSE, moe_eval_dispatch="reference")
    new = upcycled(state, config, sparse, tiny.VOCAB)
    params = nest({path: np.zeros_like(leaf) if path.endswith("w_router_DE") else leaf
                   for path, leaf in flatten(new["params"]).items()})
    batch, mode = tiny.batch(seed=9), RoutingMode.evaluation(sparse)
    np.testing.assert_array_equal(tiny.logits(sparse, as_lists(params, new["params"]), batch, mode),
                                  tiny.logits(config, state["params"], batch))


def as_lists(tree, like):
    """The tree with the containers of another."""
    return jax.tree.unflatten(jax.tree.structure(like), [flatten(tree)[path] for path in flatten(like)])


@pytest.mark.parametrize("choices", [1, 2])
def test_without_renormalisation_the_layer_shrinks_by_the_sum_of_the_chosen_probabilities(dense, choices):
    state, config = dense
    sparse = tiny.config(**{**SPARSE, "moe_renormalize": False, "moe_experts_per_token": choices})
    new = upcycled(state, config, sparse, tiny.VOCAB)
    x_BSD = np.random.default_rng(0).standard_normal((2, 8, 16), np.float32)
    # Layer 3 of the dense model, and the second mixture, which is layer 3 too.
    moe, mlp = new["params"]["body"]["layers"][1]["moe"], state["params"]["body"]["layers"][0]["mlp"]
    logits_BSE = x_BSD @ np.asarray(moe["w_router_DE"])[1]
    p_BSE = np.exp(logits_BSE) / np.exp(logits_BSE).sum(-1, keepdims=True)
    kept_BS = np.sort(p_BSE, axis=-1)[..., -choices:].sum(-1)
    assert kept_BS.max() < 0.999 and kept_BS.std() > 0.01
    with jax.set_mesh(tiny.ONE):
        y_BSD, _ = of_module(lambda rngs: MoELayer(sparse, rngs), moe, 1, lambda layer: layer(
            x_BSD, np.ones((2, 8), bool), tiny.DROPLESS, np.zeros(4, np.float32)))
        dense_BSD = of_module(lambda rngs: MLP(16, 32, "swiglu", 1.0, rngs), mlp, 3, lambda layer: layer(jnp.asarray(x_BSD)))
    np.testing.assert_allclose(y_BSD, kept_BS[..., None] * dense_BSD, rtol=1e-5, atol=1e-6)


def of_module(make, stacked, row, call):
    """``call`` of a module with one layer of stacked parameters, compiled."""
    graph = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]
    params = jax.tree.map(lambda leaf: np.asarray(leaf)[row], stacked)
    return jax.jit(lambda params: call(nnx.merge(graph, params)), compiler_options=tiny.QUICK)(params)


# The state.


def of_layer(tree, config, layer, name):
    """The array of one layer, wherever it lies."""
    where, row = next((where, layers.index(layer)) for where, layers in layer_paths(config).items() if layer in layers)
    array = np.asarray(flatten(tree)[f"{where}/{name}"])
    return array[row] if where.startswith("body/") else array


def shapes(config):
    return jax.eval_shape(lambda: initial_state(config, tiny.VOCAB))


def test_layer_paths_are_those_of_the_parameters():
    for settings in ({}, dict(moe_every=3, moe_first=0), dict(model_scan_layers=False), dict(moe_first_dense_layers=2, model_mtp_depth=1)):
        config = tiny.config(**settings)
        flat, layers = flatten(shapes(config)["params"]), layer_paths(config)
        assert sorted(layer for found in layers.values() for layer in found) == list(range(4 + config.model.mtp_depth))
        for where, found in layers.items():
            assert f"{where}/attention_norm/scale_D" in flat
            for layer in found:
                assert (f"{where}/moe/w_router_DE" in flat) == (layer in config.trained_moe_layers)


def test_layers_that_predict_further_tokens_become_mixtures_too():
    config, sparse = (tiny.config(**settings, model_mtp_depth=1) for settings in (DENSE, SPARSE))
    rng = np.random.default_rng(0)
    state = {**shapes(config), "step": np.int32(0)}
    for name in ("params", "ema"):
        state[name] = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), state[name])
    new = upcycled(state, config, sparse, tiny.VOCAB)
    for expert in of_layer(new["params"], sparse, 4, "moe/experts/w_out_EFD"):
        np.testing.assert_array_equal(expert, of_layer(state["params"], config, 4, "mlp/w_out_FD"))
    assert new["router_bias_LE"].shape == (3, 4)


def test_every_weight_is_a_copy_and_the_router_that_of_a_new_run(dense):
    state, config = dense
    sparse = tiny.config(**SPARSE, moe_first=0)  # layers 0 and 2
    new = upcycled(state, config, sparse, tiny.VOCAB)
    assert state["step"] == new["step"] == 3
    for tree in ("params", "ema"):
        for number, ffn in enumerate(["moe/experts", "mlp", "moe/experts", "mlp"]):
            for name in ("w_in_DF", "w_gate_DF", "w_out_FD"):
                of_dense = of_layer(state[tree], config, number, f"mlp/{name}")
                if ffn == "mlp":
                    np.testing.assert_array_equal(of_layer(new[tree], sparse, number, f"mlp/{name}"), of_dense)
                    continue
                experts = of_layer(new[tree], sparse, number, f"{ffn}/{name[:-2]}E{name[-2:]}")
                assert experts.shape[0] == 4
                for expert in experts:
                    np.testing.assert_array_equal(expert, of_dense)
            np.testing.assert_array_equal(of_layer(new[tree], sparse, number, "attention/w_query_DHd"),
                                          of_layer(state[tree], config, number, "attention/w_query_DHd"))
        table = lambda s: flatten(s[tree])["embedding/embedding_VD"]
        np.testing.assert_array_equal(table(new), table(state))
    assert not np.array_equal(flatten(new["params"])["embedding/embedding_VD"], flatten(new["ema"])["embedding/embedding_VD"])
    scratch = tiny.params(sparse)
    other = upcycled(state, config, dataclasses.replace(
        sparse, training=dataclasses.replace(sparse.training, seed=1)), tiny.VOCAB)
    router = lambda params: np.asarray(flatten(params)["body/layers/0/moe/w_router_DE"])
    assert router(scratch).shape == router(new["params"]).shape and router(new["params"]).std() > 0.1
    assert not np.array_equal(router(new["params"]), router(other["params"]))
    assert not np.any(new["router_bias_LE"]) and new["skipped"] == 0


def test_the_optimizer_starts_at_zero_or_goes_on_and_the_schedule_goes_by_the_step(dense):
    state, config = dense
    sparse = tiny.config(**SPARSE)
    counts = lambda s: {path: int(leaf) for path, leaf in flatten(s["opt_state"]).items() if path.endswith("count")}
    moments = lambda s: {path: leaf for path, leaf in flatten(s["opt_state"]).items() if not path.endswith("count")}
    assert list(counts(state).values()) == [3, 3]  # Adam's and the schedule's
    fresh = upcycled(state, config, sparse, tiny.VOCAB)
    assert list(counts(fresh).values()) == [0, 3] and not any(np.any(leaf) for leaf in moments(fresh).values())
    carried = upcycled(state, config, sparse, tiny.VOCAB, Upcycling(carry_optimizer=True))
    assert list(counts(carried).values()) == [3, 3]
    assert list(counts(upcycled(state, config, sparse, tiny.VOCAB, Upcycling(carry_optimizer=True, restart=True))).values()) == [3, 0]
    for moment in ("mu", "nu"):
        ours, theirs = (next(getattr(part, moment) for part in jax.tree.leaves(s["opt_state"], is_leaf=lambda n: hasattr(n, "mu"))
                             if hasattr(part, moment)) for s in (carried, state))
        for expert in of_layer(ours, sparse, 1, "moe/experts/w_out_EFD"):
            np.testing.assert_array_equal(expert, of_layer(theirs, config, 1, "mlp/w_out_FD"))
        np.testing.assert_array_equal(of_layer(ours, sparse, 2, "mlp/w_in_DF"), of_layer(theirs, config, 2, "mlp/w_in_DF"))
        assert np.any(of_layer(theirs, config, 1, "mlp/w_out_FD")) and not np.any(of_layer(ours, sparse, 1, "moe/w_router_DE"))


def test_noise_has_the_asked_scale_differs_between_experts_and_spares_everything_else(dense):
    state, config = dense
    sparse = tiny.config(**SPARSE)
    plain, noisy = (upcycled(state, config, sparse, tiny.VOCAB, Upcycling(expert_noise=noise)) for noise in (0.0, 0.01))
    for path, leaf in flatten(plain["params"]).items():
        noise = flatten(noisy["params"])[path] - leaf
        if "/experts/" not in path:
            assert not np.any(noise)
            continue
        np.testing.assert_allclose(noise.std(), 0.01, rtol=0.1)  # 4,096 numbers
        np.testing.assert_allclose(noise, flatten(noisy["ema"])[path] - flatten(plain["ema"])[path], atol=1e-6)
        assert len({expert.tobytes() for expert in noise.reshape(-1, 16 * 32)}) == 8  # two layers of four


# What cannot be copied.


@pytest.mark.parametrize("settings, words", [
    (dict(moe_num_experts=0), "moe.num_experts=0: the new config is dense"),
    (dict(moe_d_ff=16), "moe.d_ff=16: each expert is a copy .* which is 32 wide"),
    (dict(moe_expert_widths="32*2,64*2", moe_dispatch="dropless"), "moe.expert_widths='32[*]2,64[*]2': each expert is a copy"),
    (dict(moe_activation="gelu"), "moe.activation='gelu': the copied networks were trained with 'swiglu'"),
    (dict(moe_num_shared_experts=1), "moe.num_shared_experts=1: .* set it to 0"),
    (dict(moe_residual_ffn="parallel"), "moe.residual_ffn='parallel': .* set it to 'none'"),
    (dict(moe_gate_on="input"), "moe.gate_on='input': .* set it to 'output'"),
    (dict(moe_router="hash", moe_balance_weight=0.0, moe_router_z_weight=0.0, moe_renormalize=False), "moe.experts_per_token=2: moe.router='hash' .* set it to 1"),
    (dict(moe_num_zero_experts=1), "moe.num_zero_experts=1: .* set it to 0"),
    (dict(model_num_kv_heads=4), "model.num_kv_heads=4: the dense run was trained with 2"),
    (dict(attention_qk_norm="head"), "attention.qk_norm='head': the dense run was trained with 'none'"),
    (dict(attention_layers="sliding", attention_window=4), "attention.layers='sliding': the dense run was trained with 'full'"),
    (dict(model_d_model=32), "model.d_model=32: the dense run was trained with 16")])
def test_configs_whose_experts_could_not_be_copies_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        check_upcyclable(tiny.config(**DENSE), tiny.config(**{**SPARSE, **settings}))


def test_experts_that_would_cut_elsewhere_are_no_copies():
    clamped = dict(model_activation="swiglu_clamped", moe_activation="swiglu_clamped")
    with pytest.raises(ConfigError, match="moe.activation_limit=5.0, moe.activation_alpha=1.702: .* trained with 7.0 and 1.702"):
        check_upcyclable(tiny.config(**DENSE, **clamped), tiny.config(**SPARSE, **clamped, moe_activation_limit=5.0))
    check_upcyclable(tiny.config(**DENSE, **clamped), tiny.config(**SPARSE, **clamped))


def test_networks_with_biases_become_experts_with_biases():
    dense = tiny.config(**DENSE, model_mlp_bias=True)
    with pytest.raises(ConfigError, match="moe.expert_bias=False: the copied networks have biases"):
        check_upcyclable(dense, tiny.config(**SPARSE, model_mlp_bias=True))
    check_upcyclable(dense, tiny.config(**SPARSE, model_mlp_bias=True, moe_expert_bias=True))
    check_upcyclable(dense, tiny.config(**{**SPARSE, "moe_every": 1}, moe_expert_bias=True))  # no dense network is left
    check_upcyclable(tiny.config(**DENSE), tiny.config(**SPARSE, moe_expert_bias=True))  # which start at 0


def test_a_mixture_is_no_dense_model():
    with pytest.raises(ConfigError, match="is a mixture of experts already"):
        check_upcyclable(tiny.config(**SPARSE), tiny.config(**SPARSE))


@pytest.mark.parametrize("settings, words", [
    (dict(optimizer_name="adafactor"), "optimizer.name='adafactor': its moments are factored"),
    (dict(optimizer_name="sgd", optimizer_momentum=0.9), "the dense run .'adamw'. has no 'opt_state/.*trace.*' to carry over")])
def test_moments_that_are_not_there_are_not_carried_over(dense, settings, words):
    state, config = dense
    sparse = tiny.config(**{**SPARSE, **settings})
    with pytest.raises(ConfigError, match=words):
        upcycled(state, config, sparse, tiny.VOCAB, Upcycling(carry_optimizer=True))
    upcycled(state, config, sparse, tiny.VOCAB)


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf")])
def test_noise_that_is_no_scale_is_refused(noise):
    with pytest.raises(ConfigError, match="expert_noise="):
        Upcycling(expert_noise=noise)


# The command.

OF_DENSE = dict(moe__num_experts=0, training__num_steps=6)
OF_SPARSE = dict(moe__num_experts=4, moe__d_ff=32, moe__renormalize=True, training__num_steps=10)


@pytest.fixture(scope="module")
def dense_run(corpus, tmp_path_factory):
    """A finished dense run of six steps."""
    workdir = tmp_path_factory.mktemp("dense") / "run"
    assert run_here("train", *overrides(corpus, **OF_DENSE), f"--workdir={workdir}") == 0
    return workdir


def test_a_dense_run_goes_on_as_a_mixture_on_eight_devices_and_resumes(moe_jax, corpus, dense_run, tmp_path):
    words, new = overrides(corpus, **OF_SPARSE), tmp_path / "new"
    made = moe_jax("upcycle", *words, f"--from={dense_run}", f"--workdir={new}")
    assert made.code == 0 and "step 6, 1 layers of 4 experts" in made.out, made.err
    assert saved_steps(new) == [6] and not list(tmp_path.glob(".new*"))
    assert read_json(new / "upcycling.json") == {"from": str(dense_run), "from_step": 6, "expert_noise": 0.0,
                                                 "carry_optimizer": False, "restart": False}
    trained = moe_jax("train", *words, f"--workdir={new}", devices=8)
    assert trained.code == 0 and "Resumed from the checkpoint of step 6" in trained.err, trained.err
    # Evaluated before the first step: it is the dense run, at the end of which the same batches were evaluated.
    np.testing.assert_allclose(lines(new, "eval")[0]["loss/ce"], read_json(dense_run / "evaluation.json")["ce"], rtol=1e-5)
    curve = lines(new)
    assert [line["step"] for line in curve] == [7, 8, 9, 10] and curve[0]["tokens_seen"] == 7 * 8 * 16
    assert saved_steps(new)[-1] == 10
    more = overrides(corpus, **{**OF_SPARSE, "training__num_steps": 11})
    assert "Resumed from the checkpoint of step 10" in moe_jax(
        "train", *more, f"--workdir={new}", "--allow-config-change", devices=8).err
    assert [line["step"] for line in lines(new)] == [7, 8, 9, 10, 11]


def test_from_the_start_it_counts_from_zero(moe_jax, corpus, dense_run, tmp_path):
    words = overrides(corpus, **{**OF_SPARSE, "training__num_steps": 2})
    refused = moe_jax("upcycle", *words, f"--from={dense_run}", f"--workdir={tmp_path / 'new'}")
    assert refused.code == 1 and "training.num_steps=2: the dense run is at step 6" in refused.error
    assert not list(tmp_path.iterdir())
    assert moe_jax("upcycle", *words, f"--from={dense_run}", f"--workdir={tmp_path / 'new'}", "--restart").code == 0
    assert saved_steps(tmp_path / "new") == [0]
    assert run_here("train", *words, f"--workdir={tmp_path / 'new'}") == 0
    assert [(line["step"], line["tokens_seen"]) for line in lines(tmp_path / "new")] == [(1, 128), (2, 256)]


@pytest.mark.parametrize("settings, options, words", [
    (dict(moe__d_ff=16), [], "moe.d_ff=16: each expert is a copy"),
    (dict(data__vocabulary="sentencepiece:300"), [], "was trained with another vocabulary than data.vocabulary="),
    (dict(model__vocab_size=384), [], "model.vocab_size=384: the dense run was trained with 0"),
    ({}, ["--expert-noise=-1"], "expert_noise=-1.0: a standard deviation")])
def test_what_cannot_be_is_one_line_and_writes_nothing(moe_jax, corpus, dense_run, tmp_path, settings, options, words):
    refused = moe_jax("upcycle", *overrides(corpus, **{**OF_SPARSE, **settings}), f"--from={dense_run}",
                      f"--workdir={tmp_path / 'new'}", *options)
    assert refused.code == 1 and words in refused.error
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_written_over_and_must_be_one(moe_jax, corpus, dense_run, tmp_path):
    words = overrides(corpus, **OF_SPARSE)
    refused = moe_jax("upcycle", *words, f"--from={dense_run}", f"--workdir={dense_run}")
    assert refused.code == 1 and "is there already; an upcycled run needs a directory of its own" in refused.error
    refused = moe_jax("upcycle", *words, f"--from={tmp_path}", f"--workdir={tmp_path / 'new'}")
    assert refused.code == 1 and "is not a run directory" in refused.error and not list(tmp_path.iterdir())
