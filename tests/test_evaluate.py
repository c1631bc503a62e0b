"""Evaluation: sums by hand, cross-entropy alone, and where the tokens went against a count in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moe_jax.nn.moe import RoutingMode
from moe_jax.training.evaluate import Evaluator, drop_fraction, loss_summary, routing_arrays
from moe_jax.training.losses import cross_entropy

CONFIG = tiny.config(model_num_layers=2, moe_every=1)
LENGTHS = [16, 9, 16, 16, 1, 16, 12, 0]
BATCH = tiny.batch(lengths=LENGTHS)  # domains 0 and 1 by turns
BYTES = np.arange(20) % 5  # shorter than the table: ids from 20 on have no bytes
DOMAINS = ["code", "docs", "tests"]  # the third has no tokens
TIGHT = RoutingMode("gather", 0.5, record=True)
DROPLESS = RoutingMode("dropless", 1.0, record=True)


def evaluate(batches=(BATCH,), mode=DROPLESS, config=CONFIG, mesh=tiny.ONE, evaluators={}, bias_LE=None, **options):
    evaluator = evaluators.setdefault((config, mesh), Evaluator(config, tiny.VOCAB, BYTES, DOMAINS, mesh))
    bias_LE = tiny.no_bias(config) if bias_LE is None else bias_LE
    with jax.set_mesh(mesh):
        return evaluator.sums(tiny.placed(tiny.params(config), mesh), bias_LE, batches, mode, **options)


def per_token():
    """(cross-entropy, bytes) of every position, from the model's logits."""
    logits_BSV = jnp.asarray(tiny.logits(CONFIG, tiny.params(CONFIG), BATCH, DROPLESS))
    ce_BS, _ = cross_entropy(logits_BSV, jnp.asarray(BATCH["target_ids"]))
    bytes_BS = np.append(BYTES, np.zeros(12, int))[BATCH["target_ids"]]
    return np.asarray(ce_BS), bytes_BS


def test_sums_by_domain_are_the_sums_of_its_valid_tokens():
    sums, (ce_BS, bytes_BS) = evaluate(), per_token()
    for p in range(3):
        mine = BATCH["valid"] & (BATCH["domain_ids"] == p)
        np.testing.assert_allclose(sums["ce_P"][p], ce_BS[mine].sum(), rtol=1e-5)
        assert sums["tokens_P"][p] == mine.sum()
        assert sums["bytes_P"][p] == bytes_BS[mine].sum()
    assert sums["tokens_P"].tolist() == [45, 41, 0]  # 16 + 16 + 1 + 12 and 9 + 16 + 16 + 0


def test_loss_summary_by_hand():
    sums = {"ce_P": np.array([6.0, 2.0, 0.0]), "tokens_P": np.array([4.0, 2.0, 0.0]), "bytes_P": np.array([8.0, 0.0, 0.0])}
    summary = loss_summary(sums, DOMAINS)
    assert summary["ce"] == pytest.approx(8 / 6) and summary["tokens"] == 6 and summary["bytes"] == 8
    # 8 nats over 8 bytes are 1/ln 2 bits per byte; the code alone 6 nats over 8 bytes.
    assert summary["bits_per_byte"] == pytest.approx(1 / math.log(2))
    assert summary["domains"]["code"] == {"ce": 1.5, "bits_per_byte": pytest.approx(0.75 / math.log(2)), "tokens": 4}
    assert summary["domains"]["docs"] == {"ce": 1.0, "bits_per_byte": None, "tokens": 2}
    assert "tests" not in summary["domains"]


def test_b54_the_evaluated_loss_does_not_know_the_loss_coefficients():
    weighted = tiny.config(model_num_layers=2, moe_every=1, moe_balance_weight=1.0, moe_router_z_weight=1.0,
                           training_output_z_weight=1.0, training_label_smoothing=0.2)
    np.testing.assert_array_equal(evaluate(config=weighted)["ce_P"], evaluate()["ce_P"])


def test_drops_by_position_agree_with_a_count_of_the_recorded_assignments():
    sums = evaluate(mode=TIGHT)
    statistics = tiny.output(CONFIG, tiny.params(CONFIG), BATCH, TIGHT).statistics
    choices_LS, kept_LS = np.zeros((2, 16)), np.zeros((2, 16))
    for layer, row in np.ndindex(2, 8):  # a group is one row, so the token's number is its position
        routing, kept_N = statistics.routing_G, statistics.kept_GN[layer, row]
        for token, expert, kept in zip(routing.token_N[layer, row], routing.expert_N[layer, row], kept_N):
            choices_LS[layer, token] += expert < 4
            kept_LS[layer, token] += kept
    np.testing.assert_array_equal(sums["choices_LS"], choices_LS)
    np.testing.assert_array_equal(sums["kept_LS"], kept_LS)
    assert choices_LS[0].tolist() == [2 * sum(length > s for length in LENGTHS) for s in range(16)]
    assert 0 < kept_LS.sum() < choices_LS.sum()
    assert drop_fraction(sums) == pytest.approx(1 - kept_LS.sum() / choices_LS.sum())


