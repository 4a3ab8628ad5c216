"""VeLoRA: chosen layers keep one number per sub-token for the weight gradient; see `velora/apply.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from velora.group import Activations

if TYPE_CHECKING:
    from torch import nn

    from velora.config import Config
    from velora.memory.ledger import Ledger


class Velora(Activations):
    kind: Literal["velora"]
    layers: list[str] = Field(min_length=1)
    sub_token_size: PositiveInt | dict[str, PositiveInt] | None
    num_groups: PositiveInt | dict[str, PositiveInt] | None
    init: Literal["fixed_average", "running_average", "random", "svd"]
    scale: PositiveFloat

    def problems(self, config: Config) -> Iterator[str]:
        size, groups = self.sub_token_size, self.num_groups
        if (size is None) == (groups is None):
            given = "both are given" if size is not None else "none is given"
            yield (
                f"activations.sub_token_size={size} and activations.num_groups={groups}: {given}; "
                "give exactly one and set the other to null (the other is derived from the layer's width)"
            )
        for key, value in (("sub_token_size", size), ("num_groups", groups)):
            if isinstance(value, dict) and (missing := [x for x in self.layers if x not in value and x != "all"]):
                yield f"activations.{key}={value} has no entry for {', '.join(missing)}, which activations.layers names"

    def apply(self, model: nn.Module, config: Config) -> str | None:
        from velora.apply import apply_velora

        summary = apply_velora(
            model,
            self.layers,
            num_groups=self.num_groups,
            sub_token_size=self.sub_token_size,
            init=self.init,
            scale=self.scale,
            roles=config.model.roles,
            seed=config.seed,
        )
        return str(summary)

    def calibrate(self, model: nn.Module, batch: dict[str, Any]) -> None:
        from velora.apply import calibrate

        calibrate(model, batch)

    def warnings(self, model: nn.Module, ledger: Ledger, config: Config) -> list[str]:
        from velora.memory.freed import layers_that_free_nothing

        return layers_that_free_nothing(model, ledger, config.model.roles)

    def forget(self, model: nn.Module) -> None:
        from velora.apply import velora_layers

        for layer in velora_layers(model).values():
            layer.take_batch_statistics()

    def after_step(self, model: nn.Module) -> None:
        if self.init == "running_average":
            from velora.apply import update_directions

            update_directions(model)
