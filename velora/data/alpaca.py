"""Instruction tuning on Alpaca (tatsu-lab/alpaca: 52,002 rows of instruction, input, output), as Alpaca-LoRA's script does it,
which the VeLoRA authors' finetune_llama.py is.

A row is one text: the published prompt (with or without an input), the answer, the end token. It is cut at `max_length`
tokens; a text that is cut ends without the end token, so that stopping in mid-sentence is not taught. The loss is over the
whole text (`train_on=text`, the authors' setting) or over the answer and its end token (`train_on=answer`).

- Held out: `held_out` rows, those of `datasets`' `train_test_split(test_size, shuffle=True, seed=data_seed)`, the call of both
  scripts (Alpaca-LoRA's and QLoRA's), whose seed is 42. The run's seed does not change them. With `eval_size` only the first
  so many of them are evaluated.
- A row whose prompt alone reaches `max_length` has nothing to predict under `train_on=answer`: it is left out, and counted.
- An empty answer (28 rows) is a row like any other: after the prompt comes the end token, and that is what is predicted.
- A tokenizer without a padding token pads with its unknown or end token (velora/models/tokenizer.py): labels and losses go
  by the length of a text, so a real end token is trained, the padding never. One without an end token is refused.

Shapes: B rows in a batch, L the longest of them in tokens, rounded up to a multiple of 8.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from velora.config.parts import Phase, TaskData
from velora.config.task_alpaca import AlpacaKeys
from velora.data import language_model as lm
from velora.data.metrics import num_predicted_tokens, num_tokens
from velora.data.text import file_facts
from velora.errors import ConfigError
from velora.models import hub
from velora.models.tokenizer import check_fit
from velora.run.notes import note

if TYPE_CHECKING:
    from velora.config.run import Config

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
KEYS = ("instruction", "input", "output")
MULTIPLE = 8  # of tokens, to which a batch is padded
ENCODE_TOGETHER = 256


class Row(NamedTuple):
    """One instruction; `input` is empty where there is none."""

    instruction: str
    input: str
    output: str

    @property
    def prompt(self) -> str:
        template = WITH_INPUT if self.input else WITHOUT_INPUT
        return template.format(instruction=self.instruction, input=self.input)


class Example(NamedTuple):
    """The tokens of a row, and how many of the first ones are not predicted."""

    ids: lm.Ids
    unpredicted: int


def load(task: AlpacaKeys, tokenizer: Any, config: Config) -> TaskData:
    check_fit(task.max_length, tokenizer, config)
    rows, source = _from_hub(task) if config.data.root is None else _from_file(task, config.data.root)
    if task.held_out >= len(rows):
        raise ConfigError(
            f"task.held_out={task.held_out}: the data have {len(rows)} rows, so none is left to train on; hold out fewer"
        )
    order = np.random.default_rng(task.data_seed).permutation(len(rows))
    held_out, training = order[: task.held_out][: task.eval_size], order[task.held_out :]
    sides = {
        "train": encode([rows[i] for i in training], tokenizer, task),
        "held_out": encode([rows[i] for i in held_out], tokenizer, task),
    }
    chosen = {side: [e for e in examples if len(e.ids) > e.unpredicted] for side, examples in sides.items()}
    about = {
        "task": task.name, **source, "rows": len(rows), "empty_answers": sum(not row.output for row in rows),
        "max_length": task.max_length, "train_on": task.train_on, "group_by_length": task.group_by_length,
        "padding": f"to the longest text of the batch, a multiple of {MULTIPLE}",
        "held_out": {"rows": task.held_out, "evaluated": len(chosen["held_out"]), "data_seed": task.data_seed},
        "train_examples": len(chosen["train"]),
        "cut_at_max_length": {side: _count_cut(examples, tokenizer) for side, examples in sides.items()},
        "nothing_to_predict": {side: len(sides[side]) - len(chosen[side]) for side in sides},
    }  # fmt: skip
    _say_left_out(task, sides, chosen)
    return _task_data(task, chosen["train"], chosen["held_out"], tokenizer, about)


def _task_data(
    task: AlpacaKeys, train: list[Example], held_out: list[Example], tokenizer: Any, about: dict[str, Any]
) -> TaskData:
    lengths = [len(example.ids) for example in train] if task.group_by_length else None
    # the longest first: less padding, and a batch that is too large fails at once; the scores do not depend on the order
    held_out = sorted(held_out, key=lambda example: -len(example.ids))
    return TaskData(
        phases=[Phase("train", train, {"": held_out}, lengths=lengths)],
        collate=lambda examples: collate(examples, tokenizer.pad_token_id, task.max_length),
        metrics=lambda sequences, labels: lm.token_means(sequences),
        best_metric="perplexity",
        greater_is_better=False,
        unit="tokens",
        num_targets=num_predicted_tokens,
        num_items=num_tokens,
        reduce_logits=lm.sequence_losses,
        about=about,
    )


def _say_left_out(task: AlpacaKeys, sides: dict[str, list[Example]], chosen: dict[str, list[Example]]) -> None:
    """A note of the rows that nothing is left to predict of; ConfigError where no other is left."""
    for side, examples in sides.items():
        left_out = len(examples) - len(chosen[side])
        where = (
            f"task.max_length={task.max_length}: the prompts of {left_out} rows ({side}) leave no room for an answer"
        )
        if not chosen[side]:
            raise ConfigError(f"{where}, and there are no others; give a larger one, or task.train_on=text")
        if left_out:
            note(f"{where}; they are left out")


def encode(rows: Sequence[Row], tokenizer: Any, task: AlpacaKeys) -> list[Example]:
    """The tokens of each row, at most `max_length`, with the special tokens that the tokenizer sets before a text.

    Where the prompt ends is where the tokens of the whole text and of the prompt alone begin to differ: a token that joins the
    prompt's end with the answer's beginning is predicted.
    """
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"task={task.name}: this tokenizer has no end token, which ends every answer; give another model.tokenizer"
        )
    examples = []
    for start in range(0, len(rows), ENCODE_TOGETHER):
        part = rows[start : start + ENCODE_TOGETHER]
        texts = _tokens([row.prompt + row.output for row in part], tokenizer)
        prompts = _tokens([row.prompt for row in part], tokenizer) if task.train_on == "answer" else [[]] * len(part)
        for text, prompt in zip(texts, prompts, strict=True):
            ids = text[: task.max_length]
            if len(text) < task.max_length:
                ids = [*text, tokenizer.eos_token_id]
            unpredicted = _common(ids, prompt) if prompt else 1  # nothing comes before the first token
            examples.append(Example(np.asarray(ids, dtype=np.int32), unpredicted))
    return examples


def _tokens(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Tokens of whole texts; the end token that some tokenizers set by themselves is left to `encode`."""
    end = tokenizer.eos_token_id
    found = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    return [ids[:-1] if ids and ids[-1] == end else ids for ids in found]


