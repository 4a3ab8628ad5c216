"""Q-GaLore: GaLore with a projector in four bits that is made anew only where it still turns (Zhang et al. 2024, arXiv 2407.08296).

Legend: M rows (out-features), D columns (in-features), R rank. GaLore's algorithm (`velora/optim/galore.py`) with 8-bit moments and

    P is kept as int4, groups of 256 with a scale and a zero point (`velora/nn/grouped.py`); every product has the rounded P
    at each new P:  c = cos(first singular vector of the P before, that of this one), into the matrix's queue of the last 5
                    queue full and its mean >= 0.4:  gap <- 2 gap, of this matrix

    W, in the layers that have it in int8 (`velora/nn/int8.py`), is rounded by chance at each step

A new P is made where the number of steps so far is a multiple of the matrix's gap. The queue is not emptied when the gap doubles,
so a matrix that stays calm doubles its gap at each further P, without an upper limit: so it is in the authors' package
(q-galore-torch 1.0), and so here. The cosine is that of the vectors before rounding, as there.

Where this differs from the package:

- its int4 codes lie unpacked, one in a byte, with scales and zero points in the dtype of the gradient; here two lie in a byte,
  scales are fp32 and zero points a byte. The codes are the same but in a group whose entries have one sign, see `grouped.py`.
- it takes the cosine with its sign, but a singular vector has none: G and -G have the same projector and any SVD may turn a
  vector round, which there counts as "has changed entirely". Here it is |c|.
- its projector and its queue are lost on resume, or must be unpickled; here they are part of the state dict.
- weight decay, ε, accumulation and the layer-wise form: as `galore.py` says. (In the package's script the layer-wise form counts
  each step twice, its authors note, and doubles gap and schedule to make up for it.)
- its step fails with bitsandbytes of today (0.50), so that what the tests compare with is its projector.

The paper's text has the cosine of whole projectors stay at 0.4 or more over the last intervals; first vectors and the mean are the
package's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from velora.errors import ConfigError
from velora.nn.grouped import Grouped, dequantise, quantise
from velora.nn.int8 import Int8Linear
from velora.optim.galore import LOW_RANK_DEFAULTS, GaLoreAdamW
from velora.optim.subspace import Projector, derive_seed, from_rank_zero

GAP_FACTOR = 2
_SIDES, _PARTS = ("left", "right"), ("codes", "scale", "zero")


class QGaLoreAdamW(GaLoreAdamW):
    """GaLoreAdamW whose projectors are kept in four bits, each made anew at a gap that grows while it does not turn.

    Beside GaLoreAdamW's keys, a parameter group with a `rank` may have `cos_threshold` (None: the gap stays what it is) and
    `queue_size`. `proj_type` is "std".

    `int8` says which parameters stand for weights in eight bits, and which layers have these (`int8_layers(model)`): a step
    makes such a weight in fp32, moves it and has it rounded by chance, drawn from `seed`, the parameter's place and its step.
    The other arguments are GaLoreAdamW's.

    State per low-rank matrix, with S = min(M, D) and L = max(M, D): R S / 2 bytes of codes and 5 for each 256 of them, the S
    numbers of the first singular vector, and the moments: 2 R L bytes and 8 for each 256 of them, or 8 R L with `bits=32`.
    """

    low_rank_defaults: ClassVar[dict[str, Any]] = {**LOW_RANK_DEFAULTS, "cos_threshold": 0.4, "queue_size": 5}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bits: int = 8,
        int8: Mapping[Tensor, Int8Linear] | None = None,
        **options: Any,
    ) -> None:
        self.int8 = dict(int8 or {})
        super().__init__(params, lr, betas, eps, weight_decay, bits=bits, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if "rank" not in group:
            return
        if group["proj_type"] != "std":
            raise ConfigError(f"proj_type={group['proj_type']} must be std: Q-GaLore projects the shorter side")
        if group["queue_size"] < 1:
            raise ConfigError(f"queue_size={group['queue_size']} must be at least 1")

    @contextmanager
    def _writing(self, p: Tensor) -> Iterator[Tensor]:
        if p not in self.int8:
            yield p
            return
        layer = self.int8[p]
        weight = layer.dense(layer.weight_scale.dtype)  # M x D
        yield weight
        seed = derive_seed(self.seed, self._index(p), self.state[p]["step"], 8)  # not that of a randomised SVD
        layer.write(weight, torch.Generator(p.device).manual_seed(seed))

    def _keep_projector(self, p: Tensor, projector: Projector, group: dict[str, Any]) -> None:
        state = self.state[p]
        left, right = projector
        if group["cos_threshold"] is not None:
            first = left[:, 0] if left is not None else right[0]  # type: ignore[index]  # one of the two is there
            _adapt_gap(state, first.clone(), group)
        for side, matrix in zip(_SIDES, projector, strict=True):
            if matrix is not None:
                state.update({f"{side}_{name}": part for name, part in zip(_PARTS, quantise(matrix, 4), strict=True)})

    def _projector(self, p: Tensor, group: dict[str, Any]) -> Projector:
        shapes = ((p.shape[0], group["rank"]), (group["rank"], p.shape[1]))
        left, right = (
            _unpacked(self.state[p], side, shape, p.dtype) for side, shape in zip(_SIDES, shapes, strict=True)
        )
        return left, right


def _unpacked(state: dict[str, Any], side: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    if f"{side}_codes" not in state:
        return None
    return dequantise(Grouped(*(state[f"{side}_{name}"] for name in _PARTS)), 4, shape, dtype)


def _adapt_gap(state: dict[str, Any], first: Tensor, group: dict[str, Any]) -> None:
    """Enter the cosine with the vector before into the queue, and double the gap where its mean says so."""
    before = state.get("first_direction")
    state["first_direction"] = first
    if before is None:
        return
    wide = torch.promote_types(first.dtype, torch.float32)
    cosine = F.cosine_similarity(first.to(wide), before.to(wide), dim=0).abs()
    queue = [*state.get("cosines", []), float(from_rank_zero(cosine))][-group["queue_size"] :]
    state["cosines"] = queue
    if len(queue) == group["queue_size"] and sum(queue) / len(queue) >= group["cos_threshold"]:
        state["gap"] = GAP_FACTOR * state.get("gap", group["update_proj_gap"])
