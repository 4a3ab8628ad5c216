"""What a forward depends on besides its arguments: the random numbers' state, and what autocast makes of types."""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def random_state(device: torch.device) -> Tensor:
    """The state of the device's generator: 16 bytes on CUDA, 5 kB on the CPU."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def random_state_of(state: Tensor, device: torch.device) -> Any:
    """Draw as at the moment of `state` while entered."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in on a device; None where it is off."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def autocast_as(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Compute in this dtype as autocast does (what is computed again: as in forward). With None in that of the factors, even
    where autocast is on: in a backward inside it, or traced inside it."""
    if dtype is None and autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def cast_type(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What autocast to `dtype` makes of a tensor's type: it leaves float64 and whole numbers alone."""
    stays = dtype is None or not tensor.is_floating_point() or tensor.dtype == torch.float64
    return tensor.dtype if stays or dtype is None else dtype


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """As autocast casts."""
    return tensor.to(cast_type(tensor, dtype))
