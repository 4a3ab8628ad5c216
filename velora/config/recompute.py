"""What is computed again in the backward pass in place of being kept (the axis `recompute`).

Each value keeps no more than the one before it, and every one gives the gradients of `none`:

    none     nothing is computed again
    lean     norms, activation functions, dropout and the loss keep less; no matrix product is computed twice
    mlp      and the MLP's first products are computed again
    blocks   only the inputs of blocks are kept: gradient checkpointing
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt

from velora.config.parts import Recompute

if TYPE_CHECKING:
    from torch import nn

    from velora.config.run import Config


class Nothing(Recompute):
    kind: Literal["none"]


class Lean(Recompute):
    kind: Literal["lean", "mlp"]

    def apply(self, model: nn.Module, config: Config) -> str | None:
        from velora.nn.lean import apply_lean

        return str(apply_lean(model, mlp=self.kind == "mlp"))


class Blocks(Recompute):
    """`lean`: what is computed again is lean too, and so are the parts outside the blocks."""

    kind: Literal["blocks"]
    lean: bool
    every_n_layers: PositiveInt
    offload: bool

    def problems(self, config: Config) -> Iterator[str]:
        if self.offload and config.trainer.device == "cpu":
            yield (
                "recompute.offload=true has no effect with trainer.device=cpu, where everything is in the CPU's memory already; "
                "leave it out, or train on a GPU"
            )

    def needs_a_gpu(self) -> str | None:
        return "recompute.offload=true" if self.offload else None

    def apply(self, model: nn.Module, config: Config) -> str | None:
        from velora.nn.blocks import checkpoint_blocks

        texts = []
        if self.lean:
            from velora.nn.lean import apply_lean

            texts.append(str(apply_lean(model)))
        texts.append(checkpoint_blocks(model, every_n_layers=self.every_n_layers, offload=self.offload))
        return "\n".join(texts)
