"""One MoE layer beside a dense FFN of equal active FLOPs, timed alternately in one process. Prints JSON lines.

    python -m benchmarks.moe_layer                               # five cases, forward, and forward + backward
    python -m benchmarks.moe_layer --cases=olmoe --dispatches=dropless,einsum
    python -m benchmarks.moe_layer --scaling=scaling.png         # cost over E = 8 ... 512 at fixed active FLOPs

The layer is moe_jax.nn.moe.MoELayer as a model uses it: router product, choice, dispatch, experts, combine. Backward is
with respect to everything: inputs, router, experts. What the fields mean: benchmarks/README.md.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time

from benchmarks.command_line import load_average, parser_of, versions
from moe_jax import environment

REPETITIONS = 20  # a median of fewer is not worth quoting
WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """T tokens of width D through K of E SwiGLU experts of width F. skew: this share of the tokens has one favourite."""

    T: int
    D: int
    F: int
    E: int
    K: int
    skew: float = 0.0

    @property
    def flops(self) -> int:
        """Of the K experts' three products, forward."""
        return 2 * 3 * self.T * self.K * self.D * self.F


CASES = {
    "mixtral": Case(T=2048, D=256, F=1024, E=8, K=2),
    "switch": Case(T=4096, D=512, F=2048, E=32, K=1),
    "olmoe": Case(T=2048, D=512, F=256, E=64, K=8),
    "skewed": Case(T=2048, D=256, F=1024, E=8, K=2, skew=0.5),
    "many_small": Case(T=4096, D=256, F=128, E=256, K=8),
    "tiny": Case(T=64, D=16, F=32, E=4, K=2),  # to try the script
}
DEFAULT_CASES = ("mixtral", "switch", "olmoe", "skewed", "many_small")
SCALING = tuple(Case(T=2048, D=256, F=256, E=experts, K=4) for experts in (8, 16, 32, 64, 128, 256, 512))


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    environment.prepare_process(1)  # what `moe-jax train` does before JAX starts
    cases = [(name, CASES[name]) for name in arguments.cases]
    if arguments.scaling:
        cases = [(f"scaling_{case.E}", case) for case in SCALING]
    lines = []
    for name, case in cases:
        for line in measure(case, arguments.dispatches, arguments.passes, arguments.repetitions, arguments.dtype):
            lines.append({"benchmark": "moe_layer", "case": name, **dataclasses.asdict(case), **line})
            print(json.dumps(lines[-1]), flush=True)
    if arguments.scaling:
        draw_scaling(lines, arguments.scaling)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("moe_layer", __doc__, config=False)

    def names(allowed):
        def parse(text):
            chosen = tuple(text.split(","))
            for name in chosen:
                if name not in allowed:
                    raise argparse.ArgumentTypeError(f"{name!r}: choose from {', '.join(allowed)}")
            return chosen
        return parse

    parser.add_argument("--cases", type=names(tuple(CASES)), default=DEFAULT_CASES, help="default: the five of the table")
    parser.add_argument("--dispatches", type=names(("dropless", "gather", "einsum", "reference")),
                        default=("dropless", "gather"), help="default: dropless,gather")
    parser.add_argument("--passes", type=names(("forward", "training")), default=("forward", "training"))
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="of each (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--scaling", metavar="FILE.png", help="instead: E from 8 to 512 at fixed active FLOPs; draws a plot")
    return parser


def measure(case: Case, dispatches, passes, repetitions: int, dtype: str = "float32"):
    """Yields one dict per pass and dispatcher."""
    import jax

    from moe_jax.sharding import make_mesh

    load = load_average()
    with jax.set_mesh(make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1})):
        for name in passes:
            programs = {"dense": dense_program(case, name, dtype), "matmul": matmul_program(case, name, dtype)}
            programs |= {d: moe_program(case, d, name, dtype) for d in dispatches}
            seconds = timed(programs, repetitions)
            flops = case.flops * (3 if name == "training" else 1)
            rate = flops / statistics.median(seconds["matmul"])
            for dispatch in dispatches:
                ratios = [a / b for a, b in zip(seconds[dispatch], seconds["dense"])]
                yield {
                    "pass": name, "dispatch": dispatch, "dtype": dtype,
                    "ratio": statistics.median(seconds[dispatch]) / statistics.median(seconds["dense"]),
                    "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2,
                    "seconds": statistics.median(seconds[dispatch]), "dense_seconds": statistics.median(seconds["dense"]),
                    "matmul_seconds": statistics.median(seconds["matmul"]), "matmul_flops_per_second": rate,
                    "fraction_of_matmul_rate": flops / statistics.median(seconds[dispatch]) / rate,
                    "limit": arithmetic_limit(case, dispatch),
                    "temp_bytes": programs[dispatch].temp_bytes, "dense_temp_bytes": programs["dense"].temp_bytes,
                    "expert_bytes": programs[dispatch].expert_bytes,
                    "repetitions": repetitions, "load_average_before": load, **versions(),
                }


def arithmetic_limit(case: Case, dispatch: str) -> float:
    """Floating-point operations of the layer over those of the dense FFN: what a machine that does nothing but
    multiply would need. The router's product counts; so do the slots of a capacity of 1.25, filled or not, and the
    products with one-hot masks."""
    experts = case.flops * {"gather": 1.25, "einsum": 1.25, "reference": case.E / case.K}.get(dispatch, 1.0)
    choices = case.T * case.K
    # Mask [T, N] · [N, P] twice, with and without gates, then [P, T] · [T, D] and [T, P] · [P, D].
    one_hot = 2 * 1.25 * choices * case.T * (2 * choices + 2 * case.D) if dispatch == "einsum" else 0
    return (experts + one_hot + 2 * case.T * case.D * case.E) / case.flops


