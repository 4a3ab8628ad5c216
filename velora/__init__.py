"""VeLoRA: memory-efficient training with rank-1 sub-token projections (arXiv 2405.17991).

`import velora` is light; the names below import torch when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from velora.config.compose import compose
    from velora.nn.adapter_state import load_adapter, merge_adapter, save_adapter
    from velora.nn.apply import apply_velora, calibrate, remove_velora, update_directions
    from velora.nn.conv import VeloraConv1d, VeloraConv2d, VeloraConv3d
    from velora.nn.lean import apply_lean, remove_lean
    from velora.nn.linear import VeloraLinear
    from velora.nn.linear_loss import linear_cross_entropy
    from velora.nn.scale_shift import VeloraScaleShift
    from velora.run.run import train

__version__ = "0.1.0"

_HOME = {
    "compose": "velora.config.compose",
    "train": "velora.run.run",
    "apply_velora": "velora.nn.apply",
    "calibrate": "velora.nn.apply",
    "remove_velora": "velora.nn.apply",
    "update_directions": "velora.nn.apply",
    "apply_lean": "velora.nn.lean",
    "remove_lean": "velora.nn.lean",
    "linear_cross_entropy": "velora.nn.linear_loss",
    "VeloraConv1d": "velora.nn.conv",
    "VeloraConv2d": "velora.nn.conv",
    "VeloraConv3d": "velora.nn.conv",
    "VeloraLinear": "velora.nn.linear",
    "VeloraScaleShift": "velora.nn.scale_shift",
    "load_adapter": "velora.nn.adapter_state",
    "merge_adapter": "velora.nn.adapter_state",
    "save_adapter": "velora.nn.adapter_state",
}

__all__ = [
    "VeloraConv1d",
    "VeloraConv2d",
    "VeloraConv3d",
    "VeloraLinear",
    "VeloraScaleShift",
    "__version__",
    "apply_lean",
    "apply_velora",
    "calibrate",
    "compose",
    "linear_cross_entropy",
    "load_adapter",
    "merge_adapter",
    "remove_lean",
    "remove_velora",
    "save_adapter",
    "train",
    "update_directions",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'velora' has no attribute {name!r}")
