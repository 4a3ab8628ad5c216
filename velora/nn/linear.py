"""A linear layer that keeps one number per sub-token for the gradient of its weight.

A linear layer is three matrix products, and the third is why its input stays in memory until the backward pass:

    y  = x Wᵀ + b        forward                  (N, D) (D, M)
    dx = dy W            needs W only             (N, M) (M, D)
    dW = dyᵀ x           needs x                  (M, N) (N, D)

VeLoRA keeps z = u . v, the coordinate of each sub-token u of x along a fixed unit vector v, in place of x, and puts
x̂ = z ⊗ v in place of x in the third product (arXiv 2405.17991, section 3). As x̂ has one free number per sub-token, the
product needs no x̂:

    C  = dyᵀ z           (M, N) (N, G)            S times less work than dyᵀ x
    dW = scale (C ⊗ v)   (M, G, S) = (M, D)

y, dx and db are exact, bit for bit those of nn.Linear.

    N  tokens (all leading dimensions together)      D  in-features, D = G S      G  groups: sub-tokens in a token
    M  out-features                                  S  sub-token size
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from velora.nn.first_order import refuse_second_derivative
from velora.nn.projection import code_unit, sum_over_tokens
from velora.nn.recipe import Product, forward_may_stop, linear, stand_in
from velora.nn.split_backward import Gradients, Later, later_of, now_or_later, wanted
from velora.nn.surroundings import autocast_dtype, cast, cast_type
from velora.nn.twin import NO_SECOND_DERIVATIVE, VeloraTwin


class VeloraLinear(VeloraTwin, nn.Linear):
    """nn.Linear that keeps N G numbers for the gradient of its weight in place of N D.

    In eval mode, under no_grad and where the weight is frozen it is the plain layer. `velora.apply_velora` makes it out of
    the nn.Linear layers of a model; `velora.calibrate` sets its direction. The arguments of its own are VeloraTwin's.
    """

    plain_class = nn.Linear

    @staticmethod
    def width_of(module: Any) -> int:
        return module.in_features

    def forward(self, input: Tensor) -> Tensor:
        if not self.compresses():
            return F.linear(input, self.weight, self.bias)
        self.observe(input)
        dtype = autocast_dtype(input.device)
        with torch.no_grad():
            z = self.codes(input, cast_type(input, dtype))
        x = cast(input, dtype)
        early = not torch.compiler.is_compiling() and forward_may_stop()
        y = _Linear.apply(x, z, self.weight, self.bias, self.direction, self.scale, dtype, early, later_of(self))
        return Product.apply(y, partial(linear, x, self.weight, self.bias, dtype)) if early else y


class _Linear(torch.autograd.Function):
    """The three products above, or all but the first where that comes after it (`early`: see recipe.Product).

    Keeps z, the weight (a parameter: no bytes of its own) and the direction (a buffer).
    Under autocast the weight is cast once more in backward, so that no half-precision copy of it is kept either. With
    half-precision inputs C and the product with v are float32, and dW is rounded once, to the weight's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        direction: Tensor,
        scale: float,
        dtype: torch.dtype | None,
        early: bool,
        later: Later | None,
    ) -> Tensor:
        ctx.save_for_backward(z, weight, direction)
        ctx.scale, ctx.later = scale, later
        ctx.shape = x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        if early:
            return stand_in(x, *x.shape[:-1], weight.shape[0])
        return linear(x, weight, bias, dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        z, weight, direction = ctx.saved_tensors
        dx = dw = db = None
        needed = wanted(ctx)
        with torch.no_grad():
            dy = grad_output.reshape(-1, grad_output.shape[-1])  # (N, M)
            if needed[0]:
                dx = (dy @ weight.to(dy.dtype)).view(ctx.shape)
            if needed[2] or needed[3]:
                bias_dtype = ctx.bias_dtype if needed[3] else None
                compute = partial(_gradients, dy, z, weight, direction, ctx.scale, needed[2], bias_dtype)
                dw, db = now_or_later(ctx.later, compute)
        dx, dw, db = refuse_second_derivative((dx, dw, db), NO_SECOND_DERIVATIVE)
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
    """dW (M, D) and db (M); the latter in its dtype, or None."""
    dw = None
    if of_weight:
        c = sum_over_tokens(dy, z)  # (M, G)
        dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
        v = scale * code_unit(z.dtype, direction.shape[0]) * direction  # (S)
        torch.mul(c.unsqueeze(-1), v, out=dw.view(*c.shape, -1))  # (M, G, S), rounded as it is written
    return dw, None if bias_dtype is None else dy.sum(0).to(bias_dtype)
