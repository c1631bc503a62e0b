"""Caches of experts: hand-worked traces of each policy, the clock by hand, a slow simulation, and that nobody beats Belady."""

import dataclasses
import functools

import numpy as np
import pytest
import records

from moe_jax.analysis import cache
from moe_jax.analysis.cache import POLICIES, Machine, Setting, simulate
from moe_jax.analysis.tables import MissingArray

UNIT = Machine(expert_bytes=2.0, bytes_per_second=1.0, layer_seconds=3.0)  # two seconds per expert, three per layer


def trace(*tokens):
    """One layer: [1, T, K]."""
    return np.array(tokens, np.int16).reshape(1, len(tokens), -1)


def hits(experts_LTK, places, policy, experts=6):
    return simulate(experts_LTK, experts, [Setting(places, policy)]).hits[0].astype(int).tolist()


@pytest.mark.parametrize("tokens, places, policy, expected", [
    # 2 pushes 0 out, 0 pushes 1 out, 1 pushes 2 out: never a hit
    ([0, 1, 2, 0, 1], 2, "LRU", [0, 0, 0, 0, 0]),
    # 2 pushes out 1, which is used later than 0
    ([0, 1, 2, 0, 1], 2, "Belady", [0, 0, 0, 1, 0]),
    # 2 pushes out 0, the older, though it was used twice
    ([0, 0, 1, 2, 0], 2, "LRU", [0, 1, 0, 0, 0]),
    # 2 pushes out 1, used once
    ([0, 0, 1, 2, 0], 2, "LFU", [0, 1, 0, 0, 1]),
    # used once each: 2 pushes out 0, the less recent; 0, now used twice, pushes out 1, not 2; 1, now twice, pushes out 2
    ([0, 1, 2, 0, 1, 0], 2, "LFU", [0, 0, 0, 0, 0, 1]),
    # 3 pushes out 2, which does not come again; 4 pushes out 3 for the same reason
    ([0, 1, 2, 3, 0, 4, 1], 3, "Belady", [0, 0, 0, 0, 1, 0, 1]),
])
def test_policies_by_hand(tokens, places, policy, expected):
    assert hits(trace(*tokens), places, policy) == expected


def test_the_experts_of_a_token_stay_together_and_its_first_choice_stays_longest():
    # [2 3] needs two of three places: of 0 and 1 the first choice, 0, stays. So [1 0] has one hit, and then 2 is in.
    assert hits(trace([0, 1], [2, 3], [1, 0], [2, 0]), 3, "LRU") == [0, 0, 1, 2]
    # Belady would rather keep 2 and 0 at [2 3], and pushes out 3 at [1 0]
    assert hits(trace([0, 1], [2, 3], [1, 0], [2, 0]), 3, "Belady") == [0, 0, 1, 2]


def test_nowhere_needs_nothing():
    found = simulate(trace([0, -1], [-1, -1], [0, 1]), 4, [Setting(2)], UNIT)
    assert found.needed[0].tolist() == [1, 0, 2] and found.hits[0].tolist() == [0, 0, 1]
    assert found.waited[0].tolist() == [2, 0, 2]


def test_the_clock_by_hand_without_fetching_ahead():
    # Two layers with caches of their own. Token 0 waits 2 + 2 s for one expert each, token 1 for both in layer 0: 4 s.
    experts_LTK = np.array([[[0], [1]], [[0], [0]]])
    found = simulate(experts_LTK, 3, [Setting(1)], UNIT)
    assert found.waited[0].tolist() == [4, 2] and found.loaded[0].tolist() == [2, 1] and found.hits[0].tolist() == [0, 1]


