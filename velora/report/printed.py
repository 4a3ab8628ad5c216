"""What the paper prints, from the experiment files that come with the program: also the rows of which there is no record yet."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml

Row = Mapping[str, Mapping[str, float]]
"""A row of a table: column -> name of a figure -> the figure."""
Rows = Mapping[str, Mapping[str, Row]]
"""Folder of the experiment files ("table2") -> row -> its figures."""


@cache
def shipped_rows() -> Rows:
    from velora.config.compose import conf_dir

    return rows_below(conf_dir() / "experiment")


def rows_below(folder: Path) -> dict[str, dict[str, Row]]:
    """The rows of all experiment files that name a table; a file without printed figures has none."""
    found: dict[str, dict[str, Row]] = {}
    for file in sorted(folder.rglob("*.yaml")):
        experiment = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("experiment")
        if (
            not isinstance(experiment, dict)
            or not experiment.get("table")
            or not isinstance(experiment.get("paper"), dict)
        ):
            continue
        name = str(experiment.get("name"))
        row = str(experiment.get("row") or name.rpartition("/")[2])
        found.setdefault(name.rpartition("/")[0], {})[row] = experiment["paper"]
    return found
