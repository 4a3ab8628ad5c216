"""The embedded text: nothing on both sides, and the same every time."""

from __future__ import annotations

import hashlib
from pydoc_data.topics import topics as original

import numpy as np
import pytest
from text_helpers import composed, stand_in

from velora.config.task_text import Manual
from velora.data.manual import split_topics
from velora.models.tokenizer import byte_tokenizer


def manual(max_length: int = 256) -> Manual:
    return Manual(kind="manual", name="manual", max_length=max_length, published_eval_batch_size=16)


@pytest.fixture(scope="module")
def data():
    return manual().load(byte_tokenizer(), stand_in())


def paragraphs(texts: dict[str, str]) -> list[str]:
    return [" ".join(p.split()) for text in texts.values() for p in text.split("\n\n")]


def test_sides_share_no_paragraph_and_lose_none() -> None:
    sides = split_topics(original)
    train, validation = paragraphs(sides["train"]), paragraphs(sides["validation"])
    assert not set(train) & set(validation)
    assert len(train) == len(set(train))
    assert set(train) | set(validation) == {p for p in paragraphs(original) if p}
    assert not set(sides["train"]) & set(sides["validation"])


def test_about_a_tenth_is_set_aside() -> None:
    sides = split_topics(original)
    sizes = {side: sum(len(text.encode()) for text in texts.values()) for side, texts in sides.items()}
    assert 0.05 < sizes["validation"] / sum(sizes.values()) < 0.2


def test_the_split_does_not_depend_on_the_order() -> None:
    backwards = dict(reversed(original.items()))
    assert split_topics(backwards) == split_topics(original)


def test_sequences_spell_the_text(data) -> None:
    text = "".join(t + "\0" for t in split_topics(original)["train"].values()).encode()
    ids = np.concatenate(data.phases[0].train)
    spelled = bytes(0 if i == 1 else i - 3 for i in ids.tolist())  # 1 is the end token between topics
    assert spelled == text[: len(spelled)]
    assert len(text) - len(spelled) < 256
    assert {len(s) for s in data.phases[0].train} == {256}


def test_record(data) -> None:
    joined = "\n".join(f"{name}\n{original[name]}" for name in sorted(original))
    assert data.about["text_sha256"] == hashlib.sha256(joined.encode()).hexdigest()
    assert data.about["sequences"]["validation"] == len(data.phases[0].validation[""])
    assert data.unit == "tokens"


def test_batch_shapes(data) -> None:
    batch = data.collate(data.phases[0].train[:3])
    shapes = manual().batch_shapes(3, stand_in())
    assert {k: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in batch.items()} == shapes


def test_it_is_the_default() -> None:
    config = composed()
    assert (config.task.name, config.model.name) == ("manual", "llama_tiny")


def test_one_token_predicts_nothing() -> None:
    (found,) = manual(max_length=1).problems(stand_in())
    assert found.startswith("task.max_length=1: a sequence of one token predicts nothing")
