"""Convolutional networks of timm: ResNets and ConvNeXts."""

from __future__ import annotations

from torch import nn

from velora.config.model import ConvNet
from velora.config.parts import Head
from velora.models.vit import timm_network
from velora.nn.image_classifier import ConvNetClassifier


def build(model: ConvNet, head: Head, seed: int) -> nn.Module:
    """The network with a head for the task, on the CPU."""
    return ConvNetClassifier(timm_network(model, head, seed, "net."))
