"""Image classification from files: decoding once or at each use, batches, scores.

Shapes: B images, n images of a split, 3 colours, S x S pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from velora.config.parts import Phase, TaskData
from velora.config.task import Protocol
from velora.data.metrics import num_examples, scores
from velora.data.vtab import Listed
from velora.models.images import ImageTransform


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
        return self.transform.read(path), label


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
    return scores(["accuracy"], predictions, labels)


def image_task_data(
    protocol: Protocol, splits: Mapping[str, Any], transform: ImageTransform, about: dict[str, Any]
) -> TaskData:
    """A task of images with the four splits of VTAB-1k, scored by top-1 accuracy."""
    return TaskData(
        phases=_phases(protocol, splits),
        collate=image_collate(transform),
        metrics=top1,
        best_metric="accuracy",
        greater_is_better=True,
        unit="images",
        num_targets=num_examples,
        num_items=num_examples,
        about=about,
    )


def _phases(protocol: Protocol, splits: Mapping[str, Any]) -> list[Phase]:
    """What is trained on and evaluated on, in order."""
    if protocol == "select_then_retrain":
        return [
            Phase("select", splits["train800"], {"": splits["val200"]}),
            Phase(
                "retrain", splits["train800val200"], {"": splits["test"]}, stop_at_best_of="select", only_at_end=True
            ),
        ]
    return [Phase("train", splits["train800val200"], {"": splits["test"]}, only_at_end=protocol == "last")]
