"""One table for each task, model and level: a row for each method and value that differs, seeds taken together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from velora.report.commands import made_of
from velora.report.differences import Point, groups, headings, points, shown
from velora.report.formats import markdown, markdown_tables
from velora.report.paper_tables import paper_tables
from velora.report.records import Record
from velora.report.seeds import paired, score, spread
from velora.report.table import Cell, Notes, Table, cells
from velora.report.text import for_markdown, human_bytes, human_number

__all__ = ["markdown", "notes", "run_tables", "tables"]

_MEMORY = {
    "saved_for_backward_bytes": "saved for backward",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimiser",
    "weights_bytes": "weights",
    "peak_allocated_bytes": "peak allocated",
    "peak_reserved_bytes": "peak reserved",
    "peak_estimated_bytes": "peak estimated",
}
PRINTED = " (paper)"
NO_REFERENCE = "no full training ran on this device, so its speed is no ratio"

Escape = Callable[[str], str]


def tables(records: list[Record], escape: Escape = for_markdown) -> str:
    """All tables of a report as Markdown; `escape` makes foreign text fit for where they go."""
    return markdown_tables(paper_tables(records) + run_tables(records), escape)


def notes(records: list[Record], escape: Escape = for_markdown) -> str:
    """What the experiments of these records say about themselves, one paragraph each; empty where they say nothing."""
    return "".join(f"{escape(note)}\n" for note in said_by_experiments(records))


def said_by_experiments(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(r.note for r in records if r.note and r["status"] == "ok"))


def run_tables(records: list[Record]) -> list[Table]:
    found = [_table(title, group) for title, group in groups(records).items()]
    vtab = _vtab_means([record for record in records if record["status"] == "ok"])
    return found + ([vtab] if vtab else [])


def speed_key(records: Iterable[Record]) -> str | None:
    speeds = [record["speed"] for record in records]
    return next((k for k in ("tokens_per_second", "images_per_second") if any(s.get(k) for s in speeds)), None)


def _table(title: str, group: list[Record]) -> Table:
    keys, rows = points(group)
    marks = Notes()
    columns = _columns([record for record in group if record["status"] == "ok"], marks)
    table = Table(title, ["method", *headings(keys), "seeds", *(name for name, _ in columns)], [], notes=marks)
    for point in rows:
        unfinished = marks.marks(record.outcome for record in point.records if record["status"] != "ok")
        values = [Cell(shown(value) if value is not None else "-", value=_number(value)) for value in point.values]
        seeds = Cell(_seeds(point), unfinished if point.done else ())
        row = [Cell(point.method), *values, seeds]
        if point.done:
            row += [figure(point.done) for _, figure in columns]
        else:
            states = ", ".join(dict.fromkeys(record.status for record in point.records))
            row[-1] = Cell(states, unfinished)
            row += [figure(list(point.records)) if name.endswith(PRINTED) else Cell("-") for name, figure in columns]
        table.rows.append(row)
        table.details.append("\n".join(made_of(point.records)))
    table.about += _measured(group)
    table.remarks += _tests(keys, rows, columns)
    return table


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _seeds(point: Point) -> str:
    seeds = {record["seed"] for record in point.done}
    again = f" ({len(point.done)} runs)" if len(point.done) > len(seeds) else ""
    return f"{len(seeds)}{again}"


Column = tuple[str, Callable[[list[Record]], Cell]]


def _columns(done: list[Record], marks: Notes) -> list[Column]:
    """The figures of a table, each with what makes a cell of the runs of one row."""
    if not done:
        return []
    scores = list(dict.fromkeys(key for record in done for key in record.scores))
    memory = {k: name for k, name in _MEMORY.items() if any(r["memory"].get(k) is not None for r in done)}
    columns: list[Column] = [(key, _score(key)) for key in scores]
    columns += [(f"{key}{PRINTED}", _printed(key)) for key in sorted({k for r in done if not r.table for k in r.paper})]
    columns += [(name, _bytes(key)) for key, name in memory.items()]
    columns.append(("trainable parameters", lambda runs: Cell(human_number(runs[0]["parameters"]["trainable"]))))
    if key := speed_key(done):
        full = [record for record in done if record["method"] == "full" and record["speed"].get(key)]
        reference = {
            device: _mean(r["speed"][key] for r in full if r["device"] == device)
            for device in {r["device"] for r in full}
        }
        columns.append(
            (key.removesuffix("_per_second") + "/s" + (", full = 1" if full else ""), _speed(key, reference, marks))
        )
    several = len({(record["device"], record.steps) for record in done}) > 1
    if several:
        columns.append(("steps", lambda runs: Cell(_listed(record.steps for record in runs))))
        columns.append(("device", lambda runs: Cell(_listed(record["device"] for record in runs))))
    return columns


def _score(key: str) -> Callable[[list[Record]], Cell]:
    def cell(runs: list[Record]) -> Cell:
        found = spread(runs, score(key))
        if not found:
            return Cell("-")
        all_seeds = found.num_seeds == len(
            {record["seed"] for record in runs}
        )  # their number stands in the row already
        return Cell(str(found).partition(", n=")[0] if all_seeds else str(found), value=found.mean)

    return cell


def _printed(key: str) -> Callable[[list[Record]], Cell]:
    return lambda runs: Cell(human_number(runs[0].paper.get(key)), value=runs[0].paper.get(key))


def _bytes(key: str) -> Callable[[list[Record]], Cell]:
    def cell(runs: list[Record]) -> Cell:
        value = _mean(record["memory"].get(key) for record in runs)
        return Cell(human_bytes(value), value=value)

    return cell


def _speed(key: str, reference: Mapping[str | None, float | None], marks: Notes) -> Callable[[list[Record]], Cell]:
    """Relative to full training on the same device, where there is any; speeds of two devices are no ratio."""

    def cell(runs: list[Record]) -> Cell:
        value = _mean(record["speed"].get(key) for record in runs)
        of_full = {reference.get(record["device"]) for record in runs}
        if not value or not reference:
            return Cell(human_number(value), value=value)
        base = of_full.pop() if len(of_full) == 1 else None
        if not base:
            return Cell("-", (marks.mark(f"{NO_REFERENCE} ({_listed(record['device'] for record in runs)})"),))
        return Cell(f"{value / base:.2f}", value=value / base)

    return cell


def _measured(group: list[Record]) -> list[str]:
    """How the figures came about, where it is the same for all rows; otherwise the rows say it."""
    done = [record for record in group if record["status"] == "ok"]
    if not done or len({(record["device"], record.steps) for record in done}) > 1:
        return []
    steps = f"{done[0].steps:,} steps" if done[0].steps is not None else "steps not recorded"
    return [f"All on {done[0]['device'] or 'a device that was not recorded'}, {steps}."]


def _tests(keys: Sequence[str], rows: Sequence[Point], columns: Sequence[Column]) -> list[str]:
    """Each method against the first one (full training where it is there) over the seeds that both have."""
    done = [point for point in rows if point.done]
    against = next((point for point in done if point.method == "full"), done[0] if done else None)
    if against is None or max(len({r["seed"] for r in point.done}) for point in done) < 2:
        return []
    said = []
    scores = dict.fromkeys(key for record in against.done for key in record.scores)
    for key in scores:
        for point in done:
            found = paired(against.done, point.done, score(key))
            if point is not against and found and found.num_pairs > 1:
                said.append(f"{key}, {point.label(keys)} less {against.label(keys)}, at the same seeds: {found}")
    return said


def _vtab_means(records: list[Record]) -> Table | None:
    """VTAB-1k: the mean of each task group and the mean of all tasks, for each model, level and method."""
    vtab = [r for r in records if r["task"].startswith("vtab/") and r.scores.get("accuracy") is not None]
    if len({r["task"] for r in vtab}) < 2:
        return None
    table = Table("VTAB-1k", ["model", "method", "tasks", "natural", "specialized", "structured", "mean of tasks"], [])
    by_row: dict[tuple[str, str, str], list[Record]] = {}
    for record in vtab:
        by_row.setdefault((record["model"], record.label, record.level or ""), []).append(record)
    levels = {level for _, _, level in by_row}
    if len(levels) > 1:
        table.head = ["level", *table.head]
    for (model, label, level), runs in by_row.items():
        of_task: dict[str, list[Record]] = {}
        for record in runs:
            of_task.setdefault(record["task"], []).append(record)
        by_task = {task: mean(r.scores["accuracy"] for r in several) for task, several in of_task.items()}
        means = []
        for name in ("natural", "specialized", "structured"):
            values = [value for task, value in by_task.items() if of_task[task][0].group == name]
            means.append(human_number(mean(values) if values else None))
        row = [model, label, str(len(by_task)), *means, human_number(mean(by_task.values()))]
        table.rows.append(cells([level or "own runs", *row] if len(levels) > 1 else row))
    return table


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys("-" if value is None else str(value) for value in values))
