"""Low-rank views of a gradient: projection onto its leading singular directions, and the random sketch.

Legend: M rows (out-features), D columns (in-features), R rank.

A projector is a pair (left, right): left (M x R) has orthonormal columns, right (R x D) orthonormal rows, and either may be
None. The low-rank gradient is `leftᵀ G`, `G rightᵀ` or `leftᵀ G rightᵀ`, and what is computed from it returns to full size by
the transposed products. Projecting the longer side away is of no use: the state keeps the other side at full length, so the
usual choice ("std") projects the shorter one, and the state is R x max(M, D).
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor, distributed

from velora.errors import Diverged

ProjectionType = Literal["std", "reverse_std", "left", "right", "full"]
Svd = Literal["exact", "randomized"]
Projector = tuple[Tensor | None, Tensor | None]

OVERSAMPLING = 8  # extra columns of the random test matrix, and
POWER_ITERATIONS = 2  # products with G Gᵀ: the usual values of Halko, Martinsson and Tropp (2011), algorithm 4.4


def sides(shape: torch.Size, proj_type: ProjectionType) -> tuple[bool, bool]:
    """Whether the left and the right side of an M x D gradient are projected (the names are galore-torch's)."""
    tall = shape[0] >= shape[1]
    return {
        "std": (not tall, tall),
        "reverse_std": (tall, not tall),
        "left": (True, False),
        "right": (False, True),
        "full": (True, True),
    }[proj_type]


def leading_directions(gradient: Tensor, rank: int, proj_type: ProjectionType, svd: Svd, seed: int) -> Projector:
    """The projector onto the `rank` leading singular directions of an M x D gradient, in the gradient's dtype.

    "exact" is the full SVD; "randomized" finds the same subspace up to a small error with products and QR of thin matrices,
    its test matrix drawn from `seed`. Computed in at least fp32. The factors are copies: a slice of the SVD's output would
    keep the whole M x min(M, D) or min(M, D) x D factor alive. Under data parallelism all ranks get rank 0's.

    Raises Diverged where the SVD fails because the gradient is not finite.
    """
    matrix = gradient if gradient.dtype == torch.float64 else gradient.float()
    try:
        u, vh = _svd(matrix) if svd == "exact" else _randomized_svd(matrix, rank, seed)
    except torch.linalg.LinAlgError as error:
        if torch.isfinite(gradient).all():
            raise
        raise Diverged(f"the gradient of a weight of shape {tuple(gradient.shape)} is not finite") from error
    use_left, use_right = sides(gradient.shape, proj_type)
    left = _own(u[:, :rank], gradient.dtype) if use_left else None
    right = _own(vh[:rank], gradient.dtype) if use_right else None
    return left, right


def project(gradient: Tensor, projector: Projector) -> Tensor:
    """M x D to R x D, M x R or R x R."""
    left, right = projector
    if left is not None:
        gradient = left.T @ gradient
    return gradient if right is None else gradient @ right.T


def project_back(low_rank: Tensor, projector: Projector) -> Tensor:
    """R x D, M x R or R x R to M x D."""
    left, right = projector
    if left is not None:
        low_rank = left @ low_rank
    return low_rank if right is None else low_rank @ right


def sketch(full: Tensor, rank: int, seed: int) -> Tensor:
    """`A G` (R x D) if M < D, else `G Aᵀ` (M x R), with A of independent N(0, 1/R) entries drawn from `seed` (FLoRA, section 2.3).

    Nothing but the seed must be kept: the matrix is drawn anew where it is needed. The draw depends on the device type.
    """
    rows, columns = full.shape
    if rows < columns:
        return _gaussian(rank, rows, full, seed) @ full
    return full @ _gaussian(rank, columns, full, seed).T


def unsketch(low_rank: Tensor, shape: torch.Size, rank: int, seed: int) -> Tensor:
    """`Aᵀ (A G)` or `(G Aᵀ) A`: M x D, equal to G in expectation."""
    rows, columns = shape
    if rows < columns:
        return _gaussian(rank, rows, low_rank, seed).T @ low_rank
    return low_rank @ _gaussian(rank, columns, low_rank, seed)


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from several numbers; neighbouring numbers give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


def _gaussian(rank: int, width: int, like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(rank, width, generator=generator, device=like.device, dtype=like.dtype) / rank**0.5


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u, vh


def _randomized_svd(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    rows, columns = matrix.shape
    width = min(rank + OVERSAMPLING, rows, columns)
    generator = torch.Generator(matrix.device).manual_seed(seed)
    test = torch.randn(columns, width, generator=generator, device=matrix.device, dtype=matrix.dtype)
    basis = torch.linalg.qr(matrix @ test).Q  # M x width
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, vh = _svd(basis.T @ matrix)  # width x D
    return basis @ u, vh


def from_rank_zero(tensor: Tensor) -> Tensor:
    """`tensor` (contiguous), overwritten with that of rank 0 where several processes train together."""
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.broadcast(tensor, src=0)
    return tensor


def _own(factor: Tensor, dtype: torch.dtype) -> Tensor:
    return from_rank_zero(factor.to(dtype).clone(memory_format=torch.contiguous_format))
