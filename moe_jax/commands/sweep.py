"""``moe-jax sweep``."""

import os
import pathlib

from moe_jax.commands.parsers import CommandError, add_command

SCALES = ("smoke", "quick", "full")


def add(commands) -> None:
    sweep = add_command(commands, "sweep", run, "Run an ablation: what is missing of its runs, then its table, verdicts and figure. "
                        "The same command again goes on where it was stopped.", prepare=lambda arguments: None)
    sweep.add_argument("experiment", nargs="*", help="a folder with a sweep.py, for example experiments/balance_loss, or one of "
                       "such folders: all of them; with --scoreboard that one (default then: experiments)")
    sweep.add_argument("--scale", default="quick", help=f"{', '.join(SCALES)} (default: %(default)s)")
    sweep.add_argument("--arms", default="", help="only these arms, separated by commas (default: all)")
    sweep.add_argument("--seeds", default="", help="these seeds instead of the scale's: 0,1,2 or 0-4")
    sweep.add_argument("--jobs", type=int, default=2, help="runs at a time, each in a process of its own (default: %(default)s)")
    sweep.add_argument("--devices", type=int, default=1, help="CPU devices of each run where there is no accelerator "
                       "(default: %(default)s)")
    sweep.add_argument("--scratch", default="", metavar="FOLDER", help="where runs are trained (default: the user's cache)")
    sweep.add_argument("--keep", action="store_true", help="do not remove the run directories of finished runs")
    sweep.add_argument("--table", action="store_true", help="run nothing: the table, README and figure of the results there are")
    sweep.add_argument("--scoreboard", action="store_true", help="run nothing: write the scoreboard of all experiments into their "
                       "README.md")


def run(arguments, overrides) -> int:
    del overrides
    from moe_jax.sweeps import command

    if arguments.scale not in SCALES:
        raise CommandError(f"--scale={arguments.scale}: allowed are {', '.join(SCALES)}")
    for name in ("jobs", "devices"):
        if getattr(arguments, name) < 1:
            raise CommandError(f"--{name}={getattr(arguments, name)}: must be at least 1")
    if arguments.scoreboard:
        return command.scoreboard([pathlib.Path(name) for name in arguments.experiment] or [pathlib.Path("experiments")])
    if not arguments.experiment:
        raise CommandError("name an experiment, for example experiments/balance_loss")
    request = command.Request(
        scale=arguments.scale, arms=tuple(filter(None, arguments.arms.split(","))), seeds=_seeds(arguments.seeds),
        jobs=arguments.jobs, devices=arguments.devices, scratch=arguments.scratch and os.path.abspath(arguments.scratch),
        keep=arguments.keep, table=arguments.table)
    return command.run([pathlib.Path(name) for name in arguments.experiment], request)


def _seeds(text: str) -> tuple[int, ...]:
    """'0,2,4-6' as numbers; () for ''."""
    seeds: list[int] = []
    for part in filter(None, text.split(",")):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise CommandError(f"--seeds={text}: must be numbers or ranges, separated by commas: 0,1,2 or 0-4")
        seeds += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(seeds))
