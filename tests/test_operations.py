"""The work of compiled programs: FLOPs and bytes, loops multiplied, held to what the programs were made of."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.planning.operations import _convolution, work


def compiled_text(function, *shapes):
    return jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()


def test_a_loop_counts_as_often_as_it_runs():
    def layers(x_TD, weight_LDD):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_TD, weight_LDD)[0]

    found = work(compiled_text(layers, (64, 32), (7, 32, 32)))
    assert found.flops == 7 * 2 * 64 * 32 * 32
    # Every round reads and writes the activations, and its own weights only.
    least = 7 * 4 * (2 * 64 * 32 + 32 * 32)
    assert least <= found.bytes < 6 * least


def test_a_gradient_costs_twice_the_forward_pass_more():
    def loss(w_DF, x_TD):
        return jnp.sum(jnp.sin(x_TD @ w_DF))

    forward, backward = (work(compiled_text(f, (128, 256), (64, 128))).flops for f in (loss, jax.grad(loss, (0, 1))))
    assert forward == 2 * 64 * 128 * 256
    assert backward == 3 * forward


@pytest.mark.parametrize("left, right, labels, window", [
    # A plain product, [T, D] x [D, F], as TPU programs write it.
    ((1, 64, 32), (1, 32, 48), "0bf_0io->0bf", "size=1"),
    # Heads as a spatial dimension: D into 2 heads of 16, and back.
    ((64, 32, 1), (32, 16, 2), "bf0_io0->b0f", "size=2 pad=1_1 rhs_reversal=1"),
    # A batch of 5 products: the window of 5 places fits one element at each.
    ((5, 8, 32), (5, 32, 48), "0bf_0io->0bf", "size=5 stride=4 pad=0_0 lhs_dilate=5"),
    ((2, 9, 4), (3, 4, 6), "b0f_0io->b0f", "size=3 pad=1_1"),
    ((2, 9, 4), (3, 4, 6), "b0f_0io->b0f", "size=3 stride=2 pad=1_1 rhs_dilate=2"),
])
def test_products_written_as_convolutions(left, right, labels, window):
    """Against a count of every multiply-add, one by one."""
    at = dict(part.split("=") for part in window.split())
    lhs, rhs, out = labels.replace("->", "_").split("_")
    side = lambda shape, names, letter: shape[names.index(letter)] if letter in names else 1
    stride, low = int(at.get("stride", 1)), int(at.get("pad", "0_0").split("_")[0])
    high = int(at.get("pad", "0_0").split("_")[1])
    grow, spread = int(at.get("lhs_dilate", 1)), int(at.get("rhs_dilate", 1))
    places, taps = side(left, lhs, "0"), side(right, rhs, "0")
    results = ((places - 1) * grow + 1 + low + high - (taps - 1) * spread - 1) // stride + 1
    result = tuple({"b": side(left, lhs, "b"), "f": side(right, rhs, "o"), "0": results}[letter] for letter in out)
    count = 0
    for o, k in itertools.product(range(results), range(taps)):
        place = o * stride - low + k * spread
        count += 0 <= place < (places - 1) * grow + 1 and place % grow == 0
    each = side(left, lhs, "b") * side(left, lhs, "f") * side(right, rhs, "o")
    found = _convolution(left, right, result, f"), window={{{window}}}, dim_labels={labels}, metadata={{}}")
    assert found == 2 * count * each


def test_xla_counts_the_same_where_there_is_no_loop():
    def step(x_TD, a_DF, b_FD):
        return jax.nn.relu(x_TD @ a_DF) @ b_FD

    shapes = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 128), (128, 512), (512, 128)))
    program = jax.jit(step).lower(*shapes).compile()
    ours, theirs = work(program.as_text()), program.cost_analysis()
    # Theirs has the elementwise operations too.
    assert ours.flops <= theirs["flops"] < 1.02 * ours.flops
    assert np.isclose(ours.bytes, theirs["bytes accessed"], rtol=0.3)


_LOOP = """HloModule program, is_scheduled=true

%body (state: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {{
  %state = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,8] get-tuple-element(%state), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[8,8]{{1,0}} {instruction}
  ROOT %out = (s32[], f32[8,8]) tuple(%next, %y)
}}

%test (state.1: (s32[], f32[8,8])) -> pred[] {{
  %state.1 = (s32[], f32[8,8]) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %end = s32[] constant(6)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {{
  %a = f32[8,8] parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,8]) tuple(%zero, %a)
  %loop = (s32[], f32[8,8]) while(%start), condition=%test, body=%body
  ROOT %result = f32[8,8] get-tuple-element(%loop), index=1
}}
"""


def test_kernels_count_what_they_declare_and_others_are_named():
    declared = 'custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"cost_estimate":{"flops":"1000"}}'
    found = work(_LOOP.format(instruction=declared))
    assert found.flops == found.kernel_flops == 6 * 1000 and not found.uncounted_kernels
    silent = work(_LOOP.format(instruction='custom-call(%x), custom_call_target="tpu_custom_call"'))
    assert silent.flops == 0 and silent.uncounted_kernels == {"y"}


def test_what_stays_on_the_chip_is_not_memory_traffic():
    inside = work(_LOOP.replace("{{1,0}} {instruction}", "{{1,0:S(1)}} tanh(%x)").format())
    outside = work(_LOOP.replace("{{1,0}} {instruction}", "{{1,0}} tanh(%x)").format())
    assert outside.bytes - inside.bytes == 6 * 8 * 8 * 4
