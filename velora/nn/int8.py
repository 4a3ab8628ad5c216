"""Linear layers whose trained weight is kept in eight bits, and never in full between two steps (Q-GaLore, arXiv 2407.08296).

Legend: N tokens, D in-features, M out-features.

    forward, backward   W = (codes - zero) scale, made where a product needs it, and gone after it
    gradient            of W, M x D, in `weight.grad`, as of any layer
    step                W (fp32) made once more, moved, and rounded by chance back to codes (`write`), by optimizer=q_galore alone

The groups, scales and zero points are those of `velora/nn/grouped.py`, found anew at each `write`, as published (there in the
gradient's dtype; bfloat16 alone can be off by half a quantum at a group's ends, so here it is fp32). Rounding by chance
keeps in the mean what a step moves the weight by, where rounding to the nearest would lose all steps below half a quantum.

A tensor of whole numbers cannot require a gradient. The parameter `weight` is therefore a stand-in: one NaN, seen M x D times. It
says shape, dtype and device, collects the gradient and takes no memory; whatever would read it as a weight gets NaN, and
whatever would write into it an error of torch. The state dict has the codes, scales and zero points in its place.

In `velora.apply_velora` such a layer becomes VeloraInt8Linear.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from velora.nn.first_order import first_order
from velora.nn.grouped import GROUP_SIZE, Grouped, dequantise, quantise
from velora.nn.linear import VeloraLinear
from velora.nn.recipe import Product, forward_may_stop, linear, linear_gradients, sources_of, stand_in
from velora.nn.split_backward import wanted
from velora.nn.surroundings import autocast_dtype, cast_type

NO_SECOND_DERIVATIVE = "a layer with int8 weights computes its gradients without a graph; use weights=dense"
CHUNK = GROUP_SIZE * 2**13  # numbers that `write` rounds at a time: its temporaries take a few times 8 MiB


class Int8Linear(nn.Linear):
    """nn.Linear with M D bytes of codes and 5 bytes for each 256 of them in place of its weight. Shares the bias of `linear`.

    `dtype` is that of the weight which the products see and of its gradient.
    """

    weight_codes: Tensor  # uint8, M x D
    weight_scale: Tensor  # fp32, one a group, whatever the layer is cast to
    weight_zero: Tensor  # uint8, one a group

    def __init__(self, linear: nn.Linear, dtype: torch.dtype | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        dense = linear.weight.detach()
        nothing = dense.new_full((), torch.nan, dtype=dtype)
        self.weight = nn.Parameter(nothing.expand(dense.shape), requires_grad=linear.weight.requires_grad)
        self.bias = linear.bias
        codes, scale, zero = quantise(dense, 8)
        self.register_buffer("weight_codes", codes.view(dense.shape))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", zero)
        self.state_is_dense = False
        self.register_state_dict_post_hook(_state)
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        dtype = autocast_dtype(input.device)
        if not torch.is_grad_enabled():
            return self.compute(input, self.weight, self.bias, dtype)
        making, sources = sources_of(input) if self.weight.requires_grad else (None, ())
        early = forward_may_stop()
        y = _Int8Linear.apply(input, self.weight, self.bias, self, dtype, early, making, *sources)
        return Product.apply(y, partial(self.compute, input, self.weight, self.bias, dtype)) if early else y

    def compute(self, x: Tensor, _weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        """x Wᵀ + b."""
        return linear(x, self.dense(cast_type(self.weight, dtype)), bias, dtype)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (M x D) in a dtype, the layer's if None."""
        grouped = Grouped(self.weight_codes.view(-1), self.weight_scale, self.weight_zero)
        return dequantise(grouped, 8, self.weight.shape, dtype or self.weight.dtype)

    def code_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is kept of W: codes, scales and zero points."""
        return self.weight_codes, self.weight_scale, self.weight_zero

    @torch.no_grad()
    def write(self, weight: Tensor, generator: torch.Generator) -> None:
        """Keep `weight` (M x D), rounded by chance."""
        flat, codes = weight.reshape(-1), self.weight_codes.view(-1)
        for start in range(0, len(flat), CHUNK):
            part = flat[start : start + CHUNK]
            rounded = quantise(part, 8, torch.empty_like(part).uniform_(generator=generator))
            codes[start : start + CHUNK] = rounded.codes
            groups = slice(start // GROUP_SIZE, start // GROUP_SIZE + len(rounded.scale))
            self.weight_scale[groups], self.weight_zero[groups] = rounded.scale, rounded.zero

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Where the layer goes (.to, .half, .cuda, ...), the stand-in goes without memory, and scales stay what they are."""
        scale = self.weight_scale
        super()._apply(lambda t: fn(t[0, 0]).expand(t.shape) if t is self.weight else fn(t), recurse)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Linear:
        """A copy whose stand-in takes no memory either."""
        if id(self.weight) not in memo:
            nothing = self.weight.detach()[0, 0].clone().expand(self.weight.shape)
            memo[id(self.weight)] = nn.Parameter(nothing, requires_grad=self.weight.requires_grad)
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        if f"{prefix}weight" in missing_keys:
            missing_keys.remove(f"{prefix}weight")


def int8_layers(model: nn.Module) -> dict[Tensor, Int8Linear]:
    """The layers of a network whose weights are kept in eight bits, by the parameter that stands for each."""
    return {layer.weight: layer for layer in model.modules() if isinstance(layer, Int8Linear)}


@contextmanager
def dense_states(model: nn.Module) -> Iterator[None]:
    """While entered, state dicts have the weights that the codes stand for, under the names of plain layers."""
    layers = int8_layers(model).values()
    for layer in layers:
        layer.state_is_dense = True
    try:
        yield
    finally:
        for layer in layers:
            layer.state_is_dense = False


def _state(layer: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """The codes without the stand-in, or the weight without the codes."""
    if not layer.state_is_dense:
        del state[f"{prefix}weight"]
        return
    state[f"{prefix}weight"] = layer.dense()
    for name in ("codes", "scale", "zero"):
        del state[f"{prefix}weight_{name}"]


class _Int8Linear(torch.autograd.Function):
    """Keeps the input, or what it is made from again (velora/nn/recipe.py), and W in no form but its codes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        layer: Int8Linear,
        dtype: torch.dtype | None,
        early: bool,
        making: Any,
        *sources: Tensor,
    ) -> Tensor:
        if making is not None:
            making.expect_reader()
        ctx.save_for_backward(*sources)
        ctx.layer, ctx.making, ctx.dtype = layer, making, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return stand_in(x, *x.shape[:-1], weight.shape[0]) if early else layer.compute(x, weight, bias, dtype)

    @staticmethod
    @first_order(NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        sources = ctx.saved_tensors
        dtypes = (ctx.dtype, ctx.layer.weight.dtype, ctx.bias_dtype)

        def make() -> Tensor:
            return sources[0] if ctx.making is None else ctx.making.make(*sources)

        return *linear_gradients(wanted(ctx), grad_output, ctx.layer.dense, make, dtypes), *(
            None for _ in range(len(sources) + 4)
        )


class VeloraInt8Linear(VeloraLinear, Int8Linear):
    """Int8Linear that keeps N G numbers for the gradient of its weight in place of N D, see velora/nn/linear.py."""

    plain_class = Int8Linear
    dense = Int8Linear.dense
    compute = Int8Linear.compute
