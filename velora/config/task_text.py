"""The tasks on text: language modelling (C4, Python's manual) and sequence classification (GLUE, the manual's topics)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from velora.config.model import limits_of
from velora.config.parts import Head, Task, TaskData

if TYPE_CHECKING:
    from velora.config.run import Config

Shapes = dict[str, tuple[tuple[int, ...], str]]  # shape and dtype name of each tensor of a batch


class TextTask(Task):
    """A task whose texts are cut at `max_length` tokens."""

    max_length: PositiveInt

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        if getattr(config.model, "path", None) is None:  # else its config.json tells, when it is loaded
            yield from limits_of(getattr(config.model, "architecture", None)).problems(self.max_length, config)


class LanguageModelling(TextTask):
    """Next-token prediction. `published_eval_batch_size`: only for perplexity_published_convention."""

    published_eval_batch_size: PositiveInt

    @property
    def masked(self) -> bool:
        """Whether batches hold padding, and a mask for it."""
        return False

    def head(self, config: Config) -> Head:
        return Head("causal_lm")

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        if self.max_length < 2:
            yield f"task.max_length={self.max_length}: a sequence of one token predicts nothing; give at least 2"

    def batch_shapes(self, batch_size: int, config: Config) -> Shapes:
        keys = ("input_ids", "attention_mask", "labels") if self.masked else ("input_ids", "labels")
        return dict.fromkeys(keys, ((batch_size, self.max_length), "int64"))


class Manual(LanguageModelling):
    """The embedded task of language models: the text of Python's own manual."""

    kind: Literal["manual"]

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        from velora.data.manual import load_manual

        return load_manual(self, preprocessor, config)


SHARDS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
SIDES = ("train", "validation")


def shards_of(folder: Path, side: str) -> list[Path]:
    """The json-lines shards of one side, by name; a name that contains `train` or `validation` tells the side."""
    return sorted(p for p in folder.iterdir() if p.name.endswith(SHARDS) and side in p.name and p.is_file())


class C4(LanguageModelling):
    """C4 (English) from the hub, or json-lines shards in data.root/<folder>; see velora/data/c4.py."""

    kind: Literal["c4"]
    folder: str  # below data.root
    packing: Literal["pad", "pack"]
    eval_tokens: PositiveInt
    data_seed: NonNegativeInt
    shuffle_buffer: PositiveInt
    hub: str
    hub_subset: str | None
    revision: str | None

    @property
    def masked(self) -> bool:
        return self.packing == "pad"

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        if config.trainer.max_steps is None:
            yield f"trainer.max_steps=null: task={self.name} is a stream without an end; give the number of steps"
        for key in ("eval_every", "save_every"):
            if getattr(config.trainer, key) == "epoch":
                yield f"trainer.{key}=epoch: task={self.name} is a stream without epochs; give a number of steps or a fraction"
        root = config.data.root
        if root is None:
            if self.folder != "c4":
                yield f"task.folder={self.folder} needs data.root=DIR, the folder that it lies in"
        elif root.is_dir():
            yield from self.folder_problems(root)

    def folder_problems(self, root: Path) -> Iterator[str]:
        """Sentences about a folder that is missing or lacks the shards of a side."""
        folder = root / self.folder
        if not folder.is_dir():
            usable = sorted(p.name for p in root.iterdir() if p.is_dir() and all(shards_of(p, side) for side in SIDES))
            found = f"below it {', '.join(usable)} hold shards" if usable else "no folder below it holds shards"
            yield f"data.root={root} has no folder {folder.name} (task.folder) with json-lines shards; {found}"
            return
        missing = [side for side in SIDES if not shards_of(folder, side)]
        if missing:
            yield (
                f"{folder} holds no shard for {' and none for '.join(missing)}: a file with that word in its name that "
                f"ends in {', '.join(SHARDS)}"
            )

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        from velora.data.c4 import load

        return load(self, preprocessor, config)


class SequenceClassification(TextTask):
    """A class or a score for a text or a pair of texts."""

    def batch_shapes(self, batch_size: int, config: Config) -> Shapes:
        ids, labels = (batch_size, self.max_length), "float32" if self.head(config).regression else "int64"
        return {"input_ids": (ids, "int64"), "attention_mask": (ids, "int64"), "labels": ((batch_size,), labels)}


