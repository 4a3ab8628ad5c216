"""The shipped experiments and their columns."""

from __future__ import annotations

import yaml

from velora.config.compose import conf_dir

EXPERIMENTS = {
    str(file.relative_to(conf_dir() / "experiment").with_suffix("")): file
    for file in sorted((conf_dir() / "experiment").rglob("*.yaml"))
}


def columns(experiment: str) -> list[tuple[str, ...]]:
    """The overrides of an experiment and each of its columns: the tasks, models or methods that it has settings or figures for."""
    stated = yaml.safe_load(EXPERIMENTS[experiment].read_text())["experiment"]
    found = []
    for column in {**(stated.get("settings") or {}), **(stated.get("paper") or {})}:
        words = column.split()  # "glue/sst2", "llama_60m", "c4 llama_60m" or "velora"
        found.append(tuple(f"{_group_of(word)}={word}" for word in words))
    return [(f"experiment={experiment}", *column) for column in dict.fromkeys(found or [()])]


def _group_of(choice: str) -> str:
    return next(group for group in ("task", "model", "method") if (conf_dir() / group / f"{choice}.yaml").is_file())
