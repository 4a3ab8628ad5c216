"""Language modelling on C4 (English), streamed from the hub, or on any folder of json-lines shards, as GaLore's scripts do it.

Published form (`task.packing=pad`): each document is one sequence, cut or padded to 256 tokens; padding is masked. The
stream is shuffled with seed 42 through a buffer of 1000 documents, validation too, of which the first ten million
tokens are used. `task.packing=pack` sets the documents in a row instead, an end token after each, and cuts that: no padding.

Where the training data end they begin again in another order; the record says how often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from velora.config.parts import TaskData
from velora.config.task_text import C4, SIDES, shards_of
from velora.data import language_model as lm
from velora.data.documents import (
    BLANK,
    SequenceStream,
    count_documents,
    documents,
    no_repairs,
    one_pass,
)
from velora.data.text import file_facts
from velora.errors import ConfigError
from velora.models import hub
from velora.models.tokenizer import SENTINELS, check_fit
from velora.run.notes import note

if TYPE_CHECKING:
    from velora.config.run import Config

Documents = Callable[[str, int], Iterable[str]]  # (side, number of the pass) to texts

SMALL_BYTES = 2**28  # folders up to this size are hashed and counted for the record


def load(task: C4, tokenizer: Any, config: Config) -> TaskData:
    vocabulary = check_fit(task.max_length, tokenizer, config, spare=SENTINELS)
    cut = lm.truncated if task.packing == "pad" else lm.packed

    def encode(texts: Iterable[str]) -> Iterator[lm.Ids]:
        return cut(texts, tokenizer, task.max_length, vocabulary)

    root = config.data.root
    read, source = _from_hub(task) if root is None else _from_files(task, root)
    validation, tokens, whole = _validation(task, encode(read("validation", 0)))
    train = SequenceStream(
        lambda number: read("train", number),
        encode,
        group=config.trainer.examples_per_forward,
        splits_itself=root is None,
    )
    about = {
        "task": task.name, **source, "packing": task.packing, "max_length": task.max_length,
        "data_seed": task.data_seed, "shuffle_buffer": task.shuffle_buffer,
        "validation": {
            "sequences": len(validation), "tokens": tokens, "budget_tokens": task.eval_tokens,
            "full_length_sequences": sum(len(ids) == task.max_length for ids in validation),
            "extent": "all documents" if whole else "the first documents of the shuffled stream, up to the budget",
        },
        "training": _training_extent(task, config, source.get("documents", {}).get("train")),
    }  # fmt: skip
    return lm.language_model_task_data(task, train, validation, tokenizer, about)


def _validation(task: C4, sequences: Iterator[lm.Ids]) -> tuple[list[lm.Ids], int, bool]:
    """Sequences until the budget of tokens is reached, their tokens, and whether these are all there are."""
    chosen: list[lm.Ids] = []
    tokens = 0
    for ids in sequences:
        if tokens >= task.eval_tokens:
            return chosen, tokens, False
        chosen.append(ids)
        tokens += len(ids)
    if not chosen:
        raise ConfigError(f"the validation data of task={task.name} do not fill one sequence of two tokens or more")
    return chosen, tokens, True


def _training_extent(task: C4, config: Config, available: int | None) -> dict[str, Any]:
    """What the run will read, per passes over the data where one sequence is one document and these were counted."""
    trainer = config.trainer
    assert trainer.max_steps is not None  # `problems` saw to it
    sequences = trainer.max_steps * trainer.batch_size
    counted = available if task.packing == "pad" else None
    return {"sequences": sequences, "passes_over_the_data": sequences / counted if counted else None}


def _from_files(task: C4, root: Path) -> tuple[Documents, dict[str, Any]]:
    folder = root / task.folder
    for sentence in task.folder_problems(root):
        raise ConfigError(sentence)
    shards = {side: shards_of(folder, side) for side in SIDES}
    for side, files in shards.items():
        if next((text for file in files for text in documents(file)), None) is None:
            raise ConfigError(
                f"{folder}: the {side} shards ({', '.join(f.name for f in files)}) hold no document with text"
            )
    every = [file for files in shards.values() for file in files]
    small = sum(file.stat().st_size for file in every) <= SMALL_BYTES
    counted = {side: count_documents(files) for side, files in shards.items()} if small else {}
    # of a large folder: what this process has read, added to as it goes on; the record is written at the end
    repairs = {side: counted[side][1] if small else no_repairs() for side in shards}
    for side, found in repairs.items():
        if found[BLANK]:
            note(f"{folder}: {found[BLANK]} blank documents of {side} left out")
    about = {
        "source": "files",
        "folder": task.folder,
        "corpus": "C4, by the folder's name" if task.folder == "c4" else f"the text in {task.folder}, not C4",
        "files": {f.name: file_facts(f) if small else {"size_bytes": f.stat().st_size} for f in every},
        "documents": {side: counted[side][0] if small else None for side in shards},
        "repairs": repairs,
    }

    def read(side: str, number: int) -> Iterator[str]:
        added_to = None if small or number else repairs[side]  # a later pass finds the same again
        return one_pass(shards[side], task.shuffle_buffer, task.data_seed + number, added_to)

    return read, about


def _from_hub(task: C4) -> tuple[Documents, dict[str, Any]]:
    def fetch() -> Any:
        from datasets import load_dataset

        return load_dataset(task.hub, task.hub_subset, streaming=True, revision=task.revision)

    remedy = f"give data.root=DIR with {task.folder}/ in it, a folder of json-lines shards for train and validation"
    data = hub.load(f"the data set {task.hub} of task={task.name}", remedy, fetch, local=Path(task.hub).exists())
    shuffled = {side: data[side].shuffle(seed=task.data_seed, buffer_size=task.shuffle_buffer) for side in SIDES}

    def read(side: str, number: int) -> Iterator[str]:
        shuffled[side].set_epoch(number)
        return (row["text"] for row in shuffled[side] if row["text"].strip())

    about = {"source": "hub", "name": task.hub, "subset": task.hub_subset, "revision": task.revision}
    return read, about
