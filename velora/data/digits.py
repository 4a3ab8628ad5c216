"""Handwritten digits of scikit-learn: 1797 grey images of 8 x 8, in the package, so nothing is downloaded.

The splits follow VTAB-1k's rules: 800 images to train, 200 to validate, the other 797 to test.

Shapes: n images, S x S pixels after resizing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from velora.config.parts import Head, Task, TaskData
from velora.data.protocol import PROTOCOLS, Protocol, protocol_problems, splits_of

if TYPE_CHECKING:
    import numpy as np

    from velora.config.run import Config

NUM_CLASSES = 10
SPLIT_SEED = 0  # part of the task's definition, not of a run
_BOUNDS = {"train800": (0, 800), "val200": (800, 1000), "train800val200": (0, 1000), "test": (1000, 1797)}


def split_indices() -> dict[str, np.ndarray]:
    """Which images belong to which split; always the same."""
    import numpy as np

    order = np.random.RandomState(SPLIT_SEED).permutation(1797)  # RandomState's stream never changes
    return {name: order[start:end] for name, (start, end) in _BOUNDS.items()}


class Digits(Task):
    """The embedded vision task; `protocol` as for VTAB-1k."""

    kind: Literal["digits"]
    protocol: Protocol

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        yield from protocol_problems(self.protocol, config)

    def head(self, config: Config) -> Head:
        return Head("image_classification", num_labels=NUM_CLASSES)

    def batch_shapes(self, batch_size: int, config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
        from velora.data.images import image_batch_shapes

        return image_batch_shapes(batch_size, config.model.image_size)  # type: ignore[attr-defined]

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        import torch
        from PIL import Image
        from sklearn.datasets import load_digits

        from velora.data.images import DecodedImages, image_task_data

        data = load_digits()
        pixels = (data.images * (255 / 16)).round().astype("uint8")  # (n, 8, 8) from 0..16
        images = torch.stack([preprocessor.from_image(Image.fromarray(image)) for image in pixels])  # (n, 3, S, S)
        indices = split_indices()
        splits = {
            name: DecodedImages(images[indices[name]], data.target[indices[name]].tolist())
            for name in splits_of(self.protocol)
        }
        about = {
            "source": "sklearn.datasets.load_digits",
            "sha256": hashlib.sha256(pixels.tobytes() + data.target.tobytes()).hexdigest(),
            "num_classes": NUM_CLASSES,
            "protocol": self.protocol,
            "protocol_means": PROTOCOLS[self.protocol],
            "num_images": {name: len(split) for name, split in splits.items()},
            "preprocessing": preprocessor.describe(),
        }
        return image_task_data(self.protocol, splits, preprocessor, about)
