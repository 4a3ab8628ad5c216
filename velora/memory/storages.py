"""Which storages were allocated, and which of them are still alive: the ground under ledger, meter and estimate.

A tensor is a view of a storage; memory is storages. One tensor may be saved for backward five times and three
tensors may share one storage, so every figure of this package counts storages, each once.

`AllocationTracker` is a `TorchDispatchMode`: it sees the inputs and outputs of every operator that runs while it is
entered, in the forward of custom autograd functions and inside checkpointed regions too. A storage that is first met
as an output, and is no input of the same operator, was allocated by it; one that is first met as an input
lived before. Both are remembered by a weak reference, which holds the (empty) storage object but not its
data: an address, which the allocator uses again and again, would confuse a dead storage with a living one.

The tracker calls each operator with the arguments it was given and changes neither values nor random numbers.

What it cannot see: memory that an operator allocates and frees inside itself (workspaces), and tensors that come into
being without the dispatcher (`torch.from_numpy`, data loaders, the state of the random numbers); they count as having
lived before. A function compiled by `torch.compile` runs uncompiled while a dispatch mode is entered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

# Operators that hand their argument through as the first tensor of a storage that Python has just filled.
_LIFTS = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default}


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


def storage_key(tensor: Tensor) -> int:
    """The identity of a tensor's storage; unique as long as the storage or a weak reference to it lives."""
    return tensor.untyped_storage()._cdata


def storage_keys(tensors: Any) -> set[int]:
    """The identities of the storages behind any nesting of tensors."""
    return {storage_key(tensor) for tensor in plain_tensors(tensors)}


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each storage once."""
    storages = [tensor.untyped_storage() for tensor in plain_tensors(list(tensors))]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def alive_bytes(reference: StorageWeakRef) -> int | None:
    """Bytes of a storage now, None when it has been freed."""
    storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    return None if storage is None else storage.nbytes()


class AllocationTracker(TorchDispatchMode):
    """Remembers every storage that operators allocate while the mode is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: dict[int, StorageWeakRef] = {}
        self.lived_before: dict[int, StorageWeakRef] = {}

    def meet(self, tensor: Tensor, book: dict[int, StorageWeakRef]) -> bool:
        """Enter the storage of a tensor into `allocated` or `lived_before`; False when it is known already."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.allocated or storage._cdata in self.lived_before:
            return False
        reference = StorageWeakRef(storage)
        book[reference.cdata] = reference
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

    def living(self, apart_from: Iterable[Tensor] = ()) -> dict[int, int]:
        """Bytes of each storage that was allocated under the mode and is alive now, by its identity."""
        excluded = storage_keys(list(apart_from))
        sizes = {key: alive_bytes(reference) for key, reference in self.allocated.items() if key not in excluded}
        return {key: num_bytes for key, num_bytes in sizes.items() if num_bytes is not None}


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
