"""Evaluation with and without recording the routing, timed alternately in one process. Prints JSON lines.

    python -m benchmarks.recording                               # configs/openmoe_tiny.py on one device
    python -m benchmarks.recording --devices=8 --batches=16

Fresh parameters: routing takes as long as after training. What the fields mean: benchmarks/README.md.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

from benchmarks.command_line import load_average, parsed, parser_of, versions
from benchmarks.train_step import quartiles
from moe_jax import environment


def main(argv: list[str] | None = None) -> int:
    arguments, overrides = parsed(_parser(), argv, passes=1, batches=1, devices=1)
    environment.prepare_process(arguments.devices)
    from moe_jax.config import load_config
    from moe_jax.errors import UserError

    try:
        line = measure(load_config(arguments.config, overrides), arguments.passes, arguments.batches)
    except UserError as error:
        print(f"recording: error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"benchmark": "recording", "config": arguments.config, "overrides": overrides, **line}), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = parser_of("recording", __doc__)
    parser.add_argument("--batches", type=int, default=8, help="validation batches in a pass (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=9, help="timed passes of each kind (default: %(default)s)")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices to pretend to have (default: %(default)s)")
    return parser


def measure(config, passes: int, batches: int) -> dict:
    """Both kinds by turns over the same batches, so that what slows the machine down slows both; then the file."""
    import jax

    from moe_jax.analysis.recording import check_recordable, record_routing, write_record
    from moe_jax.nn.moe import RoutingMode
    from moe_jax.training.evaluate import Evaluator
    from moe_jax.training.run import check_config_matches_mesh, open_run
    from moe_jax.training.state import new_state

    check_recordable(config)
    check_config_matches_mesh(config, jax.device_count())
    with tempfile.TemporaryDirectory() as folder:
        run = open_run(config, pathlib.Path(folder))
        state = new_state(config, run.vocab_size, run.mesh)
        params, bias_LE = state["params"], state["router_bias_LE"]
        read = list(run.validation_batches(batches))
        load = load_average()
        mode = RoutingMode.evaluation(config, record=True)
        evaluator = Evaluator(config, run.vocab_size, run.data.vocabulary.bytes_per_token_V, run.data.domains, run.mesh)
        kinds = {"evaluation": lambda: evaluator.sums(params, bias_LE, read, mode),
                 "recording": lambda: record_routing(run, params, bias_LE, 0, read, mode)}
        seconds, processor = {name: [] for name in kinds}, {name: [] for name in kinds}
        for number in range(passes + 1):
            for name, once in kinds.items():
                started, used = time.perf_counter(), time.process_time()
                result = once()
                if number:  # the first compiles
                    seconds[name].append(time.perf_counter() - started)
                    processor[name].append(time.process_time() - used)
        path, started = pathlib.Path(folder) / "routing" / "record.npz", time.perf_counter()
        write_record(path, result)
        written, size = time.perf_counter() - started, path.stat().st_size
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["recording"], seconds["evaluation"])]
    return {"ratio": median["recording"] / median["evaluation"], "ratio_quartiles": quartiles(ratios),
            "processor_ratio": statistics.median(processor["recording"]) / statistics.median(processor["evaluation"]),
            "ratio_with_file": (median["recording"] + written) / median["evaluation"],
            "evaluation_seconds": median["evaluation"], "recording_seconds": median["recording"], "write_seconds": written,
            "bytes_per_token": size / result.num_tokens, "tokens": result.num_tokens, "passes": passes,
            "dispatch": mode.dispatch, "mesh": dict(run.mesh.shape), "load_average_before": load, **versions()}


if __name__ == "__main__":
    sys.exit(main())
