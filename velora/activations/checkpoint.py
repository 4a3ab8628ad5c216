"""Gradient checkpointing: each block keeps its input only and is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from velora.errors import ConfigError
from velora.group import Activations

if TYPE_CHECKING:
    from torch import nn

    from velora.config import Config


class Checkpoint(Activations):
    kind: Literal["checkpoint"]
    use_reentrant: bool

    def problems(self, config: Config) -> Iterator[str]:
        if self.use_reentrant and config.adapter.kind != "full":
            yield (
                f"activations.use_reentrant=true needs block inputs that require a gradient, and adapter={config.adapter.kind} "
                "freezes the embedding; set activations.use_reentrant=false"
            )
        elif self.use_reentrant and "image_classification" in config.model.modalities():
            yield (
                f"activations.use_reentrant=true has no effect with model={config.model.name}: timm's networks always use the "
                "non-reentrant form; set activations.use_reentrant=false"
            )

    def apply(self, model: nn.Module, config: Config) -> str | None:
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing_enable"):
                module.gradient_checkpointing_enable(
                    gradient_checkpointing_kwargs={"use_reentrant": self.use_reentrant}
                )
                return None
            if hasattr(module, "set_grad_checkpointing"):  # timm; always the non-reentrant form
                module.set_grad_checkpointing(True)
                return None
        raise ConfigError(f"activations=checkpoint: model={config.model.name} has no gradient checkpointing of its own")
