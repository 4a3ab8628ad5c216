"""Honest timing of a training loop: steps only, without the first ones, evaluations and checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

NUM_WARMUP_STEPS = 3


class Chrono:
    """Seconds and items (tokens or images) of the steps after the warm-up; `total_seconds` has the warm-up too.

    The wall clock runs from step end to step end, so waiting for data counts. On a GPU, whose work is queued, the clock is read
    without synchronisation within the window, and with one wherever the window begins, pauses or ends: what was queued
    before a pause is training, what is queued in it is not. A run that continues adds to what `state` kept.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = device, clock
        self.seconds = 0.0
        self.total_seconds = 0.0
        self.steps = 0
        self._skip = 0
        self._pending: list[Tensor | int] = []
        self._items: Tensor | int = 0
        self._since = clock()
        self._aside = 0.0

    def start(self, num_steps: int) -> None:
        self._skip = NUM_WARMUP_STEPS if num_steps > 2 * NUM_WARMUP_STEPS else 0
        self._since, self._aside = self.clock(), 0.0

    def count(self, items: Tensor | int) -> None:
        """Items of one micro-batch; a tensor stays on its device."""
        self._pending.append(items)

    def step(self) -> None:
        """An optimiser step has ended."""
        if self._skip == 1:
            self._synchronize()
        spent = self._lap()
        self.total_seconds += spent
        if self._skip > 0:
            self._skip -= 1
        else:
            self.seconds += spent
            self.steps += 1
            self._items = self._items + sum(self._pending)
        self._pending.clear()

    def finish(self) -> None:
        """The last step has ended: what the device still has queued belongs to it."""
        if self.device.type == "cuda":
            self._synchronize()
            spent = self._lap()
            self.total_seconds += spent
            self.seconds += spent if self.steps else 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._synchronize()
        begin = self.clock()
        try:
            yield
        finally:
            self._synchronize()
            self._aside += self.clock() - begin

    def items(self) -> Tensor:
        """Items of the window, on the device, in float64 (float32 where it has no float64)."""
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.as_tensor(self._items, device=self.device).to(wide)

    def state(self, items: float) -> dict[str, Any]:
        """For a checkpoint; `items` are those of all processes."""
        return {"seconds": self.seconds, "total_seconds": self.total_seconds, "steps": self.steps, "items": items}

    def load(self, state: dict[str, Any], *, with_items: bool) -> None:
        """Go on from `state`; `with_items` in one process only, since they are summed over processes again."""
        self.seconds, self.total_seconds, self.steps = state["seconds"], state["total_seconds"], state["steps"]
        self._items = int(state["items"]) if with_items else 0

    def _lap(self) -> float:
        now = self.clock()
        spent = now - self._since - self._aside
        self._since, self._aside = now, 0.0
        return spent

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
