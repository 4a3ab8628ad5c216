"""Tables in Markdown: one for each task and model, a row for each method, seeds taken together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import mean, stdev
from typing import Any

from velora.report.records import Record
from velora.report.text import for_markdown, human_bytes, human_number

_MEMORY = {
    "saved_for_backward_bytes": "saved for backward",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimiser",
    "weights_bytes": "weights",
    "peak_allocated_bytes": "peak allocated",
    "peak_reserved_bytes": "peak reserved",
    "peak_estimated_bytes": "peak estimated",
}


Escape = Callable[[str], str]


def tables(records: list[Record], escape: Escape = for_markdown) -> str:
    """All tables, and beneath them the runs that did not end well; `escape` makes foreign text fit for where they go."""
    good = [r for r in records if r["status"] == "ok"]
    parts = []
    for (task, model), group in _grouped(good, lambda r: (r["task"], r["model"])).items():
        parts.append(f"## {escape(f'{task}, {model}')}\n\n{_table(group, escape)}")
    if vtab := _vtab_means(good, escape):
        parts.append(vtab)
    bad = [r for r in records if r["status"] != "ok"]
    if bad:
        rows = [[r["name"], str(r["seed"]), r["status"], r["error"] or ""] for r in bad]
        parts.append("## Runs without a result\n\n" + markdown(["run", "seed", "status", "why"], rows, escape))
    return "\n".join(parts)


def notes(records: list[Record], escape: Escape = for_markdown) -> str:
    """What the experiments of these records say about themselves, one paragraph each; empty where they say nothing."""
    said = dict.fromkeys(r.note for r in records if r.note and r["status"] == "ok")
    return "".join(f"{escape(note)}\n" for note in said)


def _table(group: list[Record], escape: Escape) -> str:
    score_keys = list(dict.fromkeys(k for r in group for k in r.scores))
    memory = {k: name for k, name in _MEMORY.items() if any(r["memory"].get(k) is not None for r in group)}
    speed_key = next(
        (k for k in ("tokens_per_second", "images_per_second") if any(r["speed"].get(k) for r in group)), None
    )
    paper = sorted({k for r in group for k in r.paper})
    head = ["method", "seeds", *score_keys, *(f"{k} (paper)" for k in paper), *memory.values(), "trainable parameters"]
    methods = _grouped(group, lambda r: r.label)
    reference = _speed(methods.get("full", []), speed_key)
    if speed_key:
        head.append(speed_key.removesuffix("_per_second") + "/s" + (", full = 1" if reference else ""))
    rows = []
    for label, runs in methods.items():
        row = [label, str(len(runs)), *(_spread(r.scores.get(k) for r in runs) for k in score_keys)]
        row += [human_number(runs[0].paper.get(k)) for k in paper]
        row += [human_bytes(_mean(r["memory"].get(k) for r in runs)) for k in memory]
        row.append(human_number(runs[0]["parameters"]["trainable"]))
        if speed_key:
            speed = _speed(runs, speed_key)
            row.append(f"{speed / reference:.2f}" if speed and reference else human_number(speed))
        rows.append(row)
    return markdown(head, rows, escape)


def _vtab_means(records: list[Record], escape: Escape) -> str | None:
    """VTAB-1k: the mean of each task group and the mean of all tasks, for each model and method."""
    vtab = [r for r in records if r["task"].startswith("vtab/") and r.scores.get("accuracy") is not None]
    if len({r["task"] for r in vtab}) < 2:
        return None
    rows = []
    for (model, label), runs in _grouped(vtab, lambda r: (r["model"], r.label)).items():
        by_task = {t: mean(r.scores["accuracy"] for r in g) for t, g in _grouped(runs, lambda r: r["task"]).items()}
        groups = {r["task"]: r.group for r in runs}
        means = {}
        for name in ("natural", "specialized", "structured"):
            values = [v for t, v in by_task.items() if groups[t] == name]
            means[name] = mean(values) if values else None
        rows.append(
            [
                model,
                label,
                str(len(by_task)),
                *(human_number(means[n]) for n in means),
                human_number(mean(by_task.values())),
            ]
        )
    return "## VTAB-1k\n\n" + markdown(
        ["model", "method", "tasks", "natural", "specialized", "structured", "mean of tasks"], rows, escape
    )


def markdown(head: list[str], rows: list[list[str]], escape: Escape = for_markdown) -> str:
    """A Markdown table with aligned columns, readable as plain text too; every cell is escaped."""
    head, *rows = [[escape(cell) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [head, *rows]
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def _grouped(records: Iterable[Record], key: Callable[[Record], Any]) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return mean(known) if known else None


def _spread(values: Iterable[float | None]) -> str:
    """Mean over the seeds, and the sample standard deviation where there are several."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    return human_number(float(mean(known))) + (f" ± {stdev(known):.2g}" if len(known) > 1 else "")


def _speed(runs: list[Record], key: str | None) -> float | None:
    return _mean(r["speed"].get(key) for r in runs) if key else None
