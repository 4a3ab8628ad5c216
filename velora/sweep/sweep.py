"""One sweep: what has ended well is left alone, what was interrupted goes on, and each run has a process of its own.

    sweep = Sweep(settings, folder, hydra_overrides)
    sweep.run(jobs)      a list of (overrides, Config); again for each batch of a sweeper that learns from the one before
    sweep.close()        the table of all, and the exit status

Nothing here trains or imports torch; a run that crashes takes nothing else with it.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from velora.config.run import Config
from velora.config.sweep import SweepConfig
from velora.run.signals import handling
from velora.sweep.outcome import outcome, record_of, written_at
from velora.sweep.state import RESULTS, Entry, Status, open_state
from velora.sweep.status import Line, print_table
from velora.sweep.workers import Cluster, Left, Local, Worker, visible_gpus

POLL_SECONDS = 0.1


@dataclass
class Planned:
    """A run of the sweep: its overrides as Hydra wrote them, and its checked configuration."""

    overrides: list[str]
    config: Config


class Sweep:
    """The runs of one command. `hydra_overrides` are what each child needs besides its own overrides (--config-dir ...)."""

    def __init__(self, settings: SweepConfig, folder: Path, command: list[str], hydra_overrides: list[str]) -> None:
        self.settings = settings
        self._hydra_overrides = hydra_overrides
        self._state = open_state(folder, command)
        self._known = {entry.run: entry for entry in self._state.jobs}
        self._again = all(entry.status not in ("waiting", "running", "interrupted") for entry in self._state.jobs)
        self._state.jobs = []
        self._configs: dict[str, Config] = {}
        self._signals: list[signal.Signals] = []
        self._cluster = None
        if settings.cluster is not None:
            self._cluster = Cluster(settings.cluster, settings.cluster_options or {}, folder / "cluster")

    # What there is to do

    def run(self, planned: list[Planned]) -> list[Entry]:
        """Carry out one batch; returns its entries, in order. ConfigError where the state or a log cannot be written."""
        batch = [self._entry(job) for job in planned]
        self._state.jobs += batch
        self._state.save()
        with self._listening(), Line(self._state) as line:
            self._work(batch, line)
        return batch

    def _entry(self, job: Planned) -> Entry:
        """What is known of a run: by its record, then by the state that an earlier process has left."""
        run = str(job.config.folder)
        self._configs[run] = job.config
        entry = self._known.get(run) or Entry(run, job.overrides)
        entry.overrides = job.overrides
        if self._is_alive(entry):
            return entry
        if job.config.overwrite and self._again:
            entry.status, entry.detail, entry.seconds = "waiting", "", None
            return entry
        if not (job.config.overwrite and entry.is_result):
            self._read_record(entry, job.config)
        retried = {None: (), "failed": ("failed",), "all": ("failed", "out_of_memory", "diverged")}
        if entry.status in ("interrupted", "refused", *retried[self.settings.retry]):
            entry.status = "waiting"
        return entry

    def _read_record(self, entry: Entry, config: Config) -> None:
        """Set the status by the record, which also another sweep or a single run may have left."""
        result = record_of(config)
        if entry.status == "running":  # its process is gone
            fresh = result is not None and written_at(config) >= (entry.started or 0.0)
            _set(entry, "interrupted", "its process is gone")
            result = result if fresh else None
        elif entry.is_result:  # but the folder may have been removed since
            _set(entry, "waiting", "")
        if result is not None and result.status in RESULTS and not config.overwrite:
            _set(entry, result.status, result.error or "")
        entry.process = None

    def _is_alive(self, entry: Entry) -> bool:
        on_cluster = entry.process is not None and entry.process.cluster is not None
        return entry.status == "running" and (
            (on_cluster and self._cluster is not None) or entry.is_running_elsewhere()
        )

    # Doing it

    def _work(self, batch: list[Entry], line: Line) -> None:
        slots = self._slots(batch)
        running: dict[int, tuple[Entry, Worker]] = {}
        for number, entry in enumerate(e for e in batch if e.status == "running"):  # left by an earlier process
            assert entry.process is not None
            left = (
                self._cluster.take_up(entry.process) if self._cluster and entry.process.cluster else Left(entry.process)
            )
            running[-1 - number] = (entry, left)
        told = 0
        while True:
            for slot, (entry, worker) in list(running.items()):
                if (code := worker.poll()) is not None:
                    del running[slot]
                    self._ended(entry, code, line)
                    if (
                        slot < 0 and entry.status == "interrupted"
                    ):  # it has stopped without its sweep, and goes on with this one
                        entry.status = "waiting"
            waiting = [] if self.is_stopping() else [e for e in batch if e.status == "waiting"]
            free = [slot for slot in range(len(slots)) if slot not in running][: max(0, len(slots) - len(running))]
            for entry, slot in zip(waiting, free, strict=False):
                running[slot] = (entry, self._start(entry, slots[slot], len(slots)))
            if not running:
                return
            told = self._pass_on(told, [worker for _, worker in running.values()], line)
            line.show()
            time.sleep(POLL_SECONDS)

    def _slots(self, batch: list[Entry]) -> list[str | None]:
        """One for each run at a time, with its GPU; None where a run gets no GPU of its own."""
        if self._cluster is not None:
            return [None] * (self.settings.jobs or len(batch))
        on_gpu = any(self._configs[entry.run].trainer.device != "cpu" for entry in batch)
        gpus: list[str | None] = [*(visible_gpus() if on_gpu else [])]
        count = self.settings.jobs or max(1, len(gpus))
        return [gpus[i % len(gpus)] if gpus else None for i in range(count)]

    def _start(self, entry: Entry, gpu: str | None, at_once: int) -> Worker:
        log = self._state.folder / f"{self._state.jobs.index(entry)}.log"
        command = [*entry.overrides, *self._hydra_overrides]
        entry.started, entry.attempts, entry.log = time.time(), entry.attempts + 1, str(log)
        entry.device = None if gpu is None else f"GPU {gpu}"
        worker: Worker = self._cluster.start(command, log) if self._cluster else Local(command, log, gpu, at_once)
        entry.process = worker.process
        _set(entry, "running", "")
        self._state.save()
        return worker

    def _ended(self, entry: Entry, code: int, line: Line) -> None:
        seconds = time.time() - (entry.started or time.time())
        entry.seconds = (entry.seconds or 0.0) + seconds
        entry.process = None
        _set(entry, *outcome(entry, self._configs[entry.run], code))
        self._state.save()
        line.ended(entry, seconds)

    def is_stopping(self) -> bool:
        """Whether no further run may start: after a signal, or a failure with `sweep.on_failure=stop`."""
        failed = any(entry.status in ("failed", "refused", "interrupted") for entry in self._state.jobs)
        return bool(self._signals) or (failed and self.settings.on_failure == "stop")

    # Signals

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        def note(number: int, frame: object) -> None:
            self._signals.append(signal.Signals(number))

        with handling(note):
            yield

    def _pass_on(self, told: int, workers: list[Worker], line: Line) -> int:
        """The first signal stops the runs, a second one kills them; returns how many were passed on."""
        if told == min(2, len(self._signals)):
            return told
        if told == 0:
            line.say(f"{self._signals[0].name}: runs finish their step and save; a second signal kills them")
        for worker in workers:
            worker.stop() if told == 0 else worker.kill()
        return told + 1

    # The end

    def close(self) -> int:
        """Print the table of all runs and give the sweep free; returns the exit status.

        0 where every run has a result, otherwise that of the first one without: 2 if it was refused, 1 for anything else.
        """
        jobs = self._state.jobs
        if jobs:
            print_table(self._state)
        self._state.release()
        if self._signals:
            print(
                f"velora-train: stopped by {self._signals[0].name}; the same command continues the sweep",
                file=sys.stderr,
            )
            return 1
        first = next((entry for entry in jobs if not entry.is_result and entry.status != "waiting"), None)
        if first is None:
            return 0
        hints = {"failed": "sweep.retry=failed tries it again", "refused": "the same command tries it again",
                 "interrupted": "the same command continues it"}  # fmt: skip
        print(
            f"velora-train: {first.run}: {first.status}: {first.detail}; {hints.get(first.status, '')}", file=sys.stderr
        )
        return 2 if first.status == "refused" else 1


def _set(entry: Entry, status: Status, detail: str) -> None:
    entry.status, entry.detail = status, " ".join(detail.split())
