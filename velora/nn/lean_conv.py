"""Lean twins of a convolutional network's layers: batch norm, ReLU, max pooling and convolution.

    conv -> batch norm -> ReLU -> conv        plain: the norm keeps x, ReLU and the second convolution y = max(norm(x), 0)
                                              here: x alone; y is made from it once more, with its mean and variance

    BatchNorm     plain: x                    here: x; y has a recipe
    ReLU          y                           the sources of its input's recipe; without one y, or with VeLoRA a bit a number
    MaxPool2d     x and indices               the indices
    Conv          its input                   the sources of its input's recipe

A ReLU behind the sum of a residual block has no recipe to read. What it keeps is y, which the next exact convolution keeps anyway;
behind it a VeLoRA convolution keeps codes in its place, so that the signs alone are kept where the network has one.

    N  images      C  channels      P  pixels, one to three sizes
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from velora.nn.conv import Geometry, geometry_of
from velora.nn.first_order import first_order
from velora.nn.lean_layers import NO_SECOND_DERIVATIVE, wants_gradient
from velora.nn.recipe import Making, Product, forward_may_stop, leave_recipe, recipe_of, stand_in
from velora.nn.split_backward import wanted
from velora.nn.surroundings import autocast_dtype, cast

_BITS = 8


class LeanBatchNorm:
    """Mixin for nn.BatchNorm1d, 2d and 3d, which keep x and two numbers per channel anyway; a recipe computes these again."""

    def forward(self: Any, input: Tensor) -> Tensor:
        y = super().forward(input)  # type: ignore[misc]
        if wants_gradient(y):
            own = self.training or self.running_mean is None
            statistics = [] if own else [self.running_mean, self.running_var]
            affine = [] if self.weight is None else [self.weight, self.bias]
            leave_recipe(y, Making(partial(_batch_norm, self.eps, y.dtype, own)), input, *statistics, *affine)
        return y


def _batch_norm(eps: float, dtype: torch.dtype, own: bool, x: Tensor, *others: Tensor) -> Tensor:
    """`own`: with the mean and variance of x."""
    mean, variance = (None, None) if own else others[:2]
    weight, bias = others[0 if own else 2 :] or (None, None)
    return F.batch_norm(x.to(dtype), mean, variance, weight, bias, own, 0.0, eps)


class LeanReLU(nn.ReLU):
    """nn.ReLU, never in place, whose backward makes its input again or reads the signs of its output."""

    keeps_signs: ClassVar[bool] = False

    def forward(self, input: Tensor) -> Tensor:
        if not wants_gradient(input):
            return F.relu(input, self.inplace)
        recipe = recipe_of(input)
        if recipe is None:
            return _ReLUOfSigns.apply(input) if self.keeps_signs else F.relu(input)
        y = _ReLU.apply(input, recipe.making, *recipe.sources)
        leave_recipe(y, Making(F.relu, recipe.making, len(recipe.sources)), *recipe.sources)
        return y


class LeanReLUOfSigns(LeanReLU):
    """The same in a network with VeLoRA convolutions."""

    keeps_signs = True


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, making: Making, *sources: Tensor) -> Tensor:
        making.expect_reader()
        ctx.making = making
        ctx.save_for_backward(*sources)
        return F.relu(x)

    @staticmethod
    @first_order(NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, dy: Tensor) -> Any:
        sources = ctx.saved_tensors
        dx = torch.ops.aten.threshold_backward(dy, ctx.making.make(*sources), 0)
        return dx, None, *(None for _ in sources)


class _ReLUOfSigns(torch.autograd.Function):
    """Keeps one bit for each number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.relu(x)
        ctx.save_for_backward(_packed(y > 0))
        return y

    @staticmethod
    @first_order(NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, dy: Tensor) -> Any:
        (bits,) = ctx.saved_tensors
        return (dy * _unpacked(bits, dy.shape),)


def _packed(flags: Tensor) -> Tensor:
    """Eight flags in each of ceil(n / 8) bytes, in the order of the flags' indices."""
    ones = F.pad(flags.flatten().view(torch.uint8), (0, -flags.numel() % _BITS)).view(-1, _BITS)
    result = ones[:, 0].clone()
    for place in range(1, _BITS):
        result |= ones[:, place] << place
    return result


def _unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    places = torch.arange(_BITS, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(1) >> places & 1).flatten()[: math.prod(shape)].view(shape).bool()


class LeanMaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d that keeps the places of the maxima without the input in which they are."""

    def forward(self, input: Tensor) -> Any:
        if self.return_indices or not wants_gradient(input):
            return super().forward(input)
        stride = self.kernel_size if self.stride is None else self.stride
        return _MaxPool2d.apply(input, self.kernel_size, stride, self.padding, self.dilation, self.ceil_mode)


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *options: Any) -> Tensor:
        y, indices = F.max_pool2d_with_indices(x, *options)
        ctx.save_for_backward(indices)
        ctx.options, ctx.shape = options, x.shape
        return y

    @staticmethod
    @first_order(NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, dy: Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        sizes = [[n, n] if isinstance(n, int) else list(n) for n in ctx.options[:4]]
        shape_only = stand_in(dy, *ctx.shape)
        dx = torch.ops.aten.max_pool2d_with_indices_backward(dy, shape_only, *sizes, ctx.options[4], indices)
        return dx, None, None, None, None, None


class LeanConv:
    """Mixin for nn.Conv1d, 2d and 3d that keeps the sources of its input where that can be made again."""

    def forward(self: Any, input: Tensor) -> Tensor:
        geometry = geometry_of(self)
        recipe = recipe_of(input) if wants_gradient(self.weight) else None
        if recipe is None or geometry.pad or input.dim() != self.weight.dim():
            return super().forward(input)  # type: ignore[misc]
        dtype, early = autocast_dtype(input.device), forward_may_stop()
        y = _Conv.apply(input, self.weight, self.bias, dtype, early, geometry, recipe.making, *recipe.sources)
        compute = partial(geometry.convolve, cast(input, dtype), self.weight, self.bias, dtype)
        return Product.apply(y, compute) if early else y


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype | None,
        early: bool,
        geometry: Geometry,
        making: Making,
        *sources: Tensor,
    ) -> Tensor:
        making.expect_reader()
        ctx.making, ctx.geometry, ctx.dtype, ctx.shape = making, geometry, x.dtype, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(weight, *sources)
        if early:
            return stand_in(cast(x, dtype), x.shape[0], weight.shape[0], *geometry.output_sizes(x, weight))
        return geometry.convolve(cast(x, dtype), weight, bias, dtype)

    @staticmethod
    @first_order(NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, dy: Tensor) -> Any:
        weight, *sources = ctx.saved_tensors
        needed = wanted(ctx)
        of_x, of_weight, of_bias = needed[0], needed[1], needed[2] and ctx.bias_dtype is not None
        # the gradient of the input does not look into it, nor that of the bias
        x = ctx.making.make(*sources).to(dy.dtype) if of_weight else stand_in(dy, *ctx.shape)
        dx, dw, db = ctx.geometry.gradients(dy, x, weight.to(dy.dtype), (of_x, of_weight, of_bias))
        return (
            dx.to(ctx.dtype) if of_x else None,
            dw.to(weight.dtype) if of_weight else None,
            db.to(ctx.bias_dtype) if of_bias else None,
            *(None for _ in range(len(sources) + 4)),
        )
