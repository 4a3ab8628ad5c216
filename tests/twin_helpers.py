"""What the tests of the four VeLoRA twins share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROUNDING = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-11}
"""One rounding of a dtype. Codes, their product with dy and the result are rounded once each, so a few of these suffice."""


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """dx, dW and, where there is a bias, db."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)


@torch.no_grad()
def take_values(twin: nn.Module, plain: nn.Module) -> None:
    """Give a twin the parameters of its plain layer."""
    for mine, theirs in zip(twin.parameters(), plain.parameters(), strict=True):
        mine.copy_(theirs)
