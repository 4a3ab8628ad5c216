"""timm's networks behind the interface that transformers' networks have: keyword inputs, loss and logits by name.

Shapes: B images, C classes, 3 colours.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from velora.nn.blocks import BATCH_NORMS


class ImageClassifier(nn.Module):
    """A vision transformer: forward(pixel_values, labels=None) -> loss (mean cross-entropy, with labels) and logits (B x C)."""

    velora_head: ClassVar[list[str]] = ["vit.head"]

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        # The images come in float32; the patch embedding (which an adapter may have wrapped) says what it computes in.
        dtype = next(self.vit.patch_embed.parameters()).dtype
        return _classified(self.vit, pixel_values.to(dtype), labels)


class ConvNetClassifier(nn.Module):
    """A convolutional network, with the same forward.

    A batch norm whose parameters do not train uses its own mean and variance in training too: behind an adapter they would
    move with every forward, and are in no adapter's file.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.velora_head = [f"net.{net.default_cfg['classifier']}"]

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        return _classified(self.net, pixel_values.to(next(self.net.parameters()).dtype), labels)

    def train(self, mode: bool = True) -> ConvNetClassifier:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, BATCH_NORMS) and not any(p.requires_grad for p in module.parameters()):
                module.eval()
        return self


def _classified(network: nn.Module, images: Tensor, labels: Tensor | None) -> ImageClassifierOutput:
    logits = network(images)  # (B, 3, height, width) -> (B, C)
    loss = None if labels is None else F.cross_entropy(logits.float(), labels)
    return ImageClassifierOutput(loss=loss, logits=logits)
