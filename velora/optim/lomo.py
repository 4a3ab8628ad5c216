"""LOMO: stochastic gradient descent fused with the backward pass (Lv et al. 2023, arXiv 2306.09782, algorithm 1).

    W <- W (1 - lr·weight_decay) - lr·G        inside the backward pass, as soon as G is complete; then G is freed

There is no optimiser state, and at any time one gradient. The package lomo-optim is not used: it is not an optimiser that a
trainer can drive (own backward call, `step()` does nothing, the learning rate is passed by hand), it walks over all
parameters at each gradient, and accumulation is not possible to detect there.

Clipping: by value inside the pass (`max_grad_value`), or by the norm of all gradients at the price of a second backward pass
(`max_grad_norm`, see `LayerwiseOptimizer.measure_norm`), as the paper proposes. Half-precision weights are updated in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from velora.errors import ConfigError
from velora.optim.layerwise import LayerwiseOptimizer


class Lomo(LayerwiseOptimizer):
    """SGD without momentum whose updates happen in the backward pass. One backward pass is one step: accumulation would need the
    gradients that this method does not keep, and a second backward pass before `step()` is an error.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
    ) -> None:
        if max_grad_norm is not None and max_grad_value is not None:
            raise ConfigError(
                f"max_grad_norm={max_grad_norm} and max_grad_value={max_grad_value}: give at most one of them"
            )
        defaults = {"lr": lr, "weight_decay": weight_decay, "max_grad_value": max_grad_value}
        super().__init__(params, defaults, layerwise=True, max_grad_norm=max_grad_norm)

    def update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        half = p.dtype in (torch.float16, torch.bfloat16)
        weight, gradient = (p.float(), gradient.float()) if half else (p, gradient)
        if group["max_grad_value"] is not None:
            gradient = gradient.clamp(-group["max_grad_value"], group["max_grad_value"])
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(gradient, alpha=-group["lr"])
        if half:
            p.copy_(weight)
