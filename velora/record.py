"""The folder of one run and what is written into it.

    runs/<name>/seed<k>/config.yaml      the composed configuration, written first
                        metrics.jsonl    one line per logged step and per evaluation
                        result.json      the record, written last, in one move, also when the run fails
                        checkpoint-*/    while the run goes on

The folder is the identity of a run (name and seed, no timestamp): an identical finished run is not run again, an
interrupted one is continued, and another configuration under the same name is refused. No torch here.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import yaml

from velora.config import Config
from velora.errors import ConfigError, RunError
from velora.tracker import Tracker

# Keys that do not change what a run computes: two configurations that differ only here are the same run.
_NOT_IDENTITY = ("resume", "overwrite", "runs_dir", "wandb", "name")
_NOT_IDENTITY_TRAINER = ("device", "save_every", "save_model", "log_every", "measure_memory")
_PACKAGES = ("velora", "torch", "transformers", "datasets", "peft", "accelerate", "bitsandbytes", "timm", "hydra-core")

MEMORY_KEYS = (
    "weights_bytes", "gradients_bytes", "optimizer_bytes", "saved_for_backward_bytes",
    "peak_allocated_bytes", "peak_reserved_bytes", "peak_estimated_bytes",
)  # fmt: skip
SPEED_KEYS = ("steps_per_second", "tokens_per_second", "images_per_second", "train_seconds")


class Run:
    """The folder of one run. Raises before anything is written where it cannot be used.

    ConfigError: it holds a run of another configuration, or another process is writing it. RunError: it cannot be written.
    Under several processes only rank 0 writes.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = config.folder
        self.writes = os.environ.get("RANK", "0") == "0"
        self._lock: IO[str] | None = None
        self.tracker = Tracker()
        self._refuse_other_run()
        if self.writes:
            self._take_folder()

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"

    def is_finished(self) -> bool:
        result = _read_json(self.folder / "result.json")
        return not self.config.overwrite and result is not None and result["status"] == "ok"

    def last_checkpoint(self, phase: str = "") -> Path | None:
        """The newest complete checkpoint (the file that is written last stands in it), or None."""
        found = [p for p in (self.folder / phase).glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
        return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)

    def has_checkpoint(self) -> bool:
        """Whether any phase has a complete checkpoint to continue from."""
        return any(self.folder.glob("**/checkpoint-*/trainer_state.json"))

    def start(self) -> None:
        """Clear what `overwrite` or `resume=never` gives up, and write the configuration."""
        if not self.writes:
            return
        if self.config.overwrite or self.config.resume == "never":
            for path in self.folder.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        (self.folder / "result.json").unlink(missing_ok=True)
        _write(self.folder / "config.yaml", yaml.safe_dump(self.config.raw, sort_keys=False))
        self.tracker.start(self.config, self.folder)

    def release(self) -> None:
        """Let other processes write the folder; the end of the process does it too."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def rewind_metrics(self, phase: str, step: int) -> None:
        """Drop the lines after `step` of `phase`, which a resumed run writes again."""
        if self.writes and self.metrics_file.is_file():
            lines = [json.loads(line) for line in self.metrics_file.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if line["phase"] != phase or line["step"] <= step]
            _write(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))

    def log(self, line: dict[str, Any]) -> None:
        if self.writes:
            with self.metrics_file.open("a") as file:
                file.write(json.dumps(_finite(line)) + "\n")
            self.tracker.log(line)

    def finish(self, status: str, error: str | None, parts: dict[str, Any]) -> dict[str, Any]:
        """Write result.json (the schema of the README) and return it; `parts` holds what was measured."""
        config = self.config
        metrics = dict(parts.get("metrics", {}))
        record = {
            "name": config.name,
            "status": status,
            "error": error,
            "method": config.method.name,
            "model": config.model.name,
            "task": config.task.name,
            "seed": config.seed,
            "metrics": {**metrics, "best": metrics.get("best", {})},
            "memory": {key: parts.get("memory", {}).get(key) for key in MEMORY_KEYS},
            "speed": {key: parts.get("speed", {}).get(key) for key in SPEED_KEYS},
            "parameters": {key: parts.get("parameters", {}).get(key) for key in ("total", "trainable")},
            "data": parts.get("data"),
            "device": parts.get("device"),
            "versions": versions(),
            "git": git_state(),
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "config": config.raw,
        }
        record = _finite(record)
        if self.writes:
            self.tracker.finish(status)
            _write(self.folder / "result.json", json.dumps(record, indent=2) + "\n")
            if status == "ok":
                for path in self.folder.glob("**/checkpoint-*"):
                    shutil.rmtree(path)
        return record

    def _refuse_other_run(self) -> None:
        file = self.folder / "config.yaml"
        if (
            self.config.resume == "required"
            and not self.is_finished()
            and (self.config.overwrite or not self.has_checkpoint())
        ):
            raise ConfigError(f"resume=required: {self.folder} holds no checkpoint to continue from; use resume=auto")
        if not file.is_file() or self.config.overwrite:
            return
        if not self.metrics_file.is_file() and not self.has_checkpoint():
            return  # it never got to its first step: there is nothing to lose
        earlier = yaml.safe_load(file.read_text()) or {}
        changed = sorted(_changed_keys(_identity(earlier), _identity(self.config.raw)))
        if changed and self.config.resume != "never":
            raise ConfigError(
                f"name={self.config.name} seed={self.config.seed}: {self.folder} holds a run with another configuration "
                f"(different: {', '.join(changed[:6])}); give another name=..., or overwrite=true to replace it"
            )

    def _take_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise RunError(
                f"runs_dir={self.config.runs_dir}: {self.folder} cannot be written ({error.strerror}); give another runs_dir="
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"name={self.config.name} seed={self.config.seed}: another process is writing {self.folder}; "
                "wait for it or give another name="
            ) from None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any]:
    """Commit of the checkout that this code runs from; nulls for an installed package. Records and figures do not count as
    changes: a sweep would call its own second run dirty."""
    folder = Path(__file__).parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "record.py") is None:
        return {"commit": None, "dirty": None}
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../conf")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}


def _identity(raw: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in raw.items() if k not in _NOT_IDENTITY}
    kept["trainer"] = {k: v for k, v in (raw.get("trainer") or {}).items() if k not in _NOT_IDENTITY_TRAINER}
    return _flatten(kept)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in _flatten(item, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): value}


def _changed_keys(old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    return {key for key in {*old, *new} if old.get(key) != new.get(key)}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null in their place."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None


def _write(path: Path, text: str) -> None:
    """Write in one move, so that a file is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)
