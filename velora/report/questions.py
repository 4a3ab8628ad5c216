"""Two evaluations of the same questions, question by question: McNemar's test.

Of two networks that answer the same questions only those count that one answered rightly and the other did not: b and c of them. If
neither is better, b is binomial with b + c trials and probability 1/2, so the exact two-sided p-value is that of the
sign test. The interval of the difference (c - b) / n is the one of paired proportions, 1.96 standard errors each way.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from velora.errors import ConfigError
from velora.eval.questions import Answer, header_and_answers

_SHOULD_AGREE = ("benchmark", "split", "prompt", "num_shots")


class Comparison(NamedTuple):
    """`only_a`, `only_b`: questions that the one has right and the other wrong."""

    questions: int
    right_a: int
    right_b: int
    only_a: int
    only_b: int
    p_value: float

    @property
    def difference(self) -> float:
        """Accuracy of B less that of A."""
        return (self.only_b - self.only_a) / self.questions

    @property
    def standard_error(self) -> float:
        spread = self.only_a + self.only_b - (self.only_b - self.only_a) ** 2 / self.questions
        return math.sqrt(spread) / self.questions


def answers_file(place: Path) -> Path:
    """The file itself, or that of the last step in a run's folder; ConfigError where there is none."""
    if place.is_file():
        return place
    found = {int(m[1]): p for p in place.glob("mmlu/step-*.jsonl") if (m := re.fullmatch(r"step-(\d+)\.jsonl", p.name))}
    if not found:
        raise ConfigError(
            f"--compare-questions {place} is no file of answers and no run folder with mmlu/step-*.jsonl; give runs/<name>/seed<k> "
            "of an evaluation on MMLU"
        )
    return found[max(found)]


def compare(a: Path, b: Path) -> Comparison:
    """McNemar's exact test on two files of answers; ConfigError where they do not answer the same questions."""
    (header_a, answers_a), (header_b, answers_b) = _read(a), _read(b)
    different = [key for key in _SHOULD_AGREE if header_a.get(key) != header_b.get(key)]
    if different:
        said = ", ".join(f"{key} is {header_a.get(key)} and {header_b.get(key)}" for key in different)
        raise ConfigError(
            f"--compare-questions {a} {b}: these are different evaluations ({said}); give two of the same kind"
        )
    if answers_a.keys() != answers_b.keys() or any(answers_a[key].gold != answers_b[key].gold for key in answers_a):
        raise ConfigError(
            f"--compare-questions {a} {b}: they do not answer the same questions ({len(answers_a)} and {len(answers_b)}); "
            "give whole evaluations of the same sample"
        )
    right_a, right_b = ({key for key, answer in side.items() if answer.right} for side in (answers_a, answers_b))
    only_a, only_b = len(right_a - right_b), len(right_b - right_a)
    return Comparison(len(answers_a), len(right_a), len(right_b), only_a, only_b, mcnemar(only_a, only_b))


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value."""
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


def _read(file: Path) -> tuple[dict[str, Any], dict[tuple[str, int], Answer]]:
    try:
        header, answers = header_and_answers(file)
    except ValueError as error:
        raise ConfigError(f"--compare-questions {file} is no file of answers ({error})") from None
    if not answers:
        raise ConfigError(f"--compare-questions {file} holds no answers; let its evaluation finish first")
    return header, {(answer.subject, answer.index): answer for answer in answers}


def comparison_text(a: Path, b: Path, found: Comparison) -> str:
    """The comparison in four lines."""
    error = 1.96 * found.standard_error
    return (
        f"A {a}: {found.right_a} of {found.questions} right ({found.right_a / found.questions:.2%})\n"
        f"B {b}: {found.right_b} of {found.questions} right ({found.right_b / found.questions:.2%})\n"
        f"B - A: {found.difference:+.2%} (95 % interval {found.difference - error:+.2%} to {found.difference + error:+.2%})\n"
        f"only A right {found.only_a}, only B right {found.only_b}: McNemar's exact p = {found.p_value:.3g}"
    )
