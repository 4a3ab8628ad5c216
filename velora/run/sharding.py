"""`trainer.sharding=fsdp`: each process holds a part of every parameter, its gradient and its optimiser state (FSDP2).

The network is sharded here, before Trainer sees it, and not by accelerate: calibration and the ledger then run on the sharded
network, so that no device ever holds all of it; parameters keep their dtype, which accelerate would make fp32; and
autocast stays what it is in one process. Trainer and accelerate do the rest: clipping, accumulation, checkpoints.

A block of the network is one unit: its parameters are gathered for its forward and again for its backward. What lies
outside the blocks (embeddings, head) is one more unit, which stays gathered from the first layer to the last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer

from velora.errors import ConfigError, Diverged
from velora.nn.blocks import find_blocks

FOLDER = "shards"  # in a checkpoint


def shard(network: nn.Module, device: torch.device) -> None:
    """Shard a network over all processes, in place; the parts move to `device`. All processes must call it."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    units = [*find_blocks(network), network]
    _refuse_mixed_dtypes(units)
    for unit in units:
        fully_shard(unit, mesh=mesh)


def _refuse_mixed_dtypes(units: list[nn.Module]) -> None:
    """FSDP reduces the gradients of a unit together, so they must be of one dtype."""
    seen: set[nn.Parameter] = set()
    for unit in units:
        own = [p for p in unit.parameters() if p.requires_grad and p not in seen]
        seen.update(own)
        if len(dtypes := sorted({str(p.dtype).removeprefix("torch.") for p in own})) > 1:
            raise ConfigError(
                f"trainer.sharding=fsdp: the trained parameters of {type(unit).__name__} are {' and '.join(dtypes)}, and FSDP "
                "needs one type; set weights.dtype=fp32, or trainer.sharding=none"
            )


@contextlib.contextmanager
def gathered_outside_blocks(network: nn.Module) -> Iterator[None]:
    """For forwards without a backward, which leave that unit gathered: it is so from the start, and is sharded at the end.

    While a unit is gathered the network's parameters are others, which no optimiser must be given. A ledger taken inside
    does not count them as saved for backward. Nothing for a network that is not sharded.
    """
    if isinstance(network, FSDPModule):
        network.unshard()
    yield
    reshard(network)


def reshard(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(network: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def gather(network: nn.Module, *, keep: bool) -> None:
    """Make the parameters whole again, in the CPU's memory of the processes that `keep` them; the network cannot run afterwards.

    One parameter at a time is on the device. All processes must call it.
    """
    whole: dict[int, nn.Parameter] = {}
    reshard(network)
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in whole:
                full = parameter.detach().full_tensor().cpu()
                full = full if keep else full.new_empty(0)
                whole[id(parameter)] = nn.Parameter(full, requires_grad=parameter.requires_grad)
            module.register_parameter(name, whole[id(parameter)])


class Sharded(Trainer):
    """Mixed into a Trainer whose network is sharded already: nothing is wrapped around it, and a checkpoint holds shards."""

    def create_accelerator_and_postprocess(self) -> None:
        """Have accelerate prepare the network as in one process (autocast), without DDP around it or a move to a device."""
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model

        def prepare_sharded(model: nn.Module, device_placement: Any = None, evaluation_mode: bool = False) -> Any:
            return prepare(model, device_placement=False, evaluation_mode=True)

        self.accelerator.prepare_model = prepare_sharded

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Nothing beside the shards."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_shards(Path(output_dir), self.model, self.optimizer, self.lr_scheduler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Trainer calls it before there is an optimiser; weights and state are read together, later."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_shards(Path(checkpoint), self.model, self.optimizer, self.lr_scheduler)


def save_shards(checkpoint: Path, network: nn.Module, optimizer: Any, scheduler: Any) -> None:
    """What trains, the buffers and the optimiser's state, each process its parts. All processes must call it."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    state = _state(network, optimizer, scheduler)
    try:
        dcp.save(state, checkpoint_id=checkpoint / FOLDER)
    except dcp.CheckpointException as error:  # no Exception; each process is told the reasons of all
        reason, _ = next(iter(error.failures.values()))
        raise reason from error


def load_shards(checkpoint: Path, network: nn.Module, optimizer: Any, scheduler: Any) -> None:
    """What `save_shards` wrote; `Diverged` on all processes where values are not finite. All processes must call it."""
    state = _state(network, optimizer, scheduler)
    dcp.load(state, checkpoint_id=checkpoint / FOLDER)
    set_model_state_dict(network, state["network"], options=_options(strict=False))
    set_optimizer_state_dict(network, optimizer, state["optimizer"], options=_options())
    scheduler.load_state_dict(state["scheduler"])
    _refuse_non_finite(network, checkpoint)


def _state(network: nn.Module, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper is no torch.optim.Optimizer to it
    return {
        "network": get_model_state_dict(network, options=_options()),
        "optimizer": get_optimizer_state_dict(network, optimizer, options=_options()),
        "scheduler": scheduler.state_dict(),
    }


def _options(*, strict: bool = True) -> StateDictOptions:
    return StateDictOptions(ignore_frozen_params=True, strict=strict)


def _refuse_non_finite(network: nn.Module, checkpoint: Any) -> None:
    """`Diverged` on all processes where a shard of one of them is not finite."""
    broken = [name for name, p in network.named_parameters() if not torch.isfinite(_local(p)).all()]
    count = torch.tensor(len(broken), device=_local(next(network.parameters())).device)
    dist.all_reduce(count)
    if count:
        raise Diverged(
            f"{checkpoint} holds values that are not finite ({broken[0] if broken else 'in another process'})"
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
