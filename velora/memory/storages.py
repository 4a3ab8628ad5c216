"""Which storages were allocated, and which of them are still alive: the ground under ledger, meter and estimate.

A tensor is a view of a storage; memory is storages. One tensor may be saved for backward five times and three
tensors may share one storage, so every figure of this package counts storages, each once.

`AllocationTracker` is a `TorchDispatchMode`: it sees the inputs and outputs of every operator that runs while it is
entered, in the forward of custom autograd functions and inside checkpointed regions too. A storage that is first met
as an output, and is no input of the same operator, was allocated by it; one that is first met as an input
lived before. Both are remembered by a weak reference, which is the storage's identity too: an address, which the
allocator uses again and again, would confuse a dead storage with a living one.

The tracker calls each operator with the arguments it was given and changes neither values nor random numbers.

`ModuleStack` knows which module is running: the innermost one whose forward has been entered and not left. Autograd numbers its
nodes as it makes them; the stack notes at which number each module was entered and left, so that every node of the graph
can be given to the module that made it, long afterwards and in the backward pass too.

What it cannot see: memory that an operator allocates and frees inside itself (workspaces), and tensors that come into
being without the dispatcher (`torch.from_numpy`, data loaders, the state of the random numbers); they count as having
lived before. A function compiled by `torch.compile` runs uncompiled while a dispatch mode is entered.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

# Operators that hand their argument through as the first tensor of a storage that Python has just filled.
_LIFTS = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default}


StorageKey = weakref.ref[torch.UntypedStorage]
"""The identity of a storage, also after its death; called, it gives the storage, or None when it has been freed."""


def plain_tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in the arguments or results of an operator, wrapper subclasses (DTensor, ...) taken apart."""
    if isinstance(values, Tensor):
        if is_traceable_wrapper_subclass(values):
            for name in values.__tensor_flatten__()[0]:
                yield from plain_tensors(getattr(values, name))
        elif values.layout == torch.strided:
            yield values
        elif values.layout == torch.sparse_coo:
            yield from (values._indices(), values._values())
        elif values.layout in (torch.sparse_csr, torch.sparse_bsr):
            yield from (values.crow_indices(), values.col_indices(), values.values())
        elif values.layout in (torch.sparse_csc, torch.sparse_bsc):
            yield from (values.ccol_indices(), values.row_indices(), values.values())
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from plain_tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from plain_tensors(value)


def storage_key(tensor: Tensor) -> StorageKey:
    """The identity of a tensor's storage."""
    return weakref.ref(tensor.untyped_storage())


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each storage once."""
    plain = list(plain_tensors(list(tensors)))
    return sum({storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in plain}.values())


class AllocationTracker(TorchDispatchMode):
    """Remembers every storage that operators allocate while the mode is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: dict[StorageKey, None] = {}  # a set in the order of the allocations
        self.lived_before: dict[StorageKey, None] = {}

    def meet(self, tensor: Tensor, book: dict[StorageKey, None]) -> bool:
        """Enter the storage of a tensor into `allocated` or `lived_before`; False when it is known already."""
        key = storage_key(tensor)
        if key in self.allocated or key in self.lived_before:
            return False
        book[key] = None
        return True

    def on_operator(self, operator: Any, inputs: list[Tensor], outputs: list[Tensor], fresh: list[Tensor]) -> None:
        """Called after each operator; `fresh` are the outputs whose storage it has allocated. For subclasses."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [] if func in _LIFTS else list(plain_tensors((args, kwargs)))
        for tensor in inputs:
            self.meet(tensor, self.lived_before)
        result = func(*args, **kwargs)
        outputs = list(plain_tensors(result))
        fresh = [tensor for tensor in outputs if self.meet(tensor, self.allocated)]
        self.on_operator(func, inputs, outputs, fresh)
        return result

    def living(self, apart_from: Iterable[Tensor] = ()) -> dict[StorageKey, int]:
        """Bytes of each storage that was allocated under the mode and is alive now, by its identity."""
        excluded = {storage_key(tensor) for tensor in plain_tensors(list(apart_from))}
        alive = ((key, key()) for key in self.allocated if key not in excluded)
        return {key: storage.nbytes() for key, storage in alive if storage is not None}


def model_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, and the tensors that quantised parameters keep in attributes (scales, code books)."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield from plain_tensors(tensor)
        yield from _attribute_tensors(vars(tensor))


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Every tensor that an optimizer's state refers to, however deep."""
    yield from _attribute_tensors(dict(enumerate(optimizer.state.values())))


def _attribute_tensors(values: Any, depth: int = 4) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield from plain_tensors(values)
    elif depth and isinstance(values, dict):
        for value in values.values():
            yield from _attribute_tensors(value, depth - 1)
    elif depth and isinstance(values, (list, tuple)):
        for value in values:
            yield from _attribute_tensors(value, depth - 1)
    elif depth and hasattr(values, "__dict__") and not isinstance(values, (type, nn.Module)) and not callable(values):
        yield from _attribute_tensors(vars(values), depth - 1)


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
