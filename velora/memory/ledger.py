"""What autograd holds between the forward and the backward pass, storage by storage.

Two views of one forward are laid over each other. `AllocationTracker` knows which storages were allocated in it and are
still alive when it has ended: their bytes are the total, whatever keeps them. The saved-tensors hooks of autograd see
each tensor that an operator saves, hence who holds what. A living storage that the hooks never saw is
held some other way, usually by an attribute of a custom function's ctx: it is listed as kept outside the hook.

A storage with several holders disappears only when all of them let go, which is why the ledger names them all.
Parameters, buffers and inputs that are saved for backward cost nothing more than they do anyway; they
are listed apart. A layer whose class has an attribute `saved_term` names what it saves by it.

Not counted, because they are made without the dispatcher: the random-number states that checkpointed regions keep (5 kB
each, on the CPU) and the tensors of 8 bytes that Python numbers become.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from velora.config.roles import roles_by_module
from velora.memory.storages import AllocationTracker, ModuleStack, StorageKey, plain_tensors, storage_key

Grouping = Literal["kind", "role", "term", "holders", "module"]

ACTIVATION, WEIGHT_COPY, MASK, REGION = (
    "activation",
    "copy of a weight",
    "dropout mask",
    "input of a checkpointed region",
)
_RANDOM = {"aten::bernoulli_", "aten::bernoulli", "aten::native_dropout"}
_COPIES = {"aten::_to_copy", "aten::clone"}
_REGION_NODES = ("checkpoint", "CheckpointFunction", "_NoopSaveInputs")


def measure_saved_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that the backward pass of one forward keeps in memory, each storage once.

    Runs `forward`, which computes the loss and returns it (alone: what else of the model's output the caller keeps
    is alive too and would be counted), and adds up the storages that operators allocated in it and that are still
    alive when it has ended. Nothing but the graph behind the loss can hold them then, whichever way it does: saved
    tensors, attributes of a custom function's ctx, the inputs that a checkpointed region keeps. The loss's
    own storage, parameters, buffers, inputs and everything else that lived before are not counted.

    The forward runs exactly as without the measurement (same values, same random numbers), on any device;
    a caller that kept the loss in `forward` can run its backward afterwards.

    Half-precision copies of weights that autocast makes are counted, for they are held until backward; enter autocast
    inside `forward`, since an enclosing autocast keeps its cached copies alive whether backward needs them or
    not. A module that stores a new tensor in an attribute during its forward (a cache) is counted likewise.
    """
    with AllocationTracker() as tracker:
        loss = forward()
    gc.collect()  # tensors in reference cycles of the model's own Python objects are garbage, not held for backward
    return sum(tracker.living(apart_from=[loss]).values())


@dataclass(frozen=True)
class Holder:
    """One reason why a storage stays: an operation (the name of its autograd node) in the forward of a module."""

    module: str
    kind: str
    role: str | None
    operation: str


@dataclass(frozen=True)
class Entry:
    """One storage that backward keeps. `made_in` and `made_by` are the module and the operator that allocated it;
    the first holder is the one that saved it first. `outside_hook`: no saved-tensors hook has seen it."""

    num_bytes: int
    shape: tuple[int, ...]
    dtype: str
    term: str
    made_in: str
    made_by: str
    holders: tuple[Holder, ...]
    outside_hook: bool

    def group(self, by: Grouping) -> str:
        first = self.holders[0]
        if by == "term":
            return self.term
        if by == "module":
            return first.module or "(the model itself)"
        if by == "kind":
            return first.kind
        if by == "role":
            return first.role or first.kind
        names = dict.fromkeys(holder.role or f"{holder.kind} {holder.operation}" for holder in self.holders)
        return ", ".join(names)


@dataclass(frozen=True)
class LivedBefore:
    """A storage that is saved for backward but lives anyway: a parameter, a buffer or an input of the step."""

    num_bytes: int
    what: Literal["parameter", "buffer", "input"]
    name: str | None


