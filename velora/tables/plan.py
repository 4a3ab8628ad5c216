"""Which runs a table of the paper has at a level: one for each row, column and seed, and those of a search.

A row that is searched runs at each point of its grid with the first seed, and at the best of them with the others. No torch here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from velora.config.level import LEVELS, TableFile, as_override, read_table
from velora.config.read import one_of, unknown_value
from velora.errors import ConfigError


@dataclass(frozen=True)
class Asked:
    """What the command line says: tables, level, and what is narrowed or set beside."""

    tables: list[str]
    level: str
    columns: dict[str, list[str]] = field(default_factory=dict)  # task=... and model=...: of those the table has
    rows: list[str] | None = None  # experiment=table2/full,table2/lora
    seeds: list[int] | None = None
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One row in one column: the overrides of its runs without a seed, and the points of its search (one empty point: none)."""

    experiment: str
    overrides: tuple[str, ...]
    points: tuple[tuple[str, ...], ...]
    seeds: tuple[int, ...]

    def first(self) -> list[tuple[str, ...]]:
        """The runs that need no result of others."""
        seeds = self.seeds if len(self.points) == 1 else self.seeds[:1]
        return [self.run(point, seed) for point in self.points for seed in seeds]

    def further(self, best: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Those at the best point of the search."""
        return [self.run(best, seed) for seed in self.seeds[1:]] if len(self.points) > 1 else []

    def run(self, point: tuple[str, ...], seed: int) -> tuple[str, ...]:
        return (*self.overrides, *point, f"seed={seed}")


def plan(asked: Asked, folders: Sequence[Path]) -> tuple[list[Cell], list[str]]:
    """All cells of all tables, and a sentence for each table that has none at this level.

    ConfigError where something that was asked for is not there, or nothing is left.
    """
    if asked.level not in LEVELS:
        raise ConfigError(unknown_value("level", asked.level, list(LEVELS)))
    cells = []
    without = []
    for name in asked.tables:
        table = read_table(name, folders)
        if table is None:
            known = sorted({file.stem for folder in folders for file in (folder / "table").glob("*.yaml")})
            raise ConfigError(unknown_value("table", name, known))
        if table.at(asked.level) is None:
            without.append(f"table={name} has no level {asked.level}; it has {one_of(list(table.levels))}")
            continue
        cells += list(_cells(name, table, asked))
    if not cells:
        raise ConfigError(
            without[0] if without else f"{' '.join(asked.tables)}: nothing of it is left by what is asked for"
        )
    return cells, without


def _cells(name: str, table: TableFile, asked: Asked) -> Iterator[Cell]:
    at = table.levels[asked.level]  # type: ignore[index]
    rows = table.rows_at(asked.level)
    if asked.rows is not None:
        rows = _of_those(
            f"experiment of {name} at level {asked.level}",
            rows,
            [r.partition("/")[2] for r in asked.rows if r.startswith(f"{name}/")],
        )
    axes = []
    for key, values in table.columns_at(asked.level).items():
        wanted = asked.columns.get(key)
        chosen = values if wanted is None else _of_those(f"{key} of {name} at level {asked.level}", values, wanted)
        axes.append([f"{key}={value}" for value in chosen])
    searchable = {override.partition("=")[0].lstrip("+~") for override in asked.overrides}
    for row in rows:
        grid = {key: values for key, values in at.row(row).search.items() if key not in searchable}
        points = [
            tuple(f"{key}={as_override(v)}" for key, v in zip(grid, values, strict=True))
            for values in itertools.product(*grid.values())
        ]
        for column in itertools.product(*axes):
            start = (f"experiment={name}/{row}", f"level={asked.level}", *column, *asked.overrides)
            yield Cell(f"{name}/{row}", start, tuple(points), tuple(asked.seeds or at.seeds))


def _of_those(what: str, known: list[str], wanted: list[str]) -> list[str]:
    if missing := [value for value in wanted if value not in known]:
        raise ConfigError(f"{missing[0]} is no {what}; it is one of {one_of(known)}")
    return [value for value in known if value in wanted]
