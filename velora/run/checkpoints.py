"""Checkpoints that are known to be whole: each one holds a manifest of its files, written as its last act.

    <phase folder>/checkpoint-<step>/manifest.json   {"files": {"model.safetensors": {"bytes": ..., "sha256": ...}, ...}}

A checkpoint without a manifest was not finished, or was written by a version that had none: it is not known to be whole and
never continued from. The same holds where a file of the manifest is missing, shorter or other than it was. A folder is a
checkpoint only if its name is `checkpoint-` and a number: `checkpoint-6-backup` belongs to somebody else. torch is imported
only where tensors are looked at.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from velora.run.files import why, write_whole
from velora.run.schema import Count, check, parse_json

MANIFEST = "manifest.json"


class _File(BaseModel):
    bytes: Count
    sha256: str


class _Manifest(BaseModel):
    files: dict[str, _File] = Field(min_length=1)


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint; None for any other name."""
    match = re.fullmatch(r"checkpoint-([0-9]+)", path.name)
    return int(match.group(1)) if match else None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of one phase, whole or not, in the order of their steps."""
    if not folder.is_dir():
        return []
    found = [(step, path) for path in folder.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found)]


def write_manifest(checkpoint: Path) -> None:
    """Take down all files of a checkpoint; the last act of writing it, in one move. OSError where that fails.

    Under several processes rank 0 calls it after a barrier, so that the random states of all ranks are in it. Reads every
    file once: 1.7 GB/s on one core with SHA instructions, about 0.5 GB/s without.
    """
    files = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": _checksum(path)}
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, MANIFEST + ".part")
    }
    write_whole(checkpoint / MANIFEST, json.dumps({"files": files}, indent=1) + "\n")


def has_manifest(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, whatever happened to it later. What a kill leaves has none."""
    return (checkpoint / MANIFEST).is_file()


def damage(checkpoint: Path, *, checksums: bool = True) -> str | None:
    """A sentence on what is wrong with a checkpoint, or None if it is whole.

    `checksums=False` compares names and sizes only, which takes no time; files that the manifest does not name do not count.
    """
    try:
        if not has_manifest(checkpoint):
            return (
                f"{checkpoint} has no {MANIFEST}: it was not written to its end, or by an earlier version, so it is not "
                "known to be whole"
            )
        manifest = check(_Manifest, parse_json((checkpoint / MANIFEST).read_bytes()))
    except ValueError as error:
        return f"{checkpoint / MANIFEST} cannot be read ({error})"
    except OSError as error:
        return f"{checkpoint / MANIFEST} cannot be read ({why(error)})"
    for name, file in manifest.files.items():
        path = checkpoint / name
        try:
            if not path.is_file():
                return f"{path} is missing"
            if (size := path.stat().st_size) != file.bytes:
                return f"{path} has {size} bytes and was written with {file.bytes}"
        except OSError as error:
            return f"{path} cannot be read ({why(error)})"
    for name, file in manifest.files.items() if checksums else ():
        path = checkpoint / name
        try:
            if _checksum(path) != file.sha256:
                return f"{path} is not as it was written (its checksum differs)"
        except OSError as error:
            return f"{path} cannot be read ({why(error)})"
    return None


def newest_whole(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint of one phase (None: there is none), and for each newer one a sentence on its damage."""
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints(folder)):
        sentence = damage(checkpoint)
        if sentence is None:
            return checkpoint, damaged
        damaged[checkpoint] = sentence
    return None, damaged


def rotate(folder: Path, step: int, keep: int = 2) -> None:
    """After `step` was saved: remove our checkpoints before it but for the newest, so that `keep` remain with it.

    The order is that of the steps, whatever the clock says, and the one just saved is never removed. What has no manifest is
    not ours, and what is newer than `step` (a damaged one, which the run will write again) is left alone.
    """
    ours = [p for p in checkpoints(folder) if has_manifest(p) and not p.is_symlink()]
    older = [path for path in ours if (step_of(path) or 0) < step]
    for path in older[: max(0, len(older) - (keep - 1))]:
        remove(path)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint. What cannot be deleted stays, and that is no error: it costs space, not a result."""
    shutil.rmtree(checkpoint, ignore_errors=True)


def non_finite_tensors(checkpoint: Path) -> list[str]:
    """Names of the tensors in a whole checkpoint's safetensors files that hold NaN or infinity; one at a time is in memory.

    The directions of a VeLoRA layer that was never calibrated are NaN throughout by design, and are left out.
    """
    return [name for path in sorted(checkpoint.glob("*.safetensors")) for name in _non_finite(path)]


def _non_finite(path: Path) -> Iterator[str]:
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is not a dictionary
            tensor: Any = file.get_tensor(name)
            if not tensor.is_floating_point():
                continue
            finite = torch.isfinite(
                tensor if tensor.element_size() > 1 else tensor.float()
            )  # no kernel for 8-bit floats
            uncalibrated = name.rpartition(".")[2] in ("direction", "average") and bool(tensor.isnan().all())
            if not finite.all() and not uncalibrated:
                yield name


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
