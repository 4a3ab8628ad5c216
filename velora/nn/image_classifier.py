"""A timm network behind the interface that transformers' networks have: keyword inputs, loss and logits by name.

Shapes: B images, C classes, 3 colours.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput


class ImageClassifier(nn.Module):
    """forward(pixel_values, labels=None) -> loss (mean cross-entropy, if labels are given) and logits (B x C)."""

    velora_head: ClassVar[list[str]] = ["vit.head"]

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        # The images come in float32; the patch embedding (which an adapter may have wrapped) says what it computes in.
        dtype = next(self.vit.patch_embed.parameters()).dtype
        logits = self.vit(pixel_values.to(dtype))  # (B, 3, height, width) -> (B, C)
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
