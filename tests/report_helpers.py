"""Records made by hand, for the tests of the reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GLUE = {  # the printed figures of two rows of Table 2, typed from the paper
    "full": {"glue/cola": {"matthews_correlation": 0.6224, "memory_gb": 4.64}, "glue/mrpc": {"f1": 0.913, "memory_gb": 4.64}},
    "lora": {"glue/cola": {"matthews_correlation": 0.6138, "memory_gb": 2.71}, "glue/mrpc": {"f1": 0.9107, "memory_gb": 2.71}},
}  # fmt: skip


def write(folder: Path, place: str, *, lines: int = 0, **values: Any) -> Path:
    """One run folder; `config`: by the full names of its keys; whatever is not given is plain."""
    config: dict[str, Any] = {"trainer": {"max_steps": 100}, "task": {}, "experiment": None}
    for key, value in values.pop("config", {}).items():
        section, _, name = key.partition(".")
        config[section] = {**(config.get(section) or {}), name: value} if name else value
    record = {
        "name": place, "status": "ok", "error": None, "method": "full", "model": "tiny", "task": "text", "seed": 0,
        "metrics": {}, "memory": {}, "speed": {}, "parameters": {"total": 10, "trainable": 5}, "device": "cpu, 2 threads",
        "versions": {"torch": "2.15.0"}, "git": {"commit": "0123456789abcdef", "dirty": False}, "command": f"velora-train {place}",
        **values, "config": config,
    }  # fmt: skip
    record["metrics"] = {**record["metrics"], "best": record["metrics"].get("best", {})}
    run = folder / place / f"seed{record['seed']}"
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps(record))
    logged = [{"phase": "train", "step": step, "loss": 4 / step} for step in range(1, lines + 1)]
    if lines:
        logged.append({"phase": "train", "step": lines, "eval_loss": 1.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    return run


def write_row(folder: Path, row: str, task: str, seed: int = 0, score: float | None = None, **changes: Any) -> Path:
    """A run of one row of Table 2 as published; `level` and `command` make it another."""
    level, command = (
        changes.pop("level", None),
        changes.pop("command", f"velora-train experiment=table2/{row} task={task}"),
    )
    key = next(iter(GLUE[row][task]))
    experiment = {"name": f"table2/{row}", "table": "table2", "row": row, "paper": GLUE[row]} | (
        {"level": level} if level else {}
    )
    return write(
        folder, f"{changes.pop('place', 'table2')}/{task}/{row}", task=task, model="roberta_base", method=row, seed=seed,
        metrics={} if score is None else {key: score, "best": {key: score, "step": 3, "epoch": 1.0}}, command=command,
        config={"experiment": experiment, **changes.pop("config", {})}, **changes,
    )  # fmt: skip


def write_sweep(
    folder: Path, values: tuple[Any, ...] = (32, 8, 16), key: str = "activations.sub_token_size", **changes: Any
) -> None:
    """VeLoRA at several values of one key: the score falls and the bytes fall as the value grows."""
    for value in values:
        size = float(value)
        write(
            folder, f"sweep/velora-{key}={value}", method="velora", metrics={"accuracy": 0.9 - size / 1000},
            memory={"saved_for_backward_bytes": int(2**20 * (100 + 800 / size))}, speed={"tokens_per_second": 100.0 + size},
            config={"activations.kind": "velora", key: value}, lines=5, **changes,
        )  # fmt: skip


def write_vtab(folder: Path, method: str, seed: int, accuracy: float, speed: float, **changes) -> None:
    record = {
        "name": f"vtab_dtd-vit-{method}", "status": "ok", "error": None, "method": method, "model": "vit", "task": "vtab/dtd",
        "seed": seed, "metrics": {"accuracy": accuracy, "best": {"accuracy": accuracy, "step": 3, "epoch": 1.0}},
        "memory": {"saved_for_backward_bytes": 2**20, "weights_bytes": 2**21, "peak_allocated_bytes": None},
        "speed": {"images_per_second": speed}, "parameters": {"total": 10, "trainable": 5},
        "config": {"task": {"group": "natural"}, "experiment": {"paper": {"vtab/dtd": {"accuracy": 0.678}}}}, **changes,
    }  # fmt: skip
    place = folder / record["task"] / method / f"seed{seed}"
    place.mkdir(parents=True)
    (place / "result.json").write_text(json.dumps(record))
    lines = [{"phase": "train", "step": s, "loss": 1 / s} for s in (1, 2, 3)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def three_runs(folder: Path) -> Path:
    write_vtab(folder, "full", 0, 0.5, 100.0)
    write_vtab(folder, "full", 1, 0.7, 100.0)
    write_vtab(folder, "velora", 0, 0.8, 125.0)
    return folder


RECORD = {
    "name": "vtab_dtd-vit-lora", "status": "ok", "error": None, "method": "lora", "model": "vit", "task": "vtab/dtd", "seed": 0,
    "metrics": {"accuracy": 0.5, "best": {"accuracy": 0.5, "step": 3, "epoch": 1.0}}, "memory": {"weights_bytes": 4},
    "speed": {"images_per_second": 1.0}, "parameters": {"total": 10, "trainable": 5}, "config": {"task": {"group": "natural"}},
}  # fmt: skip
