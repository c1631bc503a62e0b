"""Held-out loss, alone and by domain, and where the tokens went."""

import functools
import math
from typing import Any, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import Config
from moe_jax.models.decoder import of_stacks
from moe_jax.nn.groups import GroupLayout
from moe_jax.nn.moe import RoutingMode
from moe_jax.sharding import batch_sharding, compiler_options, local_rows, over_groups
from moe_jax.training import processes
from moe_jax.training.losses import cross_entropy
from moe_jax.training.step import Batch, Statistics, check_statistics, forward, routing_sums, targets_of


def evaluation_sums(params: Any, batch: Batch, bias_LE: jax.Array, bytes_per_token_V: jax.Array, config: Config,
                    vocab_size: int, mode: RoutingMode, num_domains: int) -> dict[str, Any]:
    """Sums over one batch; add them over batches. Cross-entropy alone, whatever the loss coefficients (B54).

    Returns:
      ``ce_P, tokens_P, bytes_P`` of targets by domain, ``routing`` (:func:`moe_jax.training.step.routing_sums`), and for a MoE
      ``choices_LS, kept_LS`` by position in the row and ``domain_counts_LPE``. S is that of the longer rows of an
      encoder–decoder; in the others nothing is chosen further on.
    """
    output = forward(config, vocab_size, params, batch, mode, bias_LE)
    check_statistics(config, output.statistics)
    ce_BS, _ = cross_entropy(output.logits_BSV, batch["target_ids"])
    bytes_BS = jnp.sum(jnp.where(batch["target_ids"][:, :, None] == jnp.arange(bytes_per_token_V.size)[None, None, :],
                                 bytes_per_token_V[None, None, :], 0), axis=-1)
    is_domain_BSP = (batch["domain_ids"][:, :, None] == jnp.arange(num_domains)[None, None, :])
    is_domain_BSP &= targets_of(batch)[:, :, None]
    by_domain = lambda value_BS: jnp.sum(jnp.where(is_domain_BSP, value_BS[:, :, None], 0), axis=(0, 1))
    sums = {"ce_P": by_domain(ce_BS), "tokens_P": by_domain(jnp.ones_like(ce_BS)),
            "bytes_P": by_domain(bytes_BS.astype(jnp.float32)), "routing": routing_sums(output.statistics)}
    if of_stacks(output.statistics):
        sums |= _where_tokens_went(output.statistics, batch, config, num_domains)
    return sums


def _where_tokens_went(statistics: Statistics, batch: Batch, config: Config, num_domains: int) -> dict[str, Any]:
    """Choices and kept choices by position, and choices by domain and expert, of every layer."""
    if not isinstance(statistics, tuple):
        parts = [_of_stack(statistics, batch["domain_ids"], config, num_domains)]
    else:
        domain_ids = (batch["encoder_domain_ids"], batch["domain_ids"])
        parts = [_of_stack(part, ids, config, num_domains) for part, ids in zip(statistics, domain_ids) if part is not None]
    longest = max(part[0].shape[1] for part in parts)
    pad = lambda counts_LS: jnp.pad(counts_LS, ((0, 0), (0, longest - counts_LS.shape[1])))
    choices_LS, kept_LS, domain_counts_LPE = (jnp.concatenate(leaves) for leaves in zip(
        *((pad(choices), pad(kept), domains) for choices, kept, domains in parts)))
    return {"choices_LS": choices_LS, "kept_LS": kept_LS, "domain_counts_LPE": domain_counts_LPE}


def _of_stack(statistics, domain_ids_BS, config, num_domains):
    """(choices_LS, kept_LS, domain_counts_LPE)."""
    batch_size, length = domain_ids_BS.shape
    layout = GroupLayout(batch_size, length, config)
    position_BS = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], (batch_size, length))
    position_GT, domain_GT = layout.split(position_BS), layout.split(domain_ids_BS)
    num_experts = config.moe.num_routed_experts

    def group(routing, kept_N, position_T, domain_T):
        chosen_N = routing.expert_N < num_experts
        position_N, domain_N = position_T[routing.token_N], domain_T[routing.token_N]
        zeros_S = jnp.zeros((length,), jnp.float32)
        # Out of range (nowhere, padding's domain -1) is dropped; -1 must not wrap around.
        domain_N = jnp.where(domain_N < 0, num_domains, domain_N)
        return (zeros_S.at[position_N].add(chosen_N), zeros_S.at[position_N].add(kept_N),
                jnp.zeros((num_domains, num_experts), jnp.float32).at[domain_N, routing.expert_N].add(1, mode="drop"))

    layers = []
    for layer in range(statistics.kept_GE.shape[0]):
        routing_G, kept_GN = jax.tree.map(lambda leaf: leaf[layer], (statistics.routing_G, statistics.kept_GN))
        layers.append([jnp.sum(leaf, axis=0) for leaf in over_groups(group, routing_G, kept_GN, position_GT, domain_GT)])
    return tuple(jnp.stack(leaves) for leaves in zip(*layers))


