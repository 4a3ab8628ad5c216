"""Shared by the tests of MMLU: its keys, small questions, tokenizers, and a folder in the published layout."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import yaml

from velora.config.mmlu import MMLUKeys
from velora.data.mmlu import Question, Subject
from velora.models.tokenizer import byte_tokenizer, llama_tokenizer, prepared

KEYS = yaml.safe_load((Path(__file__).parent.parent / "conf" / "recipe" / "shared" / "mmlu.yaml").read_text())


def keys(**values: Any) -> MMLUKeys:
    return MMLUKeys(**KEYS | values)


def question(index: int, words: int = 3) -> Question:
    text = f"Question {index}: " + " ".join(f"w{index * 7 + i}" for i in range(words)) + "?"
    return Question(index, text, tuple(f"answer {letter}{index}" for letter in "pqrs"), index % 4)


def subject(name: str = "astronomy", num_questions: int = 6, num_shots: int = 5, words: int = 3) -> Subject:
    shots = tuple(question(100 + i) for i in range(num_shots))
    return Subject(name, shots, tuple(question(i, words + i % 4) for i in range(num_questions)))


def write_subject(root: Path, found: Subject, split: str = "test") -> None:
    """The subject's csv files below root/mmlu, as they were published."""
    for part, questions in (("dev", found.shots), (split, found.questions)):
        folder = root / "mmlu" / part
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{found.name}_{part}.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerows((q.text, *q.answers, "ABCD"[q.gold]) for q in questions)


def bytes_tokenizer() -> Any:
    """One token a byte: the blank and the letter are two tokens."""
    return prepared(byte_tokenizer())


def llama(data: Path) -> Any:
    """LLaMA's own: sets a begin token by itself, and " A" after a colon is one piece."""
    return prepared(llama_tokenizer(data / "tokenizers" / "llama" / "tokenizer.model"))


def roberta(data: Path) -> Any:
    """Byte-level BPE, whose begin and end tokens both come by themselves."""
    from velora.models.tokenizer import from_folder

    return from_folder(data / "tokenizers" / "roberta")
