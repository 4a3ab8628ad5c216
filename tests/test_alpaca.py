"""Alpaca: the published prompts, cutting and masking against strings and tokens written by hand, and a whole short run."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from text_helpers import composed, stand_in, yaml_keys

from velora.config.task_alpaca import Alpaca
from velora.data import alpaca
from velora.data.alpaca import Row, collate, encode, load, read_rows
from velora.data.language_model import sequence_losses
from velora.errors import ConfigError
from velora.models.tokenizer import byte_tokenizer, prepared

PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd two and two.\n\n### Response:\n"
)
PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
    "that appropriately completes the request.\n\n### Instruction:\nTranslate.\n\n### Input:\n{chat} & <b>\n\n### Response:\n"
)
END = 1  # of the byte tokenizer; a byte's token is its value + 3


def task(**changes: Any) -> Alpaca:
    return Alpaca(**(yaml_keys("task/alpaca") | changes))


def words(texts: int = 12) -> list[dict[str, str]]:
    return [{"instruction": f"Say {i}.", "input": "", "output": "x" * (3 * i)} for i in range(texts)]


def write(root: Path, rows: Any, name: str = "alpaca/alpaca_data.json") -> Path:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rows).encode()
    file.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    return file


def loaded(root: Path, seed: int = 0, **changes: Any) -> Any:
    keys = {"held_out": 4, "max_length": 200, **changes}
    return load(task(**keys), prepared(byte_tokenizer()), stand_in(root, seed))


def as_bytes(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


# What stands in a row


def test_the_published_prompts() -> None:
    assert Row("Add two and two.", "", "4").prompt == PLAIN
    assert Row("Translate.", "{chat} & <b>", "4").prompt == PAIRED  # braces of a text are text


@pytest.mark.parametrize("train_on", ["text", "answer"])
def test_the_end_token_follows_the_answer_and_the_prompt_is_masked(train_on: str) -> None:
    (example,) = encode([Row("Add two and two.", "", "4")], prepared(byte_tokenizer()), task(train_on=train_on))
    assert example.ids.tolist() == [*as_bytes(PLAIN), ord("4") + 3, END]
    batch = collate([example], 0, 512)
    predicted = batch["labels"][0] != -100
    answer = {"text": len(PLAIN) - 1 + 2, "answer": 2}  # the first token of a text has nothing before it
    assert int(predicted.sum()) == answer[train_on]
    assert batch["labels"][0][predicted].tolist() == example.ids.tolist()[-answer[train_on] :]


def test_an_empty_answer_is_an_end_token() -> None:
    (example,) = encode([Row("Add two and two.", "", "")], prepared(byte_tokenizer()), task(train_on="answer"))
    assert example.ids.tolist()[example.unpredicted :] == [END]


@pytest.mark.parametrize(
    ("room", "tail", "predicted"), [(3, "abc", 3), (4, "abc", 4), (2, "ab", 2), (0, "", 0), (-5, "", 0)]
)
def test_what_is_cut_has_no_end_token(room: int, tail: str, predicted: int) -> None:
    """`room`: tokens left for the answer `abc`; exactly three hold no end token, as in the published script."""
    chosen = task(max_length=len(PLAIN) + room, train_on="answer")
    (example,) = encode([Row("Add two and two.", "", "abc")], prepared(byte_tokenizer()), chosen)
    assert example.ids.tolist() == [*as_bytes(PLAIN + tail), *([END] if room > 3 else [])][: chosen.max_length]
    assert len(example.ids) - example.unpredicted == predicted


def test_a_token_across_the_border_is_predicted() -> None:
    """A byte-pair vocabulary may join the prompt's line break with that of the answer: `prompt + answer` has the word then."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*sorted(set(PLAIN + "\n4")), "<end>", "\n\n"]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\n", "\n")]))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = prepared(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>"))
    (example,) = encode([Row("Add two and two.", "", "\n4")], tokenizer, task(train_on="answer"))
    assert tokenizer.convert_ids_to_tokens(example.ids.tolist()[example.unpredicted :]) == ["\n\n", "4", "<end>"]


