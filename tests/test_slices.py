"""Names of TPU slices: what they mean, what is refused, what the chips can do."""

import math
import sys

import jax
import numpy as np
import pytest

from moe_jax.config import ConfigError
from moe_jax.planning import slices
from moe_jax.planning.slices import PlanError, parse_slice, stand_ins, tpu_devices
from moe_jax.sharding import AXES, placed


@pytest.mark.parametrize("text, name, topology, chips, devices", [
    # v4 and v5p count TensorCores, two per chip; so does tpu7x, where each is a device of its own.
    ("v5p-128", "v5p-128", "4x4x4", 64, 64),
    ("v5p:4x4x4", "v5p-128", "4x4x4", 64, 64),
    ("V5P-8", "v5p-8", "2x2x1", 4, 4),
    ("v4-64", "v4-64", "2x4x4", 32, 32),
    ("tpu7x-128", "tpu7x-128", "4x4x4", 64, 128),
    ("v5p-2048", "v5p-2048", "8x8x16", 1024, 1024),
    ("v5p-768", "v5p-768", "4x8x12", 384, 384),
    ("v5p:4x4x24", "v5p:4x4x24", "4x4x24", 384, 384),  # not the shape that v5p-768 means
    ("v5e-16", "v5e-16", "4x4", 16, 16),
    ("v5litepod-16", "v5e-16", "4x4", 16, 16),
    ("v6e-1", "v6e-1", "1x1", 1, 1),
    ("2x v6e-256", "2x v6e-256", "16x16", 512, 512),
    (" 3xv5p:2x2x4 ", "3x v5p-32", "2x2x4", 48, 48),
])
def test_what_a_name_means(text, name, topology, chips, devices):
    found = parse_slice(text)
    assert (found.name, found.topology, found.chips, found.devices) == (name, topology, chips, devices)
    assert found.chips == found.num_slices * math.prod(found.shape)
    assert parse_slice(found.name) == found


@pytest.mark.parametrize("text, says", [
    ("v5p-100", "number counts TensorCores, two per chip.*v5p-64 .2x4x4., v5p-128 .4x4x4."),
    ("v5p-127", "nearest: v5p-32 .2x2x4., v5p-64 .2x4x4., v5p-128 .4x4x4."),
    ("v6e-512", "number counts chips.*nearest: v6e-128 .8x16., v6e-256 .16x16."),
    ("v6e:16x8", "ascending.*nearest: v6e:8x16"),
    ("v5p:1x2x2", "nearest: v5p:2x2x1"),
    ("v5p:4x4x5", "from 4x4x4 on multiples of 4.*nearest: v5p:4x4x4"),
    ("v5p:16x16x64", "at most 6144 chips"),
    ("v5e:3", "2 sides.*nearest"),
    ("v5p:0x4x4", "no such topology"),
    ("v7-8", "no TPUs 'v7'; kinds: v4, v5e, v5p, v6e, tpu7x"),
    ("0x v6e-8", "number of slices must be at least 1"),
    ("h100-8 x2", "wanted is a product such as v5p-128, a topology such as v5p:4x4x4, or several slices"),
    ("", "wanted is a product"),
])
def test_what_there_is_not_is_refused_with_what_there_is(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_slice(text)


def test_chips_share_the_peak_of_mfu_and_their_figures_fit_together():
    from moe_jax.training.metrics import peak_flops_per_device

    for name, kind in (("v4-8", "TPU v4"), ("v5e-4", "TPU v5 lite"), ("v5p-8", "TPU v5"), ("v6e-4", "TPU v6 lite"),
                       ("tpu7x-8", "TPU7x")):
        chip = parse_slice(name).chip
        assert chip.peak_bf16_flops == chip.devices_per_chip * peak_flops_per_device(kind)[0]
        assert 1e9 < chip.clock_hz < 3e9
        # Memory is slower than the matrix units by 80 … 600 FLOPs per byte, one link slower than memory, the other network
        # slower than a link.
        assert 80 < chip.peak_bf16_flops / chip.hbm_bytes_per_second < 600
        assert 10 < chip.hbm_bytes_per_second / chip.ici_bytes_per_second < 100
        assert 5 < chip.ici_bytes_per_second / chip.dcn_bytes_per_second < 20


def test_which_sides_are_rings():
    assert parse_slice("v5e-256").wraps == (True, True)
    assert parse_slice("v6e-128").wraps == (False, True)  # 8x16
    assert parse_slice("v5p-128").wraps == (True, True, True)
    assert parse_slice("v5p-64").wraps == (False, False, False)


def test_without_libtpu_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(slices, "has_libtpu", lambda: False)
    with pytest.raises(PlanError, match=r"libtpu, the compiler for TPUs, is not installed.*pip install 'moe_jax\[tpu\]'"):
        tpu_devices(parse_slice("v5e-8"))


def test_stand_ins_are_laid_out_in_a_mesh():
    """64 chips on 4x4x4: tensor, then expert, on whole rings next to each other."""
    found = parse_slice("v5p-128")
    mesh = placed({"data": 4, "fsdp": 1, "expert": 4, "tensor": 4}, stand_ins(found))
    assert mesh.shape == (4, 1, 4, 4) and len({device.coords for device in mesh.flat}) == 64
    for axis in (0, 2, 3):
        along = np.moveaxis(mesh, axis, 0).reshape(4, -1)[:, 0]
        differing = {tuple(np.flatnonzero(np.array(device.coords) != np.array(along[0].coords))) for device in along[1:]}
        assert len(differing) == 1 and len(differing.pop()) == 1


def test_data_crosses_slices_and_nothing_else_does():
    mesh = placed({"data": 4, "fsdp": 2, "expert": 4, "tensor": 1}, stand_ins(parse_slice("2x v6e-16")))
    number = np.vectorize(lambda device: device.slice_index)(mesh)
    assert (number == np.array([0, 0, 1, 1])[:, None, None, None]).all()
    with pytest.raises(ConfigError, match="mesh.data=1 does not divide over 2 slices"):
        placed({"data": 1, "fsdp": 8, "expert": 4, "tensor": 1}, stand_ins(parse_slice("2x v6e-16")))


def test_a_part_of_a_side_can_be_an_axis():
    """8 x 8 on 4x4x4, which jax.make_mesh refuses."""
    mesh = placed({"data": 1, "fsdp": 8, "expert": 8, "tensor": 1}, stand_ins(parse_slice("v5p-128")))
    assert mesh.shape == tuple({"data": 1, "fsdp": 8, "expert": 8, "tensor": 1}[axis] for axis in AXES)


def test_the_environment_keeps_a_process_on_its_cpu(monkeypatch):
    for name in (*slices._ENVIRONMENT, "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    platforms = jax.config.jax_platforms
    try:
        slices.prepare_environment()
        import os
        assert os.environ["JAX_PLATFORMS"] == "cpu" == jax.config.jax_platforms
        assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"
    finally:
        jax.config.update("jax_platforms", platforms)
    assert "jax" in sys.modules
