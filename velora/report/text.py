"""Plain text for people: one record in a few lines."""

from __future__ import annotations

from typing import Any


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
    return "\n".join(lines)
