"""Every implementation of the grouped product against the loop over rows; who is chosen where; programs for TPUs.

Kernels run interpreted. tokamax and libtpu are optional: their tests say so when they are skipped.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_grouped_matmul import numpy_grouped_matmul

from moe_jax.config import ConfigError, MoEConfig, resolve
from moe_jax.dispatch import dispatcher, grouped_kernels, grouped_matmul as grouped
from moe_jax.dispatch.grouped_kernels import has_tokamax, megablox, row_tile, tokamax, width_tile
from moe_jax.dispatch.grouped_matmul import IMPLEMENTATIONS, choose, grouped_matmul
from moe_jax.routing.assignment import Routing
from moe_jax.sharding import lowering_platform, make_mesh, per_device

needs_tokamax = pytest.mark.skipif(not has_tokamax(), reason="tokamax is not installed (pip install '.[tokamax]')")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="libtpu is not installed (pip install '.[tpu]')")


def interpreted_tokamax():
    """tokamax's kernel for TPUs, told that a CPU is one. (Its kernels for GPUs cannot be interpreted.)"""
    from jax._src.pallas.mosaic import tpu_info
    from jax.experimental.pallas import tpu as pltpu
    from tokamax._src.ops.ragged_dot.pallas_mosaic_tpu import PallasMosaicTpuRaggedDot

    class Interpreted(PallasMosaicTpuRaggedDot):
        def supported_on(self, device):
            return True

    tpu_info.registry["cpu"] = lambda: tpu_info.get_tpu_info_for_chip(tpu_info.ChipVersion.TPU_V5E, 1)
    return tokamax((Interpreted(interpret=pltpu.InterpretParams(out_of_bounds_reads="uninitialized")),))


# How each is had on a CPU.
ON_CPU = {
    "portable": lambda: IMPLEMENTATIONS["portable"],
    "ragged_dot": lambda: IMPLEMENTATIONS["ragged_dot"],
    "megablox": lambda: megablox(interpret=True),
    "tokamax's way to XLA": lambda: tokamax(("xla",)),
    "tokamax": interpreted_tokamax,
}
EVERY = [pytest.param(name, marks=needs_tokamax if "tokamax" in name else ()) for name in ON_CPU]


