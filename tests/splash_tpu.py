"""Compiles attention by the kernel, forward and backward, for a TPU; run as a program, since a process compiles for one platform.

    python tests/splash_tpu.py v5e:2x2

Keys of width 192, values of 64, windows of 600 tokens, a sink per head, two devices along ``tensor``. Prints the FLOPs that
the planner reads from the program.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding

from moe_jax.nn.splash import splash
from moe_jax.planning.operations import work
from moe_jax.sharding import ACTIVATIONS, AXES, spec

HEADS, LENGTH, WINDOW, WIDTHS = 4, 1024, 600, {"query": 192, "key": 192, "value": 64}


def main(topology):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = jax.sharding.Mesh(np.array(devices[:2]).reshape(1, 1, 1, 2), AXES, axis_types=(AxisType.Explicit,) * 4)
    with jax.set_mesh(mesh):
        on = lambda shape, letters, dtype: jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, spec(letters, ACTIVATIONS)))
        given = [on((2, LENGTH, HEADS, width), "BSHd", jnp.bfloat16) for width in WIDTHS.values()]
        given += [on((2, LENGTH), "BS", jnp.int32), on((HEADS,), "H", jnp.float32)]

        def loss(query, key, value, segment_ids_BS, sink_H):
            return jnp.sum(splash(query, key, value, segment_ids_BS, 0.1, window=WINDOW, sink_H=sink_H).astype(jnp.float32))

        program = jax.jit(jax.grad(loss, (0, 1, 2, 4))).lower(*given).compile()
    found = work(program.as_text())
    assert not found.uncounted_kernels, found.uncounted_kernels
    print(int(found.kernel_flops))


if __name__ == "__main__":
    main(sys.argv[1])
