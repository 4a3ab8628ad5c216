"""The state of a sweep: `<runs_dir>/.sweep/<name>/sweep.json`, replaced in one move, and a lock beside it.

A run that goes well leaves its record in its folder, and that record is what counts. Only the state knows

    waiting        not started yet
    running        by which process (its number and when it was started: numbers are used again)
    ok             its record says so
    out_of_memory  its record says so: a result, not a failure
    diverged       likewise
    failed         it ended badly, or was killed by a fault (SIGSEGV ...); tried again with sweep.retry=failed
    interrupted    it was stopped or killed from outside; the same command continues it
    refused        the configuration or the data is wrong; the same command tries it again

A "running" whose process is gone is an interrupted one. No torch here.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, get_args

import psutil
from pydantic import BaseModel, ConfigDict

from velora.errors import ConfigError
from velora.run.files import why, write_whole
from velora.run.notes import note
from velora.run.schema import check, parse_json

Status = Literal["waiting", "running", "ok", "out_of_memory", "diverged", "failed", "interrupted", "refused"]
STATUSES: tuple[Status, ...] = get_args(Status)
RESULTS: tuple[Status, ...] = ("ok", "out_of_memory", "diverged")


@dataclass
class Process:
    """A process of this machine, or a job of a cluster, that runs one job of a sweep."""

    pid: int | None = None
    started: float | None = None  # as the operating system has it: another process with this number has another one
    cluster: str | None = None
    cluster_job: str | None = None

    @classmethod
    def of(cls, pid: int) -> Process:
        try:
            return cls(pid, psutil.Process(pid).create_time())
        except psutil.Error:  # gone already
            return cls(pid, 0.0)

    def is_alive(self) -> bool:
        """Whether the process is there; False for a job of a cluster, which is asked by `workers.py`."""
        if self.pid is None:
            return False
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - (self.started or 0.0)) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


@dataclass
class Entry:
    """One run of a sweep."""

    run: str  # its folder, which is its identity
    overrides: list[str]
    status: Status = "waiting"
    detail: str = ""  # one sentence
    started: float | None = None  # of the latest attempt, seconds since 1970
    seconds: float | None = None  # of the attempts that have ended, together
    attempts: int = 0
    process: Process | None = None
    device: str | None = None
    log: str | None = None

    @property
    def is_result(self) -> bool:
        return self.status in RESULTS

    def is_running_elsewhere(self) -> bool:
        return self.status == "running" and self.process is not None and self.process.is_alive()


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore")

    name: str
    command: str
    owner: Process
    jobs: list[Entry]


@dataclass
class State:
    """All runs of a sweep in their order; `save` after every change."""

    folder: Path
    name: str
    command: str = ""
    owner: Process = field(default_factory=Process)
    jobs: list[Entry] = field(default_factory=list)
    _lock: IO[str] | None = field(default=None, repr=False)

    @property
    def file(self) -> Path:
        return self.folder / "sweep.json"

    def save(self) -> None:
        content: dict[str, Any] = {"name": self.name, "command": self.command, "owner": asdict(self.owner)}
        content |= {"written": time.time(), "jobs": [asdict(job) for job in self.jobs]}
        try:
            write_whole(self.file, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(
                f"{self.file} cannot be written ({why(error)}); make room there, and the same command goes on"
            ) from None

    def release(self) -> None:
        """Let another process carry on the sweep; the end of this one does it too."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def open_state(folder: Path, command: Sequence[str]) -> State:
    """The state of a sweep, for this process alone: a new one, or what an earlier process has left.

    ConfigError where another process has it, or where it cannot be read or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise ConfigError(f"sweep.name={folder.name}: {folder} cannot be written ({why(error)})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(
            f"sweep.name={folder.name}: another process runs this sweep{_number(folder)}; wait for it "
            f"(`velora-report --status {folder.parent.parent}` shows how far it is), or give another sweep.name="
        ) from None
    except OSError as error:
        note(f"{folder} cannot be locked ({why(error)}); do not start the same sweep twice")
    state = State(folder, folder.name, _lock=lock)
    if state.file.exists():
        try:
            state = read_state(state.file)
        except ValueError as error:
            lock.close()
            raise ConfigError(
                f"{state.file} is no state of a sweep ({error}); move it away, finished runs are still not run again"
            ) from None
    state._lock = lock
    state.owner, state.command = Process.of(os.getpid()), " ".join(command)
    return state


def read_state(file: Path) -> State:
    """What stands in the file; ValueError with the reason where it is no state."""
    try:
        read = check(_Read, parse_json(file.read_bytes()))
    except OSError as error:
        raise ValueError(why(error)) from None
    return State(file.parent, file.parent.name, read.command, read.owner, read.jobs)


def _number(folder: Path) -> str:
    try:
        return f" (process {read_state(folder / 'sweep.json').owner.pid})"
    except ValueError:
        return ""
