"""MMLU's prompts as text and as token ids.

A prompt is a header that names the subject, k solved examples, and the question up to "Answer:"; the network then
chooses between " A", " B", " C" and " D". Two things decide whether that is what it has been asked:

The letters. "A" and " A" are different tokens, and a tokenizer may cut the blank off, or join it with what stands before. So
prompt and letter are encoded together: what the four encodings have in common is the context, and the one token in which
each then differs is its letter.

The begin token. It is there exactly where the tokenizer sets it before a text, and once. What a tokenizer adds after a text
(an end token) is left out: the prompt has not ended.

A prompt longer than `max_length` loses whole examples from the end of the list, until it fits; the header and the begin token
stay. A question that is too long without any example is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from velora.config.mmlu import MMLUKeys
from velora.data.mmlu import LETTERS, Question, Subject
from velora.errors import ConfigError

HEADER = "The following are multiple choice questions (with answers) about {}.\n\n"
CHOICES = tuple(f" {letter}" for letter in LETTERS)


class Prompt(NamedTuple):
    """The ids before the letter, the ids of the four letters, and how many examples there are."""

    context: tuple[int, ...]
    letters: tuple[int, ...]
    num_shots: int


def header(subject: str, mode: str) -> str:
    """The original sets a blank before each word of the name, so two stand after "about"."""
    words = subject.replace("_", " ")
    return HEADER.format(f" {words}" if mode == "hendrycks" else words)


def example(question: Question, mode: str, *, solved: bool) -> str:
    """The question, its answers and "Answer:"; with its letter and an empty line if it is solved."""
    text = question.text if mode == "hendrycks" else question.text.strip()
    lines = [
        text,
        *(f"{letter}. {answer}" for letter, answer in zip(LETTERS, question.answers, strict=True)),
        "Answer:",
    ]
    return "\n".join(lines) + (f" {LETTERS[question.gold]}\n\n" if solved else "")


def prompt_text(subject: Subject, question: Question, num_shots: int, mode: str) -> str:
    """Everything before the blank and the letter."""
    shots = "".join(example(shot, mode, solved=True) for shot in subject.shots[:num_shots])
    return header(subject.name, mode) + shots + example(question, mode, solved=False)


class Encoder:
    """Texts to ids, with the begin token of a tokenizer and without its end token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.begin = begin_ids(tokenizer)

    def __call__(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        encoded = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [(*self.begin, *ids) for ids in encoded["input_ids"]]


def begin_ids(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer sets before a text: its begin token once, or nothing.

    One that says `add_bos_token` and does not do it (its post-processor was lost when it was saved) is taken at its word.
    """
    plain = tokenizer("x", add_special_tokens=False)["input_ids"]
    whole = tokenizer("x")["input_ids"]
    places = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
    before = whole[: places[0]] if places else []
    bos = tokenizer.bos_token_id
    if bos is None:
        return tuple(before)
    if bos in before:
        return tuple(before[: before.index(bos) + 1])  # not twice
    return (bos, *before) if getattr(tokenizer, "add_bos_token", None) is True else tuple(before)


def split_choices(encoded: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The context and one id for each choice, out of the encodings of prompt and choice together."""
    common = common_prefix(encoded)
    context, letters = encoded[0][:common], tuple(ids[common] for ids in encoded if len(ids) == common + 1)
    if len(letters) != len(encoded) or len(set(letters)) != len(letters):
        raise ConfigError(
            "this tokenizer does not write the answers A, B, C and D as one token each after the same prompt, so they cannot be "
            "compared; give another model.tokenizer"
        )
    return context, letters


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of what all of them begin with."""
    first, last = min(map(tuple, sequences)), max(map(tuple, sequences))
    for i, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return i
    return min(len(first), len(last))


def prompts(subject: Subject, keys: MMLUKeys, encoder: Encoder) -> list[Prompt]:
    """The prompt of each question of a subject, with as many examples as fit into `max_length` tokens."""
    found: dict[int, Prompt] = {}
    todo = list(range(len(subject.questions)))
    letters: tuple[int, ...] = ()
    for num_shots in range(keys.num_shots, -1, -1):
        texts = [prompt_text(subject, subject.questions[i], num_shots, keys.prompt) for i in todo]
        if texts and not letters:
            letters = split_choices(encoder([texts[0] + choice for choice in CHOICES]))[1]
        for i, context in zip(list(todo), _contexts(texts, letters, encoder), strict=True):
            if len(context) <= keys.max_length:
                found[i] = Prompt(context, letters, num_shots)
        todo = [i for i in todo if i not in found]
        if not todo:
            return [found[i] for i in range(len(subject.questions))]
    question = subject.questions[todo[0]]
    raise ConfigError(
        f"question {question.row} of {subject.name} has more than {keys.max_length} tokens (max_length) without any "
        "example; give a larger max_length, or other subjects"
    )


def _contexts(texts: list[str], letters: tuple[int, ...], encoder: Encoder) -> list[tuple[int, ...]]:
    """The ids before the letter. One of the four is encoded: they end alike, so they are cut alike."""
    if not texts:
        return []
    encoded = encoder([text + CHOICES[0] for text in texts])
    assert all(ids[-1] == letters[0] for ids in encoded), "a prompt ends otherwise than the first one of its subject"
    return [ids[:-1] for ids in encoded]
