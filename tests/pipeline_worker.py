"""One process of two, as torchrun starts it: a pipeline of four stages under each schedule.

Each with the graph gone through twice, and with weight gradients deferred. What is left in a file of <folder>: the
gradients, and how often the backward of a VeLoRA layer was asked for what.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining

import velora.nn.linear
from velora import apply_velora, calibrate
from velora.nn.split_backward import defer_weight_gradients

WIDTH, NUM_STAGES, NUM_MICROBATCHES = 16, 4, 4
CPU = torch.device("cpu")
STAGES_OF_RANK = {"ScheduleInterleavedZeroBubble": ((0, 2), (1, 3)), "ScheduleZBVZeroBubble": ((0, 3), (1, 2))}


class Block(nn.Module):
    """A residual MLP with a norm: plain nodes, VeLoRA's and a fork in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def network() -> tuple[nn.Sequential, Tensor, Tensor]:
    """The whole calibrated network, a batch and its targets: the same in each process."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(NUM_STAGES)))
    x, target = torch.randn(2, 8, 5, WIDTH).unbind()  # 8 sequences of 5 tokens
    apply_velora(model, ["*.up", "*.down"], sub_token_size=4)
    calibrate(model, x)
    return model, x, target


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output, target)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def run(schedule: str, deferred: bool, folder: Path) -> None:
    rank = dist.get_rank()
    model, x, target = network()
    indices = STAGES_OF_RANK[schedule][rank]
    stages = [
        pipelining.PipelineStage(
            model[i], i, NUM_STAGES, CPU, dw_builder=defer_weight_gradients(model[i]) if deferred else None
        )
        for i in indices
    ]
    pipeline = getattr(pipelining, schedule)(stages, NUM_MICROBATCHES, loss_fn=loss_of)
    asked: Counter[tuple[bool, bool]] = Counter()  # (for the input's gradient, for the weight's)
    original = velora.nn.linear.wanted

    def counted(ctx: Any) -> tuple[bool, ...]:
        flags = original(ctx)
        asked[flags[0], flags[2]] += 1
        return flags

    velora.nn.linear.wanted = counted
    try:
        arguments = (x,) if 0 in indices else ()
        pipeline.step(*arguments, **({"target": target} if NUM_STAGES - 1 in indices else {}))
    finally:
        velora.nn.linear.wanted = original
    torch.save((gradients(model), dict(asked)), folder / file_name(schedule, deferred, rank))


def file_name(schedule: str, deferred: bool, rank: int) -> str:
    return f"{schedule}.{deferred}.{rank}.pt"


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in STAGES_OF_RANK:
        for deferred in (False, True):
            run(name, deferred, Path(sys.argv[1]))
    dist.destroy_process_group()
