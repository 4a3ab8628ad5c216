"""Where a network's task head is.

A head is *new* when the task brought it (a classification head on a pre-trained encoder): an adapter must train it,
since it starts from random weights. The output layer of a language model is not new.
"""

from __future__ import annotations

from torch import nn

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
    return [
        name
        for name, module in model.named_children()
        if name in CLASSIFICATION_HEADS and any(True for _ in module.parameters())
    ]


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
