"""``moe-jax eval``."""

import json

from moe_jax.commands.open_run import opened_params
from moe_jax.commands.parsers import CommandError, add_command, add_devices, add_placement, add_workdir


def add(commands) -> None:
    evaluate = add_command(commands, "eval", run, "Evaluate a run's newest checkpoint: cross-entropy, bits per byte, by domain.",
                           overrides=True)
    add_workdir(evaluate)
    add_devices(evaluate)
    evaluate.add_argument("--dispatch", default="", help="dropless, gather, einsum or reference "
                          "(default: the config's moe.eval_dispatch)")
    evaluate.add_argument("--batches", type=int, default=0, help="validation batches (default: all of them)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    add_placement(evaluate)


def run(arguments, overrides) -> int:
    import dataclasses

    from moe_jax.dispatch import DISPATCHERS
    from moe_jax.nn.moe import RoutingMode
    from moe_jax.training import processes
    from moe_jax.training.evaluate import Evaluator, drop_fraction, loss_summary
    from moe_jax.training.loop import CAUSAL

    if arguments.dispatch and arguments.dispatch not in DISPATCHERS:
        raise CommandError(f"--dispatch={arguments.dispatch}: allowed are {', '.join(DISPATCHERS)}")
    if arguments.batches < 0:
        raise CommandError(f"--batches={arguments.batches}: must be at least 1, or 0 for all of them")
    trained, params, bias_LE, step, placed = opened_params(arguments, overrides)
    mode = RoutingMode.evaluation(trained.config, record=True)
    if arguments.dispatch:
        mode = dataclasses.replace(mode, dispatch=arguments.dispatch)
    evaluator = Evaluator(trained.config, trained.vocab_size, trained.data.vocabulary.bytes_per_token_V,
                          trained.data.domains, trained.mesh)

    def sums(mode):
        return evaluator.sums(params, bias_LE, trained.validation_batches(arguments.batches or None), mode)

    found = sums(mode)
    result = {"step": step, "dispatch": mode.dispatch if trained.config.moe_layers else "dense",
              **loss_summary(found, trained.data.domains)}
    if trained.config.moe_layers:
        result["drop_fraction"] = drop_fraction(found)
    if placed is not None:
        from moe_jax.analysis.placement import measured
        result["placement"] = measured(found["counts_LE"], found["copies_LP"], placed)
    if not mode.is_causal(trained.config):
        causal = loss_summary(sums(RoutingMode.causal(trained.config, record=True)), trained.data.domains)
        result["causal"] = {"ce": causal["ce"], "bits_per_byte": causal["bits_per_byte"], "how": CAUSAL}
    if processes.index() != 0:
        return 0
    if arguments.json:
        print(json.dumps(result))
    else:
        _print_evaluation(result)
    return 0


def _print_evaluation(result) -> None:
    def text(part):
        per_byte = part["bits_per_byte"]
        return f"{part['ce']:.4f} nats per token" + (f", {per_byte:.4f} bits per byte" if per_byte else "")

    drops = f", {100 * result['drop_fraction']:.1f} % of choices dropped" if "drop_fraction" in result else ""
    print(f"step {result['step']}, {result['dispatch']}: {text(result)} over {result['tokens']:,} tokens{drops}")
    for name, part in result["domains"].items():
        print(f"  {name:<16} {text(part)}, {part['tokens']:,} tokens")
    if "causal" in result:
        print(f"  not causal: the router saw later tokens. Routed causally: {text(result['causal'])} "
              f"({result['causal']['how']})")
    if "placement" in result:
        from moe_jax.analysis.placement import rows
        placed = result["placement"]
        print(f"{placed['copies']} copies of experts on {placed['devices']} devices, largest / mean load measured:")
        print("\n".join(rows(placed["layers"], placed["imbalance_without"], placed["imbalance_with"])))
