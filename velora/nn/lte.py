"""LTE: a linear layer that trains through parallel low-rank heads, whose mean is merged into it again and again (arXiv 2402.16828).

    y_h = f(x_h) + s (B_h A_h - B'_h A'_h) x_h        in training, for head h and its slice x_h of the batch;  f(x) = x Wᵀ + b
    W <- W + (s / H) sum_h (B_h A_h - B'_h A'_h)      at a merge, after which A'_h, B'_h <- A_h, B_h
    y = f(x) + (s / H) sum_h (B_h A_h - B'_h A'_h) x  in eval mode: what a merge at that moment would give

B_h starts at zero, and so do the B'_h: training starts at the network as it was. After a merge every head starts from the new W
and goes on with its A_h and B_h as they are ("reset-less", the published default): what W has of it already is A'_h, B'_h. With
`reset` the head starts again instead, A_h drawn anew and B_h zero, and there is no A', B'.

**A slice** is the h-th part of every micro-batch in each process: examples h B / H to (h + 1) B / H of its B. The loss is the mean
over the step as for any method, so head h gets the part of the gradient that comes from its slices of all micro-batches of
all processes. Processes share the heads (DDP adds up their gradients). A last micro-batch of an epoch that H does not divide is
filled up with zeros, which give no gradient: its last heads see less.

    H  heads      N  tokens (all leading dimensions of x together), n = N / H of a slice
    D  in-features      M  out-features      R  rank of a head      s = alpha / R
    A (H, R, D), B (H, M, R), as stacks of the heads' matrices
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from velora.nn.heads import HeadsLinear, draw_orthogonal, products
from velora.nn.surroundings import autocast_as
from velora.nn.swap import unwrapped


class LTELinear(nn.Module):
    """A frozen dense linear layer with its heads; has the name and the place of the layer.

    `down` holds A, `up` is B, `merged_down` and `merged_up` are A' and B' (None with `reset`). All are float32 and a
    half-precision input is cast, unless autocast decides the dtype. W keeps its dtype: each merge is summed in float32 and
    rounded once.
    """

    velora_children: ClassVar[tuple[str, ...]] = ("down",)
    moving_state: ClassVar[tuple[str, ...]] = ("base.weight", "merged_down", "merged_up")
    merged_down: Tensor | None
    merged_up: Tensor | None

    def __init__(self, base: nn.Linear, *, num_heads: int, rank: int, alpha: float, reset: bool) -> None:
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        options: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.down = HeadsLinear(num_heads, base.in_features, rank, **options)
        self.up = nn.Parameter(torch.zeros(num_heads, base.out_features, rank, **options))
        self.register_buffer("merged_down", None if reset else self.down.weight.detach().clone())
        self.register_buffer("merged_up", None if reset else torch.zeros_like(self.up, requires_grad=False))

    @property
    def weight(self) -> Any:
        """The frozen layer's, for a network that looks at it (Mamba's)."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.linear(x, self.merged_weight(), self.base.bias)
        y = self.base(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.up.dtype)
        if missing := -len(x) % len(self.up):
            x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, missing))
        update = self._of_heads(x).reshape(len(x), *y.shape[1:])[: len(y)]
        return (y + update).to(y.dtype)

    def _of_heads(self, x: Tensor) -> Tensor:
        """What each head adds to its slice of x (N, D): (H, n, M)."""
        update = torch.bmm(self.down(x) * self.scale, self.up.mT)  # (H, n, R) -> (H, n, M)
        if self.merged_down is None or self.merged_up is None:
            return update
        return update - torch.bmm(products(x, self.merged_down, None, None) * self.scale, self.merged_up.mT)

    def unmerged(self) -> Tensor:
        """(s / H) sum_h (B_h A_h - B'_h A'_h), of shape (M, D)."""
        with autocast_as(None, self.up.device):
            sum_of_heads = _sum_of_products(self.up, self.down.weight)
            if self.merged_down is not None and self.merged_up is not None:
                sum_of_heads = sum_of_heads - _sum_of_products(self.merged_up, self.merged_down)
            return sum_of_heads * (self.scale / len(self.up))

    def merged_weight(self) -> Tensor:
        """W as a merge would leave it, of shape (M, D)."""
        return (self.base.weight + self.unmerged()).to(self.base.weight.dtype)

    @torch.no_grad()
    def merge(self, generator: torch.Generator) -> None:
        """Merge; with `reset`, A is drawn from the generator, on the CPU."""
        self.base.weight.copy_(self.merged_weight())
        if self.merged_down is not None and self.merged_up is not None:
            self.merged_down.copy_(self.down.weight)
            self.merged_up.copy_(self.up)
            return
        drawn = torch.empty(self.down.weight.shape, dtype=torch.float32, device="cpu")
        draw_orthogonal(drawn, generator)
        self.down.weight.copy_(drawn)
        self.up.zero_()

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The layer alone, merged; the wrapped layer itself is changed."""
        self.base.weight.copy_(self.merged_weight())
        return self.base

    def plain(self) -> nn.Linear:
        """The merged layer as another one; this one stays as it is. The bias is shared."""
        layer = nn.Linear(self.base.in_features, self.base.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(self.merged_weight().detach(), requires_grad=False)
        layer.bias = self.base.bias
        return layer

    def extra_repr(self) -> str:
        return f"scale={self.scale}, reset={self.merged_up is None}"


def _sum_of_products(up: Tensor, down: Tensor) -> Tensor:
    """sum_h B_h A_h, of shape (M, D): one product, of the heads' matrices side by side and one below the other."""
    return up.transpose(0, 1).flatten(1) @ down.flatten(0, 1)  # (M, H R) (H R, D)


def lte_layers(model: nn.Module) -> list[LTELinear]:
    """In the model's order, which is the same on all ranks."""
    return [module for module in model.modules() if isinstance(module, LTELinear)]


def merge_heads(model: nn.Module, seed: str = "0") -> list[nn.Parameter]:
    """Merge every LTE layer; call it after every T-th optimiser step, on all ranks. Returns the parameters that start again.

    There are such with `reset` only: matrices A are then drawn from `seed`, another one at each merge, so that all ranks draw the
    same ones and a run that continues draws what it would have drawn. An optimiser should forget its moments of them:

        for parameter in merge_heads(model, seed=f"{seed}/{step}"):
            optimizer.state.pop(parameter, None)
    """
    again: list[nn.Parameter] = []
    for number, layer in enumerate(lte_layers(model)):
        layer.merge(torch.Generator().manual_seed(zlib.crc32(f"{seed}/{number}".encode())))
        if layer.merged_up is None:
            again += [layer.down.weight, layer.up]
    return again


@contextmanager
def as_plain(model: nn.Module) -> Iterator[nn.Module]:
    """The network with merged plain layers in the place of the LTE layers, to be saved; afterwards it is as before."""
    with unwrapped(model) as network:
        layers = {name: module for name, module in network.named_modules() if isinstance(module, LTELinear)}
        for name, layer in layers.items():
            network.set_submodule(name, layer.plain())
        try:
            yield network
        finally:
            for name, layer in layers.items():
                network.set_submodule(name, layer)