def _common(one: list[int], other: list[int]) -> int:
    """How many of the first tokens are the same."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def _count_cut(examples: list[Example], tokenizer: Any) -> int:
    """Examples without an end token: their text was longer."""
    return sum(int(example.ids[-1]) != tokenizer.eos_token_id for example in examples)


def collate(examples: list[Example], padding_id: int, max_length: int) -> dict[str, Tensor]:
    """Ids, mask and labels (B, L), padded at the right; labels are -100 where nothing is predicted."""
    longest = max(len(example.ids) for example in examples)
    length = min(-(-longest // MULTIPLE) * MULTIPLE, max(max_length, longest))
    batch = lm.collate([example.ids for example in examples], padding_id, length, masked=True)
    for row, example in enumerate(examples):
        batch["labels"][row, : example.unpredicted] = lm.IGNORED
    return batch


def _from_hub(task: AlpacaKeys) -> tuple[list[Row], dict[str, Any]]:
    def fetch() -> Any:
        from datasets import load_dataset

        return load_dataset(task.hub, split="train", revision=task.revision)

    remedy = f"give data.root=DIR with alpaca/{task.file} in it"
    data = hub.load(f"the data set {task.hub} of task={task.name}", remedy, fetch, local=Path(task.hub).exists())
    absent = [key for key in KEYS if key not in data.column_names]
    if absent:
        raise ConfigError(f"task.hub={task.hub}: its rows have no {' and no '.join(absent)}; {remedy}")
    rows = [Row(*texts) for texts in zip(*(data[key][:] for key in KEYS), strict=True)]
    return rows, {"source": "hub", "name": task.hub, "revision": task.revision}


def _from_file(task: AlpacaKeys, root: Path) -> tuple[list[Row], dict[str, Any]]:
    file = task.file_below(root)
    if file is None:
        raise ConfigError(task.missing_file(root))
    rows = read_rows(file)
    return rows, {"source": "files", "files": {file.name: file_facts(file, rows=len(rows))}}


def read_rows(file: Path) -> list[Row]:
    """The rows of a JSON list of {"instruction", "input", "output"}; ConfigError names file, row and what is wrong with it."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            found = json.loads(stream.read().decode("utf-8-sig"))
    except (OSError, EOFError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON ({error}); give a whole file") from None
    if not isinstance(found, list) or not found:
        raise ConfigError(f"{file} must be a JSON list of rows with {', '.join(KEYS)}")
    return [_row(file, number, values) for number, values in enumerate(found, 1)]


def _row(file: Path, number: int, values: Any) -> Row:
    if not isinstance(values, dict):
        raise ConfigError(f"{file} row {number} is {values!r:.80}: it must be an object with {', '.join(KEYS)}")
    for key in KEYS:
        if not isinstance(values.get(key), str):
            raise ConfigError(f"{file} row {number}: {key} is {values.get(key)!r:.80}, and must be a text")
    return Row(*(values[key] for key in KEYS))
