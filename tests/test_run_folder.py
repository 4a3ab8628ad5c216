"""What a run finds in its folder: runs that were hurt, files that are not ours, full disks. Each has one stated behaviour."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_record import checkpoint, config, finished, released, started

from velora.errors import ConfigError, RunError
from velora.run import record as record_module
from velora.run.record import Run


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} - {".lock"}


# Checkpoints


def test_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path, capsys):
    run = started(tmp_path)
    for step in (5, 10, 15):
        checkpoint(run, step, manifest=step != 15)
    (run.folder / "checkpoint-10" / "trainer_state.json").write_text("")
    (run.folder / "checkpoint-20-backup").mkdir()
    assert run.last_checkpoint() == run.folder / "checkpoint-5"
    said = capsys.readouterr().out
    assert "checkpoint-15 has no manifest.json" in said
    assert "checkpoint-10/trainer_state.json has 0 bytes and was written with 2" in said
    assert "checkpoint-5 is used in its place" in said
    assert said.count("\n") == 1


def test_no_whole_checkpoint(tmp_path, capsys):
    run = started(tmp_path)
    assert run.last_checkpoint() is None
    assert capsys.readouterr().out == ""
    checkpoint(run, 5, manifest=False)
    assert run.last_checkpoint() is None
    assert "there is no whole one, so training starts again" in capsys.readouterr().out
    assert not run.has_checkpoint()


@pytest.mark.parametrize("phase", ["", "select"])
def test_required_resume_refuses_a_damaged_newest_checkpoint(tmp_path, phase):
    run = started(tmp_path)
    checkpoint(run, 5, phase)
    (checkpoint(run, 10, phase) / "trainer_state.json").unlink()
    released(run)
    with pytest.raises(
        ConfigError, match=r"resume=required: .*checkpoint-10/trainer_state.json is missing; resume=auto"
    ):
        Run(config(tmp_path, resume="required"))


def test_required_resume_refuses_a_checksum_that_differs(tmp_path):
    """Found when the checkpoint is read, not at the start: that would take as long as reading it."""
    run = started(tmp_path)
    checkpoint(run, 5)
    (checkpoint(run, 10) / "trainer_state.json").write_text("[]")
    released(run)
    again = Run(config(tmp_path, resume="required"))
    with pytest.raises(
        ConfigError, match=r"resume=required: .*checkpoint-10/trainer_state.json is not as it was written"
    ):
        again.last_checkpoint()


def test_required_resume_goes_on_from_a_whole_one(tmp_path):
    """Also where the process was killed while it wrote the next one, in this phase or in one that has none yet."""
    run = started(tmp_path)
    checkpoint(run, 5, "select")
    checkpoint(run, 10, "select", manifest=False)
    checkpoint(run, 2, "train", manifest=False)
    released(run)
    again = Run(config(tmp_path, resume="required"))
    assert again.last_checkpoint("select") == run.folder / "select" / "checkpoint-5"
    assert again.last_checkpoint("train") is None


def test_required_resume_of_a_run_without_a_finished_checkpoint(tmp_path):
    run = started(tmp_path)
    checkpoint(run, 5, manifest=False)
    released(run)
    with pytest.raises(ConfigError, match="holds no checkpoint to continue from"):
        Run(config(tmp_path, resume="required"))


@pytest.mark.parametrize("changes", [{"overwrite": True}, {"resume": "never"}])
def test_what_is_given_up_is_not_continued(tmp_path, changes):
    """Also not by a second process that looks before the first one has cleared the folder."""
    run = started(tmp_path)
    checkpoint(run, 5)
    released(run)
    assert Run(config(tmp_path, **changes)).last_checkpoint() is None


def test_seal_writes_the_manifest_and_rotates(tmp_path):
    run = started(tmp_path)
    for step in (1, 2, 3):
        checkpoint(run, step, "select", manifest=False)
        run.seal(step, "select")
    assert names(run.folder / "select") == {"checkpoint-2", "checkpoint-3"}
    assert run.last_checkpoint("select").name == "checkpoint-3"


def test_left_over_checkpoints_of_a_finished_run_go_at_the_next_start(tmp_path):
    run = finished(tmp_path)
    checkpoint(run, 3)
    checkpoint(run, 2, "select", manifest=False)
    (run.folder / "checkpoint-3-backup").mkdir()
    assert Run(config(tmp_path)).is_finished()
    assert names(run.folder) == {"config.yaml", "metrics.jsonl", "result.json", "select", "checkpoint-3-backup"}
    assert not list((run.folder / "select").iterdir())


def test_the_end_of_a_run_deletes_only_checkpoints(tmp_path):
    run = started(tmp_path)
    checkpoint(run, 3)
    (run.folder / "checkpoint-6-backup").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("x")
    (run.folder / "checkpoint-9").symlink_to(tmp_path / "elsewhere")
    run.finish("ok", None, {})
    assert {"checkpoint-6-backup", "checkpoint-9"} <= names(run.folder)
    assert "checkpoint-3" not in names(run.folder)
    assert (tmp_path / "elsewhere" / "kept").exists()


# Files that are not ours, or hurt

NOT_OURS = {
    "a list": "- 1\n- 2\n",
    "no YAML": "a: [1\nb: }",
    "empty": "",
    "a word": "hello",
    "another program's": "name: x\nseed: 0\n",
    "a date that does not exist": "name: 2024-13-45",
    "a tag": "name: !!python/object:os.system x",
    "deep": "[" * 1200,
}


@pytest.mark.parametrize("text", NOT_OURS.values(), ids=NOT_OURS)
@pytest.mark.parametrize("changes", [{}, {"overwrite": True}, {"resume": "never"}])
def test_config_yaml_that_is_not_ours(tmp_path, text, changes):
    folder = tmp_path / "a" / "seed0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(text)
    (folder / "photo.jpg").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"config.yaml is no configuration of velora-train \(.*neither continued nor emptied"
    ):
        Run(config(tmp_path, **changes))
    assert names(folder) == {"config.yaml", "photo.jpg"}


def test_config_yaml_that_is_not_text(tmp_path):
    released(started(tmp_path))
    (tmp_path / "a/seed0/config.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match=r"is no configuration of velora-train \(it cannot be read\)"):
        Run(config(tmp_path))


@pytest.mark.parametrize("changes", [{"overwrite": True}, {"resume": "never"}])
def test_a_folder_without_our_config_is_not_emptied(tmp_path, changes):
    folder = tmp_path / "a" / "seed0"
    (folder / "thesis").mkdir(parents=True)
    (folder / "thesis" / "chapter1").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds thesis but no config.yaml of velora-train.*give another name="):
        Run(config(tmp_path, **changes))
    assert (folder / "thesis" / "chapter1").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json", "checkpoint-5"])
def test_a_run_without_its_config_is_not_continued(tmp_path, name):
    folder = tmp_path / "a" / "seed0"
    folder.mkdir(parents=True)
    (folder / name).mkdir() if name == "checkpoint-5" else (folder / name).write_text("{}")
    with pytest.raises(ConfigError, match=f"holds {name} but no config.yaml"):
        Run(config(tmp_path))


@pytest.mark.parametrize("changes", [{}, {"overwrite": True}, {"resume": "never"}])
def test_what_a_killed_start_leaves_is_no_obstacle(tmp_path, changes):
    folder = tmp_path / "a" / "seed0"
    folder.mkdir(parents=True)
    (folder / ".lock").touch()  # of a process that is dead
    (folder / "config.yaml.part").write_text("name: ")
    run = Run(config(tmp_path, **changes))
    run.start()
    assert names(folder) == {"config.yaml"}


@pytest.mark.parametrize("link", ["a", "a/seed0"])
@pytest.mark.parametrize("changes", [{}, {"overwrite": True}])
def test_a_link_to_another_place_is_refused(tmp_path, link, changes):
    run = finished(tmp_path / "elsewhere")
    runs = tmp_path / "runs"
    (runs / link).parent.mkdir(parents=True)
    (runs / link).symlink_to(tmp_path / "elsewhere" / link)
    with pytest.raises(ConfigError, match=f"{runs / link} is a link to another place"):
        Run(config(runs, **changes))
    assert (run.folder / "result.json").exists()


def test_runs_dir_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    released(started(tmp_path / "runs"))
    assert (tmp_path / "disk/a/seed0/config.yaml").exists()


def test_overwrite_removes_a_link_and_not_what_it_points_to(tmp_path):
    run = finished(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "kept").write_text("x")
    (run.folder / "data").symlink_to(tmp_path / "data")
    again = Run(config(tmp_path, overwrite=True))
    again.start()
    assert names(run.folder) == {"config.yaml"}
    assert (tmp_path / "data" / "kept").exists()


def test_overwrite_that_was_killed_while_emptying_can_be_given_again(tmp_path, monkeypatch):
    run = finished(tmp_path)
    monkeypatch.setattr(record_module, "write_whole", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    killed = Run(config(tmp_path, overwrite=True))
    with pytest.raises(KeyboardInterrupt):
        killed.start()
    released(killed)
    monkeypatch.undo()
    assert names(run.folder) == {"config.yaml"}
    Run(config(tmp_path, overwrite=True)).start()


BROKEN_RESULTS = {
    "a list": ("[]", "input should be"),
    "without status": (json.dumps({"name": "a"}), "status is missing|more"),
    "empty": ("", "it is not JSON"),
    "half": ('{"name": "a", "sta', "it is not JSON"),
    "null": ("null", "input should be"),
}


@pytest.mark.parametrize(("text", "reason"), BROKEN_RESULTS.values(), ids=BROKEN_RESULTS)
def test_result_json_that_is_no_record(tmp_path, text, reason):
    run = finished(tmp_path)
    (run.folder / "result.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"result.json is no record of velora-train \(.*({reason}).*overwrite=true"):
        Run(config(tmp_path))
    assert (run.folder / "result.json").read_text() == text
    Run(config(tmp_path, overwrite=True)).start()


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json"])
def test_a_folder_where_the_run_writes_a_file(tmp_path, name):
    run = started(tmp_path)
    released(run)
    (run.folder / name).unlink(missing_ok=True)
    (run.folder / name).mkdir()
    with pytest.raises(ConfigError, match=f"{name} is a folder, and the run writes something else there; move it away"):
        Run(config(tmp_path))


@pytest.mark.parametrize("place", ["checkpoint-3", "select/checkpoint-3"])
def test_a_file_where_the_run_writes_a_checkpoint(tmp_path, place):
    run = started(tmp_path)
    released(run)
    (run.folder / place).parent.mkdir(exist_ok=True)
    (run.folder / place).write_text("x")
    with pytest.raises(ConfigError, match=f"{place} is a file, and the run writes something else there; move it away"):
        Run(config(tmp_path))


def test_lines_of_the_metrics_that_are_none(tmp_path, capsys):
    run = started(tmp_path)
    with run.metrics_file.open("ab") as file:
        for line in (
            b"[]",
            b"\xff",
            b'{"step": 2}',
            b'{"phase": "train", "step": "2"}',
            b'{"phase": "train", "step": NaN}',
            b"{",
        ):
            file.write(line + b"\n")
        file.write(b'{"phase": "train", "step": 2, "loss": 0.5}\n{"phase": "train", "step": 3, "lo')
    run.rewind_metrics("train", 5)
    assert [json.loads(x)["step"] for x in run.metrics_file.read_text().splitlines()] == [1, 2]
    said = capsys.readouterr().out
    assert "left out what is no line of ours: line 2: " in said
    assert "line 3: it is not UTF-8" in said


def test_half_a_line_at_the_end_goes_without_a_word(tmp_path, capsys):
    run = started(tmp_path)
    with run.metrics_file.open("a") as file:
        file.write('{"phase": "train", "step": 2, "more": {"a": 1}')  # ends with a brace and is no line
    run.rewind_metrics("train", 5)
    assert capsys.readouterr().out == ""
    run.log({"phase": "train", "step": 2})
    assert [json.loads(x)["step"] for x in run.metrics_file.read_text().splitlines()] == [1, 2]


# Whose run it is


def test_the_record_counts_where_it_is_of_another_configuration_than_config_yaml(tmp_path):
    run = finished(tmp_path, raw={"trainer": {"max_steps": 4}})
    (run.folder / "config.yaml").write_text(json.dumps(config(tmp_path).raw))
    for changes in ({}, {"resume": "never"}):
        with pytest.raises(ConfigError, match=r"different: trainer.max_steps\)"):
            Run(config(tmp_path, **changes))
    assert (run.folder / "result.json").exists()


def test_another_configuration_of_a_finished_run_is_refused_with_resume_never_too(tmp_path):
    finished(tmp_path)
    with pytest.raises(ConfigError, match=r"different: trainer.max_steps\)"):
        Run(config(tmp_path, resume="never", raw={"trainer": {"max_steps": 4}}))


def test_a_finished_run_stays_finished_when_a_later_process_is_refused(tmp_path):
    run = finished(tmp_path)
    before = (run.folder / "result.json").read_bytes()
    attempts = [{"raw": {"trainer": {"max_steps": 9}}}, {"resume": "required", "overwrite": True}]
    for changes in attempts:
        with pytest.raises(ConfigError):
            Run(config(tmp_path, **changes))
    with pytest.raises(AssertionError, match="a finished run is not started again"):
        Run(config(tmp_path)).start()
    assert (run.folder / "result.json").read_bytes() == before
    assert Run(config(tmp_path)).is_finished()


def test_a_finished_run_on_a_disk_that_cannot_be_written(tmp_path, monkeypatch):
    finished(tmp_path)

    def failing(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", failing)
    assert Run(config(tmp_path)).is_finished()


def test_only_one_of_two_processes_may_write(tmp_path):
    """Across processes: the lock is held by a living one, and gone with it."""
    run = started(tmp_path)
    code = (
        "import sys, pathlib; sys.path[:0] = sys.argv[2:]\n"
        "from test_record import config, Run, ConfigError\n"
        "try: Run(config(pathlib.Path(sys.argv[1])))\n"
        "except ConfigError as error: sys.exit(str(error))"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert "another process is writing" in refused.stderr
    released(run)
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0


def test_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    run = Run(config(tmp_path))
    assert "cannot be locked (No locks available)" in capsys.readouterr().out
    run.start()


def test_what_changed_while_the_lock_was_awaited_is_seen(tmp_path, monkeypatch):
    """Another process takes, finishes and leaves the folder between our first look and our lock."""
    take = Run._take_folder

    def late(self):
        monkeypatch.setattr(Run, "_take_folder", take)
        finished(tmp_path, raw={"trainer": {"max_steps": 9}})
        take(self)

    monkeypatch.setattr(Run, "_take_folder", late)
    with pytest.raises(ConfigError, match="another configuration"):
        Run(config(tmp_path))


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = started(tmp_path)
    run.rewind_metrics("train", 0)
    run.seal(3)
    assert run.finish("ok", None, {})["status"] == "ok"
    assert not run.folder.exists()


# Disks


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


# What is measured


def test_scores_of_numpy_and_torch_are_numbers(tmp_path):
    run = started(tmp_path)
    scores = {"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(0.25), "d": np.float64("nan")}
    run.log({"phase": "train", "step": 2, **scores})
    assert json.loads(run.metrics_file.read_text().splitlines()[-1]) == {
        "phase": "train", "step": 2, "a": 0.5, "b": 3, "c": 0.25, "d": None,
    }  # fmt: skip
    assert run.finish("ok", None, {"metrics": scores})["metrics"] == {
        "a": 0.5,
        "b": 3,
        "c": 0.25,
        "d": None,
        "best": {},
    }


def test_a_score_that_is_no_number(tmp_path):
    run = started(tmp_path)
    with pytest.raises(RunError, match=r"the metric accuracy='high': is not a number"):
        run.log({"phase": "train", "step": 2, "accuracy": "high"})
    with pytest.raises(RunError, match=r"does not fit into result.json \(metrics.accuracy='high': is not a number\)"):
        run.finish("ok", None, {"metrics": {"accuracy": "high"}})
    left = json.loads((run.folder / "result.json").read_text())
    assert left["status"] == "failed"
    assert "accuracy='high'" in left["error"]
    assert run.finish("diverged", "loss is nan", {"memory": {"weights_bytes": "4"}})["status"] == "diverged"
