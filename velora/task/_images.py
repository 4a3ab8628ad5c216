"""Image classification from lists of files: reading, checking, decoding once.

A split is a text file, one image a line: a path relative to its folder, a blank, a label (an integer from 0). This is the
layout that SSF, Hydra, NOAH and FacT share for VTAB-1k.

Shapes: B images, n images of a split, 3 colours, S x S pixels, C classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from velora.errors import ConfigError
from velora.group import TaskData
from velora.model._images import ImageTransform
from velora.task._counts import num_examples
from velora.task._protocol import Protocol, phases

Listed = list[tuple[Path, int]]


def read_list(file: Path, num_classes: int) -> Listed:
    """(path, label) of each line; ConfigError for a missing, empty or malformed list, naming file and line."""
    if not file.is_file():
        raise ConfigError(f"{file} is missing: each line of it must be <relative image path> <label>")
    found: Listed = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.rstrip().rpartition(" ")
        if not name or not label.isdecimal():
            raise ConfigError(f"{file}, line {number}: {line!r} is not <relative image path> <label>")
        if int(label) >= num_classes:
            raise ConfigError(
                f"{file}, line {number}: label {label} is out of range, the task has {num_classes} classes (0 to {num_classes - 1})"
            )
        path = file.parent / name
        if not path.is_file():
            raise ConfigError(f"{file}, line {number}: the image {name} does not exist in {file.parent}")
        found.append((path, int(label)))
    if not found:
        raise ConfigError(f"{file} is empty: no image is listed in it")
    return found


def describe_list(file: Path, listed: Listed) -> dict[str, Any]:
    """For the record of a run: which split this was."""
    return {"num_images": len(listed), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


class DecodedImages(Dataset):
    """Examples (uint8 image 3 x S x S, label) out of memory."""

    def __init__(self, images: Tensor, labels: Sequence[int]) -> None:
        assert len(images) == len(labels)
        self.images, self.labels = images, labels  # (n, 3, S, S), n

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


class ListedImages(Dataset):
    """The same out of files, decoded at each use."""

    def __init__(self, listed: Listed, transform: ImageTransform) -> None:
        self.listed, self.transform = listed, transform

    def __len__(self) -> int:
        return len(self.listed)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.listed[index]
        try:
            return self.transform.read(path), label
        except OSError as error:
            raise ConfigError(f"{path} is not a readable image: {error}") from None


def image_split(listed: Listed, transform: ImageTransform, keep_decoded: int) -> Dataset:
    """The images of a list: decoded once, now, where there are at most `keep_decoded`; else at each use."""
    files = ListedImages(listed, transform)
    if len(listed) > keep_decoded:
        return files
    with ThreadPoolExecutor() as threads:
        images = list(threads.map(lambda index: files[index][0], range(len(files))))
    return DecodedImages(torch.stack(images), [label for _, label in listed])


def image_collate(transform: ImageTransform) -> Callable[[Sequence[tuple[Tensor, int]]], dict[str, Tensor]]:
    """Examples -> pixel_values float32 (B x 3 x S x S), labels (B)."""

    def collate(examples: Sequence[tuple[Tensor, int]]) -> dict[str, Tensor]:
        images = torch.stack([image for image, _ in examples])
        return {"pixel_values": transform.normalize(images), "labels": torch.tensor([label for _, label in examples])}

    return collate


def top1(predictions: Any, labels: Any) -> dict[str, float]:
    """Top-1 accuracy over all examples; `predictions` are logits (n x C)."""
    from velora.metrics import scores

    return scores(["accuracy"], predictions, labels)


def image_task_data(
    protocol: Protocol, splits: Mapping[str, Any], transform: ImageTransform, about: dict[str, Any]
) -> TaskData:
    """A task of images with the four splits of VTAB-1k, scored by top-1 accuracy."""
    return TaskData(
        phases=phases(protocol, splits),
        collate=image_collate(transform),
        metrics=top1,
        best_metric="accuracy",
        greater_is_better=True,
        unit="images",
        num_targets=num_examples,
        num_items=num_examples,
        about=about,
    )


def image_batch_shapes(batch_size: int, image_size: int) -> dict[str, tuple[tuple[int, ...], str]]:
    return {"pixel_values": ((batch_size, 3, image_size, image_size), "float32"), "labels": ((batch_size,), "int64")}
