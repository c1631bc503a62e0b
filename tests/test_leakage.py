"""What routing gives away of the next token: nothing where it is causal, and by a slow computation where it is not."""

import types

import jax
import numpy as np
import pytest

import tiny
from moe_jax.analysis.leakage import future_leakage
from moe_jax.nn.moe import RoutingMode
from moe_jax.training.losses import cross_entropy

SMALL = dict(model_num_layers=2)  # compiles in seconds
EXPERT_CHOICE = dict(moe_router="expert_choice", moe_balance_weight=0.0)
DROPLESS = RoutingMode.dropless()


def leakage(config, mode, batches, cuts):
    run = types.SimpleNamespace(config=config, vocab_size=tiny.VOCAB, mesh=tiny.ONE)
    with jax.set_mesh(tiny.ONE):
        return future_leakage(run, tiny.placed(tiny.params(config), tiny.ONE), tiny.no_bias(config), batches, mode, cuts)


@pytest.mark.parametrize("options, mode", [
    ({}, DROPLESS),
    (dict(moe_capacity_factor=0.5), RoutingMode("gather", 0.5)),
    (dict(**EXPERT_CHOICE, moe_group_over="batch"), DROPLESS),
], ids=["token choice", "token choice, tight buffers", "expert choice over the batch"])
def test_a_causal_router_gives_nothing_away(options, mode):
    assert abs(leakage(tiny.config(**SMALL, **options), mode, [tiny.batch(segments=2)], 6)) < 1e-6


@pytest.mark.parametrize("group_size", [0, 32])
def test_expert_choice_by_a_slow_computation(group_size):
    """All cuts of a batch in which rows end early and hold two documents, token by token: each row alone gets the other future."""
    config = tiny.config(**SMALL, **EXPERT_CHOICE, moe_group_size=group_size, moe_allow_noncausal_routing=True)
    params, batch = tiny.params(config), tiny.batch(segments=2, lengths=[16, 16, 16, 9, 16, 16, 16, 3])
    loss = lambda batch: np.asarray(cross_entropy(tiny.logits(config, params, batch, DROPLESS), batch["target_ids"])[0])
    own_BS, differences = loss(batch), []
    rows_of_a_group = max(1, group_size // 16)
    for cut in range(1, 16):
        swapped = {name: values.copy() for name, values in batch.items()}
        for name, values in swapped.items():
            for row in range(8):
                values[row, cut:] = batch[name][(row - rows_of_a_group) % 8, cut:]
        other_BS = loss(swapped)
        for row in range(8):
            if batch["valid"][row, cut] and batch["segment_ids"][row, cut] == batch["segment_ids"][row, cut - 1]:
                differences.append(other_BS[row, cut - 1] - own_BS[row, cut - 1])
    assert len(differences) == 6 * 14 + 7 + 2  # a row of two documents of 8 has 14 places, one of 9 tokens 7, one of 3 two
    assert abs(np.mean(differences)) > 1e-4
    np.testing.assert_allclose(leakage(config, DROPLESS, [batch], 15), np.mean(differences), rtol=1e-4, atol=1e-7)


def test_where_nothing_can_be_exchanged_or_seen_it_says_so():
    whole = tiny.config(**SMALL, **EXPERT_CHOICE, moe_group_size=128, moe_allow_noncausal_routing=True)
    with pytest.raises(ValueError, match="a group takes 8 sequences, all of data.batch_size=8"):
        leakage(whole, DROPLESS, [tiny.batch()], 2)
    with pytest.raises(ValueError, match="nothing that could leak"):
        leakage(tiny.config(**SMALL), DROPLESS, [tiny.batch(lengths=[1] * 8)], 2)
