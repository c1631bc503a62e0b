"""A model small enough to compile in seconds, batches for it, and its forward pass, gradients and step on any mesh."""

import dataclasses
import functools

import jax
import numpy as np
from jax.sharding import NamedSharding

from moe_jax.config import Config, DataConfig, MoEConfig, resolve
from moe_jax.nn.moe import RoutingMode
from moe_jax.routing import ROUTERS
from moe_jax.routing.policy import keeps_running_mean
from moe_jax.sharding import AXES, make_mesh, parameter_spec
from moe_jax.training.evaluate import put_batch
from moe_jax.training.optimizer import make_optimizer
from moe_jax.training.state import initial_params, state_specs
from moe_jax.training.step import forward, gradients, train_step

VOCAB = 32
# Compiling is nearly all the time these tests take; this halves it.
QUICK = {"xla_backend_optimization_level": 0}
DROPLESS = RoutingMode.dropless()


def config(**settings) -> Config:
    """The tiny config with settings named section_field: ``config(moe_dispatch='einsum', data_batch_size=4)``.

    SGD without clipping or decay, so that a wrong factor in a gradient shows in the parameters (B44).
    """
    sections = {
        "model": dict(num_layers=4, d_model=16, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=32, init_scale=1.0),
        "attention": {},
        "moe": dict(num_experts=4, experts_per_token=2, every=2, d_ff=16, min_capacity=1, router_init=0.5,
                    router_z_weight=0.001),
        "data": dict(sequence_length=16, batch_size=8),
        "mesh": {},
        "optimizer": dict(name="sgd", learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.0,
                          clip_norm=0.0),
        "training": dict(num_steps=20),
    }
    for name, value in settings.items():
        section, field = name.split("_", 1)
        sections[section][field] = value
    return resolve(sections)


def mesh(data=1, fsdp=1, expert=1, tensor=1) -> jax.sharding.Mesh:
    return make_mesh(dict(zip(AXES, (data, fsdp, expert, tensor))))


ONE = mesh()


