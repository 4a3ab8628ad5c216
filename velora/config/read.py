"""One section of the composed configuration, read strictly; what is wrong becomes sentences that name key, value and remedy.

A configuration is YAML, so it is checked as strict JSON is: `true` is no number, `1.0` no integer, `"16"` a text, and
no number is infinite or NaN. A list serves for a tuple, a text for a path.
"""

from __future__ import annotations

import difflib
import json
import math
import shlex
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from velora.errors import ConfigError

T = TypeVar("T", bound=BaseModel)

# Keys that were renamed, with what to give now.
_RENAMED = {
    "trainer.gradient_accumulation_steps": "give trainer.micro_batch_size, the examples of one forward; trainer.batch_size "
    "are those of a whole optimiser step",
    "activations.use_reentrant": "recompute=blocks, which activations=checkpoint has become, is always the non-reentrant form; "
    "leave it out",
}

# Values that were moved to another group, with what to give now.
_MOVED = {
    (
        "activations",
        "checkpoint",
    ): "what is computed again is a group of its own: recompute=blocks is gradient checkpointing, "
    "and method=checkpoint is full training with it",
}

# What other programs call our keys.
_SYNONYMS = {
    "trainer.learning_rate": ("lr", "base_lr", "max_lr", "peak_lr"),
    "trainer.num_epochs": ("epochs", "n_epochs", "num_train_epochs", "max_epochs"),
    "trainer.max_steps": ("steps", "num_steps", "iterations", "max_iters", "total_steps", "num_training_steps"),
    "trainer.batch_size": ("bs", "train_batch_size", "total_batch_size", "global_batch_size"),
    "trainer.micro_batch_size": (
        "grad_accum", "accum", "accumulation_steps", "grad_accumulation_steps", "gradient_accumulation",
        "gradient_accumulation_steps", "per_device_train_batch_size", "per_device_batch_size",
    ),
    "trainer.eval_batch_size": ("per_device_eval_batch_size", "eval_bs", "val_batch_size"),
    "trainer.weight_decay": ("wd", "decay"),
    "trainer.warmup_steps": ("warmup", "num_warmup_steps"),
    "trainer.schedule": ("scheduler", "lr_scheduler", "lr_schedule", "lr_scheduler_type"),
    "trainer.min_lr_ratio": ("min_lr", "min_learning_rate"),
    "trainer.max_grad_norm": ("clip", "grad_clip", "grad_clipping", "clip_grad_norm", "max_norm", "gradient_clip_val"),
    "trainer.precision": ("fp16", "bf16", "amp", "mixed_precision"),
    "trainer.eval_every": ("eval_steps", "eval_strategy", "evaluation_strategy", "eval_interval"),
    "trainer.save_every": ("save_steps", "save_strategy", "save_interval"),
    "trainer.log_every": ("logging_steps", "log_steps", "log_interval"),
    "trainer.num_workers": ("workers", "dataloader_num_workers"),
    "weights.dtype": ("torch_dtype",),
    "adapter.rank": ("r", "lora_r", "lora_rank"),
    "adapter.alpha": ("lora_alpha",),
    "adapter.dropout": ("lora_dropout",),
    "adapter.targets": ("target_modules",),
    "data.root": ("data_dir", "data_path", "dataset_path"),
    "runs_dir": ("output_dir", "out", "outdir"),
    "model.path": ("model_name_or_path", "checkpoint"),
}  # fmt: skip
_OUR_NAMES = {name: key for key, names in _SYNONYMS.items() for name in names}


def parse(cls: type[T], value: Any, prefix: str, unknown: Callable[[str], str] | None = None) -> T:
    """Read one section, or with an empty `prefix` all; ConfigError has a sentence for everything that is wrong in it.

    `unknown` makes the sentence on an unknown key.
    """
    if unknown is None:
        unknown = partial(unknown_key, known=sorted(_join(prefix, name) for name in cls.model_fields))
    unusable = dict(_unusable(value, prefix))
    found, sentences = None, {}
    try:
        found = cls.model_validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        sentences = dict(_sentences(error, value, prefix, unknown))
    if problems := {**sentences, **unusable}:
        raise ConfigError(listing(list(dict.fromkeys(problems.values()))))
    assert found is not None
    return found


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that a field holds, also where it may be None; None where it holds none."""
    models = [
        form for form in (annotation, *get_args(annotation)) if isinstance(form, type) and issubclass(form, BaseModel)
    ]
    return models[0] if models else None


def shown(value: Any) -> str:
    """A value as YAML writes it, cut to what a sentence can hold."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def unknown_key(key: str, known: list[str]) -> str:
    if key in _RENAMED:
        return f"{key} is no key any more: {_RENAMED[key]}"
    section, _, name = key.rpartition(".")
    ours = _OUR_NAMES.get(name)
    if ours in known and ours.startswith(section):
        return f"{key} is not a key; did you mean {ours}?"
    beside = {other.rpartition(".")[2]: other for other in known if section and other.rpartition(".")[0] == section}
    close = [beside[name] for name in difflib.get_close_matches(name, beside, n=1)]
    if not beside:  # the section is wrong, or left out
        close = difflib.get_close_matches(key, [other for other in known if other != section], n=1)
    if close:
        return f"{key} is not a key; did you mean {close[0]}?"
    if len(known) > 20:
        return f"{key} is not a key of this configuration; `--cfg job` prints it whole"
    return f"{key} is not a key; known keys here: {', '.join(known)}"


