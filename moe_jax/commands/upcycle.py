"""``moe-jax upcycle``."""

import pathlib

from moe_jax.commands.parsers import add_command, prepare_one_cpu_device


def add(commands) -> None:
    command = add_command(commands, "upcycle", run, "Make a mixture of experts of a dense run: a new run directory in which each "
                          "expert is a copy of the dense network, and training goes on.", overrides=True,
                          prepare=prepare_one_cpu_device)
    command.add_argument("--from", dest="source", required=True, metavar="WORKDIR", help="the dense run's directory")
    command.add_argument("--config", required=True, help="a config file of the mixture, or a model by "
                         "family and size, e.g. mixtral:tiny; train it on with the same one")
    command.add_argument("--workdir", required=True, help="the new run directory")
    command.add_argument("--expert-noise", type=float, default=0.0, help="standard deviation of noise added to every expert's "
                         "weights (default: %(default)s)")
    command.add_argument("--carry-optimizer", action="store_true", help="go on with the dense run's moments, copied to the experts "
                         "like the weights (default: they start at 0)")
    command.add_argument("--restart", action="store_true", help="count steps, learning-rate schedule and data from 0 (default: "
                         "they go on where the dense run is)")


def run(arguments, overrides) -> int:
    from moe_jax.config import load_config

    config = load_config(arguments.config, overrides)
    from moe_jax.training.upcycle import Upcycling, write_upcycled_run

    how = Upcycling(arguments.expert_noise, arguments.carry_optimizer, arguments.restart)
    step = write_upcycled_run(pathlib.Path(arguments.source).absolute(), config, pathlib.Path(arguments.workdir).absolute(), how)
    print(f"{arguments.workdir}: step {step}, {len(config.moe_layers)} layers of {config.moe.num_experts} experts; train it on with "
          f"moe-jax train --workdir={arguments.workdir} and the same --config")
    return 0
