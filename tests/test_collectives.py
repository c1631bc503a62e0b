"""What one MoE layer exchanges under every parallel layout: as it should be, and as the golden table has it (B51).

The table is docs/collectives.md; `make golden` writes it again.
"""

import functools
import importlib.util
import json
import math
import os
import subprocess
import sys

import golden_collectives as golden
import pytest
from golden_collectives import B, D, E, F, K, S, Row

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="libtpu is not installed (pip install '.[tpu]')")


@functools.lru_cache(maxsize=None)
def on_cpu(layout):
    return golden.collectives_of(layout)


@functools.lru_cache(maxsize=None)
def on_tpu():
    """In a process of its own: libtpu wants its environment before JAX starts."""
    done = subprocess.run([sys.executable, golden.__file__, "tpu"], env=os.environ | {"PYTHONPATH": str(golden.ROOT)},
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {layout: [Row(*row) for row in rows] for layout, rows in zip(golden.ON_TPU, found, strict=True)}


def tokens_axes(layout):
    return [axis for axis in ("data", "fsdp", "expert") if layout.sizes[axis] > 1]


def expected(layout, item, ragged):
    """{(direction, kind, axes): bytes that a device sends} of everything that moves tokens or weights, from the shapes.

    ``item``: bytes of an element as it travels.
    """
    n, fsdp, tensor = (layout.sizes[axis] for axis in ("expert", "fsdp", "tensor"))
    tokens = B * S * tensor // 8
    found = {}
    if layout.parallelism == "none" or n == 1:
        gathered = ["expert"] if n > 1 else []
        weights = 3 * E * D * F // tensor
    else:
        # [g, E, C, D] there and [G, e, C, D] back; or, without a capacity, n times `rows` of width D each way, of which a
        # ragged exchange sends those that there are.
        rows = tokens // S * E * math.ceil(1.25 * K * S / E)
        if layout.dispatch == "dropless":
            one = min(K * tokens, tokens * E // n, 8 * math.ceil(2 * K * tokens / n / 8))
            rows = K * tokens if ragged else n * one
            # How many rows of each expert, and where the receiver sends them back to: integers.
            found["forward", "all-to-all s32", "expert"] = n * (E // n + 1) * 4 * (n - 1) // n
        kind = "ragged-all-to-all" if ragged else "all-to-all"
        width = max(D, 256) if ragged else D  # a TPU pads the rows of a ragged exchange to two tiles
        for direction in ("forward", "backward"):
            found[direction, kind, "expert"] = 2 * rows * width * item * (n - 1) // n
        gathered = []
        weights = 3 * E // n * D * F // tensor
    if fsdp > 1:
        # Each of the three matrices, as compute dtype, before its product.
        gathered = ["fsdp", *gathered]
    if gathered:
        size = math.prod(layout.sizes[axis] for axis in gathered)
        found["forward", "all-gather", "×".join(gathered)] = weights * item * (size - 1) // size
    return found


def check_against_what_is_needed(layout, rows, item):
    """No token and no weight travels that the layout does not send."""
    ragged = layout.rows == "ragged"
    moving = {}
    for row in rows:
        if not row.sometimes and row.kind not in ("all-reduce", "reduce-scatter"):
            name = f"{row.kind} s32" if row.dtype == "s32" else row.kind
            moving[row.direction, name, row.axes] = row.bytes
    name = f"{layout.name} on {layout.mesh_name}"
    assert moving == expected(layout, item, ragged), f"{name} moves other bytes than its shapes need"
    exchanges = [row for row in rows if "all-to-all" in row.kind and not row.sometimes and row.dtype != "s32"]
    assert all(row.times == 2 for row in exchanges), "one exchange each way, forward, and again backward"
    # Rows that a skewed load leaves over travel as all others do, and only without a capacity.
    left_over = {(row.kind, row.axes) for row in rows if row.sometimes}
    assert left_over <= {("ragged-all-to-all" if ragged else "all-to-all", "expert")}
    assert not left_over or layout.dispatch == "dropless"
    check_sums(layout, rows)


def check_sums(layout, rows):
    """Sums: gradients over the axes their tokens lie on, outputs of a split expert over ``tensor``, one maximum."""
    data = [axis for axis in tokens_axes(layout) if axis != "expert"]
    weights = tokens_axes(layout) if layout.parallelism == "none" else data
    allowed = {"forward": set(), "backward": {"×".join(tokens_axes(layout)), "×".join(weights)} - {""}}
    if layout.sizes["tensor"] > 1:
        allowed = {direction: axes | {"tensor"} for direction, axes in allowed.items()}
    for row in rows:
        if row.kind in ("all-reduce", "reduce-scatter"):
            most_rows = (row.dtype, row.direction, layout.dispatch) == ("s32", "forward", "dropless") and row.bytes < 16
            assert most_rows or row.axes in allowed[row.direction], f"{layout.name} on {layout.mesh_name}: {row}"


# Exactly what is needed


@pytest.mark.parametrize("layout", golden.ON_CPU, ids=lambda layout: f"{layout.name}; {layout.mesh_name}")
def test_b51_a_layer_on_eight_cpus_moves_what_its_layout_needs(layout):
    check_against_what_is_needed(layout, on_cpu(layout), item=4)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("layout", golden.ON_TPU, ids=lambda layout: f"{layout.name}; {layout.mesh_name}")
def test_b51_a_layer_on_tpus_moves_what_its_layout_needs(layout):
    check_against_what_is_needed(layout, on_tpu()[layout], item=2)


@needs_libtpu
@pytest.mark.slow
def test_on_tpus_tokens_and_weights_travel_in_bf16():
    for layout, rows in on_tpu().items():
        moving = [row for row in rows if row.kind not in ("all-reduce", "reduce-scatter") and row.dtype != "s32"]
        assert moving and all(row.dtype == "bf16" for row in moving), layout


def test_the_check_notices_an_unwanted_gather_a_lost_exchange_and_fp32():
    layout = golden.ON_TPU[0]
    n = layout.sizes["expert"]
    slots = 2 * 2 * E * math.ceil(1.25 * K * S / E) * D * 2 * (n - 1) // n
    good = [Row(direction, "all-to-all", "expert", "bf16", 2, slots) for direction in ("forward", "backward")]
    check_against_what_is_needed(layout, good, 2)
    for bad in ([*good, Row("forward", "all-gather", "expert", "bf16", 1, 4096)],
                good[:1],
                [Row("forward", "all-to-all", "expert", "f32", 2, 2 * slots), good[1]],
                [Row("forward", "all-to-all", "expert", "bf16", 4, slots), good[1]],
                [*good, Row("forward", "all-reduce", "expert", "f32", 1, 64)],
                [*good, Row("forward", "all-to-all", "expert", "bf16", 2, slots, True)]):
        with pytest.raises(AssertionError):
            check_against_what_is_needed(layout, bad, 2)


# The golden table


@functools.lru_cache(maxsize=None)
def table(title):
    text = golden.TABLE.read_text()
    assert f"\n## {title}\n" in text, f"{golden.TABLE} has no section {title!r}: run `make golden`"
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0].strip().splitlines()[4:]


def compare(title, found):
    wanted = table(title)
    lines = [golden.line(layout, rows) for layout, rows in found.items()]
    assert lines == wanted, ("the compiled layers exchange something else than docs/collectives.md says; if that is meant, "
                             "run `make golden` and commit the table")


def test_golden_table_of_eight_cpus():
    compare("Eight CPU devices", {layout: on_cpu(layout) for layout in golden.ON_CPU})


@needs_libtpu
@pytest.mark.slow
def test_golden_table_of_a_tpu_slice():
    compare(f"TPU {golden.TOPOLOGY}", on_tpu())
