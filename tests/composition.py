"""Composing configurations in the test's own process, as the command line does."""

from __future__ import annotations

from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from velora.cli import conf_dir

EXPERIMENTS = {
    str(file.relative_to(conf_dir() / "experiment").with_suffix("")): file
    for file in sorted((conf_dir() / "experiment").rglob("*.yaml"))
}


def composed(*overrides: str) -> dict[str, Any]:
    """The plain composed dictionary, with a name."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        raw = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    assert isinstance(raw, dict)
    return {**raw, "name": "test"}


def columns(experiment: str) -> list[tuple[str, ...]]:
    """The overrides of an experiment and each of its columns: the tasks, models or methods that it has settings or figures for."""
    stated = yaml.safe_load(EXPERIMENTS[experiment].read_text())["experiment"]
    found = []
    for column in {**stated.get("settings", {}), **stated.get("paper", {})}:
        words = column.split()  # "glue/sst2", "llama_60m", "c4 llama_60m" or "velora"
        found.append(tuple(f"{_group_of(word)}={word}" for word in words))
    return [(f"experiment={experiment}", *column) for column in dict.fromkeys(found or [()])]


def _group_of(choice: str) -> str:
    return next(group for group in ("task", "model", "method") if (conf_dir() / group / f"{choice}.yaml").is_file())
