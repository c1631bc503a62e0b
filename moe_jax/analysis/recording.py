"""Where every token went, once and compactly: what the analyses of ``catalogue.ANALYSES`` read.

A :class:`RoutingRecord` is plain NumPy, so that routing from anywhere – another code base, a simulation – can be
analysed: make one, :func:`write_record` it, and ``moe-jax analyze --record=FILE``. Those of this project's models are
made by :func:`record_routing`.

T recorded tokens in reading order (row by row, padding left out), L MoE layers, K choices per token, E experts.
"""

import dataclasses
import functools
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moe_jax import files
from moe_jax.config import Config
from moe_jax.data.documents import fingerprint_of
from moe_jax.data.vocabularies import Vocabulary
from moe_jax.errors import UserError
from moe_jax.models.decoder import Decoder, is_stacked, left_neighbours, moe_layer_paths
from moe_jax.nn.groups import GroupLayout
from moe_jax.nn.moe import WITHOUT_DROPS, MoELayer, RoutingMode
from moe_jax.routing import ROUTERS
from moe_jax.routing.assignment import Routing
from moe_jax.routing.replay import by_token
from moe_jax.sharding import compiler_options, over_groups
from moe_jax.training.evaluate import put_batch
from moe_jax.training.run import Run
from moe_jax.training.state import model_graph
from moe_jax.training.step import Batch, check_statistics, forward

FORMAT = 1
# On disk each in the smallest type that holds it; these in half precision, which is finer than any figure shows.
_HALVES = ("gates_LTK", "entropy_LT", "logit_norm_LT", "confidence_LT")
_BITS = ("kept_LTK",)
_WHOLE = ("token_ids_T", "target_ids_T", "predicted_ids_T", "rows_T", "positions_T", "row_positions_T", "documents_T",
          "domains_T", "turns_T", "experts_LTK", "next_experts_LTK")
_DTYPES = {**dict.fromkeys(_WHOLE, np.int32), "experts_LTK": np.int16, "next_experts_LTK": np.int16,
           **dict.fromkeys(_HALVES, np.float32), **dict.fromkeys(_BITS, np.bool_)}
_REQUIRED = ("token_ids_T", "experts_LTK")
_LATER = {"num_zero_computation"}  # not in the first files of this format, which have none
_MOST_EXPERTS = 1 << 15  # int16


class RecordError(UserError, ValueError):
    """A record that is damaged or contradicts itself, or routing that cannot be recorded; one line for people."""