@pytest.mark.parametrize("layer_seconds, predicted, places, expected", [
    # Layer 0 waits until 2 and computes until 5. Expert 1 is on the wire from 2 to 4: there in time.
    (3.0, [1], 1, {"waited": 2, "hits": 1, "late": 0, "loaded": 2, "ahead": 1, "useful": 1}),
    # It computes until 3, and expert 1 is waited for until 4.
    (1.0, [1], 1, {"waited": 3, "hits": 0, "late": 1, "loaded": 2, "ahead": 1, "useful": 1}),
    # Expert 2 blocks the wire until 4, expert 1 comes from 4 to 6: one second more than without fetching ahead.
    (1.0, [2], 1, {"waited": 5, "hits": 0, "late": 0, "loaded": 3, "ahead": 1, "useful": 0}),
    # Expert 2 from 2 to 4; expert 1 would begin at 4, after layer 1 has started: not fetched ahead, but on demand.
    (1.0, [2, 1], 2, {"waited": 5, "hits": 0, "late": 0, "loaded": 3, "ahead": 1, "useful": 0}),
    # With three seconds it begins at 4, before 5, and is there at 6.
    (3.0, [2, 1], 2, {"waited": 3, "hits": 0, "late": 1, "loaded": 3, "ahead": 2, "useful": 1}),
    # There is room for one: only the first prediction counts.
    (3.0, [2, 1], 1, {"waited": 4, "hits": 0, "late": 0, "loaded": 3, "ahead": 1, "useful": 0}),
    (3.0, [-1, 1], 2, {"waited": 2, "hits": 1, "late": 0, "loaded": 2, "ahead": 1, "useful": 1}),
])
def test_the_clock_by_hand_with_fetching_ahead(layer_seconds, predicted, places, expected):
    experts_LTK = np.array([[[0]], [[1]]])
    ahead_LTM = np.array([[[-1] * len(predicted)], [predicted]])
    machine = dataclasses.replace(UNIT, layer_seconds=layer_seconds)
    found = simulate(experts_LTK, 3, [Setting(places, predictor="somebody")], machine, {"somebody": ahead_LTM})
    assert {name: getattr(found, name)[0, 0] for name in expected} == expected


# A second simulation: one cache at a time, sets and dictionaries.


def slow(experts_LTK, num_experts, setting, machine, ahead_LTM=None):
    layers, tokens, _ = experts_LTK.shape
    chosen = [[[int(e) for e in experts_LTK[layer, token] if e >= 0] for token in range(tokens)] for layer in range(layers)]
    arrival, used, times = ([{} for _ in range(layers)] for _ in range(3))
    now = free = 0.0
    sums = {name: [0.0] * tokens for name in ("needed", "hits", "late", "loaded", "ahead", "useful", "waited")}

    def leaves_first(layer, token, expert):
        if setting.policy == "Belady":
            later = [(t, chosen[layer][t].index(expert)) for t in range(token + 1, tokens) if expert in chosen[layer][t]]
            return (-later[0][0], -later[0][1]) if later else (-tokens, -expert)
        last = used[layer].get(expert, (-1, -expert))
        return last if setting.policy == "LRU" else (times[layer].get(expert, 0), last)

    def make_room(layer, token, wanted):
        while len(arrival[layer]) > setting.places:
            others = [expert for expert in arrival[layer] if expert not in wanted]
            del arrival[layer][min(others, key=lambda expert: leaves_first(layer, token, expert))]

    fetched_ahead = set()
    for token in range(tokens):
        for layer in range(layers):
            need, ready = chosen[layer][token], now
            sums["needed"][token] += len(need)
            for expert in need:
                if expert not in arrival[layer]:
                    continue
                sums["hits" if arrival[layer][expert] <= now else "late"][token] += 1
                ready = max(ready, arrival[layer][expert])
            for expert in need:
                if expert not in arrival[layer]:
                    free = max(free, now) + machine.expert_seconds
                    arrival[layer][expert], ready = free, max(ready, free)
                    sums["loaded"][token] += 1
            sums["useful"][token] += len(fetched_ahead & set(need))
            for choice, expert in enumerate(need):
                used[layer][expert] = (token, -choice)
                times[layer][expert] = times[layer].get(expert, 0) + 1
            make_room(layer, token, need)
            sums["waited"][token] += ready - now
            fetched_ahead = set()
            if setting.predictor and layer + 1 < layers:
                predicted = [int(e) for e in ahead_LTM[layer + 1, token][:setting.places] if e >= 0]
                begin = max(free, now)
                for expert in predicted:
                    if expert not in arrival[layer + 1] and begin < ready + machine.layer_seconds:
                        begin += machine.expert_seconds
                        free = arrival[layer + 1][expert] = begin
                        fetched_ahead.add(expert)
                make_room(layer + 1, token - 1, [e for e in predicted if e in arrival[layer + 1]])
                sums["ahead"][token] += len(fetched_ahead)
                sums["loaded"][token] += len(fetched_ahead)
            now = ready + machine.layer_seconds
    return sums


