"""timm's fused query, key and value layer, taken apart into three.

One product of (B, N, D) with a (3 M x D) weight and three with (M x D) weights are the same numbers up to rounding, but an
adapter or VeLoRA can stand on one of the three only. Saved weights stay timm's: as long as the three are plain layers,
the state dict has one `weight` (3 M x D) and one `bias` (3 M), and reads them.

Shapes: B sequences, N tokens, D input features, M output features of each of the three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from velora.errors import ConfigError
from velora.nn.int8 import Int8Linear
from velora.nn.quantised import is_quantised

PARTS = ("query", "key", "value")


class SplitQKV(nn.Module):
    """Three linear layers whose outputs stand side by side: (B, N, D) -> (B, N, 3 M), as from the fused layer."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        weights = fused.weight.detach().chunk(3)  # (3 M, D) -> 3 x (M, D)
        biases = (None,) * 3 if fused.bias is None else fused.bias.detach().chunk(3)
        for name, weight, bias in zip(PARTS, weights, biases, strict=True):
            self.add_module(name, _linear(weight, bias, fused))
        self.register_state_dict_post_hook(_fuse)
        self.register_load_state_dict_pre_hook(_take_apart)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in PARTS], dim=-1)


def split_qkv(model: nn.Module) -> None:
    """Put a SplitQKV in the place of every fused layer of a timm network; ConfigError where there is none."""
    attentions = [module for module in model.modules() if type(getattr(module, "qkv", None)) is nn.Linear]
    if not attentions:
        raise ConfigError(
            f"model.split_qkv=true: {type(model).__name__} has no fused layer `qkv` to take apart; set model.split_qkv=false"
        )
    for attention in attentions:
        attention.qkv = SplitQKV(attention.qkv)  # type: ignore[arg-type]


def _linear(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=like.weight.requires_grad)
    if bias is not None:
        assert like.bias is not None
        linear.bias = nn.Parameter(bias.clone(), requires_grad=like.bias.requires_grad)
    return linear.train(like.training)


def _fused_keys(module: nn.Module) -> list[str]:
    """Names of the parameters that are one in timm's network; none where a part is quantised or holds an adapter."""
    parts = [getattr(module, name) for name in PARTS]
    if not all(_has_dense_state(part) for part in parts):
        return []
    return ["weight"] if parts[0].bias is None else ["weight", "bias"]


def _has_dense_state(part: nn.Module) -> bool:
    if isinstance(part, Int8Linear):
        return part.state_is_dense
    return isinstance(part, nn.Linear) and not is_quantised(part)


def _fuse(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for key in _fused_keys(module):
        state[prefix + key] = torch.cat([state.pop(f"{prefix}{name}.{key}") for name in PARTS])


def _take_apart(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in _fused_keys(module):
        if prefix + key in state:
            for name, part in zip(PARTS, state.pop(prefix + key).chunk(3), strict=True):
                state[f"{prefix}{name}.{key}"] = part
