"""Hydra: parallel and sequential low-rank branches; the mathematics is in `velora/nn/hydra.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from velora.adapter._inserted import InsertedAdapter, seeded, target_patterns
from velora.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from velora.config import Config


class TaskSettings(BaseModel):
    """Scale and dropout that were published for one task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: PositiveFloat
    dropout: float = Field(ge=0, lt=1)


class Hydra(InsertedAdapter):
    """Multi-head low-rank adaptation (arXiv 2309.06922).

    `scale` and `dropout`: a number, or null for the published value of the task in `per_task`, and where there is none
    scale 1 and no dropout.
    """

    kind: Literal["hydra"]
    rank: PositiveInt
    scale: PositiveFloat | None
    dropout: float | None = Field(ge=0, lt=1)
    targets: list[str] = Field(min_length=1)
    per_task: dict[str, TaskSettings]

    def settings(self, task: str) -> TaskSettings:
        """Scale and dropout for a task."""
        published = self.per_task.get(task, TaskSettings(scale=1.0, dropout=0.0))
        return TaskSettings(
            scale=published.scale if self.scale is None else self.scale,
            dropout=published.dropout if self.dropout is None else self.dropout,
        )

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        from torch import nn

        from velora.head import train_in_float32
        from velora.nn.hydra import HydraLinear
        from velora.swap import replace_modules

        settings = self.settings(config.task.name)

        def make(name: str, module: nn.Module) -> nn.Module:
            if not isinstance(module, nn.Linear):
                raise ConfigError(f"a {type(module).__name__} takes no Hydra branches; a linear layer does")
            return HydraLinear(module, rank=self.rank, scale=settings.scale, dropout=settings.dropout)

        model.requires_grad_(False)
        with seeded(config.seed):
            replace_modules(model, target_patterns(self.targets, model, config), make)
        for name in self.also_trained(model):
            train_in_float32(model.get_submodule(name))
        return model
