"""Grass on VeLoRA's factor of the gradient: gradient and moments have S times fewer numbers, and the full gradient never exists.

While the direction v of a VeLoRA layer stays what it is, every gradient of its weight is G = C ⊗ v with C = dyᵀ z (M x D/S, see
`velora/nn/linear.py`). Grass (`velora/optim/grass.py`) needs no more of G than C and v:

    |g_i| = |C_i| |v|                        the rows to pick, at a refresh
    Pᵀ G  = (ρ dy[:, rows])ᵀ z ⊗ v           the picked rows: picked from dy, before the product
    m     = m_C ⊗ v,   s = s_C ⊗ v²          Adam's moments of Pᵀ G, both linear in their summands: those of Pᵀ C are kept
    N     = m_C v / (√s_C |v| + ε)           R x D, for the update only

That is the trajectory of GrassAdamW on the same gradients, ε included, up to rounding.

Legend: N tokens, M rows (out-features), D columns (in-features), S sub-token size, G = D/S groups, R rank.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from velora.config.optimizer import ONE_DIRECTION
from velora.errors import ConfigError
from velora.nn.linear import VeloraLinear
from velora.nn.projection import sum_over_tokens
from velora.optim.grass import GrassAdamW


class FactoredGrassAdamW(GrassAdamW):
    """GrassAdamW that takes the gradients of VeLoRA's linear layers in their factored form; `layerwise` must be true.

    Call `take_factors(model)` once, after `apply_velora`. Weights that belong to no such layer, and layers that calibration has
    passed by, are treated as by GrassAdamW. A layer may run once in each forward.

    State per matrix in factored form, fp32: 8 R (D/S + 1) bytes, S numbers of v, and 4 R bytes for the scales of "sampled".

    Raises ConfigError where `layerwise` is false: a factor is handed over inside the backward pass, and is in no `p.grad`.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        if not options.get("layerwise"):
            raise ConfigError(
                "FactoredGrassAdamW needs layerwise=True: factors are handed over inside the backward pass"
            )
        super().__init__(params, **options)

    def take_factors(self, model: nn.Module) -> int:
        """Have the VeLoRA layers of `model` whose weights have a rank hand over factors; returns their number.

        Raises ConfigError where there is none, or where one's direction moves: its moments hold for one direction only.
        """
        twins = [m for m in model.modules() if isinstance(m, VeloraLinear) and self._has_rank(m.weight)]
        if not twins:
            raise ConfigError(
                "optimizer.factored=true: none of the layers with a rank is a VeLoRA linear layer; name one in both "
                "optimizer.layers and activations.layers, or set optimizer.factored=false"
            )
        if any(twin.init == "running_average" for twin in twins):
            raise ConfigError(ONE_DIRECTION)
        shared = [twin for twin in twins if sum(twin.weight is other.weight for other in twins) > 1]
        if shared:
            raise ConfigError(
                f"optimizer.factored=true: {len(shared)} VeLoRA layers share a weight of shape {tuple(shared[0].weight.shape)}, "
                "whose gradient has more than one direction; set optimizer.factored=false"
            )
        for twin in twins:
            twin.factor_taker = _Taker(self, twin.weight)
        return len(twins)

    def remove_hooks(self) -> None:
        super().remove_hooks()
        self._group_of.clear()  # so that the layers make gradients again

    def update_compressed(self, p: Tensor, compressed: Tensor, group: dict[str, Any]) -> None:
        super().update_compressed(p, compressed.to(p.dtype), group)

    def _has_rank(self, p: Tensor) -> bool:
        return p in self._group_of and "rank" in self.param_groups[self._group_of[p]]

    @torch.no_grad()
    def on_factor(self, p: Tensor, dy: Tensor, z: Tensor, v: Tensor) -> bool:
        """What a hook on the gradient of `p` does, for the gradient dyᵀ z ⊗ v of dy (N, M), z (N, G) and v (S).

        False where this optimiser no longer trains `p`; nothing has happened then.
        """
        if p not in self._group_of:
            return False
        if self._squared_norms is not None:
            self._squared_norms.append(sum_over_tokens(dy, z).square().sum() * v.square().sum())
            return True
        group, state = self.param_groups[self._group_of[p]], self.state[p]
        picks = p not in self._arrivals and self._is_due(p, group)
        num_rows = dy.shape[1] if picks else group["rank"]
        _, count = self._arrival(p, num_rows * z.shape[1] * torch.promote_types(z.dtype, torch.float32).itemsize)
        if picks:
            full = sum_over_tokens(dy, z)  # M x G
            self._pick_anew(p, full, group)
            state["v"] = v.to(full.dtype, copy=True)
            factor = full.index_select(0, state["rows"])  # R x G
        else:
            factor = sum_over_tokens(dy.index_select(1, state["rows"]), z)
        for scale in (state.get("rho"), self._factor):
            if scale is not None:
                factor.mul_(scale)
        self._keep(p, factor, first=count == 1)
        if count == self.accumulation_steps:
            self._apply(p, group)
        return True

    def _adam(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> tuple[Tensor, float]:
        """m / (√s + ε), R x D, of the factor R x G."""
        state = self.state[p]
        if "v" not in state:
            return GrassAdamW._adam(self, p, gradient, group)
        correction, v = self._move_moments(p, gradient, group), state["v"]
        spread = state["exp_avg_sq"].sqrt().unsqueeze(-1) * v.abs()  # (R, G, S)
        return (state["exp_avg"].unsqueeze(-1) * v).div_(spread.add_(group["eps"])).flatten(1), correction


class _Taker:
    """Hands the factors of one weight to an optimiser, which it does not keep alive; a copy of the layer has none."""

    def __init__(self, optimizer: FactoredGrassAdamW, p: Tensor) -> None:
        self.optimizer, self.parameter = weakref.ref(optimizer), weakref.ref(p)

    def __call__(self, dy: Tensor, z: Tensor, v: Tensor) -> bool:
        optimizer, p = self.optimizer(), self.parameter()
        return optimizer is not None and p is not None and optimizer.on_factor(p, dy, z, v)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()
