"""Two gloo processes on the CPU: one direction on all ranks, and the gradients of one process on the joint batch.

Both processes run the whole list of cases once; the tests look at what they saved.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import reference
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from velora import apply_velora, calibrate, update_directions
from velora.errors import ConfigError
from velora.nn.adapter_state import save_adapter, save_network
from velora.nn.apply import velora_layers

WORLD, TOKENS, WIDTH, SIZE = 2, 6, 16, 4
WRAPPERS = ["ddp", "fsdp2"]
INITS = ["fixed_average", "running_average", "svd", "random"]


def build(init: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH), nn.GELU(), nn.Linear(WIDTH, 8))
    apply_velora(model, ["0", "2"], sub_token_size=SIZE, init=init)
    return model


def joint_batch(step: int) -> Tensor:
    """The halves differ in their mean, so that a direction of one rank alone would be another."""
    x = torch.randn(WORLD, TOKENS, WIDTH, generator=torch.Generator().manual_seed(step))
    return x + torch.tensor([1.0, -0.5]).view(WORLD, 1, 1) * torch.linspace(0, 1, WIDTH)


def run_steps(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Calibrate on the first batch and take one gradient per batch; directions move between. What came of it, by name."""
    calibrate(model, batches[0])
    result = {}
    for step, x in enumerate(batches):
        model.zero_grad()
        model(x).square().mean().backward()
        for name, parameter in model.named_parameters():
            gradient = parameter.grad
            full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            result[f"{step}/gradient/{name.removeprefix('module.')}"] = full.clone()
        update_directions(model)
        for name, layer in velora_layers(model).items():
            result[f"{step}/direction/{name.removeprefix('module.')}"] = layer.direction.clone()
    return result


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model[0], mesh=mesh)  # a shard of its own, the rest with the root
    return fully_shard(model, mesh=mesh)


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, WORLD, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    results = {}
    for wrapper in WRAPPERS:
        for init in INITS:
            model = wrap(build(init), wrapper)
            results[wrapper, init] = run_steps(model, [joint_batch(step)[rank] for step in range(2)])
    results["empty on one rank"] = calibrate_with_an_empty_rank(rank)
    results["experts"] = calibrate_experts(rank)
    results["saved shards"] = save_shards(Path(folder))
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def calibrate_with_an_empty_rank(rank: int) -> dict[str, Tensor]:
    model = build("fixed_average")
    calibrate(model, joint_batch(0)[1] if rank else joint_batch(0)[0][:0])
    dead = build("fixed_average")
    try:
        calibrate(dead, joint_batch(0)[0] * 0)
    except ConfigError:  # on all ranks, so that none waits for another
        return {"direction": model[0].direction.clone()}
    raise AssertionError("an input of zeros gives no direction")


def calibrate_experts(rank: int) -> dict[str, bool]:
    """Half-precision experts behind DDP: rank 0 sends its tokens to the first, rank 1 to the second, nobody to the third."""

    class Experts(nn.ModuleList):
        def forward(self, x: Tensor, expert: int) -> Tensor:
            return self[expert](x)

    experts = Experts([nn.Linear(WIDTH, 8) for _ in range(3)]).bfloat16()
    apply_velora(experts, "*", sub_token_size=SIZE)
    model = DistributedDataParallel(experts, find_unused_parameters=True)
    with pytest.warns(UserWarning, match=r"no batch reached module\.2: "):
        calibrate(model, (joint_batch(0)[rank].bfloat16(), rank))
    model(joint_batch(1)[rank].bfloat16(), 1 - rank).sum().backward()
    assert all(layer.direction.dtype == torch.float32 for layer in experts)
    return {str(i): layer.has_direction() for i, layer in enumerate(experts)}


def save_shards(folder: Path) -> list[str]:
    """What saving a sharded network says."""
    model, said = wrap(build("random"), "fsdp2"), []
    for save in (save_adapter, save_network):
        try:
            save(model, folder / save.__name__)
        except ConfigError as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this build of torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module", params=INITS)
def single(request) -> tuple[str, dict[str, Tensor]]:
    """One process on the joint batch."""
    return request.param, run_steps(build(request.param), [joint_batch(step).flatten(0, 1) for step in range(2)])


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_ranks_share_directions_and_gradients_are_the_joint_batchs(results, wrapper, single):
    init, expected = single
    ranks = [rank[wrapper, init] for rank in results]
    assert ranks[0].keys() == expected.keys()
    for name, value in expected.items():
        if "/direction/" in name:
            assert torch.equal(ranks[0][name], ranks[1][name]), name
        # fp32: a mean of two ranks' gradients sums in another order; directions are sums in float64, rounded once
        torch.testing.assert_close(
            ranks[0][name], value, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_direction_is_the_mean_over_all_ranks(results):
    joint = reference.fixed_average(reference.array(joint_batch(0)), SIZE)
    alone = reference.fixed_average(reference.array(joint_batch(0)[0]), SIZE)
    got = results[0]["ddp", "fixed_average"]["0/direction/0"].double().numpy()
    assert abs(got - joint).max() < 1e-7  # fp32
    assert abs(got - alone).max() > 0.1


def test_a_rank_without_tokens_takes_the_others_direction(results):
    expected = reference.fixed_average(reference.array(joint_batch(0)[1]), SIZE)
    for rank in results:
        assert abs(rank["empty on one rank"]["direction"].double().numpy() - expected).max() < 1e-7  # fp32


def test_all_ranks_agree_which_layers_compress(results):
    assert results[0]["experts"] == results[1]["experts"] == {"0": True, "1": True, "2": False}


def test_shards_are_not_saved_as_if_they_were_whole(results):
    for rank in results:
        sentence = "0.weight and 5 other parameters are sharded over processes (fully_shard); gather them"
        assert [said.startswith(sentence) for said in rank["saved shards"]] == [True, True]