class Program:
    """A compiled function with arguments that are on the device."""

    def __init__(self, function, arguments, expert_bytes: int = 0):
        import jax

        self.arguments = jax.block_until_ready(arguments)
        self.compiled = jax.jit(function).lower(*self.arguments).compile()
        analysis = self.compiled.memory_analysis()
        self.temp_bytes = None if analysis is None else analysis.temp_size_in_bytes
        self.expert_bytes = expert_bytes

    def seconds(self) -> float:
        import jax

        started = time.perf_counter()
        jax.block_until_ready(self.compiled(*self.arguments))
        return time.perf_counter() - started


def timed(programs: dict[str, Program], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each, in turns: what slows the machine down slows all of them."""
    for _ in range(WARM_UP):
        for program in programs.values():
            program.seconds()
    seconds = {name: [] for name in programs}
    for _ in range(repetitions):
        for name, program in programs.items():
            seconds[name].append(program.seconds())
    return seconds


def _with_gradients(function, pass_name: str):
    """``function(parameters, x)``, or its gradients with respect to both, for a given gradient of the result."""
    import jax

    if pass_name == "forward":
        return lambda parameters, x, d: function(parameters, x)

    def gradients(parameters, x, d):
        y, pullback = jax.vjp(function, parameters, x)
        return y, pullback(jax.reshard(d, jax.typeof(y).sharding.spec))
    return gradients


def dense_program(case: Case, pass_name: str, dtype: str) -> Program:
    """One SwiGLU FFN of width K·F."""
    from flax import nnx

    from moe_jax.nn.mlp import MLP

    graph, parameters = nnx.split(MLP(case.D, case.K * case.F, "swiglu", 1.0, nnx.Rngs(0)))
    x_GTD, d_GTD = inputs(case, dtype)
    return Program(_with_gradients(lambda p, x: nnx.merge(graph, p)(x), pass_name), (parameters, x_GTD, d_GTD))


def moe_program(case: Case, dispatch: str, pass_name: str, dtype: str, moe: dict | None = None) -> Program:
    """``moe``: other settings of the layer."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from moe_jax.config import resolve
    from moe_jax.nn.moe import MoELayer, RoutingMode

    config = resolve({
        "model": {"d_model": case.D, "num_heads": 1, "num_kv_heads": 1, "head_dim": case.D, "dtype": dtype},
        "moe": {"num_experts": case.E, "experts_per_token": case.K, "d_ff": case.F, "capacity_factor": 1.25,
                "dispatch": dispatch, "activation": "swiglu", **(moe or {})},
        "data": {"sequence_length": case.T, "batch_size": 1},
    })
    graph, parameters = nnx.split(MoELayer(config, nnx.Rngs(0)))
    x_GTD, d_GTD = inputs(case, dtype)
    if case.skew:
        # Those tokens move along the first expert's router weights until it is what they want most.
        w_D = parameters["w_router_DE"][...][:, 0]
        x_GTD = x_GTD.at[:, : int(case.skew * case.T)].add((10 * w_D / jnp.sum(w_D**2)).astype(x_GTD.dtype))
    mode, valid_GT = RoutingMode(dispatch, 1.25), jnp.ones(x_GTD.shape[:2], bool)
    bias_E = jnp.zeros(case.E)

    def layer(parameters, x_GTD):
        return nnx.merge(graph, parameters)(x_GTD, valid_GT, mode, bias_E)[0]
    expert_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(parameters["experts"]))
    return Program(_with_gradients(layer, pass_name), (parameters, x_GTD, d_GTD), expert_bytes)


def matmul_program(case: Case, pass_name: str, dtype: str) -> Program:
    """The dense FFN's products and nothing else: three forward, nine in training. The machine's measured rate."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(2), 2)
    a = jax.random.normal(keys[0], (case.T, case.D), dtype)
    b = jax.random.normal(keys[1], (9, case.D, case.K * case.F), dtype)
    products = 9 if pass_name == "training" else 3

    def multiply(a, b):
        return [jnp.dot(a, b[i]) for i in range(products)]
    return Program(multiply, (a, b))


def inputs(case: Case, dtype: str):
    """Tokens and a gradient of the output, ``[1, T, D]``."""
    import jax

    keys = jax.random.split(jax.random.key(1), 2)
    return tuple(jax.random.normal(key, (1, case.T, case.D), dtype) for key in keys)


def draw_scaling(lines: list[dict], path: str) -> None:
    """Ratio over the number of experts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for dispatch, name in dict.fromkeys((line["dispatch"], line["pass"]) for line in lines):
        chosen = [line for line in lines if (line["dispatch"], line["pass"]) == (dispatch, name)]
        axes.plot([line["E"] for line in chosen], [line["ratio"] for line in chosen], marker="o",
                  label=f"{dispatch}, {name}")
    case = SCALING[0]
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xticks([c.E for c in SCALING], [str(c.E) for c in SCALING])
    axes.set_xlabel(f"experts E (T={case.T}, D={case.D}, F={case.F}, K={case.K} fixed)")
    axes.set_ylabel("time / dense FFN of equal active FLOPs")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
