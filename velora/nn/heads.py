"""The matrices A of LTE's heads as one layer, and its twin that keeps one number per sub-token.

Head h reads slice h of the tokens. The slices together are x, so one code of x serves all heads:

    y_h  = x_h A_hᵀ            forward           (n, D) (D, R)
    dx_h = dy_h A_h            needs A only      (n, R) (R, D)
    dA_h = dy_hᵀ x_h           needs x           (R, n) (n, D)

With x̂ = z ⊗ v in place of x (velora/nn/linear.py) the last one is C_h = dy_hᵀ z_h and dA_h = scale (C_h ⊗ v). Each line is one
product for all heads.

    H  heads      N  tokens of x, n = N / H of them for each head      R  rank of a head
    D  in-features, D = G S      G  groups: sub-tokens in a token      S  sub-token size
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from velora.nn.first_order import first_order
from velora.nn.projection import factored_gradient
from velora.nn.recipe import stand_in
from velora.nn.split_backward import Gradients, wanted, weight_gradients
from velora.nn.surroundings import cast
from velora.nn.twin import NO_SECOND_DERIVATIVE, VeloraTwin


def in_slices(x: Tensor, num_heads: int) -> Tensor:
    """x (..., D) as (H, n, D), in the order in which the tokens lie."""
    return x.reshape(num_heads, -1, x.shape[-1])


def products(x: Tensor, weight: Tensor, bias: None, dtype: torch.dtype | None) -> Tensor:
    """Each slice of x (..., D) times its head's weight (H, R, D), computed in `dtype`: (H, n, R)."""
    return torch.bmm(in_slices(cast(x, dtype), len(weight)), cast(weight, dtype).mT)


@torch.no_grad()
def draw_orthogonal(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """A_h with orthonormal rows times sqrt(D / R), for each head of `weight` (H, R, D)."""
    for head in weight:
        nn.init.orthogonal_(head, gain=math.sqrt(head.shape[1] / head.shape[0]), generator=generator)


class HeadsLinear(nn.Module):
    """A linear layer for each of `num_heads` slices of its input: (..., D) -> (H, n, R). `weight` (H, R, D); no bias."""

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.in_features, self.rank = num_heads, in_features, rank
        self.weight = nn.Parameter(torch.empty(num_heads, rank, in_features, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw_orthogonal(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return products(x, self.weight, None, None)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, in_features={self.in_features}, rank={self.rank}"


class VeloraHeadsLinear(VeloraTwin, HeadsLinear):
    """HeadsLinear that keeps N G numbers for the gradients of all heads in place of N D; own arguments: VeloraTwin's."""

    plain_class = HeadsLinear

    @staticmethod
    def width_of(module: Any) -> int:
        return module.in_features

    def forward(self, x: Tensor) -> Tensor:
        if not self.compresses():
            return products(x, self.weight, None, None)
        return self.with_codes(_Heads, products, x)


class _Heads(torch.autograd.Function):
    """As velora.nn.linear's function, head by head: keeps z, the weight (a parameter) and the direction (a buffer)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: None,
        direction: Tensor,
        scale: float,
        later: Any,
        dtype: torch.dtype | None,
        early: bool,
    ) -> Tensor:
        ctx.save_for_backward(z, weight, direction)
        ctx.scale, ctx.later, ctx.bias_dtype = scale, later, None
        ctx.shape = x.shape
        if early:
            return stand_in(x, len(weight), z.shape[0] // len(weight), weight.shape[1])
        return products(x, weight, bias, dtype)

    @staticmethod
    @first_order(NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, dy: Tensor) -> Any:
        z, weight, direction = ctx.saved_tensors  # z (N, G)
        needed = wanted(ctx)
        dx = torch.bmm(dy, weight.to(dy.dtype)).view(ctx.shape) if needed[0] else None
        codes = in_slices(z, len(weight))  # (H, n, G)
        dw, _ = weight_gradients(ctx, needed, _gradients, dy, codes, weight, direction)
        return dx, None, dw, None, None, None, None, None, None


def _gradients(
    dy: Tensor, codes: Tensor, weight: Tensor, direction: Tensor, scale: float, of_weight: bool, bias_dtype: None
) -> Gradients:
    """dA (H, R, D) of dy (H, n, R) and the codes (H, n, G); there is no bias."""
    return factored_gradient(dy, codes, direction, scale, weight) if of_weight else None, None
