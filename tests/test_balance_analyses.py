"""Balance and collapse from records: by hand, against the references, planted shifts found and none in uniform routing."""

import dataclasses
import math

import numpy as np
import pytest
import records

from moe_jax.analysis import balance
from moe_jax.analysis.balance import (
    MEASURES, balance_by_position, batch_counts, burst_stream, collapse_over_training, distribution_shift, expert_loads,
    max_violation_batch, position_buckets, route_overlap, router_confidence, uniform_counts)
from moe_jax.analysis.bootstrap import bootstrap, document_counts
from moe_jax.analysis.tables import MissingArray
from moe_jax.training.metrics import routing_metrics


def one_choice(experts_LT, num_experts=4, documents=1, **fields):
    """A record of given experts, one per token; documents equally long."""
    experts_LT = np.array(experts_LT)
    layers, tokens = experts_LT.shape
    return records.make(tokens=tokens, layers=layers, experts=num_experts, choices=1, documents=documents,
                        experts_LTK=experts_LT[..., None], **fields)


@pytest.mark.parametrize("counts, expected", [
    # mean 2: (4 - 2) / 2; deviations 2, 0, 0, -2; entropy of halves and quarters; nobody without tokens but one
    ([4, 2, 2, 0], {"MaxVio": 1.0, "load CV": math.sqrt(2) / 2, "load entropy / ln E": 1.5 * math.log(2) / math.log(4),
                    "dead experts": 1}),
    ([3, 3, 3, 3], {"MaxVio": 0, "load CV": 0, "load entropy / ln E": 1, "dead experts": 0}),
    ([8, 0, 0, 0], {"MaxVio": 3, "load CV": math.sqrt(3), "load entropy / ln E": 0, "dead experts": 3}),
    # fair share 1000: 9 is below 1 % of it, 11 is not
    ([1990, 1990, 9, 11], {"MaxVio": 0.99, "dead experts": 1}),
])
def test_measures_by_hand(counts, expected):
    for name, value in expected.items():
        assert MEASURES[name](np.array(counts)) == pytest.approx(value, abs=1e-12), name
        assert MEASURES[name](np.array([[counts, [1, 1, 1, 1]]]))[0, 0] == pytest.approx(value, abs=1e-12), name


def test_the_same_numbers_as_training_logs():
    record = records.make(tokens=2048, layers=2, by="domain", strength=0.3)
    counts_LE = balance.expert_counts(record)
    logged = routing_metrics({"counts_LE": counts_LE, "kept_LE": counts_LE, "valid_tokens": 2048, "layers": [1, 3],
                              **dict.fromkeys(("entropy_L", "confidence_L", "logit_max_L"), [0.0, 0.0])}, 2)
    table = balance.balance([record])
    for measure, name in (("MaxVio global", "max_violation"), ("load CV", "load_cv"), ("dead experts", "dead_experts")):
        assert table.where(measure=measure)["value"].tolist() == [
            pytest.approx(logged[f"moe/layer_{layer}/{name}"]) for layer in (1, 3)]


def test_batch_and_global_maxvio_by_hand():
    # Batches of four: [0 0 1 1] and [2 2 3 3] are off by 1 each, all eight together not at all; the ninth is left over.
    record = one_choice([[0, 0, 1, 1, 2, 2, 3, 3, 0]])
    assert batch_counts(record, 4).tolist() == [[[2, 2, 0, 0], [0, 0, 2, 2]]]
    assert max_violation_batch(record, 4).tolist() == [1.0]
    record = one_choice([[0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 2, 3, 3, 3, 3, 3]])
    assert balance.max_violation(balance.expert_counts(record)).tolist() == [0, 1.5]
    assert max_violation_batch(record, 4).tolist() == [1.0, 1.5]  # layer 1: 0 and 3


@pytest.mark.parametrize("tokens, experts, choices", [(64, 8, 2), (500, 16, 1), (200, 4, 3)])
def test_the_uniform_reference_equals_drawing_experts(tokens, experts, choices):
    random = np.random.default_rng(0)
    sets_RTK = np.argsort(random.random((400, tokens, experts)), axis=-1)[..., :choices]
    drawn_RE = np.stack([np.bincount(sets_TK.ravel(), minlength=experts) for sets_TK in sets_RTK])
    reference_RE = uniform_counts(tokens, experts, choices, draws=4000)
    np.testing.assert_allclose(reference_RE.sum(axis=1), tokens * choices)
    np.testing.assert_allclose(reference_RE.std(axis=0), drawn_RE.std(axis=0).mean(), rtol=0.06)
    for name, measure in MEASURES.items():
        assert measure(reference_RE).mean() == pytest.approx(measure(drawn_RE).mean(), rel=0.05, abs=1e-3), name


