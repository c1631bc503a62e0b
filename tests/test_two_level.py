"""Experts on nodes of several devices: a token crosses to a node once, and nothing else changes.

Eight CPU devices as X nodes; the yardstick is ``reference`` on one of them, which ``test_dispatch`` holds to a loop.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from test_dispatch import LETTERS, from_choices, problem, random_choices
from tiny import ONE, QUICK, mesh

from moe_jax.dispatch import dispatcher
from moe_jax.dispatch.dropless import dropless
from moe_jax.dispatch.expert_parallel import Exchange
from moe_jax.dispatch.two_level import levels, visited_nodes
from moe_jax.nn.experts import Experts
from moe_jax.routing.assignment import Routing
from moe_jax.sharding import gathered, per_device

G, T, E, K = 8, 12, 16, 4


def near(seed=0):
    """Every token chooses among the experts of two of eight devices."""
    rng = np.random.default_rng(seed)
    device_GTM = np.argsort(rng.random((G, T, 8)), axis=-1)[..., :2]
    return (2 * device_GTM[..., :, None] + np.arange(2)).reshape(G, T, K)


def crowded():
    """Every first choice is expert 5; one device's tokens all go nowhere."""
    expert_GTK = random_choices(G, T, E, K, 1)
    expert_GTK[..., 0] = 5
    expert_GTK[..., 1:] = np.where(expert_GTK[..., 1:] == 5, E, expert_GTK[..., 1:])
    expert_GTK[3] = E
    return expert_GTK


LISTS = {
    "random, masked": random_choices(G, T, E, K, masked=0.3),
    "empty experts": random_choices(G, T, 5, K, 2) * 3,  # 0, 3, 6, 9, 12
    "one expert takes all": crowded(),
    "two devices a token": near(),
}


@functools.lru_cache(maxsize=None)
def compiled(mesh, exchange, order, gate_on="output"):
    with jax.set_mesh(ONE):
        experts = Experts(1, 1, 1, "swiglu", 1.0, nnx.Rngs(0))

    def loss(x_GTD, gate_GN, weights, token_GN, expert_GN, dy_GTD):
        routing_G = Routing(token_GN, expert_GN, gate_GN, None, K, order, gate_on)
        weights = {name: gathered(weight, LETTERS[name], "float32") for name, weight in weights.items()}
        dispatch = dispatcher("reference") if exchange is None else functools.partial(dropless, exchange=exchange)
        y_GTD, kept_GN = dispatch(x_GTD, routing_G, experts.function, weights, E, 0)
        return jnp.sum(y_GTD * dy_GTD), (y_GTD, kept_GN)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICK)


def run(mesh, exchange, expert_GTK, order="token_major", gate_on="output"):
    lists, (x, weights, dy) = from_choices(expert_GTK, order), problem(G, T, E)
    with jax.set_mesh(mesh):
        weights = {name: jax.device_put(w, P("expert")) for name, w in weights.items()}
        function = compiled(mesh, exchange, lists.order, gate_on)
        (_, (y, kept)), grads = jax.device_get(function(x, lists.gate_GN, weights, lists.token_GN, lists.expert_GN, dy))
    return y, kept, grads


def assert_equal(found, wanted):
    assert np.abs(wanted[0]).max() > 0.05
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(1.0, np.abs(other).max()), rtol=0)


# name: mesh sizes, nodes, factor of the buffers. Small ones are filled several times, at both levels.
MESHES = {
    "2 nodes of 4": (dict(expert=8), 2, 2.0),
    "4 nodes of 2, small buffers": (dict(expert=8), 4, 0.25),
    "data 2, 2 nodes of 1, tensor 2": (dict(data=2, expert=2, tensor=2), 2, 1.0),
}


@pytest.mark.parametrize("case", MESHES)
def test_two_levels_equal_the_reference_in_value_and_gradient(case):
    sizes, nodes, factor = MESHES[case]
    for expert_GTK in LISTS.values():
        assert_equal(run(mesh(**sizes), Exchange(False, factor, nodes), expert_GTK), run(ONE, None, expert_GTK))
