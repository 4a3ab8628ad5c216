"""The stream of documents: whole, repeatable, shared among loading processes; the budget; bad shards."""

from __future__ import annotations

import gzip
import itertools
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from text_helpers import composed, stand_in, write_shard, yaml_keys
from tiny import tiny_llama
from torch.utils.data import DataLoader

from velora.config.task_text import C4, shards_of
from velora.data.documents import documents, one_pass, through_buffer
from velora.errors import ConfigError
from velora.models import hub
from velora.models.tokenizer import byte_tokenizer, from_folder

TEXTS = [f"training document number {i:02d}" for i in range(30)]
HELD_OUT = [f"held out {i}" for i in range(5)]


def c4(**settings: Any) -> C4:
    small = {"name": "c4", "shuffle_buffer": 4, "max_length": 64}
    return C4(**(yaml_keys("task/c4") | small | settings))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_shard(tmp_path / "c4" / "c4-train.00000.json.gz", TEXTS[:12])
    write_shard(tmp_path / "c4" / "c4-train.00001.json", [*TEXTS[12:20], "", "  "])
    write_shard(tmp_path / "c4" / "c4-train.00002.jsonl", TEXTS[20:])
    write_shard(tmp_path / "c4" / "c4-validation.00000.jsonl.gz", HELD_OUT)
    (tmp_path / "c4" / "README-train.md").write_text("not a shard")
    return tmp_path


def load(root: Path | None, config: Any = None, **settings: Any) -> Any:
    return c4(**settings).load(byte_tokenizer(), config or stand_in(root))


def read(stream: Any, number: int) -> list[str]:
    return [byte_tokenizer().decode(ids[:-1]) for ids in itertools.islice(iter(stream), number)]


def test_each_pass_has_every_document_once(root: Path) -> None:
    stream = load(root).phases[0].train
    passes = read(stream, 90)
    for start in (0, 30, 60):
        assert sorted(passes[start : start + 30]) == TEXTS
    assert passes[:30] != passes[30:60] != TEXTS


def test_the_stream_repeats_and_goes_on_after_a_restart(root: Path) -> None:
    """What `Trainer` does on resume: it draws the batches of the first part again and drops them."""
    config = stand_in(root)

    def batches() -> Any:
        data = load(root, config)
        return iter(DataLoader(data.phases[0].train, batch_size=4, collate_fn=data.collate))

    whole = [batch["input_ids"].tolist() for batch in itertools.islice(batches(), 20)]
    again = batches()
    for _ in range(13):
        next(again)
    assert [batch["input_ids"].tolist() for batch in itertools.islice(again, 7)] == whole[13:]


