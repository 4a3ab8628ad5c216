"""Floating-point types by their short names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

FloatName = Literal["fp32", "bf16", "fp16"]
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def torch_dtype(name: FloatName) -> torch.dtype:
    import torch

    return getattr(torch, _TORCH_NAMES[name])


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all floating-point parameters in place; shared ones stay shared.

    Buffers stay, because some of them need their precision (the rotary frequencies of a LLaMA).
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
