"""VTAB-1k: nineteen image tasks with 1000 training images each (arXiv 1910.04867). No torch at the top: `head` counts classes.

A split is a text file in UTF-8, one image a line: a path relative to its folder and within it, blanks or tabs, a label (an
integer from 0). This is the layout that SSF, Hydra, NOAH and FacT share for VTAB-1k. A path that leaves the folder is
refused: such a list means other images, or none, on the next machine.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from velora.config.parts import TaskData
from velora.config.task import PROTOCOLS, VTAB
from velora.data.archive import unpack_folder
from velora.errors import ConfigError
from velora.models import hub
from velora.run.notes import note

Listed = list[tuple[Path, int]]

_LINE = re.compile(r"(.*\S)[ \t]+([0-9]+)[ \t]*")  # names may hold blanks
_SHOWN = 200  # characters of a bad line that a sentence shows


def load(task: VTAB, transform: Any, root: Path | None) -> TaskData:
    from velora.data.images import image_split, image_task_data

    folder = _download(task) if root is None else task.folder_below(root)
    num_classes = task.classes_of(folder)
    lists = {name: read_list(folder / f"{name}.txt", num_classes) for name in task.splits}
    notes = list(doubts(lists, num_classes))
    if num_classes != task.num_classes:
        notes.append(f"the {num_classes} classes of classes.txt count, not task.num_classes={task.num_classes}")
    for text in notes:
        note(f"{folder}: {text}")
    splits = {name: image_split(listed, transform, task.keep_decoded) for name, listed in lists.items()}
    about = {
        "source": task.hub if root is None else str(folder),
        "folder": task.folder,
        "group": task.group,
        "num_classes": num_classes,
        "official_num_classes": task.num_classes,
        "protocol": task.protocol,
        "protocol_means": PROTOCOLS[task.protocol],
        "split_files": {f"{n}.txt": describe_list(folder / f"{n}.txt", listed) for n, listed in lists.items()},
        "notes": notes,
        "preprocessing": transform.describe(),
    }
    return image_task_data(task.protocol, splits, transform, about)


def _download(task: VTAB) -> Path:
    """The task's folder out of the hub's archive, unpacked once beside it."""
    repository, _, name = task.hub.partition(":")

    def fetch() -> str:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(repository, name, repo_type="dataset")

    remedy = f"give data.root=DIR with vtab/{task.folder}/{{{','.join(task.splits)}}}.txt and its images"
    return unpack_folder(Path(hub.load(f"the archive {task.hub} (about 5 GB)", remedy, fetch)), task.folder)


def read_list(file: Path, num_classes: int) -> Listed:
    """(path, label) of each line; ConfigError for a missing, empty or malformed list, naming file and line."""
    if not file.is_file():
        raise ConfigError(f"{file} is missing: each line of it must be <relative image path> <label>")
    labels: dict[Path, int] = {}
    found: Listed = []
    for number, line in _lines(file):
        try:
            path, label = _read_line(file.parent, line, num_classes)
            if labels.setdefault(path, label) != label:
                raise ValueError(
                    f"label {label} contradicts an earlier line, where this image has label {labels[path]}"
                )
        except ValueError as error:
            raise ConfigError(f"{file}, line {number}: {error}") from None
        found.append((path, label))
    if not found:
        raise ConfigError(f"{file} is empty: no image is listed in it")
    return found


def count_classes(file: Path) -> int:
    """Lines of classes.txt (<label> <name>); ConfigError where there are none, or their labels are not 0 to n - 1."""
    first = [line.split()[0] for _, line in _lines(file)]
    if not first:
        raise ConfigError(f"{file} is empty: it must hold one line per class, <label> <name>")
    numbered = all(word.isdecimal() for word in first)  # else it holds names alone
    if numbered and {word.lstrip("0") or "0" for word in first} != {str(i) for i in range(len(first))}:
        raise ConfigError(f"{file} must number its {len(first)} classes 0 to {len(first) - 1}, each once")
    return len(first)


def describe_list(file: Path, listed: Listed) -> dict[str, Any]:
    """For the record of a run: which split this was."""
    return {"num_images": len(listed), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def doubts(lists: Mapping[str, Listed], num_classes: int) -> Iterator[str]:
    """Sentences about lists that can be used and may not be what is meant; `lists` by the names of VTAB-1k's splits."""
    for name, listed in lists.items():
        if again := len(listed) - len(dict(listed)):
            yield f"lines of {name}.txt that list an image again: {again}"
    for train, test in (("train800", "val200"), ("train800val200", "test")):
        trained = dict(lists.get(train, []))
        if both := sum(path in trained for path, _ in lists.get(test, [])):
            yield f"{both} of the {len(lists[test])} images of {test}.txt stand in {train}.txt too: they are trained on"
    unseen = num_classes - len({label for _, label in lists["train800val200"]})
    if unseen:
        yield f"{unseen} of the {num_classes} classes have no image in train800val200.txt"


def _lines(file: Path) -> list[tuple[int, str]]:
    """(number from 1, text) of the lines that are not blank; a byte-order mark and Windows' line ends are read over."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise ConfigError(f"{file} is not UTF-8 text ({reason}): save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _read_line(folder: Path, line: str, num_classes: int) -> tuple[Path, int]:
    matched = _LINE.fullmatch(line)
    if not matched:
        raise ValueError(f"{line[:_SHOWN]!r} is not <relative image path> <label>")
    name, label = matched[1], matched[2].lstrip("0") or "0"
    if len(label) > len(str(num_classes)) or int(label) >= num_classes:
        raise ValueError(
            f"label {label[:_SHOWN]} is out of range, the task has {num_classes} classes (0 to {num_classes - 1})"
        )
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"the image {name[:_SHOWN]} is not below {folder}: give a path relative to that folder")
    if not os.path.isfile(folder / name):  # Path.is_file raises for a name that is too long
        raise ValueError(f"the image {name[:_SHOWN]} does not exist in {folder}")
    return folder / name, int(label)