@dataclass(frozen=True)
class Ledger:
    """Every storage that one forward keeps for backward, once. `inputs` maps each module without children to the
    entries (by position in `entries`) of those of its inputs that are alive at the end, whoever holds them."""

    entries: tuple[Entry, ...]
    lived_before: tuple[LivedBefore, ...]
    inputs: dict[str, tuple[int, ...]] = field(repr=False)

    @property
    def total_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)

    @property
    def outside_hook_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries if entry.outside_hook)

    def grouped(self, by: Grouping) -> dict[str, int]:
        """Bytes per group, largest first; the groups are disjoint and sum to the total.

        `kind`, `role` and `module` go by the first holder (`role` falls back to the kind of a module without a role),
        `holders` by all of them together, `term` by what the storage is.
        """
        sums: dict[str, int] = {}
        for entry in self.entries:
            sums[entry.group(by)] = sums.get(entry.group(by), 0) + entry.num_bytes
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def summary(self) -> dict[str, Any]:
        """A plain dictionary: the total and the groupings."""
        groupings: tuple[Grouping, ...] = ("term", "role", "kind", "holders")
        return {
            "total_bytes": self.total_bytes,
            "outside_hook_bytes": self.outside_hook_bytes,
            **{f"bytes_by_{by}": self.grouped(by) for by in groupings},
        }

    def to_json(self) -> dict[str, Any]:
        """The summary, and every storage with its holders."""
        return {
            **self.summary(),
            "storages": [asdict(entry) for entry in self.entries],
            "lived_before": [asdict(item) for item in self.lived_before],
        }


def take_ledger(model: nn.Module, forward: Callable[[], Tensor]) -> Ledger:
    """The ledger of one forward of `model`.

    `forward` computes the loss and returns it, as for `measure_saved_bytes`, whose total this ledger's sums equal. The graph
    behind the loss survives only if the caller keeps the loss; its backward then runs as usual, but in-place changes
    of saved tensors go unnoticed by autograd.
    """
    recorder = _Recorder(model)
    with recorder.watch():
        loss = forward()
    gc.collect()
    return recorder.ledger(loss, roles_by_module(model))


