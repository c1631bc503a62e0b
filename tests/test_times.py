"""Estimated times, held to what can be reckoned by hand and to messages counted link by link."""

import itertools

import numpy as np
import pytest

from moe_jax.planning.hlo import Collective
from moe_jax.planning.slices import parse_slice
from moe_jax.planning.times import collective_seconds, step_time

ONE = {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1}


def seconds(kind, axes, sent, devices, slice_name, sizes, **more):
    return collective_seconds(Collective(kind, axes, "bf16", sent, "", devices=devices, **more), parse_slice(slice_name),
                              ONE | sizes)


def test_a_ring_a_line_and_a_torus():
    """v5p: 90 GB/s per link and direction. 4x4x4 is a torus, 2x4x4 is not."""
    gigabyte = 10**9
    ring = dict(axes=("expert",), sent=gigabyte, devices=4, slice_name="v5p-128", sizes={"data": 16, "expert": 4})
    line = ring | dict(slice_name="v5p-64", sizes={"data": 8, "expert": 4})
    # Both ways round a ring at once; along a line the last link has to carry it all.
    assert seconds("all-gather", **ring) == pytest.approx(1 / 180)
    assert seconds("all-gather", **line) == pytest.approx(1 / 90)
    # `bytes` of an all-reduce already has its two phases; of a permutation one link is used.
    assert seconds("all-reduce", **ring) == seconds("reduce-scatter", **ring) == pytest.approx(1 / 180)
    assert seconds("collective-permute", **ring) == pytest.approx(1 / 90)
    # All 64 chips: three rings at once.
    assert seconds("all-gather", ("data",), gigabyte, 64, "v5p-128", {"data": 64}) == pytest.approx(1 / 540)


def crossings(sides, rings):
    """All-to-all of one byte from every chip to every other, one dimension after the other by the shorter way (half of it
    each way where both are as long): the most bytes on one link in one direction."""
    load = {}
    places = list(itertools.product(*map(range, sides)))
    for source, target in itertools.product(places, places):
        at = list(source)
        for axis, (side, ring) in enumerate(zip(sides, rings)):
            forward = (target[axis] - at[axis]) % side
            ways = [(1, forward)] if target[axis] >= at[axis] else [(-1, at[axis] - target[axis])]
            if ring:
                ways = [(1, forward)] if 2 * forward < side else [(-1, side - forward)]
                ways = [(1, forward), (-1, forward)] if 2 * forward == side else ways
            for step, hops in ways:
                place = list(at)
                for _ in range(hops):
                    link = (tuple(place), axis, step)
                    load[link] = load.get(link, 0) + 1 / len(ways)
                    place[axis] = (place[axis] + step) % side
            at[axis] = target[axis]
    return max(load.values())


@pytest.mark.parametrize("slice_name, sizes, axes, sides, rings", [
    ("v5p-128", {"data": 16, "expert": 4}, ("expert",), (4,), (True,)),
    ("v5p-128", {"data": 4, "expert": 16}, ("expert",), (4, 4), (True, True)),
    ("v5p-128", {"expert": 64}, ("expert",), (4, 4, 4), (True,) * 3),
    ("v5e-16", {"data": 4, "expert": 4}, ("expert",), (4,), (False,)),
    ("v5e-16", {"expert": 16}, ("expert",), (4, 4), (False, False)),
    ("v6e-256", {"data": 16, "expert": 16}, ("expert",), (16,), (True,)),
])
def test_an_exchange_takes_as_long_as_its_busiest_link(slice_name, sizes, axes, sides, rings):
    devices, link = int(np.prod(sides)), parse_slice(slice_name).chip.ici_bytes_per_second
    block = 10**8  # from every device to every other
    found = seconds("all-to-all", axes, block * (devices - 1), devices, slice_name, sizes)
    assert found == pytest.approx(crossings(sides, rings) * block / link)
    assert seconds("ragged-all-to-all", axes, block * (devices - 1), devices, slice_name, sizes) == found


def test_small_ones_take_a_microsecond_per_hop():
    # Half way round a ring of 4, or to the end of a line of 4; there and back to reduce to all.
    assert seconds("all-gather", ("expert",), 8, 4, "v5p-128", {"data": 16, "expert": 4}) == pytest.approx(2e-6)
    assert seconds("all-gather", ("expert",), 8, 4, "v5p-64", {"data": 8, "expert": 4}) == pytest.approx(3e-6)
    assert seconds("all-reduce", ("expert",), 8, 4, "v5p-128", {"data": 16, "expert": 4}) == pytest.approx(4e-6)
    assert seconds("all-reduce", (), 0, 1, "v5p-128", {"data": 64}) == 0


def test_between_slices_goes_the_data_centres_network():
    """2 slices of 16 v6e: 12.5 GB/s per chip, 90 GB/s per link."""
    sizes, sent = {"data": 32}, 10**9
    flagged = seconds("all-reduce", ("data",), sent, 2, "2x v6e-16", sizes, between_slices=True)
    assert flagged == pytest.approx(sent / 12.5e9)
    # All 32: reduced inside a slice of 4x4 first, two lines at once; then each chip sends its 16th between the two.
    whole = seconds("all-reduce", ("data",), sent, 32, "2x v6e-16", sizes)
    assert whole == pytest.approx(sent / (2 * 90e9) + sent / 16 / 12.5e9)
    inside = seconds("all-reduce", ("data",), sent, 16, "2x v6e-16", sizes)
    assert inside == pytest.approx(sent / (2 * 90e9))


def test_two_devices_of_a_chip_share_its_links():
    one = seconds("all-gather", ("expert",), 10**9, 4, "v5p-128", {"data": 16, "expert": 4})
    both = seconds("all-gather", ("expert",), 10**9, 4, "tpu7x-128", {"data": 32, "expert": 4})
    assert both == pytest.approx(2 * one)  # links alike
    assert seconds("all-gather", ("expert",), 10**9, 2, "tpu7x-128", {"data": 64, "expert": 2}) == 0  # inside a chip


def test_what_bounds_a_step_and_that_overlapped_collectives_are_not_added():
    """v5p: 459 TFLOP/s, 2.8 TB/s."""
    v5p, sizes = parse_slice("v5p-128"), ONE | {"data": 16, "expert": 4}
    exchange = Collective("all-to-all", ("expert",), "bf16", 3 * 10**9, "", count=10, devices=4)  # 4e9·4/(8·90e9) each
    network = 10 * 4e9 * 4 / (8 * 90e9)

    def step(flops, moved, overlapped, **more):
        return step_time(v5p, sizes, flops, moved, [Collective(**{**exchange.__dict__, "overlapped": overlapped})], **more)

    computing = step(459e12, 1.4e12, True)
    assert computing.seconds == pytest.approx(1.0) and computing.bound == "compute"
    assert step(459e12, 1.4e12, False).seconds == pytest.approx(1.0 + network)
    reading = step(45.9e12, 2.8e12, True)
    assert reading.seconds == pytest.approx(1.0) and reading.bound == "memory"
    waiting = step(45.9e12, 0.28e12, True)
    assert waiting.seconds == pytest.approx(network) and waiting.bound == "network"
    assert step(45.9e12, 0.28e12, False).seconds == pytest.approx(0.1 + network)
    # The compiler's figure stands beside and changes nothing.
    beside = step(459e12, 1.4e12, True, cycles=1.751e9, kernel_flops=45.9e12)
    assert beside.seconds == computing.seconds
    assert beside.parts_seconds["compiler's estimate, without network"] == pytest.approx(1.1, rel=1e-3)
    assert "not a measurement" in beside.basis and "estimated cycles" in beside.basis
