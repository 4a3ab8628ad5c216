"""Tensors that can be made again: what a layer needs of its input is kept as the recipe, not as the tensor.

    y = norm(x)         backward of the norm keeps x
    q = y Wᵀ            backward of the layer needs y: it keeps x too, which is there anyway, and makes y from it once more

A module that makes a tensor cheaply, without a matrix product, leaves a recipe on it (`leave_recipe`). One that would keep the
tensor looks for it (`recipe_of`), keeps the sources in place of the tensor, and in backward makes the tensor again. Sources are
saved like any tensor, so that checkpointing, offloading and a ledger see them; a `Making` itself holds no tensor but what it
has made for the first of several readers (query, key and value), until the last of them has read it.

A recipe holds where it was left: inside the same checkpointed region, and until the tensor is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from velora.nn.surroundings import cast

_ATTRIBUTE = "_velora_recipe"


class Making:
    """The function of a recipe: from its sources to the tensor (or tensors).

    With `source`, the first sources are those of another recipe, which `source` makes the function's first argument from; its
    `num_sources` says how many. What was made is remembered while further readers are expected.
    """

    def __init__(self, function: Callable[..., Any], source: Making | None = None, num_sources: int = 0) -> None:
        self.function, self.source, self.num_sources = function, source, num_sources
        self._readers = 0
        self._made: Any = None

    def expect_reader(self) -> None:
        """Called in forward by each layer that will read in backward."""
        self._readers += 1
        if self._readers == 1 and self.source is not None:
            self.source.expect_reader()

    @torch.no_grad()
    def make(self, *sources: Tensor) -> Any:
        """The tensor again. Of several readers the first one makes it; a second backward starts afresh."""
        made = self._made
        if made is None:
            own = sources
            if self.source is not None:
                inner = self.source.make(*sources[: self.num_sources])
                own = (*(inner if isinstance(inner, tuple) else (inner,)), *sources[self.num_sources :])
            made = self.function(*own)
        self._readers -= 1
        self._made = made if self._readers > 0 else None
        return made


@dataclass(frozen=True)
class Recipe:
    """How to make one tensor again: `making.make(*sources)`."""

    making: Making
    sources: tuple[Tensor, ...]


def leave_recipe(tensor: Tensor, making: Making, *sources: Tensor) -> None:
    """Say on `tensor` how it is made again. `sources` must be tensors that something keeps anyway, or small ones."""
    recipe = Recipe(making, tuple(source.detach() for source in sources))
    setattr(tensor, _ATTRIBUTE, (recipe, tensor._version, saved_tensors_hooks_in_use()))


def recipe_of(tensor: Tensor) -> Recipe | None:
    """The recipe that was left on a tensor, where it still holds; a reader calls `making.expect_reader()`."""
    found = getattr(tensor, _ATTRIBUTE, None)
    if found is None:
        return None
    recipe, version, hooks = found
    if version == tensor._version and hooks is saved_tensors_hooks_in_use():
        return recipe
    forget_recipe(tensor)
    return None


def forget_recipe(tensor: Any) -> None:
    """A recipe keeps its sources alive as long as the tensor lives; one that holds no more must go from a tensor that stays."""
    if isinstance(tensor, Tensor):
        vars(tensor).pop(_ATTRIBUTE, None)


def sources_of(tensor: Tensor) -> tuple[Making | None, tuple[Tensor, ...]]:
    """The sources to keep in place of a tensor, and what makes it from them; the tensor itself and None without a recipe."""
    recipe = recipe_of(tensor)
    return (None, (tensor.detach(),)) if recipe is None else (recipe.making, recipe.sources)


def saved_tensors_hooks_in_use() -> Any:
    """The innermost hook that receives what is saved now: one object for each checkpointed region and each of its forwards."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]


def forward_is_repeated() -> bool:
    """Whether this is the first forward of a checkpointed region: what it saves is thrown away, a second forward saves it again."""
    return _hook_of_checkpoint().startswith("_checkpoint_hook.")


def forward_may_stop() -> bool:
    """Whether a forward of a checkpointed region runs, whose second one stops where the last tensor is saved."""
    return _hook_of_checkpoint() != ""


def _hook_of_checkpoint() -> str:
    hook = saved_tensors_hooks_in_use()
    return hook.__qualname__ if getattr(hook, "__module__", "") == "torch.utils.checkpoint" else ""


class Product(torch.autograd.Function):
    """The layer's output, as `compute` gives it, by a node that saves nothing, after the node of `kept`, which has saved all that
    the gradients need.

    An autograd function saves when its forward has ended. Where the second forward of a checkpointed region stops at the last
    tensor that is saved, that must not be after a product which nobody needs. `kept` stands for the result, without memory.
    """

    @staticmethod
    def forward(ctx: Any, kept: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        return compute()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0], None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """x Wᵀ + b, computed in `dtype`."""
    return F.linear(cast(x, dtype), cast(weight, dtype), None if bias is None else cast(bias, dtype))


def linear_gradients(
    needed: tuple[bool, ...],
    grad_output: Tensor,
    dense: Callable[[torch.dtype], Tensor],
    make: Callable[[], Tensor],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of x (..., D), W (M, D) and b (M) in y = x Wᵀ + b, as far as they are needed and in their `dtypes`.

    `dense` makes the weight in a dtype, `make` the input, each where its product asks for it.
    """
    dx = dw = db = None
    dy = grad_output.reshape(-1, grad_output.shape[-1])  # (N, M)
    if needed[0]:
        dx = (dy @ dense(dy.dtype)).view(*grad_output.shape[:-1], -1).to(dtypes[0])
    if needed[1]:
        x = make()
        dw = (dy.T @ x.reshape(-1, x.shape[-1]).to(dy.dtype)).to(dtypes[1])
    if needed[2]:
        db = dy.sum(0).to(dtypes[2])
    return dx, dw, db


def stand_in(x: Tensor, *shape: int) -> Tensor:
    """A tensor of this shape without memory, of the type and on the device of x, in place of a layer's output."""
    return x.new_empty(()).expand(shape)
