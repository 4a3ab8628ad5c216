"""Convolutions that keep one number per sub-token of channels for the gradient of their weight.

    y  = x * W + b       forward (cross-correlation with stride, padding, dilation, groups)
    dx                   needs dy and W only
    dW = dy ⋆ x          needs x

At each pixel the channels are cut into sub-tokens of S, and of each only its coordinate along v is kept (arXiv 2405.17991,
section 3, where x̂ = z ⊗ v stands in place of x):

    z[n, g, p] = Σ_s v[s] x[n, g S + s, p]

A convolution only gathers pixels, so that it commutes with this. The weight gradient needs no x̂:

    C = dy ⋆ z                                 the ordinary weight gradient, with C/S channels: S times less work
    dW[m, g S + s, i, j] = scale v[s] C[m, g, i, j]

Padding, of whatever mode, copies pixels or adds zeros: the code of the padded input is the padded code. y and dx are those of
the plain convolution bit for bit; db is the same sum, by whichever kernel the library takes for it.

Here a grouped convolution is several convolutions side by side, so D is the number of channels that one of them reads.

    N  inputs of a batch      C  channels, D = C / groups = G S       P  pixels: length, or height and width, or three sizes
    M  out-channels           G  sub-tokens of D channels             S  sub-token size       K  kernel, as many sizes as P
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from velora.nn.first_order import first_order
from velora.nn.projection import compress_channels, scaled_direction
from velora.nn.recipe import stand_in
from velora.nn.split_backward import Gradients, wanted, weight_gradients
from velora.nn.surroundings import autocast_dtype, cast, cast_type
from velora.nn.twin import NO_SECOND_DERIVATIVE, VeloraTwin

_CONVOLUTIONS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}

Sizes = tuple[int, ...]


class Geometry(NamedTuple):
    """How a convolution gathers pixels. `pad`: what F.pad adds in `mode` first, the last dimension first; empty for nothing.
    `padding`: zeros on both sides, added by the convolution itself."""

    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int
    pad: Sizes
    mode: str

    def padded(self, x: Tensor) -> Tensor:
        return F.pad(x, self.pad, self.mode) if self.pad else x

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        """y of a padded x, computed in `dtype`."""
        function = _CONVOLUTIONS[len(self.stride)]
        bias = None if bias is None else cast(bias, dtype)
        return function(x, cast(weight, dtype), bias, self.stride, self.padding, self.dilation, self.groups)

    def output_sizes(self, x: Tensor, weight: Tensor) -> Sizes:
        """Sizes of P in y."""
        each = zip(x.shape[2:], weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in each)

    def gradients(self, dy: Tensor, x: Tensor, weight: Tensor, mask: tuple[bool, bool, bool]) -> tuple[Any, Any, Any]:
        """Those of x, weight and bias that `mask` asks for, by the library's own kernels.

        That of x does not look into x, nor that of the weight into the weight: a tensor without memory will do.
        """
        return torch.ops.aten.convolution_backward(
            dy, x, weight, [weight.shape[0]], self.stride, self.padding, self.dilation, False,
            [0] * len(self.stride), self.groups, mask,
        )  # fmt: skip


def geometry_of(conv: Any) -> Geometry:
    """The geometry of an nn.Conv1d, 2d or 3d. Even kernels with padding="same" take one zero more on the right."""
    each = zip(conv.kernel_size, conv.dilation, strict=True)
    totals = [d * (k - 1) for k, d in each]
    if conv.padding == "valid":
        sides = [(0, 0) for _ in totals]
    elif conv.padding == "same":
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(p, p) for p in conv.padding]
    zeros = conv.padding_mode == "zeros"
    inside = tuple(left if zeros else 0 for left, _ in sides)
    outside = [(left - done, right - done) for (left, right), done in zip(sides, inside, strict=True)]
    pad = tuple(size for both in reversed(outside) for size in both)
    mode = "constant" if zeros else conv.padding_mode
    return Geometry(conv.stride, inside, conv.dilation, conv.groups, pad if any(pad) else (), mode)


def _in_format(weight: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A weight in the memory format by which the library chooses its kernel; that of one pixel has both until it is said."""
    weight = weight.contiguous(memory_format=memory_format)
    width = weight.shape[1]
    one_pixel = weight.numel() == weight.shape[0] * width
    return weight.as_strided(weight.shape, (width, 1, *[width] * (weight.dim() - 2))) if one_pixel else weight


