"""What the language-modelling tasks share: blocks of token ids, their batches and their scores.

Shapes: B sequences in a batch, L tokens in a sequence, V words of the vocabulary, E sequences of the evaluation.

Position i predicts token i + 1, so a sequence of n tokens has n - 1 predicted ones. Labels are -100 where nothing is
predicted: at padding, and at the first token of a sequence (the network's loss never reads it there; Trainer counts
labels to divide the loss of an accumulated step, and must not count it).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from velora.config.parts import Phase, TaskData
from velora.config.task_text import LanguageModelling
from velora.data.metrics import num_predicted_tokens, num_tokens
from velora.errors import ConfigError

IGNORED = -100
ENCODE_TOGETHER = 64  # texts in one call of the tokenizer

Ids = np.ndarray[tuple[int], np.dtype[np.int32]]


def language_model_task_data(
    task: LanguageModelling, train: Any, validation: list[Ids], tokenizer: Any, about: dict[str, Any]
) -> TaskData:
    """A task of language modelling on sequences of at most `task.max_length` ids."""
    return TaskData(
        phases=[Phase("train", train, {"": validation})],
        collate=lambda sequences: collate(sequences, tokenizer.pad_token_id, task.max_length, masked=task.masked),
        metrics=lambda sequences, labels: scores(sequences, task.published_eval_batch_size),
        best_metric="perplexity",
        greater_is_better=False,
        unit="tokens",
        num_targets=num_predicted_tokens,
        num_items=num_tokens,
        reduce_logits=sequence_losses,
        about=about,
    )


def truncated(texts: Iterable[str], tokenizer: Any, max_length: int, vocabulary: int) -> Iterator[Ids]:
    """Each text's first `max_length` tokens, with the special tokens that the tokenizer adds: one sequence per document.

    An id that the network does not embed becomes the unknown token.
    """
    for ids in _encoded(texts, tokenizer, vocabulary, truncation=True, max_length=max_length):
        if len(ids) > 1:  # a single token predicts nothing
            yield ids


def packed(texts: Iterable[str], tokenizer: Any, max_length: int, vocabulary: int) -> Iterator[Ids]:
    """All texts in a row, an end token after each, cut into sequences of `max_length` tokens; the rest at the end is dropped."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "this tokenizer has no end token to set between documents: use task.packing=pad or another tokenizer"
        )
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    waiting = np.zeros(0, dtype=np.int32)
    for ids in _encoded(texts, tokenizer, vocabulary, add_special_tokens=False):
        waiting = np.concatenate([waiting, ids, end])
        whole = len(waiting) // max_length * max_length
        yield from waiting[:whole].reshape(-1, max_length)
        waiting = waiting[whole:]


def collate(sequences: list[Ids], padding_id: int, length: int, *, masked: bool) -> dict[str, Tensor]:
    """Ids, labels and, if `masked`, the attention mask (B, L), padded at the right to L = `length`.

    Packed sequences are full and need no mask: without one the attention takes its faster causal path.
    """
    shape = (len(sequences), length)
    input_ids = torch.full(shape, padding_id)
    mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, ids in enumerate(sequences):
        values = torch.from_numpy(ids.astype(np.int64))
        input_ids[row, : len(ids)] = values
        mask[row, : len(ids)] = 1
        labels[row, 1 : len(ids)] = values[1:]
    return {"input_ids": input_ids, **({"attention_mask": mask} if masked else {}), "labels": labels}


def sequence_losses(logits: Any, labels: Tensor) -> Tensor:
    """Logits (B, L, V) to (B, 2) in float64: the summed negative log-likelihood (nats) of each sequence, and its predicted tokens.

    One sequence at a time and in float32, so that no second B x L x V tensor is made.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    rows = []
    for row, target in zip(logits[:, :-1], labels[:, 1:], strict=True):  # (L - 1, V), (L - 1,)
        losses = cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="none")
        rows.append(torch.stack([losses.sum(dtype=torch.float64), (target != IGNORED).sum().double()]))
    return torch.stack(rows)


def scores(sequences: Any, published_batch_size: int) -> dict[str, float]:
    """Loss and perplexities of the (E, 2) array of `sequence_losses`, in the order of the evaluation.

    `loss` and `perplexity` are those of `token_means`.

    `perplexity_published_convention` is what the scripts of GaLore, and of VeLoRA after it, print: the mean loss of each batch of
    `published_batch_size` sequences, all batches counted alike, and their sum divided by one more than their number (the
    scripts' counter starts at 1): exp(sum of batch means / (batches + 1)). It is lower than the true figure; it stands
    beside it only so that printed rows can be compared.
    """
    losses, tokens = np.asarray(sequences, dtype=np.float64).T
    starts = np.arange(0, len(losses), published_batch_size)
    means = np.add.reduceat(losses, starts) / np.add.reduceat(tokens, starts)
    return {**token_means(sequences), "perplexity_published_convention": _exp(means.sum() / (len(means) + 1))}


def token_means(sequences: Any) -> dict[str, float]:
    """Loss, the mean over all predicted tokens of all sequences, and perplexity, its exponential: every token counts once."""
    losses, tokens = np.asarray(sequences, dtype=np.float64).T
    loss = losses.sum() / tokens.sum()
    return {"loss": float(loss), "perplexity": _exp(loss)}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700.0 else math.inf


def _encoded(texts: Iterable[str], tokenizer: Any, vocabulary: int, **options: Any) -> Iterator[Ids]:
    together: list[str] = []
    for text in texts:
        together.append(text)
        if len(together) == ENCODE_TOGETHER:
            yield from _encode(together, tokenizer, vocabulary, **options)
            together = []
    if together:
        yield from _encode(together, tokenizer, vocabulary, **options)


def _encode(texts: list[str], tokenizer: Any, vocabulary: int, **options: Any) -> Iterator[Ids]:
    for ids in tokenizer(texts, return_attention_mask=False, verbose=False, **options)["input_ids"]:
        array = np.asarray(ids, dtype=np.int32)
        array[array >= vocabulary] = tokenizer.unk_token_id if tokenizer.unk_token_id is not None else 0
        yield array