def random_trace(random, layers, tokens, experts, choices, stay=0.5):
    """Sticky and unevenly popular experts, some of them nowhere."""
    popularity_E = random.dirichlet(np.ones(experts))
    experts_LTK = np.stack([[random.choice(experts, choices, replace=False, p=popularity_E) for _ in range(tokens)]
                            for _ in range(layers)])
    for token in range(1, tokens):
        same_L = random.random(layers) < stay
        experts_LTK[same_L, token] = experts_LTK[same_L, token - 1]
    experts_LTK[random.random(experts_LTK.shape) < 0.05] = -1
    return experts_LTK


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_slow_simulation(seed):
    random = np.random.default_rng(seed)
    experts, choices, layers = int(random.integers(4, 9)), int(random.integers(1, 4)), int(random.integers(1, 4))
    experts_LTK = random_trace(random, layers, 60, experts, choices)
    predicted = {"some": random_trace(random, layers, 60, experts, choices), "perfect": experts_LTK,
                 "more": random_trace(random, layers, 60, experts, experts, stay=0)}
    # Seconds of which sums are exact
    machine = Machine(float(random.choice([0.25, 1, 2])), 1.0, float(random.choice([0.5, 1, 4])))
    settings = [Setting(places, policy, predictor) for places in range(choices, experts + 1) for policy in POLICIES
                for predictor in (None, *predicted)]
    found = simulate(experts_LTK, experts, settings, machine, predicted)
    for index, setting in enumerate(settings):
        expected = slow(experts_LTK, experts, setting, machine, predicted.get(setting.predictor))
        for name, values in expected.items():
            np.testing.assert_array_equal(getattr(found, name)[index], values, err_msg=f"{name} of {setting}")


# What must hold.


def best_possible(tokens, places):
    """Most hits of any policy, by trying every eviction."""
    @functools.lru_cache(None)
    def most(index, there):
        if index == len(tokens):
            return 0
        need = frozenset(tokens[index])
        union = there | need
        if len(union) <= places:
            return len(there & need) + most(index + 1, union)
        return len(there & need) + max(most(index + 1, union - {expert}) if len(union) - 1 == places else
                                       max(most(index + 1, union - {expert, other}) for other in union - need - {expert})
                                       for expert in union - need)
    return most(0, frozenset())


@pytest.mark.parametrize("seed", range(12))
def test_belady_is_the_best_there_is(seed):
    random = np.random.default_rng(seed)
    choices = 1 + seed % 2
    tokens = [tuple(random.choice(5, choices, replace=False).tolist()) for _ in range(12)]
    for places in (choices, choices + 1):
        assert sum(hits(trace(*tokens), places, "Belady")) == best_possible(tuple(tokens), places)


