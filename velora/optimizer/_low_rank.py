"""What GaLore and FLoRA have in common: the layers that get a rank, and the layer-wise form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PositiveInt

from velora.group import Optimizer
from velora.optimizer._layerwise import layerwise_problems

if TYPE_CHECKING:
    from torch import nn

    from velora.config import Config

Fraction = Annotated[float, Field(gt=0, lt=1)]


class LowRankOptimizer(Optimizer):
    """`layers`: roles or patterns, null for every layer that plays a role. `rank`: a number, or a fraction of the shorter side."""

    layers: Annotated[list[str], Field(min_length=1)] | None
    rank: PositiveInt | Fraction
    layerwise: bool

    def problems(self, config: Config) -> Iterator[str]:
        if not config.adapter.trains_base_weights:
            yield (
                f"optimizer={self.kind} with adapter={config.adapter.kind}: it makes the state of large trained matrices "
                "smaller, and here they are frozen; use adapter=full or optimizer=adamw"
            )
        if self.layerwise:
            yield from layerwise_problems("optimizer.layerwise=true", config)

    def groups(self, model: nn.Module, config: Config, **options: Any) -> list[dict[str, Any]]:
        """Parameter groups: those with a rank, which also get `options`, and the others."""
        from velora.optim.low_rank import low_rank_groups

        return low_rank_groups(
            model, self.layers, self.rank, config.trainer.weight_decay, roles=config.model.roles, **options
        )
