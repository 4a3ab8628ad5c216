"""Grass: Adam's moments for a few rows of the gradient (Muhamed et al. 2024, arXiv 2406.17660).

Legend: M rows (out-features), D columns (in-features), R rank. For a weight W (M x D) with gradient G, whose row i is g_i:

    every `update_gap` steps:  pick R rows i_1 ... i_R, and forget the moments
    Pᵀ = ρ B                   B (R x M) has a one at (k, i_k), ρ is diagonal
    N  = Adam(Pᵀ G)            R x D: the picked rows, scaled
    W <- W (1 - lr·weight_decay) - lr·scale·P N

P is never a matrix: it is R numbers of rows, and R scales where they are not one. The rows are picked by

    top        the R largest |g_i|;  ρ = 1
    sampled    R independent draws, row i with probability q_i = |g_i| / Σ_j |g_j|;  ρ_k = 1 / √(R q_{i_k})

With ρ so, E[P Pᵀ G] = G for any q that is positive where g_i is not zero. We take q from the norm and not from its square because
it is the q of least variance: E|P Pᵀ G - G|² = (Σ |g_i|²/q_i - |G|²) / R, which is smallest where q_i is proportional to |g_i|
(Cauchy-Schwarz). A row may be drawn twice; its two copies have equal moments, and W gets both updates.

Ours, not the paper's: Adam's bias correction starts again with the moments (without it, the first step after a refresh would be
(1-β₁)/√(1-β₂) = 3.2 times as large), weight decay acts on all rows, and ε stands where GaLore has it, outside of the bias
correction (`velora/optim/galore.py`).

The full gradient still exists in `p.grad` while it waits for `step()`; with `layerwise` only one does at a time. With VeLoRA none
need exist: `velora/optim/grass_factors.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from velora.errors import ConfigError, Diverged
from velora.optim.galore import GaLoreAdamW
from velora.optim.layerwise import refuse_sharded
from velora.optim.subspace import derive_seed, from_rank_zero

Selection = Literal["top", "sampled"]


class GrassAdamW(GaLoreAdamW):
    """AdamW whose moments are kept for picked rows of the gradient, in the parameter groups that have a `rank`.

    Such a group may also have `selection` ("top" or "sampled"), `update_gap` (steps between two selections) and `scale` (of
    the update). Its parameters must be matrices with at least `rank` rows. "sampled" draws from `seed`. `layerwise`,
    `accumulation_steps` and `max_grad_norm`: see LayerwiseOptimizer; under accumulation the rows are picked from the first
    micro-batch of the step.

    State per matrix with a rank, fp32: 8 R (D + 1) bytes, and 4 R more for the scales of "sampled". Its `step` counts from
    the last selection.
    """

    low_rank_defaults: ClassVar[dict[str, Any]] = {"selection": "top", "update_gap": 200, "scale": 0.25}
    ranks_rows: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        layerwise: bool = False,
        accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            layerwise=layerwise,
            accumulation_steps=accumulation_steps,
            max_grad_norm=max_grad_norm,
            seed=seed,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if "rank" not in group:
            return
        if group["selection"] not in ("top", "sampled"):
            raise ConfigError(f"selection={group['selection']} must be top or sampled")
        if group["update_gap"] < 1:
            raise ConfigError(f"update_gap={group['update_gap']} must be at least 1")

    def compress(self, p: Tensor, gradient: Tensor, group: dict[str, Any], *, first: bool) -> Tensor | None:
        if "rank" not in group:
            return None
        refuse_sharded(gradient)
        state = self.state[p]
        if first and self._is_due(p, group):
            self._pick_anew(p, gradient, group)
        picked = gradient.index_select(0, state["rows"])  # R x D
        return picked.mul_(state["rho"]) if "rho" in state else picked

    def update_compressed(self, p: Tensor, compressed: Tensor, group: dict[str, Any]) -> None:
        state, lr = self._moments(p, compressed, group), group["lr"]
        normalized, correction = self._adam(p, compressed, group)
        if "rho" in state:
            normalized.mul_(state["rho"])
        p.mul_(1 - lr * group["weight_decay"])
        # the copies of a row that was drawn twice are equal, so the order in which a GPU adds them changes nothing
        p.index_add_(0, state["rows"], normalized.to(p.dtype), alpha=-lr * group["scale"] * correction)

    def _is_due(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether this step picks rows."""
        state = self.state[p]
        return "rows" not in state or state.get("step", 0) >= group["update_gap"]

    def _pick_anew(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        state["selections"] = state.get("selections", 0) + 1
        seed = derive_seed(self.seed, self._index(p), state["selections"])
        rows, rho = pick_rows(gradient, group["rank"], group["selection"], seed)
        state["rows"] = rows
        state.pop("rho", None)
        if rho is not None:
            state["rho"] = rho
        if "exp_avg" in state:
            state["step"] = 0
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()


def pick_rows(gradient: Tensor, rank: int, selection: Selection, seed: int) -> tuple[Tensor, Tensor | None]:
    """The picked rows of an M x D gradient in ascending order (R), and ρ as a column (R x 1), or None where it is one.

    The norms are summed in at least fp32, and a gradient of zeros has all rows equally likely. Drawn on the CPU, so that a
    seed gives the same rows on every device. Under data parallelism all ranks get rank 0's.

    Raises Diverged where rows cannot be drawn because the gradient is not finite.
    """
    dtype = gradient.dtype if gradient.dtype == torch.float64 else torch.float32
    norms = torch.linalg.vector_norm(gradient, dim=1, dtype=dtype)  # M
    if selection == "top":
        return from_rank_zero(norms.topk(rank).indices.sort().values), None
    total = norms.sum()
    q = torch.where(total == 0, torch.full_like(norms, 1 / len(norms)), norms / total)
    try:
        drawn = torch.multinomial(q.cpu(), rank, replacement=True, generator=torch.Generator().manual_seed(seed))
    except RuntimeError as error:
        if torch.isfinite(norms).all():
            raise
        raise Diverged(f"the gradient of a weight of shape {tuple(gradient.shape)} is not finite") from error
    rows = from_rank_zero(drawn.sort().values.to(gradient.device))
    rho = (rank * q.index_select(0, rows)).rsqrt()
    return rows, from_rank_zero(rho.to(gradient.dtype).unsqueeze(1))