@pytest.mark.parametrize("seed", range(3))
def test_labels_are_those_of_the_published_script(seed: int, shared_data: Path) -> None:
    """Alpaca-LoRA's generate_and_tokenize_prompt, written down from its description: LLaMA's tokenizer, real rows."""
    from velora.models.tokenizer import from_folder

    tokenizer = from_folder(shared_data / "tokenizers" / "llama")
    rows = read_rows(shared_data / "alpaca" / "alpaca_data.json.gz")
    chosen = [rows[i] for i in np.random.default_rng(seed).choice(len(rows), 40, replace=False)]
    for example, row in zip(encode(chosen, tokenizer, task(train_on="answer", max_length=128)), chosen, strict=True):
        ids = tokenizer(row.prompt + row.output, truncation=True, max_length=128)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        if ids[-1] != tokenizer.eos_token_id and len(ids) < 128:
            ids.append(tokenizer.eos_token_id)
        prompt = tokenizer(row.prompt, truncation=True, max_length=128)["input_ids"]
        assert example.ids.tolist() == ids
        assert example.unpredicted == min(len(prompt), len(ids))


# Batches


def test_padding_is_a_multiple_of_eight_and_never_counts() -> None:
    examples = encode([Row("a", "", "b"), Row("a", "", "b" * 9)], prepared(byte_tokenizer()), task())
    batch = collate(examples, 0, 512)
    length = len(examples[1].ids)
    assert batch["input_ids"].shape == (2, -(-length // 8) * 8)
    assert batch["attention_mask"].sum(1).tolist() == [len(e.ids) for e in examples]
    assert ((batch["labels"] != -100).sum(1) == batch["attention_mask"].sum(1) - 1).all()


def test_padding_does_not_pass_the_longest_text() -> None:
    examples = encode([Row("a", "", "b" * 300)], prepared(byte_tokenizer()), task(max_length=203))
    assert collate(examples, 0, 203)["input_ids"].shape == (1, 203)


def test_padding_with_the_end_token_trains_the_end_token() -> None:
    """A tokenizer without a padding token may pad with its end token; labels go by length."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    examples = encode([Row("a", "", "b"), Row("a", "", "b" * 9)], prepared(tokenizer), task())
    batch = collate(examples, tokenizer.pad_token_id, 512)
    assert (batch["labels"] == END).sum(1).tolist() == [1, 1]


def test_scores_are_means_over_tokens() -> None:
    torch.manual_seed(0)
    examples = encode([Row("a", "", "b"), Row("a", "", "b" * 9)], prepared(byte_tokenizer()), task(train_on="answer"))
    batch = collate(examples, 0, 512)
    logits = torch.randn(*batch["labels"].shape, 259, dtype=torch.float64)
    expected = [
        -logits[row, place - 1].log_softmax(-1)[token]
        for row, labels in enumerate(batch["labels"].tolist())
        for place, token in enumerate(labels)
        if token != -100
    ]
    assert len(expected) == 2 + 10
    found = alpaca.lm.token_means(sequence_losses(logits, batch["labels"]))
    mean = float(torch.stack(expected).mean())
    assert found == pytest.approx({"loss": mean, "perplexity": np.exp(mean)}, rel=1e-6)  # logits are scored in float32


# Files and splits


@pytest.mark.parametrize(
    "name", ["alpaca/alpaca_data.json", "alpaca/alpaca_data.json.gz", "alpaca_data.json", "alpaca_data.json.gz"]
)
def test_where_the_file_may_lie(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, words(), name)
    about = loaded(tmp_path).about
    assert list(about["files"]) == [file.name]
    assert (about["rows"], about["train_examples"], about["empty_answers"]) == (12, 8, 1)


def test_held_out_rows_are_those_of_the_published_call(tmp_path: Path) -> None:
    """`train_test_split(test_size, shuffle=True, seed=42)` of datasets, on the same rows."""
    from datasets import Dataset

    write(tmp_path, words(40))
    split = Dataset.from_list(words(40)).train_test_split(test_size=4, shuffle=True, seed=42)
    for seed in (0, 7):  # the seed of the run does not matter
        (phase,) = loaded(tmp_path, seed).phases
        tokenizer = prepared(byte_tokenizer())
        for side, examples in (("train", phase.train), ("test", phase.validation[""])):
            expected = encode([Row(**row) for row in split[side]], tokenizer, task(max_length=200))
            assert sorted(map(tuple, (e.ids.tolist() for e in expected))) == sorted(
                map(tuple, (e.ids.tolist() for e in examples))
            )
    assert len(loaded(tmp_path, eval_size=2).phases[0].validation[""]) == 2


def test_rows_without_room_for_an_answer_are_left_out(tmp_path: Path, capsys) -> None:
    long = {"instruction": "y" * 100, "input": "", "output": "z"}
    write(tmp_path, [*words(), *([long] * 8)])
    data = loaded(tmp_path, train_on="answer")
    left_out = data.about["nothing_to_predict"]
    assert sum(left_out.values()) == 8
    assert data.about["train_examples"] == 16 - left_out["train"]
    assert "task.max_length=200: the prompts of" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"task.max_length=100: .*; give a larger one, or task.train_on=text"):
        loaded(tmp_path, train_on="answer", max_length=100)
    assert loaded(tmp_path, train_on="text", max_length=100).about["cut_at_max_length"] == {"train": 16, "held_out": 4}


def test_the_real_file(shared_data: Path) -> None:
    rows = read_rows(shared_data / "alpaca" / "alpaca_data.json.gz")
    assert len(rows) == 52002
    assert sum(not row.output for row in rows) == 28
    assert sum(bool(row.input) for row in rows) == 20679


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ({"instruction": "a"}, "must be a JSON list of rows with instruction, input, output"),
        ([], "must be a JSON list of rows"),
        ([*words(2), "text"], "row 3 is 'text': it must be an object"),
        ([*words(1), {"instruction": "a", "output": "b"}], "row 2: input is None, and must be a text"),
        ([{"instruction": "a", "input": "", "output": 4}], "row 1: output is 4, and must be a text"),
        (words(4), "task.held_out=4: the data have 4 rows"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, rows: Any, sentence: str) -> None:
    write(tmp_path, rows)
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        loaded(tmp_path)


@pytest.mark.parametrize("content", [b"[{", b"\xff\xfe", b"\x1f\x8b broken"])
def test_files_that_are_no_json_are_refused(tmp_path: Path, content: bytes) -> None:
    file = write(tmp_path, [], "alpaca/alpaca_data.json.gz" if content[:1] == b"\x1f" else "alpaca_data.json")
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        loaded(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    write(tmp_path, words())
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="this tokenizer has no end token, which ends every answer"):
        load(task(held_out=4, max_length=200), tokenizer, stand_in(tmp_path))


def test_the_hub_is_a_folder_of_that_layout_too(tmp_path: Path) -> None:
    write(tmp_path, words(), "data.json")
    config = stand_in()
    data = load(task(held_out=4, hub=str(tmp_path), max_length=200), prepared(byte_tokenizer()), config)
    assert data.about["source"] == "hub"
    assert data.about["train_examples"] == 8


# Whole runs

SMALL = (
    "task=alpaca", "model=llama_tiny", "model.architecture.hidden_size=32", "model.architecture.intermediate_size=48",
    "model.architecture.num_hidden_layers=1", "task.max_length=192", "task.held_out=4", "trainer.num_epochs=2",
    "trainer.batch_size=4", "trainer.warmup_steps=0", "trainer.device=cpu", "method=full", "data.root=.",
)  # fmt: skip


def test_a_run_and_its_record(tmp_path: Path, cli) -> None:
    write(cli.folder, words(24))
    done = cli(*SMALL, "name=short")
    assert done.returncode == 0, done.stderr
    record = cli.record("short")
    assert record["metrics"]["perplexity"] == pytest.approx(np.exp(record["metrics"]["loss"]))
    assert "perplexity_published_convention" not in record["metrics"]
    assert record["data"]["held_out"] == {"rows": 4, "evaluated": 4, "data_seed": 42}


def test_batch_shapes_are_of_full_length() -> None:
    shapes = composed("task=alpaca", "model=llama_7b", "method=qlora").task.batch_shapes(3, composed("task=alpaca"))
    assert shapes == dict.fromkeys(("input_ids", "attention_mask", "labels"), ((3, 512), "int64"))
