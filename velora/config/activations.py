"""What linear layers keep for the backward pass (the axis `activations`)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from velora.config.parts import Activations
from velora.config.roles import ROLES

if TYPE_CHECKING:
    from torch import nn

    from velora.config.run import Config
    from velora.memory.ledger import Ledger


class Exact(Activations):
    kind: Literal["exact"]


class Velora(Activations):
    kind: Literal["velora"]
    layers: list[str] = Field(min_length=1)
    sub_token_size: PositiveInt | dict[str, PositiveInt] | None
    num_groups: PositiveInt | dict[str, PositiveInt] | None
    init: Literal["fixed_average", "running_average", "random", "svd"]
    scale: PositiveFloat

    @field_validator("layers", mode="before")
    @classmethod
    def _are_given(cls, layers: Any) -> Any:
        if layers is None:
            raise ValueError(
                "activations.layers=null names no layers (a method that takes adapter.targets gets null from adapter=ssf); "
                "give roles or patterns, like activations.layers=[value,down]"
            )
        return layers

    def problems(self, config: Config) -> Iterator[str]:
        size, groups = self.sub_token_size, self.num_groups
        if (size is None) == (groups is None):
            given = "both are given" if size is not None else "none is given"
            yield (
                f"activations.sub_token_size={size} and activations.num_groups={groups}: {given}; "
                "give exactly one and set the other to null (the other is derived from the layer's width)"
            )
        for key, value in (("sub_token_size", size), ("num_groups", groups)):
            if isinstance(value, dict):
                yield from self._entry_problems(f"activations.{key}", value, config)

    def _entry_problems(self, key: str, sizes: dict[str, int], config: Config) -> Iterator[str]:
        """A size of its own for each entry of `layers` ("all" stands for every role), and for nothing else."""
        named = {layer for layer in self.layers if layer != "all"}
        roles = {*ROLES, *(config.model.roles or {})} if "all" in self.layers else set()
        for entry in [entry for entry in sizes if entry not in named | roles]:
            close = difflib.get_close_matches(entry, sorted((named | roles) - sizes.keys()), n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            yield f"{key}.{entry}={sizes[entry]}: activations.layers={self.layers} does not name {entry}{hint}"
        if missing := sorted(named - sizes.keys()):
            yield f"{key}={sizes} has no entry for {', '.join(missing)}, which activations.layers names"

    def apply(self, model: nn.Module, config: Config) -> str | None:
        from velora.nn.apply import apply_velora

        summary = apply_velora(
            model,
            self.layers,
            num_groups=self.num_groups,
            sub_token_size=self.sub_token_size,
            init=self.init,
            scale=self.scale,
            seed=config.seed,
        )
        return str(summary)

    def calibrate(self, model: nn.Module, batches: Iterable[dict[str, Any]]) -> None:
        from velora.nn.apply import calibrate

        calibrate(model, *batches)

    def pretend_calibrated(self, model: nn.Module) -> None:
        import torch

        from velora.nn.apply import velora_layers

        for layer in velora_layers(model).values():
            vector = torch.ones_like(layer.direction)
            layer.set_direction(vector / torch.linalg.vector_norm(vector), vector)

    def warnings(self, model: nn.Module, ledger: Ledger, config: Config) -> list[str]:
        from velora.memory.freed import layers_that_free_nothing

        return layers_that_free_nothing(model, ledger)

    def forget(self, model: nn.Module) -> None:
        from velora.nn.apply import velora_layers

        for layer in velora_layers(model).values():
            layer.take_batch_statistics()

    def after_step(self, model: nn.Module) -> None:
        if self.init == "running_average":
            from velora.nn.apply import update_directions

            update_directions(model)
