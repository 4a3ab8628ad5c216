"""The picture of a comparison of steps: bytes against time, both over those of exact training, and the frontier."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.text import Text

from velora.report.frontier import frontier
from velora.report.text import for_figure
from velora.run.files import write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_OFFSETS = [
    (x, y) for r in (7, 16, 26, 38, 52) for x, y in ((r, r), (r, -r - 6), (-r, r), (-r, -r - 6), (0, r), (0, -r - 6))
]


def draw(record: Mapping[str, Any], path: Path) -> None:
    """One dot for each point, with the quartiles of its time; the grey step line is the frontier. OSError: not written."""
    figure, axes = plt.subplots(figsize=(8, 5.6), layout="constrained")
    points = record["points"]
    base = points["exact"]["median_seconds"]
    axes.axvline(1, color="0.8", linewidth=1)
    axes.axhline(1, color="0.8", linewidth=1)
    best = frontier({name: (point["time_ratio"], point["bytes_ratio"]) for name, point in points.items()})
    axes.step(
        [points[name]["time_ratio"] for name in best], [points[name]["bytes_ratio"] for name in best],
        where="post", color="0.5", linewidth=1.2, label="frontier", zorder=1,
    )  # fmt: skip
    colour = _colours(points)
    for name, point in points.items():
        x, y = point["time_ratio"], point["bytes_ratio"]
        low, high = (seconds / base for seconds in point["quartiles_seconds"])
        axes.errorbar(
            x, y, xerr=[[max(x - low, 0)], [max(high - x, 0)]], color=colour[name], marker="o", linewidth=0.8,
            markersize=8 if point["on_frontier"] else 5,
        )  # fmt: skip
    axes.set(
        xlabel=f"time of {record['step']} / exact (median; bars: quartiles)",
        ylabel="saved for backward / exact (unique storages)", ylim=(0, None),
    )  # fmt: skip
    axes.set_title(for_figure(f"{record['model']}, {record['dtype']}, {record['machine']['device']}"), fontsize=10)
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _label(figure, axes, points, colour)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    plt.close(figure)
    write_whole(path, image.getvalue())


def _colours(points: Mapping[str, Any]) -> dict[str, str]:
    """One colour for each value of `activations`, which the name of a point begins with."""
    kinds = list(dict.fromkeys(name.partition("+")[0] for name in points))
    return {name: f"C{kinds.index(name.partition('+')[0])}" for name in points}


def _label(figure: Any, axes: Any, points: Mapping[str, Any], colour: Mapping[str, str]) -> None:
    """A name at each dot, at the nearest place where it covers neither a dot nor another name."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    dots = axes.transData.transform([(point["time_ratio"], point["bytes_ratio"]) for point in points.values()])
    taken: list[Any] = []
    for name, point in points.items():
        for x, y in _OFFSETS:
            text = axes.annotate(
                for_figure(name), (point["time_ratio"], point["bytes_ratio"]), (x, y), textcoords="offset points",
                fontsize=8,
                color=colour[name], ha="left" if x > 0 else "right" if x < 0 else "center",
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6} if max(abs(x), abs(y)) > 16 else None,
            )  # fmt: skip
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # without its line
            free = not any(map(box.overlaps, taken)) and box.count_contains(dots) == 0 and _inside(box, axes.bbox)
            if free or (x, y) == _OFFSETS[-1]:
                taken.append(box)
                break
            text.remove()


def _inside(box: Any, frame: Any) -> bool:
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
