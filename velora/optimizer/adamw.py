"""AdamW as PyTorch has it: two moments per trainable parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat

from velora.group import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from velora.config import Config


Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamW(Optimizer):
    kind: Literal["adamw"]
    betas: tuple[Beta, Beta]
    eps: PositiveFloat
    fused: bool

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        import torch

        from velora.optim.groups import weight_decay_groups

        groups = weight_decay_groups(model, config.trainer.weight_decay)
        return torch.optim.AdamW(
            groups, lr=config.trainer.learning_rate, betas=self.betas, eps=self.eps, fused=self.fused or None
        )
