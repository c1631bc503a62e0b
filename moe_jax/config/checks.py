"""What the sections check themselves with: the error, conditions, and the nearest legal values."""

import difflib
from typing import Any

from moe_jax.errors import UserError


class ConfigError(UserError, ValueError):
    """A setting that cannot work; the message is one line for the person who wrote it."""


def require(condition: bool, key: str, value: Any, constraint: str) -> None:
    if not condition:
        raise ConfigError(f"{key}={value!r}: {constraint}")


def choice(section: str, config: Any, field: str, allowed: tuple[str, ...]) -> None:
    value = getattr(config, field)
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{section}.{field}={value!r}: allowed are {', '.join(map(repr, allowed))}.{hint}")


def at_least(section: str, config: Any, minimum: float, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        require(value >= minimum, f"{section}.{field}", value, f"must be at least {minimum}.")


def nearest_divisors(value: int, total: int) -> str:
    """The divisors of ``total`` next to ``value``, for an error message: ``'2, 4'``."""
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    below = [d for d in divisors if d <= value][-1:]
    above = [d for d in divisors if d > value][:1]
    return ", ".join(map(str, below + above))


def nearest_multiples(value: int, step: int) -> str:
    """The positive multiples of ``step`` next to ``value``, for an error message: ``'8, 16'``."""
    below = value // step * step
    return ", ".join(str(v) for v in (below, below + step) if v > 0)
