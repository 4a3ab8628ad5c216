"""velora-bench gpu, its parts on a CPU with tiny networks: records are appended, and what was not run is named."""

from __future__ import annotations

import json

import pytest
import torch

from velora.bench import gpu, peaks, table7
from velora.bench.gpu import Job, append, run_gpu
from velora.config.compose import compose
from velora.errors import ConfigError

CPU = torch.device("cpu")
PRINTED = {  # Table 7 of the paper: iterations per second, GB
    ("c4", "full", "llama_60m"): (3.12, 1.30), ("c4", "checkpoint", "llama_60m"): (2.47, 1.19),
    ("c4", "velora", "llama_60m"): (2.90, 1.18), ("c4", "full", "llama_130m"): (1.40, 2.32),
    ("c4", "checkpoint", "llama_130m"): (1.03, 1.85), ("c4", "velora", "llama_130m"): (1.34, 1.83),
    ("alpaca", "full", "llama_7b"): (1.64, 13.64), ("alpaca", "checkpoint", "llama_7b"): (1.14, 7.31),
    ("alpaca", "velora", "llama_7b"): (1.50, 8.35), ("alpaca", "full", "llama_13b"): (1.24, 21.35),
    ("alpaca", "checkpoint", "llama_13b"): (0.78, 11.72), ("alpaca", "velora", "llama_13b"): (1.15, 13.28),
}  # fmt: skip


@pytest.fixture
def job() -> Job:
    return Job(CPU, tiny=True)


def test_each_part_appends_its_record(tmp_path, job, monkeypatch):
    settings, rows = list(peaks.settings(tiny=True))[:1], list(table7.rows(tiny=True))
    nf4 = next(row for row in rows if "table7_alpaca/velora" in row[0])
    monkeypatch.setattr(peaks, "settings", lambda _tiny: settings)
    monkeypatch.setattr(table7, "rows", lambda _tiny: [rows[0], nf4])
    assert run_gpu(job, ["operator", "table7", "estimate"], tmp_path) == 0
    assert run_gpu(job, ["operator"], tmp_path) == 0
    read = {part: json.loads((tmp_path / f"{part}.json").read_text()) for part in ("operator", "table7", "estimate")}
    assert [len(read[part]) for part in read] == [2, 1, 1]
    assert [row["model"] for row in read["table7"][0]["results"]] == ["llama_60m", "llama_7b"]
    assert all(row["steps_per_second"] > 0 for row in read["table7"][0]["results"])
    found = read["estimate"][0]["results"][0]
    assert found["relative_error"] == found["estimated_bytes"] / found["measured_bytes"] - 1
    assert abs(found["relative_error"]) < 0.05  # on a CPU the estimate counts what the meter counts
    assert job.not_run == {}
    assert {"machine", "versions", "git", "command", "seconds"} <= read["operator"][0].keys()


def test_what_cannot_run_is_named_and_the_others_run(tmp_path, job, monkeypatch, capsys):
    setting = next(peaks.settings(tiny=True))
    monkeypatch.setattr(peaks, "settings", lambda _tiny: [("model=nothing",), setting])
    monkeypatch.setattr(table7, "run_row", lambda *_args, **_options: _raise(torch.OutOfMemoryError("no room. More")))
    assert run_gpu(job, ["tests", "table7", "estimate"], tmp_path) == 0
    assert "CUDA" in job.not_run["tests"]
    assert "model=nothing" in job.not_run["estimate model=nothing"]
    out_of_memory = [item for item, reason in job.not_run.items() if reason == "out of memory (no room)"]
    assert len(out_of_memory) == len(list(table7.rows(tiny=True)))
    record = json.loads((tmp_path / "estimate.json").read_text())[0]
    assert len(record["results"]) == 1
    assert list(record["not_run"]) == ["estimate model=nothing"]
    assert "not run: estimate model=nothing: " in capsys.readouterr().out.partition("records: ")[2]


def _raise(error: Exception) -> None:
    raise error


def test_nothing_begins_when_the_time_is_up(tmp_path, monkeypatch):
    monkeypatch.setattr(peaks, "compare_peaks", lambda *_: pytest.fail("the time was up"))
    now = iter([0.0] + [61.0] * 1000)
    job = Job(CPU, tiny=True, seconds=60.0, clock=lambda: next(now))
    assert run_gpu(job, ["operator", "step", "estimate"], tmp_path) == 1
    assert all("--minutes" in reason for reason in job.not_run.values())
    assert len(job.not_run) == 1 + 1 + len(list(peaks.settings(tiny=True)))


def test_a_test_that_fails_is_the_exit_status(tmp_path, job, monkeypatch):
    monkeypatch.setitem(gpu.PARTS, "tests", lambda _job: [{"summary": "1 failed", "failed": True}])
    assert run_gpu(job, ["tests"], tmp_path) == 1


def test_a_file_that_is_no_list_of_records_is_refused(tmp_path):
    file = tmp_path / "step.json"
    for text in ("{}", "not JSON"):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"--out .*step\.json"):
            append(file, {})
        assert file.read_text() == text


def test_at_least_thirty_settings_on_all_axes():
    found = list(peaks.settings())
    assert len(set(found)) == len(found) >= 30
    configs = [compose(*setting) for setting in found]
    for axis, number in (("model", 4), ("recompute", 3), ("activations", 2), ("optimizer", 2), ("adapter", 3)):
        assert len({str(config.raw[axis]) for config in configs}) >= number
    assert len({config.trainer.batch_size for config in configs}) >= 4


def test_table7_has_the_papers_rows_and_figures():
    found = {}
    for row in table7.rows():
        config = compose(*row)
        assert config.experiment is not None
        if not row[0].endswith(table7.OURS):
            printed = config.experiment.paper[f"{config.task.name} {config.model.name}"]
            table, _, name = row[0].removeprefix("experiment=table7_").partition("/")
            found[table, name, config.model.name] = printed["steps_per_second"], printed["memory_gb"]
            assert config.trainer.batch_size == 1
    assert found == PRINTED
