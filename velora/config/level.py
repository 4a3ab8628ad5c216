"""A table of the paper at one of three levels: which rows and columns, how often, and what differs from the published setting.

    conf/table/<table>.yaml        title, rows, columns, and for each level what differs
    velora-train experiment=table2/velora level=small task=glue/cola      one cell; your own settings win over the level's
    velora-train -m table=table2 level=small                              all of it (velora/tables/)

    paper    the published setting: weights, data and GPUs are needed
    memory   real shapes, random weights, no data: memory and speed only, estimated where there is no GPU
    small    minutes on two cores, real data, small real weights where there are any

`level=small` stands for the overrides that the file lists, and for `experiment.level=small`, which goes into the record. So nothing
is hidden: `--cfg job` and the record's command show them all. No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict

from velora.config.read import one_of, parse, unknown_value
from velora.errors import ConfigError

LevelName = Literal["paper", "memory", "small"]
LEVELS: tuple[LevelName, ...] = get_args(LevelName)
Settings = dict[str, Any]
"""Keys and groups with their values, as they stand on a command line."""


class _Read(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RowAtLevel(_Read):
    """What differs in one row. `search`: each of these values is tried with the first seed, the best one with the others."""

    settings: Settings = {}
    search: dict[str, list[Any]] = {}


class TableAtLevel(_Read):
    """`about`: one or two sentences on what the figures of this level show and do not show; they go above the table. `figures`:
    which kinds of printed figures this level measures, where it is not what such a level always does (velora/report/paper.py)."""

    about: str | None = None
    columns: dict[str, list[str]] | None = None
    rows: dict[str, RowAtLevel] | list[str] | None = None
    seeds: list[int] = [0]
    settings: Settings = {}
    figures: list[Literal["score", "accounting", "memory", "speed"]] | None = None
    judged_by: str | None = None  # the score that counts, where it is another than the one that the paper prints

    def row(self, name: str) -> RowAtLevel:
        return self.rows.get(name, RowAtLevel()) if isinstance(self.rows, dict) else RowAtLevel()


class TableFile(_Read):
    """One file of conf/table/."""

    title: str
    columns: dict[str, list[str]]
    rows: list[str]
    levels: dict[LevelName, TableAtLevel]

    def at(self, level: str) -> TableAtLevel | None:
        return self.levels.get(level)  # type: ignore[call-overload, no-any-return]

    def rows_at(self, level: str) -> list[str]:
        return list(self.levels[level].rows or self.rows)  # type: ignore[index]

    def columns_at(self, level: str) -> dict[str, list[str]]:
        return self.levels[level].columns or self.columns  # type: ignore[index]


def read_table(name: str, folders: Sequence[Path]) -> TableFile | None:
    """conf/table/<name>.yaml, the user's own folder last; None where there is none."""
    found = [folder / "table" / f"{name}.yaml" for folder in folders]
    files = [file for file in found if file.is_file()]
    return _read_file(files[-1]) if files else None


@cache
def _read_file(file: Path) -> TableFile:
    return parse(TableFile, yaml.safe_load(file.read_text(encoding="utf-8")) or {}, file.stem)


def table_of(experiment: str) -> str:
    """The table of an experiment: the folder of its file ("table2/velora")."""
    return experiment.partition("/")[0]


@dataclass(frozen=True)
class Judge:
    """The score that a search goes by, and what is better."""

    score: str

    @property
    def best(self) -> Callable[..., Any]:
        lower = any(word in self.score for word in ("perplexity", "loss"))
        return min if lower else max


def printed_for(printed: Mapping[str, Mapping[str, float]], task: str, model: str) -> Mapping[str, float]:
    """What a row prints for a run: its column is named by task and model, or by the task alone."""
    return printed.get(f"{task} {model}", printed.get(task, {}))


def judge_of(experiment: Mapping[str, Any], task: str, model: str) -> Judge:
    """`judged_by` of an experiment, else the first score that the paper prints in this column, or in any column of the row."""
    printed = experiment.get("paper") or {}
    figures = [
        name for found in (printed_for(printed, task, model), *printed.values()) for name in found if is_score(name)
    ]
    stated = experiment.get("judged_by")
    if not stated and not figures:
        raise ConfigError(
            f"experiment={experiment.get('name')}: it prints no score to search by; give experiment.judged_by"
        )
    return Judge(str(stated or figures[0]))


def is_score(figure: str) -> bool:
    """Whether a printed figure is a score: not memory, a sum of bytes or a speed."""
    return not figure.endswith(("_gb", "_gib", "steps_per_second"))


def with_level(overrides: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The overrides with `level=...` written out; ConfigError where there is no such level."""
    if tables := [o for o in overrides if _key(o) == "table"]:
        name = tables[0].partition("=")[2]
        raise ConfigError(
            f"{tables[0]}: a table is many runs; velora-train -m table={name} runs them, experiment={name}/<row> is one of its rows"
        )
    levels = [o.partition("=")[2] for o in overrides if _key(o) == "level"]
    if not levels:
        return list(overrides)
    rest = [o for o in overrides if _key(o) != "level"]
    level = levels[-1]
    experiments = [e for o in rest if _key(o) == "experiment" for e in o.partition("=")[2].split(",")]
    if not experiments:
        raise ConfigError(f"level={level} is that of a table's row; give experiment=table2/velora, or -m table=table2")
    tables = sorted({table_of(e) for e in experiments})
    if len(tables) > 1:
        raise ConfigError(
            f"level={level}: {' and '.join(tables)} have settings of their own; run one table at a time, or all of them with "
            f"-m table={','.join(tables)}"
        )
    written = {row: settings_of(row, level, folders) for row in experiments}
    first = written[experiments[0]]
    if any(other != first for other in written.values()):
        raise ConfigError(
            f"level={level}: {', '.join(experiments)} have different settings at this level; run one at a time, or all of them "
            f"with -m table={tables[0]}"
        )
    given = {_key(o) for o in rest}
    chosen = [o for o in rest if _key(o) == "experiment"]
    return [*chosen, *(o for o in first if _key(o) not in given), *(o for o in rest if o not in chosen)]


def has_level(level: str, experiment: str, folders: Sequence[Path]) -> bool:
    """Whether a row can be run at a level. What is in no file of conf/table/ is as its source published it."""
    table = read_table(table_of(experiment), folders)
    return level == "paper" if table is None else table.at(level) is not None


def settings_of(experiment: str, level: str, folders: Sequence[Path]) -> list[str]:
    """The overrides that a level stands for in one row; ConfigError names the levels that there are."""
    table = read_table(table_of(experiment), folders)
    row = experiment.partition("/")[2]
    if level not in LEVELS:
        raise ConfigError(unknown_value("level", level, list(LEVELS)))
    if not has_level(level, experiment, folders):
        known: list[str] = [*table.levels] if table else ["paper"]
        raise ConfigError(f"level={level}: experiment={experiment} has no such level; it has {one_of(known)}")
    at = table.at(level) if table else None
    settings: Settings = {}
    if at is not None:
        settings = at.settings | at.row(row).settings
        if searched := list(at.row(row).search):
            settings |= {"++experiment.searched": searched}
        if at.judged_by:
            settings |= {"++experiment.judged_by": at.judged_by}
    return [*(f"{key}={as_override(value)}" for key, value in settings.items()), f"++experiment.level={level}"]


def as_override(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{as_override(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(as_override, value)) + "]"
    if isinstance(value, str) and not re.fullmatch(r"[\w][\w./@-]*", value):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return value if isinstance(value, str) else json.dumps(value)


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
