"""Every allocation and release of a training loop, in order: who made it, in which phase, and which term it belongs to.

    peak = weights + gradients + optimizer + activations + transient      (and the batch)

The timeline is entered around some steps of any training loop. It sees each storage being allocated (as the output of an
operator) and, through a finaliser on the storage, being released, so the sum of the living is known at each moment. The
term of a storage is settled by what becomes of it, not by where it was made:

    weights       parameters, buffers, and what belongs to them (the scales of 4-bit weights)
    gradients     what is `.grad` of a parameter after its accumulation
    optimizer     what the optimizer's state refers to after a step
    activations   what was allocated in a forward and is alive when its backward begins
    batch         the inputs of the step
    transient     everything else: gradients on their way, recomputed activations, temporaries of the optimizer

The phases need no help from the loop: forward is the forward of the model (and what follows until an autograd node runs),
backward is what autograd nodes do, step is the rest: clipping and the optimizer.

The timeline runs on real tensors (the meter) and on fake ones (the estimate) alike. What both report are `MemoryFigures`: one peak,
its terms, its moment, and what each phase of a step used.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from velora.memory.storages import (
    AllocationTracker,
    ModuleStack,
    StorageKey,
    model_tensors,
    plain_tensors,
    state_tensors,
    storage_key,
)

TERMS = ("weights", "gradients", "optimizer", "activations", "batch", "transient")
PHASES = ("load", "forward", "backward", "step")


@dataclass
class StorageRecord:
    """The life of one storage; times count allocations and releases, `freed_at` is None while it lives."""

    num_bytes: int
    allocated_at: int
    phase: str
    module: str
    operator: str
    term: str = "transient"
    freed_at: int | None = None


@dataclass(frozen=True)
class Moment:
    """Where a sum was largest: phase, the module that ran (or whose backward ran) and the operator that allocated."""

    phase: str
    module: str
    operator: str

    def __str__(self) -> str:
        where = f" of {self.module}" if self.module else ""
        return f"{self.phase}{where} ({self.operator})"


@dataclass(frozen=True)
class Peak:
    """The largest sum of living storages, its terms (which add up to it exactly) and when it was."""

    num_bytes: int
    terms: dict[str, int]
    moment: Moment


class Timeline(AllocationTracker):
    """Watches `model` and `optimizer` through a training loop while `watch()` is entered.

    `device_type`: storages elsewhere are not counted. `granularity_bytes`: each storage is rounded up to a multiple of
    it (512 for CUDA's caching allocator, 1 for the exact sizes). `on_phase` is called with the name of each phase that
    begins.
    """

    def __init__(
        self,
        model: nn.Module,
        device_type: str = "cpu",
        granularity_bytes: int = 1,
        on_phase: Callable[[str], None] = lambda _phase: None,
    ) -> None:
        super().__init__()
        self.model, self.stack = model, ModuleStack(model)
        self.device_type, self.granularity_bytes, self.on_phase = device_type, granularity_bytes, on_phase
        self.records: dict[StorageKey, StorageRecord] = {}
        self.phase = "load"
        self.live_bytes = 0
        self.saved_bytes = 0  # the most that was kept for backward at the end of a forward
        self._clock = 0
        self._levels: list[tuple[StorageKey, int]] = []  # storage and change of the sum, by the clock
        self._forward_began_at = 0
        self._saved_marked = False
        self._finalisers: list[weakref.ref[Any]] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._closed = False

    @contextmanager
    def watch(self) -> Iterator[Timeline]:
        """Everything from here on is seen; what the model holds already is entered as weights (and gradients)."""
        with ExitStack() as stack:
            self.register("weights", model_tensors(self.model))
            self.register("gradients", (p.grad for p in self.model.parameters() if p.grad is not None))
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    stack.callback(_first_accumulation_hook(parameter, self._accumulated).remove)
            root = self.model.register_forward_pre_hook(lambda _m, _a: self._enter("forward"), prepend=True)
            stack.callback(root.remove)
            stack.enter_context(self.stack.watch())
            stack.enter_context(self)
            try:
                yield self
            finally:
                self.settle()
                self._closed = True

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer's state for what it is, now and when the watch ends."""
        self._optimizer = optimizer
        self.settle()

    def register(self, term: str, tensors: Iterable[Tensor]) -> None:
        """Enter storages that live already, or settle the term of known ones."""
        for tensor in plain_tensors(list(tensors)):
            self.meet(tensor, self.lived_before)
            key = storage_key(tensor)
            if key not in self.records:
                self._born(tensor, "")
            if key in self.records:
                self.records[key].term = term

    def settle(self) -> None:
        """Settle what belongs to the optimizer and what are weights; call it after a step of an optimizer that replaces
        tensors of its state, since only what the state refers to then is recognised."""
        self.register("weights", model_tensors(self.model))
        if self._optimizer is not None:
            own = {storage_key(tensor) for tensor in model_tensors(self.model)}
            self.register("optimizer", [t for t in state_tensors(self._optimizer) if storage_key(t) not in own])
            held_gradients = getattr(self._optimizer, "held_gradients", dict)  # of layer-wise optimizers
            self.register("gradients", held_gradients().values())

    def on_operator(self, operator: Any, inputs: list[Tensor], outputs: list[Tensor], fresh: list[Tensor]) -> None:
        for tensor in fresh:
            self._born(tensor, operator.name().partition(".")[0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._current_autograd_node() is not None:
            self._enter("backward")
        elif self.phase == "backward":
            self._enter("step")
        return super().__torch_dispatch__(func, types, args, kwargs)

    def forward_ended(self, loss: Tensor) -> None:
        """Optional: to be told before the backward, so that the loss (and autograd's first gradient) are not taken for
        activations, which are then exactly what `measure_saved_bytes` counts."""
        self._mark_saved(storage_key(loss))
        self._saved_marked = True

    def _enter(self, phase: str) -> None:
        if phase == self.phase or (phase == "forward" and torch._C._current_autograd_node() is not None):
            return  # the second: a checkpointed model computed again
        if phase == "backward" and self.phase == "forward" and not self._saved_marked:
            self._mark_saved(None)
        if phase == "forward":
            self.settle()
            self._forward_began_at, self._saved_marked = self._clock, False
        self.phase = phase
        self.on_phase(phase)

    def _mark_saved(self, loss_key: StorageKey | None) -> None:
        saved = 0
        for key, record in self.records.items():
            in_forward = record.phase == "forward" and record.allocated_at >= self._forward_began_at
            if in_forward and record.freed_at is None and record.term == "transient" and key != loss_key:
                record.term = "activations"
                saved += record.num_bytes
        self.saved_bytes = max(self.saved_bytes, saved)

    def _accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.register("gradients", [parameter.grad])

    def _born(self, tensor: Tensor, operator: str) -> None:
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key, step = storage_key(tensor), self.granularity_bytes
        num_bytes = -(-storage.nbytes() // step) * step
        node = torch._C._current_autograd_node()
        module = self.stack.current if node is None else self.stack.of_node(node)
        self.records[key] = StorageRecord(num_bytes, self._clock, self.phase, module, operator)
        self._finalisers.append(weakref.ref(storage, lambda _ref: self._died(key)))
        self._change(key, num_bytes)

    def _died(self, key: StorageKey) -> None:
        record = self.records[key]
        if record.freed_at is None and not self._closed:
            record.freed_at = self._clock
            self._change(key, -record.num_bytes)

    def _change(self, key: StorageKey, num_bytes: int) -> None:
        self._levels.append((key, num_bytes))
        self._clock += 1
        self.live_bytes += num_bytes

    def peak(self, phases: Iterable[str] = PHASES) -> Peak:
        """The largest sum, among allocations made in some of the phases, over the whole watch."""
        wanted = set(phases)
        level = best = best_at = 0
        best_key: StorageKey | None = None
        for time, (key, change) in enumerate(self._levels):
            level += change
            if level > best and change > 0 and self.records[key].phase in wanted:
                best, best_at, best_key = level, time, key
        terms = dict.fromkeys(TERMS, 0)
        for record in self.records.values():
            alive = record.allocated_at <= best_at and (record.freed_at is None or record.freed_at > best_at)
            if alive and best_key is not None:
                terms[record.term] += record.num_bytes
        assert sum(terms.values()) == best
        if best_key is None:
            return Peak(0, terms, Moment("load", "", ""))
        at = self.records[best_key]
        return Peak(best, terms, Moment(at.phase, at.module, at.operator))

    def term_peaks(self) -> dict[str, int]:
        """The most bytes that each term had at any time, each at its own."""
        levels, most = dict.fromkeys(TERMS, 0), dict.fromkeys(TERMS, 0)
        for key, change in self._levels:
            term = self.records[key].term
            levels[term] += change
            most[term] = max(most[term], levels[term])
        return most


def _first_accumulation_hook(parameter: Tensor, hook: Callable[[Tensor], None]) -> Any:
    """A hook that runs when a gradient has been accumulated, before those of optimizers that use it up at once."""
    handle = parameter.register_post_accumulate_grad_hook(hook)
    hooks = parameter._post_accumulate_grad_hooks
    assert hooks is not None
    earlier = [(key, other) for key, other in hooks.items() if key != handle.id]
    for key, other in earlier:  # autograd calls them in the order in which the dictionary was filled
        del hooks[key]
        hooks[key] = other
    return handle


@dataclass(frozen=True)
class MemoryFigures:
    """Memory of some training steps, in bytes of storages.

    `peak.terms` are what was alive at the peak and sum to it; `term_peaks` are the most that each term had, at whatever
    time. `by_phase`: the peak inside each phase (null for one that allocated nothing). `saved_bytes`: what backward
    kept at the end of a forward. `device_peaks`, on CUDA: what the allocator itself reports, per phase;
    `unexplained_bytes` is its peak minus ours (rounding, workspaces inside operators). `rss_bytes`: the most that the
    process had resident on the CPU, everything in it included, as sampled when phases change.
    """

    source: Literal["metered", "estimated"]
    device: str
    num_steps: int
    peak: Peak
    by_phase: Mapping[str, Peak | None]
    term_peaks: Mapping[str, int]
    saved_bytes: int
    after_load_bytes: int
    device_peaks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    unexplained_bytes: int | None = None
    rss_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; the names of result.json's `memory` where they mean the same."""
        return {
            "source": self.source,
            "device": self.device,
            "num_steps": self.num_steps,
            "peak_bytes": self.peak.num_bytes,
            "peak_terms_bytes": self.peak.terms,
            "peak_moment": str(self.peak.moment),
            "peak_by_phase_bytes": {name: peak.num_bytes for name, peak in self.by_phase.items() if peak is not None},
            "after_load_bytes": self.after_load_bytes,
            "weights_bytes": self.term_peaks["weights"],
            "gradients_bytes": self.term_peaks["gradients"],
            "optimizer_bytes": self.term_peaks["optimizer"],
            "saved_for_backward_bytes": self.saved_bytes,
            "device_peaks_bytes": {phase: dict(peaks) for phase, peaks in self.device_peaks.items()},
            "unexplained_bytes": self.unexplained_bytes,
            "rss_bytes": self.rss_bytes,
        }


def figures_of(
    timeline: Timeline,
    source: Literal["metered", "estimated"],
    device: str,
    num_steps: int,
    after_load_bytes: int,
    device_peaks: Mapping[str, Mapping[str, int]] | None = None,
    rss_bytes: int | None = None,
) -> MemoryFigures:
    """Read a timeline that has ended."""
    peak = timeline.peak()
    device_peaks = device_peaks or {}
    allocated = max((peaks["allocated"] for peaks in device_peaks.values()), default=None)
    return MemoryFigures(
        source=source,
        device=device,
        num_steps=num_steps,
        peak=peak,
        by_phase={phase: timeline.peak([phase]) for phase in PHASES},
        term_peaks=timeline.term_peaks(),
        saved_bytes=timeline.saved_bytes,
        after_load_bytes=after_load_bytes,
        device_peaks=device_peaks,
        unexplained_bytes=None if allocated is None else allocated - peak.num_bytes,
        rss_bytes=rss_bytes,
    )
