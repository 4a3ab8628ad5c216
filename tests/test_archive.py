"""The VTAB archive under use by several processes, damage and full disks: all of a folder, or nothing and one sentence."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from velora.data import archive as _archive
from velora.data.archive import unpack_folder
from velora.errors import ConfigError

CONTENTS = {"test.txt": "images/0.png 0\n"} | {f"images/{i}.png": f"image {i}" * 50 for i in range(200)}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    with zipfile.ZipFile(tmp_path / "vtab.zip", "w") as opened:
        for name, text in CONTENTS.items():
            opened.writestr(f"vtab-1k/cifar/{name}", text)
    return tmp_path / "vtab.zip"


def contents(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*") if f.is_file()}


def start(archive: Path, before: str = "") -> subprocess.Popen[str]:
    unpack = f"_archive.unpack_folder(Path({str(archive)!r}), 'cifar')"
    code = f"from pathlib import Path; from velora.data import archive as _archive\n{before}\n{unpack}"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def beside(archive: Path) -> list[str]:
    folder = archive.parent / "vtab-unpacked"
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_folder_out_of_an_archive(archive, tmp_path):
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("vtab-1k/other/test.txt", "nothing")
    folder = unpack_folder(archive, "cifar")
    assert folder == tmp_path / "vtab-unpacked" / "cifar"
    assert contents(folder) == CONTENTS
    archive.unlink()
    assert unpack_folder(archive, "cifar") == folder  # once
    with pytest.raises(FileNotFoundError):
        unpack_folder(archive, "other")


def test_processes_at_once(archive, tmp_path):
    wait = f"""
import os, time
open({str(tmp_path)!r} + f"/ready{{os.getpid()}}", "w")
while not os.path.exists({str(tmp_path / "go")!r}): time.sleep(0.001)
"""
    running = [start(archive, wait) for _ in range(3)]
    wait_for(lambda: len(list(tmp_path.glob("ready*"))) == 3)
    (tmp_path / "go").touch()
    errors = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], errors
    assert beside(archive) == ["cifar"]
    assert contents(tmp_path / "vtab-unpacked" / "cifar") == CONTENTS


def test_the_first_process_wins(archive, tmp_path, monkeypatch):
    target, copy = tmp_path / "vtab-unpacked" / "cifar", shutil.copyfileobj

    def overtaken(source, sink):
        if not target.exists():
            monkeypatch.setattr(shutil, "copyfileobj", copy)
            unpack_folder(archive, "cifar")
            (target / "mark").touch()
        copy(source, sink)

    monkeypatch.setattr(shutil, "copyfileobj", overtaken)
    assert unpack_folder(archive, "cifar") == target
    assert contents(target) == {**CONTENTS, "mark": ""}
    assert beside(archive) == ["cifar"]


def test_a_killed_process_leaves_only_a_temporary_folder(archive, tmp_path):
    process = start(archive, "_archive.shutil.copyfileobj = lambda source, sink: __import__('time').sleep(60)")
    wait_for(lambda: any((tmp_path / "vtab-unpacked").rglob("test.txt")))
    process.kill()
    process.communicate()
    (left,) = beside(archive)
    assert left.startswith("cifar.partial-")
    assert contents(unpack_folder(archive, "cifar")) == CONTENTS
    assert beside(archive) == ["cifar", left]  # it could be another process that is still at work
    shutil.rmtree(tmp_path / "vtab-unpacked" / "cifar")
    old = time.time() - _archive.ABANDONED_SECONDS - 60
    os.utime(tmp_path / "vtab-unpacked" / left, (old, old))
    unpack_folder(archive, "cifar")
    assert beside(archive) == ["cifar"]


def test_bad_archives_are_refused(tmp_path):
    archive = tmp_path / "vtab.zip"
    archive.write_text("no archive")
    with pytest.raises(ConfigError, match="is no zip archive"):
        unpack_folder(archive, "cifar")
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("vtab-1k/other/test.txt", "nothing")
        opened.writestr("vtab-1k/bad/test.txt", "nothing")
        opened.writestr("vtab-1k/bad/../../../outside.txt", "nothing")
    with pytest.raises(ConfigError, match=r"has no folder cifar with a test\.txt in it"):
        unpack_folder(archive, "cifar")
    with pytest.raises(ConfigError, match="leaves its folder"):
        unpack_folder(archive, "bad")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_cut_archive(archive, share):
    archive.write_bytes(archive.read_bytes()[: int(archive.stat().st_size * share)])
    with pytest.raises(
        ConfigError, match=rf"vtab\.zip is no zip archive that can be read \(.+\): delete {archive}, and"
    ):
        unpack_folder(archive, "cifar")
    assert beside(archive) == []


def test_a_damaged_entry(archive):
    damaged = bytearray(archive.read_bytes())
    damaged[damaged.index(b"image 100") + 2] ^= 1
    archive.write_bytes(damaged)
    with pytest.raises(
        ConfigError, match=r"vtab\.zip is no zip archive that can be read \(Bad CRC-32 [^\n]*\): delete"
    ):
        unpack_folder(archive, "cifar")
    assert beside(archive) == []


def test_an_archive_with_a_password(archive):
    encrypted = bytearray(archive.read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        place = -1
        while (place := encrypted.find(signature, place + 1)) >= 0:
            encrypted[place + flags] |= 1
    archive.write_bytes(encrypted)
    with pytest.raises(ConfigError, match=r"is no zip archive that can be read \(.*encrypted, password required"):
        unpack_folder(archive, "cifar")
    assert beside(archive) == []


def test_links_and_paths_that_leave_the_folder(tmp_path):
    link = zipfile.ZipInfo("vtab/linked/images")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "vtab.zip", "w") as opened:
        for folder in ("linked", "up", "absolute"):
            opened.writestr(f"vtab/{folder}/test.txt", "")
        opened.writestr(link, "/etc")
        opened.writestr("vtab/up/../../../outside.txt", "")
        opened.writestr("vtab/absolute//outside.txt", "")
    for folder, sentence in {
        "linked": r"holds the link vtab/linked/images",
        "up": r"holds the path vtab/up/\.\./\.\./\.\./outside\.txt, which leaves its folder",
        "absolute": r"holds the path vtab/absolute//outside\.txt, which leaves its folder",
        "none": r"has no folder none with a test\.txt in it",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            unpack_folder(tmp_path / "vtab.zip", folder)
    assert beside(tmp_path / "vtab.zip") == []


def test_a_full_disk(archive, monkeypatch):
    written = []

    def full(source, sink):
        written.append(sink.write(source.read()))
        if len(written) == 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(
        ConfigError, match=r"vtab\.zip cannot be unpacked to .*vtab-unpacked \(No space left on device\): make"
    ):
        unpack_folder(archive, "cifar")
    assert beside(archive) == []
    monkeypatch.undo()
    assert contents(unpack_folder(archive, "cifar")) == CONTENTS


def test_a_file_where_the_folder_must_be(archive, tmp_path):
    (tmp_path / "vtab-unpacked").write_text("")
    with pytest.raises(ConfigError, match=r"vtab\.zip cannot be unpacked to .*vtab-unpacked \("):
        unpack_folder(archive, "cifar")
