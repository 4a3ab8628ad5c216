"""From an image file to the tensor that a vision transformer takes, without augmentation.

An image becomes 8-bit RGB first, the way its PIL mode says:

| mode | read as |
|---|---|
| 1, L, P, RGB, CMYK, YCbCr, LAB, HSV | PIL's `convert("RGB")`; grey becomes three equal colours |
| LA, PA, RGBA, a transparent palette or colour | the same; the alpha is dropped, what lies under it shows (as in torchvision) |
| I;16 and its byte orders (16-bit grey) | 0..65535 |
| I (32-bit integers) | 0..65535, which is what PIL makes of 16-bit PGM; refused where it leaves that range or ends at 255 |
| F (floats) | 0..1 where no value is above 1, 0..255 where the largest is above 16; between them, and outside 0..255, refused |

(PIL's own conversion clips the last three to 0..255: white or black.) Of an animation the first frame is read. The orientation
that EXIF names is applied, where the EXIF data can be read. Image files of more than PIL's 89 million pixels are refused.

Shapes: B images, 3 colours, S x S pixels; H x W pixels in the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from velora.errors import ConfigError

DARKEST_WHITE = 16  # a float image on 0..255 has a larger value than this somewhere, or its scale is doubtful


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
        """uint8 (3 x S x S) of an image file; ConfigError with the file's name where it cannot be read as an image."""
        try:
            with Image.open(path) as image:
                if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are more than {Image.MAX_IMAGE_PIXELS}")
                return self.from_image(image)
        except MemoryError:
            raise
        except (
            Exception
        ) as error:  # PIL's plugins raise OSError, ValueError, SyntaxError, struct.error, zlib.error, ...
            raise ConfigError(f"{path} is not a readable image ({_reason(error)}): replace or remove it") from None

    def from_image(self, image: Image.Image) -> Tensor:
        """uint8 (3 x S x S) of a PIL image of any mode; ValueError where its values do not tell their scale."""
        method = Image.Resampling[self.interpolation.upper()]
        resized = _rgb(_upright(image)).resize((self.size, self.size), method)
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


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data says; as it stands in the file where there is none or it is damaged."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the pixels are read already: this is about the EXIF data alone
        return image


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, see the table at the head of this file."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)  # (H, W)
        grey = values.astype(np.float32) * (255 / _white(image.mode, values))
        image = Image.fromarray(grey.round().astype(np.uint8))
    return image.convert("RGB")


def _white(mode: str, values: np.ndarray) -> float:
    """The value that means white in a grey image of more than 8 bits."""
    if mode.startswith("I;16"):
        return 65535
    lowest, highest = values.min(), values.max()
    if lowest == highest == 0:
        return 1  # black on any scale
    scales = [(255, 65535)] if mode == "I" else [(0, 1), (DARKEST_WHITE, 255)]
    for above, white in scales:
        if lowest >= 0 and above < highest <= white:  # false for NaN
            return white
    known = "32-bit integers on 0..65535" if mode == "I" else "floats on 0..1 or 0..255"
    raise ValueError(f"its values, {lowest:g} to {highest:g}, do not fit {known}; save it with 8 bits")


def _reason(error: Exception) -> str:
    """What PIL says, on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "in no format that PIL knows"  # its own text is the path once more
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
