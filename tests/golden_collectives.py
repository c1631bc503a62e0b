"""The golden table of collectives: what one MoE layer exchanges under every parallel layout, as compiled.

    python tests/golden_collectives.py write    # docs/collectives.md again (`make golden`); needs libtpu
    python tests/golden_collectives.py tpu      # the rows for a TPU as JSON, for tests/test_collectives.py

Programs are compiled for eight CPU devices and, where libtpu is installed, for a TPU slice that need not be there.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "collectives.md"
TOPOLOGY = "v5e:2x4"

# One layer: B sequences of S tokens, each a group. No two products of these are equal, so that bytes tell what moves.
B, S, D, F, E, K = 16, 32, 128, 192, 8, 2


@dataclasses.dataclass(frozen=True)
class Layout:
    """One line of the table's first columns; ``rows`` is moe.row_exchange."""

    dispatch: str
    parallelism: str
    mesh: tuple[tuple[str, int], ...]
    rows: str = ""

    @classmethod
    def of(cls, dispatch, parallelism, mesh, rows=""):
        pairs = (part.split() for part in mesh.split(", "))
        return cls(dispatch, parallelism, tuple((axis, int(size)) for axis, size in pairs), rows)

    @property
    def name(self) -> str:
        return f"{self.dispatch}, {self.parallelism}" + (f", {self.rows}" if self.rows else "")

    @property
    def mesh_name(self) -> str:
        return ", ".join(f"{axis} {size}" for axis, size in self.mesh)

    @property
    def sizes(self) -> dict[str, int]:
        return {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | dict(self.mesh)

    @property
    def config(self):
        from moe_jax.config import resolve

        moe = dict(num_experts=E, experts_per_token=K, d_ff=F, dispatch=self.dispatch, expert_parallelism=self.parallelism)
        if self.rows:
            moe["row_exchange"] = self.rows
        return resolve({"model": dict(d_model=D, d_ff=F, dtype="bfloat16"), "moe": moe,
                        "data": dict(batch_size=B, sequence_length=S), "mesh": self.sizes})


_MESHES = ("data 2, expert 4", "expert 8", "data 2, fsdp 2, expert 2", "expert 4, tensor 2")
ON_CPU = (
    *(Layout.of("gather", "compiler", mesh) for mesh in ("data 8", *_MESHES)),
    *(Layout.of("gather", "shard_map", mesh) for mesh in _MESHES),
    *(Layout.of("gather", "none", mesh) for mesh in (_MESHES[0], _MESHES[3])),
    Layout.of("einsum", "compiler", _MESHES[0]),
    *(Layout.of("dropless", "shard_map", mesh, "padded") for mesh in (_MESHES[0], _MESHES[2])),
    *(Layout.of("dropless", "none", mesh) for mesh in ("data 8", _MESHES[0])),
)
ON_TPU = (
    *(Layout.of("gather", "compiler", mesh) for mesh in (_MESHES[0], _MESHES[2], _MESHES[3])),
    *(Layout.of("gather", "shard_map", mesh) for mesh in (_MESHES[0], _MESHES[3])),
    Layout.of("einsum", "compiler", _MESHES[0]),
    *(Layout.of("dropless", "shard_map", _MESHES[0], rows) for rows in ("ragged", "padded")),
    Layout.of("dropless", "none", _MESHES[0]),
)


@dataclasses.dataclass(frozen=True, order=True)
class Row:
    """Collectives of one layer that differ in nothing but their place: ``bytes`` that a device sends in all ``times``."""

    direction: str
    kind: str
    axes: str
    dtype: str
    times: int
    bytes: int
    sometimes: bool = False


def collectives_of(layout: Layout, devices=None) -> list[Row]:
    """Rows of one layout, compiled for these devices (default: this process's)."""
    import jax

    from moe_jax.planning.hlo import collectives
    from moe_jax.planning.layer import lowered_layer
    from moe_jax.sharding import make_mesh

    mesh = make_mesh(layout.sizes, devices)
    with jax.set_mesh(mesh):
        options = {} if devices else {"xla_backend_optimization_level": 0}  # compiles in half the time
        text = lowered_layer(layout.config, mesh).compile(compiler_options=options).as_text()
    rows = {}
    for each in collectives(text, mesh):
        direction = "backward" if "transpose(" in each.scope else "forward"
        key = direction, each.kind, "×".join(each.axes), each.dtype, each.conditional
        times, sent = rows.get(key, (0, 0))
        rows[key] = times + each.count, sent + each.count * each.bytes
    return sorted(Row(*key[:4], *numbers, key[4]) for key, numbers in rows.items())


# The table


def cell(rows: list[Row], direction: str) -> str:
    parts = []
    for row in rows:
        if row.direction == direction:
            text = f"{row.times} {row.kind} {row.axes} {row.dtype}: {row.bytes:,}"
            parts.append(f"*({text})*" if row.sometimes else text)
    return "<br>".join(parts) or "–"


def line(layout: Layout, rows: list[Row]) -> str:
    return f"| {layout.name} | {layout.mesh_name} | {cell(rows, 'forward')} | {cell(rows, 'backward')} |"


_HEAD = f"""# Collectives of one MoE layer

What a device exchanges in one MoE layer under each parallel layout ([parallelism.md](parallelism.md) draws them), read
from the compiled program: how often, which collective, over which axis of the mesh, of which type, and the bytes that one
device sends in all of them together. In parentheses: what each further round of a skewed load needs. Made by
`make golden`; the tests compile every line again and compare it, and check it against what the layout should need.

The layer: {B} sequences of {S} tokens, D = {D}, F = {F}, E = {E}, K = {K}, bf16, capacity 1.25.
"""


def section(title: str, remark: str, found: list[tuple[Layout, list[Row]]]) -> str:
    rows = "\n".join(line(layout, rows) for layout, rows in found)
    head = "| `dispatch`, `expert_parallelism` | mesh | forward | backward |\n|---|---|---|---|"
    return f"\n## {title}\n\n{remark}\n\n{head}\n{rows}\n"


def tpu_devices():
    """Devices of the slice. Before the first use of JAX, or in a process that is prepared for it."""
    from moe_jax.planning import slices

    slices.prepare_environment()
    return slices.tpu_devices(slices.parse_slice(TOPOLOGY))


def main(what: str) -> None:
    devices = tpu_devices()
    on_tpu = [(layout, collectives_of(layout, devices)) for layout in ON_TPU]
    if what == "tpu":
        print(json.dumps([[dataclasses.astuple(row) for row in rows] for _, rows in on_tpu]))
        return
    on_cpu = [(layout, collectives_of(layout)) for layout in ON_CPU]
    # Nothing is written before everything is compiled.
    TABLE.write_text(_HEAD + section(
        f"TPU {TOPOLOGY}", "Eight chips, compiled ahead of time.", on_tpu) + section(
        "Eight CPU devices", "XLA on CPU does every collective of bf16 values in fp32: bytes are double.", on_cpu))
    print(f"wrote {TABLE.relative_to(ROOT)}")


if __name__ == "__main__":
    # Before JAX is imported.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:] not in (["write"], ["tpu"]):
        sys.exit(__doc__)
    main(sys.argv[1])
