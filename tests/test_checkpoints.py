"""Checkpoints with a manifest: which one is whole, which one is used, which ones go."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from velora.run.checkpoints import checkpoints, damage, newest_whole, non_finite_tensors, rotate, write_manifest

FILES = {
    "model.safetensors": b"weights" * 100,
    "optimizer.pt": b"moments" * 200,
    "scheduler.pt": b"schedule",
    "rng_state_0.pth": b"rank 0",
    "rng_state_1.pth": b"rank 1",
    "trainer_state.json": b'{"global_step": 3}',
    "adapter/adapter.safetensors": b"low rank",
}


def checkpoint(folder: Path, step: int, manifest: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    if manifest:
        write_manifest(path)
    return path


def test_manifest_names_every_file_with_size_and_checksum(tmp_path):
    path = checkpoint(tmp_path, 3)
    assert json.loads((path / "manifest.json").read_text())["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in FILES.items()
    }
    assert damage(path) is None
    assert not list(path.rglob("*.part"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("hurt", ["cut", "empty", "missing", "longer", "one bit", "a folder"])
def test_each_damage_of_each_file_is_found_and_named(tmp_path, name, hurt):
    path = checkpoint(tmp_path, 3)
    file, content = path / name, FILES[name]
    if hurt in ("missing", "a folder"):
        file.unlink()
    if hurt == "a folder":
        file.mkdir()
    if hurt in ("cut", "empty", "longer", "one bit"):
        other = bytes([content[0] ^ 1]) + content[1:]
        file.write_bytes({"cut": content[:-1], "empty": b"", "longer": content + b"x", "one bit": other}[hurt])
    sentence = damage(path)
    assert str(file) in sentence
    reason = {"missing": "is missing", "a folder": "is missing", "one bit": "its checksum differs"}
    assert reason.get(hurt, f"was written with {len(content)}") in sentence
    assert (damage(path, checksums=False) is None) == (hurt == "one bit")  # names and sizes only


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"files": {}}', '{"files": []}', '{"files": {"a": {}}}', "\0"]
)
def test_damaged_manifest(tmp_path, text):
    path = checkpoint(tmp_path, 3)
    (path / "manifest.json").write_text(text)
    assert f"{path / 'manifest.json'} cannot be read (" in damage(path)


def test_without_a_manifest_it_is_not_known_to_be_whole(tmp_path):
    sentence = damage(checkpoint(tmp_path, 3, manifest=False))
    assert "has no manifest.json" in sentence
    assert "not known to be whole" in sentence


def test_files_added_later_are_no_damage(tmp_path):
    path = checkpoint(tmp_path, 3)
    (path / "notes.txt").write_text("mine")
    assert damage(path) is None


def test_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = checkpoint(tmp_path, 3)
    whole_open = Path.open

    def failing(self, *args, **kwargs):
        if self.name == "optimizer.pt":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing)
    assert damage(path) == f"{path / 'optimizer.pt'} cannot be read (Input/output error)"


def test_full_disk_leaves_no_manifest(tmp_path, monkeypatch):
    path = checkpoint(tmp_path, 3, manifest=False)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_manifest(path)
    assert not list(path.glob("manifest.json*"))


def test_only_folders_with_a_step_in_their_name_are_checkpoints(tmp_path):
    for step in (3, 20, 100):
        checkpoint(tmp_path, step)
    for name in (
        "checkpoint-6-backup",
        "checkpoint-",
        "checkpoint-x",
        "my-checkpoint-7",
        "checkpoint-٣",
        "checkpoint-200.tmp",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-300").write_text("a file")
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]
    assert checkpoints(tmp_path / "absent") == []


def test_the_newest_whole_one_is_used_and_newer_ones_are_named(tmp_path):
    for step in (3, 6, 9, 12):
        checkpoint(tmp_path, step, manifest=step != 12)
    (tmp_path / "checkpoint-9" / "optimizer.pt").write_bytes(b"")
    found, damaged = newest_whole(tmp_path)
    assert found == tmp_path / "checkpoint-6"
    assert list(damaged) == [tmp_path / "checkpoint-12", tmp_path / "checkpoint-9"]
    assert "no manifest.json" in damaged[tmp_path / "checkpoint-12"]
    assert "optimizer.pt has 0 bytes" in damaged[tmp_path / "checkpoint-9"]
    assert newest_whole(tmp_path / "absent") == (None, {})


def test_rotation_goes_by_the_step_whatever_the_clock_says(tmp_path):
    for step, age in ((5, 0), (10, -1000), (100, -9000), (105, -90000)):  # the clock was set back again and again
        path = checkpoint(tmp_path, step)
        for file in (path, *path.iterdir()):
            os.utime(file, (10**9 + age, 10**9 + age))
    rotate(tmp_path, 105)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-105"]
    rotate(tmp_path, 105, keep=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-105"]


def test_rotation_deletes_nothing_that_is_not_ours(tmp_path):
    for step in (1, 2, 4, 5):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 3, manifest=False)
    checkpoint(tmp_path / "elsewhere", 1)
    (tmp_path / "checkpoint-0").symlink_to(tmp_path / "elsewhere" / "checkpoint-1")
    (tmp_path / "checkpoint-6-backup").mkdir()
    rotate(tmp_path, 4)  # 5 is newer than the one just saved: a damaged one, which the run will write again
    left = {"checkpoint-0", "checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-5", "checkpoint-6-backup"}
    assert {p.name for p in tmp_path.iterdir()} == left | {"elsewhere"}
    assert damage(tmp_path / "elsewhere" / "checkpoint-1") is None


def test_deletion_that_fails_is_no_error(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "unlink", refuse)
    rotate(tmp_path, 3)
    assert newest_whole(tmp_path)[0].name == "checkpoint-3"


def test_tensors_that_are_not_finite(tmp_path):
    one = {"good": torch.ones(3), "nan": torch.tensor([1.0, float("nan")]), "ids": torch.tensor([1, 2])}
    one["half"] = torch.tensor([float("inf")], dtype=torch.bfloat16)
    one["eight"] = torch.tensor([float("nan"), 1.0]).to(torch.float8_e4m3fn)
    one["layer.direction"] = torch.full((4,), float("nan"))  # a VeLoRA layer that was never calibrated
    one["other.direction"] = torch.tensor([float("nan"), 0.5])
    one["third.direction"] = torch.full((4,), float("inf"))
    save_file(one, str(tmp_path / "model.safetensors"))
    save_file({"adapter": torch.tensor(float("-inf"))}, str(tmp_path / "adapter.safetensors"))
    assert sorted(non_finite_tensors(tmp_path)) == [
        "adapter",
        "eight",
        "half",
        "nan",
        "other.direction",
        "third.direction",
    ]
