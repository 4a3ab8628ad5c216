"""The `architecture` of a model's YAML as a configuration of transformers, with every key and size checked."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
from collections.abc import Iterator
from typing import Any

from velora.errors import ConfigError

# Keys that transformers' configuration classes take without naming them.
_ALSO_TAKEN = {"model_type", "rope_theta", "rope_scaling", "num_labels"}
_POSITIVE = {
    "hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings", "head_dim", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "dim", "hidden_dim", "n_layers", "n_heads", "n_embd", "n_layer", "n_head",
    "n_positions", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "encoder_layers", "decoder_layers",
    "encoder_attention_heads", "decoder_attention_heads", "embedding_size", "word_embed_proj_dim", "ffn_dim",
}  # fmt: skip


def configuration(architecture: dict[str, Any], special_tokens: dict[str, int | None]) -> Any:
    """transformers' configuration of an architecture; its own `*_token_id` go before `special_tokens`.

    Raises ConfigError for a key that the architecture does not have, and for a size that no network has.
    """
    from transformers import CONFIG_MAPPING

    declared = {key: value for key, value in architecture.items() if key != "model_type"}
    model_type = str(architecture.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        close = difflib.get_close_matches(model_type, list(CONFIG_MAPPING), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"model.architecture.model_type={model_type} is no architecture of transformers{hint}")
    sizes = (f"model.architecture.{sentence}" for sentence in impossible_sizes(declared))
    for sentence in [*_unknown_keys(CONFIG_MAPPING[model_type], model_type, declared), *sizes]:
        raise ConfigError(sentence)
    try:
        return CONFIG_MAPPING[model_type](**{**special_tokens, **declared})
    except Exception as error:  # transformers validates with classes of its own
        reason = str(error).splitlines()[-1].strip().removeprefix("ValueError: ")
        raise ConfigError(f"model.architecture={architecture} is not valid: {reason}") from None


def _unknown_keys(cls: Any, model_type: str, declared: dict[str, Any]) -> Iterator[str]:
    known = {*inspect.signature(cls.__init__).parameters, *cls.attribute_map, *_ALSO_TAKEN} - {"self", "kwargs"}
    if dataclasses.is_dataclass(cls):
        known |= {field.name for field in dataclasses.fields(cls)}
    with contextlib.suppress(Exception):  # some classes have no default
        known |= {name for name in vars(cls()) if not name.startswith("_")}
    for key in declared:
        if key not in known and not isinstance(getattr(cls, key, None), property):
            close = difflib.get_close_matches(key, sorted(known), n=1)
            hint = (
                f"did you mean model.architecture.{close[0]}?"
                if close
                else f"{cls.__name__} of transformers lists its keys"
            )
            yield f"model.architecture.{key} is not a key of the architecture {model_type}; {hint}"


def impossible_sizes(declared: dict[str, Any]) -> Iterator[str]:
    """A sentence for each size that no network has."""
    for key, value in declared.items():
        if key in _POSITIVE and isinstance(value, int | float) and not value >= 1:
            yield f"{key}={value} must be at least 1"