class Evaluator:
    """Evaluates parameters on fixed batches; each routing mode is compiled once for each set of keys of a batch."""

    def __init__(self, config: Config, vocab_size: int, bytes_per_token: np.ndarray, domains: list[str],
                 mesh: jax.sharding.Mesh):
        self.config, self.vocab_size, self.domains, self.mesh = config, vocab_size, domains, mesh
        table = np.zeros(vocab_size, np.int32)
        table[: len(bytes_per_token)] = bytes_per_token
        self._bytes_per_token_V = table
        self._compiled: dict[tuple[RoutingMode, frozenset[str]], Any] = {}

    def _function(self, mode: RoutingMode, batch: Batch):
        key = (mode, frozenset(batch))
        if key not in self._compiled:
            self._compiled[key] = processes.compiled_together(jax.jit(functools.partial(
                evaluation_sums, config=self.config, vocab_size=self.vocab_size, mode=mode,
                num_domains=len(self.domains)), compiler_options=compiler_options()), f"evaluation by {mode.dispatch}")
        return self._compiled[key]

    def sums(self, params: Any, bias_LE: jax.Array, batches: Iterable[dict[str, np.ndarray]], mode: RoutingMode,
             stop=lambda: False) -> dict[str, Any]:
        """Host sums over ``batches``; empty if ``stop()`` became true meanwhile (a pending SIGTERM).

        With several processes ``batches`` are of this process's rows (:meth:`moe_jax.training.run.Run.validation_batches`),
        and the sums are those over all rows, on every process.
        """
        total: dict[str, Any] = {}
        for batch in batches:
            if stop():
                return {}
            batch = put_batch(batch, self.mesh, self.config.data.batch_size)
            sums = jax.device_get(self._function(mode, batch)(params, batch, bias_LE, self._bytes_per_token_V))
            flat = {**{k: v for k, v in sums.items() if k != "routing"}, **sums["routing"]}
            for name, value in flat.items():
                value = np.asarray(value, np.float64)
                if name not in total:
                    total[name] = value
                else:
                    total[name] = np.maximum(total[name], value) if name == "logit_max_L" else total[name] + value
        return total


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh, batch_size: int | None = None) -> Batch:
    """A host batch on the mesh, spread over the token axes.

    With several processes each gives the rows of its own devices (:func:`moe_jax.sharding.local_rows`), one range after
    the other, and ``batch_size`` is that of all of them together.
    """
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(batch, sharding)
    ranges = local_rows(mesh, batch_size)
    place = {row: place for place, row in enumerate(row for part in ranges for row in range(part.start, part.stop))}

    def put(values: np.ndarray) -> jax.Array:
        if len(values) != len(place):
            raise ValueError(f"{len(values)} rows for the {len(place)} of this process ({ranges} of {batch_size})")

        def rows_of_device(index):
            first, last, _ = index[0].indices(batch_size)
            return values[place[first] : place[first] + last - first]
        return jax.make_array_from_callback((batch_size, *values.shape[1:]), sharding, rows_of_device)

    return {name: put(values) for name, values in batch.items()}


def loss_summary(sums: dict[str, Any], domains: list[str]) -> dict[str, Any]:
    """``ce`` (nats per token), ``bits_per_byte``, ``tokens``, and the same by domain."""
    def summary(ce, tokens, num_bytes):
        return {"ce": ce / tokens, "bits_per_byte": ce / math.log(2) / num_bytes if num_bytes else None,
                "tokens": int(tokens)}

    rows = zip(domains, sums["ce_P"], sums["tokens_P"], sums["bytes_P"])
    return {**summary(sums["ce_P"].sum(), sums["tokens_P"].sum(), sums["bytes_P"].sum()),
            "bytes": int(sums["bytes_P"].sum()),
            "domains": {name: summary(ce, tokens, size) for name, ce, tokens, size in rows if tokens}}


def drop_fraction(sums: dict[str, Any]) -> float:
    """Share of all choices that found no room, over all MoE layers."""
    return float(1.0 - sums["kept_LE"].sum() / max(sums["counts_LE"].sum(), 1.0))


def routing_arrays(sums: dict[str, Any], capacity_sums: dict[str, Any], config: Config,
                   domains: list[str]) -> dict[str, np.ndarray]:
    """The arrays of ``routing/evaluation.npz`` (see ``analysis/report.py``; ``counts_LE``: ``analysis/placement.py``)."""
    choices_LS, kept_LS = capacity_sums["choices_LS"], capacity_sums["kept_LS"]
    # No rate where nobody chooses, as where the rows of an encoder or a decoder have ended.
    rate_LS = np.where(choices_LS > 0, 1.0 - kept_LS / np.maximum(choices_LS, 1.0), np.nan)
    counts_PLE = np.moveaxis(sums["domain_counts_LPE"], 0, 1)
    shares_PLE = counts_PLE / np.maximum(counts_PLE.sum(-1, keepdims=True), 1.0)
    return {
        "drop_rate_LS": rate_LS,
        "choices_at_position_S": choices_LS.sum(0).astype(np.int64),
        "domain_load_PLE": shares_PLE,
        "counts_LE": sums["counts_LE"].astype(np.int64),
        "entropy_L": sums["entropy_L"] / np.maximum(sums["tokens_L"], 1.0),
        "layers": np.asarray(config.moe_layers, np.int64),
        "domains": np.asarray(domains),
    }
