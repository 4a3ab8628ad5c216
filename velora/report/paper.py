"""The paper's tables with ours beside them: for each row the printed figure, ours, and the difference, in the paper's columns.

A table holds runs of one level only. Where that is not "as published" the printed figures are those of another setting, and
no difference is taken. A row or column that the paper prints and nothing was run for stays in the table, marked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean

from velora.report.commands import made_of
from velora.report.differences import natural, points
from velora.report.printed import Row, Rows, shipped_rows
from velora.report.records import PUBLISHED, Record
from velora.report.seeds import Figure, Spread, paired, paired_values, spread
from velora.report.table import Cell, Notes, Table
from velora.report.text import human_number

MEMORY, SPEED = "memory_gb", "steps_per_second"
_KINDS = {MEMORY: "memory", SPEED: "speed"}
_UNITS = {
    "score": "Scores are fractions where the paper prints per cent. Ours are those of the last step.",
    "memory": "GB, 10^9 bytes. Ours: the peak that CUDA's allocator reports.",
    "speed": "Steps per second.",
}
NOT_RUN = "not run: there is no record of it"
NO_FIGURE = "run, but this figure was not measured there (a memory peak needs a CUDA device)"
ESTIMATED = "estimated for a CUDA device without one, not measured"


@dataclass(frozen=True)
class Entry:
    """The runs of one row (and of one value of what differs within it), by column."""

    row: str
    label: str
    runs: Mapping[str, list[Record]] = field(default_factory=dict)

    def done(self, column: str) -> list[Record]:
        return [record for record in self.runs.get(column, []) if record["status"] == "ok"]


@dataclass(frozen=True)
class Printed:
    """One table of the paper at one level: what is printed, and our entries in its rows."""

    folder: str
    level: str
    rows: Mapping[str, Row]
    entries: list[Entry]

    @property
    def columns(self) -> list[str]:
        run = (column for entry in self.entries for column in entry.runs)
        return list(dict.fromkeys([*(column for row in self.rows.values() for column in row), *run]))

    @property
    def title(self) -> str:
        number = re.search(r"table(\d+)", self.folder)
        words = f"Table {number[1]} of the paper" if number else self.folder
        return words if number and number[0] == self.folder else f"{words} ({self.folder})"

    def key(self, column: str, kind: str) -> str | None:
        """The name of the figure of this kind that the paper prints in a column."""
        names = dict.fromkeys(name for row in self.rows.values() for name in row.get(column, {}))
        return next((name for name in names if kind_of(name) == kind), None)


def kind_of(figure: str) -> str:
    return _KINDS.get(figure, "score")


def ours(record: Record, figure: str) -> float | None:
    """Our figure under the name of the printed one."""
    if figure == MEMORY:
        peak = record["memory"].get("peak_allocated_bytes") or record["memory"].get("peak_estimated_bytes")
        return peak / 1e9 if peak is not None else None
    return record["speed"].get(SPEED) if figure == SPEED else record.scores.get(figure)


def ours_of(figure: str) -> Figure:
    return lambda record: ours(record, figure)


def best_of(score: str) -> Figure:
    """The score at the best evaluation of the run."""
    return lambda record: record["metrics"].get("best", {}).get(score)


def printed_tables(records: Iterable[Record], shipped: Rows | None = None) -> list[Printed]:
    """The paper's tables that these records have rows of. `shipped`: what is printed by folder and row, also of rows not run."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.table:
            folder = str(record.experiment.get("name")).rpartition("/")[0] or record.table
            found.setdefault((folder, record.level or "own setting"), []).append(record)
    tables = []
    for (folder, level), group in found.items():
        rows = _printed_rows(group, (shipped_rows() if shipped is None else shipped).get(folder, {}), level)
        ordered = sorted(rows, key=lambda row: row != "full")
        entries = [entry for row in ordered for entry in _entries(row, [r for r in group if r.row == row])]
        tables.append(Printed(folder, level, {row: rows[row] for row in ordered}, entries))
    return sorted(tables, key=lambda table: (natural(table.folder), table.level != PUBLISHED, table.level))


def _printed_rows(group: Sequence[Record], shipped: Mapping[str, Row], level: str) -> dict[str, Row]:
    """As published: the whole table. At another level: the rows and columns of which something was run."""
    rows: dict[str, Row] = dict(shipped)
    for record in group:
        rows[record.row] = {**rows.get(record.row, {}), **record.printed}
    if level == PUBLISHED:
        return rows
    run, columns = {record.row for record in group}, {record.column for record in group}
    return {
        name: {column: figures for column, figures in row.items() if column in columns}
        for name, row in rows.items() if name in run
    }  # fmt: skip