@dataclasses.dataclass(frozen=True)
class RoutingRecord:
    """The routing of T tokens in L MoE layers; checked when it is made. Arrays a source does not have are None.

    Attributes:
      step: training step of the parameters.
      layers: the MoE layers' numbers in the model.
      num_experts: E.
      token_ids_T: int32, the tokens that were routed (the model's input).
      experts_LTK: int16, the chosen experts, best first; -1 = nowhere. Before drops.
      target_ids_T, predicted_ids_T: int32, the token that follows, and the one the model holds likeliest.
      rows_T, row_positions_T: int32, the row of the evaluation and the place in it, where buffers fill and drop.
      positions_T: int32, the place in the part of the document that the model sees.
      documents_T: int32, which document.
      domains_T: int32, index into ``domains``; -1 = unknown.
      turns_T: int32, turn of a conversation, 1, 2, …; 0 = outside any.
      gates_LTK: float32 (float16 on disk), combine weights.
      kept_LTK: bool, the choice found a place under ``dispatch``.
      next_experts_LTK: int16, what the *next* MoE layer's router would choose on what enters this layer's router; -1 in
        the last layer.
      entropy_LT, confidence_LT: float32 (float16 on disk), of the router's scores as shares: entropy in nats, largest share.
      logit_norm_LT: float32 (float16 on disk), Euclidean norm of the router's logits.
      domains: their names.
      dispatch, capacity_factor: how the recorded pass routed; the factor is None where there are no buffers.
      token_texts: the text of every token id, for display; may be empty.
      config_hash, data: what was recorded, in words and as a hash.
      identity: hash of all that determines the record, to tell whether it can be used again.
      num_zero_computation: so many of the E experts, the last, have no network (identity, zero and constant experts).
    """

    step: int
    layers: tuple[int, ...]
    num_experts: int
    token_ids_T: np.ndarray
    experts_LTK: np.ndarray
    target_ids_T: np.ndarray | None = None
    predicted_ids_T: np.ndarray | None = None
    rows_T: np.ndarray | None = None
    positions_T: np.ndarray | None = None
    row_positions_T: np.ndarray | None = None
    documents_T: np.ndarray | None = None
    domains_T: np.ndarray | None = None
    turns_T: np.ndarray | None = None
    gates_LTK: np.ndarray | None = None
    kept_LTK: np.ndarray | None = None
    next_experts_LTK: np.ndarray | None = None
    entropy_LT: np.ndarray | None = None
    logit_norm_LT: np.ndarray | None = None
    confidence_LT: np.ndarray | None = None
    domains: tuple[str, ...] = ()
    dispatch: str = ""
    capacity_factor: float | None = None
    token_texts: tuple[str, ...] = ()
    config_hash: str = ""
    data: str = ""
    identity: str = ""
    num_zero_computation: int = 0

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, _as(name, values, dtype))
        for name in ("layers", "domains", "token_texts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check(self)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.token_ids_T)

    @property
    def experts_per_token(self) -> int:
        """K, the number of columns; the most any token chose where that differs from token to token."""
        return self.experts_LTK.shape[-1]


def _as(name: str, values: Any, dtype: type) -> np.ndarray:
    values = np.asarray(values)
    wanted = {"i": "iu", "f": "f", "b": "b"}[np.dtype(dtype).kind]
    if values.dtype.kind not in wanted:
        raise RecordError(f"{name} holds {values.dtype}, not {'integers' if wanted == 'iu' else np.dtype(dtype).name}")
    if wanted == "iu" and values.size and not (np.iinfo(dtype).min <= values.min() and values.max() <= np.iinfo(dtype).max):
        raise RecordError(f"{name} holds {values.min()} to {values.max()}, which {np.dtype(dtype).name} cannot")
    return values.astype(dtype, copy=False)


def _check(record: RoutingRecord) -> None:
    """Raises RecordError where sizes or values contradict each other."""
    if record.experts_LTK.ndim != 3 or not record.experts_LTK.size:
        raise RecordError(f"experts_LTK has shape {record.experts_LTK.shape}; wanted are layers, tokens and choices, at "
                          f"least one of each")
    layers, tokens, choices = record.experts_LTK.shape
    if not 0 < record.num_experts < _MOST_EXPERTS:
        raise RecordError(f"num_experts={record.num_experts}: must be from 1 to {_MOST_EXPERTS - 1}")
    if not 0 <= record.num_zero_computation <= record.num_experts:
        raise RecordError(f"num_zero_computation={record.num_zero_computation}: must be from 0 to "
                          f"num_experts={record.num_experts}")
    if len(record.layers) != layers:
        raise RecordError(f"layers names {len(record.layers)} layers, but experts_LTK has {layers}")
    sizes = {"L": layers, "T": tokens, "K": choices}
    for name in _DTYPES:
        values = getattr(record, name)
        if values is None:
            continue
        expected = tuple(sizes[letter] for letter in name.rsplit("_", 1)[1])
        # Beside expert choice, whose tokens have any number of experts, K is the same for both.
        fits = values.shape[:-1] == expected[:-1] if name == "next_experts_LTK" else values.shape == expected
        if not fits:
            raise RecordError(f"{name} has shape {values.shape}, but experts_LTK has {record.experts_LTK.shape}, so that "
                              f"{expected} is wanted")
    limits = {"experts_LTK": record.num_experts, "next_experts_LTK": record.num_experts, "domains_T": len(record.domains)}
    for name, limit in limits.items():
        values = getattr(record, name)
        if values is not None and (values.min(initial=-1) < -1 or values.max(initial=-1) >= limit):
            raise RecordError(f"{name} holds {values.min()} to {values.max()}; allowed are -1 (none) to {limit - 1}")
    if record.gates_LTK is not None and not np.isfinite(record.gates_LTK).all():
        raise RecordError("gates_LTK is not finite everywhere")


def write_record(path: str | os.PathLike, record: RoutingRecord) -> None:
    """Writes the record as one compressed .npz file (and its folder), whole or not at all.

    Raises:
      FileError: the file cannot be written.
    """
    arrays, single = {}, {"format": FORMAT}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.name not in _DTYPES:
            single[field.name] = value
        elif value is not None:
            arrays[field.name] = _small(field.name, value)
    # As JSON: NumPy's own text arrays lose NUL characters at the end of a token.
    arrays["record.json"] = np.frombuffer(json.dumps(single).encode(), np.uint8)
    # Not np.savez_compressed: gates hardly become smaller, and trying harder takes three times as long.
    with files.whole(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, values, allow_pickle=False)


def _small(name: str, values: np.ndarray) -> np.ndarray:
    if name in _BITS:
        return np.packbits(values)
    if name in _HALVES:
        # Not where half precision would make an infinity of it.
        return values.astype(np.float16 if np.abs(values).max(initial=0) < np.finfo(np.float16).max else np.float32)
    low, high = values.min(initial=0), values.max(initial=0)
    fits = (dtype for dtype in (np.uint8, np.int8, np.uint16, np.int16, np.int32)
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max)
    return values.astype(next(fits))


def read_record(path: str | os.PathLike) -> RoutingRecord:
    """The record in a file of :func:`write_record`.

    Raises:
      RecordError: there is no such file, it is damaged, or its arrays contradict each other; the message says which.
    """
    path = pathlib.Path(path)
    try:
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise RecordError("it holds a single array; a record is an .npz file as "
                              "moe_jax.analysis.recording.write_record makes it")
        with opened as file:
            names = set(file.files)
            if "record.json" not in names:
                raise RecordError("it holds no record.json, so it is not a record of routing")
            single = json.loads(_array(file, "record.json").tobytes())
            arrays = {name: _array(file, name) for name in _DTYPES if name in names}
        return _assembled(single, arrays)
    except FileNotFoundError:
        raise RecordError(f"{path}: there is no such file; moe-jax analyze --checkpoint=… records one") from None
    except RecordError as error:
        raise RecordError(f"{path}: {error}. Record it again: moe-jax analyze --checkpoint=…") from None
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise RecordError(f"{path}: cannot be read as a record of routing ({reason}). Record it again: moe-jax analyze "
                          f"--checkpoint=…") from error


def _array(file: Any, name: str) -> np.ndarray:
    try:
        return file[name]
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise RecordError(f"{name} is damaged ({error})") from error


def _assembled(single: Any, arrays: dict[str, np.ndarray]) -> RoutingRecord:
    if not isinstance(single, dict) or single.pop("format", None) != FORMAT:
        raise RecordError(f"record.json is not of format {FORMAT}")
    known = {field.name for field in dataclasses.fields(RoutingRecord)} - set(_DTYPES)
    if known != set(single) | _LATER:
        raise RecordError(f"record.json holds {sorted(single)}, not {sorted(known)}")
    if missing := [name for name in _REQUIRED if name not in arrays]:
        raise RecordError(f"{missing[0]} is missing; every record has it")
    shape = arrays["experts_LTK"].shape
    for name in set(_BITS) & set(arrays):
        bits, wanted = arrays[name], -(-int(np.prod(shape)) // 8)
        if bits.dtype != np.uint8 or bits.shape != (wanted,):
            raise RecordError(f"{name} has {bits.shape} bytes of {bits.dtype}, but {wanted} are needed for {shape} bits")
        arrays[name] = np.unpackbits(bits, count=int(np.prod(shape))).astype(bool).reshape(shape)
    arrays = {name: values.astype(np.float32) if name in _HALVES and values.dtype == np.float16 else values
              for name, values in arrays.items()}
    return RoutingRecord(**single, **arrays)


# Recording a model.


def record_routing(run: Run, params: Any, bias_LE: jax.Array, step: int, batches: Iterable[dict[str, np.ndarray]],
                   mode: RoutingMode, progress: Callable[[int], None] = lambda done: None) -> RoutingRecord:
    """One evaluation pass that notes where every token goes.

    Args:
      run: whose config, vocabulary and data (names of domains) the record speaks of.
      step: of the parameters.
      batches: as ``run.validation_batches`` gives them; a further entry ``turn_ids`` becomes ``turns_T``.
      mode: how to route; what it records is added.
      progress: is called after each batch with the number of batches done.

    Raises:
      RecordError: the model is dense, there are several processes, or there is no token.
    """
    config = run.config
    check_recordable(config)
    mode = dataclasses.replace(mode, record=True, inspect=True)
    record, parts = recording_function(config, run.vocab_size, mode), []
    for number, batch in enumerate(batches):
        host = dict(batch)
        turn_BS = host.pop("turn_ids", None)
        arrays = jax.device_get(record(params, put_batch(host, run.mesh, config.data.batch_size), bias_LE))
        parts.append(_valid_tokens(arrays, host, turn_BS, number * config.data.batch_size))
        progress(number + 1)
    if not sum(len(part["token_ids_T"]) for part in parts):
        raise RecordError(f"there is no token to record in {config.data.source!r}; give data with text in it")
    joined = _joined(parts)
    if not ROUTERS[mode.router or config.moe.router].learned:  # nothing is scored
        joined.update(entropy_LT=None, confidence_LT=None, logit_norm_LT=None)
    factor = None if mode.dispatch in WITHOUT_DROPS else mode.capacity_factor
    return RoutingRecord(
        step=step, layers=config.moe_layers, num_experts=config.moe.num_routed_experts,
        num_zero_computation=config.moe.num_zero_computation, domains=tuple(run.data.domains),
        dispatch=mode.dispatch, capacity_factor=factor, token_texts=token_texts(run.data.vocabulary),
        config_hash=fingerprint_of(config.to_dict())[:12], data=config.data.source, **joined)


def check_recordable(config: Config) -> None:
    """Raises RecordError where there is no routing, or not all of it is here."""
    if not config.moe_layers:
        raise RecordError("The model is dense: it has no router, so there is no routing to analyse. Give a run with "
                          "moe.num_experts above 0")
    if config.model.encoder_layers:
        raise RecordError(f"model.encoder_layers={config.model.encoder_layers}: a record has one text, which all layers route, and "
                          f"an encoder's layers route another than its decoder's; routing is recorded of decoders only. The run's "
                          f"own report shows loads and drops of both")
    if jax.process_count() > 1:
        raise RecordError(f"Routing is recorded by one process, not by {jax.process_count()}: each has only its rows. Run "
                          f"this command alone, on one host that the model fits on")


@functools.lru_cache(maxsize=16)
def recording_function(config: Config, vocab_size: int, mode: RoutingMode) -> Callable[..., dict[str, jax.Array]]:
    """:func:`recorded_arrays` compiled, of (params, batch, bias_LE)."""
    return jax.jit(functools.partial(recorded_arrays, config=config, vocab_size=vocab_size, mode=mode),
                   compiler_options=compiler_options())


def recorded_arrays(params: Any, batch: Batch, bias_LE: jax.Array, config: Config, vocab_size: int,
                    mode: RoutingMode) -> dict[str, jax.Array]:
    """What a record holds of one batch, ``[B, S]``, ``[L, B, S]`` and ``[L, B, S, K]``, padding included.

    K is E for routers that give tokens any number of experts.
    """
    ids_BS, positions_BS, valid_BS = batch["input_ids"], batch["positions"], batch["valid"]
    output = forward(config, vocab_size, params, batch, mode, bias_LE)
    check_statistics(config, output.statistics)
    model = nnx.merge(model_graph(config, vocab_size), params)
    statistics, layout = output.statistics, GroupLayout(*ids_BS.shape, config)
    valid_GT = layout.split(valid_BS)
    layer_of = lambda tree, layer: jax.tree.map(lambda leaf: leaf[layer], tree)
    modules, previous_BS = _moe_layers(model, config), left_neighbours(ids_BS, positions_BS)
    chosen, ahead = [], []
    for layer in range(len(modules)):
        view, kept_GN = layer_of((statistics.view, statistics.kept_GN), layer)
        chosen.append(_by_token(layer_of(statistics.routing_G, layer), kept_GN, valid_GT, layout, config))
        if layer + 1 < len(modules):
            routing_G = modules[layer + 1].choices(view.input_BSD, valid_BS, mode, bias_LE[layer + 1], ids_BS, positions_BS,
                                                   previous_BS)
            all_GN = jnp.ones_like(routing_G.expert_N, bool)
            ahead.append(_by_token(routing_G, all_GN, valid_GT, layout, config)[0])
    experts_LBSK, gates_LBSK, kept_LBSK = (jnp.stack(leaves) for leaves in zip(*chosen))
    ahead.append(jnp.full_like(chosen[-1][0], -1))
    view = {"entropy_LT": statistics.view.entropy_BS, "confidence_LT": statistics.view.confidence_BS,
            "logit_norm_LT": statistics.view.logit_norm_BS}
    return {"experts_LTK": experts_LBSK, "gates_LTK": gates_LBSK, "kept_LTK": kept_LBSK,
            "next_experts_LTK": jnp.stack(ahead),
            "predicted_ids_T": jnp.argmax(output.logits_BSV, axis=-1).astype(jnp.int32),
            **{name: values for name, values in view.items() if values is not None}}


def _moe_layers(model: Decoder, config: Config) -> list[MoELayer]:
    """The MoE layers in order; those of the repeating block are taken out of its stack."""
    layers: dict[int, MoELayer] = {}
    for path, numbers in moe_layer_paths(config).items():
        module = model
        for name in path.split("/"):
            module = module[int(name)] if name.isdigit() else getattr(module, name)
        graph, state = nnx.split(module)
        for place, number in enumerate(numbers):
            one = jax.tree.map(lambda leaf, place=place: leaf[place], state) if is_stacked(path) else state
            layers[number] = nnx.merge(graph, one)
    return [layers[number] for number in sorted(layers)]


def _by_token(routing_G: Routing, kept_GN: jax.Array, valid_GT: jax.Array, layout: GroupLayout,
              config: Config) -> list[jax.Array]:
    """(experts int16, gates, kept), each ``[B, S, K]``; nowhere is -1, with a gate of 0 and not kept."""
    num_experts = config.moe.num_routed_experts

    def group(routing, kept_N, valid_T):
        if routing.choices_per_token is None:
            return _any_number(routing, kept_N, num_experts, len(valid_T))
        expert_TK = by_token(routing, routing.expert_N)
        chosen_TK = expert_TK < num_experts
        return (jnp.where(chosen_TK, expert_TK, -1).astype(jnp.int16),
                jnp.where(chosen_TK, by_token(routing, routing.gate_N), 0.0), chosen_TK & by_token(routing, kept_N))

    return [layout.join(leaf) for leaf in over_groups(group, routing_G, kept_GN, valid_GT)]


def _any_number(routing, kept_N, num_experts, tokens):
    """The same of a list in which a token stands any number of times: ``[T, E]``, by falling gate."""
    where = routing.token_N, routing.expert_N  # beyond E: nowhere, dropped
    chosen_TE = jnp.zeros((tokens, num_experts), bool).at[where].set(True, mode="drop")
    gate_TE = jnp.zeros((tokens, num_experts), jnp.float32).at[where].set(routing.gate_N, mode="drop")
    kept_TE = jnp.zeros((tokens, num_experts), bool).at[where].set(kept_N, mode="drop")
    _, expert_TK = jax.lax.top_k(jnp.where(chosen_TE, gate_TE, -jnp.inf), num_experts)
    chosen_TK, gate_TK, kept_TK = (jnp.take_along_axis(x, expert_TK, axis=1) for x in (chosen_TE, gate_TE, kept_TE))
    return jnp.where(chosen_TK, expert_TK, -1).astype(jnp.int16), gate_TK, kept_TK


def _valid_tokens(arrays: dict[str, np.ndarray], batch: dict[str, np.ndarray], turn_BS: np.ndarray | None,
                  first_row: int) -> dict[str, np.ndarray]:
    """The arrays of one batch without padding, T in the place of B and S."""
    valid_BS = batch["valid"]
    rows, places = np.nonzero(valid_BS)
    found = {name: values[:, valid_BS] if _by_layer(name) else values[valid_BS] for name, values in arrays.items()}
    names = {"token_ids_T": "input_ids", "target_ids_T": "target_ids", "positions_T": "positions",
             "documents_T": "document_ids", "domains_T": "domain_ids"}
    found |= {name: batch[key][valid_BS] for name, key in names.items()}
    found |= {"rows_T": (rows + first_row).astype(np.int32), "row_positions_T": places.astype(np.int32)}
    return found if turn_BS is None else {**found, "turns_T": turn_BS[valid_BS]}


def _joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    joined = {name: np.concatenate([part[name] for part in parts], axis=1 if _by_layer(name) else 0) for name in parts[0]}
    for experts, others in (("experts_LTK", ("gates_LTK", "kept_LTK")), ("next_experts_LTK", ())):
        # Where experts choose, a token has any number of them, best first: as many columns as the most has.
        used = max(1, int((joined[experts] >= 0).sum(axis=-1).max()))
        for name in (experts, *others):
            joined[name] = joined[name][..., :used]
    return joined


def _by_layer(name: str) -> bool:
    return name.rsplit("_", 1)[1].startswith("L")


def token_texts(vocabulary: Vocabulary) -> tuple[str, ...]:
    """The text of every id, for people: ids without text and single bytes of longer characters get a name in <>."""
    names = {vocabulary.unknown_id: "<unknown>", vocabulary.begin_id: "<start>", vocabulary.eos_id: "<end>"}
    texts = (vocabulary.decode([number]) for number in range(vocabulary.vocab_size))
    return tuple(names.get(number, f"<{number}>") if text in ("", "\ufffd") else text for number, text in enumerate(texts))
