"""The embedded task for encoders: its limits and what it says of itself."""

from __future__ import annotations

from pydoc_data.topics import topics as original

from text_helpers import stand_in

from velora.config.task_text import Topics
from velora.models.tokenizer import byte_tokenizer


def topics(**settings: int) -> Topics:
    return Topics(**({"kind": "topics", "name": "topics", "num_topics": 4, "max_length": 64} | settings))


def problems(**settings: int) -> list[str]:
    return list(topics(**settings).problems(stand_in(modality="sequence_classification")))


def test_no_more_topics_than_the_manual_has() -> None:
    assert not problems(num_topics=len(original))
    (found,) = problems(num_topics=10000)
    assert found == f"task.num_topics=10000 is more than the {len(original)} topics of this Python's manual"


def test_longer_than_the_network() -> None:
    architecture = {"model_type": "bert", "max_position_embeddings": 32}
    config = stand_in(modality="sequence_classification", architecture=architecture)
    (found,) = topics(max_length=33).problems(config)
    assert found == "task.max_length=33 is more than the 32 positions of model=some_model"


def test_cut_texts_are_counted() -> None:
    data = topics(max_length=64).load(byte_tokenizer(), stand_in(modality="sequence_classification"))
    phase = data.phases[0]
    expected = {
        "train": sum(len(row.texts[0].encode()) + 1 > 64 for row in phase.train),
        "validation": sum(len(row.texts[0].encode()) + 1 > 64 for row in phase.validation[""]),
    }
    assert data.about["cut_at_max_length"] == expected