def _called_by_checkpoint() -> bool:
    """Whether a saved-tensors hook was called by torch.utils.checkpoint itself, or by a function that it applied."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") == torch.autograd.function.__name__:
        frame = frame.f_back
    return frame.f_globals.get("__name__") == checkpoint.__module__


@dataclass
class _Origin:
    module: str
    operator: str
    shape: tuple[int, ...]
    dtype: str


class _Recorder(AllocationTracker):
    """Listens to one forward. Books are kept by storage identity; nodes by their sequence number."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.stack = model, ModuleStack(model)
        self.origins: dict[StorageKey, _Origin] = {}
        self.saved: dict[StorageKey, dict[int, str]] = {}  # storage -> {node number: module}, in the order of saving
        self.inputs: dict[str, set[StorageKey]] = {}
        self.masks: set[StorageKey] = set()
        self.weight_copies: set[StorageKey] = set()
        self.own_terms = {path: getattr(type(m), "saved_term", ACTIVATION) for path, m in model.named_modules()}
        self.parameters = {storage_key(t): name for name, p in model.named_parameters() for t in plain_tensors(p)}
        self.buffers = {storage_key(t): name for name, b in model.named_buffers() for t in plain_tensors(b)}

    @contextmanager
    def watch(self) -> Iterator[None]:
        leaves = [(path, module) for path, module in self.model.named_modules() if not any(module.children())]
        with ExitStack() as stack:
            for path, module in leaves:
                hook = module.register_forward_pre_hook(lambda _m, args, p=path: self.note_inputs(p, args))
                stack.callback(hook.remove)
            stack.enter_context(self.stack.watch())
            stack.enter_context(saved_tensors_hooks(self.pack, lambda tensor: tensor))
            stack.enter_context(self)
            yield

    def on_operator(self, operator: Any, inputs: list[Tensor], outputs: list[Tensor], fresh: list[Tensor]) -> None:
        name = operator.name().partition(".")[0]
        for tensor in fresh:
            self.origins[storage_key(tensor)] = _Origin(
                self.stack.current, name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            )
        if name in _RANDOM:
            self.masks.add(storage_key(outputs[-1]))
        if name in _COPIES or "dequantize" in name:
            source = storage_key(inputs[0])
            if source in self.parameters or source in self.weight_copies:
                self.weight_copies.update(storage_key(tensor) for tensor in fresh)

    def pack(self, tensor: Tensor) -> Tensor:
        node_number = torch.autograd._get_sequence_nr() - 1  # the node that saves has just been made
        by_checkpoint = _called_by_checkpoint()  # the region's inputs: without a node, or with one of no consequence
        for plain in plain_tensors(tensor):
            self.meet(plain, self.lived_before)
            number = -1 if by_checkpoint else node_number
            self.saved.setdefault(storage_key(plain), {}).setdefault(number, self.stack.current)
        # an output that its own node saves would hold itself: hand out an alias that knows no node
        return tensor if tensor.grad_fn is None else tensor.detach()

    def note_inputs(self, path: str, args: tuple[Any, ...]) -> None:
        for tensor in plain_tensors(args):
            self.meet(tensor, self.lived_before)
            self.inputs.setdefault(path, set()).add(storage_key(tensor))

    def ledger(self, loss: Tensor, roles: Mapping[str, str]) -> Ledger:
        names, kept_on_ctx = self._walk(loss)
        living = {key: num_bytes for key, num_bytes in self.living(apart_from=[loss]).items() if num_bytes}
        entries = []
        for key, num_bytes in living.items():
            origin, outside = self.origins[key], key not in self.saved
            reasons = [(module, names.get(number, "")) for number, module in self.saved.get(key, {}).items()]
            reasons += kept_on_ctx.get(key, [])
            reasons = reasons or [(origin.module, "kept outside the hook")]
            holders = tuple(
                Holder(module, self.stack.kinds.get(module, ""), roles.get(module), operation)
                for module, operation in dict.fromkeys(reasons)
            )
            term = self._term(key, holders)
            entries.append(
                Entry(num_bytes, origin.shape, origin.dtype, term, origin.module, origin.operator, holders, outside)
            )
        position = {key: index for index, key in enumerate(living)}
        inputs = {path: tuple(position[key] for key in keys if key in position) for path, keys in self.inputs.items()}
        return Ledger(tuple(entries), tuple(self._lived_before_and_saved()), inputs)

    def _term(self, key: StorageKey, holders: tuple[Holder, ...]) -> str:
        if key in self.masks:
            return MASK
        if key in self.weight_copies:
            return WEIGHT_COPY
        if any(holder.operation.startswith(_REGION_NODES) for holder in holders):
            return REGION
        terms = {self.own_terms.get(holder.module, ACTIVATION) for holder in holders}
        return terms.pop() if len(terms) == 1 else ACTIVATION

    def _lived_before_and_saved(self) -> Iterator[LivedBefore]:
        for key in self.saved:
            storage = key() if key in self.lived_before else None
            if storage is None:
                continue
            if key in self.parameters:
                yield LivedBefore(storage.nbytes(), "parameter", self.parameters[key])
            elif key in self.buffers:
                yield LivedBefore(storage.nbytes(), "buffer", self.buffers[key])
            else:
                yield LivedBefore(storage.nbytes(), "input", None)

    def _walk(self, loss: Tensor) -> tuple[dict[int, str], dict[StorageKey, list[tuple[str, str]]]]:
        """Names of all nodes behind the loss by number, and what custom functions keep in attributes of their ctx."""
        names: dict[int, str] = {-1: "checkpoint"}
        kept: dict[StorageKey, list[tuple[str, str]]] = {}
        pending, seen = [loss.grad_fn], set()
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            names[node._sequence_nr()] = node.name()
            for attribute, value in getattr(node, "__dict__", {}).items():
                for tensor in plain_tensors(value):
                    reason = (self.stack.of_node(node), f"{node.name()} (ctx.{attribute}, outside the hook)")
                    kept.setdefault(storage_key(tensor), []).append(reason)
            pending.extend(next_node for next_node, _ in node.next_functions)
        return names, kept
