"""What one phase of a run measures: the bytes of each term of its memory, and its speed.

One object collects them. The training loop says when something happens; a checkpoint keeps what was found so far, so that a
run that continues reports the figures of all its processes.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from velora.memory.storages import plain_tensors, unique_bytes
from velora.models.build import weights_bytes
from velora.run.chrono import Chrono

FILE = "velora_figures.json"  # in a checkpoint

Reduce = Callable[[Tensor], Tensor]  # the sum over all processes


class Figures:
    """`memory` (bytes, by the names of result.json) and, after `finish`, `speed`."""

    def __init__(self, device: torch.device, unit: str) -> None:
        self.device, self.unit = device, unit
        self.memory: dict[str, int] = {}
        self.speed: dict[str, float] = {}
        self.chrono = Chrono(device)

    def start(self, num_steps: int) -> None:
        """Training begins: what was cached before it (by the ledger's forward, say) is not its memory."""
        self._forget_peak()
        self.chrono.start(num_steps)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What happens inside is not training: neither its time nor its memory counts."""
        self.note_peak()
        with self.chrono.paused():
            yield
            self._forget_peak()

    def finish(self, reduce: Reduce) -> None:
        """The last step has ended; all processes must call it."""
        self.chrono.finish()
        self.note_peak()
        items = float(reduce(self.chrono.items()))
        if self.chrono.seconds > 0:
            self.speed = {
                "steps_per_second": self.chrono.steps / self.chrono.seconds,
                f"{self.unit}_per_second": items / self.chrono.seconds,
                "train_seconds": self.chrono.total_seconds,
            }

    def note_forward(self, network: nn.Module, saved_bytes: int) -> None:
        self.memory["saved_for_backward_bytes"] = saved_bytes
        self.memory["weights_bytes"] = weights_bytes(network)

    def note_gradients(self, network: nn.Module) -> None:
        """Once, before the first step."""
        if "gradients_bytes" not in self.memory:
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            self.memory["gradients_bytes"] = unique_bytes(list(plain_tensors(gradients)))

    def note_optimizer(self, optimizer: Any) -> None:
        """Once, after the first step that was taken."""
        if "optimizer_bytes" in self.memory:
            return
        self.memory["optimizer_bytes"] = unique_bytes(list(plain_tensors(list(optimizer.state.values()))))
        # An optimiser that updates inside the backward pass frees each gradient at once, and knows the most it held.
        peak = getattr(getattr(optimizer, "optimizer", None), "peak_gradient_bytes", 0)
        self.memory["gradients_bytes"] = max(self.memory["gradients_bytes"], peak)

    def note_peak(self) -> None:
        """Carry the device's peaks over; they are reset around everything that is not training."""
        if self.device.type != "cuda":
            return
        peaks = {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(self.device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(self.device),
        }
        for key, value in peaks.items():
            self.memory[key] = max(self.memory.get(key, 0), value)

    def save(self, checkpoint: Path, reduce: Reduce, *, writes: bool) -> None:
        """Into a checkpoint; all processes must call it, one writes."""
        items = float(reduce(self.chrono.items()))
        if writes:
            found = {"memory": self.memory, "chrono": self.chrono.state(items)}
            (checkpoint / FILE).write_text(json.dumps(found))

    def load(self, checkpoint: Path, *, first_process: bool) -> None:
        file = checkpoint / FILE
        if file.is_file():
            found = json.loads(file.read_text())
            self.memory.update(found["memory"])
            self.chrono.load(found["chrono"], with_items=first_process)

    def _forget_peak(self) -> None:
        """From here on the peaks are of what comes. The cache is emptied: `reserved` would stay where it was otherwise."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
