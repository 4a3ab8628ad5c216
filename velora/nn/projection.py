"""The mathematics of VeLoRA: sub-tokens, their direction, and the projection onto it (arXiv 2405.17991).

An input x of a layer is a stack of tokens. Each token is cut into sub-tokens, and of a sub-token u only its
coordinate along one unit vector v is kept:

    x (N, D)  --split-->  (N, G, S)  --compress-->  z = u . v  (N, G)  --reconstruct-->  z v  (N, D)

The tokens' linear structure survives where sub-tokens point along v, which is why v is taken from data: their normalised
mean, or the first right singular vector of the matrix whose rows they are. Both need only sums over sub-tokens, so they can
be collected layer by layer in one forward, over many batches and over many ranks.

    N  tokens (all leading dimensions together)      D  features of a token, D = G S
    G  groups: sub-tokens in a token                 S  sub-token size: features of a sub-token
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from velora.errors import ConfigError
from velora.nn.surroundings import autocast_as

INITS = ("fixed_average", "running_average", "random", "svd")
"""Where a direction comes from; the paper's ablation (Table 5c)."""

_TOKENS_AT_A_TIME = 256


def split_width(width: int, num_groups: int | None = None, sub_token_size: int | None = None) -> tuple[int, int]:
    """G and S of tokens with D = `width` features, from one of the two.

    Raises ConfigError where not exactly one is given, where it is no positive integer, and where it does not divide D.
    """
    if (num_groups is None) == (sub_token_size is None):
        raise ConfigError(
            f"num_groups={num_groups} and sub_token_size={sub_token_size}: give exactly one, the other is derived"
        )
    key, part = ("num_groups", num_groups) if sub_token_size is None else ("sub_token_size", sub_token_size)
    if not isinstance(part, int) or isinstance(part, bool) or part < 1:
        raise ConfigError(f"{key}={part!r} must be a positive integer")
    if width % part:
        below = max(d for d in range(1, part) if width % d == 0)
        above = min((d for d in range(part + 1, width + 1) if width % d == 0), default=None)
        near = f"{below} or {above} would" if above else f"{below} would"
        raise ConfigError(f"{key}={part} does not divide the width {width} ({near})")
    return (part, width // part) if sub_token_size is None else (width // part, part)


def split(x: Tensor, sub_token_size: int) -> Tensor:
    """The sub-tokens of x (..., D) as rows (N G, S); a view where x is contiguous."""
    return x.reshape(-1, sub_token_size)


def code_unit(dtype: torch.dtype, sub_token_size: int) -> float:
    """What a code z = 1 stands for: 1, but in float16 the power of two next above sqrt(S).

    |u . v| can be sqrt(S) times the largest entry of u, and float16 ends at 65504; in this unit a code never exceeds
    that entry. A power of two changes no digit of it.
    """
    return 2.0 ** math.ceil(math.log2(sub_token_size) / 2) if dtype == torch.float16 else 1.0


def scaled_direction(z: Tensor, direction: Tensor, scale: float) -> Tensor:
    """What a gradient against the codes z is multiplied by, sub-token by sub-token: scale v (S), in units of the codes."""
    return scale * code_unit(z.dtype, direction.shape[0]) * direction


def compress(x: Tensor, direction: Tensor) -> Tensor:
    """z (N, G): the coordinate of each sub-token of x (..., D) along the direction (S), in the dtype of x, in units of
    `code_unit`."""
    sub_token_size = direction.shape[0]
    v = (direction / code_unit(x.dtype, sub_token_size)).to(x.dtype)
    with autocast_as(None, x.device):
        z = F.linear(split(x, sub_token_size), v.unsqueeze(0))  # (N G, 1)
    return z.view(-1, x.shape[-1] // sub_token_size)


def compress_channels(x: Tensor, direction: Tensor) -> Tensor:
    """z (N, C/S, ...) of x (N, C, ...), a batch of N signals, images or volumes: sub-tokens along the channels at each pixel.

    As `compress`, without moving the channels: z has the memory format of x where that is contiguous or channels_last.
    """
    sub_token_size, shape = direction.shape[0], (x.shape[0], x.shape[1] // direction.shape[0], *x.shape[2:])
    if not x.is_contiguous() and x.movedim(1, -1).is_contiguous():
        return compress(x.movedim(1, -1), direction).view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    v = (direction / code_unit(x.dtype, sub_token_size)).to(x.dtype)
    with autocast_as(None, x.device):
        pixels = math.prod(shape[2:])
        return torch.matmul(v, x.reshape(shape[0] * shape[1], sub_token_size, pixels)).view(shape)


def reconstruct(z: Tensor, direction: Tensor) -> Tensor:
    """x̂ (N, D) from z (N, G). For understanding and for comparison: the gradients are computed without it."""
    return (z.unsqueeze(-1) * (code_unit(z.dtype, direction.shape[0]) * direction).to(z.dtype)).flatten(-2)


def sum_over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """aᵀ b, a sum over the tokens, in float32 at least: (..., N, P), (..., N, Q) -> (..., P, Q).

    A sum over many tokens in half precision loses its small terms and may overflow, and its result is rounded once more
    than it need be. CUDA multiplies halves and gives float32; elsewhere the factors are cast, a few tokens at a time, so
    that no copy of a whole one is made. An estimate without a device overrides it as it overrides torch's functions.
    """
    if not torch.compiler.is_compiling() and has_torch_function((a, b)):
        return handle_torch_function(sum_over_tokens, (a, b), a, b)
    with autocast_as(None, a.device):
        if a.dtype not in (torch.float16, torch.bfloat16):
            return a.mT @ b
        if a.device.type == "cuda":
            return (torch.mm if a.ndim == 2 else torch.bmm)(a.mT, b, out_dtype=torch.float32)
        total = torch.zeros(*a.shape[:-2], a.shape[-1], b.shape[-1], dtype=torch.float32, device=a.device)
        for some, same in zip(a.split(_TOKENS_AT_A_TIME, -2), b.split(_TOKENS_AT_A_TIME, -2), strict=True):
            total += some.float().mT @ same.float()
        return total


def factored_gradient(dy: Tensor, z: Tensor, direction: Tensor, scale: float, weight: Tensor) -> Tensor:
    """dW = scale (C ⊗ v), C = dyᵀ z, like `weight` (..., M, D): dy (..., N, M), z (..., N, G), v (S); rounded as it is written."""
    c = sum_over_tokens(dy, z)  # (..., M, G)
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    torch.mul(c.unsqueeze(-1), scaled_direction(z, direction, scale), out=dw.view(*c.shape, -1))  # (..., M, G, S)
    return dw


class SubTokenStatistics:
    """Sums over sub-tokens from which a direction is computed; they add up over batches and ranks.

    `flat` is one vector: the sum of the sub-tokens (S), the sum of their squared norms, their number and, `with_moment`,
    the sum of u uᵀ (S x S). It is float64, where the device has that, so that the order of batches does not matter.
    """

    def __init__(self, sub_token_size: int, device: torch.device, with_moment: bool = False) -> None:
        self.sub_token_size = sub_token_size
        dtype = torch.float32 if device.type == "mps" else torch.float64
        length = sub_token_size + 2 + (sub_token_size**2 if with_moment else 0)
        self.flat = torch.zeros(length, dtype=dtype, device=device)
        self.with_moment = with_moment

    def add(self, x: Tensor) -> None:
        """Take in the sub-tokens of x (..., D). Sums within x are in float32 at least, sums of sums in float64."""
        x = x.detach()
        size, wide = self.sub_token_size, torch.promote_types(x.dtype, torch.float32)
        with torch.no_grad():
            totals = x.reshape(-1, x.shape[-1]).sum(0, dtype=wide)  # (D): over tokens, which is quick; then over groups
            self.flat[:size] += split(totals, size).sum(0, dtype=self.flat.dtype)
            self.flat[size] += torch.linalg.vector_norm(x, dtype=wide) ** 2
            self.flat[size + 1] += x.numel() // size
            if self.with_moment:
                u = split(x, size).to(self.flat.dtype)  # (N G, S)
                self.flat[size + 2 :] += (u.T @ u).flatten()

    @property
    def count(self) -> int:
        return int(self.flat[self.sub_token_size + 1])

    def mean(self) -> Tensor:
        """Mean sub-token (S)."""
        return self.flat[: self.sub_token_size] / self.flat[self.sub_token_size + 1]

    def is_finite(self) -> bool:
        """Whether no inf or NaN was among the sub-tokens."""
        return bool(torch.isfinite(self.flat).all())

    def is_zero(self) -> bool:
        """Whether all sub-tokens were zero, or there were none."""
        return not bool(self.flat[self.sub_token_size])

    def _check(self) -> None:
        if self.count == 0:
            raise ConfigError("no sub-token reached the layer in the calibration forward; give a batch that does")
        if not self.is_finite():
            raise ConfigError("its input in the calibration batch is not finite; look for inf or nan in the batch")
        if self.is_zero():
            raise ConfigError("its input in the calibration batch is zero everywhere; give another batch")

    def mean_direction(self) -> Tensor:
        """The normalised mean of all sub-tokens (S). ConfigError where the mean vanishes beside their size."""
        self._check()
        mean = self.mean()
        norm = torch.linalg.vector_norm(mean)
        typical = (self.flat[self.sub_token_size] / self.count).sqrt()
        if norm <= 1e-6 * typical:
            raise ConfigError(
                f"the mean of its sub-tokens is zero (norm {float(norm):.1e}, a sub-token has {float(typical):.1e}), "
                "so it gives no direction; use init=svd or init=random"
            )
        return mean / norm

    def principal_direction(self) -> Tensor:
        """The first right singular vector of the sub-tokens' matrix (S), as the top eigenvector of the sum of u uᵀ.

        Its sign is free; the entry of largest magnitude is made positive, so that every machine gets the same.
        """
        assert self.with_moment
        self._check()
        moment = self.flat[self.sub_token_size + 2 :].view(self.sub_token_size, self.sub_token_size)
        vector = torch.linalg.eigh(moment).eigenvectors[:, -1]
        return vector * vector[vector.abs().argmax()].sign()


def random_direction(sub_token_size: int, seed: int) -> Tensor:
    """A unit vector (S), uniform over the sphere, in float64 on the CPU: the same for a seed on every device and rank."""
    vector = torch.randn(sub_token_size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return vector / torch.linalg.vector_norm(vector)
