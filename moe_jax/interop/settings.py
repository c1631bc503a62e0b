"""The ``config.json`` of a checkpoint, read so that nothing in it is passed over without a word."""

import json
import logging
import pathlib
from typing import Any

from moe_jax.errors import UserError

log = logging.getLogger("moe_jax")


class InteropError(UserError, ValueError):
    """A checkpoint that cannot be read or written; the message is for the person at the terminal."""


# Settings without any effect on what a trained model computes for a token.
_WITHOUT_EFFECT = frozenset("""
    _name_or_path _attn_implementation architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id dtype embd_pdrop eos_token_id ep_size experts_implementation finetuning_task for_llm_compressor
    id2label initializer_range initial_context_length is_decoder is_encoder_decoder label2id max_position_embeddings model_type
    output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type qk_head_dim
    resid_pdrop return_dict router_aux_loss_coef router_jitter_noise seq_aux sep_token_id task_specific_params tokenizer_class
    torch_dtype torchscript transformers_version unk_token_id use_cache aux_loss_alpha quantization_config
    activation_dropout decoder_layerdrop dropout dropout_rate encoder_layerdrop init_std initializer_factor max_length
""".split())


class Settings:
    """A checkpoint's settings; those that were asked for are remembered, and :meth:`finish` speaks of the others.

    Args:
      values: as ``config.json`` has them.
    """

    def __init__(self, values: dict[str, Any], where: str = "config.json"):
        self.values, self.where, self._read = values, where, set()

    def get(self, name: str, default: Any = None) -> Any:
        """The value, also if it is null; ``default`` if it is not there."""
        self._read.add(name)
        return self.values.get(name, default)

    def value(self, name: str, default: Any) -> Any:
        """The value; ``default`` if it is null or not there."""
        value = self.get(name)
        return default if value is None else value

    def number(self, name: str, default: int | None = None) -> int:
        """A whole number, at least 1.

        Raises:
          InteropError: it is not, or it is missing and has no default.
        """
        value = self.value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InteropError(f"{self.where}: {name} is {'missing' if value is None else repr(value)}; it must be a whole number, "
                               f"at least 1.")
        return value

    def only(self, name: str, allowed: tuple[Any, ...], why: str) -> None:
        """Refuses a setting whose value we have no counterpart for; one that is missing is as the first that is allowed."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise InteropError(f"{self.where}: {name}={value!r} {why}; supported: {', '.join(map(repr, allowed))}.")

    def refuse(self, name: str, reason: str) -> InteropError:
        return InteropError(f"{self.where}: {name}={self.values.get(name)!r} {reason}")

    def finish(self) -> None:
        """Names in a warning what nobody asked for and is not known to be without effect."""
        unread = sorted(name for name, value in self.values.items()
                        if name not in self._read and name not in _WITHOUT_EFFECT and value not in (None, False, [], {}, 0))
        if unread:
            log.warning("%s has settings that are not known here, and are not acted on: %s", self.where,
                        ", ".join(f"{name}={self.values[name]!r}" for name in unread))


def read_settings(folder: pathlib.Path, file: str = "config.json") -> dict[str, Any]:
    """``config.json`` of a checkpoint, or another file in its place.

    Raises:
      InteropError: there is none, or it is no JSON object.
    """
    path = folder / file
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InteropError(f"{folder} holds no {file}; give the directory of a Hugging Face checkpoint.") from None
    except NotADirectoryError:
        raise InteropError(f"{folder} is a file; give the directory of a Hugging Face checkpoint.") from None
    except (OSError, ValueError) as error:
        raise InteropError(f"Cannot read {path}: {error}.") from error
    if not isinstance(values, dict):
        raise InteropError(f"Cannot read {path}: it holds no JSON object.")
    return values
