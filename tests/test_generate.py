"""Generation: the cache changes nothing, neighbours change nothing, and the drawing rules do what they say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from moe_jax.inference.generate import Sampling, _draw, generate
from moe_jax.training.state import model_graph

CONFIG = tiny.config(model_num_layers=2, moe_every=1)
GREEDY = Sampling(temperature=0.0)
PROMPTS = [[5, 9, 3], [7], [2, 4, 6, 8, 10, 12, 14, 16, 18, 20], [9, 9]]


def samples(prompts=PROMPTS, sampling=GREEDY, mesh=tiny.ONE, config=CONFIG, tokens=8, **options):
    with jax.set_mesh(mesh):
        options = {"eos_id": -1, **options}
        return generate(tiny.placed(tiny.params(config), mesh), config, tiny.VOCAB, prompts, tokens, sampling, **options)


def greedy_by_full_forward(prompt, tokens):
    """No cache: the whole text again for every token."""
    ids = [0, *prompt]
    for _ in range(tokens):
        row = np.zeros((1, 24), np.int32)
        row[0, : len(ids)] = ids
        valid = np.arange(24)[None] < len(ids)
        batch = {"input_ids": row, "valid": valid, "segment_ids": valid.astype(np.int32),
                 "positions": np.where(valid, np.arange(24)[None], 0).astype(np.int32)}
        logits = tiny.logits(CONFIG, tiny.params(CONFIG), batch)[0, len(ids) - 1].copy()
        logits[0] = -np.inf  # id 0 begins a text and is never drawn
        ids.append(int(np.argmax(logits)))
    return ids[1 + len(prompt):]


def test_greedy_generation_is_the_argmax_of_the_full_forward_pass():
    assert samples() == [greedy_by_full_forward(prompt, 8) for prompt in PROMPTS]


def test_a_model_whose_router_looks_ahead_generates_by_token_choice():
    ahead = tiny.config(model_num_layers=2, moe_every=1, moe_router="expert_choice", moe_balance_weight=0.0,
                        moe_allow_noncausal_routing=True)
    # The routers differ, the parameters are the same.
    assert samples(config=ahead) == samples()


def test_b43_experts_that_chose_among_rows_in_training_do_not_let_neighbours_choose_in_generation():
    config = tiny.config(model_num_layers=2, moe_every=1, moe_router="expert_choice", moe_balance_weight=0.0,
                         moe_group_over="batch")
    assert [samples([prompt], config=config)[0] for prompt in PROMPTS] == samples(config=config)


@functools.lru_cache(maxsize=None)
def cached(config):
    """(prefill, one token) of the model with a cache."""
    def call(params, ids_BS, positions_BS, valid_BS, segments_BT, cache, index):
        model = nnx.merge(model_graph(config, tiny.VOCAB), params)
        if cache is None:
            cache = model.empty_cache(ids_BS.shape[0], segments_BT.shape[1])
            cache = jax.tree.map(lambda leaf: jax.reshard(leaf, jax.P(*[None] * (leaf.ndim - 4), (
                "data", "fsdp", "expert"), None, "tensor")), cache)
        output = model(ids_BS, positions_BS, valid_BS.astype(jnp.int32), valid_BS, tiny.DROPLESS, None, None, cache,
                       segments_BT, index)
        return output.logits_BSV, output.cache
    return jax.jit(call, static_argnums=6), jax.jit(call)


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 3])
def test_prefill_and_decoding_give_the_logits_of_the_full_forward_pass(left):
    """Twelve tokens behind ``left`` places of padding: the first eight at once, then one by one."""
    config = tiny.config(model_num_layers=5)  # two scanned blocks and one layer behind them
    params, whole = tiny.params(config), tiny.batch(rows=8, length=12)
    expected = tiny.logits(config, params, whole)
    pad = lambda x_BS: np.pad(x_BS, ((0, 0), (left, 0)))
    ids_BS, positions_BS, valid_BS = pad(whole["input_ids"]), pad(whole["positions"]), pad(whole["valid"])
    ids_BS[:, :left] = 11  # what stands in the padding does not matter
    prefill, decode = cached(config)
    first = 8 + left
    with jax.set_mesh(tiny.ONE):
        put = lambda x_BS: jax.device_put(x_BS, jax.sharding.NamedSharding(tiny.ONE, jax.P(("data", "fsdp", "expert"))))
        filled = lambda n: put(np.pad(valid_BS[:, :n], ((0, 0), (0, 12 + left - n))).astype(np.int32))
        logits_BSV, cache = prefill(params, *(put(x[:, :first]) for x in (ids_BS, positions_BS, valid_BS)), filled(first),
                                    None, 0)
        found = [np.asarray(logits_BSV)[:, left:]]
        for i in range(first, 12 + left):
            logits_BSV, cache = decode(params, *(put(x[:, i : i + 1]) for x in (ids_BS, positions_BS, valid_BS)),
                                       filled(i + 1), cache, i)
            found.append(np.asarray(logits_BSV))
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0)], ids=["greedy", "drawn"])
def test_b43_a_prompt_gives_the_same_sample_alone_and_among_others(sampling):
    together = samples(sampling=sampling)
    assert [samples([prompt], sampling)[0] for prompt in PROMPTS] == together
    assert samples(PROMPTS[::-1], sampling) == together[::-1]


@pytest.mark.slow
@pytest.mark.parametrize("sizes, sampling", [
    (dict(data=2, expert=4), GREEDY), (dict(fsdp=2, expert=2, tensor=2), Sampling(0.7, top_k=20, top_p=0.9))], ids=str)
def test_b43_eight_devices_write_what_one_writes(sizes, sampling):
    assert samples(sampling=sampling, mesh=tiny.mesh(**sizes)) == samples(sampling=sampling)


def test_the_longest_prompt_of_the_batch_does_not_matter():
    """A neighbour of 20 ids widens the padding of all."""
    assert samples([PROMPTS[0], [3] * 20])[0] == samples([PROMPTS[0]])[0]


def test_samples_follow_from_the_seed():
    draw = lambda seed: samples(sampling=Sampling(temperature=1.0), seed=seed)
    assert draw(0) == draw(0) != draw(1)


def test_a_sample_ends_before_its_first_end_of_text():
    free = samples([PROMPTS[0]])[0]
    assert len(free) == 8
    end = free[4]
    assert samples([PROMPTS[0]], eos_id=end)[0] == free[: free.index(end)]


def test_the_router_bias_is_used():
    config = tiny.config(model_num_layers=2, moe_every=1, moe_bias_update_rate=0.01)
    bias_LE = np.array([[9, 9, 0, 0], [0, 0, 9, 9]], np.float32)
    assert samples(config=config, bias_LE=bias_LE) != samples(config=config)


@pytest.mark.parametrize("prompts, tokens", [([], 4), ([[1]], 0)])
def test_nothing_to_do_is_an_error(prompts, tokens):
    with pytest.raises(ValueError, match="must be at least 1"):
        samples(prompts, tokens=tokens)


@pytest.mark.parametrize("settings, message", [
    (dict(temperature=-0.1), "temperature=-0.1"), (dict(top_k=-1), "top_k=-1"), (dict(top_p=0.0), "top_p=0.0"),
    (dict(top_p=1.1), "top_p=1.1"), (dict(temperature=float("nan")), "temperature=nan"), (dict(top_p=float("nan")), "top_p=nan"),
    (dict(temperature=float("inf")), "temperature=inf")])
def test_sampling_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


# Drawing one id: probabilities of ids 0 … 5; id 0 is never drawn, id 5 lies beyond the vocabulary.

PROBABILITY = np.array([0.3, 0.1, 0.25, 0.2, 0.05, 0.1])
POSSIBLE = PROBABILITY[1:5] / PROBABILITY[1:5].sum()  # of ids 1 … 4: 1/6, 5/12, 1/3, 1/12


@functools.lru_cache(maxsize=None)
def frequencies(sampling, draws=4000):
    """How often each id is drawn."""
    @jax.jit
    def many(keys_B):
        logits_BV = jnp.broadcast_to(jnp.log(jnp.asarray(PROBABILITY, jnp.float32)), (draws, 6))
        return _draw(logits_BV, keys_B, 0, sampling, 5, (0,))

    with jax.set_mesh(tiny.ONE):
        ids_B = np.asarray(many(jax.random.split(jax.random.key(0), draws)))
    return np.bincount(ids_B, minlength=6) / draws


def test_ids_are_drawn_in_proportion_and_never_0_or_beyond_the_vocabulary():
    drawn = frequencies(Sampling(temperature=1.0))
    assert drawn[0] == drawn[5] == 0
    np.testing.assert_allclose(drawn[1:5], POSSIBLE, atol=0.03)  # deviation √(0.25/4000) = 0.008


def test_temperature_sharpens_by_its_inverse_power():
    power = POSSIBLE**2  # temperature 1/2
    np.testing.assert_allclose(frequencies(Sampling(temperature=0.5))[1:5], power / power.sum(), atol=0.03)


def test_top_k_keeps_the_k_likeliest():
    np.testing.assert_allclose(frequencies(Sampling(1.0, top_k=2)), [0, 0, 5 / 9, 4 / 9, 0, 0], atol=0.03)
    assert frequencies(Sampling(1.0, top_k=100))[1:5] == pytest.approx(POSSIBLE, abs=0.03)


def test_top_p_keeps_the_likeliest_until_they_reach_p():
    # Falling: 5/12, 1/3 (together 3/4), 1/6, 1/12. p = 0.5 needs two; p = 0.8 three; p = 0.4 one.
    np.testing.assert_allclose(frequencies(Sampling(1.0, top_p=0.5)), [0, 0, 5 / 9, 4 / 9, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(Sampling(1.0, top_p=0.8)), [0, 2 / 11, 5 / 11, 4 / 11, 0, 0], atol=0.03)
    np.testing.assert_array_equal(frequencies(Sampling(1.0, top_p=0.4)), [0, 0, 1, 0, 0, 0])


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(1e-4)], ids=str)
def test_greedy_top_1_and_a_tiny_top_p_all_take_the_likeliest_real_id(sampling):
    np.testing.assert_array_equal(frequencies(sampling), [0, 0, 1, 0, 0, 0])