class Topics(SequenceClassification):
    """The embedded task of encoders: which topic of Python's own manual a paragraph belongs to."""

    kind: Literal["topics"]
    num_topics: int = Field(ge=2)

    def head(self, config: Config) -> Head:
        return Head("sequence_classification", self.num_topics)

    def problems(self, config: Config) -> Iterator[str]:
        from pydoc_data.topics import topics

        yield from super().problems(config)
        if self.num_topics > len(topics):
            yield f"task.num_topics={self.num_topics} is more than the {len(topics)} topics of this Python's manual"

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        from velora.data.manual import load_topics

        return load_topics(self, preprocessor, config)


BINARY = ("0", "1")
CORRELATIONS = ("matthews_correlation", "pearson", "spearman")
ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True)
class GlueLayout:
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


GLUE = {
    "cola": GlueLayout(
        "CoLA", ("sentence",), "label", BINARY, ("matthews_correlation",), header=("source", "label", "mark", "sentence")
    ),
    "sst2": GlueLayout("SST-2", ("sentence",), "label", BINARY),
    "mrpc": GlueLayout(
        "MRPC", ("#1 String", "#2 String"), "Quality", BINARY, ("f1", "accuracy"), ("sentence1", "sentence2")
    ),
    "stsb": GlueLayout("STS-B", ("sentence1", "sentence2"), "score", None, ("pearson", "spearman")),
    "qqp": GlueLayout(
        "QQP", ("question1", "question2"), "is_duplicate", BINARY, ("accuracy", "f1"), broken_rows=10
    ),
    "mnli": GlueLayout(
        "MNLI", ("sentence1", "sentence2"), "gold_label", ("entailment", "neutral", "contradiction"),
        hub_texts=("premise", "hypothesis"),
        validation=(("matched", "dev_matched.tsv"), ("mismatched", "dev_mismatched.tsv")),
    ),
    "qnli": GlueLayout("QNLI", ("question", "sentence"), "label", ENTAILMENT),
    "rte": GlueLayout("RTE", ("sentence1", "sentence2"), "label", ENTAILMENT),
    "wnli": GlueLayout("WNLI", ("sentence1", "sentence2"), "label", BINARY),
}  # fmt: skip


def validation_file(folder: Path, name: str) -> Path:
    """The official file; a sample that its makers drew from the training file (and named so) where that is missing."""
    file, sample = folder / name, folder / name.replace(".tsv", "_from_train.tsv")
    return sample if sample.is_file() and not file.is_file() else file


class Glue(SequenceClassification):
    """One of the nine tasks of GLUE: data.root/glue/<folder of the classic release>, data.root/<folder>, or the hub."""

    kind: Literal["glue"]
    folder: str | None  # below data.root; null: glue/<name of the classic release>
    train_size: PositiveInt | None  # so many training examples, drawn with the run's seed; null: all
    eval_size: PositiveInt | None  # the first so many validation examples; null: all
    hub: str
    revision: str | None

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name.removeprefix("glue/") not in GLUE:
            raise ValueError(f"task.name={name} is not a GLUE task; they are {', '.join(f'glue/{k}' for k in GLUE)}")
        return name

    @property
    def layout(self) -> GlueLayout:
        return GLUE[self.name.removeprefix("glue/")]

    def head(self, config: Config) -> Head:
        labels = self.layout.labels
        return Head("sequence_classification", 1 if labels is None else len(labels), regression=labels is None)

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
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
            yield from self.missing_files(config.data.root)

    @property
    def below_root(self) -> str:
        return self.folder or f"glue/{self.layout.folder}"

    def missing_files(self, root: Path) -> Iterator[str]:
        """A sentence about a folder that is missing or lacks a file."""
        folder = root / self.below_root
        if not folder.is_dir():
            present = sorted(f"{p.parent.name}/{p.name}" for p in (root / "glue").glob("*") if p.is_dir())
            yield (
                f"data.root={root} has no folder {self.below_root} for task={self.name}; "
                + (f"below it are {', '.join(present)}: choose one of these tasks, another data.root, " if present else
                   "it has no folder glue/ with the classic release's folders: give another data.root, ")
                + "or task.folder=DIR, the folder below data.root that holds train.tsv"
            )  # fmt: skip
            return
        files = ["train.tsv", *(validation_file(folder, name).name for _, name in self.layout.validation)]
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            yield (
                f"{folder} has no {' and no '.join(missing)}, which task={self.name} needs; it holds "
                f"{', '.join(sorted(p.name for p in folder.iterdir())) or 'nothing'}"
            )

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        from velora.data.glue import load

        return load(self, preprocessor, config)
