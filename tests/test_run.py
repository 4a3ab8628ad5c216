"""One run end to end as a user starts it: records, resume after a kill, signals, divergence, refusals on the run folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import pytest

TINY = [
    "model=llama_tiny", "model.architecture.hidden_size=64", "model.architecture.intermediate_size=128",
    "model.architecture.num_hidden_layers=2", "task.max_length=64", "trainer.batch_size=4", "trainer.max_steps=16",
    "trainer.eval_every=8", "trainer.log_every=2", "wandb.mode=disabled",
]  # fmt: skip
SCHEMA = {
    "name", "status", "error", "method", "model", "task", "seed", "metrics", "memory", "speed", "parameters", "device",
    "versions", "git", "config",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two methods in one multirun."""
    from conftest import Cli

    cli = Cli(tmp_path_factory.mktemp("runs"))
    done = cli("-m", *TINY, "method=full,velora_all", "name=${method.name}")
    assert done.returncode == 0, done.stderr[-3000:]
    return cli


def test_record_has_the_published_schema(finished):
    record = finished.record("velora_all")
    assert set(record) >= SCHEMA
    assert record["status"] == "ok"
    assert record["error"] is None
    assert set(record["memory"]) == {
        "weights_bytes", "gradients_bytes", "optimizer_bytes", "saved_for_backward_bytes", "peak_allocated_bytes",
        "peak_reserved_bytes", "peak_estimated_bytes",
    }  # fmt: skip
    assert record["memory"]["peak_allocated_bytes"] is None  # no CUDA: never a made-up value
    assert record["metrics"]["best"]["step"] in (8, 16)
    assert record["metrics"]["perplexity"] > 1
    assert record["config"]["trainer"]["max_steps"] == 16


def test_memory_terms_of_full_training(finished):
    """fp32: gradients are as large as the trained weights, AdamW's moments twice as large (and a step counter per tensor)."""
    record = finished.record("full")
    parameter_bytes = 4 * record["parameters"]["trainable"]
    assert record["memory"]["gradients_bytes"] == parameter_bytes
    assert 0 <= record["memory"]["optimizer_bytes"] - 2 * parameter_bytes < 4 * 1000
    assert parameter_bytes <= record["memory"]["weights_bytes"] < 1.01 * parameter_bytes


def test_velora_keeps_less_for_backward(finished):
    full, velora = (finished.record(m)["memory"] for m in ("full", "velora_all"))
    assert velora["saved_for_backward_bytes"] < full["saved_for_backward_bytes"]
    assert {k: v for k, v in velora.items() if k in ("gradients_bytes", "optimizer_bytes")} == {
        k: v for k, v in full.items() if k in ("gradients_bytes", "optimizer_bytes")
    }


def test_metrics_file(finished):
    lines = [json.loads(x) for x in (finished.folder / "runs/full/seed0/metrics.jsonl").read_text().splitlines()]
    losses = [x for x in lines if "loss" in x]
    assert [x["step"] for x in losses] == list(range(2, 17, 2))
    assert all({"learning_rate", "grad_norm", "epoch", "phase"} <= set(x) for x in losses)
    assert [x["step"] for x in lines if "eval_perplexity" in x] == [8, 16]


def test_finished_run_is_not_run_again(finished):
    path = finished.folder / "runs/full/seed0/result.json"
    before = path.stat().st_mtime_ns
    done = finished(*TINY, "method=full", "name=full")
    assert done.returncode == 0
    assert "finished" in done.stdout
    assert path.stat().st_mtime_ns == before


def test_other_configuration_under_the_same_name_is_refused(finished):
    done = finished(*TINY, "method=full", "name=full", "trainer.learning_rate=0.5")
    assert done.returncode == 2
    assert "trainer.learning_rate" in done.stderr
    assert "overwrite=true" in done.stderr
    assert finished.record("full")["config"]["trainer"]["learning_rate"] != 0.5


def test_report_of_both(finished):
    done = finished("runs", program="velora-report")
    assert done.returncode == 0, done.stderr
    assert "velora_all" in done.stdout
    assert "full = 1" in done.stdout
    assert list((finished.folder / "runs").glob("*.png"))


def test_report_of_nothing(cli):
    done = cli("runs", program="velora-report")
    assert done.returncode == 2
    assert "no result.json" in done.stderr


LONG = [
    *TINY[:-4], "trainer.max_steps=40", "trainer.eval_every=20", "trainer.log_every=1", "trainer.save_every=5",
    "wandb.mode=disabled",
]  # fmt: skip


def _start(cli, name, *overrides):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        cli.command(*overrides, *LONG, f"name={name}"), cwd=cli.folder, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _wait_for_step(cli, name, step, process):
    file = cli.folder / "runs" / name / "seed0" / "metrics.jsonl"
    for _ in range(2400):
        if file.is_file() and f'"step": {step},' in file.read_text():
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("the run did not reach the step")


def test_killed_run_continues_to_the_same_curve(cli):
    """A process killed in the middle (SIGKILL), then the same command again: every logged number is the same."""
    overrides = ["method=velora", "activations.init=running_average"]
    whole = cli(*LONG, *overrides, "name=whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    process = _start(cli, "killed", *overrides)
    _wait_for_step(cli, "killed", 12, process)
    process.kill()
    process.wait()
    assert not (cli.folder / "runs/killed/seed0/result.json").exists()
    done = cli(*LONG, *overrides, "name=killed")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continuing from" in done.stdout
    curves = [(cli.folder / "runs" / name / "seed0/metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert curves[0] == curves[1]
    assert cli.record("whole")["metrics"] == cli.record("killed")["metrics"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_run_with_a_record(cli, number):
    process = _start(cli, "stopped")
    _wait_for_step(cli, "stopped", 3, process)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert number.name in error
    assert "Traceback" not in error
    record = cli.record("stopped")
    assert record["status"] == "failed"
    assert number.name in record["error"]
    assert list((cli.folder / "runs/stopped/seed0").glob("checkpoint-*"))


def test_signal_ends_a_multirun(cli):
    process = _start(cli, "sweep/${trainer.batch_size}", "-m", "trainer.batch_size=4,8")
    _wait_for_step(cli, "sweep/4", 3, process)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "the same command continues it" in error
    assert "Traceback" not in error
    assert not (cli.folder / "runs/sweep/8").exists()


def test_two_processes_are_one_on_the_joint_batch(cli):
    """torchrun, two gloo processes: losses and scores of one process on the joint batch (1e-5: sums in another order)."""
    torchrun = [*cli.command("--nproc-per-node", "2", program="torchrun"), cli.command()[0]]
    common = [*TINY, "method=velora", "activations.init=running_average"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*torchrun, *common, "name=two", "trainer.batch_size=8"],
        cwd=cli.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = cli(*common, "name=one", "trainer.batch_size=8")
    assert one.returncode == 0, one.stderr[-3000:]
    curves = [
        [json.loads(x) for x in (cli.folder / f"runs/{name}/seed0/metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert len(curves[0]) == len(curves[1]) == 10
    for a, b in zip(*curves, strict=True):
        assert a.pop("phase") == b.pop("phase")
        assert a == pytest.approx(b, rel=1e-5)
    assert not list((cli.folder / "runs/two").rglob("checkpoint-*"))
