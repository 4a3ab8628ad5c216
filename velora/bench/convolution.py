"""How long a 3 x 3 convolution takes, forward and backward, with VeLoRA and without, and what each keeps in between.

N  images      C  in-channels      P  height and width      M  out-channels      G  groups: sub-tokens of a pixel
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from velora.bench.machine import Step
from velora.bench.operator import print_row, timed

if TYPE_CHECKING:
    import torch
    from torch import nn

Sizes = tuple[int, int, int, int, int]

CONVOLUTIONS: dict[Sizes, str] = {(8, 256, 14, 256, 16): "ResNet's third stage, images of 224 x 224"}


def convolutions(
    sizes: Sequence[Sizes], device: torch.device, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    """Time nn.Conv2d and VeloraConv2d at every size, print a table, and return its rows.

    `saved_bytes`: what each keeps for the backward pass of one layer whose input nobody else keeps.
    """
    import torch

    rows: list[dict[str, Any]] = []
    for each in sizes:
        torch.manual_seed(0)
        candidates, saved = _candidates(each, device, dtype)
        shape = dict(zip("NCPMG", each, strict=True))
        rows.append({"shape": shape, **timed(candidates, repeats, device, "VeloraConv2d"), "saved_bytes": saved})
        print_row(rows[-1], "N, C, P, M, G", first=len(rows) == 1)
        print("  ".join(f"{name} keeps {num:,} bytes" for name, num in saved.items()), flush=True)
    return rows


def _candidates(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Step], dict[str, int]]:
    """Candidate -> one forward and backward, gradients of input and weight from scratch; and the bytes that it keeps."""
    import torch
    from torch import nn

    from velora.memory.ledger import measure_saved_bytes
    from velora.nn.conv import VeloraConv2d

    n, c, p, m, g = sizes
    options: dict[str, Any] = {"kernel_size": 3, "padding": 1, "bias": False, "device": device, "dtype": dtype}
    x = torch.randn(n, c, p, p, device=device, dtype=dtype).requires_grad_()
    dy = torch.randn(n, m, p, p, device=device, dtype=dtype)
    plain = nn.Conv2d(c, m, **options)
    twin = VeloraConv2d(c, m, **options, num_groups=g, init="random")
    twin.weight = plain.weight

    def step_of(layer: nn.Module) -> Step:
        def step() -> None:
            x.grad = plain.weight.grad = None
            layer(x).backward(dy)

        return step

    layers: dict[str, nn.Module] = {"nn.Conv2d": plain, "VeloraConv2d": twin}
    saved = {name: measure_saved_bytes(partial(_sum_of, layer, x)) for name, layer in layers.items()}
    return {name: step_of(layer) for name, layer in layers.items()}, saved


def _sum_of(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x * 1).sum()
