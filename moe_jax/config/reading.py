"""From a ConfigDict to a :class:`Config`, and the differences between two."""

import dataclasses
import difflib
import math
from typing import Any, Mapping

from moe_jax.config.checks import ConfigError
from moe_jax.config.run import Config

SECTIONS = {field.name: field.default.__class__ for field in dataclasses.fields(Config)}


def known_keys() -> list[str]:
    """Every legal key, dotted: ``'moe.num_experts'``."""
    return [f"{section}.{field.name}" for section, kind in SECTIONS.items() for field in dataclasses.fields(kind)]


def unknown_key(key: str) -> ConfigError:
    """The error for a key that does not exist, with the nearest ones that do."""
    keys = known_keys()
    tail = key.rsplit(".", 1)[-1]
    near = [k for k in keys if k.rsplit(".", 1)[-1] == tail]
    if "." not in key:
        near += difflib.get_close_matches(key, SECTIONS, n=1, cutoff=0.5)
    near += [k for k in difflib.get_close_matches(key, keys, n=3, cutoff=0.5) if k not in near]
    hint = f" Did you mean {' or '.join(near[:3])}?" if near else f" Sections are {', '.join(SECTIONS)}."
    return ConfigError(f"{key}: there is no such setting.{hint}")


def _typed(key: str, value: Any, kind: type) -> Any:
    """``value`` as ``kind`` if nothing is lost by it, else ConfigError."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(f"{key}={value!r}: must be of type {kind.__name__}, not {type(value).__name__}.")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{key}={value!r}: must be a finite number.")
    return value


def resolve(config: Mapping[str, Any]) -> Config:
    """Turns a ConfigDict (or nested dict) into a checked :class:`Config`.

    Raises:
      ConfigError: unknown section or key, wrong type, illegal value or combination.
    """
    config = config.to_dict() if hasattr(config, "to_dict") else config
    sections = {}
    for section, values in config.items():
        if section not in SECTIONS:
            raise unknown_key(section)
        if not isinstance(values, Mapping):
            raise ConfigError(f"{section}={values!r}: is a section and holds settings, e.g. "
                              f"{section}.{dataclasses.fields(SECTIONS[section])[0].name}.")
        types = {field.name: field.type for field in dataclasses.fields(SECTIONS[section])}
        for name in values:
            if name not in types:
                raise unknown_key(f"{section}.{name}")
        sections[section] = SECTIONS[section](
            **{name: _typed(f"{section}.{name}", value, types[name]) for name, value in values.items()})
    return Config(**sections)


def with_defaults(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A recorded ``Config.to_dict()`` with the settings that have come since then, at their defaults, which change nothing."""
    defaults = Config().to_dict()
    return {section: {**defaults.get(section, {}), **config.get(section, {})} for section in {**defaults, **config}}


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The settings in which two ``Config.to_dict()`` differ, one line each: ``'moe.num_experts: 8 -> 16'``."""
    lines = []
    for section in sorted(set(ours) | set(theirs)):
        left, right = ours.get(section, {}), theirs.get(section, {})
        for name in sorted(set(left) | set(right)):
            if left.get(name) != right.get(name):
                lines.append(f"{section}.{name}: {left.get(name)!r} -> {right.get(name)!r}")
    return lines
