"""Text from a model, with a key/value cache. A sample does not depend on what else is in its batch."""

import dataclasses
import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

from moe_jax.config import Config
from moe_jax.data.vocabularies import Vocabulary
from moe_jax.models.encoder_decoder import Given
from moe_jax.nn.moe import RoutingMode
from moe_jax.sharding import TOKEN_AXES, compiler_options
from moe_jax.training import processes
from moe_jax.training.state import model_graph

# Prompts are padded on the left to a multiple of this, so that few lengths have to be compiled.
_PROMPT_MULTIPLE = 16


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; static.

    Attributes:
      temperature: 0 = greedy.
      top_k: only the k likeliest tokens; 0 = all.
      top_p: only the likeliest tokens that together have this probability; 1 = all.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or a finite number above.")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be 0 (all tokens) or above.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1.")


def generate(params: Any, config: Config, vocab_size: int, prompts: list[list[int]], max_tokens: int,
             sampling: Sampling = Sampling(), seed: int = 0, bias_LE: jax.Array | None = None, eos_id: int = 1,
             used_ids: int = 0, starts: list[list[int]] | None = None, begin: tuple[int, ...] = (0,),
             ends: tuple[int, ...] | None = None, never: tuple[int, ...] = (0,)) -> list[list[int]]:
    """Continues each prompt by up to ``max_tokens`` ids; stops a sample at any of ``ends``. An encoder–decoder's encoder reads the
    prompt, with ``eos_id`` behind it, and the decoder writes from nothing.

    Routing is dropless, so no token's experts depend on its neighbours (B43), and the random stream of a row follows
    from ``seed`` and its prompt, so a prompt gives the same sample alone and in any batch (twice the same prompt: twice
    the same sample; another seed gives another).

    Args:
      params: on the current mesh (``jax.set_mesh``).
      prompts: token ids, where a decoder reads them with ``begin`` in front.
      eos_id: what closes a text.
      used_ids: number of real ids in the vocabulary; rows of the table beyond are never drawn. 0: all are real.
      starts: of an encoder–decoder: for each prompt what its decoder begins with instead of ``begin`` (NLLB: [2, language]).
      begin: what training has before a text; () for an imported model that has nothing there.
      ends: None: ``eos_id`` alone.
      never: ids that are not drawn: by default 0, padding and the beginning of text, which is never a target here.

    Raises:
      ValueError: no prompts, ``max_tokens`` < 1, a prompt of nothing without ``begin``, or ``starts`` where there is no encoder or
        not one of an id at least for each prompt.
    """
    if not prompts or max_tokens < 1:
        raise ValueError(f"{len(prompts)} prompts, max_tokens={max_tokens}: both must be at least 1.")
    mesh = jax.sharding.get_abstract_mesh()
    shards = int(np.prod([mesh.shape[axis] for axis in TOKEN_AXES]))
    rows = -(-len(prompts) // shards) * shards
    given = None
    if config.model.encoder_layers:
        read = [[*prompt, eos_id] for prompt in prompts]
        given, written = _padded(read, rows), starts or [list(begin)] * len(prompts)
        if len(written) != len(prompts) or not all(written):
            raise ValueError(f"starts={starts!r}: wanted is a list of at least one id for each of {len(prompts)} prompts.")
        if len(prompts) > 1 and RoutingMode.causal(config).compares_tokens(config):
            # How much of a prompt each expert takes follows from the length of its row, so each has a row as if it were alone.
            alone = functools.partial(generate, params, config, vocab_size, max_tokens=max_tokens, sampling=sampling, seed=seed,
                                      bias_LE=bias_LE, eos_id=eos_id, used_ids=used_ids, ends=ends, never=never)
            return [alone(prompts=[prompt], starts=[start])[0] for prompt, start in zip(prompts, written)]
        ids_BS, valid_BS = _padded(written, rows, 1)
        hashed = [[*prompt, *start] for prompt, start in zip(read, written)]
    else:
        if starts is not None:
            raise ValueError("starts: is what a decoder behind an encoder begins with, and this model has no encoder.")
        hashed = [[*begin, *prompt] for prompt in prompts]
        if not all(hashed):
            raise ValueError(f"prompts={prompts!r}: without begin each must have an id at least.")
        ids_BS, valid_BS = _padded(hashed, rows)
    hashes = [zlib.crc32(np.asarray(prompt, np.int32).tobytes()) for prompt in hashed]
    prompt_hash_B = np.asarray(hashes + hashes[-1:] * (rows - len(hashes)), np.uint32)
    ends = (eos_id,) if ends is None else tuple(ends)
    run = _compiled(config, vocab_size, max_tokens, sampling, ends, used_ids or vocab_size, tuple(never))
    run = processes.compiled_together(run, "generation")
    if bias_LE is None:
        bias_LE = jnp.zeros((len(config.moe_layers), max(1, config.moe.num_routed_experts)), jnp.float32)
    out_BT = np.asarray(jax.device_get(run(params, ids_BS, valid_BS, bias_LE, jax.random.key(seed), prompt_hash_B, given)))
    samples = []
    for row in out_BT[: len(prompts)].tolist():
        samples.append(row[: next((place for place, number in enumerate(row) if number in ends), len(row))])
    return samples


def generate_texts(params: Any, config: Config, vocab_size: int, vocabulary: Vocabulary, texts: list[str], max_tokens: int,
                   sampling: Sampling = Sampling(), seed: int = 0, bias_LE: jax.Array | None = None) -> list[str]:
    """:func:`generate` with prompts and samples as text, and the special ids of the vocabulary. A prompt of nothing begins as a
    document in training does."""
    prompts, begin = [np.asarray(vocabulary.encode(text)).tolist() for text in texts], vocabulary.prompt_begin
    if config.model.encoder_layers:
        begin = (vocabulary.begin_id,)
    elif not begin:
        prompts = [prompt or [vocabulary.begin_id] for prompt in prompts]
    samples = generate(params, config, vocab_size, prompts, max_tokens, sampling, seed, bias_LE, vocabulary.eos_id,
                       vocabulary.vocab_size, begin=begin, ends=vocabulary.end_ids, never=vocabulary.never_ids)
    return [vocabulary.decode(sample) for sample in samples]


def _padded(prompts: list[list[int]], rows: int, multiple: int = _PROMPT_MULTIPLE) -> tuple[np.ndarray, np.ndarray]:
    """(ids, valid), each ``[rows, S]``, padded on the left to a multiple of so many; the last prompt fills the rows."""
    width = -(-max(map(len, prompts)) // multiple) * multiple
    ids_BS, valid_BS = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    for row in range(rows):
        prompt = prompts[min(row, len(prompts) - 1)]
        ids_BS[row, width - len(prompt):] = prompt
        valid_BS[row, width - len(prompt):] = True
    return ids_BS, valid_BS


@functools.lru_cache(maxsize=8)
def _compiled(config, vocab_size, max_tokens, sampling, ends, used_ids, never):
    return jax.jit(functools.partial(_generate, config=config, vocab_size=vocab_size, max_tokens=max_tokens,
                                     sampling=sampling, ends=ends, used_ids=used_ids, never=never),
                   compiler_options=compiler_options())


def _generate(params, ids_BS, valid_BS, bias_LE, key, prompt_hash_B, given, *, config, vocab_size, max_tokens, sampling, ends, used_ids,
              never):
    """Prefill, then one token at a time; ``[B, max_tokens]`` ids; after an end that id again."""
    width = ids_BS.shape[1]
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jax.reshard(prompt_hash_B, P(TOKEN_AXES)))
    logits_BV, written = prefill(params, ids_BS, valid_BS, bias_LE, config, vocab_size, width + max_tokens, given)
    first_B = _draw(logits_BV, keys_B, 0, sampling, used_ids, never)

    def step(carry, i):
        token_B, ended_B, written = carry
        ended_B = ended_B | is_one_of(token_B, ends)
        logits_BV, written = decode(params, written, token_B, width + i, bias_LE, config, vocab_size)
        next_B = _draw(logits_BV, keys_B, i + 1, sampling, used_ids, never)
        next_B = jnp.where(ended_B, token_B, next_B)
        return (next_B, ended_B, written), token_B

    _, tokens_TB = jax.lax.scan(step, (first_B, jnp.zeros_like(first_B, bool), written), jnp.arange(max_tokens))
    return jax.reshard(tokens_TB.T, P())  # every process reads all rows


class Written(NamedTuple):
    """What the model has read and written so far.

    cache: keys and values of T slots, :meth:`moe_jax.models.decoder.Decoder.empty_cache`, or the states of LSTMs. segments_BT:
    1 where a slot is filled. last_B: the newest token. position_B: that of the next one. given: what the encoder, if there is
    one, has read; what is made of it is in the cache.
    """

    cache: Any
    segments_BT: jax.Array
    last_B: jax.Array
    position_B: jax.Array
    given: Given | None = None


def prefill(params: Any, ids_BS: jax.Array, valid_BS: jax.Array, bias_LE: jax.Array, config: Config, vocab_size: int,
            slots: int, given: tuple[jax.Array, jax.Array] | None = None) -> tuple[jax.Array, Written]:
    """Reads prompts, padded on the left, into an empty cache of ``slots`` tokens.

    Args:
      given: (ids, valid) for an encoder, ``[B, T]``; the prompts are then what the decoder begins with.

    Returns:
      The logits of each row's next token, fp32 ``[B, V]``, and what was read.
    """
    model = nnx.merge(model_graph(config, vocab_size), params)
    batch, width = ids_BS.shape
    ids_BS, valid_BS, positions_BS = _placed(ids_BS, valid_BS)
    segments_BT = jnp.pad(valid_BS.astype(jnp.int32), ((0, 0), (0, slots - width)))
    if given is not None:
        given_ids_BT, given_valid_BT, given_positions_BT = _placed(*given)
        given = Given(given_ids_BT, given_positions_BT, given_valid_BT.astype(jnp.int32), given_valid_BT)
        output = model(ids_BS, positions_BS, valid_BS.astype(jnp.int32), valid_BS, RoutingMode.causal(config), bias_LE, None,
                       model.empty_cache(batch, slots, given_ids_BT.shape[1]), segments_BT, 0, given=given)
        return output.logits_BSV[:, -1], Written(output.cache, segments_BT, ids_BS[:, -1], positions_BS[:, -1] + 1, given)
    cache = model.empty_cache(batch, slots)
    # A model that was trained to see what it is given from both sides reads prompts so.
    in_prefix_BS = valid_BS if config.data.prefix_attention == "bidirectional" else None
    output = model(ids_BS, positions_BS, valid_BS.astype(jnp.int32), valid_BS, RoutingMode.causal(config), bias_LE, None,
                   cache, segments_BT, 0, in_prefix_BS=in_prefix_BS)
    return output.logits_BSV[:, -1], Written(output.cache, segments_BT, ids_BS[:, -1], positions_BS[:, -1] + 1)


def _placed(ids_BS, valid_BS):
    """(ids, valid, positions) where tokens lie."""
    ids_BS, valid_BS = jax.reshard(ids_BS, P(TOKEN_AXES)), jax.reshard(valid_BS, P(TOKEN_AXES))
    # Positions count from the first real token; padding on the left is seen by nobody.
    return ids_BS, valid_BS, jnp.maximum(jnp.cumsum(valid_BS, axis=1, dtype=jnp.int32) - 1, 0)


def decode(params: Any, written: Written, token_B: jax.Array, index: jax.Array | int, bias_LE: jax.Array, config: Config,
           vocab_size: int) -> tuple[jax.Array, Written]:
    """Reads one token more per row, into slot ``index``; as :func:`prefill`."""
    model = nnx.merge(model_graph(config, vocab_size), params)
    one_B1 = jnp.ones_like(token_B)[:, None]
    segments_BT = jax.lax.dynamic_update_slice_in_dim(written.segments_BT, one_B1, index, 1)
    pair = {} if written.given is None else {"given": written.given, "encode": False}
    output = model(token_B[:, None], written.position_B[:, None], one_B1, one_B1.astype(bool), RoutingMode.causal(config),
                   bias_LE, None, written.cache, segments_BT, index, written.last_B[:, None], **pair)
    return output.logits_BSV[:, 0], Written(output.cache, segments_BT, token_B, written.position_B + 1, written.given)


def lowered(step: str, config: Config, vocab_size: int, params: Any, bias_LE: Any, batch: int, length: int,
            target_length: int = 0) -> jax.stages.Lowered:
    """``'prefill'`` of prompts of ``length`` tokens, or ``'decode'`` of one token more in the last of so many slots, ready
    to be compiled; parameters and bias by shape (:func:`moe_jax.training.state.abstract_state`). The mesh is in context.

    Behind an encoder, which reads the prompts, a decoder begins with one token and has ``target_length`` slots.
    """
    mesh = jax.sharding.get_mesh()
    rows = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(TOKEN_AXES)))
    ids_and_valid = lambda length: (rows(batch, length, dtype=jnp.int32), rows(batch, length, dtype=bool))
    reads = functools.partial(prefill, config=config, vocab_size=vocab_size, slots=target_length or length)
    prompts = (params, *ids_and_valid(length), bias_LE)
    if target_length:
        reads = lambda params, ids_BS, valid_BS, bias_LE, given: prefill(params, ids_BS, valid_BS, bias_LE, config, vocab_size,
                                                                         target_length, given)
        prompts = (params, *ids_and_valid(1), bias_LE, ids_and_valid(length))
    if step == "prefill":
        return jax.jit(reads, compiler_options=compiler_options()).lower(*prompts)
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.sharding.spec))
    written = jax.tree.map(place, jax.eval_shape(reads, *prompts)[1])
    writes = jax.jit(functools.partial(decode, config=config, vocab_size=vocab_size), donate_argnums=1,
                     compiler_options=compiler_options())
    return writes.lower(params, written, rows(batch, dtype=jnp.int32), jax.ShapeDtypeStruct((), jnp.int32), bias_LE)


def is_one_of(ids: jax.Array, numbers: tuple[int, ...]) -> jax.Array:
    """Where an id is any of a few."""
    return functools.reduce(jnp.logical_or, [ids == number for number in numbers], jnp.zeros(ids.shape, bool))


def _draw(logits_BV, keys_B, index, sampling, used_ids, never):
    """One id per row, by the row's own key: the draw depends on nothing else in the batch."""
    # [B, V_tensor] -> all-gather -> [B, V]: sorting needs a row whole.
    logits_BV = jax.reshard(logits_BV, P(TOKEN_AXES))
    number_1V = jnp.arange(logits_BV.shape[-1])[None, :]
    logits_BV = jnp.where((number_1V < used_ids) & ~is_one_of(number_1V, never), logits_BV, -jnp.inf)
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k:
        least_B1 = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) - jax.nn.softmax(sorted_BV, axis=-1)
        # The likeliest tokens until their probability reaches top_p; the first always stays.
        least_B1 = jnp.min(jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, index), logits_BV.shape[-1:]))(keys_B)
    return jnp.argmax(logits_BV + noise_BV, axis=-1).astype(jnp.int32)
