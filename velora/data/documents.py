"""Documents from json-lines shards, in a shuffled order that repeats; and sequences from documents without end.

A shard has one JSON object per line, whose field `text` is the document; its other fields are ignored.

Each iteration of a stream begins at the first document again, with the same order: an interrupted run skips what it has seen
and goes on with what it would have seen.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from velora.data.language_model import Ids
from velora.data.text import text_lines
from velora.errors import ConfigError
from velora.run.notes import note

T = TypeVar("T")

BLANK, SURROGATES = "blank_documents_left_out", "documents_with_lone_surrogates_replaced"
Repairs = dict[str, int]
"""What reading has left out or changed: numbers of documents under the two names above."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


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


class SequenceStream(IterableDataset):
    """Sequences made by `encode` from the documents of `one_pass(0)`, `one_pass(1)`, ... without end.

    With several loading processes, process w of W encodes every W-th group of `group` documents, so that none is seen twice;
    `splits_itself` says that the source of the documents sees to that already.
    """

    def __init__(
        self,
        one_pass: Callable[[int], Iterable[str]],
        encode: Callable[[Iterable[str]], Iterator[Ids]],
        *,
        group: int,
        splits_itself: bool = False,
    ) -> None:
        super().__init__()
        self.one_pass = one_pass
        self.encode = encode
        self.group = group
        self.splits_itself = splits_itself

    def __iter__(self) -> Iterator[Ids]:
        worker = get_worker_info()
        documents = self._passes()
        if worker is None or self.splits_itself:
            return self.encode(documents)
        mine, of = worker.id, worker.num_workers
        return self.encode(d for i, d in enumerate(documents) if i // self.group % of == mine)

    def _passes(self) -> Iterator[str]:
        for number in itertools.count():
            empty = True
            for document in self.one_pass(number):
                empty = False
                yield document
            if empty:
                raise ConfigError("the training shards hold no document with text")
