"""AdamW with both moments in 8 bits: bitsandbytes' blockwise form (on a CPU from bitsandbytes 0.50 on)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from velora.group import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import nn

    from velora.config import Config

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamW8bit(Optimizer):
    """Tensors with fewer than `min_8bit_size` entries keep fp32 moments."""

    kind: Literal["adamw_8bit"]
    betas: tuple[Beta, Beta]
    eps: PositiveFloat
    min_8bit_size: PositiveInt

    def build(self, model: nn.Module, config: Config) -> torch.optim.Optimizer:
        from velora.optim.groups import weight_decay_groups
        from velora.optim.quantised_state import require_8bit_kernels

        require_8bit_kernels(next(model.parameters()).device)
        from bitsandbytes.optim import AdamW8bit as BitsandbytesAdamW8bit

        return BitsandbytesAdamW8bit(
            weight_decay_groups(model, config.trainer.weight_decay),
            lr=config.trainer.learning_rate,
            betas=self.betas,
            eps=self.eps,
            min_8bit_size=self.min_8bit_size,
        )
