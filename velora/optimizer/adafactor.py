"""Adafactor: row and column statistics in place of the second moment, no first moment unless `beta1` is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NegativeFloat, PositiveFloat

from velora.group import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from velora.config import Config


class Adafactor(Optimizer):
    """The learning rate and its schedule are the trainer's: Adafactor's own (`relative_step`) is off."""

    kind: Literal["adafactor"]
    beta1: Annotated[float, Field(gt=0, lt=1)] | None
    eps: tuple[PositiveFloat, PositiveFloat]
    clip_threshold: PositiveFloat
    decay_rate: NegativeFloat
    scale_parameter: bool

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        from velora.optim.adafactor import Adafactor as TorchAdafactor
        from velora.optim.groups import weight_decay_groups

        return TorchAdafactor(
            weight_decay_groups(model, config.trainer.weight_decay),
            lr=config.trainer.learning_rate,
            beta1=self.beta1,
            eps=self.eps,
            clip_threshold=self.clip_threshold,
            decay_rate=self.decay_rate,
            scale_parameter=self.scale_parameter,
            relative_step=False,
            warmup_init=False,
        )
