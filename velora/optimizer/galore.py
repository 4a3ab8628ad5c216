"""GaLore: AdamW whose moments live in a low-rank subspace of the gradient; see `velora/optim/galore.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from velora.optimizer._low_rank import LowRankOptimizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from velora.config import Config

Beta = Annotated[float, Field(ge=0, lt=1)]


class GaLore(LowRankOptimizer):
    kind: Literal["galore"]
    update_proj_gap: PositiveInt
    scale: PositiveFloat
    proj_type: Literal["std", "reverse_std", "left", "right", "full"]
    svd: Literal["exact", "randomized"]
    bits: Literal[32, 8]
    betas: tuple[Beta, Beta]
    eps: NonNegativeFloat

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        from velora.optim.galore import GaLoreAdamW

        options = {name: getattr(self, name) for name in ("update_proj_gap", "scale", "proj_type", "svd")}
        return GaLoreAdamW(
            self.groups(model, config, **options),
            lr=config.trainer.learning_rate,
            betas=self.betas,
            eps=self.eps,
            bits=self.bits,
            layerwise=self.layerwise,
            accumulation_steps=config.trainer.accumulation_steps if self.layerwise else 1,
            seed=config.seed,
        )
