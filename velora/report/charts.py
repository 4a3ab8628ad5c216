"""What the curves show, before a picture or a page draws it: plain lists of numbers, one chart a dictionary.

`title`; `x`, `y` and `y2` (a right axis, or null) are the names of the axes; `ticks` those of x, `named` says that names
stand beside the points; `series` is a list of `label`, `kind` ("line", "points", "both"), `axis` ("y", "y2"), the numbers `x`
and `y`, `of` (whose it is: one colour), `partner` (shown and hidden with the others of it) and `grey`.

`sweeps`: score and bytes against each number that differs. `frontier`: speed against the bytes kept for backward; on the line
lies what no other point beats in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from velora.report.differences import Point, points, short, shown
from velora.report.records import Record
from velora.report.seeds import measured, score, spread

Chart = dict[str, Any]
MOST_POINTS = 2000  # of one curve; a longer one is thinned out evenly
KEPT = "saved_for_backward_bytes"
NOT_BEATEN = "not beaten in both"


def charts(group: Sequence[Record]) -> list[Chart]:
    """The curves, the frontier and the sweeps of the runs of one table."""
    done = [record for record in group if record["status"] == "ok"]
    keys, rows = points(done)
    found = [_curves(keys, rows), *_frontiers(keys, rows), *sweeps(done)]
    return [chart for chart in found if chart["series"]]


def sweeps(done: Sequence[Record]) -> list[Chart]:
    """One chart for each number of the configuration that differs; a line for each method and value of the other keys."""
    keys, rows = points(done)
    name = next((key for record in done for key in record.scores if key != "loss"), None) or "loss"
    found = []
    for place, key in enumerate(keys):
        lines: dict[str, list[tuple[float, Point]]] = {}
        for row in rows:
            value = row.values[place]
            if isinstance(value, int | float) and not isinstance(value, bool):
                others = [(k, v) for k, v in zip(keys, row.values, strict=True) if k != key and v is not None]
                label = ", ".join([row.method, *(f"{short(k)} {shown(v)}" for k, v in others)])
                lines.setdefault(label, []).append((float(value), row))
        series = [
            s for label, line in lines.items() if len(line) > 1 for s in _swept(label, sorted(line, key=_first), name)
        ]
        if series:
            right = "saved for backward, MiB" if any(s["axis"] == "y2" for s in series) else None
            ticks = sorted({x for s in series for x in s["x"]})
            found.append(
                {
                    "title": f"{name} and bytes against {key}",
                    "x": key,
                    "y": name,
                    "y2": right,
                    "series": series,
                    "ticks": ticks,
                }
            )
    return found


def _swept(label: str, line: Sequence[tuple[float, Point]], name: str) -> list[dict[str, Any]]:
    scores = [(x, spread(point.done, score(name))) for x, point in line]
    held = [(x, spread(point.done, measured("memory", KEPT))) for x, point in line]
    left = [(x, found.mean) for x, found in scores if found]
    right = [(x, found.mean / 2**20) for x, found in held if found]
    found = [(name, left, "y"), ("bytes", right, "y2")]
    return [
        {**_series(f"{label}: {said}", "both", values, axis), "of": label} for said, values, axis in found if values
    ]


def _curves(keys: Sequence[str], rows: Sequence[Point]) -> Chart:
    series = []
    for row in rows:
        seeds = len(row.records) > 1
        for record in row.done:
            label = row.label(keys) + (f", seed {record['seed']}" if seeds else "")
            for key, kind, said in (("loss", "line", "training"), ("eval_loss", "points", "validation")):
                steps, values = record.curve(key) if record.lines else ([], [])
                if steps:
                    line = thinned(list(zip(steps, values, strict=True)))
                    series.append({**_series(f"{label}, {said}", kind, line), "of": label, "partner": True})
    return {"title": "Loss", "x": "step", "y": "loss", "y2": None, "series": series}


def _frontiers(keys: Sequence[str], rows: Sequence[Point]) -> list[Chart]:
    """One for each device: two devices' speeds are no trade of a method's."""
    devices = dict.fromkeys(record["device"] for row in rows for record in row.done)
    return [chart for device in devices if (chart := _frontier(keys, rows, device))]


def _frontier(keys: Sequence[str], rows: Sequence[Point], device: str | None) -> Chart | None:
    found, unit = [], "tokens"
    for row in rows:
        runs = [record for record in row.done if record["device"] == device]
        held = spread(runs, measured("memory", KEPT))
        speed = spread(runs, speed_of)
        unit = "images" if any(record["speed"].get("images_per_second") for record in runs) else unit
        if held and speed:
            found.append((row.label(keys), held.mean / 2**20, speed.mean))
    if len(found) < 2:
        return None
    series = [_series(label, "points", [(x, y)]) for label, x, y in found]
    best = on_frontier([(x, y) for _, x, y in found])
    if len(best) > 1:
        series.append({**_series(NOT_BEATEN, "line", best), "grey": True})
    title = f"Speed against bytes kept, {device or 'device not recorded'}"
    y = f"{unit} per second"
    return {"title": title, "x": "saved for backward, MiB", "y": y, "y2": None, "series": series, "named": True}


def on_frontier(found: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (bytes, speed) such that no other has at most the bytes and at least the speed, by bytes."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(set(found), key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def speed_of(record: Record) -> float | None:
    return record["speed"].get("tokens_per_second") or record["speed"].get("images_per_second")


def thinned(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each k-th point and the last one, at most `MOST_POINTS` and one."""
    every = -(-len(curve) // MOST_POINTS)
    return curve if every <= 1 else [*curve[:-1:every], curve[-1]]


def _series(label: str, kind: str, line: Sequence[tuple[float, float]], axis: str = "y") -> dict[str, Any]:
    return {
        "label": label,
        "kind": kind,
        "axis": axis,
        "x": [float(x) for x, _ in line],
        "y": [float(y) for _, y in line],
    }


def _first(item: tuple[float, Point]) -> float:
    return item[0]
