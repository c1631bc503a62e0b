"""The families whose checkpoints can be read and written: one row each."""

from typing import Any

from moe_jax.config import Config, resolve
from moe_jax.interop.classic import MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE
from moe_jax.interop.deepseek import DEEPSEEK_V1, DEEPSEEK_V2, DEEPSEEK_V3
from moe_jax.interop.gpt_oss import GPT_OSS
from moe_jax.interop.llama4 import LLAMA4
from moe_jax.interop.pairs import NLLB_MOE, SWITCH
from moe_jax.interop.settings import InteropError, Settings
from moe_jax.interop.table import Family

FAMILIES = (MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V1, DEEPSEEK_V2, DEEPSEEK_V3, LLAMA4, GPT_OSS,
            SWITCH, NLLB_MOE)


def family_of(settings: dict[str, Any], where: str = "config.json") -> Family:
    """The family that a ``config.json`` names, by its model type or architecture.

    Raises:
      InteropError: it is none of those supported, which the message names.
    """
    model_type, architectures = settings.get("model_type"), settings.get("architectures") or []
    for family in FAMILIES:
        if model_type in family.model_types or (model_type is None and set(architectures) & set(family.architectures)):
            return family
    known = ", ".join(f"{family.name} ({', '.join(family.model_types)})" for family in FAMILIES)
    raise InteropError(f"{where}: model_type={model_type!r}, architectures={architectures!r}: this architecture is not supported; "
                       f"supported are {known}.")


def to_config(settings: dict[str, Any], where: str = "config.json", quiet: bool = False, **overrides: Any) -> tuple[Family, Config]:
    """The family and the config of a checkpoint.

    Args:
      quiet: do not warn of settings that are not known.
      overrides: settings of ours by their full names that win over what the checkpoint says.

    Raises:
      InteropError, ConfigError: unknown architecture, or a setting that has no counterpart here.
    """
    family = family_of(settings, where)
    reader = Settings(family.model_settings(settings), where)
    values: dict[str, dict[str, Any]] = {}
    for name, value in {**family.to_config(reader), **overrides}.items():
        section, field = name.split(".")
        values.setdefault(section, {})[field] = value
    if not quiet:
        reader.finish()
    return family, resolve(values)
