"""Language modelling on C4 (English), streamed from the hub, or on any folder of json-lines shards, as GaLore's scripts do it.

Published form (`task.packing=pad`): each document is one sequence, cut or padded to 256 tokens; padding is masked. The
stream is shuffled with seed 42 through a buffer of 1000 documents, validation too, of which the first ten million
tokens are used. `task.packing=pack` sets the documents in a row instead, an end token after each, and cuts that: no padding.

Where the training data end they begin again in another order; the record says how often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from velora.config.parts import Head, Phase, Task, TaskData
from velora.data import shards as _shards
from velora.data.counts import num_predicted_tokens, num_tokens
from velora.data.text import file_facts
from velora.errors import ConfigError
from velora.models.fit import (
    SENTINELS,
    check_length,
    check_vocabulary,
    length_problems,
    network_limits,
    vocabulary_size,
)
from velora.run.notes import note

if TYPE_CHECKING:
    from velora.config.run import Config

    Documents = Callable[[str, int], Iterable[str]]  # (side, number of the pass) to texts

SMALL_BYTES = 2**28  # folders up to this size are hashed and counted for the record


class C4(Task):
    kind: Literal["c4"]

    folder: str = "c4"  # below data.root
    packing: Literal["pad", "pack"] = "pad"
    max_length: PositiveInt = 256
    eval_tokens: PositiveInt = 10_000_000
    published_eval_batch_size: PositiveInt = 256
    data_seed: NonNegativeInt = 42
    shuffle_buffer: PositiveInt = 1000
    hub: str = "allenai/c4"
    hub_subset: str | None = "en"
    revision: str | None = None

    def head(self, config: Config) -> Head:
        return Head("causal_lm")

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        yield from length_problems(self.max_length, config)
        if self.max_length < 2:
            yield f"task.max_length={self.max_length}: a sequence of one token predicts nothing; give at least 2"
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
            yield from _shards.folder_problems(root, root / self.folder)

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        from velora.data import language_model as lm
        from velora.data.stream import SequenceStream

        limits = network_limits(config)
        check_vocabulary(preprocessor, limits, config, spare=SENTINELS)
        check_length(self.max_length, limits, config)
        vocabulary = vocabulary_size(preprocessor, limits)
        cut = lm.truncated if self.packing == "pad" else lm.packed

        def encode(texts: Iterable[str]) -> Iterator[lm.Ids]:
            return cut(texts, preprocessor, self.max_length, vocabulary)

        root = config.data.root
        documents, source = self._from_hub() if root is None else self._from_files(root)
        validation, tokens, whole = self._validation(encode(documents("validation", 0)))
        train = SequenceStream(
            lambda number: documents("train", number),
            encode,
            group=config.trainer.examples_per_forward,
            splits_itself=root is None,
        )
        about = {
            "task": self.name, **source, "packing": self.packing, "max_length": self.max_length,
            "data_seed": self.data_seed, "shuffle_buffer": self.shuffle_buffer,
            "validation": {
                "sequences": len(validation), "tokens": tokens, "budget_tokens": self.eval_tokens,
                "full_length_sequences": sum(len(ids) == self.max_length for ids in validation),
                "extent": "all documents" if whole else "the first documents of the shuffled stream, up to the budget",
            },
            "training": self._training_extent(config, source.get("documents", {}).get("train")),
        }  # fmt: skip
        return TaskData(
            phases=[Phase("train", train, {"": validation})],
            collate=lambda sequences: lm.collate(
                sequences, preprocessor.pad_token_id, self.max_length, masked=self.packing == "pad"
            ),
            metrics=lambda sequences, labels: lm.scores(sequences, self.published_eval_batch_size),
            best_metric="perplexity",
            greater_is_better=False,
            unit="tokens",
            num_targets=num_predicted_tokens,
            num_items=num_tokens,
            reduce_logits=lm.sequence_losses,
            about=about,
        )

    def batch_shapes(self, batch_size: int, config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
        from velora.data.language_model import batch_shapes

        return batch_shapes(batch_size, self.max_length, masked=self.packing == "pad")

    def _validation(self, sequences: Iterator[Any]) -> tuple[list[Any], int, bool]:
        """Sequences until the budget of tokens is reached, their tokens, and whether these are all there are."""
        chosen: list[Any] = []
        tokens = 0
        for ids in sequences:
            if tokens >= self.eval_tokens:
                return chosen, tokens, False
            chosen.append(ids)
            tokens += len(ids)
        if not chosen:
            raise ConfigError(f"the validation data of task={self.name} do not fill one sequence of two tokens or more")
        return chosen, tokens, True

    def _training_extent(self, config: Config, available: int | None) -> dict[str, Any]:
        """What the run will read, per passes over the data where one sequence is one document and these were counted."""
        trainer = config.trainer
        assert trainer.max_steps is not None  # `problems` saw to it
        sequences = trainer.max_steps * trainer.batch_size
        counted = available if self.packing == "pad" else None
        return {"sequences": sequences, "passes_over_the_data": sequences / counted if counted else None}

    def _from_files(self, root: Path) -> tuple[Documents, dict[str, Any]]:
        folder = root / self.folder
        for sentence in _shards.folder_problems(root, folder):
            raise ConfigError(sentence)
        shards = {side: _shards.shards_of(folder, side) for side in _shards.SIDES}
        for side, files in shards.items():
            if next((text for file in files for text in _shards.documents(file)), None) is None:
                raise ConfigError(
                    f"{folder}: the {side} shards ({', '.join(f.name for f in files)}) hold no document with text"
                )
        every = [file for files in shards.values() for file in files]
        small = sum(file.stat().st_size for file in every) <= SMALL_BYTES
        counted = {side: _shards.count_documents(files) for side, files in shards.items()} if small else {}
        # of a large folder: what this process has read, added to as it goes on; the record is written at the end
        repairs = {side: counted[side][1] if small else _shards.no_repairs() for side in shards}
        for side, found in repairs.items():
            if found[_shards.BLANK]:
                note(f"{folder}: {found[_shards.BLANK]} blank documents of {side} left out")
        about = {
            "source": "files",
            "folder": self.folder,
            "corpus": "C4, by the folder's name" if self.folder == "c4" else f"the text in {self.folder}, not C4",
            "files": {f.name: file_facts(f) if small else {"size_bytes": f.stat().st_size} for f in every},
            "documents": {side: counted[side][0] if small else None for side in shards},
            "repairs": repairs,
        }

        def documents(side: str, number: int) -> Iterator[str]:
            added_to = None if small or number else repairs[side]  # a later pass finds the same again
            return _shards.one_pass(shards[side], self.shuffle_buffer, self.data_seed + number, added_to)

        return documents, about

    def _from_hub(self) -> tuple[Documents, dict[str, Any]]:
        from velora.models.hub import load

        def fetch() -> Any:
            from datasets import load_dataset

            return load_dataset(self.hub, self.hub_subset, streaming=True, revision=self.revision)

        remedy = f"give data.root=DIR with {self.folder}/ in it, a folder of json-lines shards for train and validation"
        data = load(f"the data set {self.hub} of task={self.name}", remedy, fetch, local=Path(self.hub).exists())
        shuffled = {
            side: data[side].shuffle(seed=self.data_seed, buffer_size=self.shuffle_buffer) for side in _shards.SIDES
        }

        def documents(side: str, number: int) -> Iterator[str]:
            shuffled[side].set_epoch(number)
            return (row["text"] for row in shuffled[side] if row["text"].strip())

        about = {"source": "hub", "name": self.hub, "subset": self.hub_subset, "revision": self.revision}
        return documents, about
