"""A plain linear layer and its VeLoRA twin, N x D -> N x M, with D = G S: G sub-tokens of S features."""

from __future__ import annotations

import torch
from torch import nn
from twin_helpers import take_values

from velora import VeloraLinear

N, D, M, G, S = 6, 12, 5, 3, 4


def pair(
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    scale: float = 1.0,
    size: int = S,
    features: tuple[int, int] = (D, M),
) -> tuple[nn.Linear, VeloraLinear]:
    """A plain layer and its calibrated twin with the same values."""
    torch.manual_seed(0)
    plain = nn.Linear(*features, bias=bias, dtype=dtype)
    twin = VeloraLinear(*features, bias=bias, dtype=dtype, sub_token_size=size, scale=scale, init="random")
    take_values(twin, plain)
    return plain, twin
