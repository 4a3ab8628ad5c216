"""Language modelling on a text that every Python carries: the topics of its own manual (`pydoc_data.topics`).

The embedded task: no download, no data folder. The manual repeats itself (the topic `compound` holds those of `if` and `for`), so
each paragraph is kept once, in the longest topic that has it; then whole topics are set aside for validation, chosen by a
hash of their names. No paragraph is on both sides. Other versions of Python carry another text: size and SHA-256 stand
in the record.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from velora.config.parts import Head, Phase, Task, TaskData
from velora.data.counts import num_predicted_tokens, num_tokens
from velora.models.fit import (
    SENTINELS,
    check_length,
    check_vocabulary,
    length_problems,
    network_limits,
    vocabulary_size,
)

if TYPE_CHECKING:
    from velora.config.run import Config

VALIDATION_SHARE = 10  # one topic in so many


class Manual(Task):
    kind: Literal["manual"]

    max_length: PositiveInt = 256
    published_eval_batch_size: PositiveInt = 16

    def head(self, config: Config) -> Head:
        return Head("causal_lm")

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        yield from length_problems(self.max_length, config)
        if self.max_length < 2:
            yield f"task.max_length={self.max_length}: a sequence of one token predicts nothing; give at least 2"

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        from velora.data import language_model as lm

        sides = split_topics(topics())
        limits = network_limits(config)
        check_vocabulary(preprocessor, limits, config, spare=SENTINELS)
        check_length(self.max_length, limits, config)
        vocabulary = vocabulary_size(preprocessor, limits)
        blocks = {
            side: list(lm.packed(texts.values(), preprocessor, self.max_length, vocabulary))
            for side, texts in sides.items()
        }
        about = {
            "task": self.name,
            "source": "pydoc_data.topics",
            "python": ".".join(map(str, sys.version_info[:3])),
            "text_bytes": {side: sum(len(t.encode()) for t in texts.values()) for side, texts in sides.items()},
            "text_sha256": hashlib.sha256(
                "\n".join(f"{k}\n{v}" for k, v in sorted(topics().items())).encode()
            ).hexdigest(),
            "topics": {side: len(texts) for side, texts in sides.items()},
            "validation_topics": sorted(sides["validation"]),
            "sequences": {side: len(found) for side, found in blocks.items()},
            "max_length": self.max_length,
        }
        return TaskData(
            phases=[Phase("train", blocks["train"], {"": blocks["validation"]})],
            collate=lambda sequences: lm.collate(sequences, preprocessor.pad_token_id, self.max_length, masked=False),
            metrics=lambda sequences, labels: lm.scores(sequences, self.published_eval_batch_size),
            best_metric="perplexity",
            greater_is_better=False,
            unit="tokens",
            num_targets=num_predicted_tokens,
            num_items=num_tokens,
            reduce_logits=lm.sequence_losses,
            about=about,
        )

    def batch_shapes(self, batch_size: int, config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
        from velora.data.language_model import batch_shapes

        return batch_shapes(batch_size, self.max_length, masked=False)


def topics() -> dict[str, str]:
    """The manual's texts by topic, as this Python carries them."""
    from pydoc_data.topics import topics

    return topics


def split_topics(texts: dict[str, str]) -> dict[str, dict[str, str]]:
    """`train` and `validation`: topics with every paragraph (runs of blanks count as one) kept once, no topic on both sides."""
    seen: set[str] = set()
    sides: dict[str, dict[str, str]] = {"train": {}, "validation": {}}
    for name in sorted(texts, key=lambda n: (-len(texts[n]), n)):
        kept = []
        for paragraph in texts[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append(paragraph)
        if kept:
            chosen = int(hashlib.sha256(name.encode()).hexdigest(), 16) % VALIDATION_SHARE == 0
            sides["validation" if chosen else "train"][name] = "\n\n".join(kept)
    return sides
