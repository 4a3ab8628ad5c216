"""What a record says of the machine's software: versions, and the commit that the code runs from. No torch here."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("velora", "torch", "transformers", "datasets", "peft", "accelerate", "bitsandbytes", "timm", "hydra-core")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any]:
    """Commit of the checkout that this code runs from; nulls for an installed package. Records and figures do not count as
    changes: a sweep would call its own second run dirty."""
    folder = Path(__file__).parent.parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": None, "dirty": None}
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../conf")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
