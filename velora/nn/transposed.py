"""The linear layer of GPT-2, transformers' `Conv1D`, and its twin: nn.Linear with the weight the other way round.

    y  = x W + b         W (D, M)
    dW = xᵀ dy           with x̂ = z ⊗ v in place of x: dW[g S + s, m] = scale v[s] (zᵀ dy)[g, m]

See velora/nn/linear.py, where everything else is said.

    N  tokens (all leading dimensions together)      D  in-features, D = G S      G  groups: sub-tokens in a token
    M  out-features                                  S  sub-token size
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from velora.nn.first_order import first_order
from velora.nn.projection import scaled_direction, sum_over_tokens
from velora.nn.recipe import stand_in
from velora.nn.split_backward import Gradients, wanted, weight_gradients
from velora.nn.surroundings import cast
from velora.nn.twin import NO_SECOND_DERIVATIVE, VeloraTwin


class VeloraTransposedLinear(VeloraTwin, Conv1D):
    """transformers' Conv1D that keeps N G numbers for the gradient of its weight in place of N D."""

    plain_class = Conv1D

    @staticmethod
    def width_of(module: Any) -> int:
        return module.nx

    def forward(self, x: Tensor) -> Tensor:
        if not self.compresses():
            return super().forward(x)
        return self.with_codes(_TransposedLinear, _product, x)


def _product(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x W + b, as Conv1D computes it."""
    y = torch.addmm(cast(bias, dtype), x.view(-1, x.shape[-1]), cast(weight, dtype))
    return y.view(*x.shape[:-1], weight.shape[1])


class _TransposedLinear(torch.autograd.Function):
    """Keeps z, the weight (a parameter) and the direction (a buffer); `early`: see recipe.Product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor,
        direction: Tensor,
        scale: float,
        later: Any,
        dtype: torch.dtype | None,
        early: bool,
    ) -> Tensor:
        ctx.save_for_backward(z, weight, direction)
        ctx.scale, ctx.shape, ctx.bias_dtype, ctx.later = scale, x.shape, bias.dtype, later
        return stand_in(x, *x.shape[:-1], weight.shape[1]) if early else _product(x, weight, bias, dtype)

    @staticmethod
    @first_order(NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        z, weight, direction = ctx.saved_tensors
        needed = wanted(ctx)
        dy = grad_output.reshape(-1, grad_output.shape[-1])  # (N, M)
        dx = (dy @ weight.to(dy.dtype).T).view(ctx.shape) if needed[0] else None
        dw, db = weight_gradients(ctx, needed, _gradients, dy, z, weight, direction)
        return dx, None, dw, db, None, None, None, None, None


def _gradients(
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    direction: Tensor,
    scale: float,
    of_weight: bool,
    bias_dtype: torch.dtype | None,
) -> Gradients:
    """dW (D, M) and db (M); the latter in its dtype, or None."""
    dw = None
    if of_weight:
        c = sum_over_tokens(z, dy)  # (G, M)
        dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
        v = scaled_direction(z, direction, scale)  # (S)
        torch.mul(c.unsqueeze(1), v.unsqueeze(1), out=dw.view(c.shape[0], -1, c.shape[1]))  # (G, S, M)
    return dw, None if bias_dtype is None else dy.sum(0).to(bias_dtype)
