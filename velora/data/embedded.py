"""Whichever embedded task fits the model: the manual for language models, its topics for encoders, digits for images.

For runs over several families with one command, which could not name one task for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from velora.config.parts import Head, Modality, Task, TaskData, part_class

if TYPE_CHECKING:
    from velora.config.run import Config

_KINDS: dict[Modality, str] = {
    "causal_lm": "manual",
    "sequence_classification": "topics",
    "image_classification": "digits",
}


class Embedded(Task):
    kind: Literal["embedded"]
    options: dict[str, dict[str, Any]]  # keys for the task behind it, by its kind

    def task_for(self, config: Config) -> Task:
        """The task behind it."""
        return self._task(_KINDS[config.model.modalities()[0]])

    def _task(self, kind: str) -> Task:
        from velora.config.run import parse

        values = {"kind": kind, "name": self.name, **self.options.get(kind, {})}
        found = parse(part_class("task", kind, Task), values, f"task.options.{kind}")
        assert isinstance(found, Task)
        return found

    def problems(self, config: Config) -> Iterator[str]:
        for key in self.options.keys() - set(_KINDS.values()):
            yield f"task.options.{key} is not a key; known keys here: {', '.join(sorted(_KINDS.values()))}"
        for kind in _KINDS.values():
            self._task(kind)  # its options are read here, also where another model is trained
        yield from self.task_for(config).problems(config)

    def head(self, config: Config) -> Head:
        return self.task_for(config).head(config)

    def load(self, preprocessor: Any, config: Config) -> TaskData:
        return self.task_for(config).load(preprocessor, config)

    def batch_shapes(self, batch_size: int, config: Config) -> dict[str, tuple[tuple[int, ...], str]]:
        return self.task_for(config).batch_shapes(batch_size, config)
