"""One folder out of a large zip archive."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path, PurePosixPath

from velora.errors import ConfigError


def unpack_folder(archive: Path, folder: str) -> Path:
    """Unpack <anything>/<folder>/ of `archive` to a folder beside the archive, once, and return it.

    Raises ConfigError where the archive is no zip file or has no such folder with a test.txt in it.
    """
    target = archive.parent / f"{archive.stem}-unpacked" / folder
    if target.is_dir():
        return target
    try:
        with zipfile.ZipFile(archive) as opened:
            marks = [n for n in opened.namelist() if PurePosixPath(n).parts[-2:] == (folder, "test.txt")]
            if not marks:
                raise ConfigError(f"{archive} has no folder {folder} with a test.txt in it")
            prefix = str(PurePosixPath(marks[0]).parent) + "/"
            partial = target.with_name(target.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            members = [n for n in opened.namelist() if n.startswith(prefix) and not n.endswith("/")]
            for member in members:
                relative = PurePosixPath(member.removeprefix(prefix))
                if relative.is_absolute() or ".." in relative.parts:
                    raise ConfigError(f"{archive} holds the path {member}, which leaves its folder")
                file = partial / relative
                file.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, file.open("wb") as sink:
                    shutil.copyfileobj(source, sink)
    except zipfile.BadZipFile as error:
        raise ConfigError(f"{archive} is no zip archive: {error}") from None
    partial.rename(target)
    return target
