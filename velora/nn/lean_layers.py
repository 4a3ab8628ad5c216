"""Layers that keep less for backward than the plain ones, with the same outputs and gradients.

Each is a twin: a subclass of a plain module with the same parameters, state dict and name, made in place by changing the class.

    RMSNorm     plain: x, x̂ and y            here: x and one number per token; y has a recipe
    LayerNorm   x and two numbers             the same; y has a recipe
    GELU, SiLU  x                             the same; y has a recipe
    Dropout     a mask                        the state of the random numbers; y has a recipe
    Linear      its input                     the sources of its input's recipe, which another layer keeps anyway

    N  tokens (all leading dimensions together)      D  features of a token      M  out-features
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from velora.nn.first_order import first_order
from velora.nn.recipe import (
    Making,
    Product,
    forward_may_stop,
    leave_recipe,
    linear,
    linear_gradients,
    recipe_of,
    sources_of,
    stand_in,
)
from velora.nn.split_backward import wanted
from velora.nn.surroundings import autocast_dtype, cast, random_state, random_state_of

NO_SECOND_DERIVATIVE = "a lean layer has no second derivative: call velora.remove_lean(model) where one is needed"
PLAIN_CLASS = "_plain_class"  # attribute of a twin's class: what it was made from
_CHUNK_NUMBERS = 2**16  # on the CPU: what is worked on at a time stays in a core's cache


def plain_class_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it became a lean twin."""
    return vars(type(module)).get(PLAIN_CLASS, type(module))


def is_recorded() -> bool:
    """Whether autograd records a forward here. torch.compile plans itself what it keeps: plain layers are traced."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a forward of these is recorded."""
    return is_recorded() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def in_rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each (N, ...): a few at a time on the CPU, all at once elsewhere."""
    first = tensors[0]
    rows = max(1, _CHUNK_NUMBERS // max(1, first.shape[-1])) if first.device.type == "cpu" else max(1, first.shape[0])
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


class LeanLinear(nn.Linear):
    """nn.Linear that keeps the sources of its input where the input can be made again without a matrix product."""

    def forward(self, input: Tensor) -> Tensor:
        recipe = recipe_of(input) if wants_gradient(self.weight) else None
        if recipe is None:
            return F.linear(input, self.weight, self.bias)
        dtype, early = autocast_dtype(input.device), forward_may_stop()
        y = _Linear.apply(input, self.weight, self.bias, dtype, early, recipe.making, *recipe.sources)
        return Product.apply(y, partial(linear, input, self.weight, self.bias, dtype)) if early else y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype | None,
        early: bool,
        making: Making,
        *sources: Tensor,
    ) -> Tensor:
        making.expect_reader()
        ctx.making, ctx.dtype = making, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(weight, *sources)
        return stand_in(cast(x, dtype), *x.shape[:-1], weight.shape[0]) if early else F.linear(x, weight, bias)

    @staticmethod
    @first_order(NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        weight, *sources = ctx.saved_tensors
        dtypes = (ctx.dtype, weight.dtype, ctx.bias_dtype)
        make = partial(ctx.making.make, *sources)
        return *linear_gradients(wanted(ctx), grad_output, weight.to, make, dtypes), *(
            None for _ in range(len(sources) + 3)
        )


class LeanRMSNorm:
    """Mixin for y = w x / sqrt(mean(x²) + ε) in the form of transformers' LLaMA: x̂ is rounded to x's dtype before w."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not wants_gradient(hidden_states, self.weight):
            return super().forward(hidden_states)  # type: ignore[misc]
        return _lean_rms_norm(hidden_states, self.weight, self.variance_epsilon)


class LeanTorchRMSNorm:
    """Mixin for nn.RMSNorm over the last dimension; its ε may be None, the smallest step of the dtype."""

    def forward(self: Any, input: Tensor) -> Tensor:
        if len(self.normalized_shape) != 1 or self.weight is None or not wants_gradient(input, self.weight):
            return super().forward(input)  # type: ignore[misc]
        return _lean_rms_norm(input, self.weight, torch.finfo(input.dtype).eps if self.eps is None else self.eps)


