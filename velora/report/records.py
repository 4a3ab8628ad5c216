"""Reading records back: one per run folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from velora.run.files import why
from velora.run.schema import read_metrics, read_result


@dataclass(frozen=True)
class Record:
    """One result.json (`velora.run.schema.Result`, as a dictionary), where it lies, and its metrics.jsonl."""

    folder: Path
    values: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    @property
    def scores(self) -> dict[str, float]:
        """The final scores; those of earlier phases and of the best epoch are left out."""
        return {k: v for k, v in self["metrics"].items() if not isinstance(v, dict)}

    @property
    def paper(self) -> dict[str, float]:
        """The figures that the paper prints for this run, if its experiment names any."""
        printed = (self["config"].get("experiment") or {}).get("paper") or {}
        return printed.get(f"{self['task']} {self['model']}") or printed.get(self["task"]) or {}

    @property
    def note(self) -> str | None:
        """What the reader of this record should know, if its experiment says anything: its name, and its own words."""
        stated = self["config"].get("experiment") or {}
        note = stated.get("note")
        return f"{stated.get('name')}: {' '.join(note.split())}" if isinstance(note, str) else None

    @property
    def group(self) -> str | None:
        """The group of tasks that the task of this run belongs to, if any."""
        return (self["config"].get("task") or {}).get("group")

    @property
    def label(self) -> str:
        """The method, and what the name of the run says beyond task, model and method (a swept value)."""
        method, last = self["method"], self["name"].rpartition("/")[2]
        _, _, rest = self["name"].partition(f"-{method}")
        if last.startswith(f"{method}-"):  # named by hand: demo/velora_all-lean
            rest = last.removeprefix(method)
        return self["method"] + (f" ({rest.strip('-')})" if rest.strip("-") else "")

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one key of metrics.jsonl in the last phase."""
        lines = [x for x in self.lines if x["phase"] == self.lines[-1]["phase"] and x.get(key) is not None]
        return [line["step"] for line in lines], [line[key] for line in lines]


@dataclass(frozen=True)
class Fault:
    """A file that is not, or not wholly, what a run writes, and what that costs the report."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path} {self.reason}"


def read_records(folder: Path) -> tuple[list[Record], list[Fault]]:
    """All records below a folder in the order of their paths, and what is wrong with other files found there.

    A result.json that is no record is left out. A metrics.jsonl costs no figure of the tables: what is no line of ours is
    missing in the curve.
    """
    records, faults = [], []
    found = [
        Path(place, "result.json") for place, folders, files in os.walk(folder) if "result.json" in folders + files
    ]
    for path in sorted(found):  # folders and dangling links of this name too: they are named, not passed over
        try:
            values = read_result(path).model_dump()
        except ValueError as error:
            faults.append(Fault(path, f"is no record of velora-train ({error}); it is left out"))
            continue
        lines, reason = _metrics(path.parent / "metrics.jsonl")
        if reason and values["status"] == "ok":  # no curve is drawn of another one
            faults.append(Fault(path.parent / "metrics.jsonl", reason))
        records.append(Record(path.parent, values, lines))
    return records, faults


def _metrics(file: Path) -> tuple[list[dict[str, Any]], str | None]:
    try:
        lines, problems = read_metrics(file)
    except OSError as error:
        return [], f"cannot be read ({why(error)}); the run is reported without its curve"
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        return lines, f"has lines that are none of velora-train ({problems[0]}{more}); its curve is drawn without them"
    return lines, None if lines else "is empty; the run is reported without its curve"
