"""The LSTM language model of Shazeer et al. 2017, against a NumPy one that reads token by token, in fp64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from running import lines, moe_jax, overrides, read_json, write_corpus
from token_by_token import by_steps_and_at_once

from moe_jax.config import Config, ConfigError, MoEConfig, ModelConfig, resolve
from moe_jax.inference.generate import Sampling, generate
from moe_jax.models.lstm import dropout
from moe_jax.nn.lstm import LSTM
from moe_jax.sharding import TOKEN_AXES, resolve_mesh
from moe_jax.training.flops import count_parameters, forward_flops_per_token
from moe_jax.training.state import initial_params, new_state
from moe_jax.training.upcycle import check_upcyclable

__all__ = ["moe_jax"]
WIDTH, EXPERTS = 16, 4
FLAT = dict(router="noisy_top_k", gate_order="top_k_then_softmax", experts_per_token=2)
TWO_LEVELS = dict(num_experts=12, router="hierarchical", num_groups=4, groups_per_token=2, experts_per_token=4)


def config(**settings) -> Config:
    """LSTM, mixture, LSTM; settings named section_field."""
    sections = {
        "model": dict(architecture="lstm", num_layers=2, d_model=WIDTH),
        "moe": dict(num_experts=EXPERTS, every=2, first=0, d_ff=24, activation="relu", router_init=0.5, dispatch="dropless",
                    balance_weight=0.0, router_z_weight=0.0, importance_weight=0.1, load_weight=0.1, balance_scope="global",
                    **FLAT),
        "data": dict(sequence_length=16, batch_size=8),
        "optimizer": dict(name="sgd", learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=0.0),
        "training": dict(num_steps=20),
    }
    for name, value in settings.items():
        section, field = name.split("_", 1)
        sections.setdefault(section, {})[field] = value
    return resolve(sections)


HIERARCHICAL = {f"moe_{name}": value for name, value in
                {**TWO_LEVELS, "gate_order": "softmax_then_top_k"}.items()}
BOTH_ROUTERS = pytest.mark.parametrize("settings", [{}, pytest.param(HIERARCHICAL, marks=pytest.mark.slow)],
                                       ids=["flat", "hierarchical"])
BATCH = tiny.batch(lengths=[16, 16, 9, 3, 16, 1, 16, 12], segments=2)


@functools.lru_cache(maxsize=None)
def _params(run):
    with jax.set_mesh(tiny.ONE):
        return jax.device_get(jax.jit(lambda: initial_params(run, tiny.VOCAB, jax.random.key(0)))())


def params(run):
    """Initial parameters on the host, biases too drawn."""
    drawn = np.random.default_rng(1)
    fresh = lambda path, leaf: drawn.normal(size=leaf.shape).astype(np.float32) if path[-1].key == "b_QF" else leaf
    return jax.tree_util.tree_map_with_path(fresh, _params(run))


# NumPy, one row and one token at a time.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_lstm(x_SD, starts_S, w_input_DQF, w_recurrent_DQF, b_QF, h_F=None, c_F=None):
    """Outputs [S, F], and h and c after the last token."""
    zeros = np.zeros(b_QF.shape[1])
    h_F, c_F = (zeros if part is None else part for part in (h_F, c_F))
    out = []
    for x_D, start in zip(x_SD, starts_S):
        if start:
            h_F, c_F = zeros, zeros
        i, f, g, o = np.einsum("D,DQF->QF", x_D, w_input_DQF) + np.einsum("D,DQF->QF", h_F, w_recurrent_DQF) + b_QF
        c_F = sigmoid(f) * c_F + sigmoid(i) * np.tanh(g)
        h_F = sigmoid(o) * np.tanh(c_F)
        out.append(h_F)
    return np.stack(out), h_F, c_F


def numpy_moe(x_D, layer, choices):
    """Softmax over the K largest logits; ReLU experts."""
    logits_E = x_D @ layer["w_router_DE"]
    best = np.argsort(-logits_E, kind="stable")[:choices]
    gates = np.exp(logits_E[best] - logits_E[best].max())
    gates /= gates.sum()
    return sum(gate * np.maximum(x_D @ layer["experts"]["w_in_EDF"][e], 0) @ layer["experts"]["w_out_EFD"][e]
               for gate, e in zip(gates, best))


def numpy_logits(tree, batch, choices=2):
    tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
    rows = []
    for ids_S, positions_S in zip(batch["input_ids"], batch["positions"]):
        x_SD = tree["embedding"]["embedding_VD"][ids_S]
        for layer in (tree["layers"][i] for i in range(2)):
            x_SD = x_SD + numpy_lstm(x_SD, positions_S == 0, **layer["lstm"])[0]
            if "moe" in layer:
                x_SD = x_SD + sigmoid(np.stack([numpy_moe(x_D, layer["moe"], choices) for x_D in x_SD]))
        rows.append(x_SD @ tree["embedding"]["w_logits_DV"])
    return np.stack(rows)


def test_the_model_is_the_papers():
    """Embedding, x + lstm(x), x + sigmoid(moe(x)), x + lstm(x), softmax; two documents in every row."""
    run = config()
    found = tiny.logits(run, params(run), BATCH)
    valid = BATCH["valid"]
    np.testing.assert_allclose(found[valid], numpy_logits(params(run), BATCH)[valid], rtol=1e-4, atol=1e-5)


# One LSTM.


def lstm_case(seed=0, rows=4, length=7):
    """The module, parameters, and (x, starts, h, c) in fp64."""
    draw = np.random.default_rng(seed)
    with jax.set_mesh(tiny.ONE):
        graph, state = nnx.split(LSTM(ModelConfig(architecture="lstm", d_model=WIDTH), nnx.Rngs(params=0)))
    weights = {name: draw.normal(size=(WIDTH, 4, WIDTH)) / 4 for name in ("w_input_DQF", "w_recurrent_DQF")}
    weights["b_QF"] = draw.normal(size=(4, WIDTH))
    assert {name: leaf.shape for name, leaf in state.to_pure_dict().items()} == {n: w.shape for n, w in weights.items()}
    starts_BS = draw.random((rows, length)) < 0.25
    starts_BS[0] = False
    return graph, weights, draw.normal(size=(rows, length, WIDTH)), starts_BS, *draw.normal(size=(2, rows, WIDTH)) / 2


def run_lstm(graph, weights, x_BSD, starts_BS, h_BF, c_BF, mesh=tiny.ONE):
    from jax.sharding import NamedSharding

    from moe_jax.sharding import parameter_spec
    rows = lambda value: jax.device_put(value, NamedSharding(mesh, jax.P(TOKEN_AXES)))
    single = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(leaf, NamedSharding(mesh, parameter_spec(name, leaf.ndim)))
                  for name, leaf in single(weights).items()}
        state = tuple(jax.device_put(part, NamedSharding(mesh, jax.P(TOKEN_AXES, "tensor"))) for part in single((h_BF, c_BF)))

        def outputs(weights, x_BSD, state):
            y_BSD, (h_BF, c_BF) = nnx.merge(graph, weights)(x_BSD, rows(starts_BS), state)
            return y_BSD, h_BF, c_BF

        return jax.jit(lambda *arguments: jax.vjp(outputs, *arguments))(placed, rows(single(x_BSD)), state)


def numpy_outputs(weights, x_BSD, starts_BS, h_BF, c_BF):
    per_row = [numpy_lstm(x, starts, **weights, h_F=h, c_F=c) for x, starts, h, c in zip(x_BSD, starts_BS, h_BF, c_BF)]
    return tuple(np.stack(part) for part in zip(*per_row))


def test_an_lstm_reads_token_by_token_from_a_state_and_forgets_at_the_start_of_a_document():
    graph, *case = lstm_case()
    (y_BSD, h_BF, c_BF), _ = run_lstm(graph, *case)
    for found, expected in zip((y_BSD, h_BF, c_BF), numpy_outputs(*case)):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("what", ["w_input_DQF", "w_recurrent_DQF", "b_QF", "x", "h", "c"])
def test_its_gradient_is_that_of_small_steps(what):
    """Along random directions, of a random sum of outputs and last state, by central differences in fp64."""
    graph, weights, x_BSD, starts_BS, h_BF, c_BF = case = lstm_case(seed=3)
    draw = np.random.default_rng(4)
    outputs, pullback = run_lstm(*case)
    seeds = [draw.normal(size=part.shape) for part in outputs]
    with jax.set_mesh(tiny.ONE):
        d_weights, d_x, (d_h, d_c) = pullback(tuple(jax.device_put(jnp.asarray(seed, jnp.float32), out.sharding)
                                                    for seed, out in zip(seeds, outputs)))
    gradient = np.asarray({**d_weights, "x": d_x, "h": d_h, "c": d_c}[what])

    def value(step, direction):
        moved = {**weights, "x": x_BSD, "h": h_BF, "c": c_BF}
        moved[what] = moved[what] + step * direction
        found = numpy_outputs({name: moved[name] for name in weights}, moved["x"], starts_BS, moved["h"], moved["c"])
        return sum(np.sum(seed * part) for seed, part in zip(seeds, found))

    for _ in range(4):
        direction = draw.normal(size=gradient.shape)
        slope = (value(1e-4, direction) - value(-1e-4, direction)) / 2e-4
        assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-4, abs=1e-4)


def test_the_gradient_of_the_weights_is_exchanged_once_not_token_by_token():
    """Over eight devices no all-reduce stands in the loops over time but those of a tensor axis."""
    run, mesh = config(moe_num_experts=0), tiny.mesh(data=8)
    with jax.set_mesh(mesh):
        from moe_jax.training.evaluate import put_batch
        lowered = tiny._gradients(run).lower(tiny.placed(params(run), mesh), put_batch(BATCH, mesh), tiny.no_bias(run),
                                             jax.random.key(0))
        text = lowered.compile().as_text()
    bodies = [part for part in text.split("\n\n") if "while/body" in part and part.lstrip().startswith("%")]
    assert bodies and not any("all-reduce(" in line and "while/body" in line for part in bodies for line in part.splitlines())


# The whole model.


@pytest.mark.parametrize("settings, sizes", [
    ({}, dict(fsdp=2, expert=2, tensor=2)), ({**HIERARCHICAL, "model_dropout": 0.3}, dict(data=2, fsdp=2, tensor=2)),
], ids=["flat", "hierarchical with dropout"])
@pytest.mark.slow
def test_gradients_losses_and_noise_do_not_depend_on_the_mesh(settings, sizes):
    run = config(**settings)
    tiny.assert_close(tiny.grads(run, params(run), BATCH, mesh=tiny.mesh(**sizes)), tiny.grads(run, params(run), BATCH),
                      rtol=1e-4, atol=1e-6)


def test_documents_of_a_row_do_not_know_of_each_other_nor_of_later_tokens():
    run, whole = config(), tiny.batch(rows=8, segments=2)
    logits = tiny.logits(run, params(run), whole)
    halves = {name: np.concatenate([value[:, :8], value[:, 8:]]) for name, value in whole.items()}
    halves["segment_ids"] = np.ones_like(halves["segment_ids"])
    apart = tiny.logits(run, params(run), halves)
    np.testing.assert_allclose(np.concatenate([apart[:8], apart[8:]], axis=1), logits, rtol=1e-5, atol=1e-5)
    changed = {**whole, "input_ids": whole["input_ids"].copy()}
    changed["input_ids"][:, 5] = whole["input_ids"][:, 5] % (tiny.VOCAB - 1) + 1  # another id
    after = tiny.logits(run, params(run), changed)
    np.testing.assert_array_equal(after[:, :5], logits[:, :5])
    np.testing.assert_array_equal(after[:, 8:], logits[:, 8:])
    assert (np.abs(after[:, 5:8] - logits[:, 5:8]).max(axis=-1) > 1e-6).all()


def test_padding_is_invisible():
    run, lengths = config(), [16, 16, 9, 3, 16, 1, 16, 12]
    batch = tiny.batch(lengths=lengths)
    other = {**batch, "input_ids": np.where(batch["valid"], batch["input_ids"], 7)}
    (grads, metrics), again = tiny.grads(run, params(run), batch), tiny.grads(run, params(run), other)
    assert metrics["routing"]["counts_LE"].sum() == 2 * sum(lengths)
    tiny.assert_close(again, (grads, metrics), rtol=1e-5)


def test_dropout_keeps_the_mean_and_draws_anew_for_every_key():
    with jax.set_mesh(tiny.ONE):
        x_BSD, keys = jnp.ones((8, 64, 32)), jax.random.split(jax.random.key(0), 2)
        first, again, other = dropout(x_BSD, 0.25, keys, 0), dropout(x_BSD, 0.25, keys, 0), dropout(x_BSD, 0.25, keys, 1)
        assert dropout(x_BSD, 0.25, None, 0) is x_BSD and dropout(x_BSD, 0.0, keys, 0) is x_BSD
    np.testing.assert_allclose(np.unique(first), [0, 1 / 0.75], rtol=1e-6)
    assert np.mean(first == 0) == pytest.approx(0.25, abs=0.02)  # deviation √(0.19 / 16384) = 0.003
    np.testing.assert_array_equal(first, again)
    assert np.mean(first != other) == pytest.approx(2 * 0.25 * 0.75, abs=0.02)


def test_dropout_acts_in_training_only():
    run, with_it = config(), config(model_dropout=0.5)
    tree = params(run)
    np.testing.assert_array_equal(tiny.logits(with_it, tree, BATCH), tiny.logits(run, tree, BATCH))
    loss = lambda run, seed: tiny.grads(run, tree, BATCH, seed=seed)[1]["sums"]["loss/ce"]
    assert loss(with_it, 0) != loss(with_it, 1) and abs(loss(with_it, 0) - loss(run, 0)) > 1e-3


@BOTH_ROUTERS
def test_a_model_trains_from_routers_at_zero_and_every_matrix_learns(settings):
    run = config(moe_router_init=0.0, **settings)
    with jax.set_mesh(tiny.ONE):
        state = new_state(run, tiny.VOCAB, tiny.ONE)
    before = tiny.leaves(jax.device_get(state["params"]))
    assert all((leaf == 0).all() for name, leaf in before.items() if "w_router" in name)
    for _ in range(2):
        state, metrics = tiny.step(run, state, BATCH)
    assert np.isfinite(metrics["sums"]["loss/total"]) and metrics["sums"]["loss/load"] > 0
    after = tiny.leaves(state["params"])
    assert [name for name in before if np.abs(after[name] - before[name]).max() == 0] == []


# Generation.


def greedy_by_full_forward(run, prompt, tokens):
    ids = [0, *prompt]
    for _ in range(tokens):
        row = np.zeros((1, 24), np.int32)
        row[0, : len(ids)] = ids
        valid = np.arange(24)[None] < len(ids)
        batch = {"input_ids": row, "valid": valid, "segment_ids": valid.astype(np.int32),
                 "positions": np.where(valid, np.arange(24)[None], 0).astype(np.int32)}
        logits = tiny.logits(run, params(run), batch)[0, len(ids) - 1].copy()
        logits[0] = -np.inf
        ids.append(int(np.argmax(logits)))
    return ids[1 + len(prompt):]


@BOTH_ROUTERS
def test_prompts_read_at_once_and_tokens_one_by_one_give_the_full_forward_pass(settings):
    """With padding of unequal lengths in front."""
    run = config(**settings)
    found, expected = by_steps_and_at_once(run, params(run))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_greedy_generation_is_the_argmax_of_the_full_forward_pass():
    run, prompts = config(), [[5, 9, 3], [7], [2, 4, 6, 8, 10, 12, 14], [9, 9]]
    with jax.set_mesh(tiny.ONE):
        samples = generate(tiny.placed(params(run), tiny.ONE), run, tiny.VOCAB, prompts, 5, Sampling(temperature=0.0), eos_id=-1)
    assert samples == [greedy_by_full_forward(run, prompt, 5) for prompt in prompts]


@pytest.mark.slow
def test_eight_devices_write_what_one_writes():
    run, prompts = config(), [[5, 9, 3], [7], [2, 4, 6, 8, 10], [9, 9]]

    def samples(mesh):
        with jax.set_mesh(mesh):
            return generate(tiny.placed(params(run), mesh), run, tiny.VOCAB, prompts, 6, Sampling(temperature=0.0), eos_id=-1)

    assert samples(tiny.mesh(fsdp=2, expert=2, tensor=2)) == samples(tiny.ONE)


# Counts.


def published(num_experts, **moe):
    """A model of appendix C.1: 512 units, experts of width 1024, four of them per token."""
    moe = {**FLAT, "experts_per_token": 4, **moe}
    return Config(ModelConfig(architecture="lstm", num_layers=2, d_model=512),
                  MoEConfig(num_experts=num_experts, every=2, first=0, d_ff=1024, activation="relu", **moe))


@pytest.mark.parametrize("num_experts, moe, millions", [
    (4, {}, 8.4), (32, {}, 37.8), (256, {}, 272.9),
    (256, dict(router="hierarchical", num_groups=16, groups_per_token=2, gate_order="softmax_then_top_k"), 272.9),
    (1024, dict(router="hierarchical", num_groups=16, groups_per_token=2, gate_order="softmax_then_top_k"), 1079.0),
    (4096, dict(router="hierarchical", num_groups=16, groups_per_token=2, gate_order="softmax_then_top_k"), 4303.4)])
def test_parameters_without_embedding_and_softmax_are_the_papers(num_experts, moe, millions):
    """Table 7 of the paper, column "#params excluding embedding & softmax", rounded there."""
    count = count_parameters(published(num_experts, **moe), 793_472)
    assert count.total - count.embedding == pytest.approx(millions * 1e6, rel=2e-3)
    # About 8 million multiply-adds per token, half of them the mixture's.
    operations = forward_flops_per_token(published(num_experts, **moe), 0, 1) / 2
    assert operations == pytest.approx(4 * 2 * 512 * 1024 + 2 * 8 * 512**2 + 512 * (num_experts + moe.get("num_groups", 0)))


# What it refuses.


@pytest.mark.parametrize("settings, words", [
    (dict(model_num_heads=8), "model.num_heads=8: has no effect with model.architecture='lstm'"),
    (dict(model_mtp_depth=1), "model.mtp_depth=1"), (dict(model_remat="block"), "model.remat='block'"),
    (dict(attention_kind="latent", attention_latent_rank=4, attention_rope_dim=2, attention_value_dim=4), "attention."),
    (dict(moe_residual_ffn="sequential"), "moe.residual_ffn='sequential'"),
    (dict(moe_padding="routed", moe_router="top_k", moe_load_weight=0.0), "moe.padding='routed'"),
    (dict(data_objective="prefix_lm", data_prefix_attention="bidirectional"), "data.prefix_attention='bidirectional'"),
    (dict(model_architecture="transformer", model_dropout=0.1), "model.dropout=0.1"), (dict(model_dropout=1.0), "below 1"),
    (dict(moe_router="top_k", moe_load_weight=0.0, moe_router_init=0.0), "moe.router_init=0.0: leaves all experts alike"),
    (dict(model_architecture="rnn"), "'transformer', 'lstm'")])
def test_settings_without_effect_are_refused(settings, words):
    with pytest.raises(ConfigError) as error:
        config(**settings)
    assert words in str(error.value)


def test_a_mesh_that_does_not_divide_the_units_is_refused():
    run = config(model_d_model=18, mesh_tensor=4, mesh_data=1)
    with pytest.raises(ConfigError, match="model.d_model=18 does not divide over mesh.tensor=4"):
        resolve_mesh(run, 4)
    assert resolve_mesh(config(mesh_tensor=8, mesh_data=1), 8)["tensor"] == 8  # heads of attention play no part


def test_upcycling_refuses_an_lstm():
    dense = config(moe_num_experts=0)
    with pytest.raises(ConfigError, match="the dense run's model is an LSTM"):
        check_upcyclable(dense, config())
    with pytest.raises(ConfigError, match="the new model is an LSTM"):
        check_upcyclable(tiny.config(moe_num_experts=0), config())


# Whole runs.

SMALL = {"model.num_heads": 4, "model.num_kv_heads": 4, "model.head_dim": 32, "model.d_ff": 512,  # those of a transformer
         "model.architecture": "lstm", "model.dropout": 0.1, "moe.first": 0, "moe.activation": "relu",
         "moe.bias_update_rate": 0.0,
         "moe.router_jitter": 0.0, "moe.router": "noisy_top_k", "moe.gate_order": "top_k_then_softmax", "moe.router_init": 0.0,
         "moe.dispatch": "dropless", "moe.importance_weight": 0.1, "moe.load_weight": 0.1, "moe.balance_weight": 0.0}


def words(corpus, **settings):
    return overrides(corpus, **{name.replace(".", "__"): value for name, value in {**SMALL, **settings}.items()})


@pytest.mark.slow
def test_every_command_knows_a_run_of_it(moe_jax, tmp_path):
    corpus, run = write_corpus(tmp_path / "texts"), tmp_path / "run"
    for number in (5, 12):
        outcome = moe_jax("train", *words(corpus, **{"training.num_steps": number}), f"--workdir={run}", "--allow-config-change")
        assert outcome.code == 0, outcome.err
    assert "Resumed from the checkpoint of step 5" in outcome.err
    assert lines(run)[-1]["loss/ce"] < lines(run)[0]["loss/ce"]
    assert (run / "report.html").exists() and read_json(run / "evaluation.json")
    assert "--- step 12" in moe_jax("generate", f"--workdir={run}", "--prompt=apple", "--max-tokens=4").out
    assert moe_jax("analyze", f"--checkpoint={run}", f"--out={tmp_path / 'routing'}", "--batches=1").code == 0
    placed = moe_jax("place", f"--workdir={run}", "--devices=2", f"--apply={tmp_path / 'placed'}",
                     f"--out={tmp_path / 'placement.json'}")
    assert placed.code == 0, placed.err
    again = moe_jax("eval", f"--workdir={tmp_path / 'placed'}", "--json")
    assert again.code == 0, again.err


def test_plans_refuse_it(moe_jax):
    error = moe_jax("plan", "--config=configs/shazeer_tiny.py", "--slice=v5e-8", "--config.model.vocab_size=320").error
    assert "plans are of transformers" in error
