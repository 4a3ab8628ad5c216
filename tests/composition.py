"""The shipped experiments and their columns."""

from __future__ import annotations

import yaml

from velora.config.compose import conf_dir

EXPERIMENTS = {
    str(file.relative_to(conf_dir() / "experiment").with_suffix("")): file
    for file in sorted((conf_dir() / "experiment").rglob("*.yaml"))
}


def columns(experiment: str) -> list[tuple[str, ...]]:
    """The overrides of an experiment and each of its columns: the tasks and models that it has settings or figures for."""
    stated = yaml.safe_load(EXPERIMENTS[experiment].read_text())["experiment"]
    found = []
    for column in {**stated.get("settings", {}), **stated.get("paper", {})}:
        words = column.split()  # "glue/sst2", "llama_60m" or "c4 llama_60m"
        found.append(tuple(f"{'model' if word.startswith('llama') else 'task'}={word}" for word in words))
    return [(f"experiment={experiment}", *column) for column in dict.fromkeys(found or [()])]
