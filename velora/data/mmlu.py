"""Reading MMLU: from the published csv files below data.root, or from the hub.

A csv file has no header; a row is the question, four answers and the letter of the right one. Texts are taken as they stand
(the original program reads with pandas, which turns an answer such as `None` into `nan`; that is not copied).
"""

from __future__ import annotations

import csv
import hashlib
import io
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from velora.config.mmlu import MMLUKeys
from velora.errors import ConfigError
from velora.models import hub
from velora.run.files import why

LETTERS = "ABCD"
_COLUMNS = 6


class Question(NamedTuple):
    """One question of a subject; `row` is its place in the subject's split, `gold` the place of the right answer (0 to 3)."""

    row: int
    text: str
    answers: tuple[str, ...]
    gold: int


class Subject(NamedTuple):
    """A subject's examples (all of dev) and the questions that are asked."""

    name: str
    shots: tuple[Question, ...]
    questions: tuple[Question, ...]


def read_subjects(keys: MMLUKeys, root: Path | None) -> tuple[list[Subject], dict[str, Any]]:
    """The chosen subjects, each with its questions or those of the sample, and where they come from (for the record)."""
    subjects, about = _from_hub(keys) if root is None else _from_files(keys, root)
    for subject in subjects:
        if len(subject.shots) < keys.num_shots:
            raise ConfigError(
                f"{subject.name} has {len(subject.shots)} examples in dev, and num_shots={keys.num_shots}; give fewer shots"
            )
    total = sum(len(subject.questions) for subject in subjects)
    about |= {"split": keys.split, "questions_of_split": total}
    return _sample(subjects, keys, total), about


def _sample(subjects: list[Subject], keys: MMLUKeys, total: int) -> list[Subject]:
    """Of all questions of all subjects so many as the keys say, each with the same chance; subjects without any go."""
    if keys.questions is None or keys.questions >= total:
        return subjects
    every = [(subject.name, question.row) for subject in subjects for question in subject.questions]
    drawn = set(random.Random(keys.sample_seed).sample(every, keys.questions))
    kept = [
        subject._replace(questions=tuple(q for q in subject.questions if (subject.name, q.row) in drawn))
        for subject in subjects
    ]
    return [subject for subject in kept if subject.questions]


def _from_files(keys: MMLUKeys, root: Path) -> tuple[list[Subject], dict[str, Any]]:
    subjects, digest = [], hashlib.sha256()
    for name, paths in keys.files(root).items():
        contents = [_bytes(path) for path in paths]
        for content in contents:
            digest.update(content)
        shots, questions = (read_csv(path, content) for path, content in zip(paths, contents, strict=True))
        subjects.append(Subject(name, tuple(shots), tuple(questions)))
    return subjects, {"source": "files", "folder": keys.folder, "sha256_of_all_files": digest.hexdigest()}


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({why(error)}); give another data.root") from None


def read_csv(path: Path, content: bytes) -> list[Question]:
    """The questions of one file; ConfigError names file, row and what is wrong with it."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path} line {line} is not UTF-8 text: {error.reason}; save it as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    questions: list[Question] = []
    try:
        for cells in reader:
            if cells:
                questions.append(_question(cells, len(questions), f"{path} line {reader.line_num}"))
    except csv.Error as error:
        raise ConfigError(f"{path} line {reader.line_num} is not csv ({error}); put the published file there") from None
    if not questions:
        raise ConfigError(f"{path} has no questions; put the published file there")
    return questions


def _question(cells: Sequence[str], index: int, where: str) -> Question:
    if len(cells) != _COLUMNS:
        raise ConfigError(
            f"{where} has {len(cells)} columns in place of {_COLUMNS}: question, four answers, and the letter of the right one"
        )
    text, *answers, letter = cells
    if len(letter) != 1 or letter not in LETTERS:
        raise ConfigError(f"{where}: the right answer {letter[:80]!r} is not one of A, B, C, D")
    return Question(index, text, tuple(answers), LETTERS.index(letter))


def _from_hub(keys: MMLUKeys) -> tuple[list[Subject], dict[str, Any]]:
    """The hub's name for `val` is `validation`; its rows have `question`, `choices` and `answer` (0 to 3)."""
    from datasets import load_dataset

    remedy = f"give data.root=DIR with {keys.folder}/dev/*_dev.csv and {keys.folder}/{keys.split}/*.csv"
    split, subjects = {"val": "validation"}.get(keys.split, keys.split), []
    for name in keys.chosen:
        data = hub.load(
            f"the data set {keys.hub} (task.hub), {name},", remedy,
            partial(load_dataset, keys.hub, name, revision=keys.revision), local=Path(keys.hub).exists(),
        )  # fmt: skip
        try:
            shots, questions = ([_hub_question(row, i) for i, row in enumerate(data[part])] for part in ("dev", split))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the data set {keys.hub} has not the form of cais/mmlu ({error}); {remedy}") from None
        subjects.append(Subject(name, tuple(shots), tuple(questions)))
    return subjects, {"source": "hub", "name": keys.hub, "revision": keys.revision}


def _hub_question(row: dict[str, Any], index: int) -> Question:
    answers = tuple(row["choices"])
    if len(answers) != len(LETTERS):
        raise ValueError(f"{len(answers)} answers in place of four")
    return Question(index, row["question"], answers, range(len(LETTERS))[int(row["answer"])])
