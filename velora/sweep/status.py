"""What a sweep says: one line while it goes on, a table at its end, and both from another terminal."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from velora.sweep.state import STATUSES, Entry, State, read_state

SHOW_SECONDS = 0.5
_TAIL_BYTES = 4096


def line_of(state: State) -> str:
    """How many runs are done, running, failed and left, and about how long it will take."""
    count = {status: sum(job.status == status for job in state.jobs) for status in STATUSES}
    done = sum(job.is_result for job in state.jobs)
    failed = count["failed"] + count["refused"]
    parts = [f"{done} done", f"{count['running']} running", f"{failed} failed", f"{count['waiting']} left"]
    for status in ("out_of_memory", "diverged"):
        if count[status]:
            parts[0] += f" ({count[status]} {status})"
    if count["interrupted"]:
        parts.append(f"{count['interrupted']} interrupted")
    return f"{', '.join(parts)} of {len(state.jobs)}; {_estimate(state)}"


def _estimate(state: State) -> str:
    """By the mean of the runs that are done; those that run count as parallel."""
    times = [job.seconds for job in state.jobs if job.is_result and job.seconds]
    running = [job for job in state.jobs if job.status == "running"]
    waiting = [job for job in state.jobs if job.status == "waiting"]
    if not running and not waiting:
        return "nothing left"
    if not times:
        return "time left unknown"
    mean, now = sum(times) / len(times), time.time()
    rest = [max(0.0, mean - (now - (job.started or now)) - (job.seconds or 0.0)) for job in running]
    seconds = (sum(rest) + mean * len(waiting)) / max(1, len(running))
    return f"about {duration(seconds)} left"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def step_of(entry: Entry) -> int | None:
    """The last step that a run has logged."""
    import json

    try:
        with (Path(entry.run) / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return None


class Line:
    """The line on stderr: rewritten in its place on a terminal, elsewhere printed when a number in it changes."""

    def __init__(self, state: State) -> None:
        self._state, self._terminal = state, sys.stderr.isatty()
        self._shown_at, self._counts, self._open = 0.0, "", False

    def __enter__(self) -> Line:
        print(f"sweep {self._state.name}: {len(self._state.jobs)} runs; state and logs: {self._state.folder}")
        sys.stdout.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._clear()

    def show(self) -> None:
        text = line_of(self._state)
        counts = text.partition(";")[0]
        if not self._terminal:
            if counts != self._counts:
                self._counts = counts
                print(text, file=sys.stderr, flush=True)
            return
        if time.monotonic() - self._shown_at < SHOW_SECONDS:
            return
        self._shown_at = time.monotonic()
        for job in self._state.jobs:
            if job.status == "running":
                step = step_of(job)
                text += f" | {job.run}" + (f" step {step}" if step is not None else "")
        width = shutil.get_terminal_size().columns - 1
        self._clear()
        print(text[:width], end="", file=sys.stderr, flush=True)
        self._open = True

    def ended(self, entry: Entry, seconds: float) -> None:
        self.say(
            f"{entry.status} after {duration(seconds)}: {entry.run}" + (f": {entry.detail}" if entry.detail else "")
        )

    def say(self, text: str) -> None:
        self._clear()
        print(text, file=sys.stderr, flush=True)

    def _clear(self) -> None:
        if self._open:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._open = False


def print_table(state: State) -> None:
    """Each run, its status, time, attempts, and what there is to say about it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"sweep {state.name}"), title_justify="left")
    for column in ("run", "status", "time", "attempts", "what happened"):
        table.add_column(column, overflow="fold", justify="right" if column in ("time", "attempts") else "left")
    for job in state.jobs:
        seconds = "" if job.seconds is None else duration(job.seconds)
        cells = (job.run, job.status, seconds, str(job.attempts or ""), job.detail or (job.device or ""))
        table.add_row(*map(Text, cells))
    Console(width=None if sys.stdout.isatty() else 150).print(table)


@contextmanager
def _as_seen_now(state: State) -> Iterator[State]:
    """A "running" of a process that is gone is an interrupted run; those of a cluster are believed."""
    for job in state.jobs:
        on_cluster = job.process is not None and job.process.cluster is not None
        if job.status == "running" and not on_cluster and not job.is_running_elsewhere():
            job.status, job.detail = "interrupted", "its process is gone; the same command continues it"
    yield state


def print_status(runs: Path) -> int:
    """For `velora-report --status`: all sweeps below a folder; exit status 2 where there is none."""
    files = sorted((runs / ".sweep").glob("*/sweep.json"))
    if not files:
        print(
            f"velora-report: no sweep below {runs}; start one with velora-train -m, or name another folder",
            file=sys.stderr,
        )
        return 2
    for file in files:
        try:
            state = read_state(file)
        except ValueError as error:
            print(f"velora-report: {file} is no state of a sweep ({error})", file=sys.stderr)
            continue
        with _as_seen_now(state):
            print_table(state)
            alive = state.owner.is_alive() and any(job.status in ("waiting", "running") for job in state.jobs)
            owner = f"process {state.owner.pid}" if alive else "no process works on it"
            print(f"{line_of(state)}; {owner}\n  {state.command}\n")
    return 0
