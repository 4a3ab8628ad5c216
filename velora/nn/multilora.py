"""MultiLoRA: several low-rank branches beside a frozen linear layer, each with a learned scale (arXiv 2311.11501).

    y = f(x) + sum_i c_i ⊙ (B_i A_i x)        f(x) = x Wᵀ + b

A_i and B_i start Kaiming-uniform and c_i at zero, so that training starts at the frozen network and no branch starts
with a product of zero rank. All branches read one x: their A_i, one below the other, are one linear layer, so VeLoRA keeps
one code for all of them. Their B_i, each row scaled, are side by side one matrix too,

    U = [c_1 B_1, ..., c_n B_n]        sum_i c_i ⊙ (B_i A_i x) = U (A x)

which makes the gradients of all B_i and c_i from that of U; no branch's output of M features is ever kept.
After training W' = W + U A.

Shapes: N tokens, D in-features, M out-features, n branches, R rank of each; A (nR x D), B_i (M x R), c_i (M), U (M x nR).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from velora.nn.quantised import dense_linear, is_quantised


class MultiLoRALinear(nn.Module):
    """A frozen linear layer (also in four bits) with its branches; has the name and the place of the layer.

    `down` is A; `up` and `scale` have one B_i and one c_i for each branch, as parameters of their own, since optimisers tell
    matrices from vectors. All are float32; a half-precision input is cast, unless autocast decides the dtype. Dropout acts
    on x, once for all branches.
    """

    velora_children: ClassVar[tuple[str, ...]] = ("down",)

    def __init__(self, base: nn.Linear, *, num_branches: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.base = base
        options: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(base.in_features, num_branches * rank, bias=False, **options)
        self.up = nn.ParameterList(torch.empty(base.out_features, rank, **options) for _ in range(num_branches))
        self.scale = nn.ParameterList(torch.zeros(base.out_features, **options) for _ in range(num_branches))
        for matrix in (self.down.weight, *self.up):  # the bounds of nn.Linear and of LoRA's A: 1 / sqrt(columns)
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    @property
    def weight(self) -> Any:
        """The frozen layer's, for a network that looks at it (Mamba's)."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.down.weight.dtype)
        return (y + linear(self.down(self.dropout(x)), self.scaled_up())).to(y.dtype)  # (N, D) -> (N, nR) -> (N, M)

    def scaled_up(self) -> Tensor:
        """U, of shape (M, nR)."""
        return torch.cat([scale[:, None] * up for scale, up in zip(self.scale, self.up, strict=True)], dim=1)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The layer with U A added (in float32, rounded once); the wrapped layer itself is changed.

        A layer in four bits becomes dense.
        """
        base = dense_linear(self.base) if is_quantised(self.base) else self.base
        base.weight.copy_(base.weight.float() + self.scaled_up() @ self.down.weight)
        return base
