"""FLoRA: momentum and accumulated gradients as random sketches that are drawn anew (Hao et al. 2024, arXiv 2402.03293).

Legend: M rows (out-features), D columns (in-features), R rank, A (R x min(M, D)) with independent N(0, 1/R) entries, so that
E[Aᵀ A] = 1. Written for M < D; otherwise A stands on the right. Base optimiser: Adafactor (Shazeer and Stern 2018, arXiv
1804.04235), with U the gradient over the root of its factored second moment:

    algorithm 2, momentum:      every kappa steps  M̃ <- A' (Aᵀ M̃), A <- A'            a new sketch, the old momentum moved to it
                                M̃ <- beta1 M̃ + (1 - beta1) A U                        R x D
                                W <- W - lr Aᵀ M̃
    algorithm 1, accumulation:  C <- C + B G for each micro-batch, then Bᵀ C in place of the sum of G; a new B for each step

In algorithm 2 the present gradient passes through the sketch as well, which for R much smaller than M is mostly noise. The
authors' programs (the package flora-opt, which made the paper's tables) sketch only the past: W <- W - lr ((1 - beta1) U +
beta1 Aᵀ M̃) with M̃ before this step. That is `sketched="past"`, the default; "all" is algorithm 2 as printed.

Parameter groups with a key `rank` are treated so; the others get Adafactor with a momentum of full size. Only the seed of A
is kept, never A. `beta1=None` means no momentum, and then nothing is sketched but the accumulated gradient.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from velora.errors import ConfigError
from velora.optim.galore import check_rank
from velora.optim.layerwise import LayerwiseOptimizer, refuse_sharded
from velora.optim.subspace import derive_seed, sketch, unsketch


class Flora(LayerwiseOptimizer):
    """Adafactor with sketched momentum, in the parameter groups that have a `rank` (matrices, no side shorter than it).

    `kappa` is the number of steps that one sketch serves. `eps` regularises the squared gradient and the scale of the
    parameter; `clip_threshold` bounds the root mean square of an update; `decay_rate` sets the second moment's
    beta2 = 1 - t^decay_rate; `scale_parameter` multiplies the learning rate by the root mean square of the parameter.
    The defaults are those of flora-opt, except `beta1`, whose default there (None) leaves plain Adafactor.

    With `layerwise` and `accumulation_steps` > 1 the gradients of several micro-batches accumulate as a sketch (algorithm 1);
    see LayerwiseOptimizer for these two and for `max_grad_norm`.

    The state is in fp32 (fp64 for fp64 weights); per matrix with a rank: 4 (R max(M, D) + M + D) bytes, and two seeds.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        beta1: float | None = 0.9,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        kappa: int = 1000,
        sketched: Literal["past", "all"] = "past",
        *,
        layerwise: bool = False,
        accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        if sketched not in ("past", "all"):
            raise ConfigError(f"sketched={sketched} must be past or all")
        if kappa < 1:
            raise ConfigError(f"kappa={kappa} must be at least 1")
        self.seed = seed
        defaults = {
            "lr": lr,
            "beta1": beta1,
            "eps": tuple(eps),
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "kappa": kappa,
            "sketched": sketched,
        }
        super().__init__(
            params, defaults, layerwise=layerwise, accumulation_steps=accumulation_steps, max_grad_norm=max_grad_norm
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_rank(group)
        if "rank" in group:
            index = sum(len(g["params"]) for g in self.param_groups[:-1])
            for i, p in enumerate(group["params"], start=index):
                self.state[p]["seed"] = derive_seed(self.seed, i, 0)
                self.state[p]["accumulation_seed"] = derive_seed(self.seed, i, 1)

    def update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if gradient.dtype in (torch.float16, torch.bfloat16):
            gradient = gradient.float()
        state["step"] = state.get("step", 0) + 1
        update = _over_second_moment(state, gradient, 1 - state["step"] ** group["decay_rate"], group["eps"][0])
        if group["beta1"]:
            update = self._with_momentum(p, update, group)
        weight = p.to(gradient.dtype)
        lr = group["lr"]
        if group["scale_parameter"]:
            lr = lr * _rms(weight).clamp(min=group["eps"][1])
        update = update / (_rms(update) / group["clip_threshold"]).clamp(min=1.0)
        p.copy_(weight * (1 - group["weight_decay"] * lr) - lr * update)

    def compress(self, p: Tensor, gradient: Tensor, group: dict[str, Any], *, first: bool) -> Tensor | None:
        if "rank" not in group:
            return None
        return sketch(gradient, group["rank"], self.state[p]["accumulation_seed"])

    def update_compressed(self, p: Tensor, compressed: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        gradient = unsketch(compressed, p.shape, group["rank"], state["accumulation_seed"])  # M x D
        state["accumulation_seed"] = derive_seed(state["accumulation_seed"])
        self.update(p, gradient, group)

    def _with_momentum(self, p: Tensor, update: Tensor, group: dict[str, Any]) -> Tensor:
        """The M x D direction after momentum; advances the momentum by `update`."""
        state, beta1 = self.state[p], group["beta1"]
        if "rank" not in group:
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(update)
            return state["exp_avg"].mul_(beta1).add_(update, alpha=1 - beta1).clone()
        refuse_sharded(update)
        rank, past = group["rank"], None
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(sketch(update, rank, state["seed"]))
        if group["sketched"] == "past":
            past = unsketch(state["exp_avg"], update.shape, rank, state["seed"])
        if state["step"] % group["kappa"] == 0:
            full = unsketch(state["exp_avg"], update.shape, rank, state["seed"])
            state["seed"] = derive_seed(state["seed"])
            state["exp_avg"].copy_(sketch(full, rank, state["seed"]))
        state["exp_avg"].mul_(beta1).add_(sketch(update, rank, state["seed"]), alpha=1 - beta1)
        if past is not None:
            return past.mul_(beta1).add_(update, alpha=1 - beta1)
        return unsketch(state["exp_avg"], update.shape, rank, state["seed"])


def _over_second_moment(state: dict[str, Any], gradient: Tensor, beta2: float, eps: float) -> Tensor:
    """G / √V̂ (Adafactor, algorithm 4); V̂ is the outer product of row and column means for a matrix, and full for a vector."""
    squared = gradient.square().add_(eps)
    if gradient.ndim < 2:
        if "exp_avg_sq" not in state:
            state["exp_avg_sq"] = torch.zeros_like(gradient)
        return gradient * state["exp_avg_sq"].mul_(beta2).add_(squared, alpha=1 - beta2).rsqrt()
    rows, columns = squared.mean(dim=-1), squared.mean(dim=-2)
    if "exp_avg_sq_row" not in state:
        state["exp_avg_sq_row"], state["exp_avg_sq_col"] = torch.zeros_like(rows), torch.zeros_like(columns)
    row = state["exp_avg_sq_row"].mul_(beta2).add_(rows, alpha=1 - beta2)  # M
    column = state["exp_avg_sq_col"].mul_(beta2).add_(columns, alpha=1 - beta2)  # D
    row_factor = (row / row.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1)
    return gradient * row_factor * column.rsqrt().unsqueeze(-2)


def _rms(tensor: Tensor) -> Tensor:
    return tensor.norm() / tensor.numel() ** 0.5
