"""Batches: packing, mixing, purity in (seed, step), evaluation order; and the prefetching thread."""

import collections
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.config import DataConfig
from moe_jax.data.batches import Batches, Prefetcher, open_data, parse_domain_weights
from moe_jax.data.documents import CorpusError
from moe_jax.data.streams import MIXING_BLOCK_ROWS
from moe_jax.data.token_store import TokenizedDocument, open_or_build
from moe_jax.data.vocabularies import ByteVocabulary

INT_KEYS = ("input_ids", "target_ids", "segment_ids", "positions", "domain_ids", "document_ids")


def store_of(folder, train_lengths, validation_lengths=(5,), domains=("a",), key="k"):
    """Documents whose tokens are all different: token = running number over the whole corpus, from 10; the end is 1."""

    def documents():
        number = 10
        for split, lengths in [("train", train_lengths), ("validation", validation_lengths)]:
            for index, length in enumerate(lengths):
                tokens = np.append(np.arange(number, number + length - 1), 1)
                number += length
                yield TokenizedDocument(tokens, domains[index % len(domains)], f"{split}{index}", split, length)

    name = f"{key}{train_lengths}{validation_lengths}{domains}"
    return open_or_build(str(folder), name, documents, ByteVocabulary(extra_ids=100_000), "test")


def config_of(**fields):
    return DataConfig(**{"sequence_length": 8, "batch_size": 2, **fields})


def rebuild_documents(batches):
    """document id -> its target tokens in reading order, from a sequence of batches."""
    documents = collections.defaultdict(list)
    for batch in batches:
        for row in range(len(batch["valid"])):
            for place in np.nonzero(batch["valid"][row])[0]:
                documents[int(batch["document_ids"][row, place])].append(int(batch["target_ids"][row, place]))
    return documents


def test_a_row_by_hand(tmp_path):
    # One training document of 5 tokens: 10 11 12 13 1, repeated each epoch: 8 tokens per row cut across epochs.
    store = store_of(tmp_path, [5])
    batch = Batches(store, config_of(batch_size=1), "train").batch(0)
    assert batch["target_ids"].tolist() == [[10, 11, 12, 13, 1, 10, 11, 12]]
    assert batch["input_ids"].tolist() == [[0, 10, 11, 12, 13, 0, 10, 11]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 2, 2, 2]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch["document_ids"].tolist() == [[0] * 8] and batch["domain_ids"].tolist() == [[0] * 8]
    assert batch["valid"].all()
    # The document goes on in the next row as a new segment.
    batch = Batches(store, config_of(batch_size=1), "train").batch(1)
    assert batch["target_ids"].tolist() == [[13, 1, 10, 11, 12, 13, 1, 10]]
    assert batch["input_ids"].tolist() == [[0, 13, 0, 10, 11, 12, 13, 0]]


def test_dtypes_and_shapes(tmp_path):
    batch = Batches(store_of(tmp_path, [5, 9]), config_of(batch_size=3), "train").batch(7)
    assert sorted(batch) == sorted((*INT_KEYS, "valid"))
    for key, values in batch.items():
        assert values.shape == (3, 8) and values.dtype == (bool if key == "valid" else np.int32)
        assert type(values) is np.ndarray


