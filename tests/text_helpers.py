"""Shared by the tests of text tasks: the composed configuration, and a short one for a task alone."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

import velora
from velora.config.run import Config, DataConfig


def composed(*overrides: str) -> Config:
    """The validated configuration of `velora-train <overrides>`."""
    return velora.compose("name=test", *overrides)


def yaml_keys(file: str) -> dict[str, Any]:
    """The keys of a task as `conf/<file>.yaml` has them: all of one, since the classes have no defaults."""
    return yaml.safe_load((Path(__file__).parent.parent / "conf" / f"{file}.yaml").read_text())["task"]


_plain = functools.cache(composed)
_MODELS = {"causal_lm": "llama_tiny", "sequence_classification": "roberta_tiny", "image_classification": "vit_tiny"}


def stand_in(
    root: Path | None = None, seed: int = 0, modality: str = "causal_lm", architecture: Any = (), **trainer: Any
) -> Config:
    """A run for a task that is tried alone: a short one, of a network whose limits are not known."""
    config = _plain(f"model={_MODELS[modality]}", "task=embedded", "method=full")
    settings = {"batch_size": 4, "max_steps": 10, "eval_every": "end", "save_every": "end"}
    return config.model_copy(
        update={
            "seed": seed,
            "data": DataConfig(root=root),
            "model": config.model.model_copy(update={"name": "some_model", "architecture": dict(architecture)}),
            "trainer": config.trainer.model_copy(update=settings | trainer),
        }
    )


def write_shard(file: Path, texts: Iterable[str]) -> Path:
    """A json-lines shard; compressed if its name ends in .gz."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps({"text": text, "url": None}) + "\n" for text in texts)
    if file.name.endswith(".gz"):
        file.write_bytes(gzip.compress(content.encode()))
    else:
        file.write_text(content, encoding="utf-8")
    return file
