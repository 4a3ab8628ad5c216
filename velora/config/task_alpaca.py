"""Instruction tuning on Alpaca: the task's keys, and what can be said about its file before it is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from velora.config.mmlu import MMLUKeys
from velora.config.parts import Head, TaskData
from velora.config.task_text import Shapes, TextTask

if TYPE_CHECKING:
    from velora.config.run import Config

FOLDER = "alpaca"  # below data.root; the file may also lie in data.root itself


class AlpacaKeys(TextTask):
    """52,002 instructions with their answers, from the hub or from a file of the same layout; see velora/data/alpaca.py."""

    file: str  # data.root/alpaca/<file> or data.root/<file>, with or without .gz
    train_on: Literal["text", "answer"]
    group_by_length: bool
    held_out: int = Field(ge=1)
    eval_size: PositiveInt | None
    data_seed: NonNegativeInt
    hub: str
    revision: str | None

    def head(self, config: Config) -> Head:
        return Head("causal_lm")

    def candidates(self, root: Path) -> list[Path]:
        """Where the file may lie, in the order in which it is looked for."""
        names = (self.file, f"{self.file}.gz")
        return [folder / name for folder in (root / FOLDER, root) for name in names]

    def file_below(self, root: Path) -> Path | None:
        return next((path for path in self.candidates(root) if path.is_file()), None)

    def missing_file(self, root: Path) -> str:
        return (
            f"data.root={root} has no {FOLDER}/{self.file}, nor {self.file}, with or without .gz, which task={self.name} "
            "needs; give another data.root, or task.file=NAME for a file of that layout"
        )

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        if self.max_length < 2:
            yield f"task.max_length={self.max_length}: a sequence of one token predicts nothing; give at least 2"
        if self.eval_size is not None and self.eval_size > self.held_out:
            yield (
                f"task.eval_size={self.eval_size} is more than the task.held_out={self.held_out} rows that do not train; "
                "give a smaller one"
            )
        root = config.data.root
        if root is not None and root.is_dir() and self.file_below(root) is None:
            yield self.missing_file(root)

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        from velora.data.alpaca import load

        return load(self, preprocessor, config)

    def batch_shapes(self, batch_size: int, config: Config) -> Shapes:
        keys = ("input_ids", "attention_mask", "labels")
        return dict.fromkeys(keys, ((batch_size, self.max_length), "int64"))


class Alpaca(AlpacaKeys):
    kind: Literal["alpaca"]


class AlpacaMMLU(AlpacaKeys):
    """The rows that are held out are scored on the way, MMLU at the end or after each epoch."""

    evaluates_alone: ClassVar[bool] = True

    kind: Literal["alpaca_mmlu"]
    mmlu: MMLUKeys
    mmlu_every: Literal["end", "epoch"]

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        yield from self.mmlu.faults("task.mmlu", config)

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        from dataclasses import replace

        from velora.eval.mmlu import load_benchmark

        benchmark = load_benchmark(self.mmlu, preprocessor, config)
        data = super().load(preprocessor, config)
        about = {**data.about, "mmlu": benchmark.about}
        return replace(data, benchmark=benchmark, benchmark_every_epoch=self.mmlu_every == "epoch", about=about)
