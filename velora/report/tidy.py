"""All figures as one long table for other programs: a line for each figure of each cell, numbers in full precision."""

from __future__ import annotations

from collections.abc import Iterable

from velora.report.differences import Point, groups, points, shown
from velora.report.paper import MEMORY, SPEED, ours_of, printed_tables
from velora.report.printed import Rows
from velora.report.records import PUBLISHED, Record
from velora.report.seeds import Figure, measured, score, spread

HEAD = (
    "level", "table", "row", "task", "model", "method", "settings", "figure", "paper", "mean", "standard_deviation", "seeds",
    "difference", "status", "device", "steps", "commit", "command", "folder", "error",
)  # fmt: skip
Line = list[str | int | float | None]


def tidy(records: list[Record], shipped: Rows | None = None) -> list[Line]:
    """The head and the lines; a cell that the paper prints and that was not run has a line with the status "missing"."""
    lines: list[Line] = [list(HEAD)]
    for group in groups(records).values():
        keys, rows = points(group)
        for point in rows:
            lines += _of_point(keys, point)
    for table in printed_tables(records, shipped):
        done = {(entry.row, place) for entry in table.entries for place in entry.runs}
        wanted = set(table.places)
        for row, printed in table.rows.items():
            for column, figures in printed.items():
                if column in wanted and (row, column) not in done:
                    lines += [
                        _missing(table.level, table.folder, row, column, name, value) for name, value in figures.items()
                    ]
    return lines


def _of_point(keys: list[str], point: Point) -> list[Line]:
    done = point.done
    runs = list(point.records)
    first = (done or runs)[0]
    settings = ";".join(f"{key}={shown(v)}" for key, v in zip(keys, point.values, strict=True) if v is not None)
    table = str(first.experiment.get("name")).rpartition("/")[0] if first.table else None
    start: Line = [
        first.level,
        table,
        first.row if first.table else None,
        first["task"],
        first["model"],
        point.method,
        settings,
    ]
    end: Line = [
        _listed(record.status for record in runs), _listed(record["device"] for record in runs), first.steps,
        _listed(record["git"].get("commit") for record in runs), _listed(record.command for record in runs),
        _listed(str(record.folder) for record in runs), _listed(record["error"] for record in runs),
    ]  # fmt: skip
    lines: list[Line] = []
    for name, figure in _figures(done):
        found, printed = spread(done, figure), first.paper.get(name)
        if found:
            comparable = printed is not None and first.level == PUBLISHED
            difference = found.mean - printed if comparable and printed is not None else None
            lines.append([*start, name, printed, found.mean, found.deviation, found.num_seeds, difference, *end])
    return lines or [[*start, None, None, None, None, 0, None, *end]]


def _figures(done: Iterable[Record]) -> list[tuple[str, Figure]]:
    done = list(done)
    found: list[tuple[str, Figure]] = []
    for key in dict.fromkeys(key for record in done for key in record.scores):
        found.append((key, score(key)))
    found += [(name, ours_of(name)) for name in (MEMORY, SPEED)]
    for key in dict.fromkeys(key for record in done for key in record["memory"]):
        found.append((f"memory.{key}", measured("memory", key)))
    for key in dict.fromkeys(key for record in done for key in record["speed"] if key != SPEED):
        found.append((f"speed.{key}", measured("speed", key)))
    found.append(("parameters.trainable", measured("parameters", "trainable")))
    return found


def _missing(level: str, table: str, row: str, column: str, name: str, value: float) -> Line:
    task, _, model = column.partition(" ")
    rest: Line = [None] * 6
    return [level, table, row, task, model or None, None, None, name, value, None, None, 0, None, "missing", *rest]


def _listed(values: Iterable[str | None]) -> str | None:
    return " | ".join(dict.fromkeys(value for value in values if value)) or None
