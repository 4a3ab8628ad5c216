"""Figures: the loss curves, what is kept for backward against speed, and each sweep, for each task, model and level."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import matplotlib

from velora.report.charts import Chart, sweeps
from velora.report.differences import groups
from velora.report.records import Record
from velora.report.text import for_figure
from velora.run.files import write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_STYLES = ("-", "--", "-.", ":")


def draw(records: list[Record], out: Path) -> list[tuple[str, Path]]:
    """The figures of each table with at least one finished run; returns titles and paths. OSError: not written."""
    drawn: list[tuple[str, Path]] = []

    def place(title: str, name: str) -> Path:
        path = out / _file_name(name, {path.name for _, path in drawn})
        drawn.append((title, path))
        return path

    for title, group in groups(record for record in records if record["status"] == "ok").items():
        name = "-".join(filter(None, (group[0]["task"], group[0]["model"], group[0].level)))
        _draw(title, group, place(title, name))
        for chart in sweeps(group):
            swept = f"{title}: {chart['title']}"
            _draw_sweep(swept, chart, place(swept, f"{name}-{chart['x']}"))
    return drawn


def _draw_sweep(title: str, chart: Chart, path: Path) -> None:
    """Score (lines) and bytes (dashes, right) against the number that was swept; doubled steps stand at equal distances."""
    figure, left = plt.subplots(figsize=(7, 4.2), layout="constrained")
    figure.suptitle(for_figure(title), fontsize=10)
    right = left.twinx() if chart["y2"] else left
    lines = list(dict.fromkeys(series["of"] for series in chart["series"]))
    for series in chart["series"]:
        second = series["axis"] == "y2"
        style = {"color": f"C{lines.index(series['of']) % 10}", "linestyle": "--" if second else "-", "markersize": 5}
        style |= {"marker": "s", "markerfacecolor": "white"} if second else {"marker": "o"}
        (right if second else left).plot(series["x"], series["y"], label=for_figure(series["label"]), **style)
    values = chart["ticks"]
    if values[0] > 0 and values[-1] / values[0] >= 4:
        left.set_xscale("log")
    left.set_xticks(values, [f"{value:g}" for value in values])
    left.minorticks_off()
    left.set(xlabel=for_figure(chart["x"]), ylabel=for_figure(chart["y"]))
    if chart["y2"]:
        right.set_ylabel(chart["y2"])
    shown = [part for axes in dict.fromkeys((left, right)) for part in axes.get_legend_handles_labels()[0]]
    left.legend(handles=shown, fontsize=8)
    left.grid(alpha=0.3)
    _save(figure, path)


def _file_name(name: str, taken: set[str]) -> str:
    """A plain file name; where it would be too long or that of another figure, a hash of the full name takes its place."""
    plain = re.sub(r"[^\w.]+", "_", name).lstrip(".")
    if len(plain.encode()) > 200 or f"{plain}.png" in taken:
        plain = f"{plain[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return f"{plain}.png"


def _draw(title: str, group: list[Record], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    figure.suptitle(for_figure(title))
    labels = list(dict.fromkeys(record.label for record in group))
    colour = {label: f"C{i % 10}" for i, label in enumerate(labels)}
    seen: set[str] = set()
    for record in group:
        label = record.label
        style: dict[str, Any] = {
            "color": colour[label],
            "linestyle": _STYLES[(labels.index(label) // 10) % 4],
            "linewidth": 1.4,
        }
        steps, losses = record.curve("loss")
        left.plot(steps, losses, label=None if label in seen else for_figure(label), alpha=0.9, **style)
        steps, losses = record.curve("eval_loss")
        left.plot(steps, losses, "o", markersize=4, color=colour[label])
        seen.add(label)
    left.set(xlabel="step", ylabel="training loss (lines), validation loss (dots)")
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    _memory_against_speed(right, group, colour)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    plt.close(figure)
    write_whole(path, image.getvalue())


def _memory_against_speed(axes: Any, group: list[Record], colour: dict[str, str]) -> None:
    named: set[str] = set()
    for record in group:
        held = record["memory"].get("saved_for_backward_bytes")
        speed = record["speed"].get("tokens_per_second") or record["speed"].get("images_per_second")
        if held is None or speed is None:
            continue
        axes.plot(held / 2**20, speed, "o", markersize=8, color=colour[record.label])
        if record.label not in named:
            axes.annotate(
                for_figure(record.label), (held / 2**20, speed), xytext=(6, 6), textcoords="offset points", fontsize=8
            )
            named.add(record.label)
    unit = "images" if any(r["speed"].get("images_per_second") for r in group) else "tokens"
    axes.set(xlabel="saved for backward, MiB (one micro-batch, unique storages)", ylabel=f"{unit} per second")
    axes.margins(x=0.25, y=0.25)
    axes.grid(alpha=0.3)
