"""What the tests of the adapters share: values of the config groups, tiny networks of the three families, batches."""

from __future__ import annotations

import functools
from typing import Any

import tiny
import torch
from text_helpers import composed
from torch import Tensor, nn

from velora.config.adapter import LTE, Hydra, LoRA, MultiLoRA, SSFAdapter
from velora.config.run import Config
from velora.config.weights import NF4, Dense

FAMILIES = ("llama", "roberta", "vit")


_plain = functools.cache(composed)


def config(seed: int = 0, task: str = "a/task", **parts: Any) -> Config:
    """A run's configuration with `parts` in place of its own; the networks of these tests are not built from it."""
    plain = _plain("method=full")
    return plain.model_copy(update={"seed": seed, "task": plain.task.model_copy(update={"name": task}), **parts})


def lora(**changes: Any) -> LoRA:
    keys = {
        "rank": 4, "alpha": 8.0, "scaling": "alpha_over_rank", "dropout": 0.0, "targets": ["value", "down"],
        "init": "default", "pissa_rounds": 5, "also_train": [],
    }  # fmt: skip
    return LoRA(kind="lora", **(keys | changes))


def ssf(**changes: Any) -> SSFAdapter:
    return SSFAdapter(kind="ssf", **({"targets": None, "also_train": []} | changes))


def hydra(**changes: Any) -> Hydra:
    keys = {
        "rank": 2, "scale": 0.5, "dropout": 0.0, "targets": ["output", "down"], "per_task": {}, "also_train": [],
    }  # fmt: skip
    return Hydra(kind="hydra", **(keys | changes))


def multilora(**changes: Any) -> MultiLoRA:
    keys = {"num_branches": 3, "rank": 2, "dropout": 0.0, "targets": ["value", "down"], "also_train": []}
    return MultiLoRA(kind="multilora", **(keys | changes))


def lte(**changes: Any) -> LTE:
    keys = {
        "num_heads": 2, "rank": 2, "alpha": 4.0, "root_alpha": True, "merge_every": 2, "reset": False, "targets": ["all"],
        "also_train": [],
    }  # fmt: skip
    return LTE(kind="lte", **(keys | changes))


def dense(dtype: str = "fp32") -> Dense:
    return Dense(kind="dense", dtype=dtype)


def nf4(**changes: Any) -> NF4:
    keys = {"quant_type": "nf4", "double_quant": True, "dtype": "fp32", "compute_dtype": None}
    return NF4(kind="nf4", **(keys | changes))


def network(family: str) -> nn.Module:
    return {"llama": tiny.tiny_llama, "roberta": tiny.tiny_roberta, "vit": tiny.tiny_vit}[family]()


def batch(family: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    if family == "vit":
        return {"x": tiny.image_batch().to(dtype)}
    return tiny.token_batch(num_labels=2 if family == "roberta" else None)


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output.logits


def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    return output.square().mean() if isinstance(output, Tensor) else output.loss


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def perturb(model: nn.Module, seed: int = 1, size: float = 0.05) -> None:
    """Move everything that trains, as training would; many adapters start as the identity."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trained(model).values():
        parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))
