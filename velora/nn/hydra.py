"""Hydra: a parallel and a sequential low-rank branch around a frozen linear layer (arXiv 2309.06922, equations 5 to 8).

    y = f(x) + s P(x) + s Q(f(x))        f(x) = x Wᵀ + b
    P(x) = U_p (A_p x + a_p) + u_p       Q likewise, of its own; dropout on the rank-R features in training

The layer is linear in x, so after training both branches fold into it:

    W' = W + s (U_p A_p + U_q A_q W)
    b' = b + s (U_p a_p + u_p + U_q (A_q b + a_q) + u_q)

The published code (github: extremebird/Hydra) has biases in the branches, and its own re-parametrisation uses the
MLP's weight for the attention's branch; here each branch folds into the layer that it stands at.

Shapes: N tokens, D in-features, M out-features, R rank; A_p (R x D), A_q (R x M), U_p and U_q (M x R).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from velora.nn.quantised import dense_linear, is_quantised


class LowRankBranch(nn.Module):
    """s U dropout(A x + a) + u s: `down` is A, `up` is U, zero at first, so that training starts at the frozen network.

    The weights are float32; a half-precision input is cast, unless autocast decides the dtype.
    """

    velora_children: ClassVar[tuple[str, ...]] = ("down",)

    def __init__(
        self, in_features: int, out_features: int, rank: int, scale: float, dropout: float, device: torch.device
    ) -> None:
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(in_features, rank, device=device, dtype=torch.float32)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(rank, out_features, device=device, dtype=torch.float32)
        nn.init.xavier_uniform_(self.down.weight)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.down.weight.dtype)
        return self.up(self.dropout(self.down(x))) * self.scale  # (N, D) -> (N, R) -> (N, M)

    def folded(self) -> tuple[Tensor, Tensor]:
        """The branch as one matrix s U A (M x D) and one vector s (U a + u) (M)."""
        matrix = self.up.weight @ self.down.weight
        vector = self.up.weight @ self.down.bias + self.up.bias
        return self.scale * matrix, self.scale * vector


class HydraLinear(nn.Module):
    """A frozen linear layer (also in four bits) with both branches; has the name and the place of the layer."""

    velora_children: ClassVar[tuple[str, ...]] = ("parallel", "sequential")

    def __init__(self, base: nn.Linear, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        device = base.weight.device
        self.parallel = LowRankBranch(base.in_features, base.out_features, rank, scale, dropout, device)
        self.sequential = LowRankBranch(base.out_features, base.out_features, rank, scale, dropout, device)

    @property
    def weight(self) -> Any:
        """The frozen layer's, for a network that looks at it (Mamba's)."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return (y + self.parallel(x) + self.sequential(y)).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The layer with both branches folded in (in float32, rounded once); the wrapped layer itself is changed.

        A layer without a bias gets one, a layer in four bits becomes dense.
        """
        base = dense_linear(self.base) if is_quantised(self.base) else self.base
        parallel, parallel_bias = self.parallel.folded()
        sequential, sequential_bias = self.sequential.folded()
        weight = base.weight.float()
        bias = torch.zeros_like(parallel_bias) if base.bias is None else base.bias.float()
        base.weight.copy_(weight + parallel + sequential @ weight)
        folded_bias = bias + parallel_bias + sequential @ bias + sequential_bias
        if base.bias is None:
            base.bias = nn.Parameter(folded_bias.to(base.weight.dtype), requires_grad=False)
        else:
            base.bias.copy_(folded_bias)
        return base
