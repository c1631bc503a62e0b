"""Where every token went, once and compactly: what the analyses of ``catalogue.ANALYSES`` read.

A :class:`RoutingRecord` is plain NumPy, so that routing from anywhere – another code base, a simulation – can be
analysed: make one, :func:`write_record` it, and ``moe-jax analyze --record=FILE``. This project's checkpoints are
recorded by :mod:`moe_jax.analysis.record_checkpoint`.

T recorded tokens in reading order (row by row, padding left out), L MoE layers, K choices per token, E experts.
"""

import dataclasses
import json
import os
import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np

from moe_jax.training.run import write_arrays

FORMAT = 1
# On disk each in the smallest type that holds it; these in half precision, which is finer than any figure shows.
_HALVES = ("gates_LTK", "entropy_LT", "logit_norm_LT", "confidence_LT")
_BITS = ("kept_LTK",)
_WHOLE = ("token_ids_T", "target_ids_T", "predicted_ids_T", "rows_T", "positions_T", "row_positions_T", "documents_T",
          "domains_T", "turns_T", "experts_LTK", "next_experts_LTK")
_DTYPES = {**dict.fromkeys(_WHOLE, np.int32), "experts_LTK": np.int16, "next_experts_LTK": np.int16,
           **dict.fromkeys(_HALVES, np.float32), **dict.fromkeys(_BITS, np.bool_)}
_REQUIRED = ("token_ids_T", "experts_LTK")
_MOST_EXPERTS = 1 << 15  # int16


class RecordError(ValueError):
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
    for name in _REQUIRED:
        if getattr(record, name) is None:
            raise RecordError(f"{name} is missing; every record has it")
    if record.experts_LTK.ndim != 3 or not record.experts_LTK.size:
        raise RecordError(f"experts_LTK has shape {record.experts_LTK.shape}; wanted are layers, tokens and choices, at "
                          f"least one of each")
    layers, tokens, choices = record.experts_LTK.shape
    if not 0 < record.num_experts < _MOST_EXPERTS:
        raise RecordError(f"num_experts={record.num_experts}: must be from 1 to {_MOST_EXPERTS - 1}")
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
      RunError: the file cannot be written.
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
    write_arrays(pathlib.Path(path), arrays)


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
        with np.load(path, allow_pickle=False) as file:
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
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
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
    if known != set(single):
        raise RecordError(f"record.json holds {sorted(single)}, not {sorted(known)}")
    if "experts_LTK" in arrays and arrays["experts_LTK"].ndim == 3:
        shape = arrays["experts_LTK"].shape
        for name in set(_BITS) & set(arrays):
            bits, wanted = arrays[name], -(-int(np.prod(shape)) // 8)
            if bits.dtype != np.uint8 or bits.shape != (wanted,):
                raise RecordError(f"{name} has {bits.shape} bytes of {bits.dtype}, but {wanted} are needed for {shape} bits")
            arrays[name] = np.unpackbits(bits, count=int(np.prod(shape))).astype(bool).reshape(shape)
    arrays = {name: values.astype(np.float32) if name in _HALVES and values.dtype == np.float16 else values
              for name, values in arrays.items()}
    missing = {name: None for name in _REQUIRED if name not in arrays}
    return RoutingRecord(**single, **arrays, **missing)
