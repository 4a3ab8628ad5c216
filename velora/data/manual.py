"""A text that every Python carries: the topics of its own manual (`pydoc_data.topics`). No download, no data folder.

Language models read it whole (`manual`). The manual repeats itself (the topic `compound` holds those of `if` and `for`), so
each paragraph is kept once, in the longest topic that has it; then whole topics are set aside for validation, chosen by a
hash of their names. No paragraph is on both sides.

Encoders are asked which topic a paragraph belongs to (`topics`). The classes are the longest topics; a paragraph that stands in
several of them is left out, so that every label is right, and one paragraph in ten, chosen by a hash, is for validation.

Other versions of Python carry another text: version, and size and SHA-256 or numbers, stand in the record.
"""

from __future__ import annotations

import hashlib
import platform
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Any

from velora.config.parts import TaskData
from velora.config.task_text import Manual, Topics
from velora.data import language_model as lm
from velora.data.text import Row, classification_task_data, count_longer
from velora.models.tokenizer import SENTINELS, check_fit

if TYPE_CHECKING:
    from velora.config.run import Config

VALIDATION_SHARE = 10  # one topic, or paragraph, in so many
SHORTEST = 40  # characters of a paragraph that is asked about


def load_manual(task: Manual, tokenizer: Any, config: Config) -> TaskData:
    vocabulary = check_fit(task.max_length, tokenizer, config, spare=SENTINELS)
    sides = split_topics(topics)
    blocks = {
        side: list(lm.packed(texts.values(), tokenizer, task.max_length, vocabulary)) for side, texts in sides.items()
    }
    whole = "\n".join(f"{name}\n{text}" for name, text in sorted(topics.items()))
    about = {
        "task": task.name,
        "source": "pydoc_data.topics",
        "python": platform.python_version(),
        "text_bytes": {side: sum(len(t.encode()) for t in texts.values()) for side, texts in sides.items()},
        "text_sha256": hashlib.sha256(whole.encode()).hexdigest(),
        "topics": {side: len(texts) for side, texts in sides.items()},
        "validation_topics": sorted(sides["validation"]),
        "sequences": {side: len(found) for side, found in blocks.items()},
        "max_length": task.max_length,
    }
    return lm.language_model_task_data(task, blocks["train"], blocks["validation"], tokenizer, about)


def split_topics(texts: dict[str, str]) -> dict[str, dict[str, str]]:
    """`train` and `validation`: topics with every paragraph (runs of blanks count as one) kept once, no topic on both sides."""
    seen: set[str] = set()
    sides: dict[str, dict[str, str]] = {"train": {}, "validation": {}}
    for name in sorted(texts, key=lambda n: (-len(texts[n]), n)):
        kept = []
        for paragraph in texts[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph)
        if kept:
            sides[_side(name)][name] = "\n\n".join(kept)
    return sides


def load_topics(task: Topics, tokenizer: Any, config: Config) -> TaskData:
    check_fit(task.max_length, tokenizer, config)
    names, sides = labelled_paragraphs(task.num_topics)
    about = {
        "task": task.name,
        "source": "pydoc_data.topics",
        "python": platform.python_version(),
        "classes": names,
        "examples": {side: len(rows) for side, rows in sides.items()},
        "cut_at_max_length": {side: count_longer(rows, tokenizer, task.max_length) for side, rows in sides.items()},
    }
    return classification_task_data(
        sides["train"], {"": sides["validation"]}, tokenizer, task.max_length, ["accuracy"], about
    )


def labelled_paragraphs(num_topics: int) -> tuple[list[str], dict[str, list[Row]]]:
    """Names of the classes, and the rows of `train` and `validation`."""
    names = sorted(sorted(topics, key=lambda n: (-len(topics[n]), n))[:num_topics])
    owners: dict[str, set[int]] = {}
    for label, name in enumerate(names):
        for paragraph in topics[name].split("\n\n"):
            text = " ".join(paragraph.split())
            if len(text) >= SHORTEST:
                owners.setdefault(text, set()).add(label)
    sides: dict[str, list[Row]] = {"train": [], "validation": []}
    for text, labels in owners.items():
        if len(labels) == 1:
            sides[_side(text)].append(Row((text,), next(iter(labels))))
    return names, sides


def _side(text: str) -> str:
    chosen = int(hashlib.sha256(text.encode()).hexdigest(), 16) % VALIDATION_SHARE == 0
    return "validation" if chosen else "train"
