"""A sweep with real training that is killed -9 three times at random moments, against one that is not.

Killed are the process of the sweep (its run then stops by itself), the process of a run (the sweep goes on with the others), and
both at once. The moments are random, and stand in the message of a failure.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from loop_helpers import LLAMA, SHORT
from sweep_helpers import running_pids

RUNS = [*LLAMA[1:], "task=manual", *SHORT, "trainer.max_steps=300", "trainer.save_every=5", "trainer.eval_every=50",
        "name=kills/${method.name}", "method=full,velora_all"]  # fmt: skip
KILLS = ("sweep", "run", "both")


def sweep_of(folder: Path, cli: Any) -> list[str]:
    return cli.command("-m", *RUNS, f"runs_dir={folder}")


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}


def seen(folder: Path) -> dict[str, Any]:
    """All that the runs of a sweep have recorded, but for times, and the names of the files."""
    found: dict[str, Any] = {}
    for file in sorted((folder / "kills").rglob("*")):
        name = str(file.relative_to(folder))
        if file.name == "result.json":
            record = json.loads(file.read_text())
            del record["speed"], record["config"]["runs_dir"]
            record["command"] = record["command"].replace(str(folder), "")
            found[name] = record
        elif file.name == "metrics.jsonl":
            found[name] = file.read_text()
        else:
            found[name] = None
    return found


def own_pids(folder: Path, process: subprocess.Popen) -> list[int]:
    """The runs that this sweep has started, and not those that a killed one has left, which are just stopping."""
    children = {child.pid for child in psutil.Process(process.pid).children()}
    return [pid for pid in running_pids(folder) if pid in children]


def kill_at(folder: Path, process: subprocess.Popen, delay: float, what: str) -> None:
    """Kill -9 so many seconds after a run of this sweep has logged its first step."""
    started, until = 0.0, time.monotonic() + 240
    while not started or not any(file.stat().st_mtime > started for file in folder.glob("kills/*/seed0/metrics.jsonl")):
        assert process.poll() is None, "the sweep has ended before the kill"
        assert time.monotonic() < until, "no run has begun"
        started = started or (time.time() if own_pids(folder, process) else 0.0)
        time.sleep(0.01)
    time.sleep(delay)
    while not (pids := own_pids(folder, process)):  # between two runs
        assert process.poll() is None, "the sweep has ended before the kill"
        time.sleep(0.01)
    if what in ("sweep", "both"):
        process.kill()
        process.wait()
    if what in ("run", "both"):
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def test_killed_three_times_it_is_the_sweep_that_was_not(cli, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = subprocess.run(sweep_of(whole, cli), env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    draw = random.Random()
    delays = [draw.uniform(0, 0.5) for _ in KILLS]
    order = draw.sample(KILLS, k=len(KILLS))
    story = f"killed {list(zip(order, delays, strict=True))} seconds after a first step"
    for what, delay in zip(order, delays, strict=True):
        process = subprocess.Popen(
            sweep_of(broken, cli), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        kill_at(broken, process, delay, what)
        process.communicate(timeout=300)
        assert process.returncode == (1 if what == "run" else -signal.SIGKILL), story
    done = subprocess.run(sweep_of(broken, cli), env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{story}: {done.stderr[-3000:]}"
    assert seen(broken) == seen(whole), story
    (state,) = (broken / ".sweep").glob("*/sweep.json")
    assert [job["status"] for job in json.loads(state.read_text())["jobs"]] == ["ok", "ok"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_the_sweep(cli, tmp_path, number):
    process = subprocess.Popen(
        sweep_of(tmp_path, cli), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    kill_at(tmp_path, process, 0.2, "nothing")
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert said.splitlines()[-1] == f"velora-train: stopped by {number.name}; the same command continues the sweep"
    assert "Traceback" not in said
    assert list((tmp_path / "kills/full/seed0").glob("checkpoint-*"))
    assert not (tmp_path / "kills/velora_all").exists()