def _lean_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y, rstd = _RMSNorm.apply(x, weight, eps)
    leave_recipe(y, Making(_rms_norm), x, rstd, weight)
    return y


def _rms_norm(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x * rstd  # (N, D) in float32 at least: rstd is
    return y.mul_(weight) if wide == x.dtype == weight.dtype else weight * y.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps x (N, D) and 1 / sqrt(mean(x²) + ε) (N, 1), in float32 at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, rstd, weight)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        return _rms_norm(x, rstd, weight), rstd

    @staticmethod
    @first_order(NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, grad_output: Tensor | None, _rstd: None) -> Any:
        x, rstd, weight = ctx.saved_tensors
        if grad_output is None:
            return None, None, None
        width = x.shape[-1]
        w = weight.to(rstd.dtype)
        needed = wanted(ctx)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needed[0] else None
        dw = torch.zeros_like(w) if needed[1] else None
        flat = (x.reshape(-1, width), grad_output.reshape(-1, width), rstd.view(-1, 1))
        outs = flat[0] if dx is None else dx.view(-1, width)
        for some_x, dy, r, out in in_rows(*flat, outs):
            x_hat = some_x * r  # (n, D)
            product = dy * x_hat
            if dw is not None:
                dw += product.sum(0)
            if dx is not None:
                mean = (product @ w).div_(width).unsqueeze(-1)  # (n, 1): of w dy x̂
                gradient = torch.addcmul((dy * w), x_hat, mean, value=-1)
                torch.mul(gradient, r, out=out) if out.dtype == gradient.dtype else out.copy_(gradient.mul_(r))
        return dx, None if dw is None else dw.to(weight.dtype), None


class LeanLayerNorm:
    """Mixin for F.layer_norm over the last dimensions, which keeps x and two numbers per token anyway."""

    def forward(self: Any, input: Tensor) -> Tensor:
        y = super().forward(input)  # type: ignore[misc]
        if wants_gradient(y):
            affine = [t for t in (self.weight, self.bias) if t is not None]
            made = partial(_layer_norm, self.normalized_shape, self.eps, y.dtype, self.weight is not None)
            leave_recipe(y, Making(made), input, *affine)
        return y


def _layer_norm(
    shape: tuple[int, ...], eps: float, dtype: torch.dtype, has_weight: bool, x: Tensor, *affine: Tensor
) -> Tensor:
    """`dtype` is the output's: under autocast that of the computation."""
    x, affine = x.to(dtype), tuple(t.to(dtype) for t in affine)
    weight, bias = (*affine, None, None)[:2] if has_weight else (None, *affine, None)[:2]
    return F.layer_norm(x, shape, weight, bias, eps)


class LeanActivation:
    """Mixin for an elementwise function that keeps its input: all that it does more is to leave a recipe on its output."""

    def forward(self: Any, input: Tensor) -> Tensor:
        y = super().forward(input)  # type: ignore[misc]
        if wants_gradient(y):
            leave_recipe(y, Making(partial(_plain_forward, self)), input)
        return y


def _plain_forward(module: Any, x: Tensor) -> Tensor:
    return super(LeanActivation, module).forward(x)  # type: ignore[misc]


class LeanDropout(nn.Dropout):
    """nn.Dropout that keeps the state of the random numbers in place of a mask, and draws the mask again in backward.

    The numbers drawn are those of the plain module. The input's memory must be contiguous for that; else it is the plain one.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return input
        if self.inplace or self.p == 1.0 or not input.is_contiguous() or not is_recorded():
            return F.dropout(input, self.p, True, self.inplace)
        state = random_state(input.device)
        y = _Dropout.apply(
            input, self.p, state
        )  # has no graph where the input has none; a reader may want its recipe all the same
        making, sources = sources_of(input)
        leave_recipe(y, Making(partial(_drop, self.p), making, len(sources)), *sources, state)
        return y


def _drop(p: float, x: Tensor, state: Tensor) -> Tensor:
    with random_state_of(state, x.device):
        return F.dropout(x.contiguous(), p, True)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, state: Tensor) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(state)
        return F.dropout(x, p, True)

    @staticmethod
    @first_order(NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (state,) = ctx.saved_tensors
        return _drop(ctx.p, grad_output, state), None, None
