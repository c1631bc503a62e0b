"""Every family's tiny preset, and MoE blocks beside those of Hugging Face's transformers. Prints JSON lines.

    python -m benchmarks.families                                # forward, training step and decoding of every tiny preset
    python -m benchmarks.families --families=mixtral,deepseek_v3
    python -m benchmarks.families --transformers                 # MoE blocks; needs pip install 'moe_jax[hf]'

Presets are timed beside a plain matrix product, blocks beside the same block of transformers with its default implementation of
experts, both by turns in one process. What the fields mean: benchmarks/README.md.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

from benchmarks.command_line import load_average, parsed, parser_of, versions
from benchmarks.moe_layer import CASES, WARM_UP, Program, moe_program, timed
from moe_jax import environment

REPETITIONS = 20  # a median of fewer is not worth quoting
# What transformers is compared on, and whose block: Mixtral's shares the gates among the K, OLMoE's does not.
BLOCKS = {"mixtral": "mixtral", "switch": "olmoe", "olmoe": "olmoe", "many_small": "olmoe", "tiny": "mixtral"}
DEFAULT_BLOCKS = ("mixtral", "switch", "olmoe", "many_small")
# Tokens that decoding is timed over, and the rows it writes at once.
DECODED, DECODED_ROWS = 32, 8
# The yardstick of presets: [N, N] · [N, N] in fp32.
PRODUCT_WIDTH = 1024


def main(argv: list[str] | None = None) -> int:
    arguments, settings = parsed(_parser(), argv, repetitions=1)
    if settings:
        _parser().error(f"{settings[0].split('=')[0]}: presets are timed as they are")
    from moe_jax.models.families import FAMILIES

    for name in arguments.families:
        if name not in FAMILIES:
            _parser().error(f"--families: there is no {name!r}; there are {', '.join(FAMILIES)}")
    environment.prepare_process(1)  # what `moe-jax train` does before JAX starts
    if arguments.transformers:
        lines = (line for name in arguments.cases for line in measure_block(name, arguments.repetitions))
    else:
        lines = (measure_preset(name, arguments.repetitions) for name in arguments.families or FAMILIES)
    for line in lines:
        print(json.dumps({"benchmark": "families", **line}), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("families", __doc__, config=False)

    def cases(text):
        for name in text.split(","):
            if name not in BLOCKS:
                raise argparse.ArgumentTypeError(f"{name!r}: choose from {', '.join(BLOCKS)}")
        return tuple(text.split(","))

    parser.add_argument("--families", type=lambda text: tuple(text.split(",")), default=(), help="names, separated by commas "
                        "(default: all)")
    parser.add_argument("--transformers", action="store_true", help="instead: MoE blocks beside those of transformers")
    parser.add_argument("--cases", type=cases, default=DEFAULT_BLOCKS, help=f"of them (default: {','.join(DEFAULT_BLOCKS)})")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="of each (default: %(default)s)")
    return parser


# Presets.


class Call:
    """A function without arguments that waits for its result, for :func:`benchmarks.moe_layer.timed`; ``processor``: the time
    that all threads computed, of each call."""

    def __init__(self, function):
        self.function, self.processor = function, []

    def seconds(self) -> float:
        started, computed = time.perf_counter(), time.process_time()
        self.function()
        self.processor.append(time.process_time() - computed)
        return time.perf_counter() - started


def measure_preset(family: str, repetitions: int) -> dict:
    """Tokens per second of one tiny preset on one device, forward, in training, and written one by one."""
    import jax

    from moe_jax.config import resolve
    from moe_jax.models import families
    from moe_jax.training.flops import count_parameters, forward_flops_per_token, training_flops_per_token
    from moe_jax.training.run import open_run

    settings = families.merged(families.settings(family), {"data": {"source": "synthetic", "max_bytes": 200_000}})
    config, load = resolve(settings), load_average()
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(config, pathlib.Path(folder))
        with jax.set_mesh(run.mesh):
            programs = {**_model_programs(run), "product": _product()}
            seconds = timed(programs, repetitions)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rate = 2 * PRODUCT_WIDTH**3 / median["product"]
    tokens = {"forward": config.tokens_per_step, "training": config.tokens_per_step, "decode": DECODED * DECODED_ROWS}
    # One token more or less makes no difference that could be seen; reading the prompt does.
    spent = {**median, "decode": median["decode"] - median["prefill"]}
    length = config.data.sequence_length
    flops = {"forward": forward_flops_per_token(config, run.vocab_size, length),
             "training": training_flops_per_token(config, run.vocab_size)}
    count = count_parameters(config, run.vocab_size)
    return {"family": family, "parameters": count.total, "active_parameters": count.active,
            **{f"{name}_tokens_per_second": tokens[name] / spent[name] for name in tokens},
            **{f"{name}_seconds": spent[name] for name in tokens},
            **{f"{name}_fraction_of_product_rate": flops[name] * tokens[name] / spent[name] / rate for name in flops},
            "product_flops_per_second": rate, "tokens_per_step": config.tokens_per_step, "decoded_rows": DECODED_ROWS,
            "repetitions": repetitions, "load_average_before": load, **versions()}


def _model_programs(run) -> dict:
    import itertools

    import jax
    import numpy as np

    from benchmarks.train_step import CompiledStep
    from moe_jax.inference.generate import Sampling, generate
    from moe_jax.nn.moe import RoutingMode
    from moe_jax.sharding import compiler_options
    from moe_jax.training.evaluate import put_batch
    from moe_jax.training.state import new_state
    from moe_jax.training.step import forward

    config, vocab_size = run.config, run.vocab_size
    step = CompiledStep(run.config.model.architecture, config, run)
    state = new_state(config, vocab_size, run.mesh)
    params, bias_LE = state["params"], state["router_bias_LE"]
    batches = itertools.cycle([put_batch(run.data.train.batch(number), run.mesh) for number in range(4)])
    mode = RoutingMode.evaluation(config)
    logits = jax.jit(lambda params, batch: forward(config, vocab_size, params, batch, mode, bias_LE).logits_BSV,
                     compiler_options=compiler_options())
    prompts = np.random.default_rng(0).integers(3, run.data.vocabulary.vocab_size, (DECODED_ROWS, 15)).tolist()
    write = functools.partial(generate, params, config, vocab_size, prompts, sampling=Sampling(temperature=0.0),
                              bias_LE=bias_LE, eos_id=-1)
    return {"forward": Call(lambda: jax.block_until_ready(logits(params, next(batches)))), "training": Call(step.timed_step),
            "decode": Call(lambda: write(max_tokens=DECODED + 1)), "prefill": Call(lambda: write(max_tokens=1))}


def _product() -> Program:
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (2, PRODUCT_WIDTH, PRODUCT_WIDTH))
    return Program(lambda x: jnp.dot(x[0], x[1]), (x,))


# Blocks of transformers.


def measure_block(case_name: str, repetitions: int):
    """Yields one dict per pass: our block, dropless, over that of transformers, with equal weights and equal outputs."""
    import jax
    import numpy as np

    from moe_jax.sharding import make_mesh

    case, rule, load = CASES[case_name], BLOCKS[case_name], load_average()
    moe = {"gate_order": "top_k_then_softmax"} if rule == "mixtral" else {}
    with jax.set_mesh(make_mesh({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1})):
        ours = {name: moe_program(case, "dropless", name, "float32", moe) for name in ("forward", "training")}
        theirs = TorchBlock(rule, case, *ours["training"].arguments)
        y_GTD, (d_parameters, d_x_GTD) = ours["training"].compiled(*ours["training"].arguments)
        theirs.check(np.asarray(y_GTD), np.asarray(d_x_GTD))
        del y_GTD, d_parameters, d_x_GTD
        for name, program in ours.items():
            calls = {"ours": Call(program.seconds), "theirs": Call(functools.partial(theirs.run, name))}
            seconds = timed(calls, repetitions)
            processor = {who: statistics.median(call.processor[WARM_UP:]) for who, call in calls.items()}
            ratios = [a / b for a, b in zip(seconds["theirs"], seconds["ours"])]
            yield {"case": case_name, **dataclasses.asdict(case), "pass": name, "block": type(theirs.block).__name__,
                   "experts_implementation": theirs.implementation, "threads": theirs.threads,
                   "speedup": statistics.median(seconds["theirs"]) / statistics.median(seconds["ours"]),
                   "speedup_quartiles": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2,
                   "processor_speedup": processor["theirs"] / processor["ours"],
                   "seconds": statistics.median(seconds["ours"]), "transformers_seconds": statistics.median(seconds["theirs"]),
                   "repetitions": repetitions, "load_average_before": load, "torch": importlib.metadata.version("torch"),
                   "transformers": importlib.metadata.version("transformers"), **versions()}


class TorchBlock:
    """``MixtralSparseMoeBlock`` or ``OlmoeSparseMoeBlock`` with the weights of one of our layers, in as many threads as there
    are cores."""

    def __init__(self, rule: str, case, parameters, x_GTD, d_GTD):
        try:
            import torch
            import transformers
        except ImportError as error:
            raise SystemExit("families: error: --transformers needs torch and transformers: "
                             "pip install 'moe_jax[hf]'") from error
        import numpy as np

        if int(transformers.__version__.split(".")[0]) < 5:
            raise SystemExit(f"families: error: transformers {transformers.__version__} has no grouped experts to compare with; "
                             f"install 5.0 or newer")
        self.threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(self.threads)
        sizes = dict(hidden_size=case.D, intermediate_size=case.F, num_experts_per_tok=case.K, num_attention_heads=1,
                     vocab_size=8, num_hidden_layers=1)
        if rule == "mixtral":
            from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM as Model

            config = transformers.MixtralConfig(num_local_experts=case.E, num_key_value_heads=1, **sizes)
        else:
            from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM as Model

            config = transformers.OlmoeConfig(num_experts=case.E, norm_topk_prob=False, **sizes)
        # Made as a part of a model, so that the model chooses how experts are computed.
        model = Model(config)
        self.implementation = model.config._experts_implementation
        self.block = model.model.layers[0].mlp
        tensor = lambda array: torch.from_numpy(np.array(array, np.float32))
        turned = lambda name: np.swapaxes(parameters["experts"][name][...], 1, 2)
        weights = {"gate.weight": parameters["w_router_DE"][...].T,
                   "experts.gate_up_proj": np.concatenate([turned("w_gate_EDF"), turned("w_in_EDF")], axis=1),
                   "experts.down_proj": turned("w_out_EFD")}
        self.block.load_state_dict({name: tensor(array) for name, array in weights.items()})
        self.x, self.d = tensor(x_GTD), tensor(d_GTD)

    def run(self, name: str):
        """The output, and in training all gradients."""
        import torch

        if name == "forward":
            with torch.no_grad():
                return self.block(self.x)
        self.block.zero_grad(set_to_none=True)
        self.x.grad = None
        y = self.block(self.x.requires_grad_(True))
        y.backward(self.d)
        return y

    def check(self, y_GTD, d_x_GTD) -> None:
        """That both compute the same, output and gradient."""
        y = self.run("training").detach().numpy()
        for what, ours, theirs in (("outputs", y_GTD, y), ("gradients", d_x_GTD, self.x.grad.numpy())):
            difference = abs(ours - theirs).max() / abs(theirs).max()
            if not difference < 1e-3:
                raise SystemExit(f"families: error: the {what} of both blocks differ by {difference:.2g} of the largest")


if __name__ == "__main__":
    sys.exit(main())
