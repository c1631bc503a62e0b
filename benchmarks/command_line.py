"""What the command lines of the benchmarks share: their form, settings as for ``moe-jax train``, what they ran on, and
beside what."""

import argparse
import os


def parser_of(name: str, text: str, config: bool = True) -> argparse.ArgumentParser:
    """The parser of ``python -m benchmarks.<name>``; ``config``: it takes a config file."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=text, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if config:
        parser.add_argument("--config", default="configs/openmoe_tiny.py", help="a config file (default: %(default)s)")
    return parser


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None, **least: int) -> tuple[argparse.Namespace, list[str]]:
    """(arguments, words ``--config.…``). ``least``: numbers that options must reach. Exits where that cannot be."""
    arguments, overrides = parser.parse_known_args(argv)
    unknown = [word for word in overrides if not word.startswith("--config.")]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}")
    for name, number in least.items():
        if getattr(arguments, name) < number:
            parser.error(f"--{name}={getattr(arguments, name)}: must be at least {number}")
    return arguments, overrides


def versions() -> dict:
    """Of what was timed, and on what."""
    from moe_jax.training.metrics import versions

    found = versions()
    names = ("python", "jax", "jaxlib", "flax", "git_commit", "backend", "device_kind", "device_count")
    return {"cpu_count": os.cpu_count(), **{name: found[name] for name in names}}


def load_average() -> float | None:
    """Of the last minute, where the system tells: what else ran there."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