@functools.lru_cache(maxsize=None)
def compiled(name):
    implementation = ON_CPU[name]()

    @jax.jit
    def value_and_gradients(x_ND, weight_EDF, sizes_E, d_NF):
        y_NF, pull = jax.vjp(lambda x, w: grouped._grouped_matmul(x, w, sizes_E, implementation), x_ND, weight_EDF)
        return (y_NF, *pull(d_NF))

    return value_and_gradients


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles each way from few numbers; remainders in all three directions."""
    monkeypatch.setattr(grouped_kernels, "ROW_TILES", (16,))
    monkeypatch.setattr(grouped_kernels, "WIDEST_TILE", {2: 128, 4: 128})


def check(name, rows, widths, sizes, dtype=np.float32, poison=0.0):
    """Value and gradients; ``poison`` fills the rows that nobody owns."""
    rng = np.random.default_rng(0)
    shapes = (rows, widths[0]), (len(sizes), *widths), (rows, widths[1])
    x, w, d = (np.array(jnp.asarray(rng.normal(size=shape), dtype)) for shape in shapes)
    x[sum(sizes):], d[sum(sizes):] = poison, poison
    wanted = numpy_grouped_matmul(*(a.astype(np.float32) for a in (x, w)), sizes, d.astype(np.float32))
    found = jax.device_get(compiled(name)(x, w, np.asarray(sizes, np.int32), d))
    for one, other in zip(found, wanted):
        assert one.dtype == dtype
        tolerance = 1e-5 if dtype == np.float32 else 1e-2
        np.testing.assert_allclose(one.astype(np.float64), other, atol=tolerance * max(1.0, np.abs(other).max()))
        assert (one[other == 0] == 0).all()


# One shape each: a shape is compiled once. E = 3; 37 = 2 tiles of 16 and 5; 131 = a tile of 128 and 3.
WIDTHS = {"megablox": (131, 9), "tokamax": (128, 256)}
SIZES = [(10, 10, 17), (37, 0, 0), (0, 37, 0), (0, 0, 37), (16, 16, 5), (1, 35, 1), (0, 1, 0), (0, 0, 0), (10, 10, 10)]


@pytest.mark.parametrize("name", EVERY)
def test_b42_every_implementation_equals_the_loop_over_rows(name):
    for sizes in SIZES[::4] if name == "tokamax" else SIZES:  # interpreted, it takes seconds
        check(name, 37, WIDTHS.get(name, (5, 7)), sizes)


@pytest.mark.parametrize("name", EVERY)
def test_b42_poison_in_rows_past_the_sizes_reaches_nothing(name):
    for sizes in ((10, 10, 10), (0, 0, 1), (16, 16, 0), (0, 0, 0)):
        check(name, 37, WIDTHS.get(name, (5, 7)), sizes, poison=np.nan)


@pytest.mark.parametrize("name", EVERY)
def test_every_implementation_in_bfloat16(name):
    check(name, 37, WIDTHS.get(name, (5, 7)), (10, 0, 20), jnp.bfloat16)


@pytest.mark.parametrize("name, widths, sizes", [
    ("megablox", (9, 131), (20,)),  # one expert; the remainder of a tile in the output
    ("megablox", (1, 8), (3, 0, 0, 2, 15)),  # the narrowest there is, E = 5
    ("ragged_dot", (9, 13), (20,)),
    ("ragged_dot", (1, 8), (3, 0, 0, 2, 15)),
])
def test_other_shapes(name, widths, sizes):
    check(name, 20, widths, sizes)


@pytest.mark.parametrize("name", ["ragged_dot", "megablox"])
def test_gradients_of_weights_are_accumulated_in_fp32(name):
    # Adding ones to a bf16 number stops at 256.
    ones = jnp.ones((600, 8), jnp.bfloat16)
    _, _, dw = compiled(name)(ones, jnp.ones((1, 8, 8), jnp.bfloat16), jnp.array([600]), ones)
    assert (np.asarray(dw, np.float32) == 600).all()


def test_under_shard_map_weights_collect_the_gradients_of_all_devices():
    """Eight devices, each with rows and sizes of its own. (JAX cannot interpret kernels there; it can compile them.)"""
    rng = np.random.default_rng(0)
    x, w, d = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 20, 5), (3, 5, 7), (8, 20, 7)))
    sizes = np.array([rng.multinomial(20, (0.5, 0.2, 0.3)) for _ in range(8)], np.int32)

    def loss(x_GND, w_EDF, name):
        def local(x, sizes, d, w):
            return jnp.sum(grouped_matmul(x[0], w, sizes[0], name) * d[0])[None]

        return jnp.sum(per_device(local, x_GND, sizes, d, replicated=(w_EDF,)))

    with jax.set_mesh(make_mesh(dict(data=2, fsdp=1, expert=4, tensor=1))):
        dx, dw = jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)(x, w, "ragged_dot"))
    wanted = [numpy_grouped_matmul(x[g], w, sizes[g], d[g]) for g in range(8)]
    np.testing.assert_allclose(dx, [each[1] for each in wanted], atol=1e-5)
    np.testing.assert_allclose(dw, sum(each[2] for each in wanted), atol=1e-4)


# Tiles


def test_row_tiles_grow_with_the_rows_per_expert(monkeypatch):
    monkeypatch.setattr(grouped_kernels, "ROW_TILES", (512, 256, 128))
    assert [row_tile(rows, 8) for rows in (5, 100, 128, 2048, 4096, 8192)] == [16, 112, 128, 128, 256, 512]
    assert row_tile(16384, 64) == 128 and row_tile(4096, 1) == 512


def test_width_tiles_take_narrow_matrices_whole_and_pad_wide_ones_by_an_eighth_at_most(monkeypatch):
    monkeypatch.setattr(grouped_kernels, "WIDEST_TILE", {2: 1024, 4: 512})
    assert [width_tile(width, 2) for width in (5, 640, 1024, 2048, 2880, 4096)] == [5, 640, 1024, 1024, 1024, 1024]
    assert [width_tile(width, 4) for width in (512, 768, 1408)] == [512, 384, 512]
    for width in range(1, 9000, 37):
        tile = width_tile(width, 2)
        assert -(-width // tile) * tile <= max(1.125 * width, -(-width // 128) * 128)


def test_megablox_finds_every_tile_up_to_the_limit_that_is_refused_beyond():
    from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

    tiles, tile = grouped_kernels.MOST_ROW_TILES, 4
    ends = np.sort(np.random.default_rng(0).permutation(tiles * tile - 1)[:1999] + 1)
    sizes = np.diff(np.r_[0, ends, tiles * tile]).astype(np.int32)
    (_, expert, place), number = make_group_metadata(group_sizes=jnp.asarray(sizes), m=tiles * tile, tm=tile,
                                                     start_group=jnp.int32(0), num_nonzero_groups=len(sizes),
                                                     visit_empty_groups=False)
    starts = np.cumsum(sizes) - sizes
    lasts = starts + sizes - 1
    wanted = [(e, t) for e in range(len(sizes)) for t in range(starts[e] // tile, lasts[e] // tile + 1)]
    found = np.stack([expert[:number], place[:number]], axis=1)
    np.testing.assert_array_equal(found, wanted)


# Who is chosen


def shapes(rows=4096, width=256, experts=8, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((rows, width), dtype), jax.ShapeDtypeStruct((experts, width, 512), dtype)


def test_auto_is_chosen_by_platform_and_shape():
    assert choose("auto", *shapes(), "cpu") == "portable"
    assert choose("auto", *shapes(), "tpu") == "megablox"
    assert choose("auto", *shapes(dtype=jnp.float16), "tpu") == "ragged_dot"
    assert choose("auto", *shapes(rows=2**24), "tpu") == "ragged_dot"  # more tiles than megablox counts
    assert choose("auto", *shapes(), "gpu") == "portable"  # tokamax must be installed, and asks the devices at hand
    assert choose("auto", *shapes(), "abacus") == "portable"


def test_auto_takes_tokamax_on_a_gpu_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(grouped_kernels, "has_tokamax", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose("auto", *shapes(), "gpu") == "tokamax"


def test_the_platform_is_that_of_the_mesh_in_context():
    assert lowering_platform() == "cpu"
    with jax.set_mesh(tiny.ONE):
        assert lowering_platform() == "cpu"


@pytest.mark.parametrize("name, platform, words", [
    ("megablox", "cpu", "runs on tpu, and this program is for cpu. Choose 'auto' (here 'portable'), or one of "
                        "'portable', 'ragged_dot'."),
    ("tokamax", "cpu", "runs on gpu and tpu, and this program is for cpu"),
    ("megablox", "gpu", "runs on tpu, and this program is for gpu"),
    ("megabloks", "cpu", "allowed are 'auto', 'portable', 'ragged_dot', 'megablox', 'tokamax'"),
])
def test_a_choice_that_cannot_run_is_refused_with_what_can(name, platform, words):
    with pytest.raises(ConfigError) as error:
        choose(name, *shapes(), platform)
    assert f"moe.grouped_matmul={name!r}: " in str(error.value) and words in str(error.value)


def test_shapes_that_do_not_fit_are_refused_by_name(monkeypatch):
    with pytest.raises(ConfigError, match="multiplies bfloat16 and float32, not float16.*Choose 'auto'.*'ragged_dot'"):
        choose("megablox", *shapes(dtype=jnp.float16), "tpu")
    with pytest.raises(ConfigError, match="tables are exact for 2048 tiles"):
        choose("megablox", *shapes(rows=2**24), "tpu")
    monkeypatch.setattr(grouped_kernels, "has_tokamax", lambda: False)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'moe_jax\[tokamax\]'"):
        choose("tokamax", *shapes(), "gpu")
    monkeypatch.setattr(grouped_kernels, "has_tokamax", lambda: True)
    with pytest.raises(ConfigError, match="asks this process's cpu devices.*cannot be compiled here for a tpu"):
        choose("tokamax", *shapes(), "tpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ConfigError, match="multiples of 128, and the matrices are 96 x 512"):
        choose("tokamax", *shapes(width=96), "tpu")


def test_the_config_names_an_implementation_and_the_layer_refuses_one_that_cannot_run():
    with pytest.raises(ConfigError, match="moe.grouped_matmul='megabloks': allowed are 'auto'.*mean 'megablox'"):
        resolve({"moe": {"grouped_matmul": "megabloks"}})
    # Also where it would first be used in an evaluation.
    config = tiny.config(moe_dispatch="gather", moe_grouped_matmul="megablox")
    with jax.set_mesh(tiny.ONE), pytest.raises(ConfigError, match="megablox': it runs on tpu"):
        tiny.initial_params(config, tiny.VOCAB, jax.random.key(0))


# What dropless makes of it


def test_dropless_by_products_equals_dropless_by_blocks():
    """Value and gradients, a quarter of the assignments nowhere; experts whose hidden activation of 0 is not 0."""
    rng = np.random.default_rng(0)
    groups, tokens, experts, choices = 2, 19, 5, 2
    x, dy = (rng.normal(size=(groups, tokens, 8)).astype(np.float32) for _ in range(2))
    weights = {"a_EDF": rng.normal(size=(experts, 8, 6)).astype(np.float32),
               "b_EFD": rng.normal(size=(experts, 6, 8)).astype(np.float32)}
    expert_GN = np.where(rng.random((groups, tokens * choices)) < 0.25, experts,
                         rng.integers(0, experts, (groups, tokens * choices))).astype(np.int32)
    token_GN = np.tile(np.repeat(np.arange(tokens, dtype=np.int32), choices), (groups, 1))
    gate_GN = rng.uniform(0.1, 1, expert_GN.shape).astype(np.float32)

    def expert(products, w, x):
        return products.matmul(jnp.cos(products.matmul(x, w["a_EDF"], "EDF")), w["b_EFD"], "EFD")

    def loss(x, gate, weights, name):
        routing = Routing(jnp.asarray(token_GN), jnp.asarray(expert_GN), gate, None, choices, "token_major")
        y, kept = dispatcher("dropless", MoEConfig(grouped_matmul=name))(x, routing, expert, weights, experts, 0)
        return jnp.sum(y * dy), y

    found = {}
    with jax.set_mesh(tiny.ONE):
        for each in ("portable", "ragged_dot"):
            step = jax.jit(jax.value_and_grad(functools.partial(loss, name=each), argnums=(0, 1, 2), has_aux=True))
            found[each] = jax.device_get(step(x, gate_GN, weights))
    for one, other in zip(jax.tree.leaves(found["portable"]), jax.tree.leaves(found["ragged_dot"])):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_whole_model_by_products_under_scan_and_remat():
    """Gradients with layers scanned and recomputed: the same whoever multiplies."""
    found = []
    for name in ("portable", "ragged_dot"):
        config = tiny.config(model_num_layers=2, model_remat="block", moe_dispatch="dropless", moe_grouped_matmul=name,
                             data_sequence_length=8, data_batch_size=2)
        found.append(tiny.grads(config, tiny.params(config), tiny.batch(rows=2, length=8))[0])
    for one, other in zip(*map(jax.tree.leaves, found)):
        np.testing.assert_allclose(one, other, atol=1e-5)


# Programs for TPUs

ROOT = Path(__file__).resolve().parents[1]


@needs_libtpu
@pytest.mark.parametrize("topology, accelerator, dtype", [("v5e:2x2", "v5litepod-4", "bfloat16"),
                                                          ("v5p:2x2x1", "v5p-8", "float32")])
def test_compiled_for_a_tpu_the_products_cost_what_the_rows_need(topology, accelerator, dtype):
    """Forward and backward of "auto", compiled for TPUs that are not there, with E = 16.

    Measured with JAX 0.10.2 and libtpu 0.0.42.1: 1.005 times the FLOPs of the rows (three kernels, whose FLOPs are as
    megablox declares them, and no product beside), on v5e as on v5p; ``ragged_dot`` 6.02 times, because XLA computes
    the gradient of the weights for every expert and every row.
    """
    environment = os.environ | dict(
        TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", TPU_ACCELERATOR_TYPE=accelerator,
        ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_LOG_DIR="disabled", TPU_MIN_LOG_LEVEL="3", JAX_PLATFORMS="cpu",
        PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, ROOT / "tests" / "grouped_tpu.py", topology, "auto", dtype], env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    program = json.loads(done.stdout.splitlines()[-1])
    assert program["chosen"] == "megablox" and program["chosen_on_cpu"] == "portable"
    assert program["kernels"] == 3 and program["products"] == 0
    assert 0.99 < program["flops"] < 1.1
