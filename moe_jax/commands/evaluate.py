"""``moe-jax eval``."""

import functools
import json
import pathlib

from moe_jax.commands.open_run import opened_params
from moe_jax.commands.parsers import CommandError, add_command, add_devices, add_placement, add_workdir

_TASKS = ("perplexity", "choices")
_TEXT_FIELD = "--config.data.text_field="


def add(commands) -> None:
    evaluate = add_command(commands, "eval", run, "Evaluate a run's newest checkpoint: cross-entropy, bits per byte, by "
                           "domain; of its held-out text, of other documents, or of questions with answers to choose from.",
                           overrides=True)
    add_workdir(evaluate)
    add_devices(evaluate)
    evaluate.add_argument("--data", default="", metavar="FILE.jsonl", help='other text: each line an object with "text", with '
                          '"input" and "target", or with "context", "choices" and "answer" (the index of the right one), and perhaps "domain" '
                          "(docs/evaluation.md)")
    evaluate.add_argument("--task", default="", help=f"what --data holds: {' or '.join(_TASKS)} (default: as its first line "
                          "looks)")
    evaluate.add_argument("--dispatch", default="", help="dropless, gather, einsum or reference, of held-out text (default: "
                          "the config's moe.eval_dispatch); --data is always dropless")
    evaluate.add_argument("--batches", type=int, default=0, help="validation batches (default: all of them)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument("--out", default="", metavar="FILE.json", help="also write the result to this file; of --data with "
                          "the score of every document or choice")
    add_placement(evaluate)


def run(arguments, overrides) -> int:
    from moe_jax import files
    from moe_jax.dispatch import DISPATCHERS
    from moe_jax.training import processes

    if arguments.dispatch and arguments.dispatch not in DISPATCHERS:
        raise CommandError(f"--dispatch={arguments.dispatch}: allowed are {', '.join(DISPATCHERS)}")
    if arguments.batches < 0:
        raise CommandError(f"--batches={arguments.batches}: must be at least 1, or 0 for all of them")
    _check_data(arguments)
    # Read before the model is: a bad line is known at once.
    wanted = None
    if arguments.data:
        text_field = [word for word in overrides if word.startswith(_TEXT_FIELD)]
        wanted = _read(arguments.data, arguments.task, *(word.removeprefix(_TEXT_FIELD) for word in text_field[-1:]))
        overrides = [word for word in overrides if word not in text_field]  # of this file, not of the run's corpus
    opened = opened_params(arguments, overrides)
    result = _evaluated(arguments, *opened) if wanted is None else _scored(arguments.data, *wanted, *opened)
    items = result.pop("items", None)
    if processes.index() != 0:
        return 0
    if arguments.out:
        files.write_json(pathlib.Path(arguments.out), result if items is None else {**result, "items": items})
    if arguments.json:
        print(json.dumps(result))
    else:
        _PRINT[result.get("task", "")](result)
    return 0


def _check_data(arguments) -> None:
    if arguments.task and not arguments.data:
        raise CommandError(f"--task={arguments.task}: says what --data=FILE.jsonl holds, and there is none")
    if arguments.task and arguments.task not in _TASKS:
        raise CommandError(f"--task={arguments.task}: allowed are {', '.join(_TASKS)}")
    if arguments.data and arguments.dispatch:
        raise CommandError(f"--dispatch={arguments.dispatch}: is for held-out text; --data is scored text by text, which "
                           f"buffers that many share cannot do. Leave one of them out")
    if arguments.data and arguments.batches:
        raise CommandError(f"--batches={arguments.batches}: counts batches of held-out text, and --data is read whole; leave "
                           f"one of them out")


# Held-out text.


def _evaluated(arguments, trained, params, bias_LE, step, placed):
    import dataclasses

    from moe_jax.nn.moe import RoutingMode
    from moe_jax.training.evaluate import Evaluator, drop_fraction, loss_summary
    from moe_jax.training.loop import CAUSAL

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
    return result