def test_b55_choices_by_domain_and_expert_sum_to_k_times_the_domains_tokens():
    sums = evaluate(mode=TIGHT)
    np.testing.assert_array_equal(sums["domain_counts_LPE"].sum(-1), [[2 * 45, 2 * 41, 0]] * 2)
    np.testing.assert_array_equal(sums["domain_counts_LPE"].sum(1), sums["counts_LE"])


def test_dropless_evaluation_drops_nothing():
    sums = evaluate()
    np.testing.assert_array_equal(sums["kept_LS"], sums["choices_LS"])
    assert drop_fraction(sums) == 0.0


@pytest.mark.parametrize("mode", [DROPLESS, TIGHT], ids=["dropless", "tight"])
def test_a_last_batch_filled_with_padding_rows_adds_nothing(mode):
    whole = tiny.batch(rows=8, seed=5)
    rows = lambda keep: tiny.emptied({**whole, "valid": whole["valid"] & np.isin(np.arange(8), keep)[:, None]})
    expected = evaluate([whole], mode)
    actual = evaluate([rows(range(5)), rows(range(5, 8))], mode)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, err_msg=name)


def test_sums_add_up_over_batches_and_maxima_do_not():
    once, twice = evaluate(), evaluate([BATCH, BATCH])
    for name in once:
        np.testing.assert_allclose(twice[name], once[name] * (1 if name == "logit_max_L" else 2), rtol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [DROPLESS, TIGHT], ids=["dropless", "tight"])
def test_b55_eight_devices_report_what_one_does(mode):
    one, eight = evaluate(mode=mode), evaluate(mode=mode, mesh=tiny.mesh(data=2, expert=4))
    for name in one:
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-4, err_msg=name)


def test_groups_over_the_batch_are_put_back_to_their_positions_and_domains():
    config = tiny.config(model_num_layers=1, moe_every=1, moe_group_over="batch")
    sums = evaluate(mode=TIGHT, config=config)
    assert sums["choices_LS"][0].tolist() == [2 * sum(length > s for length in LENGTHS) for s in range(16)]
    np.testing.assert_array_equal(sums["domain_counts_LPE"].sum(-1), [[2 * 45, 2 * 41, 0]])


def test_a_request_to_stop_ends_the_evaluation_with_nothing():
    asked = iter([False, True])
    assert evaluate([BATCH] * 3, stop=lambda: next(asked)) == {}


def test_evaluation_leaves_its_inputs_alone():
    config = tiny.config(model_num_layers=2, moe_every=1, moe_bias_update_rate=0.1)
    bias_LE = np.array([[0.0, 0.1, 0.2, 0.3]] * 2, np.float32)
    before = bias_LE.copy()
    first = evaluate(config=config, bias_LE=bias_LE)
    second = evaluate(config=config, bias_LE=bias_LE)
    np.testing.assert_array_equal(bias_LE, before)
    np.testing.assert_array_equal(first["counts_LE"], second["counts_LE"])
    assert not np.array_equal(first["counts_LE"], evaluate()["counts_LE"])  # the bias does choose


def test_dense_models_are_evaluated_without_routing():
    config = tiny.config(model_num_layers=1, moe_num_experts=0)
    sums = evaluate(config=config, mode=RoutingMode("dropless", 1.0))
    assert set(sums) == {"ce_P", "tokens_P", "bytes_P"}


def test_routing_arrays_are_rates_and_shares():
    sums = {"domain_counts_LPE": np.array([[[3.0, 1.0], [0.0, 0.0]]]), "entropy_L": np.array([6.0]), "tokens_L": np.array([2.0]),
            "counts_LE": np.array([[3.0, 1.0]])}
    capacity = {"choices_LS": np.array([[4.0, 4.0, 0.0]]), "kept_LS": np.array([[4.0, 1.0, 0.0]])}
    arrays = routing_arrays(sums, capacity, tiny.config(model_num_layers=2), ["a", "b"])
    np.testing.assert_array_equal(arrays["domain_load_PLE"], [[[0.75, 0.25]], [[0.0, 0.0]]])
    np.testing.assert_array_equal(arrays["drop_rate_LS"][0], [0.0, 0.75, np.nan])
    np.testing.assert_array_equal(arrays["choices_at_position_S"], [4, 4, 0])
    np.testing.assert_array_equal(arrays["entropy_L"], [3.0])
    np.testing.assert_array_equal(arrays["counts_LE"], [[3, 1]])
    assert arrays["layers"].tolist() == [1] and arrays["domains"].tolist() == ["a", "b"]
