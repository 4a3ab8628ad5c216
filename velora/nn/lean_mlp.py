"""The MLP of a block with less kept: its activation keeps what it reads, and the layer after it a recipe.

gated       h = act(x W_gᵀ) ∘ (x W_uᵀ)     plain: x, gate, act(gate), up and h      here: gate and up
plain       h = act(x W_1ᵀ)                x, a and h                               a
again       either, with the products before the activation computed once more in backward: nothing but x's recipe is kept

N  tokens (all leading dimensions together)      F  features between the two layers
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from velora.nn.first_order import first_order
from velora.nn.lean_layers import NO_SECOND_DERIVATIVE, in_rows, is_recorded, plain_class_of
from velora.nn.recipe import Making, leave_recipe, sources_of
from velora.nn.surroundings import autocast_as, autocast_dtype, random_state, random_state_of

_gelu_backward = torch.ops.aten.gelu_backward


@dataclass(frozen=True)
class Activation:
    """An elementwise function and its gradient: `backward(dy, x)` -> dx."""

    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


SILU = Activation(F.silu, torch.ops.aten.silu_backward)
GELU = Activation(F.gelu, _gelu_backward)
GELU_TANH = Activation(partial(F.gelu, approximate="tanh"), partial(_gelu_backward, approximate="tanh"))


def activation_of(module: nn.Module) -> Activation | None:
    """What a module computes, where it is one of the three; told by its class, and by what that class was made with."""
    from timm.layers import activations as timm_activations
    from transformers import activations

    cls = plain_class_of(module)
    if cls in (nn.SiLU, activations.SiLUActivation):
        return SILU
    if cls is nn.GELU:
        return GELU_TANH if module.approximate == "tanh" else GELU  # type: ignore[union-attr]
    if cls is activations.GELUActivation:
        return GELU if module.act is F.gelu else None  # type: ignore[union-attr]
    known = {
        timm_activations.GELU: GELU,
        timm_activations.GELUTanh: GELU_TANH,
        getattr(activations, "GELUTanh", None): GELU_TANH,
    }
    return known.get(cls)


class LeanMLP:
    """Mixin for a module whose forward is `last(activation(first layers))`. Class attributes name the parts."""

    first: ClassVar[tuple[str, ...]]  # one layer, or the one that the activation reads and the one that it gates
    activation: ClassVar[str]
    rest: ClassVar[tuple[str, ...]]  # modules that are called one after the other
    again: ClassVar[bool]  # whether the first layers are computed again in backward

    def forward(self: Any, x: Tensor) -> Tensor:
        layers = [getattr(self, name) for name in self.first]
        activation = activation_of(getattr(self, self.activation))
        if activation is None or not is_recorded():
            return super().forward(x)  # type: ignore[misc]
        h = _activated(activation, layers, x, self.again)
        for name in self.rest:
            h = getattr(self, name)(h)
        return h


def _activated(activation: Activation, layers: Sequence[nn.Module], x: Tensor, again: bool) -> Tensor:
    """h (..., F), with its recipe: of what the layers have made, or of what they are computed from again."""
    making, sources = _computed_again(layers, x) if again else (None, ())
    before = tuple(layer(x) for layer in layers)
    if not any(tensor.requires_grad for tensor in before):
        return _activate(activation, *before)
    h = _Activated.apply(activation, making, len(before), *before, *sources)
    kept = sources if again else before
    leave_recipe(h, Making(partial(_activate, activation), making, len(kept)), *kept)
    return h


def _computed_again(layers: Sequence[nn.Module], x: Tensor) -> tuple[Making, tuple[Tensor, ...]]:
    """What makes the layers' outputs again, and from which sources; called before they draw random numbers."""
    making, sources = sources_of(x)
    draws = any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for layer in layers for m in layer.modules())
    state = (random_state(x.device),) if draws else ()
    call = partial(_call, tuple(layers), autocast_dtype(x.device))
    return Making(call, making, len(sources)), (*sources, *state)


def _call(layers: Sequence[nn.Module], dtype: torch.dtype | None, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    with autocast_as(dtype, x.device):
        if not state:
            return tuple(layer(x) for layer in layers)
        with random_state_of(state[0], x.device):
            return tuple(layer(x) for layer in layers)


def _activate(activation: Activation, a: Tensor, up: Tensor | None = None) -> Tensor:
    h = activation.function(a)
    if up is None:
        return h
    return h.mul_(up) if h.dtype == up.dtype else h * up


class _Activated(torch.autograd.Function):
    """h = act(a) or act(a) ∘ up. Keeps a and up, or the sources from which `making` makes them."""

    @staticmethod
    def forward(ctx: Any, activation: Activation, making: Making | None, num: int, *tensors: Tensor) -> Tensor:
        before, sources = tensors[:num], tensors[num:]
        ctx.activation, ctx.making, ctx.num = activation, making, num
        if making is not None:
            making.expect_reader()
        ctx.save_for_backward(*(before if making is None else sources))
        return _activate(activation, *before)

    @staticmethod
    @first_order(NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, dh: Tensor) -> Any:
        saved = ctx.saved_tensors
        before = saved if ctx.making is None else ctx.making.make(*saved)
        gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in before]
        width = dh.shape[-1]
        flat = [t.reshape(-1, width) for t in (dh, *before, *gradients)]
        for dy, *rest in in_rows(*flat):
            if ctx.num == 1:
                a, da = rest
                da.copy_(ctx.activation.backward(dy, a))
            else:
                a, up, da, dup = rest
                torch.mul(dy, ctx.activation.function(a), out=dup)
                da.copy_(ctx.activation.backward(dy * up, a))
        nothing = 0 if ctx.making is None else len(saved)
        return None, None, None, *gradients, *(None for _ in range(nothing))
