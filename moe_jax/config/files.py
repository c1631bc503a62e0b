"""Config files, models by name, and the words ``--config.section.name=value`` of a command line."""

import dataclasses
import pathlib
import sys

from moe_jax.config.checks import ConfigError
from moe_jax.config.reading import SECTIONS, known_keys, resolve, unknown_key
from moe_jax.config.run import Config


def is_named(path: str) -> bool:
    """Whether ``--config`` names a model, family and size, and no file."""
    # Imported here because rows of that table are checked by this package.
    from moe_jax.models import families

    return families.is_name(path) and not pathlib.Path(path).exists()


def load_config(path: str, overrides: list[str]) -> Config:
    """A config file, or a model by family and size (``mixtral:8x7b``: :func:`moe_jax.models.families.run_settings`), with
    ``--config.section.name=value`` overrides, resolved and checked.

    Raises:
      ConfigError: no such file, family or size, a file without get_config(), an unknown key, or a value that does not fit.
    """
    from absl import flags
    from ml_collections import ConfigDict, config_flags
    from moe_jax.models import families

    named = is_named(path)
    if not named and not pathlib.Path(path).is_file():
        raise ConfigError(f"--config={path}: there is no such file; configs/openmoe_tiny.py is one to start from, and "
                          f"mixtral:8x7b, family and size, a model without a file.")
    for word in overrides:
        key = word.removeprefix("--config.").split("=", 1)[0]
        if key not in known_keys():
            raise unknown_key(key)
        if "=" not in word:
            raise ConfigError(f"{word}: a value is missing, as in {word}=1.")
    # Overrides are looked for in sys.argv unless another list is given.
    values, argv = flags.FlagValues(), ["moe-jax", *([] if named else [f"--config={path}"]), *overrides]
    if named:
        settings = ConfigDict(families.merged(Config().to_dict(), families.run_settings(path)))
        config_flags.DEFINE_config_dict("config", settings, flag_values=values, sys_argv=argv)
    else:
        _make_importable(pathlib.Path(path).resolve().parent)
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        # Each file is loaded into this one module and would inherit get_config() from the file before it.
        sys.modules.pop("config_config", None)
    try:
        values(argv)
        config = values.config
    except flags.IllegalFlagValueError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except Exception as error:  # whatever the user's own file raises
        raise ConfigError(f"--config={path}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not hasattr(config, "to_dict"):
        raise ConfigError(f"--config={path}: get_config() returned {config!r}, not a ConfigDict; see configs/base.py.")
    return resolve(config)


def _make_importable(folder: pathlib.Path) -> None:
    """Lets a config file import its neighbours, as in ``from configs.base import get_config``: an installed command,
    unlike ``python -m``, does not look in the current folder."""
    root = str(folder.parent if (folder / "__init__.py").exists() else folder)
    if root not in sys.path:
        sys.path.insert(0, root)


def parse_override(word: str):
    """(section, name, value) of ``--config.section.name=value``, by the type that the setting has."""
    key, equals, text = word.removeprefix("--config.").partition("=")
    if key not in known_keys():
        raise unknown_key(key)
    if not equals:
        raise ConfigError(f"{word}: a value is missing, as in {word}=1.")
    section, name = key.split(".")
    kind = next(field.type for field in dataclasses.fields(SECTIONS[section]) if field.name == name)
    try:
        if kind is bool:
            return section, name, {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return section, name, kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{key}={text!r}: must be of type {kind.__name__}.") from None