def _entries(row: str, records: list[Record]) -> list[Entry]:
    """One entry, or one for each value of the keys that differ within a column of the row."""
    by_column: dict[str, list[Record]] = {}
    for record in records:
        by_column.setdefault(record.column, []).append(record)
    by_label: dict[str, dict[str, list[Record]]] = {}
    for column, runs in by_column.items():
        keys, found = points(runs)
        for point in found:
            said = point.label(keys).partition(", ")[2]
            by_label.setdefault(f"{row}, {said}" if said else row, {})[column] = list(point.records)
    return [Entry(row, label, runs) for label, runs in by_label.items()] or [Entry(row, row)]


def paper_tables(records: list[Record], shipped: Rows | None = None) -> list[Table]:
    """For each table and level: its scores, its memory and its speed, as far as the paper prints them."""
    return [
        _table(table, kind)
        for table in printed_tables(records, shipped)
        for kind in _UNITS
        if any(table.key(column, kind) for column in table.columns)
    ]


def _table(table: Printed, kind: str) -> Table:
    columns = [column for column in table.columns if table.key(column, kind)]
    averaged = kind == "score" and len(columns) > 1 and _are_fractions(table, columns)
    head = ["row", "", *_column_names(columns), *(["mean"] if averaged else [])]
    result = Table(f"{table.title}, {kind}, {table.level}", head, [], _about(table, columns, kind), Notes())
    for row, entries in _by_row(table.entries).items():
        result.rules.add(len(result.rows))
        printed = [table.rows[row].get(column, {}).get(table.key(column, kind) or "") for column in columns]
        _add(result, [Cell(row), Cell("paper")], printed, averaged)
        for entry in entries:
            _add_entry(result, table, entry, columns, kind, printed, averaged)
    result.rules.discard(0)
    result.remarks += _how_measured(table.entries, columns, kind)
    if kind == "score":
        result.remarks += _tests(table, columns)
    return result


def _add_entry(
    result: Table,
    table: Printed,
    entry: Entry,
    columns: list[str],
    kind: str,
    printed: list[float | None],
    averaged: bool,
) -> None:
    """The lines of one entry: ours, the best epoch where it is another, and the difference where it means something."""
    figures = [table.key(column, kind) or "" for column in columns]
    found = [spread(entry.done(c), ours_of(k)) for c, k in zip(columns, figures, strict=True)]
    shown = [_cell(result.notes, entry.runs.get(c, []), f, kind) for c, f in zip(columns, found, strict=True)]
    name = "ours" if entry.label == entry.row else f"ours ({entry.label.partition(', ')[2]})"
    command = "\n\n".join("\n".join([column, *made_of(runs)]) for column, runs in entry.runs.items())
    means = [f.mean if f else None for f in found]
    result.rows.append([Cell(entry.row), Cell(name), *shown, *([_mean_cell(means)] if averaged else [])])
    result.details += [""] * (len(result.rows) - 1 - len(result.details)) + [command]
    best = [spread(entry.done(c), best_of(k)) for c, k in zip(columns, figures, strict=True)]
    if kind == "score" and any(b and f and abs(b.mean - f.mean) > 1e-9 for b, f in zip(best, found, strict=True)):
        texts = [Cell(str(b), value=b.mean) if b else Cell("-") for b in best]
        best_mean = [_mean_cell([b.mean if b else None for b in best])] if averaged else []
        result.rows.append([Cell(entry.row), Cell(f"{name}, best evaluation"), *texts, *best_mean])
    if table.level == PUBLISHED and any(m is not None and p is not None for m, p in zip(means, printed, strict=True)):
        differences = [m - p if m is not None and p is not None else None for m, p in zip(means, printed, strict=True)]
        _add(result, [Cell(entry.row), Cell(f"{name} - paper")], differences, averaged, signed=True)


def _add(result: Table, start: list[Cell], values: list[float | None], averaged: bool, signed: bool = False) -> None:
    def cell(value: float | None) -> Cell:
        return Cell(f"{value:+.3g}" if signed and value is not None else human_number(value), value=value)

    result.rows.append([*start, *map(cell, values), *([_mean_cell(values, signed)] if averaged else [])])


