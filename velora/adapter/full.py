"""Every weight trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from velora.group import Adapter

if TYPE_CHECKING:
    from torch import nn

    from velora.config import Config


class Full(Adapter):
    """Full training: no module is added and every parameter requires a gradient."""

    kind: Literal["full"]
    trains_base_weights: ClassVar[bool] = True

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        return model.requires_grad_(True)
