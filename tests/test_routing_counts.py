"""Counting choices by category, and what uniform routing gives: by hand, and against simulation."""

import dataclasses

import numpy as np
import pytest
import records

from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.routing_counts import (
    chosen_TK, counts_LCE, domain_codes, drop_note, headline, pair_codes, ratios, token_label, top, uniform_largest_share,
    uniform_std, variation)
from moe_jax.analysis.tables import MissingArray

# Three tokens, one layer, 4 experts, 2 choices; the second token chooses once.
TINY = RoutingRecord(step=1, layers=(1,), num_experts=4, token_ids_T=np.array([5, 6, 5]),
                     experts_LTK=np.array([[[0, 1], [0, -1], [3, 0]]]), kept_LTK=np.array([[[True, False], [True, True], [True, True]]]))


def test_choices_are_counted_by_category_and_expert():
    code_T = np.array([1, 0, 1])
    assert counts_LCE(TINY, code_T, 2).tolist() == [[[1, 0, 0, 0], [2, 1, 0, 1]]]
    assert counts_LCE(TINY, code_T, 2, dispatched=True).tolist() == [[[1, 0, 0, 0], [2, 0, 0, 1]]]
    assert counts_LCE(TINY, np.array([-1, 0, -1]), 2).tolist() == [[[1, 0, 0, 0], [0, 0, 0, 0]]]
    assert chosen_TK(TINY, 0, dispatched=True).tolist() == [[0, -1], [0, -1], [3, 0]]
    assert pair_codes(code_T, chosen_TK(TINY, 0), 4).tolist() == [[4, 5], [0, -1], [7, 4]]


def test_ratios_distance_and_the_largest():
    ratio_CE = ratios(np.array([[1, 3], [0, 0]]))
    np.testing.assert_array_equal(ratio_CE, [[0.25, 0.75], [np.nan, np.nan]])
    # A quarter of (1/4, 3/4) would have to move to become (1/2, 1/2).
    assert variation(ratio_CE[:1], np.array([0.5, 0.5])) == 0.25
    assert top(np.array([3, 0, 7, 3]), 3).tolist() == [2, 0, 3] and top(np.array([0, 1]), 5).tolist() == [1]


def test_the_spread_of_uniform_routing_by_hand():
    # Both choices of one token among 4 experts: two ratios of 1/2, two of 0; each 1/4 from the mean.
    one = RoutingRecord(step=1, layers=(1,), num_experts=4, token_ids_T=np.array([0]), experts_LTK=np.array([[[2, 0]]]))
    np.testing.assert_allclose(uniform_std(one, np.array([0]), 1), [[0.25]])
    # All experts chosen: no spread at all.
    every = dataclasses.replace(one, num_experts=2, experts_LTK=np.array([[[1, 0]]]))
    np.testing.assert_allclose(uniform_std(every, np.array([0]), 1), [[0.0]], atol=1e-12)
    assert np.isnan(uniform_std(one, np.array([0]), 2)[0, 1])


@pytest.mark.parametrize("experts, choices", [(8, 2), (16, 1), (4, 3)])
def test_the_spread_of_uniform_routing_by_simulation(experts, choices):
    record = records.make(6400, layers=8, experts=experts, choices=choices, documents=64)
    code_T = np.arange(6400) % 50
    found = ratios(counts_LCE(record, code_T, 50)).std(axis=-1)
    np.testing.assert_allclose(np.sqrt((found**2).mean()), uniform_std(record, code_T, 50).mean(), rtol=0.05)


def test_the_largest_share_of_uniform_routing():
    # One token: its K experts have all of it. Two tokens, E = 2, K = 1: 1 or 1/2, each half of the time.
    np.testing.assert_allclose(uniform_largest_share(np.array([1, 1]), 8, 2), 1.0)
    many = np.mean([uniform_largest_share(np.array([2]), 2, 1, seed)[0] for seed in range(40)])
    np.testing.assert_allclose(many, 0.75, atol=0.03)
    # Beyond the simulation the excess over K/E falls with the root of the number.
    at, beyond = uniform_largest_share(np.array([4096, 4 * 4096]), 8, 2)
    np.testing.assert_allclose(beyond - 0.25, (at - 0.25) / 2)


def test_an_interval_is_of_documents_not_of_tokens():
    # Every document goes to one expert: 64 documents tell little, however many tokens they have.
    same = records.make(4096, layers=1, choices=1, by="document", strength=1.0)
    free = records.make(4096, layers=1, choices=1)
    def width(record):
        codes = [pair_codes(np.zeros(record.num_tokens, int), chosen_TK(record, 0), 8)]
        found = headline("expert 0", 0.125, None, record, codes, 8, lambda counts: ratios(counts)[:, 0])
        return found.high - found.low
    # Binomial: 2 · 1.96 · √(1/8 · 7/8 / n) with n = 64 documents or 4,096 tokens.
    np.testing.assert_allclose(width(same), 0.162, rtol=0.5)
    np.testing.assert_allclose(width(free), 0.0203, rtol=0.35)
    assert headline("x", 1.0, 0.5, dataclasses.replace(free, documents_T=None), [], 8, ratios).low is None


def test_domains_without_tokens_are_left_out():
    record = dataclasses.replace(records.make(4, documents=4, row=4), domains_T=np.array([2, 0, -1, 2]), domains=("a", "b", "c"))
    code_T, names = domain_codes(record)
    assert code_T.tolist() == [1, 0, -1, 1] and names == ("a", "c")
    with pytest.raises(MissingArray, match="no domains"):
        domain_codes(dataclasses.replace(record, domains_T=np.full(4, -1)))


def test_labels_show_what_cannot_be_seen():
    record = dataclasses.replace(TINY, token_texts=("\n\t", " é", "▁the", "", "a" * 30))
    labels = [token_label(record, token) for token in (0, 1, 2, 3, 4, 5)]
    assert labels == ["\\n\\t", "␣é", "␣the", "#3", "a" * 13 + "…", "#5"]


def test_captions_say_when_choices_were_dropped():
    assert drop_note(dataclasses.replace(TINY, kept_LTK=None)) == ""
    assert drop_note(TINY).startswith(" 20 % of the choices found no place")  # one of five