def moved_value(group: str, value: str) -> str | None:
    """What to give in place of a value (or kind) that an earlier version had in this group, or None."""
    return _MOVED.get((group, value))


def unknown_value(group: str, value: str, known: list[str]) -> str:
    """`known` values below a folder that was named in place of one of them are all that is listed of a long list."""
    if moved := moved_value(group, value):
        return f"{group}={value} is no value of {group} any more: {moved}"
    inside = [name for name in known if name.startswith(f"{value}/")]
    if value and inside:
        return f"{group}={value} is a folder; choose one of {', '.join(inside)}"
    close = difflib.get_close_matches(value, known, n=1)
    hint = f"did you mean {close[0]}? It" if close else "it"
    return f"{group}={value} is not known; {hint} is one of {one_of(known)}"


def one_of(known: list[str]) -> str:
    """The values of a group for a sentence; of a long list each folder stands once."""
    if len(known) > 40:
        known = sorted({f"{name.partition('/')[0]}/..." if "/" in name else name for name in known})
    return ", ".join(known)


def listing(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems: " + "; ".join(f"({i}) {p}" for i, p in enumerate(problems, 1))


def _sentences(
    error: ValidationError, value: Any, prefix: str, unknown: Callable[[str], str]
) -> Iterator[tuple[str, str]]:
    """Key and sentence."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for item in error.errors(include_url=False):
        if item["type"] != "json_invalid":  # text that is no Unicode: it is among the unusable values
            found.setdefault(_path(value, item), []).append(item)
    for path, items in found.items():
        if any(len(other) > len(path) and other[: len(path)] == path for other in found):
            continue  # one form of several that the value may have; another says what is wrong inside it
        key, first = _join(prefix, *path), items[0]
        if first["type"] == "extra_forbidden":
            yield key, unknown(key)
        elif first["type"] == "missing" or (first["type"] == "model_type" and first["input"] is None):
            yield key, f"{key} is missing"
        elif first["type"] == "model_type":
            yield key, f"{key}={shown(first['input'])} is not valid: {key} holds keys; give {key}.<key>=..."
        elif first["type"] == "value_error":
            yield key, str(first["ctx"]["error"])
        else:
            yield key, f"{key}={shown(first['input'])} is not valid: {_wanted(items)}{_hint(key, first)}"


def _path(value: Any, item: Any) -> tuple[Any, ...]:
    """Where in the value the problem is: pydantic's location without the names of the forms that a value may have."""
    path = []
    for step in item["loc"]:
        inside = step in value if isinstance(value, dict) else isinstance(value, list) and isinstance(step, int)
        if inside and (isinstance(value, dict) or step < len(value)):
            path.append(step)
            value = value[step]
    return (*path, item["loc"][-1]) if item["type"] == "missing" else tuple(path)


_OTHER_WORDS = {
    "list_type": "a list, like [a,b]",
    "tuple_type": "a list, like [a,b]",
    "path_type": "a path",
    "string_type": "a text",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "keys with values, like {a: 1}",
}


def _wanted(items: list[Any]) -> str:
    """What the value should be; several sentences where it may have one of several forms."""
    texts = [_OTHER_WORDS.get(item["type"]) or item["msg"].removeprefix("Input should be ") for item in items]
    texts = list(dict.fromkeys(texts))
    if all(item["msg"].startswith("Input ") for item in items):
        return f"input should be {' or '.join(texts)}"
    return " or ".join(text[0].lower() + text[1:] for text in texts)


def _hint(key: str, item: Any) -> str:
    value = item["input"]
    if item["type"] in ("string_type", "path_type") and isinstance(value, int | float):
        written = f'"{shown(value)}"'
        inside = isinstance(item["loc"][-1], int)  # of a list
        return f"; if it is a text, write it in quotes: {written if inside else shlex.quote(f'{key}={written}')}"
    if item["type"] in ("int_type", "float_type", "bool_type") and isinstance(value, str) and _is_number(value):
        return "; leave out the quotes, and read a variable of the environment with ${oc.decode:${oc.env:NAME}}"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.lower() in ("true", "false")
    return True


def _unusable(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Values that no key takes, wherever they stand; `key=` with nothing behind it is most often a variable that is not set."""
    if isinstance(value, float) and not math.isfinite(value):
        yield key, f"{key}={value} is not valid: it must be a finite number"
    elif isinstance(value, int) and abs(value) >= 2**63:
        yield key, f"{key}={value} is not valid: an integer must lie within 64 bits"
    elif value == "":
        yield key, f"{key}= is empty; give a value, or leave it out"
    elif isinstance(value, str) and not _is_unicode(value):
        yield key, f"{key}={value!a} is not valid: it holds bytes that are no UTF-8 text"
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    for name, item in inner:
        yield from _unusable(item, _join(key, name))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _join(*parts: Any) -> str:
    return ".".join(str(part) for part in parts if part != "")
