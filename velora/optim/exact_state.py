"""A state dict that loads as it was saved.

`torch.optim.Optimizer.load_state_dict` casts every floating-point or integer tensor of the state to the dtype of its
parameter. Moments that are kept in fp32 beside bf16 weights lose half their digits that way, and 8-bit moments stop
being 8-bit. A run that continues from a checkpoint then differs from the one that was not interrupted.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch


class ExactState(torch.optim.Optimizer):
    """Mixed in before an optimiser's class: `load_state_dict` moves tensors to the parameter's device and changes nothing else."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, p in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[p][name] = value.to(p.device, copy=True)
