"""``moe-jax report``."""

import pathlib

from moe_jax.commands.parsers import add_command, add_workdir


def add(commands) -> None:
    command = add_command(commands, "report", run, "Write report.html of a run directory again, finished or not.",
                          prepare=lambda arguments: None)
    add_workdir(command)


def run(arguments, overrides) -> int:
    del overrides
    from moe_jax.analysis.report import write_report
    from moe_jax.training.run import read_config
    workdir = pathlib.Path(arguments.workdir).absolute()
    read_config(workdir)
    print(write_report(workdir))
    return 0
