"""Plain text for people: one record in a few lines, and foreign text made fit for the place where it is shown."""

from __future__ import annotations

import re
from typing import Any


def for_terminal(text: str) -> str:
    """One line without control characters: line breaks are spaces, escape sequences and the like are spelled out."""
    text = re.sub(r"[\r\n\t\v\f\x85\u2028\u2029]+", " ", text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def for_markdown(text: str) -> str:
    """Inline text that Markdown shows as it stands: no table cell, emphasis, code, link or HTML begins in it."""
    text = for_terminal(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)  # snake_case needs nothing


def for_figure(text: str) -> str:
    """A label for matplotlib: no mathematics begins in it, none is hidden for its leading underscore, none fills the figure."""
    text = for_terminal(text)
    text = (text if len(text) <= 80 else text[:79] + "…").replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def human_bytes(num_bytes: float | None) -> str:
    """Binary units with three figures; "-" for a figure that was not measured."""
    if num_bytes is None:
        return "-"
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"


def human_number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def summary(record: dict[str, Any]) -> str:
    """Scores, memory and speed of one run."""
    metrics = {k: v for k, v in record["metrics"].items() if not isinstance(v, dict)}
    best = {k: v for k, v in record["metrics"]["best"].items() if k not in ("step", "epoch")}
    lines = [f"{record['task']}  {record['model']}  {record['method']}  seed {record['seed']}"]
    lines.append("  last   " + "  ".join(f"{k} {human_number(v)}" for k, v in metrics.items()))
    if best and best != metrics:
        lines.append("  best   " + "  ".join(f"{k} {human_number(v)}" for k, v in record["metrics"]["best"].items()))
    memory = {k.removesuffix("_bytes").replace("_", " "): v for k, v in record["memory"].items() if v is not None}
    lines.append("  memory " + "  ".join(f"{k} {human_bytes(v)}" for k, v in memory.items()))
    speed = {k.replace("_", " "): v for k, v in record["speed"].items() if v is not None}
    lines.append("  speed  " + "  ".join(f"{k} {human_number(v)}" for k, v in speed.items()))
    parameters = record["parameters"]
    lines.append(f"  parameters {human_number(parameters['total'])}  trainable {human_number(parameters['trainable'])}")
    return "\n".join(for_terminal(line) for line in lines)
