"""Weights kept as they are, in one floating-point type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from velora.group import Weights

if TYPE_CHECKING:
    from torch import nn

    from velora.config import Config

_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Dense(Weights):
    """All weights in `dtype`. Weights that train are kept in it too: no float32 master copy is made.

    Only parameters change. Buffers stay, because some of them need their precision (the rotary frequencies of a LLaMA).
    """

    kind: Literal["dense"]
    dtype: Literal["fp32", "bf16", "fp16"]

    def problems(self, config: Config) -> Iterator[str]:
        if self.dtype == config.trainer.precision == "fp16" and getattr(config.adapter, "trains_base_weights", False):
            yield (
                "weights.dtype=fp16 with trainer.precision=fp16: loss scaling needs the trained weights in fp32; set "
                "weights.dtype=fp32 (mixed precision) or trainer.precision=fp32 (everything in fp16)"
            )

    def load_options(self) -> dict[str, Any]:
        import torch

        return {"dtype": getattr(torch, _TORCH_NAMES[self.dtype])}

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        dtype = self.load_options()["dtype"]
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        return model
