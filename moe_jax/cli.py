"""The command line, ``moe-jax``. What each command takes and does is in ``moe_jax/commands/``."""

import argparse
import json
import logging
import math
import os
import pathlib
import re
import sys

from moe_jax.commands import analyze, convert, evaluate, generate, place, plan, report, sweep, train, upcycle, verify
from moe_jax.commands.parsers import DEVICES, EPILOG, CommandError
from moe_jax.environment import prepare_process
from moe_jax.errors import UserError

COMMANDS = (train, evaluate, generate, report, analyze, place, plan, upcycle, convert, verify, sweep)


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code. Errors a user can mend are one line on stderr and code 1 (2: usage)."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    unknown = [word for word in rest if not word.startswith("--config.")]
    if unknown or (rest and not arguments.overrides):
        parser.error(f"unknown argument {(unknown or rest)[0]!r}; see moe-jax {arguments.command} --help")
    # Text that the terminal's encoding, or any encoding, does not have must not end a command.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("moe_jax").setLevel(logging.INFO)
    _quieten_libraries()
    try:
        if arguments.prepare:
            arguments.prepare(arguments)
        else:
            prepare_process(_devices(arguments))
            _join_processes(arguments)
        return _leave_processes(arguments.run(arguments, rest))
    except UserError as error:
        print(f"moe-jax {arguments.command}: error: {error}", file=sys.stderr)
        return _leave_processes(1, str(error))
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return _leave_processes(130, "interrupted")
    except Exception as error:  # a fault of ours, or of JAX; with several processes perhaps of a peer
        if "moe_jax.training.processes" in sys.modules:
            sys.modules["moe_jax.training.processes"].fail(error)
        raise


def _join_processes(arguments) -> None:
    """Makes this process one of several, where the command says so; before anything asks JAX for a device."""
    flags = {f"--{name.replace('_', '-')}": getattr(arguments, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [flag for flag, value in flags.items() if value is None]
    if len(missing) == len(flags) and not arguments.distributed:
        if arguments.timeout is not None:
            raise CommandError(f"--timeout={arguments.timeout:g}: has no effect on a single process; leave it out")
        return
    if arguments.distributed and len(missing) < len(flags):
        raise CommandError("--distributed finds the other processes by itself; leave it out, or --coordinator, "
                           "--num-processes and --process-id")
    if missing and not arguments.distributed:
        raise CommandError(f"{', '.join(missing)} missing: --coordinator, --num-processes and --process-id belong together")
    coordinator, count, number = flags.values()
    if not arguments.distributed:
        if not re.fullmatch(r".+:\d+", coordinator):
            raise CommandError(f"--coordinator={coordinator}: must be HOST:PORT, an address of process 0 and a free port there")
        if count < 1 or not 0 <= number < count:
            raise CommandError(f"--process-id={number}: must be from 0 to --num-processes - 1 = {count - 1}")
    if arguments.timeout is not None and not 10 <= arguments.timeout < math.inf:
        raise CommandError(f"--timeout={arguments.timeout:g}: must be at least 10 seconds")
    from moe_jax.training import processes
    processes.start(coordinator, count, number, arguments.timeout or processes.TIMEOUT)
    if processes.index() != 0:
        logging.getLogger("moe_jax").setLevel(logging.WARNING)


def _leave_processes(code: int, why: str = "") -> int:
    """The end of this process's part, where there are several; hands the exit code through."""
    if "moe_jax.training.processes" in sys.modules:
        processes = sys.modules["moe_jax.training.processes"]
        together = code == 0 or processes.agreed_to_stop()
        processes.leave(None if together else why or f"it stopped with exit code {code}", code)
    return code


def _quieten_libraries() -> None:
    """Where a disk is full, Orbax and TensorStore print hundreds of lines of tracebacks around the one that we print."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # Orbax writes every array in a task of its own and awaits them up to the first that fails; at exit, asyncio logs
    # each of the others with its traceback.
    logging.getLogger("asyncio").addFilter(_is_news)

    def hook(unraisable):
        # TensorStore's threads, which finish after Orbax has given up.
        if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


def _is_news(record: logging.LogRecord) -> bool:
    return "never retrieved" not in record.getMessage()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-jax", description="Train mixture-of-experts language models and look inside them.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for module in COMMANDS:
        module.add(commands)
    commands.metavar = "|".join(commands.choices)
    return parser


def _devices(arguments) -> int:
    """--devices, checked; without it, for commands on an existing run, as many as the run was trained with."""
    devices = arguments.devices
    if devices is None:
        asked = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
        devices = int(asked.group(1)) if asked else DEVICES
        if arguments.command != "train":
            processes = arguments.num_processes or 1
            try:
                versions = json.loads((pathlib.Path(arguments.workdir) / "versions.json").read_text())
                devices = max(1, int(versions["device_count"]) // processes) if versions["backend"] == "cpu" else DEVICES
            except (OSError, ValueError, KeyError, TypeError):
                pass  # no run: the command will say so
    if devices < 1:
        raise CommandError(f"--devices={devices}: must be at least 1")
    return devices


if __name__ == "__main__":
    sys.exit(main())
