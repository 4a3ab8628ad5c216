"""What the text tasks share: tables and shards in local files with exact error messages, and batches of padded ids.

Shapes: B examples in a batch, L the longest text of the batch in tokens.
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from velora.errors import ConfigError

if TYPE_CHECKING:
    import torch

SHOWN_CHARACTERS = 80
ENCODE_TOGETHER = 64  # texts in one call of the tokenizer


@dataclass(frozen=True)
class Line:
    """One row of a tab-separated file; `number` counts the file's lines from 1, for messages."""

    number: int
    cells: list[str]


def shown(value: str) -> str:
    """A value in quotes for a message, shortened."""
    return repr(value if len(value) <= SHOWN_CHARACTERS else value[:SHOWN_CHARACTERS] + "...")


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


def read_tsv(file: Path) -> tuple[list[Line], int]:
    """The lines of a tab-separated file, and how many more are blank or hold nothing but tabs.

    Quotes are plain characters, as in GLUE's files.
    """
    try:
        with file.open("rb") as stream:
            every = list(text_lines(stream, file))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    lines = [Line(number, text.split("\t")) for number, text in every if text.strip()]
    if not lines:
        raise ConfigError(f"{file} is empty: it must be tab-separated text")
    return lines, len(every) - len(lines)


def file_facts(file: Path, **more: Any) -> dict[str, Any]:
    """What identifies a data file in the record."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size_bytes": file.stat().st_size, "sha256": digest, **more}


def count_longer(texts: Sequence[tuple[str, ...]], tokenizer: Any, max_length: int) -> int:
    """How many texts (or pairs of texts) have more than `max_length` tokens with their special ones, and are cut."""
    special = tokenizer.num_special_tokens_to_add(pair=True)
    # a token is a byte or more, but for a blank that is set before a text
    long = [row for row in texts if sum(len(text.encode()) + 1 for text in row) + special > max_length]
    longer = 0
    for start in range(0, len(long), ENCODE_TOGETHER):
        columns = [list(column) for column in zip(*long[start : start + ENCODE_TOGETHER], strict=True)]
        encoded = tokenizer(*columns, verbose=False, return_attention_mask=False)
        longer += sum(len(ids) > max_length for ids in encoded["input_ids"])
    return longer


def padded(texts: list[list[int]], filler: int) -> torch.Tensor:
    """Rows of different length as one tensor (B, L) of int64, padded at the right."""
    import torch

    length = max((len(ids) for ids in texts), default=0)
    return torch.tensor([ids + [filler] * (length - len(ids)) for ids in texts], dtype=torch.int64)


def mask_of(texts: list[list[int]]) -> torch.Tensor:
    """(B, L) of int64: 1 at tokens, 0 at padding."""
    return padded([[1] * len(ids) for ids in texts], 0)
