"""PiSSA over four-bit weights (QPiSSA, arXiv 2404.02948, section 4 and its published code).

PiSSA trains the principal part of a weight, W ≈ L Rt with the largest K singular values, and freezes what is left. What is
left has smaller entries than W, so four bits lose less of it; and what they lose can be fitted again by L Rt:

    E = W                                         repeat T times:
    U S Vᵀ = E;   L = U_K sqrt(S_K);   Rt = sqrt(S_K) V_Kᵀ
    Q = nf4(W - L Rt);   E = W - dequantised(Q)

The layer is Q + L Rt, and its error that of the last rounding to four bits. One round is PiSSA and then four bits. The dense
weight is needed just here, so this happens where a layer is quantised (`quantise_residual`), one layer at a time; the two
thin factors wait on the layer until the adapter is made (`take_factors`).

Shapes: M out-features, D in-features, K rank; W (M x D), L (M x K), Rt (K x D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from velora.errors import ConfigError
from velora.nn.quantised import dequantised, quantise_linear, worker_for

_FACTORS = "pissa_factors"


def principal_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """L and Rt of a float32 matrix."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


@torch.no_grad()
def quantise_residual(linear: nn.Linear, *, rank: int, rounds: int, use_gpu: bool = True, **settings: Any) -> nn.Module:
    """`quantise_linear` of W - L Rt; the layer keeps L and Rt for `take_factors`. `settings` are those of `quantise_linear`.

    Nothing but the sizes is right for a weight without values (an estimate), which gets no factors.

    Errors: ConfigError where the weight has fewer than `rank` singular values.
    """
    if rank > min(linear.in_features, linear.out_features):
        raise ConfigError(
            f"adapter.rank={rank} with adapter.init=pissa: a layer of {linear.in_features} to {linear.out_features} features has "
            f"{min(linear.in_features, linear.out_features)} singular values; give at most that many"
        )
    home = linear.weight.device
    if linear.weight.is_meta:
        return quantise_linear(linear, use_gpu=use_gpu, **settings)
    weight = linear.weight.detach().to(worker_for(home, use_gpu), torch.float32)
    residual = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta").train(linear.training)
    residual.bias = linear.bias
    error = weight
    for _ in range(rounds):
        factors = principal_factors(error, rank)
        rest = (weight - factors[0] @ factors[1]).to(linear.weight.dtype)
        residual.weight = nn.Parameter(rest, requires_grad=False)
        layer = quantise_linear(residual, use_gpu=use_gpu, **settings)
        error = weight - dequantised(layer).float()
    layer.weight = layer.weight.to(home)  # type: ignore[operator, assignment]
    setattr(layer, _FACTORS, tuple(factor.to(home) for factor in factors))
    return layer


def take_factors(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """L and Rt of a layer that `quantise_residual` made, which forgets them; None for any other one."""
    return layer.__dict__.pop(_FACTORS, None)


@torch.no_grad()
def split_dense(linear: nn.Linear, rank: int) -> tuple[Tensor, Tensor]:
    """L and Rt of a layer that is not in four bits; its weight becomes W - L Rt, in place."""
    factors = principal_factors(linear.weight.float(), rank)
    linear.weight.copy_(linear.weight.float() - factors[0] @ factors[1])
    return factors
