"""The state of a run: its keys, where its leaves lie, and that the same seed gives the same state on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from moe_jax.config import ConfigError
from moe_jax.sharding import parameter_spec
from moe_jax.training.state import abstract_state, initial_state, new_state, state_specs, table_size

KEYS = {"step", "params", "opt_state", "router_bias_LE", "rng", "skipped"}
CONFIG = tiny.config(model_num_layers=2, moe_every=2, optimizer_name="adamw", training_ema_decay=0.9)


def shapes(config):
    with jax.set_mesh(tiny.ONE):
        return jax.eval_shape(lambda: initial_state(config, tiny.VOCAB))


def test_b57_the_state_holds_the_documented_keys_and_no_others():
    assert set(shapes(tiny.config())) == KEYS
    assert set(shapes(CONFIG)) == KEYS | {"ema"}
    config = tiny.config(model_num_layers=2, moe_every=1)
    after, _ = tiny.step(config, tiny.state(config), tiny.batch())
    assert set(after) == KEYS


def test_b27_every_parameter_and_moment_is_fp32_whatever_the_compute_dtype():
    state = shapes(tiny.config(model_dtype="bfloat16", optimizer_name="adamw", training_ema_decay=0.9))
    for part in ("params", "ema", "router_bias_LE"):
        assert {leaf.dtype for leaf in jax.tree.leaves(state[part])} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state["opt_state"])} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}


@pytest.mark.parametrize("config, shape", [
    (tiny.config(), (2, 4)), (tiny.config(moe_every=4), (1, 4)), (tiny.config(moe_num_experts=0), (0, 1))])
def test_b31_b32_the_router_bias_has_a_row_for_every_moe_layer(config, shape):
    assert shapes(config)["router_bias_LE"].shape == shape


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
def test_moments_lie_where_their_parameters_lie_and_the_rest_is_replicated(optimizer):
    state = shapes(tiny.config(optimizer_name=optimizer, training_ema_decay=0.9))
    specs = state_specs(state)
    parameters = {name: leaf.shape for name, leaf in named(state["params"])}
    mirrored = 0
    for name, spec in named(specs):
        section = name.split(".")[0]
        parameter = next((p for p in parameters if name.endswith("." + p)), None)
        if section in ("params", "ema") or parameter and dict(named(state))[name].shape == parameters[parameter]:
            assert spec == parameter_spec(name.rsplit(".", 1)[1], len(parameters[parameter])), name
            mirrored += section == "opt_state"
        else:
            assert spec == P(), name
    # Adam keeps two arrays like each parameter; Adafactor one (these are too small to be factored); SGD none.
    assert mirrored == {"adamw": 2, "adafactor": 1, "sgd": 0}[optimizer] * len(parameters)


def named(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, P))
    return [(".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path), leaf)
            for path, leaf in paths]


SMALL = tiny.config(model_num_layers=2, moe_every=1)
MESHES = (dict(), dict(data=2), dict(expert=4), dict(fsdp=2, expert=2, tensor=2))


@functools.lru_cache(maxsize=None)
def fresh(axes):
    mesh = tiny.mesh(**dict(axes))
    with jax.set_mesh(mesh):
        return new_state(SMALL, tiny.VOCAB, mesh)


def test_the_abstract_state_is_the_real_one_without_memory():
    mesh = tiny.mesh(**MESHES[-1])
    with jax.set_mesh(mesh):
        abstract = abstract_state(SMALL, tiny.VOCAB, mesh)
    described = lambda state: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding.spec), state)
    assert described(abstract) == described(fresh(tuple(MESHES[-1].items())))


@pytest.mark.slow
def test_r12_b47_the_same_seed_gives_the_same_state_on_every_mesh_and_on_all_its_devices():
    def host(state):
        return jax.device_get({**state, "rng": jax.random.key_data(state["rng"])})

    states = [fresh(tuple(sizes.items())) for sizes in MESHES]
    first, *others = map(host, states)
    for other, state in zip(others, states[1:]):
        tiny.assert_equal(other, first)
        tiny.assert_replicas_agree(state)


def test_another_seed_gives_other_parameters():
    with jax.set_mesh(tiny.ONE):
        zero, one = (jax.jit(functools.partial(initial_state, config, tiny.VOCAB), compiler_options=tiny.QUICK)()
                     for config in (SMALL, tiny.config(model_num_layers=2, moe_every=1, training_seed=1)))
    for name in ("w_in_EDF", "w_router_DE"):
        a, b = ([leaf for n, leaf in tiny.leaves(state["params"]).items() if n.endswith(name)][0] for state in (zero, one))
        assert not np.any(a == b)
    assert not np.array_equal(jax.random.key_data(zero["rng"]), jax.random.key_data(one["rng"]))


def test_b47_no_two_experts_and_no_two_layers_start_equal():
    params = tiny.params(tiny.config(model_num_layers=4, moe_every=1))
    for name, leaf in tiny.leaves(params["body"]).items():
        if not name.endswith("scale_D"):
            rows = leaf.reshape(-1, *leaf.shape[2:]) if name.endswith(("EDF", "EFD")) else leaf
            flat = rows.reshape(len(rows), -1)
            assert len({row.tobytes() for row in flat}) == len(flat), name
            correlation = np.corrcoef(flat)[np.triu_indices(len(flat), 1)]
            assert np.abs(correlation).max() < 0.5, name


def test_kernels_start_with_variance_scale_over_fan_in_and_cut_at_two_deviations():
    params = tiny.params(tiny.config(model_d_model=64, model_d_ff=256, model_init_scale=0.1, moe_num_experts=0))
    w_in = params["body"]["layers"][0]["mlp"]["w_in_DF"]
    deviation = np.sqrt(0.1 / 64)
    assert np.std(w_in) == pytest.approx(deviation, rel=0.03)
    assert np.abs(w_in).max() <= 2 * deviation / 0.8796 + 1e-6


@pytest.mark.parametrize("vocab_size, rows", [(1, 64), (64, 64), (65, 128), (259, 320)])
def test_the_table_is_rounded_up_so_that_it_divides(vocab_size, rows):
    assert table_size(tiny.config(), vocab_size) == rows


def test_a_table_smaller_than_the_vocabulary_is_refused():
    assert table_size(tiny.config(model_vocab_size=300), 300) == 300
    with pytest.raises(ConfigError, match="model.vocab_size=299: the vocabulary has 300 ids"):
        table_size(tiny.config(model_vocab_size=299), 300)
