"""``moe-jax verify``."""

import pathlib

from moe_jax.commands.parsers import CommandError, add_command, prepare_one_cpu_device


def add(commands) -> None:
    command = add_command(commands, "verify", run, "Compare an imported checkpoint with stored outputs of another implementation: "
                          "logits, every layer, chosen experts, losses, gradients (docs/checkpoints.md).",
                          prepare=prepare_one_cpu_device)
    command.add_argument("--hf", required=True, metavar="DIR", help="a Hugging Face checkpoint with oracle.safetensors and "
                         "oracle.json beside it")
    command.add_argument("--config-file", default="config.json", help="its settings (default: %(default)s)")
    command.add_argument("--tolerance", type=float, default=1e-4, help="largest difference (default: %(default)s)")


def run(arguments, overrides) -> int:
    del overrides
    from moe_jax.interop.verify import report, verify

    if not arguments.tolerance >= 0:
        raise CommandError(f"--tolerance={arguments.tolerance}: must be at least 0")
    found = verify(pathlib.Path(arguments.hf).absolute(), arguments.config_file)
    print("\n".join(report(found, arguments.tolerance)))
    return 0 if all(comparison.passes(arguments.tolerance) for comparison in found) else 1
