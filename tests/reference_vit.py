"""A vision transformer in float64, one equation a line, with the places where SSF and Hydra act (timm's parameter names).

B images, T tokens (patches and the class token), D width, H heads, P patch size
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Array = NDArray[np.float64]
Layer = Callable[[str, Array, Callable[[Array], Array]], Array]  # name, input, the frozen layer -> output


def parameters(model: nn.Module) -> dict[str, Array]:
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


def plain(_name: str, x: Array, layer: Callable[[Array], Array]) -> Array:
    return layer(x)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x: Array) -> Array:
    return torch.nn.functional.gelu(torch.from_numpy(x)).numpy()


def forward(w: dict[str, Array], images: Array, num_heads: int, patch: int, act: Layer = plain) -> Array:
    """Logits (B x C) of images (B x 3 x height x width); `act` sees every frozen layer."""

    def linear(name: str, x: Array) -> Array:
        return act(name, x, lambda x: x @ w[f"{name}.weight"].T + w[f"{name}.bias"])

    def norm(name: str, x: Array) -> Array:
        def layer(x: Array) -> Array:
            centred = x - x.mean(-1, keepdims=True)
            deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
            return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]

        return act(name, x, layer)

    def embed(pixels: Array) -> Array:
        kernel = w["patch_embed.proj.weight"]
        rows = []
        for image in pixels:
            for i in range(0, image.shape[1], patch):
                for j in range(0, image.shape[2], patch):
                    rows.append((kernel * image[:, i : i + patch, j : j + patch]).sum((1, 2, 3)))
        return np.array(rows).reshape(len(pixels), -1, len(kernel)) + w["patch_embed.proj.bias"]

    x = act("patch_embed.proj", images, embed)  # (B, T - 1, D)
    x = np.concatenate([np.broadcast_to(w["cls_token"], (len(x), 1, x.shape[-1])), x], 1) + w["pos_embed"]
    for block in sorted({name.split(".")[1] for name in w if name.startswith("blocks.")}, key=int):
        b = f"blocks.{block}"
        qkv = linear(f"{b}.attn.qkv", norm(f"{b}.norm1", x))  # (B, T, 3 D)
        q, k, v = qkv.reshape(*qkv.shape[:2], 3, num_heads, -1).transpose(2, 0, 3, 1, 4)  # each (B, H, T, D / H)
        attention = softmax(q @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])) @ v
        x = x + linear(f"{b}.attn.proj", attention.transpose(0, 2, 1, 3).reshape(x.shape))
        x = x + linear(f"{b}.mlp.fc2", gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", x))))
    return linear("head", norm("norm", x)[:, 0])
