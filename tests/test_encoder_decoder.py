"""The encoder–decoder: who sees whom, losses of both stacks, one device against eight, written with a cache or without."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax.config import ConfigError
from moe_jax.dispatch.placement import Placement
from moe_jax.inference.generate import Sampling, decode, generate, prefill
from moe_jax.models.decoder import layer_paths, moe_layer_paths, of_stacks
from moe_jax.nn.positions import relative_bias, sinusoidal
from moe_jax.training.evaluate import put_batch
from moe_jax.training.flops import forward_flops_per_token, hardware_flops_per_token, training_flops_per_token
from moe_jax.training.named_arrays import flatten
from moe_jax.training.rearrange import renumbered
from moe_jax.training.step import routing_losses
from moe_jax.training.upcycle import upcycled

T5 = dict(model_num_layers=2, model_encoder_layers=3, model_num_kv_heads=4, attention_positions="relative",
          attention_relative_buckets=8, attention_relative_distance=10, data_objective="span_corruption", data_target_length=12,
          moe_encoder_layers="0,2")
SINES = {**{name: value for name, value in T5.items() if not name.startswith("attention_")}, "model_norm": "layer",
         "attention_positions": "sinusoidal", "attention_first_position": 2, "attention_bias": "all"}
CONFIG = tiny.config(**T5, moe_balance_weight=0.5, moe_router_z_weight=0.1)
GIVEN, WRITTEN = [16, 9, 3, 16, 1, 12, 16, 7], [12, 5, 12, 1, 12, 3, 9, 12]
BATCH = tiny.pair(given_lengths=GIVEN, written_lengths=WRITTEN)


@functools.lru_cache(maxsize=None)
def grads(config=CONFIG, mesh=tiny.ONE):
    return tiny.grads(config, tiny.params(config), BATCH, mesh)


def logits(batch, config=CONFIG):
    return tiny.logits(config, tiny.params(config), batch)


# Who sees whom


def changed(name, row, places, batch=BATCH):
    """The batch with other ids there."""
    ids = batch[name].copy()
    ids[row, places] = (ids[row, places] + 5) % tiny.VOCAB
    return {**batch, name: ids}


def differs(one, other):
    """[B, S]: where logits are not the same."""
    return (one != other).any(axis=-1)


def test_the_decoder_looks_back_and_at_all_of_what_is_given():
    before = logits(BATCH)
    written = differs(before, logits(changed("input_ids", 0, [6])))
    np.testing.assert_array_equal(written[0], np.arange(12) >= 6)
    for place in (0, 15):  # first and last token given: all that is written sees them
        given = differs(before, logits(changed("encoder_input_ids", 0, [place])))
        assert given[0].all() and not given[1:].any() and not written[1:].any()


def test_b41_padding_on_either_side_is_invisible():
    before = logits(BATCH)
    for name, lengths in (("encoder_input_ids", GIVEN), ("input_ids", WRITTEN)):
        after = logits(changed(name, 1, slice(lengths[1], None)))
        np.testing.assert_array_equal(after[BATCH["valid"]], before[BATCH["valid"]])


def test_a_segment_sees_its_own_segment_of_the_encoder():
    packed = tiny.pair(segments=2)
    before = logits(packed)
    after = differs(before, logits(changed("encoder_input_ids", 0, [3], packed)))
    np.testing.assert_array_equal(after[0], np.arange(12) < 6)
    # … and gives what it gives alone: distances inside a segment are those of positions.
    alone = {name: values[:, :8 if name.startswith("encoder_") else 6] for name, values in packed.items()}
    np.testing.assert_allclose(logits(alone)[:, :6], before[:, :6], rtol=1e-4, atol=1e-5)


# Positions


@pytest.mark.parametrize("both_sides", [True, False])
def test_relative_buckets_are_exact_near_by_and_logarithmic_further_off(both_sides):
    """Eight buckets up to distance 16. One side: 0 1 2 3, then 4-5, 6-8 (16^(i/4) · 4 …), in exact integer arithmetic."""
    attention = dataclasses.replace(CONFIG.attention, relative_buckets=8, relative_distance=16)
    table_XH = jnp.arange(8, dtype=jnp.float32)[:, None] * jnp.ones((1, 2))
    with jax.set_mesh(tiny.ONE):
        bias_ST = np.asarray(relative_bias(table_XH, 20, 40, 10, attention, both_sides))[0, 1]

    def bucket(distance, count):
        exact = count // 2
        if distance < exact:
            return distance
        # The largest n with (furthest / exact)^(n / (count - exact)) <= distance / exact.
        n = max(n for n in range(count) if 16**n * exact ** (count - exact - n) <= distance ** (count - exact))
        return min(exact + n, count - 1)

    for s in range(20):
        for t in range(40):
            behind = t - (s + 10)
            expected = bucket(abs(behind), 4) + 4 * (behind > 0) if both_sides else bucket(max(-behind, 0), 8)
            assert bias_ST[s, t] == expected, (behind, bias_ST[s, t], expected)


def test_sinusoidal_positions_are_fairseqs():
    positions_BS = np.array([[0, 1, 7]])
    found = np.asarray(sinusoidal(jnp.asarray(positions_BS), 7, 2))[0]
    for row, position in zip(found, positions_BS[0] + 2):
        angle = position * 10_000.0 ** (-np.arange(3) / 2)
        np.testing.assert_allclose(row, [*np.sin(angle), *np.cos(angle), 0], rtol=1e-5, atol=1e-6)


def test_sinusoidal_positions_are_added_to_embeddings_but_not_to_padding():
    config = tiny.config(**SINES, model_mlp_bias=True, moe_expert_bias=True, model_embedding_scale=True)
    params = tiny.params(config)
    before = tiny.logits(config, params, BATCH)
    moved = {**BATCH, "encoder_positions": np.where(BATCH["encoder_valid"], BATCH["encoder_positions"] + 3, 7)}
    assert differs(before, tiny.logits(config, params, moved))[BATCH["valid"]].all()
    padding = {**BATCH, "encoder_positions": np.where(BATCH["encoder_valid"], BATCH["encoder_positions"], 7)}
    np.testing.assert_array_equal(tiny.logits(config, params, padding)[BATCH["valid"]], before[BATCH["valid"]])


# Losses and statistics


def test_each_stack_has_counts_of_its_own_tokens_and_the_encoders_layers_come_first():
    routing = grads()[1]["routing"]
    given, written = sum(GIVEN), sum(WRITTEN)
    assert CONFIG.moe_layers == (0, 2, 4)
    np.testing.assert_array_equal(routing["tokens_L"], [given, given, written])
    np.testing.assert_array_equal(routing["counts_LE"].sum(axis=1), [2 * given, 2 * given, 2 * written])


def test_balancing_losses_are_the_mean_over_layers_of_each_layers_own():
    output = tiny.output(CONFIG, tiny.params(CONFIG), BATCH)
    expected = []
    for part, total in zip(of_stacks(output.statistics), (sum(GIVEN), sum(WRITTEN))):
        router = part.router
        for layer in range(router.tokens.shape[0]):
            rows = []
            for row in range(8):
                tokens = router.tokens[layer, row]
                f_E, p_E = router.choices_E[layer, row] / (2 * tokens), router.probability_E[layer, row] / tokens
                rows.append(tokens / total * 4 * np.sum(f_E * p_E))
            expected.append(sum(rows))
    totals = np.array([sum(GIVEN)] * 2 + [sum(WRITTEN)], np.float32)
    balance, router_z = routing_losses(CONFIG, jax.tree.map(jnp.asarray, output.statistics), jnp.asarray(totals))
    np.testing.assert_allclose(balance, np.mean(expected), rtol=1e-5)
    z_L = [part.router.logsumexp_squared.sum(axis=1) for part in of_stacks(output.statistics)]
    np.testing.assert_allclose(router_z, np.mean(np.concatenate(z_L) / totals), rtol=1e-5)


def test_the_loss_is_of_what_is_written():
    metrics = grads()[1]["sums"]
    logits_BSV = logits(BATCH).astype(np.float64)
    log_p = logits_BSV - np.log(np.exp(logits_BSV).sum(-1, keepdims=True))
    ce_BS = -np.take_along_axis(log_p, BATCH["target_ids"][:, :, None], axis=-1)[..., 0]
    np.testing.assert_allclose(metrics["loss/ce"], ce_BS[BATCH["valid"]].mean(), rtol=1e-3)  # training drops by capacity


@pytest.mark.slow
@pytest.mark.parametrize("sizes, microbatches", [(dict(data=2, fsdp=2, tensor=2), 1), (dict(expert=4), 2)], ids=str)
def test_b10_b13_microbatches_and_meshes_change_nothing(sizes, microbatches):
    expected_grads, expected = grads()
    config = dataclasses.replace(CONFIG, training=dataclasses.replace(CONFIG.training, microbatches=microbatches))
    found_grads, found = grads(config, tiny.mesh(**sizes))
    tiny.assert_close(found, expected)
    tiny.assert_close(found_grads, expected_grads, rtol=1e-4, atol=1e-5)


def test_a_step_counts_tokens_of_both_sides_and_learns():
    state = tiny.state(CONFIG)
    state, first = tiny.step(CONFIG, state, BATCH)
    for _ in range(3):
        state, last = tiny.step(CONFIG, state, BATCH)
    assert first["tokens"] == sum(GIVEN) + sum(WRITTEN) and first["targets"] == sum(WRITTEN)
    np.testing.assert_array_equal(first["routed_tokens_L"], [sum(GIVEN)] * 2 + [sum(WRITTEN)])
    assert last["sums"]["loss/ce"] < first["sums"]["loss/ce"]


# Parameters


def test_paths_of_layers():
    assert layer_paths(CONFIG) == {"encoder/body/layers/0": (0,), "encoder/body/layers/1": (1,), "encoder/body/layers/2": (2,),
                                   "body/layers/0": (3,), "body/layers/1": (4,)}
    assert moe_layer_paths(CONFIG) == {"encoder/body/layers/0/moe": (0,), "encoder/body/layers/2/moe": (1,),
                                       "body/layers/1/moe": (2,)}


def test_the_decoders_parameters_lie_where_a_decoders_do():
    pair = tiny.leaves(tiny.params(CONFIG))
    plain = tiny.config(**{name: value for name, value in T5.items() if name.startswith(("attention", "model_num"))})
    alone = tiny.leaves(tiny.params(plain))
    assert {name: leaf.shape for name, leaf in alone.items()} == {
        name: leaf.shape for name, leaf in pair.items() if not name.startswith("encoder.") and ".cross_" not in name}
    assert pair["encoder.relative_bias_XH"].shape == pair["relative_bias_XH"].shape == (8, 4)


def test_an_encoder_may_have_a_table_of_its_own():
    config = tiny.config(**T5, model_encoder_embedding=True)
    params = tiny.params(config)
    assert params["encoder"]["embedding"]["embedding_VD"].shape == (tiny.VOCAB, 16)
    before = tiny.logits(config, params, BATCH)
    params["encoder"]["embedding"]["embedding_VD"] = np.zeros((tiny.VOCAB, 16), np.float32)
    assert differs(before, tiny.logits(config, params, BATCH))[BATCH["valid"]].all()


def test_flops_are_the_mean_over_tokens_of_both_sides():
    """One layer each, D 16, H = H_kv = 4, d 4, F 32 (three matrices), V 64, S 16 given, T 12 written."""
    config = tiny.config(**{**T5, "model_num_layers": 1, "model_encoder_layers": 1, "moe_encoder_layers": ""}, moe_num_experts=0)
    projections, ffn = 2 * 4 * 16 * 16, 2 * 3 * 16 * 32
    encoder = projections + 2 * 2 * 16 * 16 + ffn + 2 * 2 * 16 * 16  # all of 16 keys; keys and values for the decoder
    decoder = projections + 2 * 2 * 16 * 12 / 2 + ffn + 2 * 2 * 16 * 16 + 2 * 2 * 16 * 16 + 2 * 16 * 64
    assert forward_flops_per_token(config, 64, 0) == (16 * encoder + 12 * decoder) / 28
    assert training_flops_per_token(config, 64) == 3 * (16 * encoder + 12 * decoder) / 28
    mixture = tiny.config(**T5, moe_capacity_factor=1.0)  # buffers of exactly the choices
    assert hardware_flops_per_token(mixture, 64) == pytest.approx(training_flops_per_token(mixture, 64))
    twice = tiny.config(**T5, moe_capacity_factor=2.0)
    extra = 3 * 2 * 2 * 3 * 16 * 16 * (2 * 16 + 1 * 12) / 28  # as many empty slots as choices, in two layers and one
    assert hardware_flops_per_token(twice, 64) == pytest.approx(training_flops_per_token(twice, 64) + extra)


# Settings


@pytest.mark.parametrize("settings, words", [
    (dict(data_objective="causal", data_target_length=0), "data.objective='causal': gives the encoder nothing to read"),
    (dict(data_target_length=0), r"data.target_length=0: .* needs at least 2; the targets of data.sequence_length=16 inputs are 5"),
    (dict(model_encoder_layers=0, moe_encoder_layers=""), "data.target_length=12: .* model.encoder_layers=0"),
    (dict(model_mtp_depth=1), "model.mtp_depth=1: multi-token prediction is of decoders alone"),
    (dict(attention_layers="sliding", attention_window=4, attention_positions="rotary", attention_relative_buckets=32,
          attention_relative_distance=128), "attention.layers='sliding': an encoder looks to both sides"),
    (dict(model_attention="splash"), "model.attention='splash': looks back only"),
    (dict(moe_router="reinforce", moe_experts_per_token=1), "moe.router='reinforce': learns from how well"),
    (dict(moe_padding="routed"), "moe.padding='routed': blanks padding as decoders alone do"),
    (dict(data_prefix_attention="bidirectional"), "data.prefix_attention='bidirectional': has no effect"),
], ids=str)
def test_what_an_encoder_decoder_cannot_work_with_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        tiny.config(**{**T5, **settings})


# Writing


PROMPTS = [[5, 9, 3], [7], [2, 4, 6, 8, 10, 12, 14, 16, 18, 20], [9, 9]]
# Compiled in half the time.
SHORT, SHORT_NLLB = (tiny.config(**{**settings, "model_num_layers": 1, "model_encoder_layers": 1, "moe_every": 1,
                                    "moe_encoder_layers": ""}) for settings in (T5, SINES))


def samples(prompts=PROMPTS, mesh=tiny.ONE, config=SHORT, tokens=6, sampling=Sampling(temperature=0.0), **options):
    with jax.set_mesh(mesh):
        return generate(tiny.placed(tiny.params(config), mesh), config, tiny.VOCAB, prompts, tokens, sampling,
                        **{"eos_id": 31, **options})


def greedy_by_full_forward(prompt, tokens, config, start=(0,)):
    """No cache: encoder and decoder again for every token."""
    ids = list(start)
    row = lambda values, length: np.pad(np.array([values], np.int32), ((0, 0), (0, length - len(values))))
    given = [*prompt, 31]
    for _ in range(tokens):
        if 31 in ids:
            break
        valid, seen = np.arange(12)[None] < len(ids), np.arange(16)[None] < len(given)
        batch = {"input_ids": row(ids, 12), "valid": valid, "segment_ids": valid.astype(np.int32),
                 "positions": np.where(valid, np.arange(12)[None], 0).astype(np.int32),
                 "encoder_input_ids": row(given, 16), "encoder_valid": seen, "encoder_segment_ids": seen.astype(np.int32),
                 "encoder_positions": np.where(seen, np.arange(16)[None], 0).astype(np.int32)}
        found = tiny.logits(config, tiny.params(config), batch)[0, len(ids) - 1].copy()
        found[0] = -np.inf
        ids.append(int(np.argmax(found)))
    return ids[len(start):ids.index(31) if 31 in ids else None]


@pytest.mark.parametrize("config", [SHORT, SHORT_NLLB], ids=["relative", "sinusoidal"])
def test_greedy_generation_is_the_argmax_of_the_full_forward_pass(config):
    assert samples(config=config) == [greedy_by_full_forward(prompt, 6, config) for prompt in PROMPTS]


@pytest.mark.slow
def test_the_decoder_may_begin_with_ids_of_the_callers():
    starts = [[2, 7], [3], [4], [2, 9]]
    assert samples(starts=starts) == [greedy_by_full_forward(prompt, 6, SHORT, start) for prompt, start in zip(PROMPTS, starts)]
    with pytest.raises(ValueError, match="starts=.* for each of 4 prompts"):
        samples(starts=[[1]])
    with pytest.raises(ValueError, match="has no encoder"):
        samples(config=tiny.config(), starts=starts)


def test_b43_a_prompt_gives_the_same_sample_alone_and_among_others():
    drawn = Sampling(temperature=1.0, top_k=9, top_p=0.9)
    together = samples(sampling=drawn)
    assert [samples([prompt], sampling=drawn)[0] for prompt in PROMPTS] == together


@pytest.mark.slow
def test_b43_so_does_one_whose_encoders_experts_choose_their_tokens():
    """Here of rows of 16 and of 32, in which an expert takes 8 and 16 tokens."""
    config = tiny.config(**{**T5, "model_num_layers": 1, "model_encoder_layers": 1, "moe_every": 1, "moe_encoder_layers": "",
                            "moe_layers": "none"}, moe_router="expert_choice", moe_balance_weight=0.0, moe_router_init=2.0)
    prompts = [PROMPTS[0], [5, 9, 3, 7] * 5]
    assert samples(prompts, config=config) == [samples([prompt], config=config)[0] for prompt in prompts]


@pytest.mark.slow
def test_eight_devices_write_what_one_writes():
    assert samples(mesh=tiny.mesh(data=2, fsdp=2, tensor=2)) == samples()


@pytest.mark.slow
@pytest.mark.parametrize("config", [SHORT, SHORT_NLLB], ids=["relative", "sinusoidal"])
def test_prefill_and_decoding_give_the_logits_of_the_full_forward_pass(config):
    """The first four tokens at once, then one by one; the encoder is run once."""
    params, batch = tiny.params(config), tiny.pair(given_lengths=GIVEN)
    expected, bias_LE = tiny.logits(config, params, batch), tiny.no_bias(config)
    read = jax.jit(lambda params, ids, valid, given: prefill(params, ids, valid, bias_LE, config, tiny.VOCAB, 12, given),
                   compiler_options=tiny.QUICK)
    write = jax.jit(lambda params, written, token, index: decode(params, written, token, index, bias_LE, config, tiny.VOCAB),
                    compiler_options=tiny.QUICK)
    with jax.set_mesh(tiny.ONE):
        here = put_batch(batch, tiny.ONE)
        params = tiny.placed(params, tiny.ONE)
        first, written = read(params, here["input_ids"][:, :4], here["valid"][:, :4],
                              (here["encoder_input_ids"], here["encoder_valid"]))
        found = [np.asarray(first)]
        for i in range(4, 12):
            logits_BV, written = write(params, written, here["input_ids"][:, i], i)
            found.append(np.asarray(logits_BV))
    np.testing.assert_allclose(np.stack(found, axis=1), expected[:, 3:], rtol=1e-4, atol=1e-5)


# What is made of a trained model


@pytest.mark.slow
def test_an_upcycled_encoder_decoder_computes_what_the_dense_one_did():
    """Its networks have biases, none of them 0."""
    dense = tiny.config(**{**T5, "moe_encoder_layers": ""}, moe_num_experts=0, moe_d_ff=32, model_mlp_bias=True)
    sparse = tiny.config(**T5, moe_d_ff=32, moe_renormalize=True, model_mlp_bias=True, moe_expert_bias=True)
    host = jax.device_get({**tiny.state(dense), "rng": jax.random.key_data(jax.random.key(0))})
    random = np.random.default_rng(0)
    host["params"] = jax.tree.map(lambda leaf: leaf + 0.1 * random.normal(size=leaf.shape).astype(np.float32), host["params"])
    new = upcycled(host, dense, sparse, tiny.VOCAB)
    found, expected = tiny.logits(sparse, new["params"], BATCH), tiny.logits(dense, host["params"], BATCH)
    np.testing.assert_allclose(found[BATCH["valid"]], expected[BATCH["valid"]], atol=3e-6)  # experts give padding nothing


@pytest.mark.slow
def test_experts_of_both_stacks_that_change_places_compute_the_same():
    params, random = tiny.params(CONFIG), np.random.default_rng(5)
    flat = {**{f"params/{path}": leaf for path, leaf in flatten(params).items()}, "router_bias_LE": tiny.no_bias(CONFIG)}
    expert_LP = np.stack([random.permutation(4) for _ in CONFIG.moe_layers])
    new = renumbered(flat, CONFIG, Placement(expert_LP, 1))
    moved = jax.tree.unflatten(jax.tree.structure(params), [new[f"params/{path}"] for path in flatten(params)])
    assert not np.array_equal(moved["encoder"]["body"]["layers"][0]["moe"]["w_router_DE"],
                              params["encoder"]["body"]["layers"][0]["moe"]["w_router_DE"])
    np.testing.assert_allclose(tiny.logits(CONFIG, moved, BATCH), logits(BATCH), atol=2e-6)
