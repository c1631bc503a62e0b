"""Collectives read from compiled programs: every form XLA writes them in, and real programs whose collectives are known."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax import lax
from jax.sharding import PartitionSpec as P

from moe_jax.planning.hlo import collectives, replica_groups
from moe_jax.planning.program import arrays, estimated_cycles, parse, size_in_bytes
from moe_jax.sharding import TOKEN_AXES


def mesh_of(**sizes):
    return types.SimpleNamespace(shape=dict(data=1, fsdp=1, expert=1, tensor=1) | sizes)


EIGHT = mesh_of(data=2, expert=4)
HEAD = "HloModule m, is_scheduled=true, num_partitions=8\n\n"


def program(body, *others):
    """The text of a program whose entry computation has these lines."""
    return HEAD + "\n\n".join([*others, "ENTRY %main (p: bf16[8,128]) -> bf16[8,128] {\n"
                                        "  %p = bf16[8,128]{1,0} parameter(0)\n" + body + "\n}\n"])


def only(found):
    assert len(found) == 1, found
    return found[0]


# Groups


@pytest.mark.parametrize("text, groups", [
    ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
    ("replica_groups={}", [[0, 1, 2, 3]]),
    ("dimensions={0}", [[0, 1, 2, 3]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a','c'}", [[0, 1, 2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}", [[0, 3], [1, 2]]),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
])
def test_groups_are_read_in_every_notation(text, groups):
    assert replica_groups(f", channel_id=1, {text}, use_global_device_ids=true, x={{}}", 4) == groups


@pytest.mark.parametrize("groups, axes, devices", [
    ("{{0,1,2,3},{4,5,6,7}}", ("expert",), 4),
    ("{{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
    ("{{0,1,2,3,4,5,6,7}}", ("data", "expert"), 8),
    ("{{0,1},{2,3},{4,5},{6,7}}", ("expert", "?"), 2),
    ("{{0,5},{1,4},{2,7},{3,6}}", ("data", "expert", "?"), 2),
    ("{{0},{1},{2},{3},{4},{5},{6},{7}}", (), 1),
])
def test_groups_are_named_by_the_axes_they_run_over(groups, axes, devices):
    found = only(collectives(program(
        f"  ROOT %r = bf16[8,128]{{1,0}} all-reduce(%p), replica_groups={groups}, to_apply=%add"), EIGHT))
    assert (found.axes, found.devices) == (axes, devices)
    assert found.bytes == 2 * (8 * 128 * 2) * (devices - 1) // devices


def test_a_program_for_another_mesh_is_refused():
    with pytest.raises(ValueError, match="for 8 devices and the mesh .* has 4"):
        collectives(program("  ROOT %r = bf16[8,128]{1,0} copy(%p)"), mesh_of(expert=4))
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        parse("module @jit_f {}")


# Shapes


def test_shapes_with_layouts_tuples_and_small_types():
    assert arrays("(bf16[2,8]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/u32[], token[], f8e4m3fn[3]{0})") == [
        ("bf16", (2, 8)), ("u32", ()), ("f8e4m3fn", (3,))]
    assert [size_in_bytes(shape) for shape in ("bf16[2,8]", "(f32[3], s4[3])", "pred[5]", "c64[2]", "f32[<=4]", "token[]")] == [
        32, 14, 5, 16, 16, 0]


# One collective each: kind, bytes that a device sends, on groups of 4


@pytest.mark.parametrize("line, sent, shape", [
    ("bf16[32,128]{1,0} all-gather(%p), dimensions={0}", 3 * 2048, "bf16[8,128]"),
    ("bf16[8,128]{1,0} all-reduce(%p), to_apply=%add", 2 * 3 * 512, "bf16[8,128]"),
    ("bf16[2,128]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add", 3 * 512, "bf16[8,128]"),
    ("bf16[8,128]{1,0} all-to-all(%p), dimensions={0}", 3 * 512, "bf16[8,128]"),
    ("(bf16[8,128]{1,0}, bf16[8,128]{1,0}) all-to-all(%p, %p)", 3 * 1024, "2 x bf16[8,128]"),
    ("(bf16[8,128], f32[2]) all-reduce(%p, %q), to_apply=%add", 2 * 3 * 514, "bf16[8,128], f32[2]"),
])
def test_bytes_are_what_one_device_sends(line, sent, shape):
    body = "  %q = f32[2]{0} constant({0, 0})\n  ROOT %r = " + line + ", channel_id=1, replica_groups=[2,4]<=[8]"
    found = only(collectives(program(body), EIGHT))
    assert (found.bytes, found.shape, found.axes, found.count) == (sent, shape, ("expert",), 1)
    assert found.dtype == ("bf16+f32" if "f32" in shape else "bf16")
    assert not found.asynchronous and not found.conditional


def test_a_ragged_exchange_moves_at_most_the_smaller_buffer():
    body = """  %out = bf16[32,128]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %n = s32[4]{0} constant({2, 2, 2, 2})
  ROOT %r = bf16[32,128]{1,0} ragged-all-to-all(%p, %out, %n, %n, %n, /*index=5*/%n), replica_groups={{0,1,2,3},{4,5,6,7}}"""
    found = only(collectives(program(body), EIGHT))
    assert (found.kind, found.bytes, found.dtype) == ("ragged-all-to-all", 3 * 512, "bf16")


@pytest.mark.parametrize("pairs, axes, devices", [
    ("{{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}", ("expert",), 4),
    ("{{0,4},{4,0},{1,5},{5,1}}", ("data",), 2),
    ("{{0,7},{7,0}}", ("data", "expert"), 8),
    ("{{0,0},{1,1}}", (), 1),
])
def test_a_permutation_runs_over_the_axes_it_crosses(pairs, axes, devices):
    found = only(collectives(program(
        f"  ROOT %r = bf16[8,128]{{1,0}} collective-permute(%p), source_target_pairs={pairs}"), EIGHT))
    assert (found.axes, found.devices, found.bytes) == (axes, devices, 2048 if axes else 0)


# Asynchronous forms

DOT = "  %d = bf16[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}\n"
COUNTER = "  %i = s32[] constant(3)\n  %j = s32[] add(%i, %i)\n"
LARGE = "  %f = f32[64,64]{1,0} fusion(%p), kind=kLoop, calls=%something\n"


@pytest.mark.parametrize("between, overlapped", [("", False), (COUNTER, False), (DOT, True), (LARGE, True),
                                                 (COUNTER + DOT, True)])
@pytest.mark.parametrize("form", ["start", "wrapped", "update"])
def test_between_start_and_done_something_is_computed_or_not(form, between, overlapped):
    wrapped = ("%wrapped (q: bf16[8,128]) -> bf16[2,128] {\n  %q = bf16[8,128]{1,0} parameter(0)\n"
               "  ROOT %rs = bf16[2,128]{1,0} reduce-scatter(%q), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add, "
               'metadata={op_name="jit(f)/a/b"}\n}')
    tuple_shape = "((bf16[8,128]{1,0}), bf16[2,128]{1,0}, u32[])"
    if form == "start":
        start = (f"  %s = {tuple_shape} reduce-scatter-start(%p), replica_groups=[2,4]<=[8], dimensions={{0}}, to_apply=%add, "
                 'metadata={op_name="jit(f)/a/b"}\n')
        done = "  ROOT %r = bf16[2,128]{1,0} reduce-scatter-done(%s)"
    else:
        start = f"  %s = {tuple_shape} async-start(%p), calls=%wrapped\n"
        done = "  ROOT %r = bf16[2,128]{1,0} async-done(%s), calls=%wrapped"
    if form == "update":
        start += f"  %u = {tuple_shape} async-update(%s), calls=%wrapped\n"
        done = done.replace("(%s)", "(%u)")
    found = only(collectives(program(DOT.replace("%d", "%before") + start + between + done, wrapped), EIGHT))
    assert (found.kind, found.bytes, found.scope) == ("reduce-scatter", 3 * 512, "jit(f)/a/b")
    assert found.asynchronous and found.overlapped == overlapped


def test_a_start_that_is_waited_for_in_the_next_round_overlaps_with_the_rest_of_this_one():
    body = ("  %s = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}\n"
            + DOT + "  ROOT %t = (bf16[8,128]{1,0}) tuple(%s)")
    assert only(collectives(program(body), EIGHT)).overlapped


def test_a_copy_under_way_is_no_collective():
    body = """  %s = (bf16[8,128]{1,0:S(1)}, bf16[8,128]{1,0}, u32[]) copy-start(%p)
  ROOT %r = bf16[8,128]{1,0:S(1)} copy-done(%s)"""
    assert collectives(program(body), EIGHT) == ()


def test_on_tpus_a_collective_fused_with_products_counts_once():
    def computation(name, body, parameters="q: bf16[8,128]"):
        return (f"%{name} ({parameters}) -> bf16[8,128] {{\n  %q.{name} = bf16[8,128]{{1,0}} parameter(0)\n"
                f"  %ag.{name} = bf16[32,128]{{1,0}} all-gather(%q.{name}), channel_id=4, replica_groups=[2,4]<=[8], "
                f'dimensions={{0}}, backend_config={{"async_collective_fusion_config":{{"flag_start":"2"}}}}\n{body}\n}}')

    target = '  ROOT %c.{0} = bf16[32,128]{{1,0}} custom-call(%ag.{0}), custom_call_target="{1}"'
    others = [computation("begin", target.format("begin", "AsyncCollectiveStart")),
              computation("go_on", "  ROOT %d2 = bf16[8,8]{1,0} dot(%q.go_on, %q.go_on)"),
              computation("end", target.format("end", "AsyncCollectiveDone"))]
    body = """  %start = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) fusion(%p), kind=kCustom, calls=%begin
  %step = (bf16[8,8]{1,0}, bf16[32,128]{1,0}) fusion(%start), kind=kOutput, calls=%go_on
  ROOT %done = bf16[32,128]{1,0} fusion(%step), kind=kCustom, calls=%end"""
    found = only(collectives(program(body, *others), EIGHT))
    assert (found.kind, found.asynchronous, found.overlapped, found.bytes) == ("all-gather", True, True, 3 * 2048)
    body = "\n".join(line for line in body.splitlines() if "%step =" not in line).replace("(%step)", "(%start)")
    without = only(collectives(program(body, *others), EIGHT))
    assert without.asynchronous and not without.overlapped


def test_on_tpus_an_all_reduce_fused_with_the_slice_behind_it_is_a_reduce_scatter():
    fused = """%all-reduce-scatter (q: bf16[8,128]) -> bf16[2,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  %ar = bf16[8,128]{1,0} all-reduce(%q), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %i = u32[] partition-id()
  ROOT %s = bf16[2,128]{1,0} dynamic-slice(%ar, %i, %i), dynamic_slice_sizes={2,128}
}"""
    body = '  ROOT %r = bf16[2,128]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter, metadata={op_name="jit(f)/g"}'
    found = only(collectives(program(body, fused), EIGHT))
    assert (found.kind, found.bytes, found.scope) == ("reduce-scatter", 3 * 512, "jit(f)/g")


def test_between_slices_a_collective_is_what_the_host_sends():
    """Each slice numbers its own four devices; the mesh has two slices along data."""
    send = ('frontend_attributes={_xla_host_transfer_rendezvous="all-reduce_0",_xla_megascale_transfer_type="ALL_REDUCE"}')
    body = f"""  %rs = bf16[2,128]{{1,0}} reduce-scatter(%p), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}, to_apply=%add
  %a = token[] after-all()
  %send = (bf16[2,128]{{1,0}}, u32[], token[]) send(%rs, %a), channel_id=2, is_host_transfer=true, {send}
  %recv = (bf16[2,128]{{1,0}}, u32[], token[]) recv(%a), channel_id=1, is_host_transfer=true, {send}
{DOT}  %sd = token[] send-done(%send), channel_id=2
  %rd = (bf16[2,128]{{1,0}}, token[]) recv-done(%recv), channel_id=1
  ROOT %r = bf16[2,128]{{1,0}} get-tuple-element(%rd), index=0"""
    mesh = mesh_of(data=2, expert=4)
    mesh.devices = np.array([types.SimpleNamespace(slice_index=i // 4) for i in range(8)]).reshape(2, 1, 4, 1)
    inside, between = collectives(program(body).replace("num_partitions=8", "num_partitions=4"), mesh)
    assert (inside.kind, inside.axes, inside.between_slices) == ("reduce-scatter", ("expert",), False)
    assert (between.kind, between.axes, between.devices, between.bytes) == ("all-reduce", ("data",), 2, 512)
    assert between.between_slices and between.asynchronous and between.overlapped


# Loops and branches


def loop(trips_text="", limit="constant(6)", start="constant(0)", step="constant(1)"):
    others = [f"""%body (t: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {{
  %t = (s32[], bf16[8,128]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[8,128]{{1,0}} get-tuple-element(%t), index=1
  %one = s32[] {step}
  %next = s32[] add(%i, %one)
  %y = bf16[8,128]{{1,0}} all-reduce(%x), replica_groups={{}}, to_apply=%add
  ROOT %u = (s32[], bf16[8,128]{{1,0}}) tuple(%next, %y)
}}""", """%less (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %lt = pred[] compare(%a, %b), direction=LT
}""", f"""%test (v: (s32[], bf16[8,128])) -> pred[] {{
  %v = (s32[], bf16[8,128]{{1,0}}) parameter(0)
  %k = s32[] get-tuple-element(%v), index=0
  %limit = s32[] {limit}
  ROOT %go = pred[] fusion(%k, %limit), kind=kLoop, calls=%less
}}"""]
    body = f"""  %c = s32[] {start}
  %zero = s32[] copy(%c)
  %start = (s32[], bf16[8,128]{{1,0}}) tuple(%zero, %p)
  ROOT %w = (s32[], bf16[8,128]{{1,0}}) while(%start), condition=%test, body=%body{trips_text}"""
    return program(body, *others)


@pytest.mark.parametrize("text, count, certain", [
    (loop(', backend_config={"known_trip_count":{"n":"5"}}'), 5, True),
    (loop(), 6, True),
    (loop(start="constant(2)"), 4, True),
    (loop(step="constant(4)"), 2, True),
    (loop(limit="get-tuple-element(%v), index=0"), 1, False),
    (loop(start="parameter(0)"), 1, False),
])
def test_rounds_of_a_loop_are_noted_or_read_from_its_counter(text, count, certain):
    found = only(collectives(text, EIGHT))
    assert (found.count, found.conditional) == (count, not certain)


def test_of_the_branches_the_one_that_sends_most_counts():
    def branch(name, lines):
        return f"%{name} (q{name}: bf16[8,128]) -> bf16[8,128] {{\n  %q{name} = bf16[8,128]{{1,0}} parameter(0)\n{lines}\n}}"

    small = branch("a", "  ROOT %ra = bf16[8,128]{1,0} all-reduce(%qa), replica_groups={}, to_apply=%add")
    large = branch("b", "  ROOT %rb = bf16[64,128]{1,0} all-gather(%qb), replica_groups={}, dimensions={0}")
    for names in ("branch_computations={%a, %b}", "true_computation=%a, false_computation=%b"):
        body = f"  ROOT %r = bf16[8,128]{{1,0}} conditional(%k, %p, %p), {names}"
        found = only(collectives(program(body, small, large), EIGHT))
        assert found.kind == "all-gather" and found.conditional and found.count == 1


def test_estimated_cycles_are_multiplied_by_rounds():
    text = loop().replace("  %next = s32[] add(%i, %one)",
                          '  %next = s32[] add(%i, %one), backend_config={"window_config":{"estimated_cycles":"100"}}')
    assert estimated_cycles(text) == 600
    assert estimated_cycles(loop()) is None
    open_ended = text.replace("constant(0)", "parameter(0)")
    assert estimated_cycles(open_ended) == 100 and estimated_cycles(open_ended, branch=min) is None


def test_estimated_cycles_of_the_dearest_or_the_cheapest_branch():
    def branch(name, cycles):
        return (f"%{name} (q{name}: bf16[8,128]) -> bf16[8,128] {{\n  ROOT %q{name} = bf16[8,128]{{1,0}} parameter(0), "
                f'backend_config={{"estimated_cycles":"{cycles}"}}\n}}')

    text = program("  ROOT %r = bf16[8,128]{1,0} conditional(%k, %p, %p), branch_computations={%a, %b}",
                   branch("a", 70), branch("b", 20))
    assert estimated_cycles(text) == 70 and estimated_cycles(text, branch=min) == 20


# Real programs of this JAX, for eight CPU devices

MESHES = {"expert": dict(data=2, expert=4), "fsdp": dict(data=2, fsdp=2, expert=2), "tensor": dict(expert=4, tensor=2)}


@functools.lru_cache(maxsize=None)
def compiled(name, axis):
    mesh = tiny.mesh(**MESHES[axis])
    size = mesh.shape[axis]

    def scan(x):
        return lax.fori_loop(0, 3, lambda i, x: lax.fori_loop(0, 5, lambda j, x: lax.psum(x, axis) / size, x), x)

    functions = {
        "all-gather": lambda x: lax.all_gather(x, axis, tiled=True),
        "all-reduce": lambda x: lax.psum(x, axis),
        "reduce-scatter": lambda x: lax.psum_scatter(x, axis, tiled=True),
        "all-to-all": lambda x: lax.all_to_all(x, axis, 0, 1, tiled=True),
        "collective-permute": lambda x: lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)]),
        "loop": scan,
    }
    everywhere = P((*TOKEN_AXES, "tensor"))
    function = jax.shard_map(functions[name], mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    x = jax.ShapeDtypeStruct((8 * 16, 64), jnp.float32, sharding=jax.NamedSharding(mesh, everywhere))
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(x).compile().as_text(), mesh


@pytest.mark.parametrize("axis", MESHES)
@pytest.mark.parametrize("kind", ["all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"])
def test_a_collective_of_a_real_program(kind, axis):
    text, mesh = compiled(kind, axis)
    found = only(collectives(text, mesh))
    size, n = 16 * 64 * 4, mesh.shape[axis]
    sent = {"all-gather": size * (n - 1), "all-reduce": 2 * size * (n - 1) // n, "collective-permute": size}
    assert (found.kind, found.axes, found.devices, found.dtype, found.count) == (kind, (axis,), n, "f32", 1)
    assert found.bytes == sent.get(kind, size * (n - 1) // n)


def test_nested_loops_of_a_real_program():
    text, mesh = compiled("loop", "expert")
    found = only(collectives(text, mesh))
    assert (found.kind, found.count, found.conditional) == ("all-reduce", 15, False)
    assert "while/body" in found.scope


def test_the_compilers_all_to_all_of_a_real_program():
    """Explicit sharding moved from one dimension to another, written by the compiler over a mesh of its own."""
    mesh = tiny.mesh(data=2, fsdp=2, expert=2)
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((16, 8, 4), jnp.float32, sharding=jax.NamedSharding(mesh, P(TOKEN_AXES)))
        step = jax.jit(lambda x: jax.reshard(2 * jax.reshard(x + 1, P(("data", "fsdp"), "expert")), P(TOKEN_AXES)))
        found = collectives(step.lower(x).compile().as_text(), mesh)
    assert [(each.kind, each.axes, each.bytes) for each in found] == [("all-to-all", ("expert",), 2 * 8 * 4 * 4 // 2)] * 2
