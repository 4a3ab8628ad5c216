"""Networks of the transformers library: described by YAML or by a checkpoint, with random weights or loaded and checked.

One list, `velora.nn.head.new_parts`, says which modules are the task's own. Only there may a checkpoint lack parameters or have
them in another shape; they start from random weights then, and an adapter trains and saves them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import importlib.util
import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import transformers
from accelerate import init_empty_weights
from torch import nn

from velora.config.model import PretrainedModel, limits_of
from velora.config.parts import Head, Modality
from velora.errors import ConfigError
from velora.models.hub import load
from velora.models.quantised import read_quantised
from velora.models.tokenizer import SENTINELS, check_length, check_vocabulary
from velora.nn.head import is_within, new_parts
from velora.run.notes import note

if TYPE_CHECKING:
    from velora.config.run import Config

T = TypeVar("T")

AUTO_CLASSES: dict[Modality, Any] = {
    "causal_lm": transformers.AutoModelForCausalLM,
    "sequence_classification": transformers.AutoModelForSequenceClassification,
}
SHOWN_NAMES = 3  # of the weights that were not read
_ATTENTION = "attention implementation|attn_implementation|[Ff]lash.?[Aa]ttention|[Ff]lex.?[Aa]ttention"
# Keys that transformers' configuration classes take without naming them.
_ALSO_TAKEN = {"model_type", "rope_theta", "rope_scaling", "num_labels"}
_POSITIVE = {
    "hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings", "head_dim", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "dim", "hidden_dim", "n_layers", "n_heads", "n_embd", "n_layer", "n_head",
    "n_positions", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "encoder_layers", "decoder_layers",
    "encoder_attention_heads", "decoder_attention_heads", "embedding_size", "word_embed_proj_dim", "ffn_dim",
}  # fmt: skip


def build(model: PretrainedModel, head: Head, tokenizer: Any, config: Config) -> nn.Module:
    """The network with a head for the task, on the CPU; sets its attribute `velora_head` to the modules that are new."""
    network_config = _network_config(model, head, tokenizer)
    _check_fit(network_config, head, tokenizer, config)
    _refuse_fused_mamba(network_config, config)
    transformers.set_seed(config.seed)
    options = {**config.weights.load_options(), "attn_implementation": model.attention, "trust_remote_code": False}
    auto_class, source = AUTO_CLASSES[head.modality], model.source()
    if not model.loads_weights:
        network = _explaining_attention(model, partial(auto_class.from_config, network_config, **options))
        network.velora_head = new_parts(network)
        return network
    assert source is not None  # `problems` saw to it

    def read() -> Any:
        if config.weights.quantised and not model.read_options():
            found = read_quantised(auto_class, network_config, source, options, config)
            if found is not None:
                return found
        found = auto_class.from_pretrained(
            source, config=copy.deepcopy(network_config), output_loading_info=True, ignore_mismatched_sizes=True,
            **options, **model.read_options(),
        )  # fmt: skip
        return as_dense(found, auto_class, network_config, options) if model.read_options() else found

    return read_network(model.origin(), partial(_explaining_attention, model, read), local=Path(source).is_dir())


def as_dense(found: tuple[Any, Any], auto_class: Any, network_config: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """The same network without the mark of a quantised file, which the weights in memory are not: Trainer refuses it."""
    network_config.name_or_path = ""  # where PEFT would look for a config.json, which a gguf file has inside
    with init_empty_weights(include_buffers=False):
        plain = auto_class.from_config(network_config, **options)
    network, info = found
    plain.load_state_dict(network.state_dict(), assign=True)
    plain.tie_weights()
    return plain.eval(), info


def described(model: PretrainedModel) -> dict[str, Any]:
    """Model type, positions, words and padding token of the network, as far as they are known."""
    return _description(_checkpoint_configuration(model)) if _reads_configuration(model) else model.architecture or {}


def _description(found: Any) -> dict[str, Any]:
    text = found.get_text_config()
    keys = ("model_type", "max_position_embeddings", "vocab_size", "pad_token_id")
    return {key: getattr(text, key, None) for key in keys}


def _reads_configuration(model: PretrainedModel) -> bool:
    """Whether a checkpoint's config.json describes the network, or else the YAML."""
    return model.path is not None or model.architecture is None


def _checkpoint_configuration(model: PretrainedModel) -> Any:
    source = model.source()
    assert source is not None
    found = load(
        model.origin(), "give model.path=DIR, a folder with a checkpoint",
        lambda: transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **model.read_options()),
        local=Path(source).is_dir(),
    )  # fmt: skip
    for sentence in impossible_sizes(found.to_dict()):
        raise ConfigError(f"{model.origin()}: {sentence} in its config.json; give a whole checkpoint")
    return found


def _network_config(model: PretrainedModel, head: Head, tokenizer: Any) -> Any:
    declared = dict(model.architecture or {})
    if _reads_configuration(model) or model.loads_weights:
        found = _checkpoint_configuration(model)
        _refuse_other_architecture(model, found, declared)
    else:
        if declared.get("vocab_size", 0) is None:
            declared["vocab_size"] = len(tokenizer)
        special = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id", None) for n in ("bos", "eos", "pad")}
        found = configuration(declared, special)
    # A decoder reads its class at the last token that is not padding, and some encoders count positions by it.
    found.get_text_config().pad_token_id = tokenizer.pad_token_id
    if head.num_labels is not None:
        found.num_labels = head.num_labels
        found.problem_type = "regression" if head.regression else "single_label_classification"
    found.use_cache = False
    return found


