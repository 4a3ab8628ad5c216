"""Sweeps with other libraries in them: Optuna's sweeper, and jobs of submitit's local stand-in for a cluster."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import sweep_helpers as does
from sweep_helpers import StandIns, make_stand_ins

from velora.sweep.state import Process
from velora.sweep.workers import ClusterCommand


@pytest.fixture
def sweep(tmp_path, monkeypatch, capsys) -> StandIns:
    return make_stand_ins(tmp_path, monkeypatch, capsys)


SEARCH = (
    "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2", "hydra.sweeper.sampler.seed=0",
    "hydra.sweeper.direction=maximize", "objective=metrics.accuracy", "seed=range(0,8)",
    "trainer.learning_rate=tag(log,interval(0.001,0.01))",
)  # fmt: skip


def test_optuna_searches_and_goes_on(sweep):
    """Its trials are runs of the sweep: the same sampler finds the same trials, and those that are done are not run again."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    sweep.scores = {seed: seed / 10 for seed in range(8)}
    assert sweep.run(*SEARCH) == 0, sweep.said
    first = [job.run for job in sweep.state().jobs]
    assert len(sweep.started) == len(set(first)) == 4
    best = (sweep.folder / "runs/.sweep/optimization_results.yaml").read_text()
    assert f"best_value: {max(sweep.started) / 10}" in best
    assert sweep.run(*SEARCH) == 0, sweep.said
    assert sweep.started == []
    assert [job.run for job in sweep.state().jobs] == first


def test_jobs_of_a_cluster(sweep):
    pytest.importorskip("submitit")
    sweep.behaves = {1: does.FAILED, 2: does.OUT_OF_MEMORY, 3: does.SEGFAULT}
    cluster = ("sweep.cluster=local", "sweep.cluster_options={timeout_min:5}", "sweep.jobs=2")
    assert sweep.run("seed=range(4)", *cluster) == 1, sweep.said
    assert sorted(sweep.started) == [0, 1, 2, 3]
    assert sweep.statuses() == {0: "ok", 1: "failed", 2: "out_of_memory", 3: "failed"}
    assert "SIGSEGV" in sweep.state().jobs[3].detail
    sweep.behaves = {}
    assert sweep.run("seed=range(4)", *cluster, "sweep.retry=failed") == 0, sweep.said
    assert sorted(sweep.started) == [1, 3]


def test_a_job_of_a_cluster_outlives_its_sweep(sweep):
    """As after kill -9 of the sweep: the state says running, the job goes on, and the same command takes it up."""
    submitit = pytest.importorskip("submitit")
    sweep.behaves = {0: does.KILLED}
    cluster = ("seed=0,1", "sweep.cluster=local", "sweep.cluster_options={timeout_min:5}")
    assert sweep.run(*cluster) == 1
    sweep.behaves = {0: "time.sleep(2); " + does.OK}
    state = sweep.state()
    executor = submitit.AutoExecutor(folder=state.folder / "cluster", cluster="local")
    executor.update_parameters(timeout_min=5)
    job = executor.submit(ClusterCommand(sweep.command_of(["seed=0"]), str(sweep.folder / "log")))
    state.jobs[0].status, state.jobs[0].process = "running", Process(cluster="local", cluster_job=str(job.job_id))
    state.jobs[0].started = 0.0
    state.save()
    assert sweep.run(*cluster) == 0, sweep.said
    assert sweep.started == []
    assert sweep.statuses() == {0: "ok", 1: "ok"}


def test_before_a_time_limit_the_run_is_stopped_and_queued_again(tmp_path: Path):
    pytest.importorskip("submitit")
    import threading
    import time

    command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    job = ClusterCommand(command, str(tmp_path / "log"))
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(job()))
    thread.start()
    while not hasattr(job, "_child"):
        time.sleep(0.01)
    again = job.checkpoint()
    thread.join(timeout=30)
    assert codes == [-15]
    assert again.function.command == command
