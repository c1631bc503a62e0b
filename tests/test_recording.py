"""Recorded routing: against the assignments of the layers themselves and routers written out in NumPy; and its file."""

import dataclasses
import json
import types
import zipfile

import jax
import numpy as np
import pytest
import records
import tiny

from moe_jax.analysis import recording
from moe_jax.analysis.recording import RecordError, RoutingRecord, read_record, record_routing, write_record
from moe_jax.data.vocabularies import ByteVocabulary
from moe_jax.nn.moe import RoutingMode

TWO = dict(model_num_layers=2, moe_every=1)
CONFIG = tiny.config(**TWO)  # two mixtures: a scanned block of one layer
LENGTHS = [16, 9, 16, 16, 1, 16, 12, 0]
BATCHES = [tiny.batch(lengths=LENGTHS, segments=2), tiny.batch(seed=1)]
DROPLESS, TIGHT = RoutingMode("dropless", 1.0), RoutingMode("gather", 0.5)
PRIORITISED = dict(moe_fill_order="batch_prioritized", moe_allow_noncausal_routing=True)


@pytest.fixture(autouse=True)
def compiles_quickly(monkeypatch):
    monkeypatch.setattr(recording, "compiler_options", lambda: tiny.QUICK)



def record(config=CONFIG, mode=DROPLESS, batches=BATCHES, mesh=tiny.ONE) -> RoutingRecord:
    data = types.SimpleNamespace(domains=["code", "docs"], vocabulary=ByteVocabulary())
    run = types.SimpleNamespace(config=config, vocab_size=tiny.VOCAB, mesh=mesh, data=data)
    with jax.set_mesh(mesh):
        return record_routing(run, tiny.placed(tiny.params(config), mesh), tiny.no_bias(config), 7, batches, mode)


def seen(config=CONFIG, mode=DROPLESS, batch=BATCHES[0]):
    """The model's output, with its assignments and what its routers saw."""
    return tiny.output(config, tiny.params(config), batch, dataclasses.replace(mode, record=True, inspect=True))


def listed(statistics, layer, group, token, num_experts):
    """[(expert, gate, kept)] of one token of one group, read off the list."""
    routing = statistics.routing_G
    here = np.flatnonzero(routing.token_N[layer, group] == token)
    entries = [(int(routing.expert_N[layer, group, n]), float(routing.gate_N[layer, group, n]),
                bool(statistics.kept_GN[layer, group, n])) for n in here]
    return [entry for entry in entries if entry[0] < num_experts]


def recorded(found, layer, token):
    return [(int(e), float(g), bool(k)) for e, g, k in zip(found.experts_LTK[layer, token], found.gates_LTK[layer, token],
                                                         found.kept_LTK[layer, token]) if e >= 0]


def assert_same(actual, expected):
    """Lists of (expert, gate, kept), in order; gates may differ by the rounding of another compilation."""
    assert [(expert, kept) for expert, _, kept in actual] == [(expert, kept) for expert, _, kept in expected]
    np.testing.assert_allclose([gate for _, gate, _ in actual], [gate for _, gate, _ in expected], rtol=1e-5)


@pytest.mark.parametrize("mode, settings", [(DROPLESS, {}), (TIGHT, {}), (TIGHT, PRIORITISED)],
                         ids=["dropless", "tight", "prioritised"])
def test_choices_gates_and_drops_are_those_of_the_layers_lists(mode, settings):
    config = tiny.config(**TWO, **settings)
    found, statistics = record(config, mode, BATCHES[:1]), seen(config, mode).statistics
    for token, (row, place) in enumerate(zip(found.rows_T, found.row_positions_T)):
        for layer in range(2):  # a group is one row
            assert_same(recorded(found, layer, token), listed(statistics, layer, row, place, 4))
    assert found.kept_LTK.all() == (mode is DROPLESS)
    assert (found.dispatch, found.capacity_factor) == (("dropless", None) if mode is DROPLESS else ("gather", 0.5))


def test_tokens_come_in_reading_order_without_padding():
    found = record()
    valid = [batch["valid"] for batch in BATCHES]
    assert found.num_tokens == sum(LENGTHS) + 8 * 16 and found.step == 7 and found.layers == (0, 1)
    for name, key in (("token_ids_T", "input_ids"), ("target_ids_T", "target_ids"), ("positions_T", "positions"),
                      ("domains_T", "domain_ids"), ("documents_T", "document_ids")):
        expected = np.concatenate([batch[key][mask] for batch, mask in zip(BATCHES, valid)])
        np.testing.assert_array_equal(getattr(found, name), expected, err_msg=name)
    rows, places = zip(*[(row + 8 * number, place) for number, mask in enumerate(valid) for row, place in np.argwhere(mask)])
    assert found.rows_T.tolist() == list(rows) and found.row_positions_T.tolist() == list(places)
    assert found.domains == ("code", "docs") and found.token_texts[3 + ord("a")] == "a"


def test_predicted_ids_are_the_models_likeliest():
    logits_BSV, found = seen().logits_BSV, record(batches=BATCHES[:1])
    assert found.predicted_ids_T.tolist() == logits_BSV.argmax(-1)[BATCHES[0]["valid"]].tolist()


