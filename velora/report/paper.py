"""The paper's tables with runs in their rows: what is printed, what was run, in which columns.

A table holds runs of one level only. A row or column that the paper prints and nothing was run for stays in the table as published,
marked. Of a row that was searched the best point counts: best by the score that its experiment names, with the first seed, as the
search itself has chosen it (velora/tables/run.py). How a table looks is in paper_tables.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from velora.config.level import TableAtLevel, is_score, judge_of, read_table
from velora.report.differences import Value, flat, natural, points, short, shown
from velora.report.printed import Row, Rows, shipped_rows
from velora.report.records import PUBLISHED, Record
from velora.report.seeds import Figure

MEMORY, SPEED = "memory_gb", "steps_per_second"
KINDS = ("score", "accounting", "memory", "speed")
_ACCOUNTING = {"accounting_gib": "accounting_bytes", "input_activations_gib": "input_activations_bytes"}
_AT_LEVEL = {"memory": ("accounting", "memory", "speed"), "small": ("score",)}


@dataclass(frozen=True)
class Column:
    """A figure in one place of a table: a task, or a task and a model."""

    place: str
    figure: str


@dataclass(frozen=True)
class Entry:
    """The runs of one row (and of one value of what differs within it), by place. `searched`: the points that were tried."""

    row: str
    label: str
    runs: Mapping[str, list[Record]] = field(default_factory=dict)
    searched: Mapping[str, str] = field(default_factory=dict)

    def done(self, place: str) -> list[Record]:
        return [record for record in self.runs.get(place, []) if record["status"] == "ok"]


@dataclass(frozen=True)
class Printed:
    """One table of the paper at one level: what is printed, and our entries in its rows."""

    folder: str
    level: str
    rows: Mapping[str, Row]
    entries: list[Entry]

    @property
    def places(self) -> list[str]:
        run = list(dict.fromkeys(place for entry in self.entries for place in entry.runs))
        printed = dict.fromkeys(place for row in self.rows.values() for place in row)
        return [
            *(place for place in printed if self.level == PUBLISHED or place in run),
            *(p for p in run if p not in printed),
        ]

    @property
    def title(self) -> str:
        number = re.search(r"table(\d+)", self.folder)
        words = f"Table {number[1]} of the paper" if number else self.folder
        return words if number and number[0] == self.folder else f"{words} ({self.folder})"

    @property
    def kinds(self) -> tuple[str, ...]:
        """What of the printed figures is measured at this level."""
        stated = self._at_level.figures if self._at_level else None
        return tuple(stated or _AT_LEVEL.get(self.level, KINDS))

    @property
    def about(self) -> str | None:
        """What the table's file says of this level."""
        return self._at_level.about if self._at_level else None

    @property
    def _at_level(self) -> TableAtLevel | None:
        from velora.config.compose import conf_dir

        table = read_table(self.folder, [conf_dir()])
        return table.at("paper" if self.level == PUBLISHED else self.level) if table else None

    def columns(self, kind: str) -> list[Column]:
        """The printed figures of a kind, place by place; a place of which nothing is printed has those of the others.

        At another level than the published one, only figures that some run has.
        """
        printed = {place: self._printed_at(place, kind) for place in self.places}
        figures = [
            name for row in self.rows.values() for found in row.values() for name in found if kind_of(name) == kind
        ]
        if kind == "score":
            judges = (record.experiment.get("judged_by") for record in self._runs())
            figures = [*(str(name) for name in judges if name), *figures]
        anywhere = dict.fromkeys(figures)
        columns = [Column(place, name) for place, names in printed.items() for name in names or anywhere]
        return columns if self.level == PUBLISHED else [column for column in columns if self._is_measured(column)]

    def _runs(self) -> Iterator[Record]:
        return (record for entry in self.entries for runs in entry.runs.values() for record in runs)

    def _is_measured(self, column: Column) -> bool:
        done = [record for entry in self.entries for record in entry.done(column.place)]
        return not done or any(ours(record, column.figure) is not None for record in done)

    def _printed_at(self, place: str, kind: str) -> list[str]:
        names = dict.fromkeys(name for row in self.rows.values() for name in row.get(place, {}))
        return [name for name in names if kind_of(name) == kind]

    def printed(self, row: str, column: Column) -> float | None:
        return self.rows[row].get(column.place, {}).get(column.figure)


def kind_of(figure: str) -> str:
    if figure in _ACCOUNTING:
        return "accounting"
    return "score" if is_score(figure) else "speed" if figure == SPEED else "memory"


