"""Numbers in eight or four bits: each group of 256, in the order of memory, has a scale and a zero point of its own.

Legend: N numbers, K = N / 256 groups (the last one may be shorter), b bits.

    s = (max(x, 0) - min(x, 0)) / (2^b - 1)     z = round(-min(x, 0) / s)           of a group
    code = round(x / s) + z, within 0 ... 2^b - 1                                   x̂ = (code - z) s

which is asymmetric rounding as the package q-galore-torch has it, but that a range takes in zero: there the zero point of a
group of one sign is cut off at 0 or 2^b - 1, and the group's larger values with it. To the nearest, |x̂ - x| is at most s / 2. With
`noise`, x / s goes up with a probability that is its fraction: x̂ is x in the mean, for all x but those beyond the last code,
which the rounding of z leaves out of reach by at most s / 2 at either end of a group.

Kept are b bits a number, an fp32 scale and a byte of zero point a group; four-bit codes lie two in a byte, the first one low.
A group that is not finite has a scale that is not finite, so that it shows in every x̂.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP_SIZE = 256
MIN_RANGE = 1e-5  # of a group, as in q-galore-torch: zeros have a scale too


class Grouped(NamedTuple):
    """codes: uint8 (N), or (N / 2) in four bits; scale: (K), float32, float64 for float64 values; zero: uint8 (K)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


def quantise(values: Tensor, bits: int, noise: Tensor | None = None) -> Grouped:
    """`values` of any shape in 8 or 4 bits. `noise`, of their shape and uniform in [0, 1), rounds them by chance."""
    assert bits in (4, 8)
    top = 2**bits - 1
    groups = _in_groups(values.to(torch.promote_types(values.dtype, torch.float32)))  # K x 256
    low = groups.amin(dim=1).clamp(max=0)
    scale = (groups.amax(dim=1).clamp(min=0) - low).clamp(min=MIN_RANGE) / top
    zero = (-low / scale).round()
    position = groups / scale.unsqueeze(1)
    if noise is None:
        position = position.round()
    else:
        below = position.floor()
        position = below + (_in_groups(noise) < position - below)
    codes = position.add_(zero.unsqueeze(1)).clamp_(0, top).to(torch.uint8).view(-1)[: values.numel()]
    return Grouped(pack(codes) if bits == 4 else codes.clone(), scale, zero.to(torch.uint8))


def dequantise(grouped: Grouped, bits: int, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """x̂ in a shape of N numbers, in `dtype`, rounded once: code - z is exact in any, and x̂ is their product in fp32 at least."""
    num = torch.Size(shape).numel()
    codes = unpack(grouped.codes, num) if bits == 4 else grouped.codes
    groups = _in_groups(codes).to(dtype)
    groups.sub_(grouped.zero.unsqueeze(1)).mul_(grouped.scale.unsqueeze(1))
    return groups.view(-1)[:num].view(shape)


def pack(codes: Tensor) -> Tensor:
    """Codes below 16, two in a byte."""
    pairs = F.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unpack(packed: Tensor, num: int) -> Tensor:
    """The first `num` codes."""
    return torch.stack((packed & 15, packed >> 4), dim=1).view(-1)[:num]


def num_bytes(num: int, bits: int) -> int:
    """What `num` float32 numbers take in this form."""
    return -(-num * bits // 8) + 5 * -(-num // GROUP_SIZE)


def _in_groups(values: Tensor) -> Tensor:
    flat = values.reshape(-1)
    return F.pad(flat, (0, -flat.numel() % GROUP_SIZE)).view(-1, GROUP_SIZE)
