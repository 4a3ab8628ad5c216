"""What has become of a run: its exit status, its record and, where both are silent, what it has said last."""

from __future__ import annotations

import signal
from pathlib import Path

from velora.config.run import Config, differing_keys
from velora.run.schema import Result, read_result
from velora.sweep.job import STOPPED
from velora.sweep.state import RESULTS, Entry, Status
from velora.sweep.workers import UNKNOWN

_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def outcome(entry: Entry, config: Config, code: int) -> tuple[Status, str]:
    """What has become of a run whose process has ended with `code`, and a sentence."""
    result = record_of(config)
    if result is not None and written_at(config) < (entry.started or 0.0) and code != 0:
        result = None  # of an earlier attempt
    said = _last_sentence(entry)
    if result is not None and result.status in RESULTS and code in (0, 1, UNKNOWN):
        return result.status, result.error or ""
    if code == STOPPED:
        return "interrupted", said or "it was stopped"
    if code == UNKNOWN:
        return "interrupted", "its process is gone"
    if code == 2:
        return "refused", said
    if code < 0:
        name = _signal_name(-code)
        if -code in _FROM_OUTSIDE:
            memory = ", as the system does too when its memory is used up" if -code == signal.SIGKILL else ""
            return "interrupted", f"killed by {name}{memory}"
        return "failed", f"killed by {name}; see {entry.log}"
    if result is not None and result.error:
        return "failed", result.error
    return "failed", said or f"exit status {code} without a record; see {entry.log}"


def record_of(config: Config) -> Result | None:
    """The record of this very run; None where there is none, or one of another configuration."""
    try:
        result = read_result(config.folder / "result.json")
    except ValueError:
        return None
    return None if differing_keys(result.config.model_dump(exclude_unset=True), config.raw) else result


def written_at(config: Config) -> float:
    try:
        return (config.folder / "result.json").stat().st_mtime
    except OSError:
        return 0.0


def _last_sentence(entry: Entry) -> str:
    """What velora-train has said last on its way out, by the log."""
    try:
        lines = Path(entry.log or "").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    said = [line.partition("velora-train: ")[2] for line in lines[-20:] if "velora-train: " in line]
    return said[-1] if said else ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
