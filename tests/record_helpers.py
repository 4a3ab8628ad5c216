"""Run folders made by hand, for the tests of the record and of what a run finds in its folder."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from velora.run.checkpoints import write_manifest
from velora.run.record import Run


def config(folder: Path, **changes):
    raw = {
        "name": "a",
        "seed": 0,
        "trainer": {"max_steps": 3, "device": "auto"},
        "model": {"name": "m"},
        "task": {"name": "t"},
        **changes.pop("raw", {}),
    }
    values = {
        "name": "a", "seed": 0, "runs_dir": folder, "folder": folder / "a" / "seed0", "resume": "auto", "overwrite": False,
        "raw": raw, "method": SimpleNamespace(name="full"), "model": SimpleNamespace(name="m"), "task": SimpleNamespace(name="t"),
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def started(folder: Path, **changes) -> Run:
    run = Run(config(folder, **changes))
    run.start()
    run.log({"phase": "train", "step": 1, "loss": 1.0})
    return run


def released(run: Run) -> None:
    run._lock.close()


def checkpoint(run: Run, step: int, phase: str = "", manifest: bool = True) -> Path:
    folder = run.folder / phase / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    if manifest:
        write_manifest(folder)
    return folder


def finished(folder: Path, **changes) -> Run:
    run = started(folder, **changes)
    run.finish("ok", None, {"metrics": {"accuracy": 0.5}})
    released(run)
    return run


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {".lock"}
