"""How the weights are kept (the axis `weights`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from velora.config.parts import Weights
from velora.config.processes import num_processes
from velora.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from velora.config.run import Config


FloatName = Literal["fp32", "bf16", "fp16"]
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def torch_dtype(name: FloatName) -> torch.dtype:
    import torch

    return getattr(torch, _TORCH_NAMES[name])


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all floating-point parameters in place; shared ones stay shared.

    Buffers stay, because some of them need their precision (the rotary frequencies of a LLaMA), and so do a batch norm's
    parameters, which must have the type of its running mean.
    """
    from velora.nn.blocks import BATCH_NORMS

    norms = {id(p) for module in model.modules() if isinstance(module, BATCH_NORMS) for p in module.parameters()}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in norms:
            parameter.data = parameter.data.to(dtype)


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


class Int8(Weights):
    """Trained linear layers of the backbone in eight bits; embeddings, norms, biases and the head stay dense, in `dtype`, which is
    also that of the products and gradients of the others. The network is built or loaded in `dtype` first.
    """

    kind: Literal["int8"]
    dtype: FloatName

    def problems(self, config: Config) -> Iterator[str]:
        if not config.adapter.trains_base_weights:
            yield (
                f"weights=int8 with adapter={config.adapter.kind}: int8 weights are there to be trained, and here they are frozen; "
                "use weights=nf4, which keeps frozen weights in half of that, or adapter=full"
            )
        elif not config.optimizer.trains_int8:
            yield (
                f"weights=int8 with optimizer={config.optimizer.kind}: only Q-GaLore rounds an updated weight back to eight bits; "
                "use optimizer=q_galore or weights=dense"
            )
        if self.dtype == config.trainer.precision == "fp16":
            yield (
                "weights.dtype=fp16 with trainer.precision=fp16: loss scaling needs gradients in fp32; set weights.dtype=fp32 "
                "(mixed precision) or trainer.precision=fp32 (everything in fp16)"
            )
        if num_processes() > 1:
            yield (
                f"weights=int8 in {num_processes()} processes: what stands for an int8 weight cannot be sent to the others; "
                "train in one process, or use weights=dense"
            )
        if config.trainer.compile:
            yield "trainer.compile=true with weights=int8 is not supported; set trainer.compile=false or weights=dense"

    def load_options(self) -> dict[str, Any]:
        return {"dtype": torch_dtype(self.dtype)}

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        from velora.nn.head import head_names
        from velora.nn.int8 import Int8Linear
        from velora.nn.quantised import quantise_model
        from velora.nn.swap import bare_layers

        dtype = torch_dtype(self.dtype)
        keep = [*head_names(model), *bare_layers(model)]
        if not quantise_model(model, keep=keep, quantise=lambda _name, linear: Int8Linear(linear, dtype)):
            raise ConfigError(
                f"weights=int8: model={config.model.name} has no linear layer outside its head; use weights=dense"
            )
        cast_parameters(model, dtype)
        return model


class NF4(Weights):
    """All linear layers of the backbone in four bits; embeddings, norms and the head stay dense, in `dtype`.

    A checkpoint of a language model in safetensors is quantised as it is read (velora/models/quantised.py). Any other network is
    built or loaded in `dtype` first and then quantised layer by layer; the CPU's memory must hold that dense network once.
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
        return {"dtype": self.dense_dtype()}

    def dense_dtype(self) -> torch.dtype:
        """Of everything that is not quantised."""
        return torch_dtype(self.dtype)

    def quantisation(self, config: Config) -> dict[str, Any]:
        """Keyword arguments of `quantise_linear`."""
        return {
            "quant_type": self.quant_type,
            "double_quant": self.double_quant,
            "compute_dtype": torch_dtype(self.compute_dtype or self.dtype),
            "use_gpu": config.trainer.device != "cpu",
        }

    def quantiser(self, model: nn.Module, config: Config) -> Callable[[str, nn.Linear], nn.Module]:
        """What brings a linear layer of `model`, which is called by a name, to four bits; the adapter may have a say."""
        return partial(config.adapter.quantiser(model, config), **self.quantisation(config))

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        from velora.nn.head import head_names
        from velora.nn.quantised import is_quantised, quantise_model
        from velora.nn.swap import bare_layers

        cast_parameters(model, self.dense_dtype())
        keep = [*head_names(model), *bare_layers(model)]
        quantise_model(model, keep=keep, quantise=self.quantiser(model, config))
        if not any(is_quantised(module) for module in model.modules()):
            raise ConfigError(f"weights=nf4: model={config.model.name} has no linear layer outside its head")
        return model
