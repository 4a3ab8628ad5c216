"""SSF: a trainable scale and shift after a frozen layer (arXiv 2210.08823, equation 3).

    y = γ ⊙ f(x) + β

f is a linear layer, a norm or a convolution; after training γ and β fold into f (equations 4 and 5):

    W' = γ W (row by row)     b' = γ ⊙ b + β

Shapes: N tokens, D features of y; γ, β (D). A convolution's y is (batch, D, height, width).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from velora.errors import ConfigError
from velora.nn.quantised import dense_linear, is_quantised
from velora.nn.scale_shift import ScaleShift


def is_norm(module: nn.Module) -> bool:
    """A norm over the last dimension with a trainable weight; transformers has many RMSNorm classes of its own."""
    is_kind = isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__
    return is_kind and getattr(module, "weight", None) is not None and module.weight.ndim == 1


def can_have_ssf(module: nn.Module) -> bool:
    """A linear layer (also in four bits), a convolution over images, or a norm."""
    return isinstance(module, nn.Linear | nn.Conv2d) or is_norm(module)


class SSF(nn.Module):
    """A frozen layer and the scale and shift after it; has the name and the place of the layer that it wraps.

    γ and β are float32 and the product is taken in float32, also after a half-precision layer; y has the layer's dtype.
    A norm without a bias of its own (RMSNorm) gets no shift, since there would be nothing to fold it into: β is
    frozen at 0.
    """

    velora_children: ClassVar[tuple[str, ...]] = ("scale_shift",)

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        device = next(base.parameters()).device
        self.scale_shift = ScaleShift(_num_features(base), device=device, dtype=torch.float32)
        self.channels_first = _has_channels_first(base)
        if not hasattr(base, "bias"):
            nn.init.zeros_(self.scale_shift.bias).requires_grad_(False)

    @property
    def weight(self) -> Any:
        """The frozen layer's, for a network that looks at it (Mamba's)."""
        return self.base.weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base(x, *args, **kwargs)
        if self.channels_first:  # (batch, D, height, width) -> (batch, height, width, D) and back
            return self.scale_shift(y.movedim(1, -1)).to(y.dtype).movedim(-1, 1)
        return self.scale_shift(y).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The layer with γ and β folded in (in float32, rounded once); the wrapped layer itself is changed.

        A layer without a bias gets one, a layer in four bits becomes dense.
        """
        base = dense_linear(self.base) if is_quantised(self.base) else self.base
        gamma, beta = self.scale_shift.weight.float(), self.scale_shift.bias.float()
        weight = base.weight.float()
        folded = gamma.view(-1, *[1] * (weight.ndim - 1)) * weight
        if not isinstance(base, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
            _check_weight_is_a_factor(base)
        base.weight.copy_(folded)
        if not hasattr(base, "bias"):
            assert not beta.any()
        elif base.bias is None:
            base.bias = nn.Parameter(beta.to(base.weight.dtype), requires_grad=False)
        else:
            base.bias.copy_(gamma * base.bias.float() + beta)
        return base


def _has_channels_first(base: nn.Module) -> bool:
    """Whether y is (batch, D, height, width)."""
    from timm.layers import LayerNorm2d

    return isinstance(base, nn.Conv2d | LayerNorm2d)


def _num_features(base: nn.Module) -> int:
    if isinstance(base, nn.Linear):
        return base.out_features  # a 4-bit weight has another shape
    return base.weight.shape[0]  # type: ignore[union-attr, return-value]


def _check_weight_is_a_factor(norm: nn.Module) -> None:
    """Some norms multiply by 1 + weight (Gemma): a factor cannot be folded into those by multiplying the weight."""
    probe = torch.linspace(-1, 1, norm.weight.shape[0], dtype=norm.weight.dtype, device=norm.weight.device)[None]
    before = norm(probe)
    norm.weight.mul_(2)
    doubled = norm(probe)
    norm.weight.div_(2)
    if not torch.equal(doubled, 2 * before):
        raise ConfigError(
            f"{type(norm).__name__} does not simply multiply by its weight, so SSF cannot be merged into it; "
            "keep the adapter unmerged, or leave norms out with adapter.targets"
        )
