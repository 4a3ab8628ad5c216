"""Figures: the loss curves, and what is kept for backward against speed, for each task and model."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import matplotlib

from velora.report.records import Record
from velora.report.text import for_figure
from velora.run.files import write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_STYLES = ("-", "--", "-.", ":")


def draw(records: list[Record], out: Path) -> list[tuple[str, Path]]:
    """One figure for each task and model with at least one finished run; returns titles and paths. OSError: not written."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record["status"] == "ok":
            groups.setdefault((record["task"], record["model"]), []).append(record)
    drawn: list[tuple[str, Path]] = []
    for (task, model), group in groups.items():
        title = f"{task}, {model}"
        path = out / _file_name(f"{task}-{model}", {path.name for _, path in drawn})
        _draw(title, group, path)
        drawn.append((title, path))
    return drawn


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
