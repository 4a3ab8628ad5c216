"""The checkpoints that a run finds in its folder: damaged, unfinished, left over. Each has one stated behaviour."""

from __future__ import annotations

import pytest
from record_helpers import checkpoint, config, finished, names, released, started

from velora.errors import ConfigError
from velora.run.record import Run


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
