"""Two sentences over the runs of one task and model: what is kept at which speed, and what that costs in learning.

Everything in them is read from the records, so they say what these runs have shown, whatever it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean

from velora.report.records import Record

AS_FAST = 0.95  # of full training's speed; two runs of the same thing differ by that much
AS_GOOD = 0.005  # of full training's loss


@dataclass(frozen=True)
class _Point:
    label: str
    bytes_ratio: float
    speed_ratio: float
    loss: float


def takeaway(records: list[Record]) -> str:
    """The two sentences of each task and model that has full training and at least two other methods; empty without any."""
    groups: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in records:
        if record["status"] == "ok" and _is_whole(record):
            groups.setdefault((record["task"], record["model"]), {}).setdefault(record.label, []).append(record)
    return "".join(_sentences(labels) for labels in groups.values() if "full" in labels and len(labels) > 2)


def _is_whole(record: Record) -> bool:
    return None not in (
        record["memory"].get("saved_for_backward_bytes"),
        record.items_per_second,
        record.scores.get("loss"),
    )


def _sentences(labels: Mapping[str, list[Record]]) -> str:
    full = _point("full", labels["full"], None)
    others = [_point(label, runs, labels["full"]) for label, runs in labels.items() if label != "full"]
    least = min(others, key=lambda point: point.bytes_ratio)
    fast = [point for point in others if point.speed_ratio >= AS_FAST]
    best = min(fast, key=lambda point: point.bytes_ratio, default=None)
    chosen = best if best is not None and best.bytes_ratio < 1 else least
    return f"{_kept(best, least)} {_learned(chosen, full, others)}\n"


def _kept(best: _Point | None, least: _Point) -> str:
    if best is None or best.bytes_ratio >= 1:
        return f"Nothing here saves bytes at the speed of full training; {_figures(least)}, the least of all."
    if best == least:
        return f"As fast as full training, {_figures(best)}, the least of all."
    return f"As fast as full training, {_figures(best)}; {_figures(least)}, the least of all."


def _figures(point: _Point) -> str:
    return f"{point.label} keeps {point.bytes_ratio:.0%} of its bytes for the backward pass at {point.speed_ratio:.2f} of its speed"


def _learned(chosen: _Point, full: _Point, others: list[_Point]) -> str:
    same = [point.label for point in others if abs(point.loss / full.loss - 1) <= AS_GOOD]
    learned = f"as well as full training (a validation loss within {AS_GOOD:.1%} of its {full.loss:.3f})"
    who = f"{', '.join(same)} learned {learned}" if same else f"nothing learned {learned}"
    if chosen.label not in same:
        word = "worse" if chosen.loss > full.loss else "better"
        who += f"; {chosen.label} learned {word} ({chosen.loss:.3f})"
    return f"In these runs of one length and few seeds {who}."


def _point(label: str, runs: list[Record], full: list[Record] | None) -> _Point:
    def held(some: list[Record]) -> float:
        return mean(record["memory"]["saved_for_backward_bytes"] for record in some)

    def speed(some: list[Record]) -> float:
        return mean(record.items_per_second or 0.0 for record in some)

    full = full or runs
    loss = mean(record.scores["loss"] for record in runs)
    return _Point(label, held(runs) / held(full), speed(runs) / speed(full), loss)
