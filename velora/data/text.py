"""What the text tasks share: reading files with exact error messages, and classification of labelled rows.

Shapes: B examples in a batch, L the longest text of the batch in tokens.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from velora.config.parts import Phase, TaskData
from velora.data.metrics import num_examples, num_tokens, scores
from velora.errors import ConfigError

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # what networks take of a tokenizer's answer
ENCODE_TOGETHER = 64  # texts in one call of the tokenizer


class Row(NamedTuple):
    """One example: a text or a pair of texts, and a class number or a score."""

    texts: tuple[str, ...]
    label: int | float


def text_lines(stream: IO[bytes], file: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line of a UTF-8 file, without its line break and without a byte order mark.

    ConfigError names file and line of what is no UTF-8.
    """
    for number, raw in enumerate(stream, 1):
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} line {number} is not UTF-8 text: {error.reason}; save it as UTF-8") from None


def file_facts(file: Path, **more: Any) -> dict[str, Any]:
    """What identifies a data file in the record."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size_bytes": file.stat().st_size, "sha256": digest, **more}


def count_longer(rows: Sequence[Row], tokenizer: Any, max_length: int) -> int:
    """How many rows have more than `max_length` tokens with their special ones, and are cut."""
    special = tokenizer.num_special_tokens_to_add(pair=True)
    # a token is a byte or more, but for a blank that is set before a text
    long = [row.texts for row in rows if sum(len(t.encode()) + 1 for t in row.texts) + special > max_length]
    longer = 0
    for start in range(0, len(long), ENCODE_TOGETHER):
        columns = [list(column) for column in zip(*long[start : start + ENCODE_TOGETHER], strict=True)]
        encoded = tokenizer(*columns, verbose=False, return_attention_mask=False)
        longer += sum(len(ids) > max_length for ids in encoded["input_ids"])
    return longer


def collate(rows: list[Row], tokenizer: Any, max_length: int, regression: bool) -> dict[str, Tensor]:
    """Tokenise a batch: ids and mask (B, L), labels (B,). Pairs are shortened at the longer text, as published."""
    columns = [list(column) for column in zip(*(row.texts for row in rows), strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    batch = tokenizer.pad(encoded, return_attention_mask=True, return_tensors="pt")
    labels = torch.tensor([row.label for row in rows], dtype=torch.float32 if regression else torch.int64)
    return {**{key: batch[key] for key in INPUTS if key in batch}, "labels": labels}


def classification_task_data(
    train: list[Row], validation: dict[str, list[Row]], tokenizer: Any, max_length: int, metrics: Sequence[str],
    about: dict[str, Any], *, regression: bool = False,
) -> TaskData:  # fmt: skip
    """A task on labelled rows; the first of `metrics` selects the best epoch."""
    return TaskData(
        phases=[Phase("train", train, validation)],
        collate=lambda rows: collate(rows, tokenizer, max_length, regression),
        metrics=lambda logits, labels: scores(metrics, logits, labels, regression),
        best_metric=metrics[0],
        greater_is_better=True,
        unit="tokens",
        num_targets=num_examples,
        num_items=num_tokens,
        reduce_logits=lambda logits, labels: logits[0] if isinstance(logits, tuple) else logits,
        about=about,
    )
