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

from typing import Any

import torch
from torch import Tensor, nn

from velora.nn.first_order import first_order
from velora.nn.projection import factored_gradient, scaled_direction
from velora.nn.recipe import linear, stand_in
from velora.nn.split_backward import Gradients, wanted, weight_gradients
from velora.nn.surroundings import cast_type
from velora.nn.twin import NO_SECOND_DERIVATIVE, VeloraTwin


class VeloraLinear(VeloraTwin, nn.Linear):
    """nn.Linear that keeps N G numbers for the gradient of its weight in place of N D.

    In eval mode, under no_grad and where the weight is frozen it is the plain layer. `velora.apply_velora` makes it out of
    the nn.Linear layers of a model; `velora.calibrate` sets its direction. The arguments of its own are VeloraTwin's.
    """

    plain_class = nn.Linear
    dense: Any = None  # makes the weight in a dtype, where it is kept in another form (velora/nn/int8.py)
    compute: Any = staticmethod(linear)

    @staticmethod
    def width_of(module: Any) -> int:
        return module.in_features

    def forward(self, input: Tensor) -> Tensor:
        if not self.compresses():
            return self.plain_class.forward(self, input)
        taker = None if torch.compiler.is_compiling() else self.factor_taker
        return self.with_codes(_Linear, self.compute, input, taker, self.dense)


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
        later: Any,
        dtype: torch.dtype | None,
        early: bool,
        taker: Any,
        dense: Any,
    ) -> Tensor:
        ctx.save_for_backward(z, weight, direction)
        ctx.scale, ctx.later, ctx.taker, ctx.dense = scale, later, taker, dense
        ctx.shape = x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        if early:
            return stand_in(x, *x.shape[:-1], weight.shape[0])
        return linear(x, weight if dense is None else dense(cast_type(weight, dtype)), bias, dtype)

    @staticmethod
    @first_order(NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        z, weight, direction = ctx.saved_tensors
        needed = wanted(ctx)
        dy = grad_output.reshape(-1, grad_output.shape[-1])  # (N, M)
        dx = None
        if needed[0]:
            dx = (dy @ (weight.to(dy.dtype) if ctx.dense is None else ctx.dense(dy.dtype))).view(ctx.shape)
        dw, db = weight_gradients(ctx, needed, _gradients, ctx.taker, dy, z, weight, direction)
        return dx, None, dw, db, None, None, None, None, None, None, None


def _gradients(
    taker: Any,
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    direction: Tensor,
    scale: float,
    of_weight: bool,
    bias_dtype: torch.dtype | None,
) -> Gradients:
    """dW (M, D) and db (M); the latter in its dtype, or None. No dW where `taker` accepts dy, z and v in its place."""
    dw = None
    if of_weight and not (taker is not None and taker(dy, z, scaled_direction(z, direction, scale))):
        dw = factored_gradient(dy, z, direction, scale, weight)
    return dw, None if bias_dtype is None else dy.sum(0).to(bias_dtype)
