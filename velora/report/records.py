"""Reading records back: one per run folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REQUIRED = ("name", "status", "method", "model", "task", "seed", "metrics", "memory", "speed", "parameters", "config")


@dataclass(frozen=True)
class Record:
    """One result.json and where it lies."""

    folder: Path
    values: dict[str, Any]

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
    def label(self) -> str:
        """The method, and what the name of the run says beyond task, model and method (a swept value)."""
        _, _, rest = self["name"].partition(f"-{self['method']}")
        return self["method"] + (f" ({rest.strip('-')})" if rest.strip("-") else "")

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one key of metrics.jsonl in the last phase."""
        file = self.folder / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        lines = [line for line in lines if line["phase"] == lines[-1]["phase"] and line.get(key) is not None]
        return [line["step"] for line in lines], [line[key] for line in lines]


def read_records(folder: Path) -> tuple[list[Record], list[Path]]:
    """All records below a folder in the order of their paths, and the files that are none."""
    records, unreadable = [], []
    for path in sorted(folder.rglob("result.json")):
        try:
            values = json.loads(path.read_text())
            if not all(key in values for key in _REQUIRED):
                raise ValueError
        except ValueError:
            unreadable.append(path)
            continue
        records.append(Record(path.parent, values))
    return records, unreadable
