"""GLUE: nine tasks on single sentences and sentence pairs, from the hub or from the classic release's folders.

Texts stay text until a batch is made: the collator tokenises it and pads to its longest text. Scores follow the GaLore
paper, which the VeLoRA paper follows: Matthews' correlation (CoLA), Pearson's (STS-B), F1 (MRPC), accuracy (all others).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import PositiveInt, field_validator

from velora.config.parts import Head, Phase, Task, TaskData
from velora.data.counts import num_examples, num_tokens
from velora.data.text import Line, count_longer, file_facts, mask_of, padded, read_tsv, shown
from velora.errors import ConfigError
from velora.models.fit import check_length, check_vocabulary, length_problems, network_limits
from velora.run.notes import note

if TYPE_CHECKING:
    import torch

    from velora.config.run import Config

BINARY = ("0", "1")
CORRELATIONS = ("matthews_correlation", "pearson", "spearman")
ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True)
class Layout:
    """Where a task's texts and labels stand, in the classic files and on the hub, and how it is scored.

    `labels` are the classic files' values in the order of the class numbers; None for a score from 0 to 5. `broken_rows` is the
    number of rows with a wrong number of columns that the official release itself has at most.
    """

    folder: str
    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)  # the first one selects the best epoch
    hub_texts: tuple[str, ...] = ()  # where the hub's names differ from the classic ones
    validation: tuple[tuple[str, str], ...] = (("", "dev.tsv"),)
    header: tuple[str, ...] | None = None  # the columns of a file that has no header line
    broken_rows: int = 0


LAYOUTS = {
    "cola": Layout(
        "CoLA", ("sentence",), "label", BINARY, ("matthews_correlation",), header=("source", "label", "mark", "sentence")
    ),
    "sst2": Layout("SST-2", ("sentence",), "label", BINARY),
    "mrpc": Layout(
        "MRPC", ("#1 String", "#2 String"), "Quality", BINARY, ("f1", "accuracy"), ("sentence1", "sentence2")
    ),
    "stsb": Layout("STS-B", ("sentence1", "sentence2"), "score", None, ("pearson", "spearman")),
    "qqp": Layout(
        "QQP", ("question1", "question2"), "is_duplicate", BINARY, ("accuracy", "f1"), broken_rows=10
    ),
    "mnli": Layout(
        "MNLI", ("sentence1", "sentence2"), "gold_label", ("entailment", "neutral", "contradiction"),
        hub_texts=("premise", "hypothesis"),
        validation=(("matched", "dev_matched.tsv"), ("mismatched", "dev_mismatched.tsv")),
    ),
    "qnli": Layout("QNLI", ("question", "sentence"), "label", ENTAILMENT),
    "rte": Layout("RTE", ("sentence1", "sentence2"), "label", ENTAILMENT),
    "wnli": Layout("WNLI", ("sentence1", "sentence2"), "label", BINARY),
}  # fmt: skip


class Row(NamedTuple):
    """One example: a text or a pair of texts, and a class number or a score."""

    texts: tuple[str, ...]
    label: int | float


class Glue(Task):
    kind: Literal["glue"]

    folder: str | None = None  # below data.root; null: glue/<name of the classic release>
    max_length: PositiveInt = 512
    train_size: PositiveInt | None = None  # so many training examples, drawn with the run's seed; null: all
    eval_size: PositiveInt | None = None  # the first so many validation examples; null: all
    hub: str = "nyu-mll/glue"
    revision: str | None = None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name.removeprefix("glue/") not in LAYOUTS:
            raise ValueError(f"task.name={name} is not a GLUE task; they are {', '.join(f'glue/{k}' for k in LAYOUTS)}")
        return name

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.name.removeprefix("glue/")]

    def head(self, config: Config) -> Head:
        labels = self.layout.labels
        return Head("sequence_classification", 1 if labels is None else len(labels), regression=labels is None)

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        yield from length_problems(self.max_length, config)
        correlations = [name for name in self.layout.metrics if name in CORRELATIONS]
        if self.eval_size is not None and self.eval_size < 2 and correlations:
            yield (
                f"task.eval_size={self.eval_size}: task={self.name} is scored by {correlations[0]}, and one example has no "
                "correlation; give at least 2"
            )
        if config.data.root is None:
            if self.folder is not None:
                yield f"task.folder={self.folder} needs data.root=DIR, the folder that it lies in"
        elif config.data.root.is_dir():
            yield from self._missing_files(config.data.root)

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        limits = network_limits(config)
        check_vocabulary(preprocessor, limits, config)
        check_length(self.max_length, limits, config)
        if self.max_length > preprocessor.model_max_length:
            raise ConfigError(
                f"task.max_length={self.max_length} is more than the {preprocessor.model_max_length} tokens that the tokenizer of "
                f"model={config.model.name} is made for"
            )
        root = config.data.root
        splits, about = self._from_hub() if root is None else self._from_files(root)
        train = self._subset(splits.pop("train"), self.train_size, config.seed, about, "train")
        validation = {k: self._subset(v, self.eval_size, None, about, k) for k, v in splits.items()}
        about["cut_at_max_length"] = self._cut({"train": train, **validation}, preprocessor)
        about.update(
            task=self.name, max_length=self.max_length, padding="to the longest text of the batch",
            train_examples=len(train), validation_examples={k or "validation": len(v) for k, v in validation.items()},
        )  # fmt: skip
        return TaskData(
            phases=[Phase("train", train, validation)],
            collate=lambda rows: collate(rows, preprocessor, self.max_length, self.layout.labels is None),
            metrics=self._scores,
            best_metric=self.layout.metrics[0],
            greater_is_better=True,
            unit="tokens",
            num_targets=num_examples,
            num_items=num_tokens,
            reduce_logits=lambda logits, labels: logits[0] if isinstance(logits, tuple) else logits,
            about=about,
        )

    def batch_shapes(self, batch_size: int, config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
        labels = "float32" if self.layout.labels is None else "int64"
        ids = (batch_size, self.max_length)
        return {"input_ids": (ids, "int64"), "attention_mask": (ids, "int64"), "labels": ((batch_size,), labels)}

    def _cut(self, splits: dict[str, list[Row]], tokenizer: Any) -> dict[str, int]:
        """How many examples of each split are longer than `max_length`; said where there are any."""
        cut = {
            split or "validation": count_longer([row.texts for row in rows], tokenizer, self.max_length)
            for split, rows in splits.items()
        }
        for split, number in cut.items():
            if number:
                note(
                    f"{number} examples of {split} are longer than task.max_length={self.max_length} tokens and are cut"
                )
        return cut

    def _scores(self, logits: Any, labels: Any) -> dict[str, float]:
        from velora.data.metrics import scores

        return scores(self.layout.metrics, logits, labels, regression=self.layout.labels is None)

    def _subset(
        self, rows: list[Row], size: int | None, seed: int | None, about: dict[str, Any], split: str
    ) -> list[Row]:
        if size is None or size >= len(rows):
            return rows
        about.setdefault("subset", {})[split or "validation"] = f"{size} of {len(rows)} examples"
        if seed is None:
            return rows[:size]
        return random.Random(seed).sample(rows, size)

    @property
    def _below_root(self) -> str:
        return self.folder or f"glue/{self.layout.folder}"

    def _missing_files(self, root: Path) -> Iterator[str]:
        folder = root / self._below_root
        if not folder.is_dir():
            present = sorted(f"{p.parent.name}/{p.name}" for p in (root / "glue").glob("*") if p.is_dir())
            yield (
                f"data.root={root} has no folder {self._below_root} for task={self.name}; "
                + (f"below it are {', '.join(present)}: choose one of these tasks, another data.root, " if present else
                   "it has no folder glue/ with the classic release's folders: give another data.root, ")
                + "or task.folder=DIR, the folder below data.root that holds train.tsv"
            )  # fmt: skip
            return
        files = ["train.tsv", *(_validation_file(folder, name).name for _, name in self.layout.validation)]
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            yield (
                f"{folder} has no {' and no '.join(missing)}, which task={self.name} needs; it holds "
                f"{', '.join(sorted(p.name for p in folder.iterdir())) or 'nothing'}"
            )

    def _from_files(self, root: Path) -> tuple[dict[str, list[Row]], dict[str, Any]]:
        for sentence in self._missing_files(root):
            raise ConfigError(sentence)
        folder, splits, facts = root / self._below_root, {}, {}
        for split, name in (("train", "train.tsv"), *self.layout.validation):
            file = folder / name if split == "train" else _validation_file(folder, name)
            splits[split], broken, blank = read_rows(file, self.layout)
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
        return splits, {"source": "files", "folder": self._below_root, "files": facts}

    def _from_hub(self) -> tuple[dict[str, list[Row]], dict[str, Any]]:
        from velora.models.hub import load

        def fetch() -> Any:
            from datasets import load_dataset

            return load_dataset(self.hub, self.name.removeprefix("glue/"), revision=self.revision)

        remedy = f"give data.root=DIR with glue/{self.layout.folder}/train.tsv, the classic release's files"
        data = load(f"the data set {self.hub} of task={self.name}", remedy, fetch, local=Path(self.hub).exists())
        columns = self.layout.hub_texts or self.layout.texts
        splits = {}
        for split, part in (
            ("train", "train"),
            *((s, f"validation_{s}".rstrip("_")) for s, _ in self.layout.validation),
        ):
            *texts, labels = [data[part][column][:] for column in (*columns, "label")]
            splits[split] = [Row(pair, label) for pair, label in zip(zip(*texts, strict=True), labels, strict=True)]
        revisions = {
            url.split("@")[1].split("/")[0] for url in data["train"].info.download_checksums or {} if "@" in url
        }
        return splits, {"source": "hub", "name": self.hub, "revision": ", ".join(sorted(revisions)) or self.revision}


def collate(rows: list[Row], tokenizer: Any, max_length: int, regression: bool) -> dict[str, torch.Tensor]:
    """Tokenise a batch: ids and mask (B, L), labels (B,). Pairs are shortened at the longer text, as published."""
    import torch

    columns = [list(column) for column in zip(*(row.texts for row in rows), strict=True)]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    batch = {
        "input_ids": padded(encoded["input_ids"], tokenizer.pad_token_id),
        "attention_mask": mask_of(encoded["input_ids"]),
    }
    if "token_type_ids" in encoded:
        batch["token_type_ids"] = padded(encoded["token_type_ids"], 0)
    batch["labels"] = torch.tensor([row.label for row in rows], dtype=torch.float32 if regression else torch.int64)
    return batch


def read_rows(file: Path, layout: Layout) -> tuple[list[Row], int, int]:
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


def _row(file: Path, line: Line, places: list[int], layout: Layout) -> Row:
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


def _wrong(file: Path, line: Line, layout: Layout, value: str, right: str) -> str:
    return f"{file} line {line.number}, column {layout.label!r}: {shown(value)} is not {right}"


def _validation_file(folder: Path, name: str) -> Path:
    """The official file; a sample that its makers drew from the training file (and named so) where that is missing."""
    file, sample = folder / name, folder / name.replace(".tsv", "_from_train.tsv")
    return sample if sample.is_file() and not file.is_file() else file
