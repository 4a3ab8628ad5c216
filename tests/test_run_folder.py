"""What a run finds in its folder: files that are not ours, or hurt; another process; another run. Each has one stated behaviour."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from record_helpers import config, finished, names, released, started

from velora.errors import ConfigError
from velora.run import record as record_module
from velora.run.record import Run

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


def test_only_one_of_two_processes_may_write(tmp_path):
    """Across processes: the lock is held by a living one, and gone with it."""
    run = started(tmp_path)
    code = (
        "import sys, pathlib; sys.path[:0] = sys.argv[2:]\n"
        "from record_helpers import config, Run\n"
        "from velora.errors import ConfigError\n"
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