def _mean_cell(values: Sequence[float | None], signed: bool = False) -> Cell:
    """The mean of all columns; a mean of some of them would be another quantity."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Cell("-")
    return Cell(f"{mean(known):+.3g}" if signed else human_number(float(mean(known))), value=mean(known))


def _cell(marks: Notes, runs: list[Record], found: Spread | None, kind: str) -> Cell:
    said = [record.outcome for record in runs if record["status"] != "ok"]
    done = [record for record in runs if record["status"] == "ok"]
    if found and kind == "memory" and any(record["memory"].get("peak_allocated_bytes") is None for record in done):
        said.append(ESTIMATED)
    said += dict.fromkeys(
        f"with {word}"
        for r in done
        for word in re.findall(r"trainer\.micro_batch_size=\S+", r.command)
        if kind != "score"
    )
    if found:
        return Cell(str(found), marks.marks(said), found.mean)
    if done:
        return Cell("-", marks.marks([*said, NO_FIGURE]))
    states = ", ".join(dict.fromkeys(record.status for record in runs))
    return Cell(states or "-", marks.marks(said or [NOT_RUN]))


def _about(table: Printed, columns: list[str], kind: str) -> list[str]:
    said = [_UNITS[kind]]
    if kind == "score":
        keys = {column: table.key(column, kind) for column in columns}
        names = _column_names(columns)
        if len(set(keys.values())) == 1:
            said.append(f"Score: {keys[columns[0]]}.")
        else:
            said.append("Score: " + ", ".join(f"{n} {k}" for n, k in zip(names, keys.values(), strict=True)) + ".")
    said.append("n: seeds, where there are several; ± is their sample standard deviation.")
    if table.level != PUBLISHED:
        said.append(
            f"Level: {table.level}. This is not the published setting, so no difference to the paper is taken. "
            "Rows and columns of the paper that were not run at this level are left out."
        )
    return said


def _how_measured(entries: Iterable[Entry], columns: list[str], kind: str) -> list[str]:
    """Device, steps and commit of each entry; columns that share them are named together."""
    names = dict(zip(columns, _column_names(columns), strict=True))
    said = []
    for entry in entries:
        found: dict[str, list[str]] = {}
        for column in columns:
            for record in entry.done(column):
                found.setdefault(_measured(record), []).append(names[column])
        for how, where in found.items():
            places = "all columns" if set(where) == set(names.values()) else ", ".join(dict.fromkeys(where))
            said.append(f"{entry.label} ({places}): {how}")
    return said


def _measured(record: Record) -> str:
    steps = f"{record.steps:,} steps" if record.steps is not None else "steps not recorded"
    commit = record["git"].get("commit")
    dirty = ", with uncommitted changes" if record["git"].get("dirty") else ""
    return f"{record['device'] or 'device not recorded'}, {steps}" + (f", commit {commit[:9]}{dirty}" if commit else "")


def _tests(table: Printed, columns: list[str]) -> list[str]:
    """Each row against `full`: over seeds in each column, and over the columns' means."""
    against = next((entry for entry in table.entries if entry.row == "full" and entry.runs), None)
    if against is None:
        return []
    names, said = dict(zip(columns, _column_names(columns), strict=True)), []
    for entry in table.entries:
        if entry is against:
            continue
        pairs = []
        for column in columns:
            key = table.key(column, "score") or ""
            found = paired(against.done(column), entry.done(column), ours_of(key))
            if found and found.num_pairs > 1:
                said.append(f"{entry.label} less {against.label}, {names[column]}, at the same seeds: {found}")
            a, b = (spread(side.done(column), ours_of(key)) for side in (against, entry))
            pairs += [(a.mean, b.mean)] if a and b else []
        over = paired_values(pairs)
        if over and over.num_pairs > 1:
            said.append(f"{entry.label} less {against.label}, over columns, each with its mean over seeds: {over}")
    return said


def _by_row(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.row, []).append(entry)
    return found


def _are_fractions(table: Printed, columns: list[str]) -> bool:
    figures = [row.get(c, {}).get(table.key(c, "score") or "") for row in table.rows.values() for c in columns]
    return all(abs(figure) <= 1 for figure in figures if figure is not None)


def _column_names(columns: Sequence[str]) -> list[str]:
    """Columns without what all of them share: the suite ("glue/"), or the one task of several models."""
    for separator in ("/", " "):
        starts = {column.partition(separator)[0] for column in columns}
        if len(columns) > 1 and len(starts) == 1 and all(separator in column for column in columns):
            return [column.partition(separator)[2] for column in columns]
    return list(columns)
