"""Tensors that can be made again: what a layer needs of its input is kept as the recipe, not as the tensor.

    y = norm(x)         backward of the norm keeps x
    q = y Wᵀ            backward of the layer needs y: it keeps x too, which is there anyway, and makes y from it once more

A module that makes a tensor cheaply, without a matrix product, leaves a recipe on it (`leave_recipe`); one that would keep the tensor
looks for it (`recipe_of`), keeps the recipe's sources in place of the tensor, and in backward makes the tensor again. Sources are
saved like any tensor, so that checkpointing, offloading and a ledger see them; a `Making` itself holds no tensor but what it
has made for the first of several readers (query, key and value), until the last of them has read it.

A recipe holds where it was left: inside the same checkpointed region, and until the tensor is changed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    return recipe if version == tensor._version and hooks is saved_tensors_hooks_in_use() else None


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
    hook = saved_tensors_hooks_in_use()
    return getattr(hook, "__qualname__", "").startswith("_checkpoint_hook.") and hook.__module__ == "torch.utils.checkpoint"


# What a forward depends on besides its arguments


def random_state(device: torch.device) -> Tensor:
    """The state of the device's generator: 16 bytes on CUDA, 5 kB on the CPU."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def random_state_of(state: Tensor, device: torch.device) -> Any:
    """Draw as at the moment of `state` while entered."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in on a device; None where it is off."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def autocast_as(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast as it was in forward, for something that is computed again."""
    if dtype is None and autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
