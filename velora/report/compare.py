"""Two runs side by side: what differs in their configuration, and what differs in their figures.

A side is one run folder, or a folder with several seeds of one configuration: its figures are then means, and they are
compared over the seeds that both sides have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from velora.errors import ConfigError
from velora.report.differences import everything, flat, shown
from velora.report.records import Record, read_records
from velora.report.seeds import Figure, Spread, measured, paired, score, spread
from velora.report.table import Cell, Notes, Table, cells
from velora.report.text import human_bytes, human_number

_SKIPPED = {"name", "runs_dir", "seed"}


@dataclass(frozen=True)
class Side:
    """The runs of one configuration."""

    place: Path
    records: list[Record]

    @property
    def seeds(self) -> str:
        return ", ".join(str(seed) for seed in sorted({record["seed"] for record in self.records}))


def side(place: Path, other: Path) -> Side:
    """The runs below a folder (or of one result.json); ConfigError where there is none, or where they are not one configuration."""
    records, faults = read_records(place.parent if place.name == "result.json" else place)
    given = f"--compare {place} {other}"
    if not records:
        reason = f" ({faults[0]})" if faults else ""
        raise ConfigError(
            f"{given}: no readable result.json below {place}{reason}; give the folder of a run, runs/<name>/seed<k>"
        )
    first = flat(records[0])
    if odd := next((record for record in records if flat(record) != first), None):
        keys = sorted(key for key in {*first, *flat(odd)} if first.get(key) != flat(odd).get(key))
        raise ConfigError(
            f"{given}: {place} holds {len(records)} runs that are not seeds of one configuration ({records[0].folder} and "
            f"{odd.folder} differ in {', '.join(keys[:3])}); give the folder of one run"
        )
    return Side(place, records)


def compare(a: Path, b: Path) -> Table:
    """The table of all differences; ConfigError where a side is no run."""
    left, right = side(a, b), side(b, a)
    table = Table(
        "Two runs side by side",
        ["", "A", "B", "B - A"],
        [],
        [f"A: {a} (seed {left.seeds})", f"B: {b} (seed {right.seeds})"],
    )
    same_keys = _add_facts(table, left, right)
    table.rules.add(len(table.rows))
    same_figures = _add_figures(table, left, right)
    table.remarks.append(
        f"The same in both, and not shown: {same_keys} keys of the configuration, {same_figures} figures."
    )
    return table


def _add_facts(table: Table, a: Side, b: Side) -> int:
    """What was set, where and with what; returns how many keys are the same."""
    left, right = _facts(a.records[0]), _facts(b.records[0])
    keys = [key for key in {**left, **right} if key not in _SKIPPED]
    differ = [key for key in keys if left.get(key) != right.get(key)]
    for key in differ:
        table.rows.append(cells([key, *(shown(side[key]) if key in side else "-" for side in (left, right)), ""]))
    return len(keys) - len(differ)


def _facts(record: Record) -> dict[str, object]:
    facts: dict[str, object] = {"status": record.status, **everything(record)}
    facts |= {"device": record["device"], "commit": record["git"].get("commit"), "level": record.level}
    return facts | {f"version of {name}": version for name, version in record["versions"].items()}


def _add_figures(table: Table, a: Side, b: Side) -> int:
    same = 0
    for name, figure, text in _figures([*a.records, *b.records]):
        left, right = spread(_done(a), figure), spread(_done(b), figure)
        if left == right or (left and right and left.num_seeds != right.num_seeds and not _differ(left, right)):
            same += left is not None
            continue
        both = (
            Cell(_both(found.mean, found.deviation, text), value=found.mean) if found else Cell("-")
            for found in (left, right)
        )
        row = [Cell(name), *both]
        if left and right:
            row.append(_difference(table.notes, left.mean, right.mean, text))
            found = paired(_done(a), _done(b), figure)
            if found and found.num_pairs > 1 and text is human_number:  # bytes and counts are no samples
                table.remarks.append(f"{name}, B - A at the same seeds: {found}")
        else:
            row.append(Cell(""))
        table.rows.append(row)
    return same


def _differ(a: Spread, b: Spread) -> bool:
    """Whether something differs but the number of seeds."""
    return a.mean != b.mean or bool(a.deviation) or bool(b.deviation)


def _done(some: Side) -> list[Record]:
    return [record for record in some.records if record["status"] == "ok"]


Text = Callable[[float], str]


def _both(mean: float, deviation: float | None, text: Text) -> str:
    return text(mean) + (f" ± {text(deviation)}" if deviation else "")


def _difference(notes: Notes, a: float, b: float, text: Text) -> Cell:
    sign = "-" if b < a else "+"
    ratio = f" ({b / a:.3g} x)" if a > 0 and b >= 0 else ""
    return Cell(sign + text(abs(b - a)) + ratio, value=b - a)


def _figures(records: list[Record]) -> list[tuple[str, Figure, Text]]:
    """Every figure that one of the records has, under its name in result.json."""
    found: list[tuple[str, Figure, Text]] = []
    for key in dict.fromkeys(key for record in records for key in record.scores):
        found.append((key, score(key), human_number))
    for section in ("memory", "speed", "parameters"):
        text: Text = {"memory": human_bytes, "speed": human_number}.get(section, _number)
        for key in dict.fromkeys(key for record in records for key in record[section]):
            found.append((f"{section}.{key}", measured(section, key), text))
    return found


def _number(value: float) -> str:
    return human_number(int(value) if value == int(value) else value)