def _text(part) -> str:
    per_byte = part["bits_per_byte"]
    return f"{part['ce']:.4f} nats per token" + (f", {per_byte:.4f} bits per byte" if per_byte else "")


def _print_evaluation(result) -> None:
    drops = f", {100 * result['drop_fraction']:.1f} % of choices dropped" if "drop_fraction" in result else ""
    print(f"step {result['step']}, {result['dispatch']}: {_text(result)} over {result['tokens']:,} tokens{drops}")
    for name, part in result["domains"].items():
        print(f"  {name:<16} {_text(part)}, {part['tokens']:,} tokens")
    if "causal" in result:
        print(f"  not causal: the router saw later tokens. Routed causally: {_text(result['causal'])} "
              f"({result['causal']['how']})")
    if "placement" in result:
        from moe_jax.analysis.placement import rows
        placed = result["placement"]
        print(f"{placed['copies']} copies of experts on {placed['devices']} devices, largest / mean load measured:")
        print("\n".join(rows(placed["layers"], placed["imbalance_without"], placed["imbalance_with"])))


# A file.


def _read(path, task, text_field="text"):
    """(task, its documents, texts given others, or questions)."""
    from moe_jax.data import questions

    task = task or questions.task_of(path)
    if task == questions.CHOICES:
        return task, questions.questions(path)
    if text_field == "text" and questions.is_given(path):
        return task, questions.targets(path)
    return task, questions.documents(path, text_field)


def _scored(path, task, items, trained, params, bias_LE, step, placed):
    from moe_jax.data.documents import Document
    from moe_jax.inference import scoring

    del placed  # acts through the parameters
    scoring.check_scorable(trained.config, items)
    score = functools.partial(_log_likelihoods, trained, params, bias_LE)
    vocabulary, data = trained.data.vocabulary, trained.config.data
    if isinstance(items[0], Document):
        found = scoring.perplexity(items, vocabulary, score, data.sequence_length)
    else:
        function = scoring.multiple_choice if task == "choices" else scoring.perplexity_given
        found = function(items, vocabulary, score, data.sequence_length, data.target_length)
    return {"step": step, "task": task, "data": path, **found}


def _log_likelihoods(trained, params, bias_LE, texts):
    from moe_jax.inference.scoring import log_likelihoods
    return log_likelihoods(params, bias_LE, texts, trained.config, trained.vocab_size, trained.mesh,
                           trained.data.vocabulary.begin_id)


def _print_perplexity(result) -> None:
    print(f"step {result['step']}, {result['data']}: {_text(result)}, perplexity {result['perplexity']:.4g}; "
          f"{result['documents']:,} documents, {result['tokens']:,} tokens")
    for name, part in result["domains"].items():
        print(f"  {name:<16} {_text(part)}, perplexity {part['perplexity']:.4g}; {part['documents']:,} documents, "
              f"{part['tokens']:,} tokens")
    if result["cut"] and result.get("given"):
        print(f"  {result['cut']:,} inputs are longer than the model's rows and lost their beginning")
    elif result["cut"]:
        print(f"  {result['cut']:,} documents are longer than the model's rows and were read in parts, each from nothing")


def _print_choices(result) -> None:
    def text(part):
        return (f"accuracy {100 * part['accuracy']:.2f} %, by likelihood per byte {100 * part['accuracy_normalised']:.2f} %, "
                f"by guessing {100 * part['guessing']:.2f} %; {part['questions']:,} questions")

    print(f"step {result['step']}, {result['data']}: {text(result)}")
    for name, part in result["domains"].items():
        print(f"  {name:<16} {text(part)}")
    if result["cut"]:
        print(f"  {result['cut']:,} contexts are longer than the model's rows and lost their beginning")


_PRINT = {"": _print_evaluation, "perplexity": _print_perplexity, "choices": _print_choices}
