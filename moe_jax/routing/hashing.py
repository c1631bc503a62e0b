"""Fixed routing: the expert follows from the token's id and place, and nothing is learned (Roller et al. 2021).

Every choice is a pure function of ids, positions and ``moe.hash_seed``, or a look-up in a table that was built once
(:mod:`moe_jax.routing.hash_tables`). All MoE layers use the same function.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ConfigError, MoEConfig, nearest_divisors
from moe_jax.routing.assignment import RouterInputs, Routing, token_choice_list
from moe_jax.routing.balance import router_statistics


def scrambled(value: jax.Array, seed: jax.Array | int) -> jax.Array:
    """A fixed random-looking uint32 of an int32: the finaliser of MurmurHash3 over value and seed."""
    bits = value.astype(jnp.uint32) ^ (jnp.asarray(seed, jnp.uint32) * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


def random_hash(inputs: RouterInputs, seed: int) -> jax.Array:
    """By the token: the random hash of Roller et al. 2021 §3.1."""
    return scrambled(inputs.token_ids_T, seed)


def previous_token_hash(inputs: RouterInputs, seed: int) -> jax.Array:
    """By the token before (id 0 before a document's first one)."""
    return scrambled(inputs.previous_ids_T, seed)


def bigram_hash(inputs: RouterInputs, seed: int) -> jax.Array:
    """By the token and the one before it."""
    return scrambled(inputs.token_ids_T.astype(jnp.uint32) ^ scrambled(inputs.previous_ids_T, seed + 1), seed)


def position_hash(inputs: RouterInputs, seed: int) -> jax.Array:
    """By the position in the document, modulo the number of experts."""
    del seed
    return inputs.positions_T.astype(jnp.uint32)


COMPUTED = {"random": random_hash, "bigram": bigram_hash, "previous_token": previous_token_hash,
            "position": position_hash}
# What the file moe.hash_table was built as; all are looked up alike. Builders: moe_jax.routing.hash_tables.
TABLES = ("balanced", "clustered", "dispersed")


def hashed(inputs: RouterInputs, moe: MoEConfig) -> Routing:
    """expert = table[token], gate 1: no router parameters and no gradient (Roller et al. 2021 eq. 3).

    With K = ``moe.experts_per_token`` > 1 it is MultiHash (§3.4): hash k chooses the k-th slice of the feed-forward
    network, from a pool of its own. The outputs of slices add up, so a slice is an expert of width F/K here: experts
    k·E/K … (k+1)·E/K - 1 are the pool of hash k.

    Returns:
      Routing with N = T·K.
    """
    valid_T, choices, pool = inputs.valid_T, moe.experts_per_token, moe.num_experts // moe.experts_per_token
    if moe.hash_function in TABLES:
        table_V = jnp.asarray(load_table(moe.hash_table, moe.num_experts))
        # Ids beyond the table's end are rows that round up the embedding table; they are never input.
        expert_TK = table_V.at[inputs.token_ids_T].get(mode="clip")[:, None]
    else:
        function = COMPUTED[moe.hash_function]
        expert_TK = jnp.stack([(function(inputs, moe.hash_seed + 1000 * k) % pool).astype(jnp.int32) + k * pool
                               for k in range(choices)], axis=1)
    expert_TK = jnp.where(valid_T[:, None], expert_TK, moe.num_experts).astype(jnp.int32)
    chosen_TE = jnp.any(expert_TK[:, :, None] == jnp.arange(moe.num_experts)[None, None, :], axis=1)
    gate_TK = jnp.broadcast_to(valid_T[:, None], expert_TK.shape).astype(jnp.float32)
    # There are no logits. What stands in for them has the choice as its largest, and its shares as probabilities.
    chosen_TE = chosen_TE.astype(jnp.float32)
    statistics = router_statistics(chosen_TE, chosen_TE / choices, expert_TK.reshape(-1), valid_T,
                                   per_token=inputs.per_token)
    return token_choice_list(expert_TK, gate_TK, moe.fill_order, statistics)


@functools.lru_cache(maxsize=8)
def load_table(path: str, num_experts: int) -> np.ndarray:
    """The expert of every token id, int32 ``[V]``.

    Raises:
      ConfigError: no such file, not one dimension of integers, or an expert that does not exist.
    """
    where = f"moe.hash_table={path!r}"
    try:
        table_V = np.load(os.path.expanduser(path), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: cannot be read as a .npy file ({error}); build one with "
                          f"moe_jax.routing.hash_tables.") from error
    if not isinstance(table_V, np.ndarray) or table_V.ndim != 1 or table_V.dtype.kind not in "iu" or not table_V.size:
        found = f"{table_V.dtype} {list(table_V.shape)}" if isinstance(table_V, np.ndarray) else "an .npz archive"
        raise ConfigError(f"{where}: holds {found}; wanted is a .npy of one integer, the expert, per token id.")
    if table_V.min() < 0 or table_V.max() >= num_experts:
        raise ConfigError(f"{where}: names experts {table_V.min()} to {table_V.max()}, but moe.num_experts={num_experts} "
                          f"has 0 to {num_experts - 1}; build the table for this number of experts.")
    return table_V.astype(np.int32)


# Settings that have no meaning where nothing is learned, and the only value allowed.
_WITHOUT_MEANING = (("balance_weight", 0.0), ("router_z_weight", 0.0), ("bias_update_rate", 0.0),
                    ("router_jitter", 0.0), ("router_dtype", "float32"), ("renormalize", False), ("gate_order", "softmax_then_top_k"))


def check_hash(moe: MoEConfig) -> None:
    """Refuses settings of a learned router, and tables that are missing, superfluous or broken."""
    for field, wanted in _WITHOUT_MEANING:
        value = getattr(moe, field)
        if value != wanted:
            raise ConfigError(f"moe.{field}={value!r}: has no meaning for moe.router='hash' (routes are fixed, gates are "
                              f"1 and the router has no parameters to train); set it to {wanted!r}.")
    if moe.fill_order == "batch_prioritized":
        raise ConfigError("moe.fill_order='batch_prioritized': sorts tokens by their gate, which is 1 for all with "
                          "moe.router='hash'; set it to 'token_major'.")
    if moe.hash_function in TABLES:
        _check_table(moe)
    elif moe.hash_table:
        raise ConfigError(f"moe.hash_table={moe.hash_table!r}: has no effect with moe.hash_function="
                          f"{moe.hash_function!r}; set it to '', or hash_function to one of {', '.join(TABLES)}.")
    if moe.num_experts % moe.experts_per_token:
        near = nearest_divisors(moe.experts_per_token, moe.num_experts)
        raise ConfigError(f"moe.experts_per_token={moe.experts_per_token}: MultiHash gives every hash an equal pool of the "
                          f"moe.num_experts={moe.num_experts} experts; nearest legal values: {near}.")
    if moe.hash_function == "position" and (moe.experts_per_token > 1 or moe.hash_seed):
        field = "experts_per_token" if moe.experts_per_token > 1 else "hash_seed"
        raise ConfigError(f"moe.{field}={getattr(moe, field)}: moe.hash_function='position' is the position modulo the "
                          f"number of experts, without a seed; set it to {1 if field == 'experts_per_token' else 0}.")


def _check_table(moe: MoEConfig) -> None:
    if not moe.hash_table:
        raise ConfigError(f"moe.hash_table='': moe.hash_function={moe.hash_function!r} looks experts up in a .npy file; "
                          f"build one with moe_jax.routing.hash_tables and give its path.")
    if moe.hash_seed:
        raise ConfigError(f"moe.hash_seed={moe.hash_seed}: has no effect with a table; set it to 0.")
    if moe.experts_per_token != 1:
        raise ConfigError(f"moe.experts_per_token={moe.experts_per_token}: a table names one expert per token; set it to "
                          f"1, or moe.hash_function='random' for MultiHash.")
    load_table(moe.hash_table, moe.num_experts)


def hash_is_causal(moe: MoEConfig) -> bool:
    """Always: routes know this token, the one before and the position; and who is dropped depends on no later token in any
    order, because every hash fills experts of its own (B53)."""
    del moe
    return True
