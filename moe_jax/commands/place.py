"""``moe-jax place``."""

import pathlib

from moe_jax.commands.parsers import CommandError, add_command, add_workdir, prepare_one_cpu_device


def add(commands) -> None:
    command = add_command(commands, "place", run, "Place a run's experts on devices by the loads it measured: copies of busy "
                          "experts, even loads.", prepare=prepare_one_cpu_device)
    add_workdir(command)
    command.add_argument("--devices", type=int, required=True, help="over how many devices the experts are spread")
    command.add_argument("--nodes", type=int, default=1, help="into how many nodes the devices fall; they get whole groups of "
                         "experts (moe.num_groups) (default: %(default)s)")
    command.add_argument("--redundant", type=int, default=0,
                         help="copies beside one of each expert, for evaluation and generation (default: %(default)s)")
    command.add_argument("--out", default="placement.json",
                         help="the file to write; a figure with the ending .png comes beside it (default: %(default)s)")
    command.add_argument("--apply", default="", metavar="DIRECTORY", help="also write a new run directory, whose newest checkpoint "
                         "has the experts in this order; train, eval and generate go on there (without --redundant)")


def run(arguments, overrides) -> int:
    del overrides
    from moe_jax.analysis import placement

    workdir, out = pathlib.Path(arguments.workdir).absolute(), pathlib.Path(arguments.out).absolute()
    if out.suffix != ".json":
        raise CommandError(f"--out={arguments.out}: must end in .json; the figure's name ends in .png instead")
    if not out.parent.is_dir():
        raise CommandError(f"--out={arguments.out}: there is no folder {out.parent}")
    if arguments.apply and arguments.redundant:
        raise CommandError(f"--apply={arguments.apply}: copies would grow apart in training; leave out --redundant="
                           f"{arguments.redundant}, or evaluate with copies: moe-jax eval --placement={arguments.out}")
    placed = placement.place_run(workdir, arguments.devices, arguments.nodes, arguments.redundant)
    if arguments.apply:
        from moe_jax.training.rearrange import write_renumbered_run
        step = write_renumbered_run(workdir, pathlib.Path(arguments.apply).absolute(), placed.placement)
    placement.write_figure(out.with_suffix(".png"), placed)
    placement.write_placement(out, placed)
    print(placement.table(placed))
    print(f"written: {arguments.out}, {out.with_suffix('.png').name}")
    if arguments.apply:
        print(f"step {step} with its experts in this order: {arguments.apply}")
    return 0
