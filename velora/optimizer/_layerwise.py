"""What optimisers that update inside the backward pass cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from velora.config import Config


def layerwise_problems(setting: str, config: Config) -> Iterator[str]:
    """Sentences on clipping and on scaled gradients; `setting` names what makes the optimiser layer-wise."""
    trainer = config.trainer
    if trainer.max_grad_norm:
        yield (
            f"trainer.max_grad_norm={trainer.max_grad_norm} with {setting}: each gradient is used and freed before the norm of "
            "all of them is known; set trainer.max_grad_norm=null"
        )
    if trainer.precision == "fp16":
        yield (
            f"trainer.precision=fp16 with {setting}: fp16 training scales the loss, and its gradients are used before they can "
            "be scaled back; use trainer.precision=bf16 or fp32"
        )