lengths = st.lists(st.integers(2, 30), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None)
@given(lengths=lengths, seed=st.integers(0, 5), batch_size=st.integers(1, 4), sequence_length=st.integers(2, 17))
def test_every_token_is_a_target_exactly_once_per_epoch(tmp_path_factory, lengths, seed, batch_size, sequence_length):
    store = store_of(tmp_path_factory.getbasetemp() / "shared", lengths)
    config = config_of(seed=seed, batch_size=batch_size, sequence_length=sequence_length)
    batches = Batches(store, config, "train")
    total, tokens = sum(lengths), store.splits["train"].tokens_N
    # Rows are shuffled in blocks of an epoch's whole rows, so whole epochs end where whole blocks do.
    block = max(1, total // sequence_length)
    rows = int(np.lcm(np.lcm(total, sequence_length) // sequence_length, block))
    if rows > 1200:
        return
    seen = np.concatenate([batches.batch(step)["target_ids"] for step in range(-(-rows // batch_size))])[:rows]
    assert sorted(seen.reshape(-1)) == sorted(np.tile(tokens, rows * sequence_length // total))
    if total >= sequence_length:  # and within the first epoch none comes twice
        first, counts = np.unique(seen[:block], return_counts=True)
        expected, available = np.unique(tokens, return_counts=True)
        assert (counts <= available[np.searchsorted(expected, first)]).all() and counts.sum() == block * sequence_length


@settings(max_examples=40, deadline=None)
@given(lengths=lengths, step=st.integers(0, 10**6), sequence_length=st.integers(2, 17))
def test_inputs_positions_and_segments_follow_from_the_documents(tmp_path_factory, lengths, step, sequence_length):
    store = store_of(tmp_path_factory.getbasetemp() / "shared", lengths)
    batch = Batches(store, config_of(sequence_length=sequence_length), "train").batch(step)
    for row in range(2):
        for place in range(sequence_length):
            target, previous = batch["target_ids"][row, place], batch["input_ids"][row, place]
            starts = place == 0 or batch["target_ids"][row, place - 1] == 1
            if starts:
                assert previous == 0 and batch["positions"][row, place] == 0
            else:
                assert previous == batch["target_ids"][row, place - 1]
                assert target == previous + 1 or target == 1, "a document's tokens stay in order"
                assert batch["positions"][row, place] == batch["positions"][row, place - 1] + 1
            segment = batch["segment_ids"][row, place]
            assert segment == (1 if place == 0 else batch["segment_ids"][row, place - 1] + starts)


def test_epochs_and_seeds_have_different_orders(tmp_path):
    store = store_of(tmp_path, [8] * 32)
    config = config_of(batch_size=32)
    first = Batches(store, config, "train").batch(0)["target_ids"]
    second_epoch = Batches(store, config, "train").batch(1)["target_ids"]
    other_seed = Batches(store, config_of(batch_size=32, seed=1), "train").batch(0)["target_ids"]
    for other in (second_epoch, other_seed):
        assert not (first == other).all() and sorted(first.reshape(-1)) == sorted(other.reshape(-1))


WEIGHTS = ["", "a=2,b=1"]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_batch_is_a_pure_function_of_seed_and_step(tmp_path, weights):
    store = store_of(tmp_path, [3, 20, 7, 11, 50], domains=("a", "b"))
    config = config_of(batch_size=6, domain_weights=weights, seed=5)
    forwards = Batches(store, config, "train")
    expected = {step: forwards.batch(step) for step in range(30)}
    fresh = Batches(store, config, "train")
    for step in (29, 3, 17, 0, 29):
        for key, values in fresh.batch(step).items():
            np.testing.assert_array_equal(values, expected[step][key])


def test_batches_are_the_same_in_another_process(tmp_path):
    program = (
        "import zlib, sys; from moe_jax.data.batches import open_data; from moe_jax.config import DataConfig\n"
        f"config = DataConfig(source='synthetic', max_bytes=300_000, cache_dir={str(tmp_path)!r}, seed=3, "
        "domain_weights='arithmetic=1,dialogue=2')\n"
        "batch = open_data(config, '').train.batch(1234)\n"
        "print(zlib.crc32(b''.join(batch[key].tobytes() for key in sorted(batch))))"
    )
    answers = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(answers) == 1


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("hosts", [1, 2, 3, 6])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_shares_of_any_number_of_hosts_make_up_the_whole(tmp_path, weights, hosts, split):
    store = store_of(tmp_path, [3, 20, 7, 11, 50], [9, 40, 30], domains=("a", "b"))
    batches = Batches(store, config_of(batch_size=6, domain_weights=weights), split)
    share = 6 // hosts
    for step in range(1 if split == "validation" else 20):
        whole = batches.batch(step)
        parts = [batches.batch(step, slice(host * share, (host + 1) * share)) for host in range(hosts)]
        for key, values in whole.items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), values)


def test_the_mixture_is_exact_in_every_block_of_rows(tmp_path):
    store = store_of(tmp_path, [5, 9, 4, 7, 6, 3], domains=("a", "b", "c"))
    config = config_of(batch_size=64, domain_weights="a=1,b=3")
    batches = Batches(store, config, "train")
    for block in (0, 3):
        steps = range(block * MIXING_BLOCK_ROWS // 64, (block + 1) * MIXING_BLOCK_ROWS // 64)
        domains = np.concatenate([batches.batch(step)["domain_ids"] for step in steps])
        assert (domains == domains[:, :1]).all(), "with weights, a row has one domain"
        assert np.bincount(domains[:, 0], minlength=3).tolist() == [256, 768, 0]
    # In a seeded order, not in runs.
    assert 1 < (np.diff(domains[:, 0]) != 0).sum()


def test_a_weighted_domain_is_read_once_per_epoch_of_its_own(tmp_path):
    # Domain a has 40 tokens = 5 rows; its rows, wherever they come in the mixture, run through it in order.
    store = store_of(tmp_path, [13, 8, 20, 8, 7, 8], domains=("a", "b"))
    batches = Batches(store, config_of(batch_size=16, domain_weights="a=1,b=1"), "train")
    rows = np.concatenate([batches.batch(step)["target_ids"] for step in range(200)])
    domain = np.concatenate([batches.batch(step)["domain_ids"][:, 0] for step in range(200)])
    epochs = rows[domain == 0][: 5 * 100].reshape(-1, 40)
    train = store.splits["train"]
    own = [train.tokens_N[train.offsets_D[i] : train.offsets_D[i + 1]] for i in range(6) if train.domain_D[i] == 0]
    for epoch in epochs:
        assert sorted(epoch) == sorted(np.concatenate(own))


def test_small_weights_are_not_rounded_away():
    from moe_jax.data.streams import Mixture

    quota = Mixture(np.array([1e-9, 0.0, 1 - 1e-9]), 0).quota
    assert quota.tolist() == [1, 0, MIXING_BLOCK_ROWS - 1]
    quota = Mixture(np.full(3, 1 / 3), 0).quota
    assert quota.sum() == MIXING_BLOCK_ROWS and quota.max() - quota.min() == 1


@pytest.mark.parametrize(
    "text, expected",
    [
        ("code=1,prose=2", r"no domain 'prose'.*\['code', 'docs'\]"),
        ("code", "domain=weight"),
        ("code=much", "domain=weight"),
        ("code=-1", "domain=weight"),
        ("code=nan", "domain=weight"),
        ("code=0", "above 0"),
    ],
)
def test_bad_domain_weights_are_explained(text, expected):
    with pytest.raises(CorpusError, match=expected):
        parse_domain_weights(text, ["code", "docs"])


def test_domain_weights_are_normalised():
    assert parse_domain_weights(" docs = 3 , code=1", ["code", "docs", "tests"]).tolist() == [0.25, 0.75, 0]
    assert parse_domain_weights("", ["code"]) is None


def test_a_weighted_domain_without_training_documents_is_an_error(tmp_path):
    store = store_of(tmp_path, [5], [5, 6], domains=("a", "b"))
    with pytest.raises(CorpusError, match="'b' has a weight but no training documents"):
        Batches(store, config_of(domain_weights="a=1,b=1"), "train")


# --- Evaluation ---


@settings(max_examples=30, deadline=None)
@given(lengths=lengths, batch_size=st.integers(1, 4), sequence_length=st.integers(2, 17))
def test_evaluation_reads_each_token_once_and_pads_the_rest(tmp_path_factory, lengths, batch_size, sequence_length):
    store = store_of(tmp_path_factory.getbasetemp() / "shared", [5], lengths)
    config = config_of(batch_size=batch_size, sequence_length=sequence_length, domain_weights="a=1")
    batches = Batches(store, config, "validation")
    all_batches = list(batches.evaluation_batches())
    assert len(all_batches) == batches.num_batches
    seen = rebuild_documents(all_batches)
    split = store.splits["validation"]
    for index, number in enumerate(split.document_D):
        # Rows are shuffled, so a document's pieces come in any order.
        expected = split.tokens_N[split.offsets_D[index] : split.offsets_D[index + 1]].tolist()
        assert sorted(seen[int(number)]) == sorted(expected)
    for batch in all_batches:
        assert batch["valid"].shape == (batch_size, sequence_length)
        for key in ("domain_ids", "document_ids"):
            assert (batch[key][~batch["valid"]] == -1).all()
        for key in ("input_ids", "target_ids", "segment_ids", "positions"):
            assert (batch[key][~batch["valid"]] == 0).all()
        assert (batch["segment_ids"][batch["valid"]] > 0).all()
    assert sum(batch["valid"].sum() for batch in all_batches) == sum(lengths)


def test_evaluation_is_the_same_for_every_seed_and_can_be_cut_short(tmp_path):
    store = store_of(tmp_path, [5], [9, 13, 30, 8, 21])
    first = list(Batches(store, config_of(), "validation").evaluation_batches())
    other = list(Batches(store, config_of(seed=9), "validation").evaluation_batches())
    short = list(Batches(store, config_of(), "validation").evaluation_batches(2))
    assert len(short) == 2 < len(first)
    for left, right in [*zip(first, other, strict=True), *zip(first[:2], short, strict=True)]:
        for key in left:
            np.testing.assert_array_equal(left[key], right[key])
    with pytest.raises(IndexError, match="there is no batch"):
        Batches(store, config_of(), "validation").batch(len(first))


def test_steps_and_rows_that_make_no_sense_are_refused(tmp_path):
    batches = Batches(store_of(tmp_path, [5]), config_of(), "train")
    with pytest.raises(IndexError):
        batches.batch(-1)
    with pytest.raises(IndexError):
        batches.batch(0, slice(0, 2, 2))


# --- The entry point ---


def test_open_data_gives_both_splits_and_needs_no_tensorflow_or_jax(tmp_path):
    program = (
        "import sys; from moe_jax.data.batches import open_data; from moe_jax.config import DataConfig\n"
        f"config = DataConfig(source='synthetic', max_bytes=100_000, cache_dir={str(tmp_path)!r})\n"
        "data = open_data(config, '')\n"
        "data.train.batch(0), next(data.validation.evaluation_batches())\n"
        "print(sorted({'tensorflow', 'seqio', 'tensorflow_datasets'} & set(sys.modules)), data.domains)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ['arithmetic', 'dialogue', 'language_0'")


def test_a_document_longer_than_the_context_goes_on_and_is_counted(tmp_path, caplog):
    (tmp_path / "long.txt").write_text("abcdefghij" * 20)
    (tmp_path / "short.txt").write_text("xyz")
    (tmp_path / "other.txt").write_text("uvw")
    caplog.set_level("INFO")
    config = config_of(source=f"files:{tmp_path}/*.txt", cache_dir=str(tmp_path / "cache"), validation_fraction=0.001)
    data = open_data(config, str(tmp_path))
    train = data.store.splits["train"]
    # 205 tokens in rows of 8: the first 25 rows hold the first 200 tokens of the epoch, in pieces.
    rows = np.concatenate([data.train.batch(step)["target_ids"] for step in range(data.train.num_batches)])[:25]
    pieces = [data.vocabulary.decode(row) for row in rows]
    if any(name.endswith("long.txt") for name in train.names()):
        whole = "abcdefghij" * 20
        assert sum(piece in whole for piece in pieces) >= 24 and sum(map(len, pieces)) >= 196
        assert "1 of 2 documents are longer than 8 tokens" in caplog.text
    else:
        pytest.fail("the split put the long document into validation; choose another name for it")


def test_the_fingerprint_follows_order_and_content(tmp_path):
    def fingerprint(**fields):
        fields = {"source": "synthetic", "max_bytes": 200_000, "cache_dir": str(tmp_path), **fields}
        return open_data(DataConfig(**fields), "").fingerprint

    variants = [{}, {"seed": 1}, {"sequence_length": 128}, {"domain_weights": "dialogue=1"}, {"max_bytes": 400_000}]
    assert len({fingerprint(**variant) for variant in variants}) == len(variants)
    assert fingerprint() == fingerprint()


# --- Prefetching ---


def test_prefetching_gives_the_batches_in_order_with_the_time_waited():
    with Prefetcher(lambda step: step * 10, start_step=5, transform=lambda batch: batch + 1) as prefetcher:
        for expected in (5, 6, 7):
            step, batch, waited = prefetcher.next()
            assert (step, batch) == (expected, expected * 10 + 1) and waited >= 0


def test_a_slow_source_shows_in_the_time_waited():
    with Prefetcher(lambda step: time.sleep(0.05)) as prefetcher:
        assert prefetcher.next()[2] > 0.03


def test_an_exception_in_the_thread_reaches_the_caller_after_the_good_batches():
    def batch(step):
        if step == 2:
            raise CorpusError("step 2 is bad")
        return step

    with Prefetcher(batch) as prefetcher:
        assert [prefetcher.next()[0] for _ in range(2)] == [0, 1]
        for _ in range(2):  # and again, instead of waiting for ever
            with pytest.raises(CorpusError, match="step 2 is bad"):
                prefetcher.next()


def test_closing_always_ends_the_thread():
    before = threading.active_count()
    prefetchers = [Prefetcher(lambda step: step, depth=1) for _ in range(5)]
    time.sleep(0.05)  # their queues are full now
    for prefetcher in prefetchers:
        prefetcher.close()
        prefetcher.close()
        with pytest.raises(RuntimeError, match="closed"):
            prefetcher.next()
    assert threading.active_count() == before


def test_it_computes_at_most_depth_batches_ahead():
    computed = []
    with Prefetcher(lambda step: computed.append(step), depth=2) as prefetcher:
        prefetcher.next()
        time.sleep(0.2)
        assert len(computed) <= 4  # one taken, two waiting, one in hand


def test_a_batch_is_no_piece_of_one_long_document(tmp_path):
    # 40 documents of 400 tokens are 50 rows of 8 each: laid end to end, 16 rows would come from one or two documents.
    batches = Batches(store_of(tmp_path, [400] * 40), config_of(batch_size=16), "train")
    assert min(len(np.unique(batches.batch(step)["document_ids"])) for step in range(20)) >= 8


def test_a_domain_weighted_twice_is_refused():
    with pytest.raises(CorpusError, match="'a' stands in it twice"):
        parse_domain_weights("a=1,b=1,a=3", ["a", "b"])
