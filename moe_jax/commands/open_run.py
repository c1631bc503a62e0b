"""An existing run, opened for evaluation, generation and analysis."""

import pathlib


def opened(arguments, overrides=()):
    """The run in ``--workdir``, with the config it was trained with."""
    import jax

    from moe_jax.config import parse_override, resolve
    from moe_jax.training import processes
    from moe_jax.training.run import (
        check_config_matches_mesh, open_run, read_config, require_checkpoint, require_equal_processes)
    workdir = pathlib.Path(arguments.workdir).absolute()
    values = read_config(workdir)
    require_checkpoint(workdir)
    for word in overrides:
        section, name, value = parse_override(word)
        values.setdefault(section, {})[name] = value
    config = resolve(values)
    check_config_matches_mesh(config, jax.device_count())
    own = ("run", "prepare", "overrides", "process_id", "workdir")  # of this process, or compared anyway
    words = {f"--{name.replace('_', '-')}": value for name, value in vars(arguments).items() if name not in own}
    require_equal_processes(config, workdir, **words)
    processes.at("evaluation or generation", processes.COMPILING)
    return open_run(config, workdir)


def opened_params(arguments, overrides=()):
    """(run, parameters, router bias, step, placement or None): what evaluation and generation start from."""
    from moe_jax.config import ConfigError
    from moe_jax.training.run import restore_params

    if not arguments.placement:
        run = opened(arguments, overrides)
        if run.config.moe.expert_copies:
            raise ConfigError(f"moe.expert_copies={run.config.moe.expert_copies}: which expert each is a copy of is said by a "
                              f"placement; give --placement=… instead.")
        return run, *restore_params(run), None
    from moe_jax.analysis.placement import read_placement
    from moe_jax.training.rearrange import restore_with_copies
    placed = read_placement(pathlib.Path(arguments.placement), pathlib.Path(arguments.workdir).absolute())
    copies = placed.placement.expert_LP.shape[1]
    run = opened(arguments, [*overrides, f"--config.moe.expert_copies={copies}"])
    return run, *restore_with_copies(run, placed.placement), placed
