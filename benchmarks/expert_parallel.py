"""One MoE layer, forward and backward, under every parallel layout. Prints JSON lines.

    python -m benchmarks.expert_parallel                   # timed: eight CPU devices against one, equal total work
    python -m benchmarks.expert_parallel --slice=v5e:4x4   # compiled: the TPU compiler's estimates and what travels

What the fields mean: benchmarks/README.md. Nothing runs on a TPU; libtpu is needed for the second.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys

from benchmarks.command_line import load_average, parser_of, versions
from benchmarks.moe_layer import timed
from moe_jax import environment

REPETITIONS = 10


@dataclasses.dataclass(frozen=True)
class Case:
    """B sequences of S tokens of width D, each a group, through K of E SwiGLU experts of width F."""

    B: int
    S: int
    D: int
    F: int
    E: int
    K: int


# Timed on CPUs; compiled for TPUs.
TIMED = Case(B=8, S=512, D=256, F=1024, E=8, K=2)
COMPILED = Case(B=16, S=1024, D=2048, F=4096, E=16, K=2)
TINY = Case(B=8, S=16, D=16, F=32, E=8, K=2)  # to try the script

# moe.dispatch, moe.expert_parallelism, moe.row_exchange
LAYOUTS = {
    "einsum, compiler": ("einsum", "compiler", "auto"),
    "gather, compiler": ("gather", "compiler", "auto"),
    "gather, shard_map": ("gather", "shard_map", "auto"),
    "dropless, padded": ("dropless", "shard_map", "padded"),
    "dropless, ragged": ("dropless", "shard_map", "ragged"),
    "dropless, none": ("dropless", "none", "auto"),
}
ON_CPU = ("gather, compiler", "gather, shard_map", "dropless, padded")


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.slice:
        from moe_jax.planning.slices import prepare_environment

        prepare_environment()
        environment.prepare_process(1)
        lines = compiled(arguments.slice, TINY if arguments.tiny else COMPILED, arguments.layouts or tuple(LAYOUTS))
    else:
        environment.prepare_process(8)
        lines = measured(TINY if arguments.tiny else TIMED, arguments.layouts or ON_CPU, arguments.repetitions)
    for line in lines:
        print(json.dumps({"benchmark": "expert_parallel", **line}), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("expert_parallel", __doc__, config=False)

    def layouts(text):
        names = tuple(name.strip() for name in text.split(";"))
        for name in names:
            if name not in LAYOUTS:
                raise argparse.ArgumentTypeError(f"{name!r}: choose from {'; '.join(LAYOUTS)}")
        return names

    parser.add_argument("--slice", metavar="NAME", help="instead of timing, compile for this TPU slice, e.g. v5e:4x4")
    parser.add_argument("--layouts", type=layouts, help=f"separated by semicolons: {'; '.join(LAYOUTS)}")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="timed calls of each (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a layer of a few numbers, to try the script")
    return parser


def config_of(case: Case, layout: str, sizes: dict[str, int], dtype: str):
    """The config of one layer; the options of a mesh without an expert axis are the defaults."""
    from moe_jax.config import resolve

    dispatch, parallelism, rows = LAYOUTS[layout]
    if sizes["expert"] == 1:
        parallelism, rows = "compiler", "auto"
    return resolve({
        "model": dict(d_model=case.D, num_heads=1, num_kv_heads=1, head_dim=case.D, dtype=dtype),
        "moe": dict(num_experts=case.E, experts_per_token=case.K, d_ff=case.F, capacity_factor=1.25, dispatch=dispatch,
                    expert_parallelism=parallelism, row_exchange=rows),
        "data": dict(sequence_length=case.S, batch_size=case.B), "mesh": sizes,
    })


def mesh_sizes(**sizes) -> dict[str, int]:
    return {"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | sizes


# Timed


class Timed:
    """A compiled layer with random arguments where they belong; ``seconds()`` of one call."""

    def __init__(self, case: Case, layout: str, sizes: dict[str, int]):
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from moe_jax.nn.moe import MoELayer
        from moe_jax.planning.layer import abstract_layer, lowered_layer
        from moe_jax.sharding import make_mesh

        config = config_of(case, layout, sizes, "float32")
        self.mesh = make_mesh(sizes)
        with jax.set_mesh(self.mesh):
            self.program = lowered_layer(config, self.mesh).compile()
            _, parameters, x_BSD, _ = abstract_layer(config, self.mesh)
            values = nnx.split(MoELayer(config, nnx.Rngs(params=0)))[1]
            values = jax.tree.map(_placed, values, parameters)
            x_BSD = _placed(jax.random.normal(jax.random.key(1), x_BSD.shape), x_BSD)
        self.arguments = values, x_BSD, jnp.int32(0)
        self.temp_bytes = self.program.memory_analysis().temp_size_in_bytes

    def seconds(self) -> float:
        import time

        import jax

        started = time.perf_counter()
        jax.block_until_ready(self.program(*self.arguments))
        return time.perf_counter() - started


def _placed(value, like):
    """``value`` where ``like`` lies."""
    import jax

    return jax.device_put(jax.device_get(value), like.sharding)


def measured(case: Case, layouts, repetitions: int):
    """Yields one dict per layout and mesh: eight devices against one in the same process, on the same tokens."""
    load = load_average()
    for layout in layouts:
        programs = {sizes["expert"]: Timed(case, layout, sizes)
                    for sizes in (mesh_sizes(), mesh_sizes(data=2, expert=4), mesh_sizes(expert=8))}
        seconds = timed(programs, repetitions)
        for experts in (4, 8):
            ratios = [a / b for a, b in zip(seconds[experts], seconds[1])]
            yield {
                "layout": layout, "mesh": dict(data=8 // experts, expert=experts), **dataclasses.asdict(case),
                "ratio": statistics.median(seconds[experts]) / statistics.median(seconds[1]),
                "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2,
                "seconds": statistics.median(seconds[experts]), "one_device_seconds": statistics.median(seconds[1]),
                "temp_bytes": programs[experts].temp_bytes, "one_device_temp_bytes": programs[1].temp_bytes,
                "repetitions": repetitions, "load_average_before": load, **versions(),
            }


# Compiled


def compiled(slice_name: str, case: Case, layouts):
    """Yields one dict per layout: what the compiler says of the layer on the slice as data 2 × expert."""
    import jax

    from moe_jax.planning.hlo import collectives
    from moe_jax.planning.layer import lowered_layer
    from moe_jax.planning.program import estimated_cycles
    from moe_jax.planning.slices import parse_slice, tpu_devices
    from moe_jax.sharding import make_mesh

    slice_ = parse_slice(slice_name)
    sizes = mesh_sizes(data=2, expert=slice_.devices // 2)
    mesh = make_mesh(sizes, tpu_devices(slice_))
    for layout in layouts:
        with jax.set_mesh(mesh):
            program = lowered_layer(config_of(case, layout, sizes, "bfloat16"), mesh).compile()
        text = program.as_text()
        found = collectives(text, mesh)
        moving = [each for each in found if "all-to-all" in each.kind and each.dtype != "s32" and not each.conditional]
        yield {
            "layout": layout, "slice": slice_name, "mesh": {axis: size for axis, size in sizes.items() if size > 1},
            **dataclasses.asdict(case), "mega_cycles": estimated_cycles(text, branch=min) / 1e6,
            "mega_cycles_of_a_skewed_load": estimated_cycles(text) / 1e6,
            **kernels(case, text, slice_),
            "exchanges": [f"{each.count} x {each.kind} {each.dtype} {each.bytes}" for each in moving],
            "forward_bytes_ratio": moved_ratio(moving, "forward", case, sizes),
            "backward_bytes_ratio": moved_ratio(moving, "backward", case, sizes),
            "sent_bytes": sum(each.bytes * each.count for each in found if not each.conditional),
            "temp_bytes": program.memory_analysis().temp_size_in_bytes, **versions(),
        }


def kernels(case: Case, text: str, slice_) -> dict:
    """Pallas kernels carry no estimate: how many there are, and what their products would take at the chip's peak rate."""
    number = text.count('custom_call_target="tpu_custom_call"')
    products = 3 * 3 * 2 * case.B * case.S * case.K // slice_.devices * case.D * case.F
    seconds = products / (slice_.chip.peak_bf16_flops / slice_.chip.devices_per_chip)
    return {"kernels": number, "products_microseconds_at_peak": 1e6 * seconds}


def moved_ratio(moving, direction: str, case: Case, sizes: dict[str, int]) -> float | None:
    """Bytes that a device sends over the least: each of its K·T rows of D bf16 numbers to its expert and back, but for
    those whose expert is at home if choices are spread evenly. None where no rows travel."""
    sent = sum(each.bytes * each.count for each in moving
               if ("transpose(" in each.scope) == (direction == "backward"))
    n = sizes["expert"]
    least = 2 * 2 * case.K * (case.B * case.S // math.prod(sizes.values())) * case.D * (n - 1) / n
    return sent / least if sent else None


if __name__ == "__main__":
    sys.exit(main())
