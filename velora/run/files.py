"""Writing a file whole or not at all, and saying why it could not be done."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `path` in one move. A write that fails (OSError) leaves the old file as it was and no `.part` beside it."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # some file systems report a full disk only here
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def why(error: OSError) -> str:
    """The operating system's words for an error, without number and path."""
    return error.strerror or str(error) or type(error).__name__
