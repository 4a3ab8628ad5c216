"""Shared by the tests of text tasks: the composed configuration, and a small stand-in for one."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from velora.config.run import Config, validate


def composed(*overrides: str) -> Config:
    """The validated configuration of `velora-train <overrides>`."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    folder = str(Path(__file__).parent.parent / "conf")
    with initialize_config_dir(version_base="1.3", config_dir=folder):
        raw = OmegaConf.to_container(compose("config", [*overrides, "name=test"]), resolve=True)
    return validate(raw)  # type: ignore[arg-type]


def yaml_keys(file: str) -> dict[str, Any]:
    """The keys of a task as `conf/<file>.yaml` has them: all of one, since the classes have no defaults."""
    return yaml.safe_load((Path(__file__).parent.parent / "conf" / f"{file}.yaml").read_text())["task"]


def stand_in(root: Path | None = None, seed: int = 0, modality: str = "causal_lm", **trainer: Any) -> Any:
    """As much of a configuration as a task reads."""
    settings = {
        "batch_size": 4, "examples_per_forward": 4, "max_steps": 10, "eval_every": "end", "save_every": "end",
    }  # fmt: skip
    return SimpleNamespace(
        seed=seed,
        data=SimpleNamespace(root=root),
        model=SimpleNamespace(name="some_model", architecture=None, modalities=lambda: (modality,)),
        trainer=SimpleNamespace(**(settings | trainer)),
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
