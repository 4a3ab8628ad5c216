"""Disks that are full, read-only or gone, at the start of a run, while it goes on and at its end."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest
from record_helpers import checkpoint, config, finished, names, released, started

from velora.errors import ConfigError, RunError
from velora.run.record import Run


def test_a_finished_run_on_a_disk_that_cannot_be_written(tmp_path, monkeypatch):
    finished(tmp_path)

    def failing(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", failing)
    assert Run(config(tmp_path)).is_finished()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_disk_that_cannot_be_written_at_the_start(tmp_path, monkeypatch, number, call):
    def failing(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, call, failing)
    reason = os.strerror(number)
    with pytest.raises(
        ConfigError, match=rf"runs_dir={tmp_path}: .*cannot be written \({reason}\); .*another runs_dir="
    ):
        Run(config(tmp_path))


def full(monkeypatch):
    """The disk has room for names and none for content, as a full disk has."""

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def test_full_disk_when_the_configuration_is_written(tmp_path, monkeypatch):
    run = Run(config(tmp_path))
    full(monkeypatch)
    with pytest.raises(ConfigError, match=r"runs_dir=.*No space left on device\)"):
        run.start()
    assert names(run.folder) == set()


def test_full_disk_when_the_record_of_a_good_run_is_written(tmp_path, monkeypatch):
    run = started(tmp_path)
    checkpoint(run, 3)
    full(monkeypatch)
    with pytest.raises(
        RunError, match=r"result.json cannot be written \(No space left on device\).*same command again"
    ):
        run.finish("ok", None, {})
    assert names(run.folder) == {"config.yaml", "metrics.jsonl", "checkpoint-3"}  # no .part, and it can continue
    monkeypatch.undo()
    released(run)
    assert Run(config(tmp_path)).last_checkpoint().name == "checkpoint-3"


def test_full_disk_does_not_hide_the_fault_of_a_run_that_failed(tmp_path, monkeypatch, capsys):
    run = started(tmp_path)
    full(monkeypatch)
    assert run.finish("diverged", "loss is nan at step 3", {})["error"] == "loss is nan at step 3"
    assert run.keep_traceback("Traceback ...") is None
    assert "result.json cannot be written (No space left on device)" in capsys.readouterr().err
    assert names(run.folder) == {"config.yaml", "metrics.jsonl"}


def test_full_disk_while_training(tmp_path):
    run = started(tmp_path)
    run.metrics_file.unlink()
    run.metrics_file.symlink_to("/dev/full")
    with pytest.raises(
        RunError, match=r"metrics.jsonl cannot be written \(No space left on device\).*continues the run"
    ):
        run.log({"phase": "train", "step": 2, "loss": 1.0})


def test_real_limit_while_the_metrics_are_rewritten(tmp_path, monkeypatch):
    run = started(tmp_path)
    for step in range(2, 40):
        run.log({"phase": "train", "step": step, "loss": 1.0})
    before = run.metrics_file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(RunError, match=r"metrics.jsonl cannot be written \(File too large\)"):
            run.rewind_metrics("train", 30)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.metrics_file.read_bytes() == before
    assert names(run.folder) == {"config.yaml", "metrics.jsonl"}


def test_run_folder_that_disappears(tmp_path, capsys):
    run = started(tmp_path)
    for path in run.folder.iterdir():
        path.unlink()
    run.folder.rmdir()
    with pytest.raises(RunError, match=r"metrics.jsonl cannot be written \(No such file or directory\)"):
        run.log({"phase": "train", "step": 2})
    run.finish("failed", "x", {})
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err


def test_working_directory_that_was_deleted(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ConfigError, match=r"runs_dir=runs: .*cannot be written \(No such file or directory\)"):
        Run(config(Path("runs")))