def router_logits(config, inputs_LTD):
    """[l][m]: the logits that MoE layer m's router gives the inputs of layer l's, in float64."""
    weights = [value for name, value in tiny.leaves(tiny.params(config)).items() if name.endswith("w_router_DE")]
    weights = [weight for stack in weights for weight in (stack if stack.ndim == 3 else [stack])]
    return [[x.astype(np.float64) @ weight for weight in weights] for x in inputs_LTD]


@pytest.mark.parametrize("settings", [TWO, dict(model_num_layers=3, moe_every=1, moe_first_dense_layers=1)],
                         ids=["scanned", "dense first"])
def test_the_router_and_the_next_layers_router_by_hand(settings):
    config = tiny.config(**settings)
    found, output = record(config, batches=BATCHES[:1]), seen(config)
    logits = router_logits(config, [x[BATCHES[0]["valid"]] for x in output.statistics.view.input_BSD])
    last = len(config.moe_layers) - 1
    for layer in range(last + 1):
        own = logits[layer][layer]
        shares = np.exp(own) / np.exp(own).sum(-1, keepdims=True)
        np.testing.assert_array_equal(found.experts_LTK[layer], np.argsort(-own, axis=-1)[:, :2])
        np.testing.assert_allclose(found.entropy_LT[layer], -(shares * np.log(shares)).sum(-1), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found.confidence_LT[layer], shares.max(-1), rtol=1e-4)
        np.testing.assert_allclose(found.logit_norm_LT[layer], np.linalg.norm(own, axis=-1), rtol=1e-4)
        if layer < last:
            ahead = np.argsort(-logits[layer][layer + 1], axis=-1)[:, :2]
            np.testing.assert_array_equal(found.next_experts_LTK[layer], ahead)
            assert (ahead != found.experts_LTK[layer + 1]).any()
    assert (found.next_experts_LTK[last] == -1).all()


def test_a_token_that_any_number_of_experts_chose():
    config = tiny.config(**TWO, moe_router="expert_choice", moe_balance_weight=0.0, moe_allow_noncausal_routing=True)
    found, statistics = record(config, batches=BATCHES[:1]), seen(config).statistics
    most = 0
    for token, (row, place) in enumerate(zip(found.rows_T, found.row_positions_T)):
        for layer in range(2):
            expected = sorted(listed(statistics, layer, row, place, 4), key=lambda entry: -entry[1])
            assert_same(recorded(found, layer, token), expected)
            most = max(most, len(expected))
    assert found.experts_per_token == most > 2
    assert (found.gates_LTK[found.experts_LTK < 0] == 0).all() and not found.kept_LTK[found.experts_LTK < 0].any()
    # Every expert takes 2 · 16 / 4 = 8 tokens of each full row.
    assert np.bincount(found.experts_LTK[0, found.rows_T == 0].ravel() + 1)[1:].tolist() == [8] * 4


def test_a_hash_needs_no_hidden_state_and_has_no_scores():
    config = tiny.config(**TWO, moe_router="hash", moe_balance_weight=0.0, moe_router_z_weight=0.0)
    found = record(config, batches=BATCHES[:1])
    assert found.entropy_LT is None and found.confidence_LT is None and found.logit_norm_LT is None
    np.testing.assert_array_equal(found.next_experts_LTK[0], found.experts_LTK[1])


def test_inspecting_changes_neither_logits_nor_statistics():
    plain = tiny.output(CONFIG, tiny.params(CONFIG), BATCHES[0], dataclasses.replace(DROPLESS, record=True))
    inspected = seen()
    assert plain.statistics.view is None
    np.testing.assert_array_equal(inspected.logits_BSV, plain.logits_BSV)
    tiny.assert_close(inspected.statistics.router.__dict__, plain.statistics.router.__dict__)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [dict(data=2, expert=4), dict(data=2, tensor=2)], ids=["experts", "tensor"])
def test_several_devices_record_what_one_does(shape):
    one, several = record(), record(mesh=tiny.mesh(**shape))
    for name in ("experts_LTK", "kept_LTK", "next_experts_LTK", "predicted_ids_T", "rows_T"):
        np.testing.assert_array_equal(getattr(several, name), getattr(one, name), err_msg=name)


def test_a_dense_model_and_no_tokens_are_refused():
    with pytest.raises(RecordError, match="dense: it has no router"):
        record(tiny.config(moe_num_experts=0))
    with pytest.raises(RecordError, match="no token"):
        record(batches=[tiny.batch(lengths=[0] * 8)])


# The file.


WHOLE = records.make(tokens=256, documents=8, turns=2, entropy_LT=np.ones((2, 256)), token_texts=("a\0", "\ud800", "é"),
                     capacity_factor=1.25, dispatch="gather", config_hash="c", data="d", identity="i")


def same(a, b):
    for field in dataclasses.fields(RoutingRecord):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y, err_msg=field.name)
        else:
            assert x == y, field.name


