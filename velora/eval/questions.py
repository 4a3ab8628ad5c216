"""The answers to multiple-choice questions: one JSON line each, and the scores that follow from them. No torch here."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from velora.config.mmlu import CATEGORIES
from velora.run.files import why
from velora.run.schema import parse_json

LETTERS = "ABCD"


@dataclass(frozen=True)
class Answer:
    """`log_probs` of the four letters; the choice is the largest, the first one of equal ones. `shots` stood before it."""

    subject: str
    index: int
    gold: int
    log_probs: list[float]
    shots: int

    @property
    def choice(self) -> int:
        return self.log_probs.index(max(self.log_probs))

    @property
    def right(self) -> bool:
        return self.choice == self.gold

    @property
    def tied(self) -> bool:
        return self.log_probs.count(max(self.log_probs)) > 1

    def line(self) -> dict[str, Any]:
        return {
            "subject": self.subject, "index": self.index, "gold": LETTERS[self.gold], "choice": LETTERS[self.choice],
            "log_probs": self.log_probs, "shots": self.shots,
        }  # fmt: skip


def header_and_answers(file: Path) -> tuple[dict[str, Any], list[Answer]]:
    """What the file of an evaluation holds; ValueError with the reason where it is none."""
    try:
        lines = [parse_json(line) for line in file.read_bytes().split(b"\n") if line.strip()]
    except OSError as error:
        raise ValueError(why(error)) from None
    if not lines or not isinstance(lines[0], dict) or "digest" not in lines[0]:
        raise ValueError("its first line is no header")
    answers = []
    for number, line in enumerate(lines[1:], 2):
        try:
            values = [float(value) for value in line["log_probs"]]
            gold = LETTERS.index(line["gold"])
            answers.append(Answer(str(line["subject"]), int(line["index"]), gold, values, int(line["shots"])))
            whole = len(values) == len(LETTERS) and line["subject"] in CATEGORIES
        except (TypeError, KeyError, ValueError):
            whole = False
        if not whole:
            raise ValueError(f"line {number} is no answer")
    return lines[0], answers


def scores(answers: list[Answer], num_shots: int) -> dict[str, Any]:
    """Accuracies: `micro` over questions, `macro` over subjects, one for each category (over its questions) and each subject.

    The standard errors are binomial, of an accuracy p on n questions: sqrt(p (1 - p) / n); of the mean over subjects, the root
    of the sum of their squares over the number of subjects.
    """
    subjects, categories = _Tally(), _Tally()
    for answer in answers:
        subjects.add(answer.subject, answer.right)
        categories.add(CATEGORIES[answer.subject], answer.right)
    by_subject = {name: subjects.accuracy(name) for name in sorted(subjects.asked)}
    micro = sum(answer.right for answer in answers) / len(answers)
    return {
        "mmlu_micro": micro,
        "mmlu_macro": sum(by_subject.values()) / len(by_subject),
        "mmlu_micro_standard_error": math.sqrt(micro * (1 - micro) / len(answers)),
        "mmlu_macro_standard_error": math.hypot(*map(subjects.error, by_subject)) / len(by_subject),
        **{f"mmlu_{name}": categories.accuracy(name) for name in sorted(categories.asked)},
        "mmlu_standard_errors": {name: categories.error(name) for name in sorted(categories.asked)},
        "mmlu_subjects": by_subject,
        "mmlu_counts": {
            "questions": len(answers),
            "tied": sum(answer.tied for answer in answers),
            "prompts_with_fewer_shots": sum(answer.shots < num_shots for answer in answers),
            "dropped_shots": sum(num_shots - answer.shots for answer in answers),
        },
    }


class _Tally:
    """Questions asked and answered rightly, by name."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.right: Counter[str] = Counter()

    def add(self, name: str, right: bool) -> None:
        self.asked[name] += 1
        self.right[name] += right

    def accuracy(self, name: str) -> float:
        return self.right[name] / self.asked[name]

    def error(self, name: str) -> float:
        p = self.accuracy(name)
        return math.sqrt(p * (1 - p) / self.asked[name])


def flat_scores(found: dict[str, Any]) -> dict[str, float]:
    """The scores that are one number each, as a line of metrics.jsonl has them."""
    return {key: value for key, value in found.items() if not isinstance(value, dict)}
