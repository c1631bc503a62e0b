"""What a config with ``model.encoder_layers`` above 0 must and may set."""

from typing import Any

from moe_jax.config.checks import require
from moe_jax.config.sections import OBJECTIVES

# Settings of decoders alone, and why an encoder–decoder has no use for them.
_UNUSED = (
    ("attention", "kind", "an encoder and cross-attention have heads"),
    ("attention", "layers", "an encoder looks to both sides, which windows and chunks do not"),
    ("model", "mtp_depth", "multi-token prediction is of decoders alone"),
    ("data", "prefix_attention", "what is given goes to the encoder, which sees all of it"),
)


def check_encoder_decoder(config: Any) -> None:
    """Refuses what an encoder–decoder cannot work with, and rows for one where there is none.

    Raises:
      ConfigError: with the setting.
    """
    layers, data, moe = config.model.encoder_layers, config.data, config.moe
    if not layers:
        require(data.target_length == 0, "data.target_length", data.target_length,
                "is of the rows that a decoder writes behind an encoder, but model.encoder_layers=0; set it to 0, or "
                "model.encoder_layers.")
        require(not config.model.encoder_embedding, "model.encoder_embedding", config.model.encoder_embedding,
                "is of an encoder, but model.encoder_layers=0; set it to False, or model.encoder_layers.")
        return
    require(data.objective != "causal", "data.objective", data.objective,
            f"gives the encoder nothing to read, but model.encoder_layers={layers}; set it to one of "
            f"{', '.join(map(repr, OBJECTIVES[1:]))} (T5, Switch: 'span_corruption').")
    require(data.target_length >= 2, "data.target_length", data.target_length,
            f"is the length of the decoder's rows; model.encoder_layers={layers} needs at least 2{_target_hint(data)}.")
    for section, name, why in _UNUSED:
        value, default = getattr(getattr(config, section), name), getattr(type(getattr(config, section)), name)
        require(value == default, f"{section}.{name}", value, f"{why}; with model.encoder_layers={layers} set it to {default!r}.")
    require(config.model.attention != "splash", "model.attention", config.model.attention,
            f"looks back only, and the encoder of model.encoder_layers={layers} to both sides; set it to 'auto' or 'plain'.")
    if moe.is_dense:
        return
    from moe_jax.routing import ROUTERS  # as in run.py
    require(not ROUTERS[moe.router].is_policy, "moe.router", moe.router,
            "learns from how well each token's successor is predicted, and an encoder's tokens predict none; use another router.")
    require(moe.padding != "routed", "moe.padding", moe.padding,
            "blanks padding as decoders alone do (OpenMoE); set it to 'as_text' (Switch) or 'nowhere'.")


def _target_hint(data: Any) -> str:
    """How long targets are, where that follows from the length of the inputs."""
    if data.objective != "span_corruption":
        return ""
    from moe_jax.data.objectives import text_and_target_lengths
    try:
        length = text_and_target_lengths(data.sequence_length, data.span_rate, data.span_mean)[1]
    except ValueError:
        return ""
    return f"; the targets of data.sequence_length={data.sequence_length} inputs are {length}"
