"""Backward functions that belong to no differentiable formula: a second derivative is refused with the reason, never wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def refuse_second_derivative(gradients: Sequence[Tensor | None], reason: str) -> tuple[Tensor | None, ...]:
    """Gradients as they leave backward: under create_graph=True, tied to a node that refuses with `reason`."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tuple(gradients)
    return tuple(
        _Refusal.apply(g.detach(), g.new_zeros(()).requires_grad_(), reason) if isinstance(g, Tensor) else g
        for g in gradients
    )


def first_order(reason: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of an autograd function's backward that is computed without a graph; under its staticmethod."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *grad_outputs: Any) -> Any:
            with torch.no_grad():
                gradients = backward(ctx, *grad_outputs)
            return refuse_second_derivative(gradients, reason)

        return run

    return decorate


class _Refusal(torch.autograd.Function):
    """Identity on a gradient that refuses to be differentiated; `tie` puts it into the graph."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, tie: Tensor, reason: str) -> Tensor:
        ctx.reason = reason
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise RuntimeError(ctx.reason)
