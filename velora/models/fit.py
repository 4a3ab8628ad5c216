"""Whether texts and tokenizer fit the network: its positions, and the words that it embeds. No torch here.

The limits stand in the architecture of the model's YAML, or in the config.json of the checkpoint that it loads; `Model`s of
text have a method `limits()` that knows which.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from velora.errors import ConfigError

if TYPE_CHECKING:
    from velora.config.run import Config

SENTINELS = (
    100  # words of T5's tokenizer beyond the 32,000 that language models embed; they stand for nothing in a text
)

# Networks whose positions begin at the id of the padding token + 1, so that their table holds that many texts' tokens less.
_POSITIONS_AFTER_PADDING = (
    "camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "mpnet", "roberta", "roberta-prelayernorm",
    "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
_ROBERTAS_PADDING = 1


class Limits(NamedTuple):
    """Longest text in tokens and number of embedded words; None for what has no limit, or one that is not known."""

    positions: int | None = None
    vocabulary: int | None = None


def limits_of(architecture: Mapping[str, Any]) -> Limits:
    """The limits of an architecture with the keys of transformers' configuration."""
    positions = architecture.get("max_position_embeddings")
    if positions is not None and architecture.get("model_type") in _POSITIONS_AFTER_PADDING:
        padding = architecture.get("pad_token_id")
        positions -= 1 + (_ROBERTAS_PADDING if padding is None else padding)
    return Limits(positions, architecture.get("vocab_size"))


def network_limits(config: Config) -> Limits:
    """The limits of this run's network; reads the checkpoint's config.json where it has one."""
    find = getattr(config.model, "limits", None)
    return find() if find is not None else limits_of(getattr(config.model, "architecture", None) or {})


def length_problems(max_length: int, config: Config) -> Iterator[str]:
    """A sentence if the texts are longer than the network's positions, as far as its YAML tells."""
    if getattr(config.model, "path", None) is None:
        yield from _too_long(max_length, limits_of(getattr(config.model, "architecture", None) or {}), config)


def check_length(max_length: int, limits: Limits, config: Config) -> None:
    """ConfigError if the texts are longer than the network's positions."""
    for sentence in _too_long(max_length, limits, config):
        raise ConfigError(sentence)


def vocabulary_size(tokenizer: Any, limits: Limits) -> int:
    """Words that the network embeds: its own figure, or else the tokenizer's length."""
    return len(tokenizer) if limits.vocabulary is None else int(limits.vocabulary)


def check_vocabulary(tokenizer: Any, limits: Limits, config: Config, spare: int = 0) -> None:
    """ConfigError where the tokenizer has words (more than `spare` of them) that the network does not embed."""
    words, embedded = len(tokenizer), vocabulary_size(tokenizer, limits)
    if words > embedded + spare:
        raise ConfigError(
            f"the tokenizer of model={config.model.name} has {words} words and the network embeds {embedded}: give the "
            "model.tokenizer that belongs to it"
        )


def _too_long(max_length: int, limits: Limits, config: Config) -> Iterator[str]:
    if limits.positions is not None and max_length > limits.positions:
        yield f"task.max_length={max_length} is more than the {limits.positions} positions of model={config.model.name}"
