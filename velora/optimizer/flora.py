"""FLoRA: Adafactor whose momentum is a random sketch; see `velora/optim/flora.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NegativeFloat, PositiveFloat, PositiveInt

from velora.optimizer._low_rank import LowRankOptimizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from velora.config import Config


class FLoRA(LowRankOptimizer):
    kind: Literal["flora"]
    kappa: PositiveInt
    beta1: Annotated[float, Field(gt=0, lt=1)] | None
    sketched: Literal["past", "all"]
    eps: tuple[PositiveFloat, PositiveFloat]
    clip_threshold: PositiveFloat
    decay_rate: NegativeFloat
    scale_parameter: bool

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        accumulated = self.layerwise and config.trainer.accumulation_steps > 1
        if self.beta1 is None and not accumulated:
            yield (
                "optimizer.beta1=null without optimizer.layerwise=true and a smaller trainer.micro_batch_size: FLoRA "
                "has neither a momentum nor a sum of gradients to compress; use optimizer=adafactor, or set optimizer.beta1=0.9"
            )
        elif self.beta1 is None and self.sketched == "all":
            yield (
                "optimizer.sketched=all has no effect with optimizer.beta1=null: there is no momentum to sketch; set "
                "optimizer.sketched=past"
            )

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        from velora.optim.flora import Flora

        return Flora(
            self.groups(model, config),
            lr=config.trainer.learning_rate,
            beta1=self.beta1,
            eps=self.eps,
            clip_threshold=self.clip_threshold,
            decay_rate=self.decay_rate,
            scale_parameter=self.scale_parameter,
            kappa=self.kappa,
            sketched=self.sketched,
            layerwise=self.layerwise,
            accumulation_steps=config.trainer.accumulation_steps if self.layerwise else 1,
            seed=config.seed,
        )
