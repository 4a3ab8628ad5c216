"""The ledger against the profiler's own record of allocations, and against counts made by hand.

The independent count: `torch.profiler` logs every allocation and every release of the CPU allocator with its bytes,
far below the dispatcher that the ledger listens to. What is allocated and not released between the start and the end
of a forward is what is held. Both counts are whole bytes, so all comparisons are exact.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.utils.checkpoint import checkpoint

from velora.memory.ledger import measure_saved_bytes


def allocator_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that the CPU allocator handed out in `forward` and has not got back, the loss's four apart."""
    gc.collect()
    with profile(profile_memory=True) as record:
        loss = forward()
        gc.collect()
    held = sum(event.nbytes() for event in record.kineto_results.events() if event.name() == "[memory]")
    assert loss.dtype == torch.float32
    return held - 4


class KeepsOnCtx(torch.autograd.Function):
    """y = 2x + 0·k, keeping a tensor of its own on ctx beside the hooks."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.kept = torch.full((1000,), 2.0)
        return x * ctx.kept[0]

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * ctx.kept[0]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    def __init__(self, how: str = "plain", width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.how == "plain":
                x = block(x)
            elif self.how == "ctx":
                x = KeepsOnCtx.apply(block(x))
            else:
                x = checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return x.square().mean()


def test_linear_by_hand() -> None:
    layer, x = nn.Linear(8, 5), torch.randn(7, 8)
    # x lived before; backward of square keeps the layer's output (7 x 5), that of mean nothing
    assert measure_saved_bytes(lambda: layer(x).square().mean()) == 7 * 5 * 4


def test_one_storage_read_thrice_counts_once() -> None:
    readers, x = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), torch.randn(7, 8)

    def forward() -> Tensor:
        shared = x + 1  # kept by three layers, through three different views
        outputs = [reader(shared.view(1, 7, 8)[:, i:]) for i, reader in enumerate(readers)]
        return torch.stack([output.sum() for output in outputs]).sum()

    assert measure_saved_bytes(forward) == 7 * 8 * 4


@pytest.mark.parametrize("how", ["plain", "ctx", "reentrant", "non_reentrant"])
def test_equals_the_allocator(how: str) -> None:
    torch.manual_seed(0)
    net, x = Net(how), torch.randn(6, 16, requires_grad=True)
    net(x).backward()
    # each checkpointed region keeps the state of the random numbers, which is made without the dispatcher
    random_state_bytes = 3 * torch.get_rng_state().nbytes if "reentrant" in how else 0
    assert measure_saved_bytes(lambda: net(x)) == allocator_bytes(lambda: net(x)) - random_state_bytes > 0


@pytest.mark.parametrize("how", ["plain", "ctx", "reentrant", "non_reentrant"])
def test_backward_works_afterwards_and_nothing_is_shifted(how: str) -> None:
    net, x = Net(how), torch.randn(6, 16, requires_grad=True)
    kept: list[Tensor] = []

    def forward() -> Tensor:
        kept.append(net(x))
        return kept[-1]

    torch.manual_seed(1)
    forward().backward()
    expected, noise = [p.grad.clone() for p in net.parameters()], torch.rand(3)
    net.zero_grad()
    torch.manual_seed(1)
    measure_saved_bytes(forward)
    kept[-1].backward()
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(torch.rand(3), noise)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), expected, strict=True))


def test_reused_addresses_are_no_living_storages() -> None:
    weight = torch.randn(100, requires_grad=True)

    def forward() -> Tensor:
        for _ in range(50):  # the allocator hands out the same address again and again
            torch.empty(100).fill_(1)
        return (weight * weight.detach().clone()).sum()

    assert measure_saved_bytes(forward) == 400


def test_autocast_keeps_the_cast_weight() -> None:
    layer, x = nn.Linear(8, 4, bias=False), torch.randn(3, 8, requires_grad=True)

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x).float().sum()

    # bf16 copies of x (for the weight's gradient) and of the weight (for the input's)
    assert measure_saved_bytes(forward) == 3 * 8 * 2 + 4 * 8 * 2


def test_without_gradient_nothing_is_held() -> None:
    net, x = Net(), torch.randn(6, 16)
    with torch.no_grad():
        assert measure_saved_bytes(lambda: net(x)) == 0
