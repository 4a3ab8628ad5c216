"""A table before it has a format: cells, marks, and what is said above and below it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """What is shown, the letters of the notes below the table, and the number to sort by where the text is none."""

    text: str = ""
    marks: tuple[str, ...] = ()
    value: float | None = None


class Notes:
    """What the marks of one table mean: the same sentence has the same letter."""

    def __init__(self) -> None:
        self._letters: dict[str, str] = {}

    def mark(self, sentence: str) -> str:
        """The letter of a sentence, a new one where it is said for the first time."""
        return self._letters.setdefault(sentence, letters(len(self._letters)))

    def marks(self, sentences: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.mark(sentence) for sentence in sentences))

    def __iter__(self):
        return iter((letter, sentence) for sentence, letter in self._letters.items())


def letters(number: int) -> str:
    """a, b, ... z, aa, ab, ..."""
    text = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, 26)
        text = chr(ord("a") + digit) + text
    return text


@dataclass
class Table:
    """`about` stands above the table; `rules`: the rows before which a new block begins; `details`: one text a row, on demand."""

    title: str
    head: Sequence[str]
    rows: list[list[Cell]]
    about: list[str] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)
    rules: set[int] = field(default_factory=set)
    remarks: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)


def cells(texts: Iterable[str]) -> list[Cell]:
    return [Cell(text) for text in texts]
