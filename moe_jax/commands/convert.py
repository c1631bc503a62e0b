"""``moe-jax convert``."""

import pathlib

from moe_jax.commands.parsers import CommandError, add_command, prepare_one_cpu_device

_FORMATS = ("hf",)


def add(commands) -> None:
    command = add_command(commands, "convert", run, "Read or write a Hugging Face checkpoint: --from=hf makes a run directory of "
                          "it, --to=hf the other way (docs/checkpoints.md).", overrides=True, prepare=prepare_one_cpu_device)
    direction = command.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="source_format", choices=_FORMATS, help="read a checkpoint of this kind")
    direction.add_argument("--to", dest="target_format", choices=_FORMATS, help="write one")
    command.add_argument("--in", dest="source", required=True, metavar="DIR", help="the checkpoint, or the run directory")
    command.add_argument("--out", dest="target", required=True, metavar="DIR", help="the new run directory, or checkpoint")
    command.add_argument("--family", default="", help="--to: which family's checkpoint, if the run was not imported from one")
    command.add_argument("--dtype", default="", help="--to: float32, bfloat16 or float16 (default: that of the checkpoint the run "
                         "was imported from, else float32)")
    command.add_argument("--shard-size", default="", help="--to: no file larger than this (default: 5GB)")


def run(arguments, overrides) -> int:
    from moe_jax.config import parse_override
    from moe_jax.interop.convert import export_run, import_checkpoint, parse_size
    from moe_jax.interop.reading import number_of_values

    source, target = pathlib.Path(arguments.source).absolute(), pathlib.Path(arguments.target).absolute()
    if arguments.source_format:
        for option in ("family", "dtype", "shard_size"):
            if getattr(arguments, option):
                raise CommandError(f"--{option.replace('_', '-')}={getattr(arguments, option)}: is of --to; leave it out")
        parsed = [parse_override(word) for word in overrides]
        made = import_checkpoint(source, target, {f"{section}.{name}": value for section, name, value in parsed}, progress=True)
        print(f"{arguments.target}: {made.family.name}, {number_of_values(made.shapes):,} parameters in {len(made.stored)} tensors; "
              f"try moe-jax generate --workdir={arguments.target}, or train it on with --config={arguments.target}/config.py")
        return 0
    if overrides:
        raise CommandError(f"{overrides[0]}: a run is written as it is; leave it out")
    family, step = export_run(source, target, arguments.family, arguments.dtype, parse_size(arguments.shard_size or "5GB"),
                              progress=True)
    print(f"{arguments.target}: {family.architectures[0]}, the weights of step {step}")
    return 0