@pytest.mark.parametrize("tokens, experts, choices, violation", [(256, 64, 1, 1.34), (256, 64, 2, 0.91), (256, 128, 1, 2.24)])
def test_few_choices_of_an_expert_are_not_taken_as_normal(tokens, experts, choices, violation):
    # By simulation; of normal loads 1.18, 0.82 and 1.73.
    assert MEASURES["MaxVio"](uniform_counts(tokens, experts, choices, 2000)).mean() == pytest.approx(violation, rel=0.03)


def test_a_mean_number_of_choices_is_kept():
    counts_RE = uniform_counts(300, 32, 1.75, 400)
    assert counts_RE.sum(axis=1).mean() == pytest.approx(525, rel=0.005) and (counts_RE.sum(axis=1) <= 600).all()


def test_everybody_chosen_by_all_is_balanced():
    assert uniform_counts(100, 4, 4).tolist() == [[100.0] * 4] * 200
    assert uniform_counts(100, 1, 1).tolist() == [[100.0]] * 200


def test_the_centred_interval_holds_the_uniform_reference():
    # Of uniform routing the plain interval of a spread lies above both the value and the reference.
    random, held = np.random.default_rng(0), {True: [], False: []}
    reference = {name: MEASURES[name](uniform_counts(3000, 16, 2, 2000)).mean() for name in ("MaxVio", "load CV")}
    for trial in range(60):
        experts_TK = np.argsort(random.random((3000, 16)), axis=1)[:, :2]
        sums_DE = document_counts(np.arange(3000) // 50, experts_TK, 16)
        for centred, name in ((centred, name) for centred in held for name in reference):
            found = bootstrap(sums_DE, MEASURES[name], samples=200, seed=trial, centred=centred)
            assert not centred or found.low < found.value < found.high
            held[centred].append(found.low <= reference[name] <= found.high)
    assert np.mean(held[True]) > 0.93 and np.mean(held[False]) < 0.85


def test_uniform_routing_is_at_its_reference_and_skew_is_not():
    uniform, skewed = records.make(tokens=8192, experts=16), records.make(tokens=8192, experts=16)
    chosen_LT = np.random.default_rng(0).random((2, 8192)) < 0.2
    experts_LTK = skewed.experts_LTK.copy()
    experts_LTK[chosen_LT] = [0, 1]
    skewed = dataclasses.replace(skewed, experts_LTK=experts_LTK)
    for name in ("MaxVio global", "load CV", "load entropy / ln E"):
        rows = balance.balance([uniform]).where(measure=name)
        assert (rows["low"] < rows["uniform"]).all() and (rows["uniform"] < rows["high"]).all(), name
        rows = balance.balance([skewed]).where(measure=name)
        assert ((rows["uniform"] < rows["low"]) | (rows["uniform"] > rows["high"])).all(), name
    # 20 % on top of 80 % of a fair share for two experts: 0.8 + 0.2 · 16/2 = 2.4
    rows = balance.balance([skewed]).where(measure="MaxVio global")
    np.testing.assert_allclose(rows["value"], 1.4, atol=0.1)
    headline = balance.balance([skewed]).headlines[0]
    assert headline.value == pytest.approx(rows["value"].mean()) and headline.low < headline.value < headline.high


def test_the_reference_is_of_as_many_choices_as_were_made():
    # Half of the second choices are not made: 1.5 choices a token.
    record = records.make(tokens=8192, experts=16)
    experts_LTK = record.experts_LTK.copy()
    experts_LTK[:, ::2, 1] = -1
    rows = balance.balance([dataclasses.replace(record, experts_LTK=experts_LTK)]).where(measure="load CV")
    variance = np.mean([(1 / 16) * (15 / 16), (2 / 16) * (14 / 16)])
    np.testing.assert_allclose(rows["uniform"], math.sqrt(variance / 8192) / (1.5 / 16), rtol=0.03)


def test_loads_by_hand():
    table = expert_loads([one_choice([[0, 0, 0, 2], [1, 1, 3, 3]])])
    assert table["load"].tolist() == [3, 0, 1, 0, 0, 2, 0, 2] and table["rank"].tolist() == [0, 2, 1, 3, 2, 0, 3, 1]
    assert np.isnan(table["low"]).all(), "one document: the interval is not known"
    several = expert_loads([records.make(tokens=4096)])
    assert ((several["low"] < 1) & (1 < several["high"])).mean() > 0.8


def test_position_buckets_double():
    bucket_T, edges = position_buckets(np.array([0, 7, 8, 15, 16, 31, 32, 40]))
    assert bucket_T.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and edges.tolist() == [0, 8, 16, 32, 64]


def test_imbalance_late_in_the_context_is_found_there():
    record = records.make(tokens=32768, documents=128, row=256, experts=8, choices=1)  # documents of 256
    late_T = record.positions_T >= 128
    experts_LTK = record.experts_LTK.copy()
    experts_LTK[:, late_T & (np.random.default_rng(0).random(32768) < 0.25)] = 3
    table = balance_by_position([dataclasses.replace(record, experts_LTK=experts_LTK)])
    assert table["tokens"].reshape(6, 2, 2)[:, 0, 0].tolist() == [1024, 1024, 2048, 4096, 8192, 16384]
    late = table.where(measure="MaxVio", first_position=128)
    np.testing.assert_allclose(late["value"], 0.75 + 0.25 * 8 - 1, atol=0.1)
    assert (late["low"] > late["uniform"]).all() and late["last_position"].tolist() == [255, 255]
    for first in (0, 8, 16, 32, 64):
        early = table.where(measure="load CV", first_position=first)
        assert (early["value"] < 1.6 * early["uniform"]).all()
    with pytest.raises(MissingArray, match="No range of positions has 256 tokens"):
        balance_by_position([records.make(tokens=128)])


def test_a_burst_arrives_whole_and_nothing_twice():
    record = records.make(tokens=16384, documents=128, domains=4)  # documents of 128, 4096 tokens a domain
    number_T, phases = burst_stream(record.domains_T, record.documents_T, 2, tokens=512)
    assert phases.tolist() == ["before"] * 6 + ["burst"] * 4 + ["after"] * 6
    numbers, tokens_N = np.unique(number_T[number_T > -100], return_counts=True)
    assert numbers.tolist() == list(range(-6, 10)) and (tokens_N == 512).all()
    assert set(record.domains_T[(number_T >= 0) & (number_T < 4)].tolist()) == {2}
    calm_T = ((number_T >= -6) & (number_T < 0)) | (number_T >= 4)
    # what is left of the domain, a seventh of what is left, comes before and after
    share = (record.domains_T[calm_T] == 2).mean()
    assert 0.05 < share < 0.25 and set(record.domains_T[calm_T].tolist()) == {0, 1, 2, 3}
    again, _ = burst_stream(record.domains_T, record.documents_T, 2, tokens=512)
    np.testing.assert_array_equal(number_T, again)
    # half of the domain at most
    _, phases = burst_stream(record.domains_T, record.documents_T, 2, tokens=1024)
    assert (phases == "burst").sum() == 2
    number_T, phases = burst_stream(record.domains_T, record.documents_T, 2, tokens=3000)
    assert not len(phases) and (number_T == np.iinfo(np.int64).min).all()


def test_a_burst_unbalances_a_router_that_knows_domains_and_no_other():
    sharp, uniform = (records.make(tokens=32768, documents=256, domains=4, experts=16, by=by, strength=0.5)
                      for by in ("domain", None))
    for record, jumps in ((sharp, True), (uniform, False)):
        table = distribution_shift([record])
        assert set(table["domain"].tolist()) == set(record.domains)
        for domain, headline in zip(record.domains, table.headlines):
            rows = table.where(domain=domain)
            inside, outside = rows["value"][rows["phase"] == "burst"], rows["value"][rows["phase"] != "burst"]
            assert (rows["share"][rows["phase"] == "burst"] == 1).all() and rows["share"][0] < 0.4
            assert (inside.min() > outside.max() + 0.5) if jumps else (abs(inside.mean() - outside.mean()) < 0.1)
            assert (headline.low > headline.reference) if jumps else (headline.low < headline.reference < headline.high)
    # half of the tokens go to two experts of sixteen: 0.5 + 0.5 · 8 - 1 in the burst
    np.testing.assert_allclose(distribution_shift([sharp]).headlines[0].value, 3.5, atol=0.15)
    with pytest.raises(MissingArray, match="no domains_T"):
        distribution_shift([dataclasses.replace(sharp, domains_T=None, domains=())])


def with_confidence(record, confidence_LT):
    confidence_LT = np.asarray(confidence_LT, np.float32)
    return dataclasses.replace(record, confidence_LT=confidence_LT, entropy_LT=2 * confidence_LT, logit_norm_LT=3 * confidence_LT)


def test_confidence_by_hand_and_its_interval():
    values_T = np.arange(101) / 100
    record = with_confidence(one_choice(np.zeros((1, 101), int)), [values_T])
    table = router_confidence([record])
    for measure, factor, reference in (("confidence", 1, 0.25), ("entropy", 2, math.log(4)), ("logit norm", 3, None)):
        row = {name: column[0] for name, column in table.where(measure=measure).items()}
        for name, value in {"mean": 0.5, "q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}.items():
            assert row[name] == pytest.approx(factor * value, abs=1e-6)
        assert np.isnan(row["reference"]) if reference is None else row["reference"] == pytest.approx(reference)
        assert np.isnan(row["low"]), "one document"
    random = np.random.default_rng(0)
    record = records.make(tokens=4096, layers=2, documents=64)
    of_document_D = random.normal(0.5, 0.05, 64)
    table = router_confidence([with_confidence(record, np.stack([of_document_D[record.documents_T]] * 2))])
    width = (table["high"] - table["low"])[table["measure"] == "confidence"]
    np.testing.assert_allclose(width, 2 * 1.96 * 0.05 / 8, rtol=0.25)  # tokens of a document are one observation
    with pytest.raises(MissingArray, match="no confidence_LT and no entropy_LT"):
        router_confidence([dataclasses.replace(record, logit_norm_LT=np.ones((2, 4096), np.float32))])


def test_overlap_of_two_steps_by_hand():
    now_LTK = np.array([[[0, 1], [2, 3], [1, -1], [-1, -1]]])
    before_LTK = np.array([[[1, 0], [2, 5], [0, 2], [0, 1]]])
    # shares 2/2, 1/2, 0/1; the last token has no experts
    assert route_overlap(now_LTK, before_LTK).tolist() == [pytest.approx(0.5)]


def test_a_planted_collapse_is_seen_over_training():
    random, steps = np.random.default_rng(0), []
    record = with_confidence(records.make(tokens=4096, experts=16), np.full((2, 4096), 0.2))
    for step, collapsed in ((10, 0.0), (20, 0.5), (30, 1.0)):
        experts_LTK = np.where(random.random((2, 4096, 1)) < collapsed, np.array([4, 9]), record.experts_LTK)
        steps.append(dataclasses.replace(record, step=step, experts_LTK=experts_LTK, logit_norm_LT=record.logit_norm_LT * step))
    table = collapse_over_training(steps)
    mean = lambda measure: [table.where(measure=measure, step=step)["value"].mean() for step in (10, 20, 30)]
    # fair share 1: half of the tokens' choices on two experts gives them 0.5 + 0.5 · 8 = 4.5, all 8
    np.testing.assert_allclose(mean("MaxVio"), [0.1, 3.5, 7], atol=0.1)
    assert mean("dead experts") == [0, 0, 14]
    assert mean("load entropy / ln E")[2] == pytest.approx(math.log(2) / math.log(16))
    assert mean("logit norm") == [pytest.approx(value, rel=1e-5) for value in (6, 12, 18)]
    overlap = table.where(measure="overlap")
    assert sorted(set(overlap["step"].tolist())) == [20, 30] and (overlap["uniform"] == 2 / 16).all()
    # half stayed, the others had 4 and 9 by chance K/E; then half of the tokens were there already
    np.testing.assert_allclose(overlap["value"], [0.5 + 0.5 / 8] * 4, atol=0.03)
    with pytest.raises(MissingArray, match="ascending order"):
        collapse_over_training(steps[::-1])
    short = collapse_over_training([dataclasses.replace(each, confidence_LT=None, logit_norm_LT=None) for each in steps])
    assert "confidence" not in short["measure"] and "MaxVio" in short["measure"]
