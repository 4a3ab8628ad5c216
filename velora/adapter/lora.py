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

_INITS: dict[str, Any] = {"default": True, "pissa": "pissa", "olora": "olora"}


class LoRA(InsertedAdapter):
    """Low-rank adaptation (arXiv 2106.09685): y = x Wᵀ + alpha/rank · dropout(x) Aᵀ Bᵀ, with W frozen.

    `init`: "default" (A Kaiming-uniform, B zero), "pissa" (arXiv 2404.02948: principal singular vectors of W, which
    keeps the rest) or "olora" (arXiv 2406.01775: QR of W).
    """

    kind: Literal["lora"]
    rank: PositiveInt
    alpha: PositiveFloat
    dropout: float = Field(ge=0, lt=1)
    targets: list[str] = Field(min_length=1)
    init: Literal["default", "pissa", "olora"]

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
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=targets,
            modules_to_save=trained_whole or None,
            init_lora_weights=_INITS[self.init],
        )
        with seeded(config.seed), _told_of_four_bits(model):
            return get_peft_model(model, peft_config)


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