def batch(rows=8, length=16, seed=0, lengths=None, segments=1) -> dict[str, np.ndarray]:
    """Random ids as ``moe_jax.data.batches`` lays them out.

    Args:
      lengths: valid tokens of each row, padding behind them; all if None.
      segments: equal documents per row.
    """
    rng = np.random.default_rng(seed)
    target_BS = rng.integers(1, VOCAB, (rows, length), dtype=np.int32)
    place_S = np.arange(length, dtype=np.int32)
    size = length // segments
    input_BS = np.where(place_S % size == 0, 0, np.roll(target_BS, 1, axis=1)).astype(np.int32)
    values = {
        "input_ids": input_BS,
        "target_ids": target_BS,
        "valid": np.ones((rows, length), bool),
        "segment_ids": np.broadcast_to(place_S // size + 1, (rows, length)).astype(np.int32),
        "positions": np.broadcast_to(place_S % size, (rows, length)).astype(np.int32),
        "domain_ids": np.broadcast_to(np.arange(rows)[:, None] % 2, (rows, length)).astype(np.int32),
        "document_ids": np.broadcast_to(np.arange(rows)[:, None], (rows, length)).astype(np.int32),
    }
    if lengths is not None:
        values["valid"] = place_S[None, :] < np.asarray(lengths)[:, None]
        values = emptied(values)
    return values


PADDING = {"input_ids": 0, "target_ids": 0, "segment_ids": 0, "positions": 0, "domain_ids": -1, "document_ids": -1}


def emptied(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch with what the data pipeline writes where nothing is valid."""
    empty = {name: np.where(values["valid"], values[name], fill).astype(np.int32) for name, fill in PADDING.items()}
    return {**values, **empty}


def params(config: Config):
    """Initial parameters on the host, in a tree of the caller's own. Configs of one architecture share the arrays:
    drawing compiles for seconds."""
    model = dataclasses.replace(config.model, dtype="float32", remat="none")
    moe = dataclasses.replace(MoEConfig(), **{name: getattr(config.moe, name) for name in (
        "num_experts", "experts_per_token", "every", "first", "first_dense_layers", "layers", "encoder_layers", "d_ff", "activation",
        "num_shared_experts", "shared_d_ff", "shared_gate", "router_bias", "expert_bias", "residual_ffn", "router_init",
        "num_identity_experts", "num_zero_experts", "num_constant_experts")})
    tree = jax.tree.map(lambda leaf: leaf, _params(Config(model=model, attention=config.attention, moe=moe, data=_rows(config))))
    return tree if config.moe.is_dense or ROUTERS[config.moe.router].learned else without(tree, "w_router_DE")


def _rows(config: Config) -> DataConfig:
    """What an encoder–decoder must know of its rows; of no use to parameters."""
    if not config.model.encoder_layers:
        return DataConfig()
    return DataConfig(objective=config.data.objective, target_length=config.data.target_length)


def pair(rows=8, given=16, written=12, given_lengths=None, written_lengths=None, segments=1, seed=0) -> dict[str, np.ndarray]:
    """A batch for an encoder–decoder: :func:`batch` of ``written`` tokens, and one of ``given`` for the encoder, whose ids begin
    with a token."""
    encoder = batch(rows, given, seed + 1, None, segments)
    encoder["input_ids"] = encoder.pop("target_ids")
    if given_lengths is not None:
        encoder["valid"] = np.arange(given)[None, :] < np.asarray(given_lengths)[:, None]
        encoder = {**encoder, **{name: np.where(encoder["valid"], encoder[name], fill).astype(np.int32)
                                 for name, fill in PADDING.items() if name in encoder}}
    decoder = batch(rows, written, seed, written_lengths, segments)
    return {**decoder, **{f"encoder_{name}": values for name, values in encoder.items()}}


def without(tree, name: str):
    """A tree of dictionaries and lists without the entries of that name."""
    if isinstance(tree, dict):
        return {key: without(value, name) for key, value in tree.items() if key != name}
    return [without(value, name) for value in tree] if isinstance(tree, list) else tree


@functools.lru_cache(maxsize=None)
def _params(config):
    with jax.set_mesh(ONE):
        return jax.device_get(jax.jit(lambda: initial_params(config, VOCAB, jax.random.key(0)), compiler_options=QUICK)())


def placed(tree, mesh, specs=None):
    """The tree on the mesh, by default parameters where :func:`moe_jax.sharding.parameter_spec` wants them."""
    if specs is None:
        specs = jax.tree_util.tree_map_with_path(lambda path, leaf: parameter_spec(path[-1].key, leaf.ndim), tree)
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)


@functools.lru_cache(maxsize=None)
def _forward(config, mode):
    return jax.jit(lambda params, batch, bias_LE: forward(config, VOCAB, params, batch, mode, bias_LE),
                   compiler_options=QUICK)


def no_bias(config: Config) -> np.ndarray:
    return np.zeros((len(config.trained_moe_layers), max(1, config.moe.num_routed_experts)), np.float32)


def output(config, params, batch, mode=DROPLESS, bias_LE=None, mesh=ONE):
    """The decoder's :class:`Output`, on the host."""
    bias_LE = no_bias(config) if bias_LE is None else bias_LE
    with jax.set_mesh(mesh):
        return jax.device_get(_forward(config, mode)(placed(params, mesh), put_batch(batch, mesh), bias_LE))


def logits(config, params, batch, mode=DROPLESS, **options):
    return output(config, params, batch, mode, **options).logits_BSV


@functools.lru_cache(maxsize=None)
def _gradients(config):
    return jax.jit(lambda params, batch, bias_LE, key: gradients(params, config, VOCAB, batch, bias_LE, key),
                   compiler_options=QUICK)


def grads(config, params, batch, mesh=ONE, seed=0):
    """(gradients, metrics) of the training loss, on the host."""
    with jax.set_mesh(mesh):
        return jax.device_get(_gradients(config)(placed(params, mesh), put_batch(batch, mesh), no_bias(config),
                                                 jax.random.key(seed)))


@functools.lru_cache(maxsize=None)
def _step(config):
    return jax.jit(functools.partial(train_step, config=config, vocab_size=VOCAB), compiler_options=QUICK)


def step(config, state, batch, mesh=ONE):
    """One training step; the state stays on the mesh, the metrics come to the host."""
    with jax.set_mesh(mesh):
        state, metrics = _step(config)(state, put_batch(batch, mesh))
        return state, jax.device_get(metrics)


def state(config, mesh=ONE, **changes):
    """The state at step 0 on the mesh, made of :func:`params`; ``changes`` replaces entries."""
    host = {
        "step": np.int32(0),
        "params": params(config),
        "opt_state": make_optimizer(config.optimizer, config.training.num_steps).init(params(config)),
        "router_bias_LE": no_bias(config),
        "rng": jax.random.key(config.training.seed),
        "skipped": np.int32(0),
    }
    if config.training.ema_decay:
        host["ema"] = host["params"]
    if keeps_running_mean(config.moe):
        host["policy_baseline"] = np.zeros(2, np.float32)
    host |= changes
    return placed(host, mesh, state_specs(host))


def leaves(tree) -> dict[str, np.ndarray]:
    """``{'body.layers.1.moe.w_router_DE': array}``."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path): np.asarray(leaf)
            for path, leaf in paths}


def assert_close(actual, expected, rtol=1e-5, atol=1e-6):
    """Two trees of arrays, leaf by leaf; the message names the leaf."""
    actual, expected = leaves(actual), leaves(expected)
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], rtol, atol, err_msg=name)


def assert_replicas_agree(tree):
    """Every device that holds a piece of an array holds the same piece, bit for bit."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        first = {}
        for shard in leaf.addressable_shards:
            piece = np.asarray(shard.data)
            expected = first.setdefault(str(shard.index), piece)
            np.testing.assert_array_equal(piece, expected, err_msg=f"{jax.tree_util.keystr(path)} on {shard.device}")


def assert_equal(actual, expected):
    actual, expected = leaves(actual), leaves(expected)
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], err_msg=name)