def _refuse_other_architecture(model: PretrainedModel, found: Any, declared: dict[str, Any]) -> None:
    for key in ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
        value = getattr(found, key, None)
        if key in declared and value != declared[key]:
            raise ConfigError(
                f"{model.origin()} is a checkpoint of another architecture: its {key} is {value}, "
                f"model={model.name} has {declared[key]}; choose the model= that belongs to it"
            )


def _check_fit(network_config: Any, head: Head, tokenizer: Any, config: Config) -> None:
    """ConfigError where texts or tokenizer do not fit; for velora-memory, which loads no data."""
    limits = limits_of(_description(network_config))
    (_, length), _ = config.task.batch_shapes(1, config)["input_ids"]
    check_length(length, limits, config)
    if hasattr(tokenizer, "__len__"):
        check_vocabulary(tokenizer, limits, config, spare=SENTINELS if head.num_labels is None else 0)


def _refuse_fused_mamba(network_config: Any, config: Config) -> None:
    """Its kernel reads the weights of x_proj and out_proj itself: an adapter or VeLoRA on them would silently do nothing."""
    if network_config.model_type == "mamba" and importlib.util.find_spec("mamba_ssm") is not None:
        raise ConfigError(
            f"model={config.model.name}: transformers would use the fused kernel of the package mamba_ssm, which passes the "
            "layers by that methods change; uninstall mamba_ssm"
        )


def _explaining_attention(model: PretrainedModel, function: Callable[[], T]) -> T:
    """What `function` builds; ConfigError where the network has no attention of this kind, or no such sizes."""
    try:
        return function()
    except (ValueError, ImportError) as error:
        reason = str(error).split(". ")[0]
        if model.attention != "eager" and re.search(_ATTENTION, reason):
            raise ConfigError(
                f"model.attention={model.attention} does not work for model={model.name}: {reason}; "
                "give model.attention=eager, which every network has"
            ) from error
        if not model.loads_weights and isinstance(error, ValueError):
            raise ConfigError(f"model={model.name} cannot be built: {reason}; see model.architecture") from error
        raise


def configuration(architecture: dict[str, Any], special_tokens: dict[str, int | None]) -> Any:
    """transformers' configuration of an architecture; its own `*_token_id` go before `special_tokens`.

    Raises ConfigError for a key that the architecture does not have, and for a size that no network has.
    """
    known = transformers.CONFIG_MAPPING
    declared = {key: value for key, value in architecture.items() if key != "model_type"}
    model_type = str(architecture.get("model_type"))
    if model_type not in known:
        close = difflib.get_close_matches(model_type, list(known), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"model.architecture.model_type={model_type} is no architecture of transformers{hint}")
    sizes = (f"model.architecture.{sentence}" for sentence in impossible_sizes(declared))
    for sentence in [*_unknown_keys(known[model_type], model_type, declared), *sizes]:
        raise ConfigError(sentence)
    try:
        return known[model_type](**{**special_tokens, **declared})
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


def read_network(what: str, read: Callable[[], Any], *, local: bool) -> Any:
    """The network that `read` makes together with transformers' loading info; `what` names the key ("model.path=DIR").

    Sets its attribute `velora_head` to what is new. Raises ConfigError for files that cannot be read, parameters that are
    missing or of another shape outside the head, blocks without a place in the network, and values that are not finite.
    """
    model, info = load(what, "give model.path=DIR, a folder with a whole checkpoint", read, local=local)
    absent = {*info["missing_keys"], *(k[0] if isinstance(k, tuple) else k for k in info["mismatched_keys"])}
    parts = new_parts(model, absent)
    wrong = sorted(key for key in absent if not is_within(key, parts))
    if wrong:
        raise ConfigError(
            f"{what} is a checkpoint of another architecture, or its config.json is: {len(wrong)} parameters are missing "
            f"or of another shape, {wrong[0]} among them; choose the model= that belongs to it, or give a whole checkpoint"
        )
    unused = sorted(info["unexpected_keys"])
    own = {_of_first_block(name) for name, _ in model.named_parameters()}
    beyond = [key for key in unused if any(character.isdigit() for character in key) and _of_first_block(key) in own]
    if beyond:
        raise ConfigError(
            f"{what}: its config.json describes fewer blocks than its weights have, {beyond[0]} has no place; give a whole "
            "checkpoint"
        )
    if unused:
        shown = ", ".join(unused[:SHOWN_NAMES])
        note(f"{what}: {len(unused)} of its weights have no place in this network and were not read ({shown})")
    _refuse_not_finite(what, model)
    model.velora_head = parts
    return model


def _of_first_block(name: str) -> str:
    return re.sub(r"\.\d+\.", ".0.", name)


def _refuse_not_finite(what: str, model: Any) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ConfigError(
                f"{what}: the weights {name} are not finite (NaN, or beyond the range of {parameter.dtype}); give a "
                "whole checkpoint, or a wider weights.dtype"
            )