def test_trainer_resumes_in_the_middle_of_the_stream(root: Path, tmp_path: Path) -> None:
    """Eight steps in one go, and four more from the checkpoint of step four, end in the same weights, bit for bit."""
    from transformers import Trainer, TrainingArguments

    def train(folder: str, resume: str | None) -> dict[str, torch.Tensor]:
        data = load(root)
        arguments = TrainingArguments(
            str(tmp_path / folder), max_steps=8, per_device_train_batch_size=4, save_steps=4, report_to=[], use_cpu=True,
            remove_unused_columns=False, label_names=["labels"], disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        network = tiny_llama()
        network.resize_token_embeddings(259)
        trainer = Trainer(network, arguments, data_collator=data.collate, train_dataset=data.phases[0].train)
        trainer.train(resume_from_checkpoint=resume)
        return network.state_dict()

    whole = train("whole", None)
    resumed = train("resumed", str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_order_follows_data_seed_and_not_the_seed_of_the_run(root: Path) -> None:
    first = read(load(root).phases[0].train, 30)
    assert read(load(root, stand_in(root, seed=7)).phases[0].train, 30) == first
    assert read(load(root, data_seed=0).phases[0].train, 30) != first


@pytest.mark.parametrize("num_workers", [1, 2])
def test_loading_processes_share_the_documents(root: Path, num_workers: int) -> None:
    data = load(root, stand_in(root, micro_batch_size=3))
    loader = DataLoader(data.phases[0].train, batch_size=3, collate_fn=lambda s: s, num_workers=num_workers)
    iterator = iter(loader)
    found = [byte_tokenizer().decode(ids[:-1]) for _ in range(10) for ids in next(iterator)]
    assert sorted(found) == TEXTS
    assert found == read(data.phases[0].train, 30)  # and in the order of a single process


def test_buffer_keeps_every_item_and_moves_it_a_bounded_way_forward() -> None:
    found = list(through_buffer(range(1000), 50, random.Random(0)))
    assert sorted(found) == list(range(1000))
    assert all(place >= item - 50 for place, item in enumerate(found))


def test_validation_is_the_same_every_time_and_keeps_to_its_budget(root: Path) -> None:
    whole = load(root)
    assert Counter(read(whole.phases[0].validation[""], 9)) == Counter(HELD_OUT)
    facts = whole.about["validation"]
    assert (facts["sequences"], facts["tokens"], facts["extent"]) == (5, 5 * 11, "all documents")
    assert facts["full_length_sequences"] == 0
    assert load(root, max_length=11).about["validation"]["full_length_sequences"] == 5
    part = load(root, eval_tokens=23)  # 11 bytes each with the end token: two are 22, the third passes 23
    assert read(part.phases[0].validation[""], 9) == read(whole.phases[0].validation[""], 3)
    assert part.about["validation"]["extent"].startswith("the first documents")
    exact = load(root, eval_tokens=55)
    assert exact.about["validation"]["extent"] == "all documents"


def test_packed(root: Path) -> None:
    data = load(root, packing="pack", max_length=16)
    batch = data.collate(list(itertools.islice(iter(data.phases[0].train), 4)))
    assert {k: v.shape for k, v in batch.items()} == {"input_ids": (4, 16), "labels": (4, 16)}
    assert len(data.phases[0].validation[""]) == 5 * 11 // 16


@pytest.mark.parametrize("packing", ["pad", "pack"])
def test_batch_shapes(root: Path, packing: str) -> None:
    task = c4(packing=packing, max_length=16)
    data = task.load(byte_tokenizer(), stand_in(root))
    batch = data.collate(list(itertools.islice(iter(data.phases[0].train), 3)))
    shapes = task.batch_shapes(3, stand_in(root))
    assert {k: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in batch.items()} == shapes


def test_record_says_what_was_read(root: Path) -> None:
    about = load(root, stand_in(root, max_steps=30, batch_size=16)).about
    assert about["documents"] == {"train": 30, "validation": 5}
    assert about["training"] == {"sequences": 30 * 16, "passes_over_the_data": 16.0}
    assert set(about["files"]) == {p.name for p in (root / "c4").iterdir()} - {"README-train.md"}
    packed = load(root, packing="pack", max_length=8).about
    assert packed["training"]["passes_over_the_data"] is None  # a sequence is no document there


def test_another_folder_is_named_for_what_it_is(root: Path) -> None:
    (root / "c4").rename(root / "novels")
    about = load(root, folder="novels").about
    assert about["corpus"] == "the text in novels, not C4"
    config = composed("task=c4", "task.folder=novels", f"data.root={root}")
    assert config.task.name == "novels"


def test_real_sample(shared_data: Path) -> None:
    tokenizer = from_folder(shared_data / "tokenizers" / "t5")
    config = stand_in(shared_data, architecture={"vocab_size": 32000})
    data = c4(eval_tokens=5000, shuffle_buffer=1000, max_length=256).load(tokenizer, config)
    assert data.about["documents"] == {"train": 3300, "validation": 1000}
    batch = data.collate(list(itertools.islice(iter(data.phases[0].train), 8)))
    assert batch["input_ids"].shape == (8, 256)
    assert batch["input_ids"].max() < 32000
    full = batch["attention_mask"].sum(1) == 256
    assert full.any()
    assert (
        batch["input_ids"][full][:, -1] == 1
    ).all()  # T5's tokenizer ends a cut text with its end token, as published


def test_text_folder_of_the_real_data(shared_data: Path) -> None:
    assert not list(c4(name="text", folder="text", max_length=256).problems(stand_in(shared_data)))
    assert len(shards_of(shared_data / "text", "validation")) == 7


BAD_LINES = {
    "json": ('{"text": "a"', r"shard.json line 2 is not JSON: .* at column 13$"),
    "field": (
        '{"content": "a"}',
        r"line 2 has no field 'text': each line is an object that has; this one has 'content'$",
    ),
    "list": ("[1]", r"line 2 has no field 'text': .* this one has a list$"),
    "digits": (
        '{"text": "a", "n": ' + "9" * 5000 + "}",
        r"shard.json line 2 is JSON that cannot be read: Exceeds the limit",
    ),
    "depth": ("[" * 200_000, r"shard.json line 2 is nested too deep for JSON to be read$"),
    "type": ('{"text": null}', r"line 2: the field 'text' is None, not a string$"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_named(tmp_path: Path, case: str) -> None:
    line, sentence = BAD_LINES[case]
    (tmp_path / "shard.json").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=sentence):
        list(documents(tmp_path / "shard.json"))


def test_damaged_files(tmp_path: Path) -> None:
    whole = gzip.compress(b'{"text": "fine"}\n' * 1000)
    for name, content in (
        ("cut.json.gz", whole[:-20]), ("plain.json.gz", b'{"text": "fine"}'), ("spoilt.json.gz", whole[:30] + b"\xff" * 30),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{name} is damaged after line \d+: "):
            list(documents(tmp_path / name))
    (tmp_path / "latin.json").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.json line 1 is not UTF-8 text: .*; save it as UTF-8$"):
        list(documents(tmp_path / "latin.json"))


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    for name in ("a.json", "a.json.gz"):
        content = b'\xef\xbb\xbf{"text": "caf\xc3\xa9 \xef\xbb\xbf"}\r\n{"text": "b"}'
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        assert list(documents(tmp_path / name)) == ["café \ufeff", "b"]  # inside a text it stays


def test_a_lone_surrogate_is_replaced_counted_and_said_once(root: Path, capsys) -> None:
    shard = root / "c4" / "c4-train.00001.json"
    shard.write_text(
        '{"text": "half \\ud83d here"}\n{"text": "whole \\ud83d\\ude00"}\n{"text": "\\udc00\\udc00"}\n{"text": " "}\n'
    )
    data = load(root)
    assert data.about["repairs"] == {
        "train": {"blank_documents_left_out": 1, "documents_with_lone_surrogates_replaced": 2},
        "validation": {"blank_documents_left_out": 0, "documents_with_lone_surrogates_replaced": 0},
    }
    found = read(data.phases[0].train, 25)
    assert {"half \ufffd here", "whole \U0001f600", "\ufffd\ufffd"} <= set(found)
    said = capsys.readouterr().out
    assert said.count("lone surrogate") == 1
    assert f"note: {shard} line 1 has a lone surrogate; such characters are replaced by U+FFFD and counted" in said
    assert "1 blank documents of train left out" in said


def test_repairs_of_a_large_folder_are_counted_as_it_is_read(root: Path, monkeypatch) -> None:
    monkeypatch.setattr("velora.data.c4.SMALL_BYTES", 0)
    (root / "c4" / "c4-train.00001.json").write_text('{"text": "half \\ud83d"}\n{"text": ""}\n')
    data = load(root)
    assert data.about["documents"] == {"train": None, "validation": None}
    read(data.phases[0].train, 23)
    assert data.about["repairs"]["train"] == {
        "blank_documents_left_out": 1,
        "documents_with_lone_surrogates_replaced": 1,
    }


def test_a_directory_named_like_a_shard_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "train.json").mkdir()
    with pytest.raises(ConfigError, match=r"train.json cannot be read after line 0: Is a directory"):
        list(documents(tmp_path / "train.json"))


def test_missing_folder_and_shards(root: Path) -> None:
    (found,) = c4(folder="other").problems(stand_in(root))
    assert found.endswith("has no folder other (task.folder) with json-lines shards; below it c4 hold shards")
    (root / "c4" / "c4-validation.00000.jsonl.gz").unlink()
    (found,) = c4().problems(stand_in(root))
    assert "holds no shard for validation: a file with that word in its name that ends in .json" in found
    with pytest.raises(ConfigError, match=r"holds no shard for validation"):
        load(root)


def test_empty_shards(root: Path) -> None:
    for shard in shards_of(root / "c4", "train"):
        shard.unlink()
    write_shard(root / "c4" / "train.json", ["", " \n "])
    with pytest.raises(ConfigError, match=r"the train shards \(train.json\) hold no document with text"):
        load(root)


def test_a_stream_has_no_epochs(root: Path) -> None:
    found = list(c4(max_length=1).problems(stand_in(root, max_steps=None, eval_every="epoch")))
    assert [sentence.split(":")[0] for sentence in found] == [
        "task.max_length=1", "trainer.max_steps=null", "trainer.eval_every=epoch",
    ]  # fmt: skip


def test_no_hub_and_no_files(monkeypatch) -> None:
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    with pytest.raises(ConfigError, match=r"allenai/c4 .* cannot be reached .*; give data.root=DIR with c4/ in it"):
        load(None)


def test_from_the_hub(root: Path, monkeypatch) -> None:
    """The hub's streaming data set, made by the same library from local shards."""
    import datasets

    asked: list[tuple] = []
    original = datasets.load_dataset

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((*arguments, options))
        files = {"train": [str(p) for p in (root / "c4").glob("*train.0000[02]*")], "validation": [str(valid)]}
        return original("json", data_files=files, streaming=True)

    valid = next((root / "c4").glob("*validation*"))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    data = load(None)
    assert asked == [("allenai/c4", "en", {"streaming": True, "revision": None})]
    expected = sorted(TEXTS[:12] + TEXTS[20:])
    stream = data.phases[0].train
    found = read(stream, 44)
    assert sorted(found[:22]) == sorted(found[22:]) == expected
    assert found[:22] != found[22:]
    assert read(stream, 44) == found
    assert data.about["source"] == "hub"
    iterator = iter(DataLoader(stream, batch_size=1, collate_fn=lambda s: s[0], num_workers=2))
    ours = [byte_tokenizer().decode(next(iterator)[:-1]) for _ in range(22)]
    assert max(Counter(ours).values()) <= 2  # each process reads its own shards, the shorter one begins again first


def test_one_pass_reads_each_shard_once(root: Path) -> None:
    shards = shards_of(root / "c4", "train")
    assert sorted(one_pass(shards, 3, 0)) == TEXTS
    assert list(one_pass(shards, 3, 0)) == list(one_pass(shards, 3, 0)) != list(one_pass(shards, 3, 1))


def test_recipe_is_that_of_galore() -> None:
    trainer = composed("task=c4").trainer
    assert (trainer.batch_size, trainer.examples_per_forward, trainer.accumulation_steps) == (512, 128, 4)
    assert (trainer.max_steps, trainer.warmup_steps, trainer.schedule, trainer.min_lr_ratio) == (
        10000,
        1000,
        "cosine",
        0.1,
    )
    assert (trainer.weight_decay, trainer.max_grad_norm, trainer.learning_rate) == (0, None, 0.01)
    assert composed("task=c4", "model=llama_130m").trainer.max_steps == 20000
