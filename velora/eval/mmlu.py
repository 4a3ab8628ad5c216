"""MMLU on one network: subject by subject, with a line for each question, and from there the scores.

The file of an evaluation is JSON lines: a header (prompt mode, split, number of questions, a digest of what was asked
of whom), then a line for each question. It is written whole after each subject, so what was killed continues with the next
subject; a file whose digest is another one is started again. Under several processes each evaluates everything, and the first one
writes: the figures are the same everywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from velora.config.mmlu import MMLU, MMLUKeys, too_long
from velora.config.parts import TaskData
from velora.config.run import Config
from velora.data.metrics import num_tokens
from velora.data.mmlu import LETTERS, Subject, read_subjects
from velora.data.mmlu_prompt import CHOICES, Encoder, Prompt, prompt_text, prompts, split_choices
from velora.errors import ConfigError, Diverged, RunError
from velora.eval.questions import Answer, flat_scores, header_and_answers, scores
from velora.eval.shared_prefix import next_token_log_probs
from velora.models.tokenizer import check_vocabulary, network_limits
from velora.run.files import why, write_whole
from velora.run.notes import note

ENOUGH_TO_TELL = 50  # questions whose four log-probabilities are all alike

__all__ = ["Benchmark", "evaluation_only", "flat_scores", "load_benchmark"]


def evaluation_only(task: MMLU, tokenizer: Any, config: Config) -> TaskData:
    """A task that trains nothing."""
    benchmark = load_benchmark(task, tokenizer, config)
    return TaskData(
        phases=[], collate=_nothing, metrics=lambda predictions, labels: {}, best_metric="mmlu_micro", greater_is_better=True,
        unit="tokens", num_targets=num_tokens, num_items=num_tokens, about={"task": task.name, "mmlu": benchmark.about},
        benchmark=benchmark,
    )  # fmt: skip


def _nothing(examples: list[Any]) -> dict[str, Any]:
    raise AssertionError("there is nothing to train on")


def load_benchmark(keys: MMLUKeys, tokenizer: Any, config: Config) -> Benchmark:
    """Read the questions and see that they can be asked; ConfigError where data, tokenizer or positions do not allow it."""
    limits = network_limits(config)
    check_vocabulary(tokenizer, limits, config)
    if sentence := too_long(keys.max_length, limits.positions, "task", config):
        raise ConfigError(sentence)
    subjects, about = read_subjects(keys, config.data.root)
    encoder = Encoder(tokenizer)
    _check_questions(subjects, keys, encoder)
    asked = sum(len(subject.questions) for subject in subjects)
    about |= {
        "prompt": keys.prompt, "num_shots": keys.num_shots, "max_length": keys.max_length, "subjects": len(subjects),
        "questions": asked, "begin_token": tokenizer.convert_ids_to_tokens(list(encoder.begin)),
        "letter_ids": list(_letters(subjects[0], keys, encoder)),
    }  # fmt: skip
    if asked < about["questions_of_split"]:
        about["sample"] = f"{asked} of {about['questions_of_split']} questions, drawn with seed {keys.sample_seed}"
    return Benchmark(keys, subjects, encoder, about)


def _letters(subject: Subject, keys: MMLUKeys, encoder: Encoder) -> tuple[int, ...]:
    text = prompt_text(subject, subject.questions[0], 0, keys.prompt)
    return split_choices(encoder([text + choice for choice in CHOICES]))[1]


def _check_questions(subjects: list[Subject], keys: MMLUKeys, encoder: Encoder) -> None:
    """Each question fits without examples. A token is a byte or more, so the short ones need no tokenizer."""
    for subject in subjects:
        texts = [prompt_text(subject, question, 0, keys.prompt) for question in subject.questions]
        long = [q for q, text in zip(subject.questions, texts, strict=True) if len(text.encode()) > keys.max_length - 8]
        if long:
            prompts(subject._replace(questions=tuple(long)), keys.model_copy(update={"num_shots": 0}), encoder)


class Benchmark:
    """The questions of a run, ready to be asked; `about` says in the record what they are."""

    def __init__(self, keys: MMLUKeys, subjects: list[Subject], encoder: Encoder, about: dict[str, Any]) -> None:
        self.keys, self.subjects, self.encoder, self.about = keys, subjects, encoder, about

    def evaluate(
        self, network: nn.Module, file: Path | None, *, batch_size: int, dtype: torch.dtype | None = None,
        writes: bool = True, check: Callable[[], None] = lambda: None, share: bool = True,
    ) -> dict[str, Any]:  # fmt: skip
        """Scores of the network, which stays where it is; `file` keeps the answers and continues from what it holds.

        `dtype` is that of autocast, `check` is called after each batch and may raise. Raises RunError where the file cannot be
        written or the network makes no difference between the letters, Diverged where its figures are not finite.
        """
        header = self._header(network, dtype)
        answers = _continued(file, header, self.subjects)
        total = sum(len(subject.questions) for subject in self.subjects)
        was_training = network.training
        network.eval()
        try:
            with tqdm(total=total, initial=len(answers), desc="MMLU", unit="question", disable=not writes) as bar:
                for subject in self.subjects[len({answer.subject for answer in answers}) :]:
                    bar.set_postfix_str(subject.name, refresh=False)
                    asked = prompts(subject, self.keys, self.encoder)

                    def progress(number: int) -> None:
                        bar.update(number)
                        check()

                    answers += _ask(network, subject, asked, batch_size, dtype, share, progress)
                    _refuse_no_difference(answers, total)
                    if file is not None and writes:
                        _write(file, header, answers)
        finally:
            network.train(was_training)
        _refuse_no_difference(answers, len(answers))
        _say(answers, self.keys.num_shots)
        return scores(answers, self.keys.num_shots)

    def _header(self, network: nn.Module, dtype: torch.dtype | None) -> dict[str, Any]:
        """What the answers of a file are answers to, and whose."""
        what = [
            self.keys.model_dump(mode="json", exclude={"folder", "hub", "name"}), str(dtype), self.about["letter_ids"],
            self.encoder.begin, [(s.name, s.shots, s.questions) for s in self.subjects], weights_digest(network),
        ]  # fmt: skip
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        chosen = ("prompt", "split", "num_shots", "questions")
        return {"benchmark": "mmlu", **{key: self.about[key] for key in chosen}, "digest": digest}


def _ask(
    network: nn.Module, subject: Subject, asked: list[Prompt], batch_size: int, dtype: torch.dtype | None, share: bool,
    progress: Callable[[int], None],
) -> list[Answer]:  # fmt: skip
    """The answers to a subject's questions; those with the same number of examples share them."""
    device = next(network.parameters()).device
    rows: dict[int, list[float]] = {}
    for num_shots in sorted({prompt.num_shots for prompt in asked}, reverse=True):
        group = [i for i, prompt in enumerate(asked) if prompt.num_shots == num_shots]
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            found = next_token_log_probs(
                network, [asked[i].context for i in group], asked[0].letters, batch_size=batch_size,
                padding_id=asked[0].letters[0], share=share, after_batch=progress,
            )  # fmt: skip
        if not found.isfinite().all():
            raise Diverged(
                f"the network's log-probabilities on MMLU's {subject.name} are not finite, so it has no score"
            )
        rows.update(zip(group, found.tolist(), strict=True))
    return [
        Answer(subject.name, question.row, question.gold, rows[i], asked[i].num_shots)
        for i, question in enumerate(subject.questions)
    ]


