"""Documents from json-lines shards in a folder: found, read in a shuffled order that repeats, counted. No torch here.

A shard is a file `*.json`, `*.jsonl`, `*.json.gz` or `*.jsonl.gz` with one JSON object per line, whose field `text` is the
document; its other fields are ignored. A name that contains `train` or `validation` tells the side.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from velora.data.text import text_lines
from velora.errors import ConfigError
from velora.run.notes import note

T = TypeVar("T")

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SIDES = ("train", "validation")
BLANK, SURROGATES = "blank_documents_left_out", "documents_with_lone_surrogates_replaced"
Repairs = dict[str, int]
"""What reading has left out or changed: numbers of documents under the two names above."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def shards_of(folder: Path, side: str) -> list[Path]:
    """The shards of one side, by name."""
    return sorted(p for p in folder.iterdir() if p.name.endswith(SUFFIXES) and side in p.name and p.is_file())


def folder_problems(root: Path, folder: Path) -> Iterator[str]:
    """Sentences about a folder that is missing or lacks the shards of a side."""
    if not folder.is_dir():
        usable = sorted(p.name for p in root.iterdir() if p.is_dir() and all(shards_of(p, side) for side in SIDES))
        found = f"below it {', '.join(usable)} hold shards" if usable else "no folder below it holds shards"
        yield f"data.root={root} has no folder {folder.name} (task.folder) with json-lines shards; {found}"
        return
    missing = [side for side in SIDES if not shards_of(folder, side)]
    if missing:
        yield (
            f"{folder} holds no shard for {' and none for '.join(missing)}: a file with that word in its name that "
            f"ends in {', '.join(SUFFIXES)}"
        )


def no_repairs() -> Repairs:
    return {BLANK: 0, SURROGATES: 0}


def documents(shard: Path, repairs: Repairs | None = None) -> Iterator[str]:
    """The texts of one shard that are not blank. ConfigError names the file and line of what is malformed.

    A lone surrogate (legal in JSON, and no character) becomes U+FFFD. What was left out or changed is added to `repairs`, and the
    first surrogate said.
    """
    repairs_said = repairs is not None
    repairs = no_repairs() if repairs is None else repairs
    number = 0
    try:
        with _open(shard) as lines:
            for number, line in text_lines(lines, shard):
                text = _text(shard, number, line) if line.strip() else ""
                if not text.strip():
                    repairs[BLANK] += 1
                    continue
                whole = _LONE_SURROGATE.sub("\ufffd", text)
                if whole != text:
                    if repairs_said and not repairs[SURROGATES]:
                        note(
                            f"{shard} line {number} has a lone surrogate; such characters are replaced by U+FFFD and counted"
                        )
                    repairs[SURROGATES] += 1
                yield whole
    except GeneratorExit:  # a stream that is left at the end of the program, when the names below are gone
        raise
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"{shard} is damaged after line {number}: {str(error) or 'it ends early'}") from None
    except OSError as error:
        raise ConfigError(f"{shard} cannot be read after line {number}: {error.strerror}") from None


def count_documents(shards: Iterable[Path]) -> tuple[int, Repairs]:
    """How many documents the shards hold, and what is left out or changed of them; reads them all."""
    repairs = no_repairs()
    return sum(1 for shard in shards for _ in documents(shard, repairs)), repairs


def one_pass(shards: list[Path], buffer_size: int, seed: int, repairs: Repairs | None = None) -> Iterator[str]:
    """All documents once: the shards in an order drawn from `seed`, then shuffled through a buffer of `buffer_size`."""
    order = random.Random(seed)
    shuffled = order.sample(shards, len(shards))
    return through_buffer((text for shard in shuffled for text in documents(shard, repairs)), buffer_size, order)


def through_buffer(items: Iterable[T], buffer_size: int, order: random.Random) -> Iterator[T]:
    """The items in a local shuffle: each place of a full buffer is drawn at random and refilled with the next item."""
    buffer: list[T] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        place = order.randrange(buffer_size)
        yield buffer[place]
        buffer[place] = item
    order.shuffle(buffer)
    yield from buffer


def _open(shard: Path) -> IO[bytes]:
    return gzip.open(shard, "rb") if shard.name.endswith(".gz") else shard.open("rb")  # type: ignore[return-value]


def _text(shard: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{shard} line {number} is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ConfigError(f"{shard} line {number} is nested too deep for JSON to be read") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{shard} line {number} is JSON that cannot be read: {str(error).split(';')[0]}") from None
    if not isinstance(row, dict) or "text" not in row:
        has = ", ".join(map(repr, row)) if isinstance(row, dict) else f"a {type(row).__name__}"
        raise ConfigError(
            f"{shard} line {number} has no field 'text': each line is an object that has; this one has {has}"
        )
    if not isinstance(row["text"], str):
        raise ConfigError(f"{shard} line {number}: the field 'text' is {row['text']!r:.80}, not a string")
    return row["text"]
