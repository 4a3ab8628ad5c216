"""How much there is in a batch: what its loss is a mean over, and what its speed is counted in.

Shapes: B examples in a batch, L tokens in a sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    Batch = dict[str, Any]


def num_examples(batch: Batch) -> int:
    """B: a loss of one label each, and the speed of images."""
    return len(batch["labels"])


def num_predicted_tokens(batch: Batch) -> Tensor:
    """Labels (B, L) that a language model's loss reads: position i predicts token i + 1, and -100 is no label."""
    return (batch["labels"][:, 1:] != -100).sum()


def num_tokens(batch: Batch) -> Tensor | int:
    """Tokens that are not padding; without a mask there is none."""
    return batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