def weights_digest(network: nn.Module) -> list[float]:
    """Sums over the weights, which another network, or the same one after a step, has not."""
    found = []
    for tensor in [*network.parameters(), *network.buffers()]:
        flat = tensor.detach().reshape(-1)
        found += [float(flat.sum(dtype=torch.float64)), float(flat[::7].sum(dtype=torch.float64))]
    return found


def _continued(file: Path | None, header: dict[str, Any], subjects: list[Subject]) -> list[Answer]:
    """The answers of the first subjects that an earlier evaluation has finished; none of a file of something else."""
    if file is None or not file.is_file():
        return []
    try:
        found, answers = header_and_answers(file)
    except ValueError as error:
        note(f"{file} is not what an evaluation writes ({error}); it is done again")
        return []
    if found.get("digest") != header["digest"]:
        note(f"{file} holds answers to other questions, or of another network; they are asked again")
        return []
    expected = [(s.name, q.row) for s in subjects for q in s.questions][: len(answers)]
    if [(answer.subject, answer.index) for answer in answers] != expected:
        return []
    if answers:
        note(f"{len(answers)} questions were answered before; continuing with the next subject ({file})")
    return answers


def _write(file: Path, header: dict[str, Any], answers: list[Answer]) -> None:
    lines = [header, *(answer.line() for answer in answers)]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise RunError(
            f"{file} cannot be written ({why(error)}); make room there, and the same command continues the evaluation"
        ) from None


def _refuse_no_difference(answers: list[Answer], enough: int) -> None:
    """RunError for a network that gives all four letters the same probability: "always A" would be its score."""
    if len(answers) < min(enough, ENOUGH_TO_TELL) or any(len(set(answer.log_probs)) > 1 for answer in answers):
        return
    raise RunError(
        f"the network gives A, B, C and D the same probability in all of {len(answers)} questions of MMLU, so it has no score "
        "(always answering A would be right in 22.95 % of the test): its weights or its tokenizer are not what they should be"
    )


def _say(answers: list[Answer], num_shots: int) -> None:
    fewer = [answer for answer in answers if answer.shots < num_shots]
    if fewer:
        dropped = sum(num_shots - answer.shots for answer in fewer)
        note(
            f"{len(fewer)} of MMLU's prompts were too long for {num_shots} examples: {dropped} examples were dropped whole"
        )
    chosen = {answer.choice for answer in answers}
    if len(chosen) == 1 and len(answers) >= ENOUGH_TO_TELL:
        note(f"the network answered {LETTERS[chosen.pop()]} to all of {len(answers)} questions of MMLU")
