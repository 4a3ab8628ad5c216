"""Sweeps whose runs are stand-ins: a small process that ends as it is told, without training anything.

The sweep, its state, its processes and signals are the real ones; only `command_of` is another. `tests/test_sweep_kills.py` has the
whole of it, with training.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

import velora
import velora.cli
import velora.sweep.workers
from velora.config.run import Config
from velora.sweep.state import read_state

# What a stand-in does. `folder` is that of the run; `write(status)` leaves a record there.
_SCRIPT = """
import json, os, signal, sys, time
behaviour, folder, record = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
os.makedirs(folder, exist_ok=True)
def write(status, error=None):
    record.update(status=status, error=error)
    with open(folder + "/result.json", "w") as file:
        json.dump(record, file)
def until_stopped():
    signal.signal(signal.SIGTERM, lambda *_: (write("failed", "stopped by SIGTERM at step 3"), os._exit(75)))
    time.sleep(60)
with open(folder + "/config.yaml", "w") as file:
    json.dump(record["config"], file)
with open(folder + "/gpu", "a") as file:
    file.write(os.environ.get("CUDA_VISIBLE_DEVICES", "none") + "\\n")
exec(behaviour)
"""
OK = "write('ok')"
FAILED = "write('failed', 'KeyError: x'); sys.exit(1)"
OUT_OF_MEMORY = "write('out_of_memory', 'no room'); sys.exit(1)"
DIVERGED = "write('diverged', 'the loss is nan'); sys.exit(1)"
REFUSED = "print('velora-train: data.root=x is not there', file=sys.stderr); sys.exit(2)"
SEGFAULT = "os.kill(os.getpid(), signal.SIGSEGV); time.sleep(60)"
KILLED = "os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)"
SILENT = "sys.exit(1)"
STOPS_THE_SWEEP = "os.kill(os.getppid(), signal.SIGTERM); until_stopped()"


@functools.cache
def composed(*overrides: str, config_dir: Path | None = None) -> Config:
    hydra = GlobalHydra.instance()
    sweeping, hydra.hydra = hydra.hydra, None  # the sweep's own, under way
    try:
        return velora.compose(*overrides, config_dir=config_dir)
    finally:
        hydra.hydra = sweeping


class StandIns:
    """`velora-train -m` in this process; run number `seed` behaves as `behaves[seed]` says, and well where it says nothing."""

    def __init__(self, folder: Path, capsys: Any) -> None:
        self.folder, self._capsys = folder, capsys
        self.behaves: dict[int, str] = {}
        self.started: list[int] = []
        self.scores: dict[int, float] = {}
        self.score_of = lambda config: self.scores.get(config.seed, 0.5)
        self.config_dir: Path | None = None
        self.run: Any = None

    def command_of(self, overrides: list[str]) -> list[str]:
        own = [o for o in overrides if "=" in o and not o.startswith("hydra")]
        config = composed(*own, config_dir=self.config_dir)
        self.started.append(config.seed)
        score = self.score_of(config)
        record = {
            "name": config.name, "error": None, "method": config.method.name, "model": config.model.name,
            "task": config.task.name, "seed": config.seed, "metrics": {"accuracy": score, "best": {}}, "memory": {},
            "speed": {}, "parameters": {}, "config": config.raw,
        }  # fmt: skip
        behaviour = self.behaves.get(config.seed, OK)
        return [sys.executable, "-S", "-c", _SCRIPT, behaviour, str(config.folder), json.dumps(record)]

    def __call__(self, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
        """Returns the exit status; what was started is in `started`, what was said in `said`."""
        self.started.clear()
        monkeypatch.setattr("sys.argv", ["velora-train", "-m", *arguments])
        with pytest.raises(SystemExit) as ended:
            velora.cli.train()
        captured = self._capsys.readouterr()
        self.said, self.printed = captured.err, captured.out
        return int(ended.value.code or 0)

    def state(self) -> Any:
        (file,) = (self.folder / "runs" / ".sweep").glob("*/sweep.json")
        return read_state(file)

    def statuses(self) -> dict[int, str]:
        return {int(job.run.rpartition("seed")[2]): job.status for job in self.state().jobs}


def make_stand_ins(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> StandIns:
    stand_ins = StandIns(folder, capsys)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(velora.sweep.workers, "command_of", stand_ins.command_of)
    stand_ins.run = functools.partial(stand_ins, monkeypatch=monkeypatch)
    return stand_ins


def running_pids(folder: Path) -> list[int]:
    """The processes that the sweeps below a folder of runs have under way."""
    states = [read_state(file) for file in (folder / ".sweep").glob("*/sweep.json")]
    return [job.process.pid for state in states for job in state.jobs if job.is_running_elsewhere()]
