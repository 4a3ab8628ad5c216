"""Small pieces that the tests of the optimisers share."""

from __future__ import annotations

import io

import torch
from torch import nn


def tiny_network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    """12 -> 24 -> 6 with a norm between: a tall and a wide matrix, and vectors."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 6)).to(dtype)


def matrices_and_vectors(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    everything = list(model.parameters())
    return [p for p in everything if p.ndim == 2], [p for p in everything if p.ndim != 2]


def batches(
    num: int, dtype: torch.dtype = torch.float32, seed: int = 1, size: int = 8
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 12, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(size, 6, generator=generator, dtype=torch.float64).to(dtype),
        )
        for _ in range(num)
    ]


def loss_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for batch in data:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def through_a_file(state_dict: dict) -> dict:
    """Written and read as a checkpoint is, without unpickling arbitrary objects."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_resume_is_exact(build, dtype: torch.dtype = torch.float32, network=tiny_network) -> None:
    """10 steps equal 5 steps, a checkpoint, and 5 steps with a new optimiser; `build(model)` makes an optimiser."""
    data = batches(10, dtype)
    straight = network(dtype)
    train(straight, build(straight), data)

    interrupted = network(dtype)
    optimizer = build(interrupted)
    train(interrupted, optimizer, data[:5])
    weights, state = through_a_file(interrupted.state_dict()), through_a_file(optimizer.state_dict())
    resumed = network(dtype, seed=99)
    resumed.load_state_dict(weights)
    optimizer = build(resumed)
    optimizer.load_state_dict(state)
    train(resumed, optimizer, data[5:])

    for (name, a), b in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), f"{name} differs after a restart by {(a - b).abs().max()}"


def assert_random_by_its_seed_only(build) -> None:
    """`build(model, seed)`: the same whatever the global generator's state is, and another with another seed."""
    results = []
    for seed, noise in ((0, 5), (0, 6), (1, 5)):
        model = tiny_network()
        optimizer = build(model, seed)
        torch.manual_seed(noise)
        train(model, optimizer, batches(4))
        results.append(model[0].weight.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all distinct storages in the state."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def given_gradients(p: nn.Parameter, num: int, seed: int = 3) -> list[torch.Tensor]:
    """Gradients that do not depend on the weight, so that two optimisers can be compared step by step."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for _ in range(num)]
