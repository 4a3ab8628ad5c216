"""8-bit moments: bitsandbytes' blockwise dynamic type, and what it needs."""

from __future__ import annotations

import functools
from importlib import metadata

import torch
from torch import Tensor

from velora.errors import ConfigError

MIN_8BIT_SIZE = 4096  # smaller moments stay in fp32, and
BLOCK_SIZE = 256  # entries of 8-bit moments share one scale: both as in bitsandbytes


def require_8bit_kernels(device: torch.device) -> None:
    """ConfigError where bitsandbytes is missing, or has no 8-bit optimiser for the device."""
    try:
        version = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        raise ConfigError("8-bit moments need bitsandbytes: pip install bitsandbytes") from None
    if device.type == "cpu" and tuple(int(part) for part in version.split(".")[:2]) < (0, 50):
        raise ConfigError(f"8-bit moments on a CPU need bitsandbytes 0.50 or newer, here is {version}")


@functools.cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The 256 values of bitsandbytes' dynamic 8-bit type; constants, so not part of any state."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=signed).to(device)