def ours(record: Record, figure: str) -> float | None:
    """Our figure under the name of the printed one."""
    if figure in _ACCOUNTING:
        num_bytes = record["memory"].get(_ACCOUNTING[figure])
        return num_bytes / 2**30 if num_bytes is not None else None
    if figure == MEMORY:
        peak = record["memory"].get("peak_allocated_bytes") or record["memory"].get("peak_estimated_bytes")
        return peak / 1e9 if peak is not None else None
    return record["speed"].get(SPEED) if figure == SPEED else record.score(figure)


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
        known = (shipped_rows() if shipped is None else shipped).get(folder, {})
        places = {place for row in [*known.values(), *(record.printed for record in group)] for place in row}
        by_place: dict[str, list[Record]] = {}
        for record in group:
            by_place.setdefault(place_of(record, places), []).append(record)
        rows = _printed_rows(by_place, known, level)
        ordered = _in_order(rows, folder)
        entries = [entry for row in ordered for entry in _entries(row, _of_row(row, by_place))]
        tables.append(Printed(folder, level, {row: rows[row] for row in ordered}, entries))
    return sorted(tables, key=lambda table: (natural(table.folder), table.level != PUBLISHED, table.level))


def place_of(record: Record, places: Iterable[str]) -> str:
    """Where the record stands in a table that has these places: its task, or task and model where the table prints it so."""
    places, both = set(places), f"{record['task']} {record['model']}"
    with_models = any(" " in place for place in places)
    return both if both in places or (with_models and record["task"] not in places) else str(record["task"])


def _in_order(rows: Iterable[str], folder: str) -> list[str]:
    """As the table's file has them, then full training and the others as they come."""
    from velora.config.compose import conf_dir

    table = read_table(folder, [conf_dir()])
    stated = {row: number for number, row in enumerate(table.rows if table else [])}
    return sorted(rows, key=lambda row: (stated.get(row, len(stated)), row != "full"))


def _of_row(row: str, by_place: Mapping[str, list[Record]]) -> dict[str, list[Record]]:
    found = {place: [r for r in records if r.row == row] for place, records in by_place.items()}
    return {place: records for place, records in found.items() if records}


def _printed_rows(by_place: Mapping[str, list[Record]], shipped: Mapping[str, Row], level: str) -> dict[str, Row]:
    """As published: the whole table. At another level: the rows and places of which something was run."""
    rows: dict[str, Row] = dict(shipped)
    for records in by_place.values():
        for record in records:
            rows[record.row] = {**rows.get(record.row, {}), **record.printed}
    if level == PUBLISHED:
        return rows
    run = {record.row for records in by_place.values() for record in records}
    return {name: row for name, row in rows.items() if name in run}


def _entries(row: str, by_place: Mapping[str, list[Record]]) -> list[Entry]:
    """One entry, or one for each value of the keys that differ within a place of the row."""
    by_label: dict[str, dict[str, list[Record]]] = {}
    searched: dict[str, str] = {}
    for place, runs in by_place.items():
        runs, tried = chosen(runs)
        if tried:
            searched[place] = tried
        keys, found = points(runs)
        for point in found:
            said = "" if tried else point.label(keys).partition(", ")[2]
            by_label.setdefault(f"{row}, {said}" if said else row, {})[place] = list(point.records)
    return [Entry(row, label, runs, searched) for label, runs in by_label.items()] or [Entry(row, row)]


def chosen(runs: list[Record]) -> tuple[list[Record], str]:
    """The runs at the best point of a search, and a sentence on the points; all of them where nothing was searched."""
    keys = runs[0].experiment.get("searched") or []
    at: dict[tuple[Value, ...], list[Record]] = {}
    for record in runs:
        at.setdefault(tuple(flat(record).get(key) for key in keys), []).append(record)
    if len(at) < 2:
        return runs, ""
    judge = judge_of(runs[0].experiment, runs[0]["task"], runs[0]["model"])
    first_seed = min(record["seed"] for record in runs)
    ordered = sorted(at, key=lambda point: [natural(value) for value in point])
    by_runs = sorted(ordered, key=lambda point: -len(at[point]))  # of equal scores that which went on with other seeds
    scores = {
        point: record.scores[judge.score]
        for point in by_runs
        for record in at[point]
        if record["seed"] == first_seed and record["status"] == "ok" and record.scores.get(judge.score) is not None
    }
    if not scores:
        return runs, ""
    best = judge.best(scores, key=scores.__getitem__)
    said = [" and ".join(map(shown, point)) for point in ordered]
    edge = "; an edge of the grid" if len(keys) == 1 and ordered.index(best) in (0, len(ordered) - 1) else ""
    what = ", ".join(short(key) for key in keys)
    found = f"{what} {said[ordered.index(best)]}, the best of {', '.join(said)} by {judge.score} with seed {first_seed}{edge}"
    return at[best], found
