"""LOMO: SGD inside the backward pass, with neither state nor gradients; see `velora/optim/lomo.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveFloat

from velora.group import Optimizer
from velora.optimizer._layerwise import layerwise_problems

if TYPE_CHECKING:
    import torch
    from torch import nn

    from velora.config import Config


class LOMO(Optimizer):
    kind: Literal["lomo"]
    max_grad_value: PositiveFloat | None

    def problems(self, config: Config) -> Iterator[str]:
        yield from layerwise_problems("optimizer=lomo", config)
        if config.trainer.accumulation_steps > 1:
            yield (
                f"trainer.micro_batch_size={config.trainer.micro_batch_size} of {config.trainer.batch_size} examples with "
                "optimizer=lomo: it keeps no gradients, so there is nothing to accumulate in; set trainer.micro_batch_size=null"
            )

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        from velora.optim.groups import weight_decay_groups
        from velora.optim.lomo import Lomo

        groups = weight_decay_groups(model, config.trainer.weight_decay)
        return Lomo(groups, lr=config.trainer.learning_rate, max_grad_value=self.max_grad_value)
