"""GLUE: nine tasks on single sentences and sentence pairs, from the hub or from the classic release's folders.

Texts stay text until a batch is made: the collator tokenises it and pads to its longest text. Scores follow the GaLore
paper, which the VeLoRA paper follows: Matthews' correlation (CoLA), Pearson's (STS-B), F1 (MRPC), accuracy (all others).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velora.config.parts import TaskData
from velora.config.task_text import Glue, GlueLayout, validation_file
from velora.data.text import Row, classification_task_data, count_longer, file_facts, text_lines
from velora.errors import ConfigError
from velora.models import hub
from velora.models.tokenizer import check_fit
from velora.run.notes import note

if TYPE_CHECKING:
    from velora.config.run import Config

Splits = dict[str, list[Row]]  # "train", and the rows of each validation set by its name ("" for the only one)

SHOWN_CHARACTERS = 80


def load(task: Glue, tokenizer: Any, config: Config) -> TaskData:
    check_fit(task.max_length, tokenizer, config)
    if task.max_length > tokenizer.model_max_length:
        raise ConfigError(
            f"task.max_length={task.max_length} is more than the {tokenizer.model_max_length} tokens that the tokenizer of "
            f"model={config.model.name} is made for"
        )
    root = config.data.root
    splits, about = _from_hub(task) if root is None else _from_files(task, root)
    train = _subset(splits.pop("train"), task.train_size, config.seed, about, "train")
    validation = {k: _subset(v, task.eval_size, None, about, k) for k, v in splits.items()}
    about["cut_at_max_length"] = _cut({"train": train, **validation}, tokenizer, task.max_length)
    about.update(
        task=task.name, max_length=task.max_length, padding="to the longest text of the batch",
        train_examples=len(train), validation_examples={k or "validation": len(v) for k, v in validation.items()},
    )  # fmt: skip
    return classification_task_data(
        train, validation, tokenizer, task.max_length, task.layout.metrics, about, regression=task.layout.labels is None
    )


def _subset(rows: list[Row], size: int | None, seed: int | None, about: dict[str, Any], split: str) -> list[Row]:
    """`size` rows: the first ones, or with a seed as many drawn at random."""
    if size is None or size >= len(rows):
        return rows
    about.setdefault("subset", {})[split or "validation"] = f"{size} of {len(rows)} examples"
    return rows[:size] if seed is None else random.Random(seed).sample(rows, size)


def _cut(splits: Splits, tokenizer: Any, max_length: int) -> dict[str, int]:
    """How many examples of each split are longer than `max_length`; said where there are any."""
    cut = {split or "validation": count_longer(rows, tokenizer, max_length) for split, rows in splits.items()}
    for split, number in cut.items():
        if number:
            note(f"{number} examples of {split} are longer than task.max_length={max_length} tokens and are cut")
    return cut


def _from_files(task: Glue, root: Path) -> tuple[Splits, dict[str, Any]]:
    for sentence in task.missing_files(root):
        raise ConfigError(sentence)
    folder, splits, facts = root / task.below_root, {}, {}
    for split, name in (("train", "train.tsv"), *task.layout.validation):
        file = folder / name if split == "train" else validation_file(folder, name)
        splits[split], broken, blank = read_rows(file, task.layout)
        facts[file.name] = file_facts(file, rows=len(splits[split]))
        if blank:
            facts[file.name]["blank_rows_left_out"] = blank
            note(f"{file}: {blank} rows that are blank or hold nothing but tabs left out")
        if broken:
            facts[file.name]["rows_left_out"] = broken
            note(f"{file}: {broken} rows with a wrong number of columns left out, as in the official release")
        if file.name != name and split != "train":
            note(
                f"{folder} has no {name}; the scores are those of {file.name}, which is not the official validation set"
            )
    return splits, {"source": "files", "folder": task.below_root, "files": facts}


def _from_hub(task: Glue) -> tuple[Splits, dict[str, Any]]:
    def fetch() -> Any:
        from datasets import load_dataset

        return load_dataset(task.hub, task.name.removeprefix("glue/"), revision=task.revision)

    layout = task.layout
    remedy = f"give data.root=DIR with glue/{layout.folder}/train.tsv, the classic release's files"
    data = hub.load(f"the data set {task.hub} of task={task.name}", remedy, fetch, local=Path(task.hub).exists())
    columns = layout.hub_texts or layout.texts
    splits = {}
    for split, part in (("train", "train"), *((s, f"validation_{s}".rstrip("_")) for s, _ in layout.validation)):
        *texts, labels = [data[part][column][:] for column in (*columns, "label")]
        splits[split] = [Row(pair, label) for pair, label in zip(zip(*texts, strict=True), labels, strict=True)]
    revisions = {url.split("@")[1].split("/")[0] for url in data["train"].info.download_checksums or {} if "@" in url}
    return splits, {"source": "hub", "name": task.hub, "revision": ", ".join(sorted(revisions)) or task.revision}


@dataclass(frozen=True)
class Line:
    """One row of a tab-separated file; `number` counts the file's lines from 1, for messages."""

    number: int
    cells: list[str]


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


def read_rows(file: Path, layout: GlueLayout) -> tuple[list[Row], int, int]:
    """The examples of one classic file, and the numbers of broken and of blank rows left out.

    ConfigError names file, line, column and value.
    """
    lines, blank = read_tsv(file)
    header = list(layout.header) if layout.header is not None else lines[0].cells
    wanted = (*layout.texts, layout.label)
    absent = [name for name in wanted if name not in header]
    if absent:
        raise ConfigError(
            f"{file} line 1 has no column {' and no column '.join(map(repr, absent))}; it has {', '.join(map(repr, header))}"
        )
    places = [header.index(name) for name in wanted]
    rows, broken = [], []
    for line in lines[0 if layout.header is not None else 1 :]:
        if len(line.cells) != len(header):
            broken.append(line)
        else:
            rows.append(_row(file, line, places, layout))
    if len(broken) > layout.broken_rows:
        raise ConfigError(
            f"{file} line {broken[0].number} has {len(broken[0].cells)} columns in place of {len(header)}"
        )
    if not rows:
        raise ConfigError(f"{file} has no rows below its header")
    return rows, len(broken), blank


def _row(file: Path, line: Line, places: list[int], layout: GlueLayout) -> Row:
    *texts, label = (line.cells[place] for place in places)
    if layout.labels is not None:
        if label not in layout.labels:
            raise ConfigError(_wrong(file, line, layout, label, f"one of {', '.join(layout.labels)}"))
        return Row(tuple(texts), layout.labels.index(label))
    try:
        score = float(label)
    except ValueError:
        score = -1.0
    if not 0.0 <= score <= 5.0:
        raise ConfigError(_wrong(file, line, layout, label, "a number from 0 to 5"))
    return Row(tuple(texts), score)


def _wrong(file: Path, line: Line, layout: GlueLayout, value: str, right: str) -> str:
    return f"{file} line {line.number}, column {layout.label!r}: {shown(value)} is not {right}"


def shown(value: str) -> str:
    """A value in quotes for a message, shortened."""
    return repr(value if len(value) <= SHOWN_CHARACTERS else value[:SHOWN_CHARACTERS] + "...")
