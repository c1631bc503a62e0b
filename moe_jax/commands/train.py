"""``moe-jax train``."""

import sys

from moe_jax.commands.parsers import add_command, add_devices, add_workdir


def add(commands) -> None:
    train = add_command(commands, "train", run, "Train a model; the same command again resumes, or says that the run is complete.",
                        overrides=True)
    add_workdir(train)
    add_devices(train)
    train.add_argument("--config", required=True, help="a config file, e.g. configs/openmoe_tiny.py, or a model by family "
                       "and size, e.g. mixtral:tiny")
    train.add_argument("--allow-config-change", action="store_true",
                       help="continue a run directory that was started with other settings")


def run(arguments, overrides) -> int:
    from moe_jax.config import load_config

    config = load_config(arguments.config, overrides)
    from moe_jax.training import processes
    from moe_jax.training.loop import train
    from moe_jax.training.signals import Interrupted
    from moe_jax.training.run import check_config_matches_mesh
    import jax

    check_config_matches_mesh(config, jax.device_count())
    if processes.index() == 0:
        _print_config(config)
    try:
        train(config, arguments.workdir, arguments.allow_config_change)
    except Interrupted as interrupted:
        return interrupted.code
    return 0


def _print_config(config) -> None:
    from moe_jax.training.metrics import versions
    for section, values in config.to_dict().items():
        print(f"{section}: " + ", ".join(f"{name}={value!r}" for name, value in values.items()), file=sys.stderr)
    print("versions: " + ", ".join(f"{name} {value}" for name, value in versions().items() if value), file=sys.stderr)