@pytest.mark.parametrize("seed", range(8))
def test_nobody_beats_belady_and_waiting_is_what_was_missed(seed):
    random = np.random.default_rng(seed)
    experts, choices = 12, 1 + seed % 3
    experts_LTK = random_trace(random, 3, 300, experts, choices, stay=random.random())
    sizes = range(choices, experts + 1)
    found = simulate(experts_LTK, experts, [Setting(size, policy) for policy in POLICIES for size in sizes], UNIT)
    missed_PS = (found.needed - found.hits).sum(axis=1).reshape(len(POLICIES), -1)
    assert (missed_PS[2] <= missed_PS[:2]).all() and (missed_PS[2] < missed_PS[0]).any()
    assert (np.diff(missed_PS, axis=1) <= 0).all(), "more places may not hit less"
    np.testing.assert_array_equal(found.waited, 2 * (found.needed - found.hits))
    np.testing.assert_array_equal(found.loaded, found.needed - found.hits)
    # with room for all, each expert is fetched once
    assert missed_PS[:, -1].tolist() == [sum(len(set(e[e >= 0])) for e in experts_LTK)] * 3


def test_uniform_routing_hits_n_over_e_and_lfu_learns_who_is_popular():
    random = np.random.default_rng(0)
    uniform = random.integers(0, 16, (1, 8000, 1))
    found = simulate(uniform, 16, [Setting(4, policy) for policy in POLICIES])
    share = found.hits.mean(axis=1)
    np.testing.assert_allclose(share[:2], 4 / 16, atol=0.02)
    assert share[2] > 0.4
    popularity_E = np.arange(16, 0, -1) ** 2 / np.sum(np.arange(17) ** 2)
    found = simulate(random.choice(16, (1, 8000, 1), p=popularity_E), 16, [Setting(4, policy) for policy in POLICIES])
    lru, lfu, belady = found.hits.mean(axis=1)
    # LFU soon holds the four most popular but for one place, which the last expert asked for takes: at least three of them
    assert popularity_E[:3].sum() - 0.02 < lfu < popularity_E[:4].sum() + 0.02
    assert lru < lfu < belady


def test_who_knows_what_comes_waits_for_the_first_layer_only():
    random = np.random.default_rng(0)
    experts_LTK = np.stack([random.permuted(np.tile(np.arange(8), (200, 1)), axis=1)[:, :2] for _ in range(3)])
    quick = Machine(expert_bytes=1.0, bytes_per_second=4.0, layer_seconds=1.0)
    found = simulate(experts_LTK, 8, [Setting(4), Setting(4, predictor="perfect")], quick, {"perfect": experts_LTK})
    alone = simulate(experts_LTK[:1], 8, [Setting(4)], quick)
    np.testing.assert_array_equal(found.waited[1], alone.waited[0])
    assert found.waited[1].sum() < 0.5 * found.waited[0].sum() and found.ahead[1].sum() == found.useful[1].sum()


def test_a_good_prediction_can_cost_time():
    # Experts take longer to fetch than layers to compute: wrong guesses hold up the right experts.
    random = np.random.default_rng(0)
    experts_LTK = random_trace(random, 2, 400, 8, 2, stay=0.7)
    guess = experts_LTK.copy()
    guess[:, ::2] = random.permuted(np.tile(np.arange(8), (400, 1)), axis=1)[::2, :2]
    machine = Machine(expert_bytes=2.0, bytes_per_second=1.0, layer_seconds=1.0)
    found = simulate(experts_LTK, 8, [Setting(4), Setting(4, predictor="half")], machine, {"half": guess})
    rate = ((found.hits + found.late).sum(axis=1) / found.needed.sum(axis=1))
    assert rate[1] > rate[0] and found.waited[1].sum() > found.waited[0].sum()


@pytest.mark.parametrize("setting, message", [
    (Setting(1), "places=1: a layer needs room for the 2 experts"), (Setting(9), "has 8 experts"),
    (Setting(4, predictor="nobody"), "predictor='nobody' has no predictions; there are those of \\['somebody'\\]")])
