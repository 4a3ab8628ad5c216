"""Where a network's task head is, and how it trains beside a frozen backbone.

A head is *new* when the task brought it (a classification head on a pre-trained encoder): an adapter must train it,
since it starts from random weights. The output layer of a language model is not new.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from velora.errors import ConfigError

CLASSIFICATION_HEADS = ("classifier", "score", "head", "head_dist", "fc", "qa_outputs")


def _output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that makes a language model's logits, as transformers names it."""
    find = getattr(model, "get_output_embeddings", None)
    return find() if find is not None else None


def new_head_names(model: nn.Module) -> list[str]:
    """Module names of the classification head; empty for a language model.

    A builder can say it itself with the attribute `velora_head`, a list of module names.
    """
    declared = getattr(model, "velora_head", None)
    if declared is not None:
        return list(declared)
    if _output_layer(model) is not None:
        return []
    children = dict(model.named_children())
    return [
        name for name in CLASSIFICATION_HEADS if name in children and any(True for _ in children[name].parameters())
    ]


def new_parts(model: nn.Module, missing: Iterable[str] = ()) -> list[str]:
    """Names of the modules that a task brought to a network of transformers: what stands beside its backbone, and the
    poolers of the backbone that a checkpoint without the parameters `missing` did not have.

    Builders set the attribute `velora_head` to it. Empty for a language model, whose output layer is no task's.
    """
    if _output_layer(model) is not None:
        return []
    backbone = getattr(model, "base_model_prefix", "")
    if backbone not in dict(model.named_children()):
        return new_head_names(model)
    beside = [n for n, child in model.named_children() if n != backbone and any(True for _ in child.parameters())]
    within = [name.split(".") for name in missing if is_within(name, [backbone])]
    poolers = {".".join(parts[: parts.index("pooler") + 1]) for parts in within if "pooler" in parts}
    return [*sorted(poolers), *beside]


def is_within(name: str, modules: Iterable[str]) -> bool:
    """Whether a parameter or module is one of `modules` or inside one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def head_names(model: nn.Module) -> list[str]:
    """Module names of whatever makes the logits; ConfigError if it is not found."""
    names = new_head_names(model)
    output = _output_layer(model)
    if not names and output is not None:
        names = [name for name, module in model.named_modules() if module is output]
    if not names:
        raise ConfigError(
            f"the head of {type(model).__name__} was not found: its builder must set the attribute `velora_head`, "
            f"a list of module names (looked for {', '.join(CLASSIFICATION_HEADS)} and an output embedding)"
        )
    return names


def untie_head(model: nn.Module) -> None:
    """Give the output layer of a language model its own weight if it shares the input embedding's."""
    output, embedding = _output_layer(model), getattr(model, "get_input_embeddings", lambda: None)()
    if output is None or embedding is None or output.weight is not embedding.weight:
        return
    output.weight = nn.Parameter(output.weight.detach().clone())
    model.config.tie_word_embeddings = False  # otherwise saving would drop the head


def train_in_float32(module: nn.Module) -> None:
    """Let a module train: its parameters require gradients and are float32 (AdamW makes no progress in bfloat16).

    Where that changes their dtype, the module's inputs are cast as well, since the backbone before it stays as it is.
    """
    parameters = list(module.parameters())
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in parameters):
        module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def _cast_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    def cast(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(cast(value) for value in args), {key: cast(value) for key, value in kwargs.items()}
