"""Sweeps: what becomes of each run, what is run again, what the exit status says. The runs are stand-ins (sweep_helpers.py)."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweep_helpers as does
from sweep_helpers import StandIns, make_stand_ins

import velora
from velora.sweep.launcher import name_of
from velora.sweep.state import Entry, Process, State, open_state
from velora.sweep.status import duration, line_of, print_status, step_of

SEEDS = "seed=0,1,2"


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys) -> StandIns:
    return make_stand_ins(tmp_path, monkeypatch, capsys)


ENDS = {
    "ok": (does.OK, "ok", "", 0),
    "out of memory": (does.OUT_OF_MEMORY, "out_of_memory", "no room", 0),
    "diverged": (does.DIVERGED, "diverged", "the loss is nan", 0),
    "failed": (does.FAILED, "failed", "KeyError: x", 1),
    "refused": (does.REFUSED, "refused", "data.root=x is not there", 2),
    "segmentation fault": (does.SEGFAULT, "failed", "killed by SIGSEGV; see runs/.sweep/", 1),
    "kill -9": (does.KILLED, "interrupted", "killed by SIGKILL", 1),
    "no record": (does.SILENT, "failed", "exit status 1 without a record; see runs/.sweep/", 1),
}


@pytest.mark.parametrize("end", ENDS)
def test_every_end_has_its_status_and_the_others_run(sweep, end):
    behaviour, status, detail, code = ENDS[end]
    sweep.behaves[1] = behaviour
    assert sweep.run(SEEDS) == code, sweep.said
    assert sweep.started == [0, 1, 2]
    assert sweep.statuses() == {0: "ok", 1: status, 2: "ok"}
    assert detail in sweep.state().jobs[1].detail
    (row,) = [line for line in sweep.printed.splitlines() if "seed1" in line]
    assert status in row
    if code:
        assert sweep.said.splitlines()[-1].startswith(f"velora-train: runs/manual-llama_tiny-velora/seed1: {status}: ")


ALL = {1: does.FAILED, 2: does.OUT_OF_MEMORY, 3: does.DIVERGED, 4: does.KILLED, 5: does.REFUSED, 6: does.SEGFAULT}


@pytest.mark.parametrize(
    ("retry", "again"),
    [("null", [4, 5]), ("failed", [1, 4, 5, 6]), ("all", [1, 2, 3, 4, 5, 6])],
)
def test_what_is_run_again(sweep, retry, again):
    sweep.behaves = dict(ALL)
    assert sweep.run("seed=range(7)") == 1
    assert sweep.started == list(range(7))
    sweep.behaves = {}
    code = sweep.run("seed=range(7)", f"sweep.retry={retry}")
    assert sweep.started == again
    assert all(sweep.statuses()[seed] == "ok" for seed in [0, *again])
    assert code == (1 if retry == "null" else 0)
    assert [job.attempts for job in sweep.state().jobs] == [1 + (seed in again) for seed in range(7)]


def test_a_run_that_was_finished_alone_or_removed(sweep):
    """The folder of a run has the last word, not the state."""
    sweep.run("seed=1,2", "sweep.name=other")
    assert sweep.run(SEEDS, "sweep.name=mine") == 0
    assert sweep.started == [0]
    (sweep.folder / "runs/manual-llama_tiny-velora/seed1/result.json").unlink()
    assert sweep.run(SEEDS, "sweep.name=mine") == 0
    assert sweep.started == [1]


def test_a_record_of_another_configuration_is_not_taken_for_this_one(sweep):
    sweep.behaves = {0: does.OUT_OF_MEMORY}
    sweep.run("name=x", "trainer.micro_batch_size=4")
    sweep.run("name=x", "trainer.micro_batch_size=2")
    assert sweep.started == [0]


def test_overwrite_runs_all_again_but_goes_on_with_a_sweep_that_was_interrupted(sweep):
    sweep.behaves = {1: does.KILLED}
    sweep.run(SEEDS, "overwrite=true")
    sweep.behaves = {}
    assert sweep.run(SEEDS, "overwrite=true") == 0
    assert sweep.started == [1]
    assert sweep.run(SEEDS, "overwrite=true") == 0
    assert sweep.started == [0, 1, 2]


@pytest.mark.parametrize("end", [does.FAILED, does.REFUSED, does.SEGFAULT])
def test_fail_fast(sweep, end):
    sweep.behaves = {1: end}
    assert sweep.run(SEEDS, "sweep.on_failure=stop") != 0
    assert sweep.statuses()[2] == "waiting"
    sweep.behaves = {1: does.DIVERGED}
    assert sweep.run(SEEDS, "sweep.on_failure=stop", "sweep.retry=failed") == 0
    assert sweep.statuses() == {0: "ok", 1: "diverged", 2: "ok"}


def test_a_signal_stops_the_run_and_the_sweep_and_the_same_command_goes_on(sweep):
    sweep.behaves = {1: does.STOPS_THE_SWEEP}
    assert sweep.run(SEEDS) == 1
    assert sweep.statuses() == {0: "ok", 1: "interrupted", 2: "waiting"}
    assert sweep.said.splitlines()[-1] == "velora-train: stopped by SIGTERM; the same command continues the sweep"
    sweep.behaves = {}
    assert sweep.run(SEEDS) == 0
    assert sweep.started == [1, 2]


def test_all_runs_are_checked_before_the_first_one_starts(sweep):
    assert sweep.run("trainer.batch_size=4,0,-1", "trainer.learning_rate=1e-3,5") == 2
    assert sweep.started == []
    assert not list(sweep.folder.glob("runs/*/seed*"))
    said = sweep.said.splitlines()
    assert len(said) == 1
    assert "4 of 6 runs are refused, so none was started" in said[0]
    assert "trainer.batch_size=0" in said[0]
    assert "trainer.batch_size=-1" in said[0]


def test_folders_are_checked_before_the_first_one_starts(sweep):
    sweep.run("name=x", "seed=1")
    assert sweep.run("name=x", SEEDS, "trainer.learning_rate=0.5") == 2
    assert sweep.started == []
    assert "1 of 3 runs are refused" in sweep.said
    assert "trainer.learning_rate" in sweep.said


def test_the_same_run_twice(sweep):
    assert sweep.run("name=x", "method=full,velora") == 2
    assert sweep.started == []
    assert "method=full name=x is the same run" in sweep.said.replace("name=x method=full", "method=full name=x")


def test_one_process_for_each_gpu(sweep, monkeypatch):
    """Two GPUs, four runs: each run waits until two have started, so they do run at once; each sees one of the two."""
    wait = (
        "open(folder + '/started', 'w'); import glob\nwhile len(glob.glob('runs/*/*/started')) < 2: time.sleep(0.01)\n"
    )
    sweep.behaves = dict.fromkeys(range(4), wait + does.OK)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert sweep.run("seed=range(4)", "trainer.device=auto") == 0
    seen = [(sweep.folder / f"runs/manual-llama_tiny-velora/seed{i}/gpu").read_text().split() for i in range(4)]
    assert all(len(gpus) == 1 for gpus in seen)
    assert {gpus[0] for gpus in seen[:2]} == {"3", "5"}
    assert {gpus[0] for gpus in seen} == {"3", "5"}
    assert {job.device for job in sweep.state().jobs} == {"GPU 3", "GPU 5"}


@pytest.mark.parametrize(("jobs", "device", "gpus"), [(1, "auto", {"3"}), (3, "auto", {"3", "5"}), (2, "cpu", {"3,5"})])
def test_as_many_at_once_as_asked_for(sweep, monkeypatch, jobs, device, gpus):
    wait = (
        "open(folder + '/started', 'w'); import glob\n"
        f"while len(glob.glob('runs/*/*/started')) < {jobs}: time.sleep(0.01)\n"
    )
    sweep.behaves = dict.fromkeys(range(3), wait + does.OK)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert sweep.run(SEEDS, f"sweep.jobs={jobs}", f"trainer.device={device}") == 0
    files = sweep.folder.glob("runs/*/*/gpu")
    assert {text for file in files for text in file.read_text().split()} == gpus


# What an earlier process has left


def left_running(sweep, pid: int, started: float) -> None:
    """A sweep of three runs that was killed while it ran the second one."""
    sweep.behaves = {1: does.KILLED}
    sweep.run(SEEDS)
    state = sweep.state()
    state.jobs[1].status, state.jobs[1].process, state.jobs[1].started = "running", Process(pid, started), time.time()
    state.save()
    sweep.behaves = {}


def test_running_by_a_process_that_is_gone_is_interrupted(sweep, capsys):
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    left_running(sweep, gone.pid, 1.0)
    assert print_status(Path("runs")) == 0
    assert "2 done, 0 running, 0 failed, 0 left, 1 interrupted of 3" in capsys.readouterr().out
    assert sweep.run(SEEDS) == 0
    assert sweep.started == [1]


def test_another_process_with_the_number_of_one_that_is_gone(sweep):
    other = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    try:
        left_running(sweep, other.pid, Process.of(other.pid).started - 100)
        assert sweep.run(SEEDS) == 0
        assert sweep.started == [1]
    finally:
        other.kill()
        other.wait()


def test_a_run_that_goes_on_without_its_sweep_is_waited_for(sweep, monkeypatch):
    """It ends only once the sweep has asked for it, so that no clock decides what is seen."""
    sweep.run(SEEDS, "sweep.name=other")
    record = sweep.folder / "runs/manual-llama_tiny-velora/seed1/result.json"
    text = record.read_text()
    asked = sweep.folder / "asked"
    write = (
        f"import os, time\nwhile not os.path.exists({str(asked)!r}): time.sleep(0.01)\n"
        f"open({str(record)!r}, 'w').write({text!r})"
    )
    poll = velora.sweep.workers.Left.poll

    def asking(left):
        asked.touch()
        return poll(left)

    monkeypatch.setattr(velora.sweep.workers.Left, "poll", asking)
    for path in (sweep.folder / "runs/.sweep/other").iterdir():
        path.unlink()
    (sweep.folder / "runs/.sweep/other").rmdir()
    record.unlink()
    process = subprocess.Popen([sys.executable, "-S", "-c", write], start_new_session=True)
    left_running(sweep, process.pid, Process.of(process.pid).started)
    assert sweep.run(SEEDS) == 0
    assert sweep.started == []
    assert sweep.statuses() == {0: "ok", 1: "ok", 2: "ok"}
    process.wait()


def test_two_sweeps_at_once(sweep):
    sweep.run(SEEDS)
    held = open_state(sweep.state().folder, ["velora-train"])
    held.save()
    try:
        assert sweep.run(SEEDS) == 2
        assert sweep.started == []
        assert "another process runs this sweep (process " in sweep.said
        assert "velora-report --status runs" in sweep.said
    finally:
        held.release()
    assert sweep.run(SEEDS) == 0


@pytest.mark.parametrize("text", ["", "[]", '{"name": 1}', "{"])
def test_a_state_that_is_none(sweep, text):
    sweep.run(SEEDS, "sweep.name=mine")
    (sweep.folder / "runs/.sweep/mine/sweep.json").write_text(text)
    assert sweep.run(SEEDS, "sweep.name=mine") == 2
    assert "sweep.json is no state of a sweep" in sweep.said
    assert "move it away" in sweep.said


# Names, keys, status


def test_the_same_command_is_the_same_sweep():
    given = ["-m", "method=full,velora", "seed=1"]
    assert name_of(given) == name_of(
        ["--multirun", "seed=1", "method=full,velora", "sweep.jobs=2", "hydra/launcher=velora"]
    )
    assert name_of(given) != name_of(["-m", "method=full,velora", "seed=2"])
    assert name_of(given).startswith("method=full,velora-")
    assert len(name_of(["-m", "seed=" + ",".join(map(str, range(1000)))])) < 100


def test_keys_of_a_sweep_are_in_no_configuration(sweep):
    assert sweep.run(SEEDS, "sweep.name=mine", "sweep.jobs=2") == 0
    record = json.loads((sweep.folder / "runs/manual-llama_tiny-velora/seed0/result.json").read_text())
    assert "sweep" not in record["config"]
    assert record["config"] == velora.compose("seed=0").raw
    assert [job.overrides for job in sweep.state().jobs] == [["seed=0"], ["seed=1"], ["seed=2"]]


def test_line_and_estimate(tmp_path):
    now = time.time()
    jobs = [Entry("a", [], "ok", seconds=60), Entry("b", [], "diverged", seconds=120), Entry("c", [], "failed", seconds=5),
            Entry("d", [], "running", started=now - 30), Entry("e", []), Entry("f", [])]  # fmt: skip
    state = State(tmp_path, "x", jobs=jobs)
    # The mean of a and b is 90 s: 60 s for d, 180 s for e and f.
    assert line_of(state) == "2 done (1 diverged), 1 running, 1 failed, 2 left of 6; about 4 min left"
    jobs[4].status, jobs[4].started = "running", now  # 60 + 90 + 90 over two at once
    assert line_of(state).endswith("about 2 min left")
    said = [duration(seconds) for seconds in (1, 99, 100, 3600, 100 * 60, 90000)]
    assert said == ["1 s", "99 s", "2 min", "60 min", "1 h 40 min", "25 h 00 min"]


def test_the_step_of_a_run(tmp_path):
    entry = Entry(str(tmp_path), [])
    assert step_of(entry) is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4}\n{"st')
    assert step_of(entry) == 4


def test_status_from_another_terminal(sweep, cli):
    sweep.behaves = {1: does.FAILED}
    sweep.run(SEEDS, "sweep.name=mine")
    done = cli("--status", "runs", program="velora-report")
    assert done.returncode == 0, done.stderr
    assert "sweep mine" in done.stdout
    assert "KeyError: x" in done.stdout
    assert "2 done, 0 running, 1 failed, 0 left of 3" in done.stdout
    assert "velora-train -m seed=0,1,2 sweep.name=mine" in done.stdout
    done = cli("--status", "elsewhere", program="velora-report")
    assert done.returncode == 2
    assert "no sweep below elsewhere" in done.stderr


def test_a_run_that_stops_because_its_sweep_is_gone_goes_on_with_the_next_one(sweep):
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(1.5)"], start_new_session=True)
    left_running(sweep, process.pid, Process.of(process.pid).started)
    assert sweep.run(SEEDS) == 0
    assert sweep.started == [1]
    process.wait()
