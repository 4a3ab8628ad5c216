"""Honest timing of a training loop: steps only, without the first ones, evaluations and checkpoints."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

_NUM_WARMUP_STEPS = 3


class Chrono:
    """Seconds and items (tokens or images) of the steps after the warm-up; `total_seconds` has the warm-up too.

    The wall clock runs from step end to step end, so waiting for data counts. On a GPU the clock is read without
    synchronisation but for the start and the end of the window, where `items` is read.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.total_seconds = 0.0
        self.steps = 0
        self._skip = 0
        self._pending: list[Tensor | int] = []
        self._items: Tensor | int = 0
        self._since = time.perf_counter()
        self._aside = 0.0

    def start(self, num_steps: int) -> None:
        self._skip = _NUM_WARMUP_STEPS if num_steps > 2 * _NUM_WARMUP_STEPS else 0
        self._since, self._aside = time.perf_counter(), 0.0

    def count(self, items: Tensor | int) -> None:
        self._pending.append(items)

    def step(self) -> None:
        """An optimiser step has ended."""
        if self._skip == 1 and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        spent = now - self._since - self._aside
        self._since, self._aside = now, 0.0
        self.total_seconds += spent
        if self._skip > 0:
            self._skip -= 1
        else:
            self.seconds += spent
            self.steps += 1
            self._items = self._items + sum(self._pending)
        self._pending.clear()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._aside += time.perf_counter() - begin

    def items(self, device: torch.device) -> Tensor:
        return torch.as_tensor(self._items, dtype=torch.float64, device="cpu").to(device)
