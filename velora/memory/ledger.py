"""What autograd holds between the forward and the backward pass, storage by storage."""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch import Tensor

from velora.memory.storages import AllocationTracker


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
    not. A module that stores a new tensor in an attribute during its forward (a cache) is counted likewise. The state
    of the random numbers that each checkpointed region keeps (5 kB, on the CPU) is not counted.
    """
    with AllocationTracker() as tracker:
        loss = forward()
    gc.collect()  # tensors in reference cycles of the model's own Python objects are garbage, not held for backward
    return sum(tracker.living(apart_from=[loss]).values())
