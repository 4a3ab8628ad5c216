"""Sequence classification on a text that every Python carries: which topic of its manual a paragraph belongs to.

The embedded task for encoders: no download, no data folder. The classes are the longest topics; a paragraph that stands in
several of them is left out, so that every label is right, and one paragraph in ten, chosen by a hash, is for validation.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt

from velora.config.parts import Head, Phase, Task, TaskData
from velora.data.counts import num_examples, num_tokens
from velora.models.fit import check_length, check_vocabulary, length_problems, network_limits

if TYPE_CHECKING:
    from velora.config.run import Config

VALIDATION_SHARE = 10  # one paragraph in so many
SHORTEST = 40  # characters of a paragraph


class Topics(Task):
    kind: Literal["topics"]

    num_topics: int = Field(default=4, ge=2)
    max_length: PositiveInt = 64

    def head(self, config: Config) -> Head:
        return Head("sequence_classification", self.num_topics)

    def problems(self, config: Config) -> Iterator[str]:
        from velora.data.manual import topics

        yield from super().problems(config)
        yield from length_problems(self.max_length, config)
        if self.num_topics > len(topics()):
            yield f"task.num_topics={self.num_topics} is more than the {len(topics())} topics of this Python's manual"

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        from velora.data.glue import collate
        from velora.data.metrics import scores
        from velora.data.text import count_longer

        limits = network_limits(config)
        check_vocabulary(preprocessor, limits, config)
        check_length(self.max_length, limits, config)
        names, sides = labelled_paragraphs(self.num_topics)
        return TaskData(
            phases=[Phase("train", sides["train"], {"": sides["validation"]})],
            collate=lambda rows: collate(rows, preprocessor, self.max_length, regression=False),
            metrics=lambda logits, labels: scores(["accuracy"], logits, labels),
            best_metric="accuracy",
            greater_is_better=True,
            unit="tokens",
            num_targets=num_examples,
            num_items=num_tokens,
            about={
                "task": self.name,
                "source": "pydoc_data.topics",
                "python": ".".join(map(str, sys.version_info[:3])),
                "classes": names,
                "examples": {side: len(rows) for side, rows in sides.items()},
                "cut_at_max_length": {
                    side: count_longer([row.texts for row in rows], preprocessor, self.max_length)
                    for side, rows in sides.items()
                },
            },
        )

    def batch_shapes(self, batch_size: int, config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
        shape = (batch_size, self.max_length)
        return {"input_ids": (shape, "int64"), "attention_mask": (shape, "int64"), "labels": ((batch_size,), "int64")}


def labelled_paragraphs(num_topics: int) -> tuple[list[str], dict[str, list[Any]]]:
    """Names of the classes, and the rows of `train` and `validation`."""
    from velora.data.glue import Row
    from velora.data.manual import topics

    texts = topics()
    names = sorted(sorted(texts, key=lambda n: (-len(texts[n]), n))[:num_topics])
    owners: dict[str, set[int]] = {}
    for label, name in enumerate(names):
        for paragraph in texts[name].split("\n\n"):
            text = " ".join(paragraph.split())
            if len(text) >= SHORTEST:
                owners.setdefault(text, set()).add(label)
    sides: dict[str, list[Any]] = {"train": [], "validation": []}
    for text, labels in owners.items():
        if len(labels) == 1:
            chosen = int(hashlib.sha256(text.encode()).hexdigest(), 16) % VALIDATION_SHARE == 0
            sides["validation" if chosen else "train"].append(Row((text,), next(iter(labels))))
    return names, sides
