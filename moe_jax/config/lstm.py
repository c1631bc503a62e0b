"""What a config of ``model.architecture='lstm'`` may set: the rest belongs to transformers."""

import dataclasses
from typing import Any

from moe_jax.config.checks import require

# The settings of ``model`` that act. All of ``attention`` is of no use, and these of other sections:
_ACTING = ("architecture", "num_layers", "d_model", "tie_embedding", "scaled_tied_logits", "embedding_scale", "vocab_size",
           "init_scale", "embedding_init", "dtype", "dropout")
_UNUSED = (("moe", "residual_ffn"), ("moe", "device_capacity_factor"), ("moe", "encoder_layers"), ("data", "prefix_attention"))


def check_lstm(config: Any) -> None:
    """Refuses settings that an LSTM has no use for.

    Raises:
      ConfigError: with the setting.
    """
    unused = [("model", field.name) for field in dataclasses.fields(config.model) if field.name not in _ACTING]
    unused += [("attention", field.name) for field in dataclasses.fields(config.attention)]
    for section, name in (*unused, *_UNUSED):
        values = getattr(config, section)
        value, default = getattr(values, name), getattr(type(values), name)
        require(value == default, f"{section}.{name}", value, f"has no effect with model.architecture='lstm'; set it to "
                f"{default!r}.")
    require(config.moe.padding != "routed", "moe.padding", config.moe.padding,
            "is OpenMoE's, a transformer's; set it to 'nowhere', or model.architecture='transformer'.")
