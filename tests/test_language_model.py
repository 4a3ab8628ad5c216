"""Sequences, batches and perplexities against loops in float64 and against transformers' own loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from text_helpers import stand_in
from tiny import VOCABULARY, tiny_llama

from velora.config.model import Limits
from velora.data import language_model as lm
from velora.errors import ConfigError
from velora.models.tokenizer import byte_tokenizer, check_vocabulary, vocabulary_size

LENGTHS = (9, 5, 2, 7, 9, 3, 4)  # of seven sequences


def some_sequences() -> list[lm.Ids]:
    generator = np.random.default_rng(3)
    return [generator.integers(3, VOCABULARY, length).astype(np.int32) for length in LENGTHS]


def losses_by_loops(network: Any, sequences: list[lm.Ids]) -> list[list[float]]:
    """Negative log-likelihood (nats) of each predicted token, each sequence on its own, in float64."""
    network = network.double().eval()
    found = []
    for ids in sequences:
        with torch.no_grad():
            logits = network(input_ids=torch.tensor(ids.tolist())[None]).logits[0].tolist()
        rows = []
        for place in range(len(ids) - 1):
            peak = max(logits[place])
            total = sum(math.exp(value - peak) for value in logits[place])
            rows.append(peak + math.log(total) - logits[place][ids[place + 1]])
        found.append(rows)
    return found


def losses_by_us(network: Any, sequences: list[lm.Ids], batch_size: int) -> np.ndarray:
    network = network.double().eval()
    rows = []
    for start in range(0, len(sequences), batch_size):
        batch = lm.collate(sequences[start : start + batch_size], 0, max(LENGTHS), masked=True)
        with torch.no_grad():
            logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        rows.append(lm.sequence_losses(logits, batch["labels"]))
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_perplexity_counts_every_token_once(batch_size: int) -> None:
    network, sequences = tiny_llama(), some_sequences()
    expected = losses_by_loops(network, sequences)
    found = losses_by_us(network, sequences, batch_size)
    assert found[:, 1].tolist() == [length - 1 for length in LENGTHS]
    # the softmax is taken in float32: relative 1e-6 is a few of its roundings
    assert found[:, 0] == pytest.approx([sum(rows) for rows in expected], rel=1e-6)
    tokens = [value for rows in expected for value in rows]
    scores = lm.scores(found, 3)
    assert scores["loss"] == pytest.approx(sum(tokens) / len(tokens), rel=1e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(sum(tokens) / len(tokens)), rel=1e-5)


def test_published_convention() -> None:
    """The scripts' loop: a counter that starts at 1, a sum of batch means."""
    expected = losses_by_loops(tiny_llama(), some_sequences())
    total, counter = 0.0, 1
    for start in range(0, len(expected), 3):
        counter += 1
        tokens = [value for rows in expected[start : start + 3] for value in rows]
        total += sum(tokens) / len(tokens)
    assert counter == 4
    sums = np.array([[sum(rows), len(rows)] for rows in expected])
    found = lm.scores(sums, 3)["perplexity_published_convention"]
    assert found == pytest.approx(math.exp(total / counter), rel=1e-12)  # the same sums, in float64


def test_one_batch_agrees_with_the_loss_of_transformers() -> None:
    network, sequences = tiny_llama().eval(), some_sequences()
    batch = lm.collate(sequences, 0, max(LENGTHS), masked=True)
    with torch.no_grad():
        output = network(**batch)
    found = lm.scores(lm.sequence_losses(output.logits, batch["labels"]).numpy(), 7)
    # transformers sums 32 float32 losses in float32
    assert found["loss"] == pytest.approx(output.loss.item(), rel=1e-5)


def test_the_count_that_trainer_divides_by_is_the_predicted_tokens() -> None:
    batch = lm.collate(some_sequences(), 0, max(LENGTHS), masked=True)
    assert (batch["labels"] != lm.IGNORED).sum().item() == sum(length - 1 for length in LENGTHS)


def test_collate() -> None:
    batch = lm.collate([np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)], 2, 4, masked=True)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [8, 9, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [-100, 9, -100, -100]]
    assert "attention_mask" not in lm.collate([np.array([5, 6], np.int32)], 0, 2, masked=False)


def test_packed_is_the_texts_in_a_row() -> None:
    texts = ["abcd", "", "xy" * 50, "end"]
    row = [i for text in texts for i in [*(b + 3 for b in text.encode()), 1]]
    found = list(lm.packed(iter(texts), byte_tokenizer(), 7, 259))
    assert [s.tolist() for s in found] == [row[i : i + 7] for i in range(0, len(row) - 6, 7)]


def test_truncated_is_one_sequence_per_document() -> None:
    found = list(lm.truncated(iter(["abcdefgh", "a", ""]), byte_tokenizer(), 4, 259))
    assert [s.tolist() for s in found] == [[100, 101, 102, 1], [100, 1]]  # the empty text has no second token


def test_more_texts_than_are_encoded_together() -> None:
    texts = [f"document {i}" for i in range(2 * lm.ENCODE_TOGETHER + 5)]
    one_by_one = [[*(b + 3 for b in text.encode()), 1] for text in texts]
    assert [s.tolist() for s in lm.truncated(iter(texts), byte_tokenizer(), 64, 259)] == one_by_one


def test_ids_beyond_the_vocabulary_become_unknown() -> None:
    (found,) = lm.truncated(iter(["az"]), byte_tokenizer(), 8, ord("z") + 3)
    assert found.tolist() == [ord("a") + 3, 2, 1]


def test_a_tokenizer_of_another_network() -> None:
    config = stand_in()
    assert vocabulary_size(byte_tokenizer(), Limits()) == 259
    limits = Limits(vocabulary=200)
    assert vocabulary_size(byte_tokenizer(), limits) == 200
    check_vocabulary(byte_tokenizer(), limits, config, spare=59)
    with pytest.raises(
        ConfigError, match=r"tokenizer of model=some_model has 259 words and the network embeds 200: give"
    ):
        check_vocabulary(byte_tokenizer(), limits, config, spare=58)


def test_packing_needs_an_end_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"has no end token .* task.packing=pad"):
        next(lm.packed(iter(["a"]), tokenizer, 4, 259))


def test_a_loss_beyond_all_bounds_is_infinite() -> None:
    assert lm.scores(np.array([[8000.0, 1.0]]), 1)["perplexity"] == math.inf
