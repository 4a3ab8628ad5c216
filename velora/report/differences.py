"""What differs between runs: the keys that deserve a column, and the order of their values.

Runs that differ in their seed alone, or in a key that changes nothing of what is computed (`velora.config.run.Incidental`),
are one point. A key of an axis (weights, adapter, optimizer, activations, recompute) whose value follows from the method has
no column: the method's name says it already.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from velora.report.records import Record

_NO_COLUMN = {"name", "seed", "method.name"}  # they stand elsewhere in each table
Value = str | int | float | bool | None


@dataclass(frozen=True)
class Point:
    """The runs of one method and of the same values of all keys that differ: its seeds, and what was run again."""

    method: str
    values: tuple[Value, ...]
    records: tuple[Record, ...]

    @property
    def done(self) -> list[Record]:
        return [record for record in self.records if record["status"] == "ok"]

    def label(self, keys: Sequence[str]) -> str:
        """The method, and the values that set it apart: "velora, sub_token_size 8"."""
        said = [f"{short(key)} {shown(v)}" for key, v in zip(keys, self.values, strict=True) if v is not None]
        return ", ".join([self.method, *said])


def groups(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each task, model and level under a title: what may stand in one table."""
    found: dict[str, list[Record]] = {}
    for record in records:
        level = f", {record.level}" if record.level else ""
        found.setdefault(f"{record['task']}, {record['model']}{level}", []).append(record)
    return found


def points(records: Sequence[Record]) -> tuple[list[str], list[Point]]:
    """The keys that differ, and the points in natural order: full training and then the methods as they come, numbers by size."""
    keys = differing(records)
    found: dict[tuple[str, tuple[Value, ...]], list[Record]] = {}
    for record in records:
        values = tuple(flat(record).get(key) for key in keys)
        found.setdefault((record["method"], values), []).append(record)
    methods = sorted(dict.fromkeys(record["method"] for record in records), key="full".__ne__)
    order = {method: place for place, method in enumerate(methods)}
    ordered = sorted(found, key=lambda point: (order[point[0]], [natural(value) for value in point[1]]))
    return keys, [Point(*point, tuple(found[point])) for point in ordered]


def differing(records: Sequence[Record]) -> list[str]:
    """Full names of the keys with at least two values, in the order of the configuration; a record that lacks a key has none."""
    axes = _axes()
    seen: dict[str, set[str]] = {}
    within: dict[tuple[str, str], set[str]] = {}
    for record in records:
        for key, value in flat(record).items():
            seen.setdefault(key, set()).add(repr(value))
            within.setdefault((key, record["method"]), set()).add(repr(value))
    methods = {record["method"] for record in records}

    def deserves(key: str) -> bool:
        if key.partition(".")[0] not in axes:
            return len(seen[key]) > 1
        return any(len(within.get((key, method), ())) > 1 for method in methods)

    return [key for key in seen if deserves(key)]


def flat(record: Record) -> dict[str, Value]:
    """The keys of a record's configuration that make it another run; lists as one text."""
    if "flat" not in record.cache:
        found = {key: value for key, value in _flatten(record["config"]) if key not in _NO_COLUMN and _counts(key)}
        record.cache["flat"] = found
    return record.cache["flat"]


def everything(record: Record) -> dict[str, Value]:
    """All keys of a record's configuration but what its experiment says about itself."""
    found = {key: value for key, value in _flatten(record["config"]) if key.partition(".")[0] != "experiment"}
    if found.get("task.group") is None:  # the schema of records adds it where a task has no such key
        found.pop("task.group", None)
    return found


def natural(value: Any) -> tuple[int, float, list[tuple[int, float, str]]]:
    """A sort key: nothing first, numbers by size, then texts with the numbers inside them by size (8, 16, 32; m8, m16)."""
    if value is None:
        return (0, 0.0, [])
    if isinstance(value, int | float):
        return (1, float(value), [])
    parts = re.findall(r"\d+|\D+", str(value))
    return (2, 0.0, [(0, float(part), "") if part.isdecimal() else (1, 0.0, part) for part in parts])


def shown(value: Any) -> str:
    """A value as it would be written after `key=`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def short(key: str) -> str:
    """A key without its group where the rest says enough."""
    group, _, rest = key.rpartition(".")
    return key if rest in ("kind", "name") or not group else rest


def headings(keys: Iterable[str]) -> list[str]:
    """Short names; the full name of those that would be the same."""
    names = {key: short(key) for key in keys}
    taken = list(names.values())
    return [key if taken.count(name) > 1 else name for key, name in names.items()]


def _flatten(config: dict[str, Any]) -> Iterable[tuple[str, Value]]:
    from velora.config.run import flatten

    for key, value in flatten(config).items():
        yield key, "[" + ",".join(shown(item) for item in value) + "]" if isinstance(value, list) else value


@cache
def _counts(key: str) -> bool:
    from velora.config.run import is_identity

    return not key.startswith("experiment.") and is_identity(key)


@cache
def _axes() -> frozenset[str]:
    from velora.config.run import AXES

    return frozenset(AXES)