def test_what_cannot_be_simulated_is_refused(setting, message):
    experts_LTK = np.zeros((2, 3, 2), int) + [0, 1]
    with pytest.raises(ValueError, match=message):
        simulate(experts_LTK, 8, [setting], UNIT, {"somebody": experts_LTK})
    with pytest.raises(ValueError, match="policy='FIFO': must be one of"):
        Setting(3, "FIFO")


def test_nobody_fetches_experts_without_a_network():
    record = records.make(tokens=1024, layers=2, experts=4, choices=2, documents=16)
    of_two = dataclasses.replace(record, num_zero_computation=2)
    tokens_N, experts_LNK, predicted = cache.cached_trace(of_two)
    true_LNK = record.experts_LTK[:, tokens_N]
    np.testing.assert_array_equal(experts_LNK, np.where(true_LNK < 2, true_LNK, -1))
    assert {guess.max() for guess in predicted.values()} <= {-1, 0, 1}
    # There is room for both networks: what is fetched is the first use of each, in each layer.
    rows = cache.expert_cache([of_two]).where(policy="LRU", predictor="none")
    assert rows["places"].tolist() == [2] and rows["hit_rate"][0] > 0.99
    np.testing.assert_allclose(rows["loaded"] * len(tokens_N), 4)
    with pytest.raises(MissingArray, match="nothing to fetch"):
        cache.expert_cache([dataclasses.replace(record, num_zero_computation=4)])


@pytest.mark.parametrize("experts, choices", [(8, 2), (64, 8)])
def test_what_is_above_n_over_e_whatever_the_routing_is_not_compared_with_it(experts, choices):
    table = cache.expert_cache([records.make(tokens=4096, layers=2, experts=experts, choices=choices, documents=32)])
    belady = table.where(policy="Belady", predictor="none")
    np.testing.assert_allclose(belady["hit_rate"], belady["uniform"], atol=0.01)
    # Where there is room for a token's experts alone, nobody has a choice.
    assert (1 - belady["uniform"] < 0.85 * (1 - belady["places"] / experts))[1:].all()
    assert np.isnan(table["uniform"][table["predictor"] != "none"]).all()
    for line in table.headlines:
        assert (line.reference is None) == ("waiting" in line.name or "ahead" in line.name)


def test_the_table_finds_planted_stickiness_and_none_in_uniform_routing():
    uniform = records.make(tokens=4096, layers=2, experts=8, choices=1, documents=32)
    sticky_T = np.random.default_rng(1).random((2, 4096, 1)) < 0.6
    experts_LTK = uniform.experts_LTK.copy()
    for token in range(1, 4096):
        experts_LTK[:, token] = np.where(sticky_T[:, token], experts_LTK[:, token - 1], experts_LTK[:, token])
    sticky = dataclasses.replace(uniform, experts_LTK=experts_LTK)
    rates = {}
    for name, record in (("uniform", uniform), ("sticky", sticky)):
        table = cache.expert_cache([record])
        assert "next-layer router" not in table["predictor"], "the record has no next_experts_LTK"
        rows = table.where(policy="LRU", predictor="none")
        rates[name] = rows["hit_rate"] - rows["uniform"]
        assert (rows["low"] <= rows["hit_rate"]).all() and (rows["hit_rate"] <= rows["high"]).all()
        np.testing.assert_array_equal(rows["hit_rate"], rows["in_time"])  # nothing is on its way if nobody fetches ahead
        np.testing.assert_allclose(rows["waited_ms"], 1e3 * Machine().expert_seconds * rows["loaded"])
        np.testing.assert_allclose(rows["megabytes"], 12.582912 * rows["loaded"])
        np.testing.assert_allclose(rows["total_ms"] - rows["waited_ms"], 0.5)
    np.testing.assert_allclose(rates["uniform"], 0, atol=0.03)
    # 0.6 of the tokens stay; the others hit with chance n/E
    rows_uniform = rows["uniform"]
    np.testing.assert_allclose(rates["sticky"], 0.6 * (1 - rows_uniform), atol=0.04)
