"""GaLore: Adam's moments live in a low-rank subspace of the gradient (Zhao et al. 2024, arXiv 2403.03507, algorithm 2).

Legend: M rows (out-features), D columns (in-features), R rank. For a weight W (M x D) with gradient G:

    every `update_proj_gap` steps:  P = the R leading singular directions of G
    R_t = Pᵀ G (or G Pᵀ, or on both sides)             the low-rank gradient
    N_t = Adam(R_t)                                    moments of the size of R_t
    W  <- W (1 - lr·weight_decay) - lr·scale·P N_t

Parameter groups with a key `rank` are treated so; the others get AdamW. This differs from the package galore-torch in what
is kept and when, not in the update: the projector is part of the state dict (there it is lost on resume, or must be
unpickled), it is a copy of R directions (there a slice that keeps the whole SVD factor alive), the layer-wise form
accumulates gradients (`velora/optim/layerwise.py`), and weight decay acts on the weight before the step, as in AdamW's paper.

Adam's ε stands as in galore-torch, and as in section 2 of Adam's paper, outside of the bias correction:
`m √(1-β₂ᵗ) / (1-β₁ᵗ) / (√v + ε)`. With 8-bit moments the kernel of bitsandbytes has it inside (as torch.optim.AdamW does).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from velora.errors import ConfigError
from velora.optim.layerwise import LayerwiseOptimizer, refuse_sharded
from velora.optim.quantised_state import BLOCK_SIZE, MIN_8BIT_SIZE, dynamic_map, require_8bit_kernels
from velora.optim.subspace import Projector, derive_seed, leading_directions, project, project_back

LOW_RANK_DEFAULTS: dict[str, Any] = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std", "svd": "exact"}


class GaLoreAdamW(LayerwiseOptimizer):
    """AdamW whose moments are kept for the projected gradient, in the parameter groups that have a `rank`.

    Such a group may also have `update_proj_gap` (steps between two projectors), `scale` (of the update), `proj_type` ("std":
    the shorter side is projected; "reverse_std": the longer; "left", "right", "full": both) and `svd` ("exact" or
    "randomized", which is much faster for large matrices and draws from `seed`). Its parameters must be matrices with no
    side shorter than the rank.

    `bits=8` keeps both moments in bitsandbytes' blockwise 8-bit form (it needs bitsandbytes >= 0.50 on a CPU) and the
    projector in the dtype of the weight. `layerwise`, `accumulation_steps` and `max_grad_norm`: see LayerwiseOptimizer;
    under accumulation the projector comes from the first micro-batch of the step, all else is as without `layerwise`.

    State per low-rank matrix, std, fp32: 4 R (2 max(M, D) + min(M, D)) bytes.
    """

    low_rank_defaults: ClassVar[dict[str, Any]] = LOW_RANK_DEFAULTS
    ranks_rows: ClassVar[bool] = False  # the rank counts rows, so that it may exceed the number of columns

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        bits: int = 32,
        layerwise: bool = False,
        accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        if bits not in (8, 32):
            raise ConfigError(f"bits={bits} must be 32 or 8")
        self.seed = seed
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "bits": bits}
        super().__init__(
            params, defaults, layerwise=layerwise, accumulation_steps=accumulation_steps, max_grad_norm=max_grad_norm
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "rank" in param_group:
            param_group = {**self.low_rank_defaults, **param_group}
        super().add_param_group(param_group)
        check_rank(self.param_groups[-1], of_rows=self.ranks_rows)
        if self.param_groups[-1]["bits"] == 8:
            require_8bit_kernels(self.param_groups[-1]["params"][0].device)

    def update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        compressed = self.compress(p, gradient, group, first=True)
        if compressed is not None:
            self.update_compressed(p, compressed, group)
            return
        lr, weight_decay = group["lr"], group["weight_decay"]
        in_8bit = self._moments(p, gradient, group)["exp_avg"].dtype == torch.uint8
        with self._writing(p) as weight:
            if in_8bit:
                self._adam_8bit(p, gradient.to(weight.dtype), weight, group, lr=lr, weight_decay=weight_decay)
            else:
                normalized, correction = self._adam(p, gradient, group)
                weight.mul_(1 - lr * weight_decay).add_(normalized, alpha=-lr * correction)

    def compress(self, p: Tensor, gradient: Tensor, group: dict[str, Any], *, first: bool) -> Tensor | None:
        if "rank" not in group:
            return None
        refuse_sharded(gradient)
        state = self.state[p]
        step = state.get("step", 0)
        if first and step % state.get("gap", group["update_proj_gap"]) == 0:
            seed = derive_seed(self.seed, self._index(p), step)
            found = leading_directions(gradient, group["rank"], group["proj_type"], group["svd"], seed)
            self._keep_projector(p, found, group)
        return project(gradient, self._projector(p, group))

    def update_compressed(self, p: Tensor, compressed: Tensor, group: dict[str, Any]) -> None:
        lr, scale = group["lr"], group["scale"]
        if self._moments(p, compressed, group)["exp_avg"].dtype == torch.uint8:
            step = torch.zeros_like(compressed)  # the kernel adds the update to it
            self._adam_8bit(p, compressed.contiguous(), step, group, lr=1.0, weight_decay=0.0)
            normalized, correction = step.neg_(), 1.0
        else:
            normalized, correction = self._adam(p, compressed, group)
        full = project_back(normalized.to(p.dtype), self._projector(p, group))  # M x D
        with self._writing(p) as weight:
            weight.mul_(1 - lr * group["weight_decay"]).add_(full, alpha=-lr * scale * correction)

    @contextmanager
    def _writing(self, p: Tensor) -> Iterator[Tensor]:
        """The weight that `p` stands for, to be changed in place; where it is kept in another form, it is brought back to it."""
        yield p

    def _adam(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> tuple[Tensor, float]:
        """m / (√v + ε) after this gradient, and its bias correction."""
        state, correction = self.state[p], self._move_moments(p, gradient, group)
        return state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"]), correction

    def _move_moments(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> float:
        """Take a gradient into the moments; returns the bias correction of this step."""
        state = self.state[p]
        beta1, beta2 = group["betas"]
        state["step"] += 1
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        return math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])

    def _adam_8bit(
        self, p: Tensor, gradient: Tensor, target: Tensor, group: dict[str, Any], *, lr: float, weight_decay: float
    ) -> None:
        """`target` <- AdamW step of it along `gradient`, with the moments that belong to `p`."""
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        state = self.state[p]
        state["step"] += 1
        optimizer_update_8bit_blockwise(
            "adam",
            gradient,
            target,
            state["exp_avg"],
            state["exp_avg_sq"],
            *group["betas"],
            beta3=0.0,
            alpha=0.0,
            eps=group["eps"],
            step=state["step"],
            lr=lr,
            qmap1=dynamic_map(True, p.device),
            qmap2=dynamic_map(False, p.device),
            absmax1=state["exp_avg_absmax"],
            absmax2=state["exp_avg_sq_absmax"],
            weight_decay=weight_decay,
        )

    def _moments(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of `p`, with its moments made on first use in the shape of the (low-rank) gradient."""
        state = self.state[p]
        if "exp_avg" in state:
            return state
        state["step"] = 0
        if group["bits"] == 8 and gradient.numel() >= MIN_8BIT_SIZE:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(gradient, dtype=torch.uint8)
                num_blocks = -(-gradient.numel() // BLOCK_SIZE)
                state[f"{name}_absmax"] = torch.zeros(num_blocks, dtype=torch.float32, device=gradient.device)
        else:
            dtype = torch.float32 if group["bits"] == 8 else gradient.dtype
            state["exp_avg"] = torch.zeros_like(gradient, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(gradient, dtype=dtype)
        return state

    def _keep_projector(self, p: Tensor, projector: Projector, group: dict[str, Any]) -> None:
        names = ("left", "right")
        self.state[p].update({name: side for name, side in zip(names, projector, strict=True) if side is not None})

    def _projector(self, p: Tensor, group: dict[str, Any]) -> Projector:
        return self.state[p].get("left"), self.state[p].get("right")

    def _index(self, p: Tensor) -> int:
        """The place of `p` among all parameters: the same in every process and after a restart."""
        everything = (q for group in self.param_groups for q in group["params"])
        return next(i for i, q in enumerate(everything) if q is p)


def check_rank(group: dict[str, Any], *, of_rows: bool = False) -> None:
    """ConfigError where the `rank` of a parameter group does not fit its parameters: their rows, or their shorter side."""
    rank = group.get("rank")
    if rank is None:
        return
    if rank < 1:
        raise ConfigError(f"rank={rank} must be at least 1")
    names = group.get("param_names") or [""] * len(group["params"])
    for name, p in zip(names, group["params"], strict=True):
        label = f"{name} of shape {tuple(p.shape)}" if name else f"a parameter of shape {tuple(p.shape)}"
        if p.ndim != 2:
            raise ConfigError(f"rank={rank}: {label} is not a matrix; leave it to a group without a rank")
        largest, side = (p.shape[0], "number of rows") if of_rows else (min(p.shape), "shorter side")
        if largest < rank:
            raise ConfigError(f"rank={rank} is larger than the {side} of {label}; choose at most {largest}")
