"""The process of one run: here or on a cluster, started by this sweep or left by an earlier one.

All of them answer `poll` (how it has ended, or None), and can be told to `stop` or to `kill`. A process here has a session of its
own: Ctrl-C reaches the sweep alone, which passes it on as SIGTERM, so that the step is finished and a checkpoint written.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from velora.errors import ConfigError, first_line
from velora.sweep.job import PARENT
from velora.sweep.state import Process

UNKNOWN = 256
"""In place of an exit status where nobody has seen it."""


class Worker(Protocol):
    process: Process

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        ...

    def stop(self) -> None: ...

    def kill(self) -> None: ...


def command_of(overrides: list[str]) -> list[str]:
    return [sys.executable, "-m", "velora.sweep.job", *overrides]


class Local:
    """A child process; what it prints goes into `log`."""

    def __init__(self, overrides: list[str], log: Path, gpu: str | None, at_once: int = 1) -> None:
        environment = {**os.environ, PARENT: str(os.getpid())}
        if at_once > 1:  # as many threads each as there are cores would get into each other's way
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with log.open("wb") as out:
            self._child = subprocess.Popen(
                command_of(overrides), stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment,
                start_new_session=True,
            )  # fmt: skip
        self.process = Process.of(self._child.pid)

    def poll(self) -> int | None:
        return self._child.poll()

    def stop(self) -> None:
        self._child.terminate()

    def kill(self) -> None:
        self._child.kill()


class Left:
    """A process of an earlier sweep that was killed: it stops by itself, and is waited for."""

    def __init__(self, process: Process) -> None:
        self.process = process

    def poll(self) -> int | None:
        return None if self.process.is_alive() else UNKNOWN

    def stop(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.process.is_alive() and self.process.pid is not None:
            psutil.Process(self.process.pid).send_signal(number)


# On a cluster


@dataclass
class ClusterCommand:
    """What a job of a cluster runs; before a time limit or a preemption submitit calls `checkpoint`, and queues it again."""

    command: list[str]
    log: str

    def __call__(self) -> int:
        with open(self.log, "ab") as out:
            self._child = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            try:
                return self._child.wait()
            except BaseException:  # submitit's local executor cancels with SIGINT
                self._child.terminate()
                self._child.wait()
                raise

    def checkpoint(self) -> Any:
        import submitit

        self._child.terminate()
        self._child.wait()
        return submitit.helpers.DelayedSubmission(ClusterCommand(self.command, self.log))


class OnCluster:
    """A job of submitit; one of an earlier sweep goes on without it, and is taken up again."""

    def __init__(self, job: Any, cluster: str) -> None:
        self._job = job
        self.process = Process(cluster=cluster, cluster_job=str(job.job_id))

    def poll(self) -> int | None:
        if not self._job.done():
            return None
        try:
            return int(self._job.result())
        except Exception:  # submitit's own, for a job that has ended without a result: cancelled, out of memory
            return UNKNOWN

    def stop(self) -> None:
        self._job.cancel()

    kill = stop


class Cluster:
    """submitit's executor for `sweep.cluster` with `sweep.cluster_options`; ConfigError where it cannot be used."""

    def __init__(self, cluster: str, options: dict[str, Any], folder: Path) -> None:
        try:
            import submitit
        except ImportError:
            raise ConfigError(f"sweep.cluster={cluster} needs submitit; pip install 'velora[submitit]'") from None
        self._cluster, self._folder = cluster, folder
        classes = {"slurm": submitit.SlurmJob, "local": submitit.LocalJob}
        self._job_class: Any = classes[cluster]
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**options)
        except Exception as error:
            raise ConfigError(
                f"sweep.cluster={cluster} sweep.cluster_options={options}: {first_line(error)}; they are the arguments of "
                "submitit's update_parameters"
            ) from None

    def start(self, overrides: list[str], log: Path) -> OnCluster:
        log.write_bytes(b"")
        job = self._executor.submit(ClusterCommand(command_of(overrides), str(log.resolve())))
        return OnCluster(job, self._cluster)

    def take_up(self, process: Process) -> OnCluster:
        return OnCluster(self._job_class(folder=self._folder, job_id=str(process.cluster_job)), self._cluster)


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES says, or else what the driver's tool lists; asked without torch, which would take seconds."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        given = [name.strip() for name in named.split(",") if name.strip()]
        return given[: given.index("-1")] if "-1" in given else given
    if not shutil.which("nvidia-smi"):
        return []
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return done.stdout.split() if done.returncode == 0 else []
