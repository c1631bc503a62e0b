"""A cache of experts: what a device with room for n of a layer's E experts waits for while it decodes one token at a time.

The experts lie in slow memory; each MoE layer has n places in fast memory. When a layer runs, its token's experts must
all be there. Which one makes room is told by the policy: the least recently used (LRU), the least often used so far
(LFU; of equals the least recent), or the one that is used again last (Belady 1966: nobody does better, but it takes a
look into the future). A predictor may fetch the next layer's experts while this one computes. A high hit rate alone can
mislead – fetching late or too much costs time as well – so hits, bytes and waiting time are reported together.

T tokens, L MoE layers, E experts, K choices; C settings that are simulated at once, Q predictors, M fetched ahead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from moe_jax.analysis.bootstrap import bootstrap
from moe_jax.analysis.prediction import available, fit, scores, tested_tokens
from moe_jax.analysis.recording import RoutingRecord
from moe_jax.analysis.tables import Headline, MissingArray, Table, latest

POLICIES = ("LRU", "LFU", "Belady")
PERFECT = "perfect"  # the predictor that knows
LAYER_VISITS = 16384  # tokens times layers that are simulated where nothing else is said


@dataclasses.dataclass(frozen=True)
class Machine:
    """What fetching and computing cost. The defaults are OLMoE's experts (3 · 2048 · 1024 bf16) over 16 lanes of PCIe 4.0.

    Attributes:
      expert_bytes: of one expert of one layer.
      bytes_per_second: from slow to fast memory.
      layer_seconds: one token through one MoE layer and the attention before it, if nothing is waited for.
    """

    expert_bytes: float = 3 * 2048 * 1024 * 2
    bytes_per_second: float = 25e9
    layer_seconds: float = 0.25e-3

    @property
    def expert_seconds(self) -> float:
        """To fetch one expert; one after the other."""
        return self.expert_bytes / self.bytes_per_second


@dataclasses.dataclass(frozen=True)
class Setting:
    """One cache.

    Attributes:
      places: n, experts of each layer that have room.
      policy: one of ``POLICIES``.
      predictor: who says what to fetch ahead; None: nothing is.
    """

    places: int
    policy: str = "LRU"
    predictor: str | None = None

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy={self.policy!r}: must be one of {POLICIES}")


@dataclasses.dataclass(frozen=True)
class Simulated:
    """What happened to each token, summed over layers; fp64 ``[C, T]``.

    Attributes:
      needed: experts the token needed.
      hits: of these, there in time.
      late: on their way.
      loaded: experts fetched, needed or not.
      ahead: of these, fetched ahead on a predictor's word.
      useful: of those, needed by the layer they were fetched for.
      waited: seconds that computing waited for experts.
    """

    needed: np.ndarray
    hits: np.ndarray
    late: np.ndarray
    loaded: np.ndarray
    ahead: np.ndarray
    useful: np.ndarray
    waited: np.ndarray


def simulate(experts_LTK: np.ndarray, num_experts: int, settings: Sequence[Setting], machine: Machine = Machine(),
             predicted: Mapping[str, np.ndarray] | None = None) -> Simulated:
    """Decodes the tokens one after the other with every setting, from empty caches.

    A layer's missing experts are fetched one after the other, and it computes when the last is there. Meanwhile, behind
    them on the same wire, the predicted experts of the next layer are fetched in the order of the prediction; those
    that have not been begun when the next layer starts are not fetched at all, one that is under way is waited for if
    it is needed. Nothing is fetched ahead for the first layer.

    Args:
      experts_LTK: the experts of each token, best first; -1 = nowhere.
      predicted: predictor -> int ``[L, T, M]``, experts of each layer in the order in which they are fetched (the first
        layer's are not read); -1 = none. As many are used as a layer has places.

    Raises:
      ValueError: a setting has fewer places than a token has experts, or its predictor predicted nothing.
    """
    layers, tokens, choices = experts_LTK.shape
    predicted = predicted or {}
    for setting in settings:
        if not min(choices, num_experts) <= setting.places <= num_experts:
            raise ValueError(f"places={setting.places}: a layer needs room for the {choices} experts of a token, and has "
                             f"{num_experts} experts")
        if setting.predictor is not None and setting.predictor not in predicted:
            raise ValueError(f"predictor={setting.predictor!r} has no predictions; there are those of {sorted(predicted)}")
    caches = _Caches(layers, tokens, choices, num_experts, settings, machine)
    names = sorted(predicted)
    width = max((predicted[name].shape[-1] for name in names), default=0)
    ahead_QLTM = np.full((len(names) + 1, layers, tokens, width), -1, np.int64)  # the last: no predictor
    for index, name in enumerate(names):
        ahead_QLTM[index, ..., :predicted[name].shape[-1]] = predicted[name]
    who_C = np.array([len(names) if each.predictor is None else names.index(each.predictor) for each in settings])
    next_use_LTK = _next_uses(experts_LTK, num_experts, caches.uses[POLICIES.index("Belady")])
    fetches = any(setting.predictor is not None for setting in settings)
    for token in range(tokens):
        for layer in range(layers):
            caches.visit(layer, token, experts_LTK[layer, token], next_use_LTK[layer, token])
            if fetches and layer + 1 < layers:
                caches.fetch_ahead(layer + 1, token, ahead_QLTM[who_C, layer + 1, token])
            caches.compute()
    return Simulated(**caches.sums)


def _next_uses(experts_LTK: np.ndarray, num_experts: int, first_LE: np.ndarray) -> np.ndarray:
    """Belady's key after each use: minus the place in the trace of the next; fills in the first uses. No two are alike."""
    layers, tokens, choices = experts_LTK.shape
    never_E = -(tokens * choices + np.arange(num_experts, dtype=np.float64))
    next_LTK = np.zeros(experts_LTK.shape)
    for layer in range(layers):
        upcoming_E = never_E.copy()
        for place in range(tokens * choices - 1, -1, -1):
            token, choice = divmod(place, choices)
            expert = experts_LTK[layer, token, choice]
            if expert >= 0:
                next_LTK[layer, token, choice] = upcoming_E[expert]
                upcoming_E[expert] = -place
        first_LE[layer] = upcoming_E
    return next_LTK


class _Caches:
    """The state of all settings at once: arrays led by C, so that a layer of a token costs a few NumPy calls."""

    def __init__(self, layers, tokens, choices, num_experts, settings, machine) -> None:
        count, self.machine, self.choices, self.trace = len(settings), machine, choices, tokens * choices
        self.places_C1 = np.array([setting.places for setting in settings])[:, None]
        self.policy_C = np.array([POLICIES.index(setting.policy) for setting in settings])
        self.there_LCE = np.zeros((layers, count, num_experts), bool)  # or on its way
        self.arrival_LCE = np.zeros((layers, count, num_experts))
        self.ahead_LCE = np.zeros((layers, count, num_experts), bool)  # fetched for the visit to come
        # By policy, what has the smallest leaves first; the same in every cache, as it depends on the tokens alone.
        # Never used so far: of equals the expert with the higher number leaves.
        self.uses = np.stack([np.broadcast_to(-(1.0 + np.arange(num_experts)), (layers, num_experts))] * len(POLICIES))
        self.uses[POLICIES.index("LFU")] *= 1e-6
        self.times_LE = np.zeros((layers, num_experts))
        self.now_C, self.free_C, self.ready_C = np.zeros(count), np.zeros(count), np.zeros(count)
        self.sums = {field.name: np.zeros((count, tokens)) for field in dataclasses.fields(Simulated)}

    def visit(self, layer, token, experts_K, next_use_K) -> None:
        """The layer's experts are looked up, fetched and waited for; what has no room leaves."""
        chosen_K = experts_K[experts_K >= 0]
        self.ready_C = self.now_C
        there_CE, ahead_CE = self.there_LCE[layer], self.ahead_LCE[layer]
        if len(chosen_K):
            here_CK = there_CE[:, chosen_K]
            arrival_CK = np.where(here_CK, self.arrival_LCE[layer][:, chosen_K], -np.inf)
            missing_C = len(chosen_K) - here_CK.sum(axis=1)
            fetched_C = np.maximum(self.now_C, self.free_C) + missing_C * self.machine.expert_seconds
            self.free_C = np.where(missing_C > 0, fetched_C, self.free_C)
            self.ready_C = np.maximum(self.now_C, arrival_CK.max(axis=1))
            self.ready_C = np.where(missing_C > 0, np.maximum(self.ready_C, fetched_C), self.ready_C)
            late_C = (arrival_CK > self.now_C[:, None]).sum(axis=1)
            self._add(token, needed=len(chosen_K), hits=len(chosen_K) - missing_C - late_C, late=late_C, loaded=missing_C,
                      useful=ahead_CE[:, chosen_K].sum(axis=1), waited=self.ready_C - self.now_C)
            self._used(layer, token, experts_K, next_use_K)
            self.arrival_LCE[layer][:, chosen_K] = arrival_CK  # missing ones: before anything looks at them again
            there_CE[:, chosen_K] = True
            wanted_CE = np.zeros(there_CE.shape, bool)
            wanted_CE[:, chosen_K] = True
            self._make_room(layer, wanted_CE)
        ahead_CE[:] = False

    def fetch_ahead(self, layer, token, predicted_CM) -> None:
        """The predicted experts of the layer to come, behind what is on the wire, as far as they begin in time."""
        predicted_CM = np.where(np.arange(predicted_CM.shape[1]) < self.places_C1, predicted_CM, -1)
        row_C1 = np.arange(len(predicted_CM))[:, None]
        there_CE = self.there_LCE[layer]
        new_CM = (predicted_CM >= 0) & ~there_CE[row_C1, predicted_CM]
        seconds = self.machine.expert_seconds
        begin_CM = np.maximum(self.now_C, self.free_C)[:, None] + seconds * (np.cumsum(new_CM, axis=1) - 1)
        new_CM &= begin_CM < (self.ready_C + self.machine.layer_seconds)[:, None]
        if not new_CM.any():
            return
        fetched_C = new_CM.sum(axis=1)
        self.free_C = np.where(fetched_C > 0, np.maximum(self.now_C, self.free_C) + seconds * fetched_C, self.free_C)
        row_N, column_N = np.nonzero(new_CM)
        expert_N = predicted_CM[row_N, column_N]
        self.arrival_LCE[layer][row_N, expert_N] = begin_CM[row_N, column_N] + seconds
        self.ahead_LCE[layer][row_N, expert_N] = True
        # Those that are predicted and there already stay as well.
        wanted_CE = np.zeros(there_CE.shape, bool)
        kept_C, kept_M = np.nonzero((predicted_CM >= 0) & (there_CE[row_C1, predicted_CM] | new_CM))
        wanted_CE[kept_C, predicted_CM[kept_C, kept_M]] = True
        there_CE[row_N, expert_N] = True
        self._make_room(layer, wanted_CE)
        self._add(token, loaded=fetched_C, ahead=fetched_C)

    def compute(self) -> None:
        self.now_C = self.ready_C + self.machine.layer_seconds

    def _add(self, token, **values) -> None:
        for name, value_C in values.items():
            self.sums[name][:, token] += value_C

    def _used(self, layer, token, experts_K, next_use_K) -> None:
        recency_K = token * self.choices + self.choices - np.arange(self.choices, dtype=np.float64)  # the first choice last
        for expert, recency, next_use in zip(experts_K, recency_K, next_use_K):
            if expert >= 0:
                self.times_LE[layer, expert] += 1
                self.uses[:, layer, expert] = recency, self.times_LE[layer, expert] + recency / (2 * self.trace), next_use

    def _make_room(self, layer, wanted_CE) -> None:
        """What is above the number of places leaves, by the policy's key; never what is wanted."""
        there_CE = self.there_LCE[layer]
        if not (there_CE.sum(axis=1) > self.places_C1[:, 0]).any():
            return
        key_CE = np.where(wanted_CE, np.inf, self.uses[self.policy_C, layer])
        key_CE = np.where(there_CE, key_CE, -np.inf)
        last_C1 = np.take_along_axis(-np.sort(-key_CE, axis=1), self.places_C1 - 1, axis=1)
        there_CE &= key_CE >= last_C1


# The analysis.


def cached_trace(record: RoutingRecord, tokens: int | None = None, seed: int = 0):
    """What is simulated: tokens of the half of the documents that predictors are not fitted on, in reading order.

    Args:
      tokens: at most so many; by default ``LAYER_VISITS`` / L.

    Returns:
      (their places in the record [N], their experts ``[L, N, K]``, predictor -> ``[L, N, K]``: the K likeliest experts, with
      those of ``PERFECT``). Experts without a network, which nobody fetches, are nowhere (-1).
    """
    fitted_T, _ = tested_tokens(record, seed)
    fitted = fit(record, fitted_T)
    tokens_N = np.flatnonzero(~fitted_T)[:tokens or max(1, LAYER_VISITS // len(record.layers))]
    networks, choices = record.num_experts - record.num_zero_computation, record.experts_per_token
    fetched = lambda experts: np.where(experts < networks, experts, -1)
    experts_LNK = fetched(record.experts_LTK[:, tokens_N])
    predicted = {PERFECT: experts_LNK}
    for name in available(record):
        best = [np.argsort(-scores(name, fitted, record, layer, tokens_N), axis=1)[:, :choices]
                for layer in range(1, len(record.layers))]
        predicted[name] = fetched(np.stack([np.full_like(best[0], -1), *best]))
    return tokens_N, experts_LNK, predicted


def expert_cache(records: Sequence[RoutingRecord], machine: Machine = Machine()) -> Table:
    """Hit rate, bytes moved and time waited for caches of n experts per layer: each policy, and LRU with each predictor.

    Columns: policy; predictor ("none", or who tells what to fetch ahead); places (n); hit_rate (of needed experts those that
    were there or on their way), low, high (95 %, over documents); in_time (those that were there and not waited for); loaded
    (experts per token, all layers); megabytes (per token); useful (share of what was fetched ahead that was needed; NaN:
    nothing was); waited_ms, total_ms (per token); uniform (hit rate if routing were uniform: n/E, of Belady by simulation; NaN
    where something is fetched ahead). Experts without a network (``num_zero_computation``) are not fetched and not counted.

    Raises:
      MissingArray: as :func:`prediction.tested_tokens`, or no token needs an expert with a network.
    """
    record = latest(records, "documents_T")
    tokens_N, experts_LNK, predicted = cached_trace(record)
    most = record.num_experts - record.num_zero_computation
    if not (experts_LNK >= 0).any():
        raise MissingArray("No token was sent to an expert with a network, so that there is nothing to fetch")
    least = min(record.experts_per_token, most)
    sizes = np.unique(np.linspace(least, most, 6).round().astype(int))
    sizes = sizes[:-1] if len(sizes) > 1 else sizes
    kinds = [(policy, None) for policy in POLICIES] + [("LRU", name) for name in predicted]
    settings = [Setting(int(size), policy, predictor) for policy, predictor in kinds for size in sizes]
    found = simulate(experts_LNK, most, settings, machine, predicted)
    _, document_N = np.unique(record.documents_T[tokens_N], return_inverse=True)
    by_document = [np.stack([np.bincount(document_N, row_N) for row_N in values_CN], axis=1)
                   for values_CN in (found.hits + found.late, found.needed)]
    hit_rate = bootstrap(by_document, np.divide, samples=500)
    with np.errstate(invalid="ignore"):
        useful_C = found.useful.sum(axis=1) / found.ahead.sum(axis=1)
    waited_C, loaded_C = 1e3 * found.waited.mean(axis=1), found.loaded.mean(axis=1)
    columns = {
        "policy": np.array([setting.policy for setting in settings]),
        "predictor": np.array([setting.predictor or "none" for setting in settings]),
        "places": np.array([setting.places for setting in settings]),
        "hit_rate": hit_rate.value, "low": hit_rate.low, "high": hit_rate.high,
        "in_time": found.hits.sum(axis=1) / found.needed.sum(axis=1), "loaded": loaded_C,
        "megabytes": loaded_C * machine.expert_bytes / 1e6, "useful": useful_C, "waited_ms": waited_C,
        "total_ms": waited_C + 1e3 * machine.layer_seconds * len(record.layers),
        "uniform": _uniform_hit_rates(experts_LNK[0], most, settings),
    }
    caption = (
        f"Decoding {len(tokens_N):,} tokens one by one (predictors fitted on other documents) with room for n of a "
        f"layer's {most} experts, from empty caches. Above: what makes room; below: LRU, and what is fetched ahead "
        f"while the layer before computes. An expert ({machine.expert_bytes / 1e6:.3g} MB at "
        f"{machine.bytes_per_second / 1e9:.3g} GB/s) takes {1e3 * machine.expert_seconds:.3g} ms, a layer computes "
        f"{1e3 * machine.layer_seconds:.3g} ms. A hit is there or on its way when it is needed; the time it is then "
        f"waited for is in the right panels. Dashed: uniform routing with nothing fetched ahead, n/E. Hit rates of "
        f"LRU and LFU above it come from uneven loads or from tokens that follow each other to the same experts. No "
        f"policy beats Belady, who knows the future, and is above n/E (dotted) whatever the routing."
    )
    facts = {"compute_ms": 1e3 * machine.layer_seconds * len(record.layers)}
    return Table(columns, caption, _headlines(columns, sizes[len(sizes) // 2]), facts)


def _uniform_hit_rates(experts_NK: np.ndarray, num_experts: int, settings: Sequence[Setting], seed: int = 0) -> np.ndarray:
    """Hit rate of each setting if every set of experts were equally likely, ``[C]``: n/E for policies that do not know the
    future; of Belady in one layer of such tokens, as many as in the trace; NaN where a predictor fetches ahead."""
    rate_C = np.array([setting.places / num_experts if setting.predictor is None else np.nan for setting in settings])
    belady = [place for place, setting in enumerate(settings) if setting.policy == "Belady" and setting.predictor is None]
    if belady:
        order_NE = np.random.default_rng(seed).random((len(experts_NK), num_experts)).argsort(axis=1)
        width = min(experts_NK.shape[1], num_experts)
        uniform_NK = np.where(np.sort(experts_NK >= 0, axis=1)[:, ::-1][:, :width], order_NE[:, :width], -1)
        found = simulate(uniform_NK[None], num_experts, [settings[place] for place in belady])
        rate_C[belady] = found.hits.sum(axis=1) / np.maximum(found.needed.sum(axis=1), 1)
    return rate_C


def _headlines(columns: Mapping[str, np.ndarray], places: int) -> tuple[Headline, ...]:
    found = []
    for row in np.flatnonzero(columns["places"] == places):
        policy, predictor = columns["policy"][row], columns["predictor"][row]
        if predictor not in ("none", "next-layer router"):
            continue
        name = f"{policy} with room for {places}" + ("" if predictor == "none" else f", {predictor} fetching ahead")
        uniform = columns["uniform"][row]
        reference = None if np.isnan(uniform) else float(uniform)
        found.append(Headline(f"hit rate, {name}", float(columns["hit_rate"][row]), reference, float(columns["low"][row]),
                              float(columns["high"][row])))
        found.append(Headline(f"waiting per token (ms), {name}", float(columns["waited_ms"][row])))
    return tuple(found)
