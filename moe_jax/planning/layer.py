"""One MoE layer alone, forward and backward, compiled for a mesh whose devices need not exist.

What the layer exchanges is easier to see without the model around it: the golden table of collectives
(``tests/golden_collectives.py``) and ``benchmarks/expert_parallel.py`` read it from this program.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from moe_jax.config import Config
from moe_jax.nn.moe import MoELayer, RoutingMode
from moe_jax.sharding import ACTIVATIONS, compiler_options, parameter_spec, spec


def lowered_layer(config: Config, mesh: jax.sharding.Mesh) -> Any:
    """``layer(parameters, x_BSD, seed) -> y_BSD, gradients`` of the loss Σ y²/2 with respect to parameters and input,
    as training calls the layer, lowered for ``mesh``, which must be in context.

    Parameters are fp32 and ``x_BSD`` is in ``model.dtype``, as ``data.batch_size`` rows of ``data.sequence_length``. The
    gradient of that loss with respect to y is y, so that nothing of the backward pass can run before the forward pass.
    """
    graph, parameters, x_BSD, seed = abstract_layer(config, mesh)

    def layer(parameters, x_BSD, seed):
        def output(parameters, x_BSD):
            valid_BS = jnp.ones(x_BSD.shape[:2], bool, out_sharding=spec("BS", ACTIVATIONS))
            bias_E = jnp.zeros(config.moe.num_routed_experts)
            module, key = nnx.merge(graph, parameters), jax.random.key(seed)
            return module(x_BSD, valid_BS, RoutingMode.training(config), bias_E, key)[0]

        y_BSD, pull = jax.vjp(output, parameters, x_BSD)
        return y_BSD, pull(y_BSD)

    return jax.jit(layer, compiler_options=compiler_options()).lower(parameters, x_BSD, seed)


def abstract_layer(config: Config, mesh: jax.sharding.Mesh) -> tuple[nnx.GraphDef, Any, Any, Any]:
    """``(graph, parameters, x_BSD, seed)``: the layer without its parameters; shapes and shardings of the arguments."""
    graph, parameters = nnx.split(nnx.eval_shape(lambda: MoELayer(config, nnx.Rngs(params=0))))

    def lies(path, leaf):
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        name = next(name for name in reversed(names) if "_" in name)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, parameter_spec(name, leaf.ndim)))

    shape = (config.data.batch_size, config.data.sequence_length, config.model.d_model)
    x_BSD = jax.ShapeDtypeStruct(shape, jnp.dtype(config.model.dtype),
                                 sharding=NamedSharding(mesh, spec("BSD", ACTIVATIONS)))
    return graph, jax.tree_util.tree_map_with_path(lies, parameters), x_BSD, jax.ShapeDtypeStruct((), jnp.int32)
