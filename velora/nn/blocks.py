"""Gradient checkpointing: of a block only the input is kept, and its forward runs again when the backward pass comes to it.

torch.utils.checkpoint in its non-reentrant form does the work; dropout and autocast are the same in both forwards. A block's
`forward` is replaced by a method of the same object, so its class, name, Parameters and hooks stay, whatever library it
is from: a layer that transformers says can be checkpointed, or a child of timm's `blocks` or, in a ResNet, `layer1` to `layer4`.
In training a block gets no cache of keys and values, which a second forward would fill twice, and its second forward does not
move the running mean and variance of a batch norm.

    (B, N, D): a batch of B sequences of N tokens with D features, the input of a block
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import checkpoint

from velora.errors import ConfigError
from velora.nn.recipe import forget_recipe

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NO_CACHE = {"past_key_values": None, "layer_past": None, "use_cache": False}


def checkpoint_blocks(model: nn.Module, *, every_n_layers: int = 1, offload: bool = False) -> str:
    """Have the blocks of a network of transformers or timm (in PEFT, or in a wrapper) computed again; in place.

    `every_n_layers`: the first block and every n-th after it are computed again, as in transformers. `offload`: their inputs
    wait in the CPU's memory. Returns a text that says which blocks they are. Raises ConfigError where there are none, or
    fewer than `every_n_layers`.
    """
    blocks = find_blocks(model)
    if not blocks:
        raise ConfigError(
            f"recompute=blocks: no blocks were found in {type(model).__name__} that could be computed again; "
            "choose recompute=none, lean or mlp"
        )
    if every_n_layers > len(blocks):
        raise ConfigError(
            f"recompute.every_n_layers={every_n_layers}: the network has {len(blocks)} blocks, so the first alone would be "
            f"computed again, as with {len(blocks)}; give at most that"
        )
    chosen = blocks[::every_n_layers]
    for block in chosen:
        block.forward = MethodType(_forward_on_host if offload else _forward, block)  # type: ignore[method-assign]
    kinds = ", ".join(sorted({type(block).__name__ for block in chosen}))
    where = "; their inputs wait in the CPU's memory" if offload else ""
    return f"computed again in backward: {len(chosen)} of {len(blocks)} blocks ({kinds}){where}"


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks in their order; one that lies inside another is part of it."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        rows = [m for name, m in model.named_modules() if re.fullmatch(r"blocks|layer\d", name.rpartition(".")[2])]
        found = [block for row in rows if isinstance(row, nn.Sequential | nn.ModuleList) for block in row]
    inside = {part for block in found for part in block.modules() if part is not block}
    return [block for block in found if block not in inside]


def is_checkpointed(block: nn.Module) -> bool:
    return getattr(vars(block).get("forward"), "__func__", None) in (_forward, _forward_on_host)


def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """(B, N, D) -> (B, N, D)"""
    forward = type(block).forward
    if not (block.training and torch.is_grad_enabled()):
        return forward(block, *args, **kwargs)
    kwargs |= {key: value for key, value in NO_CACHE.items() if key in kwargs}
    for value in (*args, *kwargs.values()):
        forget_recipe(value)  # of the block before: inside this one it does not hold, and its sources would stay
    contexts = partial(_contexts, [m for m in block.modules() if isinstance(m, BATCH_NORMS)])
    return checkpoint(partial(forward, block, **kwargs), *args, use_reentrant=False, context_fn=contexts)


def _contexts(norms: list[Any]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What is entered around the two forwards."""
    return nullcontext(), _running_statistics_kept(norms)


@contextmanager
def _running_statistics_kept(norms: list[Any]) -> Iterator[None]:
    """Batch norms in training leave their running mean, variance and count as they are."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count


def _forward_on_host(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with saved_tensors_hooks(to_host, from_host) if block.training else nullcontext():
        return _forward(block, *args, **kwargs)


Away = tuple[Tensor, torch.device]
"""A tensor in the CPU's memory, and where it came from."""


def to_host(tensor: Tensor) -> Away:
    """A copy in the CPU's memory, pinned, so that the device does not wait for it. An estimate overrides it."""
    if has_torch_function((tensor,)):
        return handle_torch_function(to_host, (tensor,), tensor)
    if tensor.device.type != "cuda":
        return tensor, tensor.device
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True), tensor.device


def from_host(away: Away) -> Tensor:
    tensor, device = away
    if has_torch_function((tensor,)):
        return handle_torch_function(from_host, (tensor,), away)
    return tensor.to(device, non_blocking=True)
