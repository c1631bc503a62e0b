"""What the commands' parsers share: their form, and the options of several."""

import argparse
import os
from collections.abc import Callable

from moe_jax.environment import prepare_process
from moe_jax.errors import UserError

EPILOG = """\
settings:
  Every setting of a config can be overridden: --config.moe.num_experts=16 --config.training.num_steps=1000
  configs/base.py lists them all with a comment each.

examples:
  moe-jax train --config=configs/openmoe_tiny.py --workdir=workdir
  moe-jax train --config=configs/openmoe_tiny.py --workdir=top1 --config.moe.experts_per_token=1
  moe-jax eval --workdir=workdir
  moe-jax eval --workdir=workdir --data=questions.jsonl
  moe-jax generate --workdir=workdir --prompt='def main():'
  moe-jax report --workdir=workdir
  moe-jax analyze --checkpoint=workdir --out=routing
  moe-jax place --workdir=workdir --devices=4 --redundant=4
  moe-jax upcycle --from=dense --config=configs/openmoe_tiny.py --workdir=upcycled
  moe-jax convert --from=hf --in=checkpoint --out=workdir
  moe-jax convert --to=hf --in=workdir --out=checkpoint
  moe-jax plan --config=configs/mixtral_8x7b.py --slice=v5p-128
"""

DEVICES = 8


class CommandError(UserError, ValueError):
    """An argument that cannot work."""


def add_command(commands, name: str, run: Callable, text: str, overrides: bool = False,
                prepare: Callable | None = None) -> argparse.ArgumentParser:
    """A command of ``moe-jax`` with its help.

    Args:
      run: called with the arguments and the words ``--config.…``; returns the exit code.
      text: what it does; the part before a colon stands in the list of commands.
      overrides: whether it takes words ``--config.…``.
      prepare: makes the process ready before JAX is imported; None: for ``--devices`` devices, perhaps of several processes.
    """
    command = commands.add_parser(name, help=text.split(":")[0].rstrip(".") + ".", description=text, epilog=EPILOG,
                                  allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.set_defaults(run=run, prepare=prepare, overrides=overrides)
    return command


def prepare_one_cpu_device(arguments) -> None:
    """``prepare`` of a command that computes little, on the host; ``--devices``, if it has any, mean something else."""
    del arguments
    os.environ["JAX_PLATFORMS"] = "cpu"
    prepare_process(1)


def add_workdir(command) -> None:
    command.add_argument("--workdir", default="workdir", help="the run directory (default: %(default)s)")


def add_devices(command) -> None:
    """``--devices``, and the options of several processes."""
    default = DEVICES if command.prog.endswith(" train") else "as in training"
    command.add_argument("--devices", type=int, help="CPU devices to pretend to have where there is no accelerator "
                         f"(default: {default})")
    several = command.add_argument_group("several processes", "The same command on every host; see docs/tpu.md.")
    several.add_argument("--distributed", action="store_true", help="join the other processes of a cluster that JAX knows: TPU "
                         "slices (TPU VMs, GKE), Slurm, Open MPI")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="elsewhere: the address of process 0")
    several.add_argument("--num-processes", type=int, metavar="N", help="elsewhere: how many processes there are")
    several.add_argument("--process-id", type=int, metavar="I", help="elsewhere: which one this is, from 0")
    several.add_argument("--timeout", type=float, metavar="SECONDS", help="how long to wait for the others, at the start, at "
                         "barriers and in a step (default: 300)")


def add_placement(command) -> None:
    command.add_argument("--placement", default="", help="a file of moe-jax place: experts, and copies of the busy ones, lie as "
                         "it says; the outputs are the same")
