"""What a run is: frozen dataclasses that check themselves.

A config file (``configs/*.py``) defines ``get_config()`` and returns an ml-collections ConfigDict with one level of
nesting. :func:`resolve` turns it into a :class:`Config`; from there on no code sees a ConfigDict. An unknown key, a
wrong type, an impossible value or combination raises :class:`ConfigError` that names the key, the value, the
constraint and the nearest legal values.
"""

from moe_jax.config.attention import AttentionConfig, LayerAttention
from moe_jax.config.checks import ConfigError, nearest_divisors, nearest_multiples
from moe_jax.config.files import is_named, load_config, parse_override
from moe_jax.config.moe import MoEConfig
from moe_jax.config.reading import SECTIONS, differences, known_keys, resolve, unknown_key, with_defaults
from moe_jax.config.run import Config
from moe_jax.config.sections import (
    ACTIVATIONS, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig)

__all__ = ["ACTIVATIONS", "SECTIONS", "AttentionConfig", "Config", "ConfigError", "DataConfig", "LayerAttention",
           "MeshConfig", "MoEConfig", "ModelConfig", "OptimizerConfig", "TrainingConfig", "differences", "is_named",
           "known_keys", "load_config", "nearest_divisors", "nearest_multiples", "parse_override", "resolve", "unknown_key",
           "with_defaults"]