def test_what_is_read_is_what_was_written(tmp_path):
    halves = dataclasses.replace(WHOLE, gates_LTK=WHOLE.gates_LTK.astype(np.float16).astype(np.float32))
    write_record(tmp_path / "folder" / "record.npz", halves)
    same(read_record(tmp_path / "folder" / "record.npz"), halves)
    bare = RoutingRecord(step=0, layers=(0,), num_experts=300, token_ids_T=[5, 70_000], experts_LTK=[[[299], [-1]]])
    write_record(tmp_path / "bare.npz", bare)
    same(read_record(tmp_path / "bare.npz"), bare)


def test_the_file_holds_each_array_in_the_smallest_type(tmp_path):
    write_record(tmp_path / "record.npz", WHOLE)
    with np.load(tmp_path / "record.npz") as file:
        kinds = {name: file[name].dtype.name for name in file.files}
        assert file["kept_LTK"].size == WHOLE.kept_LTK.size // 8
    assert kinds["token_ids_T"] == kinds["experts_LTK"] == kinds["kept_LTK"] == "uint8"
    assert kinds["gates_LTK"] == kinds["entropy_LT"] == "float16"


@pytest.mark.parametrize("change, message", [
    (dict(experts_LTK=np.full((2, 256, 2), 8)), "experts_LTK holds 8 to 8; allowed are -1 .none. to 7"),
    (dict(gates_LTK=np.ones((2, 255, 2))), r"gates_LTK has shape \(2, 255, 2\)"),
    (dict(kept_LTK=np.ones((2, 256, 2), int)), "kept_LTK holds int64, not bool"),
    (dict(token_ids_T=np.ones(256)), "token_ids_T holds float64, not integers"),
    (dict(domains_T=np.full(256, 2)), "domains_T holds 2 to 2; allowed are -1 .none. to 1"),
    (dict(layers=(1,)), "layers names 1 layers, but experts_LTK has 2"),
    (dict(num_experts=0), "num_experts=0: must be"),
    (dict(num_zero_computation=9), "num_zero_computation=9: must be from 0 to num_experts=8"),
    (dict(gates_LTK=np.full((2, 256, 2), np.nan)), "gates_LTK is not finite"),
    (dict(experts_LTK=np.zeros((2, 256), int)), r"experts_LTK has shape \(2, 256\); wanted"),
    (dict(token_ids_T=np.full(256, 2**40)), "int32 cannot"),
])
def test_what_contradicts_itself_is_refused_by_name(change, message):
    with pytest.raises(RecordError, match=message):
        dataclasses.replace(WHOLE, **change)


def rewritten(path, change):
    """The file with its arrays changed by `change` (a dict of arrays in, by name)."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    change(arrays)
    np.savez(path, **arrays)


def single(arrays, **values):
    found = json.loads(arrays["record.json"].tobytes())
    arrays["record.json"] = np.frombuffer(json.dumps({**found, **values}).encode(), np.uint8)


@pytest.mark.parametrize("change, message", [
    (lambda a: a.pop("experts_LTK"), "experts_LTK is missing"),
    (lambda a: a.pop("record.json"), "holds no record.json"),
    (lambda a: a.update(kept_LTK=a["kept_LTK"][:5]), "kept_LTK has .5,. bytes"),
    (lambda a: a.update(gates_LTK=a["gates_LTK"][:1]), "gates_LTK has shape"),
    (lambda a: single(a, format=99), "not of format 1"),
    (lambda a: single(a, color="red"), "record.json holds"),
    (lambda a: single(a, layers=3), "cannot be read as a record"),
])
def test_a_changed_file_is_refused_by_name(tmp_path, change, message):
    path = tmp_path / "record.npz"
    write_record(path, WHOLE)
    rewritten(path, change)
    with pytest.raises(RecordError, match=message) as caught:
        read_record(path)
    assert str(path) in str(caught.value) and "Record it again" in str(caught.value)


def test_a_file_from_before_experts_without_a_network_is_read(tmp_path):
    path = tmp_path / "record.npz"
    write_record(path, WHOLE)

    def older(arrays):
        found = json.loads(arrays["record.json"].tobytes())
        assert found.pop("num_zero_computation") == 0
        arrays["record.json"] = np.frombuffer(json.dumps(found).encode(), np.uint8)

    rewritten(path, older)
    assert read_record(path).num_zero_computation == 0


def test_a_single_array_is_no_record(tmp_path):
    np.save(tmp_path / "record.npy", WHOLE.experts_LTK)
    with pytest.raises(RecordError, match="record.npy: it holds a single array"):
        read_record(tmp_path / "record.npy")


def test_damaged_bytes_are_noticed(tmp_path):
    path = tmp_path / "record.npz"
    write_record(path, WHOLE)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("gates_LTK.npy")
    where = entry.header_offset + 200
    path.write_bytes(whole[:where] + bytes([whole[where] ^ 255]) + whole[where + 1:])
    with pytest.raises(RecordError, match="gates_LTK is damaged"):
        read_record(path)
    for rest in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(rest)
        with pytest.raises(RecordError, match="cannot be read"):
            read_record(path)
    with pytest.raises(RecordError, match="no such file"):
        read_record(tmp_path / "other.npz")
