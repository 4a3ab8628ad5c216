"""From an image file to the tensor that a vision transformer takes, without augmentation.

Shapes: B images, 3 colours, S x S pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class ImageTransform:
    """Resize both sides to `size` ("direct resize", no crop), then (x / 255 - mean) / std.

    The two halves are apart so that images can be kept decoded as bytes: `read` gives uint8 (3 x S x S), `normalize` turns a
    batch of those into float32.
    """

    size: int
    interpolation: str  # as timm names it: bicubic, bilinear, ...
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def read(self, path: Path) -> Tensor:
        """uint8 (3 x S x S) of an image file; raises OSError for a file that is no image."""
        with Image.open(path) as image:
            return self.from_image(image)

    def from_image(self, image: Image.Image) -> Tensor:
        """uint8 (3 x S x S) of a PIL image of any mode."""
        method = Image.Resampling[self.interpolation.upper()]
        resized = image.convert("RGB").resize((self.size, self.size), method)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()  # (S, S, 3) -> (3, S, S)

    def normalize(self, images: Tensor) -> Tensor:
        """float32 (B x 3 x S x S) of uint8 of the same shape."""
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def describe(self) -> dict[str, Any]:
        """For the record of a run."""
        return {
            "resize": f"{self.size} x {self.size}, {self.interpolation}, no crop",
            "mean": list(self.mean),
            "std": list(self.std),
            "augmentation": None,
        }