class VeloraConv(VeloraTwin):
    """Base of the three twins: a convolution that keeps N (C/S) P numbers for the gradient of its weight in place of N C P.

    In eval mode, under no_grad and where the weight is frozen it is the plain layer. The arguments of its own are VeloraTwin's;
    `num_groups` are the sub-tokens of the D channels that one group of the convolution reads.
    """

    features_dim = 1

    @staticmethod
    def width_of(module: Any) -> int:
        return module.in_channels // module.groups

    @staticmethod
    def refusal(module: Any) -> str | None:
        if module.groups > 1 and module.groups == module.in_channels:
            return (
                "a depthwise convolution reads one channel at a time, which is no sub-token; leave it out of the layers"
            )
        return None

    def compress(self, x: Tensor) -> Tensor:
        return compress_channels(x, self.direction)

    def code_shape(self, x: Tensor) -> tuple[int, ...]:
        return x.shape[0], x.shape[1] // self.sub_token_size, *x.shape[2:]

    def forward(self: Any, input: Tensor) -> Tensor:
        dims = self.weight.dim()
        if not self.compresses():
            return super().forward(input)  # type: ignore[misc]
        if input.dim() == dims - 1:  # one input without a batch
            return self._forward(input.unsqueeze(0)).squeeze(0)
        return self._forward(input)

    def _forward(self: Any, input: Tensor) -> Tensor:
        """(N, C, P) -> (N, M, P')"""
        if input.dim() != self.weight.dim() or input.shape[1] != self.in_channels:
            return super().forward(input)  # type: ignore[misc]
        self.observe(input)
        dtype, geometry = autocast_dtype(input.device), geometry_of(self)
        with torch.no_grad():
            z = self.codes(input, cast_type(input, dtype))
        x = geometry.padded(cast(input, dtype))
        return self.product(_Conv, geometry.convolve, x, z, dtype, geometry)


class VeloraConv1d(VeloraConv, nn.Conv1d):
    plain_class = nn.Conv1d


class VeloraConv2d(VeloraConv, nn.Conv2d):
    plain_class = nn.Conv2d


class VeloraConv3d(VeloraConv, nn.Conv3d):
    plain_class = nn.Conv3d


class _Conv(torch.autograd.Function):
    """Keeps z, the weight (a parameter: no bytes of its own) and the direction (a buffer); `early`: see recipe.Product.

    C comes in the dtype of z, as the plain layer's weight gradient does in that of x; its product with v is rounded once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        direction: Tensor,
        scale: float,
        later: Any,
        dtype: torch.dtype | None,
        early: bool,
        geometry: Geometry,
    ) -> Tensor:
        ctx.save_for_backward(z, weight, direction)
        ctx.scale, ctx.geometry, ctx.shape, ctx.later = scale, geometry, x.shape, later
        last = _CHANNELS_LAST.get(x.dim() - 2)
        ctx.format = last if last and x.is_contiguous(memory_format=last) else None
        ctx.bias_dtype = None if bias is None else bias.dtype
        if early:
            return stand_in(x, x.shape[0], weight.shape[0], *geometry.output_sizes(x, weight))
        return geometry.convolve(x, weight, bias, dtype)

    @staticmethod
    @first_order(NO_SECOND_DERIVATIVE)
    def backward(ctx: Any, dy: Tensor) -> Any:
        z, weight, direction = ctx.saved_tensors
        geometry: Geometry = ctx.geometry
        dx = None
        needed = wanted(ctx)
        if needed[0]:
            w = weight.to(dy.dtype) if ctx.format is None else _in_format(weight.to(dy.dtype), ctx.format)
            dx = geometry.gradients(dy, stand_in(dy, *ctx.shape), w, (True, False, False))[0]
        dw, db = weight_gradients(ctx, needed, _gradients, geometry, dy, z, weight, direction)
        return dx, None, dw, db, None, None, None, None, None, None


def _gradients(
    geometry: Geometry,
    dy: Tensor,
    z: Tensor,
    weight: Tensor,
    direction: Tensor,
    scale: float,
    of_weight: bool,
    bias_dtype: torch.dtype | None,
) -> Gradients:
    """dW (M, D, K) and db (M); the latter in its dtype, or None."""
    dw, size = None, direction.shape[0]
    groups = weight.shape[1] // size
    w = stand_in(z, weight.shape[0], groups, *weight.shape[2:])
    mask = (False, of_weight, bias_dtype is not None)
    _, c, db = geometry.gradients(dy, geometry.padded(z), w, mask)  # (M, G, K), (M)
    if of_weight:
        dw = torch.empty_like(weight)
        v = scaled_direction(z, direction, scale)  # (S)
        torch.mul(c.unsqueeze(2), v.view(size, *[1] * (dw.dim() - 2)), out=dw.unflatten(1, (groups, size)))
    return dw, None if db is None else db.to(bias_dtype)
