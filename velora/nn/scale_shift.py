"""The element-wise scale and shift of SSF, and its twin that keeps one number per sub-token.

    y  = x * γ + β       forward                        γ, β (D)
    dx = dy * γ          needs γ only
    dγ = Σ_n dy * x      needs x
    dβ = Σ_n dy

With x̂ = z ⊗ v in place of x (arXiv 2405.17991, section 3; see velora/nn/linear.py), and without building it:

    dγ[g, s] = scale · v[s] · Σ_n dy[n, g, s] z[n, g]

which is one vector-matrix product per group. y, dx and dβ are exact.

    N  tokens (all leading dimensions together)      D  features, D = G S
    G  groups: sub-tokens in a token                 S  sub-token size
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from velora.nn.first_order import first_order
from velora.nn.projection import scaled_direction, sum_over_tokens
from velora.nn.split_backward import Gradients, wanted, weight_gradients
from velora.nn.twin import NO_SECOND_DERIVATIVE, VeloraTwin


class ScaleShift(nn.Module):
    """y = x * weight + bias over the last dimension of x (..., D), as in SSF (arXiv 2210.08823, equation 3).

    `weight` (D) is γ, drawn from N(1, 0.02²), and `bias` (D) is β, from N(0, 0.02²), as in the published code.
    """

    def __init__(
        self, num_features: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.weight = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, mean=1.0, std=0.02)
        nn.init.normal_(self.bias, mean=0.0, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias

    def extra_repr(self) -> str:
        return f"num_features={self.num_features}"


class VeloraScaleShift(VeloraTwin, ScaleShift):
    """ScaleShift that keeps N G numbers for the gradient of γ in place of N D; the arguments of its own are VeloraTwin's."""

    plain_class = ScaleShift

    @staticmethod
    def width_of(module: Any) -> int:
        return module.num_features

    def forward(self, x: Tensor) -> Tensor:
        if not self.compresses():
            return x * self.weight + self.bias
        self.observe(x)
        with torch.no_grad():
            z = self.codes(x)
        return _ScaleShift.apply(x, z, self.weight, self.bias, self.direction, self.scale, self.later())


class _ScaleShift(torch.autograd.Function):
    """Keeps z, γ (a parameter) and the direction (a buffer). With half-precision inputs the sums are float32."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor,
        direction: Tensor,
        scale: float,
        later: Any,
    ) -> Tensor:
        ctx.save_for_backward(z, weight, direction)
        ctx.scale, ctx.later = scale, later
        ctx.dtype, ctx.bias_dtype = x.dtype, bias.dtype
        return x * weight + bias

    @staticmethod
    @first_order(NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        z, weight, direction = ctx.saved_tensors
        needed = wanted(ctx)
        dy = grad_output.reshape(-1, weight.shape[0])  # (N, D)
        dx = (grad_output * weight).to(ctx.dtype) if needed[0] else None
        dgamma, dbeta = weight_gradients(ctx, needed, _gradients, dy, z, weight, direction)
        return dx, None, dgamma, dbeta, None, None, None


def _gradients(
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    direction: Tensor,
    scale: float,
    of_weight: bool,
    bias_dtype: torch.dtype | None,
) -> Gradients:
    """dγ and dβ (D); the latter in its dtype, or None."""
    dgamma = None
    if of_weight:
        groups = dy.unflatten(1, (-1, direction.shape[0])).transpose(0, 1)  # (G, N, S)
        codes = z.to(dy.dtype).T.unsqueeze(2)  # (G, N, 1)
        sums = sum_over_tokens(codes, groups).squeeze(1)  # (G, S)
        dgamma = (sums * scaled_direction(z, direction, scale)).to(weight.dtype).flatten()
    return dgamma, None if bias_dtype is None else dy.sum(0).to(bias_dtype)
