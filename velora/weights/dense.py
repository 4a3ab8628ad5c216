"""Weights kept as they are, in one floating-point type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from velora.group import Weights
from velora.weights._cast import FloatName, cast_parameters, torch_dtype

if TYPE_CHECKING:
    from torch import nn

    from velora.config import Config


class Dense(Weights):
    """All weights in `dtype`. Weights that train are kept in it too: no float32 master copy is made."""

    kind: Literal["dense"]
    dtype: FloatName

    def problems(self, config: Config) -> Iterator[str]:
        if self.dtype == config.trainer.precision == "fp16" and config.adapter.trains_base_weights:
            yield (
                "weights.dtype=fp16 with trainer.precision=fp16: loss scaling needs the trained weights in fp32; set "
                "weights.dtype=fp32 (mixed precision) or trainer.precision=fp32 (everything in fp16)"
            )

    def load_options(self) -> dict[str, Any]:
        return {"dtype": torch_dtype(self.dtype)}

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        cast_parameters(model, torch_dtype(self.dtype))
        return model
