"""An independent count of memory for the tests, and the losses of the tiny networks as closures.

`torch.profiler` logs every allocation and every release of the CPU allocator with its bytes, far below the dispatcher
that the memory tools listen to. What is allocated and not released between the start and the end of a forward is held.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from tiny import image_batch, token_batch
from torch import Tensor, nn
from torch.autograd.profiler import profile


def allocator_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that the CPU allocator handed out in `forward` and has not got back, the loss's four apart."""
    gc.collect()
    with profile(profile_memory=True) as record:
        loss = forward()
        gc.collect()
    held = sum(event.nbytes() for event in record.kineto_results.events() if event.name() == "[memory]")
    assert loss.dtype == torch.float32
    return held - 4


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    """The loss of one fixed batch, as a closure."""
    if hasattr(model, "patch_embed"):
        images = image_batch()
        return lambda: nn.functional.cross_entropy(model(images), torch.zeros(2, dtype=torch.long))
    batch = token_batch(num_labels=2 if "Roberta" in type(model).__name__ else None)
    return lambda: model(**batch, **({"use_cache": False} if "Llama" in type(model).__name__ else {})).loss
