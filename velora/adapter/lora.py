"""LoRA, as PEFT has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from velora.adapter._inserted import InsertedAdapter, seeded, target_patterns

if TYPE_CHECKING:
    from torch import nn

    from velora.config import Config

# What PEFT is asked for; "orthogonal" is drawn here afterwards.
_INITS: dict[str, Any] = {"default": True, "orthogonal": True, "pissa": "pissa", "olora": "olora"}


class LoRA(InsertedAdapter):
    """Low-rank adaptation (arXiv 2106.09685): y = x Wᵀ + factor · dropout(x) Aᵀ Bᵀ, with W frozen.

    `scaling`: what the factor is. "alpha_over_rank" as in the paper and PEFT, or "alpha" itself, as in the VeLoRA authors'
    vision code.

    `init`: "default" (A Kaiming-uniform, B zero), "orthogonal" (A and B each from torch.nn.init.orthogonal_, as in the VeLoRA
    authors' code: the network does not start as the pre-trained one; PEFT's initialisation of the same name is another,
    whose product B A is zero), "pissa" (arXiv 2404.02948: principal singular vectors of W, which keeps the rest) or
    "olora" (arXiv 2406.01775: QR of W).
    """

    kind: Literal["lora"]
    rank: PositiveInt
    alpha: PositiveFloat
    scaling: Literal["alpha_over_rank", "alpha"]
    dropout: float = Field(ge=0, lt=1)
    targets: list[str] = Field(min_length=1)
    init: Literal["default", "orthogonal", "pissa", "olora"]

    def problems(self, config: Config) -> Iterator[str]:
        if self.init == "pissa" and config.weights.quantised:
            yield (
                f"adapter.init=pissa with weights={config.weights.kind}: PiSSA needs the singular vectors of dense weights; "
                "use adapter.init=default or olora, or weights=dense"
            )

    def apply(self, model: nn.Module, config: Config) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        from velora.head import train_in_float32
        from velora.swap import find_modules

        targets = list(find_modules(model, target_patterns(self.targets, model, config)))
        trained_whole = self.also_trained(model)
        for name in trained_whole:
            train_in_float32(model.get_submodule(name))
        peft_config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha * (self.rank if self.scaling == "alpha" else 1),  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=targets,
            modules_to_save=trained_whole or None,
            init_lora_weights=_INITS[self.init],
        )
        with seeded(config.seed), _told_of_four_bits(model):
            adapted = get_peft_model(model, peft_config)
            if self.init == "orthogonal":
                _draw_orthogonal(adapted)
        _drop_frozen_copies(adapted)
        return adapted


def _draw_orthogonal(model: nn.Module) -> None:
    """A (rank x D) with orthonormal rows and B (M x rank) with orthonormal columns, in every LoRA layer."""
    from peft.tuners.lora import LoraLayer
    from torch import nn

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
                nn.init.orthogonal_(factor.weight)


def _drop_frozen_copies(model: nn.Module) -> None:
    """Let what trains whole stand alone: PEFT keeps the module as it was beside it, which only `disable_adapter` would read.

    The trained module takes its place under `original_module`. It is registered after `modules_to_save`, because a parameter
    goes by the first of its names, and the adapter's files have that one.
    """
    from peft.utils.other import ModulesToSaveWrapper

    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            del wrapper.original_module
            wrapper.original_module = wrapper.modules_to_save[wrapper.active_adapters[0]]


@contextmanager
def _told_of_four_bits(model: nn.Module) -> Iterator[None]:
    """PEFT takes its 4-bit layers only for a model that says it was loaded in four bits; ours was quantised after."""
    from velora.nn.quantised import is_quantised

    if not any(is_quantised(module) for module in model.modules()):
        yield
        return
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.is_loaded_in_4bit
