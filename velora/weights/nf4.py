"""Frozen weights in four bits (QLoRA); see `velora/nn/quantised.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from velora.errors import ConfigError
from velora.group import Weights
from velora.weights._cast import FloatName, cast_parameters, torch_dtype

if TYPE_CHECKING:
    from torch import nn

    from velora.config import Config


class NF4(Weights):
    """All linear layers of the backbone in four bits; embeddings, norms and the head stay dense, in `dtype`.

    The dense network is built (or loaded) in `dtype` first and then quantised layer by layer, so random weights and any
    family work, and the CPU's memory must hold the dense network once.
    """

    kind: Literal["nf4"]
    quant_type: Literal["nf4", "fp4"]
    double_quant: bool
    dtype: FloatName
    compute_dtype: FloatName | None
    quantised: ClassVar[bool] = True

    def problems(self, config: Config) -> Iterator[str]:
        if config.adapter.trains_base_weights:
            yield (
                f"weights=nf4 with adapter={config.adapter.kind}: weights in four bits do not train; "
                "choose an adapter that leaves them frozen (adapter=lora) or weights=dense"
            )

    def load_options(self) -> dict[str, Any]:
        return {"dtype": torch_dtype(self.dtype)}

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        from velora.head import head_names
        from velora.nn.quantised import quantise_model

        cast_parameters(model, torch_dtype(self.dtype))
        num_layers = quantise_model(
            model,
            keep=head_names(model),
            quant_type=self.quant_type,
            double_quant=self.double_quant,
            compute_dtype=torch_dtype(self.compute_dtype or self.dtype),
            use_gpu=config.trainer.device != "cpu",
        )
        if num_layers == 0:
            raise ConfigError(f"weights=nf4: model={config.model.name} has no linear layer outside its head")
        return model
