"""``moe-jax analyze``."""

import argparse
import json
import pathlib
import re

from moe_jax.commands.parsers import CommandError, add_command

_STEP = re.compile(r"step_(\d+)")


class _Checkpoint(argparse.Action):
    """A run directory, or one of its checkpoints: also sets ``step``."""

    def __call__(self, parser, namespace, values, option_string=None):
        if namespace.named_by:
            parser.error(f"{namespace.named_by} and {option_string} both name the run; give one of them")
        namespace.named_by, path = option_string, pathlib.Path(values)
        match = _STEP.fullmatch(path.name)
        if match and path.absolute().parent.name == "checkpoints":
            namespace.workdir, namespace.step = str(path.absolute().parent.parent), int(match.group(1))
        else:
            namespace.workdir, namespace.step = values, None


def add(commands) -> None:
    command = add_command(commands, "analyze", run, "See where a run's tokens go: the routing of every saved step is recorded "
                          "once, and every published analysis of it becomes a table and a figure in one report.",
                          overrides=True)
    command.add_argument("--workdir", default="workdir", action=_Checkpoint, help="the run directory (default: %(default)s)")
    command.add_argument("--checkpoint", dest="workdir", action=_Checkpoint, metavar="PATH", help="the same, or one of its "
                         "checkpoints, WORKDIR/checkpoints/step_…: that step and those before it")
    command.add_argument("--record", action="append", default=[], metavar="FILE", help="analyse recorded routing (an .npz "
                         "that write_record wrote) instead of a checkpoint; several times for several steps")
    command.add_argument("--data", default="", metavar="SOURCE", help="other text, named as data.source is, e.g. files:FOLDER "
                         "with a folder per domain; all of it is read (default: the run's held-out text)")
    command.add_argument("--out", default="", metavar="FOLDER", help="where the report goes (default: "
                         "WORKDIR/routing_report, with --record ./routing_report)")
    command.add_argument("--batches", type=int, help="evaluation batches to record; 0 = all of them (default: about 131,072 "
                         "tokens)")
    command.add_argument("--dispatch", default="", help="dropless, gather, einsum or reference (default: the config's "
                         "moe.eval_dispatch); one with buffers shows drops")
    command.add_argument("--turn-separator", metavar="TEXT", help=r"text that begins a turn of a conversation; \n is a line "
                         r"break, '' looks for none (default: '\n### User:', as .jsonl conversations are written out)")
    command.add_argument("--json", action="store_true", help="print the numbers as JSON")
    command.add_argument("--devices", type=int, help="CPU devices to pretend to have where there is no accelerator (default: as "
                         "in training)")
    # One process has to hold all rows.
    command.set_defaults(distributed=False, coordinator=None, num_processes=None, process_id=None, timeout=None)
    command.set_defaults(step=None, named_by="")


def run(arguments, overrides) -> int:
    from moe_jax.analysis import routing_report
    from moe_jax.analysis.recording import read_record

    _check_together(arguments, overrides)
    workdir = pathlib.Path(arguments.workdir).absolute()
    default = pathlib.Path("routing_report") if arguments.record else workdir / "routing_report"
    out = pathlib.Path(arguments.out) if arguments.out else default
    if arguments.record:
        routing_report.check_out(out)
        records, drops = _sorted_out([read_record(path) for path in arguments.record])
    else:
        records, drops = _records_of_run(arguments, overrides, out)
    outcomes = routing_report.write_report(records, out, "" if arguments.record else workdir.name, drops=drops)
    found = routing_report.summary(records, outcomes, out)
    if arguments.json:
        print(json.dumps(found))
    else:
        _print(found, outcomes)
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def _check_together(arguments, overrides) -> None:
    if not arguments.record:
        return
    without = {"--data": arguments.data, "--dispatch": arguments.dispatch, "--batches": arguments.batches is not None,
               "--turn-separator": arguments.turn_separator is not None, arguments.named_by: arguments.named_by,
               "--config.…": overrides}
    for option, given in without.items():
        if given:
            raise CommandError(f"{option}: says what to record, and --record={arguments.record[0]} is recorded already; "
                               f"leave one of them out")


def _sorted_out(records):
    """(by ascending step, the newest with buffers where the others have none)."""
    records = sorted(records, key=lambda record: record.step)
    buffered = [record for record in records if record.capacity_factor is not None]
    without = [record for record in records if record.capacity_factor is None]
    return (without, buffered[-1]) if without and buffered else (records, None)


def _records_of_run(arguments, overrides, out):
    from moe_jax.analysis.record_run import Recording, record_steps, record_with_buffers
    from moe_jax.analysis.recording import check_recordable
    from moe_jax.analysis.routing_report import check_out
    from moe_jax.analysis.turns import TURN_SEPARATOR
    from moe_jax.commands.open_run import opened
    from moe_jax.config import resolve
    from moe_jax.training.run import read_config

    given = arguments.turn_separator
    separator = TURN_SEPARATOR if given is None else given.replace("\\n", "\n")
    recording = Recording(arguments.data, arguments.batches, arguments.dispatch, separator)
    check_recordable(resolve(read_config(pathlib.Path(arguments.workdir).absolute())))
    check_out(out)
    trained = opened(arguments, overrides)
    records = record_steps(trained, recording, arguments.step)
    return records, record_with_buffers(trained, recording, records[-1].step)


def _print(found, outcomes) -> None:
    print(f"step {found['step']}, {found['tokens']:,} tokens of {found['data']}")
    for outcome in outcomes:
        if outcome.table is not None:
            for headline in outcome.table.headlines:
                print(f"  {outcome.analysis.title}: {headline}")
    for name, reason in found["not_possible"].items():
        print(f"  not possible: {name}: {reason}")
    print(f"report: {found['report']}")
