"""VTAB-1k: nineteen image tasks with 1000 training images each (arXiv 1910.04867)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from velora.config.parts import Head, Task, TaskData
from velora.data.lists import count_classes, describe_list, doubts, read_list
from velora.data.protocol import PROTOCOLS, Protocol, protocol_problems, splits_of

if TYPE_CHECKING:
    from velora.config.run import Config


class VTAB(Task):
    """One of the tasks, from image lists below data.root/vtab/<folder>, or from the hub's archive of all of them.

    The folder holds train800.txt, val200.txt, train800val200.txt and test.txt, and where the number of classes is not the
    official one (a subset such as dtd_subset10), classes.txt with a line per class.

    `protocol`: "select_then_retrain", the benchmark's own; "best_on_test", which the published repositories of
    SSF, Hydra, NOAH and FacT use; "last". `keep_decoded`: splits of up to so many images are kept decoded in memory.
    """

    kind: Literal["vtab"]
    folder: str
    group: Literal["natural", "specialized", "structured"]
    num_classes: PositiveInt
    protocol: Protocol
    keep_decoded: NonNegativeInt
    hub: str  # "<dataset repository>:<zip file>"

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        yield from protocol_problems(self.protocol, config)
        if not self.hub.partition(":")[0] or not self.hub.partition(":")[2]:
            yield f"task.hub={self.hub} is not <dataset repository>:<zip file>"
        if not self.folder or Path(self.folder).is_absolute() or ".." in Path(self.folder).parts:
            yield f"task.folder={self.folder!r} is not the name of a folder below data.root/vtab"
            return
        if config.data.root is not None and config.data.root.is_dir() and not self._folder(config.data.root).is_dir():
            vtab = config.data.root / "vtab"
            present = sorted(p.name for p in vtab.iterdir() if p.is_dir()) if vtab.is_dir() else []
            yield (
                f"task.folder={self.folder}: {self._folder(config.data.root)} does not exist; "
                + (f"there are {', '.join(present)}" if present else f"{vtab} has no task folders")
            )

    def head(self, config: Config) -> Head:
        folder = None if config.data.root is None else self._folder(config.data.root)
        return Head("image_classification", num_labels=self._num_classes(folder))

    def batch_shapes(self, batch_size: int, config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
        from velora.data.images import image_batch_shapes

        return image_batch_shapes(batch_size, config.model.image_size)  # type: ignore[attr-defined]

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        from velora.data.images import image_split, image_task_data
        from velora.run.notes import note

        folder = self._folder(config.data.root) if config.data.root is not None else self._download()
        num_classes = self._num_classes(folder)
        lists = {name: read_list(folder / f"{name}.txt", num_classes) for name in splits_of(self.protocol)}
        notes = list(doubts(lists, num_classes))
        if num_classes != self.num_classes:
            notes.append(f"the {num_classes} classes of classes.txt count, not task.num_classes={self.num_classes}")
        for text in notes:
            note(f"{folder}: {text}")
        splits = {name: image_split(listed, preprocessor, self.keep_decoded) for name, listed in lists.items()}
        about = {
            "source": str(folder) if config.data.root is not None else self.hub,
            "folder": self.folder,
            "group": self.group,
            "num_classes": num_classes,
            "official_num_classes": self.num_classes,
            "protocol": self.protocol,
            "protocol_means": PROTOCOLS[self.protocol],
            "split_files": {f"{n}.txt": describe_list(folder / f"{n}.txt", listed) for n, listed in lists.items()},
            "notes": notes,
            "preprocessing": preprocessor.describe(),
        }
        return image_task_data(self.protocol, splits, preprocessor, about)

    def _folder(self, root: Path) -> Path:
        return root / "vtab" / self.folder

    def _num_classes(self, folder: Path | None) -> int:
        """Lines of classes.txt where it exists, else the official number."""
        file = None if folder is None else folder / "classes.txt"
        if file is None or not file.is_file():
            return self.num_classes
        return count_classes(file)

    def _download(self) -> Path:
        """The task's folder out of the hub's archive, unpacked once beside it."""
        from velora.data.archive import unpack_folder
        from velora.models.hub import load

        repository, _, name = self.hub.partition(":")

        def fetch() -> str:
            from huggingface_hub import hf_hub_download

            return hf_hub_download(repository, name, repo_type="dataset")

        remedy = (
            f"give data.root=DIR with vtab/{self.folder}/{{{','.join(splits_of(self.protocol))}}}.txt and its images"
        )
        return unpack_folder(Path(load(f"the archive {self.hub} (about 5 GB)", remedy, fetch)), self.folder)
