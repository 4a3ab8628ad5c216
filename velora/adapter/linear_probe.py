"""Only the task's head trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from velora.group import Adapter

if TYPE_CHECKING:
    from torch import nn

    from velora.config import Config


class LinearProbe(Adapter):
    """Linear probing: the backbone is frozen, the head trains.

    The head is what `velora.head.head_names` finds: the classification head of an encoder (two layers in RoBERTa) or
    of a vision transformer, the output layer of a language model. A language model whose output layer shares its weight
    with the input embedding gets a copy of its own for the head, so that the embedding stays as it was.
    """

    kind: Literal["linear_probe"]

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        from velora.head import head_names, train_in_float32, untie_head

        model.requires_grad_(False)
        untie_head(model)
        for name in head_names(model):
            train_in_float32(model.get_submodule(name))
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        from velora.adapter_state import save_adapter

        save_adapter(model, folder)
