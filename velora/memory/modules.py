"""Which module is running: the innermost one whose forward has been entered and not left.

Autograd numbers its nodes as it makes them. `ModuleStack` notes at which number each module was entered and left, so
that every node of the graph can be given to the module that made it, long afterwards and in the backward pass too.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class ModuleStack:
    """Follows a model through its forward while `watch()` is entered. The root module's path is the empty string."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.kinds = {path: type(module).__name__ for path, module in model.named_modules()}
        self._stack: list[str] = [""]
        self._numbers: list[int] = []  # of the next node, at each change of the stack
        self._paths: list[str] = []  # the innermost module from there on

    @property
    def current(self) -> str:
        return self._stack[-1]

    def of_node(self, node: Any) -> str:
        """Path of the module in whose forward a node of the autograd graph was made."""
        index = bisect.bisect_right(self._numbers, node._sequence_nr()) - 1
        return self._paths[index] if index >= 0 else ""

    def _changed(self) -> None:
        number = torch.autograd._get_sequence_nr()
        if self._numbers and self._numbers[-1] == number:  # nothing was made since the last change
            self._paths[-1] = self.current
        else:
            self._numbers.append(number)
            self._paths.append(self.current)

    def _enter(self, path: str) -> None:
        self._stack.append(path)
        self._changed()

    def _leave(self, path: str) -> None:
        left = self._stack.pop()
        assert left == path, "modules are left in the order in which they were entered"
        self._changed()

    @contextmanager
    def watch(self) -> Iterator[None]:
        handles = []
        for path, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda _m, _a, p=path: self._enter(p), prepend=True))
            handles.append(module.register_forward_hook(lambda _m, _a, _o, p=path: self._leave(p), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
