"""How the paper's tables look: for each row the printed figure, ours, and the difference, in the paper's columns.

Where the level is not "as published" the printed figures are those of another setting, and no difference is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from statistics import mean

from velora.report.commands import made_of
from velora.report.paper import Column, Entry, Printed, best_of, ours_of, printed_tables
from velora.report.printed import Rows
from velora.report.records import PUBLISHED, Record
from velora.report.seeds import Spread, paired, paired_values, spread
from velora.report.table import Cell, Notes, Table
from velora.report.text import human_number

_UNITS = {
    "score": "Scores are fractions where the paper prints per cent. Ours are those of the last step.",
    "accounting": "GiB, which the paper calls GB: weights and inputs of trained layers added up, ours by the same rule.",
    "memory": "GB, 10^9 bytes. Ours: the peak that CUDA's allocator reports.",
    "speed": "Steps per second.",
}
NOT_RUN = "not run: there is no record of it"
NO_FIGURE = "run, but this figure was not measured there (a memory peak needs a CUDA device)"
ESTIMATED = "estimated for a CUDA device without one, not measured"


def paper_tables(records: list[Record], shipped: Rows | None = None) -> list[Table]:
    """For each table and level: its scores, its memory and its speed, as far as the paper prints them."""
    return [
        _table(table, kind, columns)
        for table in printed_tables(records, shipped)
        for kind in table.kinds
        if (columns := table.columns(kind))
    ]


def _table(table: Printed, kind: str, columns: list[Column]) -> Table:
    averaged = kind == "score" and len(columns) > 1 and _are_fractions(table, columns)
    head = ["row", "", *_column_names(columns), *(["mean"] if averaged else [])]
    result = Table(f"{table.title}, {kind}, {table.level}", head, [], _about(table, columns, kind), Notes())
    for row, entries in _by_row(table.entries).items():
        result.rules.add(len(result.rows))
        printed = [table.printed(row, column) for column in columns]
        if any(value is not None for value in printed):
            _add(result, [Cell(row), Cell("paper")], printed, averaged)
        for entry in entries:
            _add_entry(result, table, entry, columns, kind, printed, averaged)
    result.rules.discard(0)
    result.remarks += _how_measured(table.entries, columns)
    if kind == "score":
        result.remarks += [*_searches(table, columns), *_tests(table, columns)]
    return result


def _add_entry(
    result: Table,
    table: Printed,
    entry: Entry,
    columns: list[Column],
    kind: str,
    printed: list[float | None],
    averaged: bool,
) -> None:
    """The lines of one entry: ours, the best epoch where it is another, and the difference where it means something."""
    found = [spread(entry.done(c.place), ours_of(c.figure)) for c in columns]
    shown = [_cell(result.notes, entry.runs.get(c.place, []), f, kind) for c, f in zip(columns, found, strict=True)]
    name = "ours" if entry.label == entry.row else f"ours ({entry.label.partition(', ')[2]})"
    command = "\n\n".join("\n".join([place, *made_of(runs)]) for place, runs in entry.runs.items())
    means = [f.mean if f else None for f in found]
    result.rows.append([Cell(entry.row), Cell(name), *shown, *([_mean_cell(means)] if averaged else [])])
    result.details += [""] * (len(result.rows) - 1 - len(result.details)) + [command]
    best = [spread(entry.done(c.place), best_of(c.figure)) for c in columns]
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
        for word in re.findall(r"trainer\.micro_batch_size=\d+", r.command)
        if kind != "score"
    )
    if found:
        return Cell(str(found), marks.marks(said), found.mean)
    if done:
        return Cell("-", marks.marks([*said, NO_FIGURE]))
    states = ", ".join(dict.fromkeys(record.status for record in runs))
    return Cell(states or "-", marks.marks(said or [NOT_RUN]))


def _about(table: Printed, columns: list[Column], kind: str) -> list[str]:
    said = [_UNITS[kind]]
    if kind == "score":
        if len({column.figure for column in columns}) == 1:
            said.append(f"Score: {columns[0].figure}.")
        elif len({column.place for column in columns}) == len(columns):
            scores = zip(_column_names(columns), (column.figure for column in columns), strict=True)
            said.append("Score: " + ", ".join(f"{name} {figure}" for name, figure in scores) + ".")
    if any(len({r["seed"] for r in entry.done(c.place)}) > 1 for entry in table.entries for c in columns):
        said.append("n: seeds, where there are several; ± is their sample standard deviation.")
    if table.level != PUBLISHED:
        said.append(
            f"Level: {table.level}. This is not the published setting, so no difference to the paper is taken. "
            "Rows and columns of the paper that were not run at this level are left out."
        )
    return [*said, *([" ".join(table.about.split())] if table.about else [])]


def _how_measured(entries: Iterable[Entry], columns: list[Column]) -> list[str]:
    """Device, steps and commit of each entry; places that share them are named together."""
    names = _place_names(columns)
    said: dict[str, dict[str, list[str]]] = {}
    for entry in entries:
        for place, name in names.items():
            for record in entry.done(place):
                said.setdefault(_measured(record), {}).setdefault(entry.label, []).append(name)
    return [f"{_listed(where, set(names.values()))}: {how}" for how, where in said.items()]


def _listed(where: dict[str, list[str]], everywhere: set[str]) -> str:
    """Entries and the places of each; those that have all places are named together."""
    whole = [label for label, names in where.items() if set(names) == everywhere]
    parts = [f"{', '.join(whole)} (all columns)"] if whole else []
    parts += [f"{label} ({', '.join(dict.fromkeys(names))})" for label, names in where.items() if label not in whole]
    return "; ".join(parts)


def _searches(table: Printed, columns: list[Column]) -> list[str]:
    names = _place_names(columns)
    return [
        f"{entry.label}, {names[place]}: {what}" for entry in table.entries for place, what in entry.searched.items()
    ]


def _measured(record: Record) -> str:
    steps = f", {record.steps:,} steps" if record.steps is not None else ", steps not recorded"
    if record.level == "memory":  # nothing was trained
        steps = ""
    commit = record["git"].get("commit")
    dirty = ", with uncommitted changes" if record["git"].get("dirty") else ""
    return f"{record['device'] or 'device not recorded'}{steps}" + (f", commit {commit[:9]}{dirty}" if commit else "")


def _tests(table: Printed, columns: list[Column]) -> list[str]:
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
            figure = ours_of(column.figure)
            found = paired(against.done(column.place), entry.done(column.place), figure)
            if found and found.num_pairs > 1:
                said.append(f"{entry.label} less {against.label}, {names[column]}, at the same seeds: {found}")
            a, b = (spread(side.done(column.place), figure) for side in (against, entry))
            pairs += [(a.mean, b.mean)] if a and b else []
        over = paired_values(pairs) if len({column.place for column in columns}) == len(columns) else None
        if over and over.num_pairs > 1:
            said.append(f"{entry.label} less {against.label}, over columns, each with its mean over seeds: {over}")
    return said


def _by_row(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.row, []).append(entry)
    return found


def _are_fractions(table: Printed, columns: list[Column]) -> bool:
    """Whether a mean over these columns means something: scores between 0 and 1, each place once."""
    figures = [table.printed(row, column) for row in table.rows for column in columns]
    once = len({column.place for column in columns}) == len(columns)
    return once and all(abs(figure) <= 1 for figure in figures if figure is not None)


def _column_names(columns: Sequence[Column]) -> list[str]:
    """The place, and the figure where a place has several; alone, the figure where all share the place."""
    places = _place_names(columns)
    several = len({column.place for column in columns}) < len(columns)
    alone = len(places) == 1 and len(columns) > 1
    return [c.figure if alone else f"{places[c.place]} {c.figure}" if several else places[c.place] for c in columns]


def _place_names(columns: Sequence[Column]) -> dict[str, str]:
    """Places without what all of them share: the suite ("glue/"), or the one task of several models."""
    places = list(dict.fromkeys(column.place for column in columns))
    for separator in ("/", " "):
        starts = {place.partition(separator)[0] for place in places}
        if len(places) > 1 and len(starts) == 1 and all(separator in place for place in places):
            return {place: place.partition(separator)[2] for place in places}
    return {place: place for place in places}
