"""Handwritten digits of scikit-learn: 1797 grey images of 8 x 8, in the package, so nothing is downloaded.

The splits follow VTAB-1k's rules: 800 images to train, 200 to validate, the other 797 to test.

Shapes: n images, S x S pixels after resizing.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from velora.config.parts import TaskData
from velora.config.task import PROTOCOLS, Digits
from velora.data.images import DecodedImages, image_task_data
from velora.models.images import ImageTransform

SPLIT_SEED = 0  # part of the task's definition, not of a run
_BOUNDS = {"train800": (0, 800), "val200": (800, 1000), "train800val200": (0, 1000), "test": (1000, 1797)}


def split_indices() -> dict[str, np.ndarray]:
    """Which images belong to which split; always the same."""
    order = np.random.RandomState(SPLIT_SEED).permutation(1797)  # RandomState's stream never changes
    return {name: order[start:end] for name, (start, end) in _BOUNDS.items()}


def load(task: Digits, transform: ImageTransform) -> TaskData:
    data = load_digits()
    pixels = (data.images * (255 / 16)).round().astype("uint8")  # (n, 8, 8) from 0..16
    images = torch.stack([transform.from_image(Image.fromarray(image)) for image in pixels])  # (n, 3, S, S)
    indices = split_indices()
    splits = {name: DecodedImages(images[indices[name]], data.target[indices[name]].tolist()) for name in task.splits}
    about = {
        "source": "sklearn.datasets.load_digits",
        "sha256": hashlib.sha256(pixels.tobytes() + data.target.tobytes()).hexdigest(),
        "num_classes": len(data.target_names),
        "protocol": task.protocol,
        "protocol_means": PROTOCOLS[task.protocol],
        "num_images": {name: len(split) for name, split in splits.items()},
        "preprocessing": transform.describe(),
    }
    return image_task_data(task.protocol, splits, transform, about)
