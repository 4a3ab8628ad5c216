"""What the text tasks share: tables and shards in local files with exact error messages, and batches of padded ids.

Shapes: B examples in a batch, L the longest text of the batch in tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velora.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from velora.config import Config

SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Line:
    """One row of a tab-separated file; `number` counts the file's lines from 1, for messages."""

    number: int
    cells: list[str]


def shown(value: str) -> str:
    """A value in quotes for a message, shortened."""
    return repr(value if len(value) <= SHOWN_CHARACTERS else value[:SHOWN_CHARACTERS] + "...")


def read_tsv(file: Path) -> list[Line]:
    """All lines of a tab-separated file; quotes are plain characters (as in GLUE's files), a byte order mark is dropped."""
    try:
        with file.open(encoding="utf-8-sig", newline="\n") as stream:
            lines = [Line(n, text.rstrip("\r\n").split("\t")) for n, text in enumerate(stream, 1) if text.strip()]
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not lines:
        raise ConfigError(f"{file} is empty: it must be tab-separated text")
    return lines


def file_facts(file: Path, **more: Any) -> dict[str, Any]:
    """What identifies a data file in the record."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size_bytes": file.stat().st_size, "sha256": digest, **more}


def note(text: str) -> None:
    """Tell the user something about the data that must not be overlooked; once, not once per process."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}")


def length_problems(max_length: int, config: Config) -> Iterator[str]:
    """A sentence if the texts are longer than the network's positions, as far as its YAML tells."""
    architecture = getattr(config.model, "architecture", None) or {}
    positions = architecture.get("max_position_embeddings")
    if positions is None:
        return
    if architecture.get("model_type") in ("roberta", "xlm-roberta"):
        positions -= 2  # its positions begin at the padding id + 1
    if max_length > positions:
        yield f"task.max_length={max_length} is more than the {positions} positions of model={config.model.name}"


def vocabulary_size(tokenizer: Any, config: Config) -> int:
    """Words that the network embeds: the figure of its YAML, or else the tokenizer's length."""
    declared = (getattr(config.model, "architecture", None) or {}).get("vocab_size")
    return len(tokenizer) if declared is None else int(declared)


def check_vocabulary(tokenizer: Any, config: Config, spare: int = 0) -> None:
    """ConfigError where the tokenizer has words (more than `spare` of them) that the network does not embed."""
    words, embedded = len(tokenizer), vocabulary_size(tokenizer, config)
    if words > embedded + spare:
        raise ConfigError(
            f"the tokenizer of model={config.model.name} has {words} words and the network embeds {embedded}: give the "
            "model.tokenizer that belongs to it"
        )


def padded(texts: list[list[int]], filler: int) -> torch.Tensor:
    """Rows of different length as one tensor (B, L) of int64, padded at the right."""
    import torch

    length = max((len(ids) for ids in texts), default=0)
    return torch.tensor([ids + [filler] * (length - len(ids)) for ids in texts], dtype=torch.int64)


def mask_of(texts: list[list[int]]) -> torch.Tensor:
    """(B, L) of int64: 1 at tokens, 0 at padding."""
    return padded([[1] * len(ids) for ids in texts], 0)
