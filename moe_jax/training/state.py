"""Everything a run is at one step: what is checkpointed, and where it lies on the mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

from moe_jax.config import Config, ConfigError
from moe_jax.models.decoder import Decoder
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.lstm import LSTMModel
from moe_jax.routing.policy import keeps_running_mean
from moe_jax.sharding import parameter_spec
from moe_jax.training.optimizer import make_optimizer

# A TrainState is a plain dict, so that a checkpoint's paths are its keys:
#   step            int32, optimizer steps done
#   params          nested dict of fp32 parameters
#   opt_state       optax's
#   router_bias_LE  fp32 selection bias of loss-free balancing (zeros if unused; B32)
#   rng             typed key; the noise of a step is drawn from fold_in(rng, step + skipped)
#   skipped         int32, steps whose update was refused because something was not finite
#   ema             running mean of params, only if training.ema_decay > 0
#   policy_baseline fp32 [2], the running mean reward (moe_jax/routing/policy.py), only if moe.policy_baseline='running'
TrainState = dict[str, Any]

_VOCAB_MULTIPLE = 64


def table_size(config: Config, vocab_size: int) -> int:
    """Rows of the embedding table: model.vocab_size, or the vocabulary rounded up so that it divides over devices."""
    wanted = config.model.vocab_size or -(-vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE
    if wanted < vocab_size:
        raise ConfigError(f"model.vocab_size={wanted}: the vocabulary has {vocab_size} ids; set it to at least that, or "
                          f"to 0 to round up automatically.")
    return wanted


# By model.architecture.
_MODELS = {"transformer": Decoder, "lstm": LSTMModel}


def model_class(config: Config) -> type[nnx.Module]:
    """The class of the config's model, made of (config, vocab_size, rngs)."""
    return EncoderDecoder if config.model.encoder_layers else _MODELS[config.model.architecture]


@functools.lru_cache(maxsize=None)
def model_graph(config: Config, vocab_size: int) -> nnx.GraphDef:
    """The model without its parameters; ``nnx.merge(graph, params)`` gives a callable model."""
    return nnx.split(nnx.eval_shape(lambda: model_class(config)(config, vocab_size, nnx.Rngs(params=0))))[0]


def initial_params(config: Config, vocab_size: int, key: jax.Array) -> dict[str, Any]:
    """Fresh fp32 parameters; the same for the same key on any mesh (R12)."""
    model = model_class(config)(config, vocab_size, nnx.Rngs(params=key))
    return nnx.split(model)[1].to_pure_dict()


def initial_state(config: Config, vocab_size: int, seed: jax.Array | None = None) -> TrainState:
    """The state at step 0. ``seed``: uint32, instead of the config's; as an argument it is not compiled in."""
    root = jax.random.key(config.training.seed if seed is None else seed)
    init_key, noise_key = jax.random.split(root)
    params = initial_params(config, vocab_size, init_key)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": make_optimizer(config.optimizer, config.training.num_steps).init(params),
        "router_bias_LE": jnp.zeros((len(config.trained_moe_layers), max(1, config.moe.num_routed_experts)), jnp.float32),
        "rng": noise_key,
        "skipped": jnp.zeros((), jnp.int32),
    }
    if config.training.ema_decay:
        state["ema"] = jax.tree.map(jnp.copy, params)
    if keeps_running_mean(config.moe):
        state["policy_baseline"] = jnp.zeros(2, jnp.float32)
    return state


def abstract_state(config: Config, vocab_size: int, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state on ``mesh``, nothing allocated: what a checkpoint is restored into."""
    shapes = jax.eval_shape(lambda: initial_state(config, vocab_size))
    return jax.tree.map(lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)),
                        shapes, state_specs(shapes))


def state_specs(state: TrainState) -> TrainState:
    """PartitionSpec of every leaf. Moments that mirror a parameter lie where it lies, everything else is replicated."""
    shapes = {_names(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state["params"])}

    def spec(path, leaf):
        names = _names(path)
        for start in range(len(names)):
            if shapes.get(names[start:]) == leaf.shape:
                return parameter_spec(names[-1], len(leaf.shape))
        return P()

    return jax.tree_util.tree_map_with_path(spec, state)


def _names(path) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)


def new_state(config: Config, vocab_size: int, mesh: jax.sharding.Mesh) -> TrainState:
    """The initial state on the mesh; each device makes only its share."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, vocab_size, mesh))
    # Compiled once for all seeds.
    return jax.jit(lambda seed: initial_state(config, vocab_size, seed), out_shardings=shardings)(np.uint32(config.training.seed))
