"""The tasks (the group `task`): those on images here, those on text in task_text.py. Their data is read in `velora/data`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from velora.config.mmlu import MMLU
from velora.config.parts import Head, Modality, Task, TaskData, part_class
from velora.config.read import parse
from velora.config.task_alpaca import Alpaca, AlpacaMMLU
from velora.config.task_text import C4, Glue, Manual, Shapes, Topics

if TYPE_CHECKING:
    from velora.config.run import Config

__all__ = ["C4", "MMLU", "VTAB", "Alpaca", "AlpacaMMLU", "Digits", "Embedded", "Glue", "Manual", "Topics"]

Protocol = Literal["select_then_retrain", "best_on_test", "last"]

PROTOCOLS: dict[Protocol, str] = {
    "select_then_retrain": "epoch selected on the 200 validation images, then trained on all 1000, then tested",
    "best_on_test": "best epoch on the TEST set, as the published repositories do; optimistic",
    "last": "trained on all 1000 images and tested at the end; nothing selected",
}


class ImageTask(Task):
    """Image classification with the four splits of VTAB-1k. `protocol`: how an epoch is chosen, see PROTOCOLS."""

    protocol: Protocol

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that the protocol reads."""
        retrain = ("train800val200", "test")
        return ("train800", "val200", *retrain) if self.protocol == "select_then_retrain" else retrain

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        if self.protocol != "last" and config.trainer.eval_every == "end":
            yield (
                f"task.protocol={self.protocol} selects an epoch, and trainer.eval_every=end evaluates only the last one; "
                "give trainer.eval_every=epoch, or task.protocol=last"
            )

    def batch_shapes(self, batch_size: int, config: Config) -> Shapes:
        size: int = config.model.image_size  # type: ignore[attr-defined]
        return {"pixel_values": ((batch_size, 3, size, size), "float32"), "labels": ((batch_size,), "int64")}


class Digits(ImageTask):
    """The embedded vision task: the handwritten digits of scikit-learn."""

    kind: Literal["digits"]

    def head(self, config: Config) -> Head:
        return Head("image_classification", num_labels=10)

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        from velora.data.digits import load

        return load(self, preprocessor)


class VTAB(ImageTask):
    """One of the tasks of VTAB-1k, from image lists below data.root/vtab/<folder>, or from the hub's archive of all of them.

    The folder holds train800.txt, val200.txt, train800val200.txt and test.txt, and where the number of classes is not the
    official one (a subset such as dtd_subset10), classes.txt with a line per class.

    `protocol`: "select_then_retrain" is the benchmark's own; "best_on_test" what the published repositories of
    SSF, Hydra, NOAH and FacT use. `keep_decoded`: splits of up to so many images are kept decoded in memory.
    """

    kind: Literal["vtab"]
    folder: str
    group: Literal["natural", "specialized", "structured"]
    num_classes: PositiveInt
    keep_decoded: NonNegativeInt
    hub: str  # "<dataset repository>:<zip file>"

    def problems(self, config: Config) -> Iterator[str]:
        yield from super().problems(config)
        if not self.hub.partition(":")[0] or not self.hub.partition(":")[2]:
            yield f"task.hub={self.hub} is not <dataset repository>:<zip file>"
        if not self.folder or Path(self.folder).is_absolute() or ".." in Path(self.folder).parts:
            yield f"task.folder={self.folder!r} is not the name of a folder below data.root/vtab"
            return
        root = config.data.root
        if root is not None and root.is_dir() and not self.folder_below(root).is_dir():
            vtab = root / "vtab"
            present = sorted(p.name for p in vtab.iterdir() if p.is_dir()) if vtab.is_dir() else []
            yield (
                f"task.folder={self.folder}: {self.folder_below(root)} does not exist; "
                + (f"there are {', '.join(present)}" if present else f"{vtab} has no task folders")
            )

    def folder_below(self, root: Path) -> Path:
        return root / "vtab" / self.folder

    def classes_of(self, folder: Path | None) -> int:
        """Lines of classes.txt where it exists, else the official number."""
        from velora.data.vtab import count_classes

        file = None if folder is None else folder / "classes.txt"
        return self.num_classes if file is None or not file.is_file() else count_classes(file)

    def head(self, config: Config) -> Head:
        root = config.data.root
        return Head("image_classification", self.classes_of(None if root is None else self.folder_below(root)))

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        from velora.data.vtab import load

        return load(self, preprocessor, config.data.root)


_EMBEDDED: dict[Modality, str] = {
    "causal_lm": "manual",
    "sequence_classification": "topics",
    "image_classification": "digits",
}


class Embedded(Task):
    """Whichever embedded task fits the model: the manual for language models, its topics for encoders, digits for images.

    For runs over several families with one command, which could not name one task for all of them.
    """

    kind: Literal["embedded"]
    options: dict[str, dict[str, Any]]  # keys for the task behind it, by its kind

    def task_for(self, config: Config) -> Task:
        """The task behind it."""
        return self._task(_EMBEDDED[config.model.modalities()[0]])

    def _task(self, kind: str) -> Task:
        values = {"kind": kind, "name": self.name, **self.options.get(kind, {})}
        return parse(part_class("task", kind, Task), values, f"task.options.{kind}")  # type: ignore[return-value]

    def problems(self, config: Config) -> Iterator[str]:
        for key in self.options.keys() - set(_EMBEDDED.values()):
            yield f"task.options.{key} is not a key; known keys here: {', '.join(sorted(_EMBEDDED.values()))}"
        for kind in _EMBEDDED.values():
            self._task(kind)  # its options are read here, also where another model is trained
        yield from self.task_for(config).problems(config)

    def head(self, config: Config) -> Head:
        return self.task_for(config).head(config)

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        return self.task_for(config).load(preprocessor, config)

    def batch_shapes(self, batch_size: int, config: Config) -> Shapes:
        return self.task_for(config).batch_shapes(batch_size, config)
