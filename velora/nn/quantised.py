"""Frozen linear layers in four bits, and back.

bitsandbytes keeps a weight (M x D) as M*D/2 bytes of codes plus one scale for each block of 64 weights; with double
quantisation the scales are themselves 8-bit codes (QLoRA, arXiv 2305.14314, section 3). The forward dequantises the
weight into the compute dtype and multiplies; the input of a frozen layer is not kept for backward, only the codes are.

Shapes: D input features, M output features.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

from velora.errors import ConfigError


def _bitsandbytes():  # type: ignore[no-untyped-def]
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"weights=nf4 needs the package bitsandbytes ({error}); pip install bitsandbytes, or choose weights=dense"
        ) from None
    return bitsandbytes


def is_quantised(module: nn.Module) -> bool:
    """Whether a module keeps its weight in four bits."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None


def own_gpu(environment: Mapping[str, str], num_visible: int) -> int | None:
    """Which of the visible CUDA devices this process works on; None where there is none.

    torchrun numbers the processes of a machine in LOCAL_RANK, and Trainer takes that device, though only after the
    network was built. Where each process sees one device of its own, or without torchrun, it is the current one.
    """
    if not num_visible:
        return None
    rank = environment.get("LOCAL_RANK", "")
    return int(rank) if rank.isdecimal() and int(rank) < num_visible else torch.cuda.current_device()


def worker_for(home: torch.device, use_gpu: bool) -> torch.device:
    """Where work on a weight is done that lies on `home`: the process's own CUDA device if it may, else there."""
    index = own_gpu(os.environ, torch.cuda.device_count()) if use_gpu else None
    return home if index is None else torch.device("cuda", index)


def quantise_linear(
    linear: nn.Linear,
    *,
    quant_type: str = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype,
    use_gpu: bool = True,
) -> nn.Linear:
    """A bitsandbytes Linear4bit with the same weight, on the device where the weight was; the bias is shared.

    With `use_gpu` the process's own CUDA device, where there is one, does the work, since seven billion weights take
    minutes on a CPU.

    Errors: ConfigError where bitsandbytes is missing.
    """
    bnb = _bitsandbytes()
    layer = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=compute_dtype,
        compress_statistics=double_quant, quant_type=quant_type, device="meta",
    )  # fmt: skip
    weight = bnb.nn.Params4bit(
        linear.weight.detach(),  # (M, D)
        requires_grad=False, compress_statistics=double_quant, quant_type=quant_type, module=layer,
    )  # fmt: skip
    if linear.weight.is_meta:  # an estimate: codes and scales of the right sizes, which `to` would not make
        layer.weight = weight._quantize(linear.weight.device)
    else:
        layer.weight = weight.to(worker_for(linear.weight.device, use_gpu)).to(linear.weight.device)
    layer.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
    # On CPUs with AVX512-BF16 an evaluation would repack the codes for a kernel that has no backward pass, and the next
    # training step would silently lose its gradients.
    layer.support_avx512bf16_for_cpu = False
    layer.train(linear.training)
    return layer


def dequantised(layer: nn.Module) -> torch.Tensor:
    """The weight (M x D) that a four-bit layer stands for, in the dtype that it had before."""
    return _bitsandbytes().functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def dense_linear(layer: nn.Module) -> nn.Linear:
    """A plain nn.Linear with the dequantised weight (in the layer's compute dtype); shares the bias."""
    weight = dequantised(layer).to(layer.compute_dtype)  # type: ignore[arg-type]
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)  # (M, D)
    linear.bias = (
        None if layer.bias is None else nn.Parameter(layer.bias.detach().to(weight.dtype), requires_grad=False)
    )
    return linear.train(layer.training)


def quantise_model(model: nn.Module, *, keep: Collection[str], quantise: Callable[[str, nn.Linear], nn.Module]) -> int:
    """Replace every nn.Linear, in place, but those below a module named in `keep`; returns how many were replaced.

    `quantise(name, linear)` makes what takes its place. Layer by layer, so that beside the model itself only one layer is in
    memory twice.
    """
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not any(name == k or name.startswith(k + ".") for k in keep)
    ]
    for name in names:
        parent, _, child = name.rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, child, quantise(name, getattr(holder, child)))
    return len(names)
