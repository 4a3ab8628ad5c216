"""One folder out of a large zip archive."""

from __future__ import annotations

import contextlib
import shutil
import stat
import tempfile
import time
import zipfile
from pathlib import Path, PurePosixPath

from velora.errors import ConfigError

ABANDONED_SECONDS = 24 * 3600  # a temporary folder so old was left by a process that was killed


def unpack_folder(archive: Path, folder: str) -> Path:
    """Unpack <anything>/<folder>/ of `archive` to a folder beside the archive, once, and return it.

    Several processes may do so at once: each unpacks to a temporary folder of its own and renames it when it is whole, and
    the first one wins. Raises ConfigError where the archive is damaged or has no such folder with a test.txt in it, where
    its entries are links or leave the folder, and where it cannot be written beside it (disk full).
    """
    target = archive.parent / f"{archive.stem}-unpacked" / folder
    if target.is_dir():
        return target
    with archive.open("rb") as stream:
        try:
            with zipfile.ZipFile(stream) as opened:
                _unpack(opened, _members(opened, archive, folder), target)
        except (ConfigError, MemoryError):
            raise
        except OSError as error:
            raise ConfigError(
                f"{archive} cannot be unpacked to {target.parent} ({error.strerror or error}): make room or rights there"
            ) from None
        except Exception as error:  # BadZipFile, zlib.error, EOFError, struct.error, RuntimeError for a password, ...
            raise ConfigError(
                f"{archive} is no zip archive that can be read ({error}): delete {archive.resolve()}, and it is loaded again"
            ) from None
    return target


def _members(opened: zipfile.ZipFile, archive: Path, folder: str) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """The files of the folder, by their path in it."""
    marks = [n for n in opened.namelist() if PurePosixPath(n).parts[-2:] == (folder, "test.txt")]
    if not marks:
        raise ConfigError(f"{archive} has no folder {folder} with a test.txt in it")
    prefix = str(PurePosixPath(marks[0]).parent) + "/"
    found = {}
    for entry in opened.infolist():
        if not entry.filename.startswith(prefix) or entry.is_dir():
            continue
        relative = PurePosixPath(entry.filename.removeprefix(prefix))
        if relative.is_absolute() or ".." in relative.parts:
            raise ConfigError(f"{archive} holds the path {entry.filename}, which leaves its folder")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise ConfigError(f"{archive} holds the link {entry.filename}: only files are unpacked")
        found[relative] = entry
    return found


def _unpack(opened: zipfile.ZipFile, members: dict[PurePosixPath, zipfile.ZipInfo], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = f"{target.name}.partial"
    for old in target.parent.iterdir():
        with contextlib.suppress(OSError):  # another process may be faster
            if old.name.startswith(partial) and time.time() - old.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix=f"{partial}-", dir=target.parent, ignore_cleanup_errors=True) as temporary:
        whole = Path(temporary) / target.name
        for relative, entry in members.items():
            file = whole / relative
            file.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(entry) as source, file.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        try:
            whole.rename(target)
        except OSError:
            if not target.is_dir():
                raise  # else another process was first, and its folder is the same
