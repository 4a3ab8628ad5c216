"""VeLoRA's layers in a backward pass of two stages, as torch.distributed.pipelining's zero-bubble schedules make it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from make_two_stage import kept, kept_where_deferred
from pipeline_worker import NUM_MICROBATCHES, STAGES_OF_RANK, file_name, gradients, loss_of, network
from tiny import tiny_llama
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D
from two_processes import run_in_two_processes

from velora import apply_lean, apply_velora, calibrate, remove_velora
from velora.nn.scale_shift import ScaleShift
from velora.nn.split_backward import defer_weight_gradients

N, D, S, DEPTH = 6, 8, 4, 3
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, D),
    "linear without bias": lambda: nn.Linear(D, D, bias=False),
    "transposed": lambda: Conv1D(D, D),
    "convolution": lambda: nn.Conv2d(D, D, 3, padding=1),
    "scale and shift": lambda: ScaleShift(D),
}


def stage_of(kind: str, velora: bool = True) -> tuple[nn.Sequential, Tensor]:
    """Three layers of a kind with a ReLU behind each, and an input that wants its gradient."""
    torch.manual_seed(0)
    stage = nn.Sequential(*(nn.Sequential(PLAIN[kind](), nn.ReLU()) for _ in range(DEPTH)))
    x = torch.randn(2, D, 5, 5) if kind == "convolution" else torch.randn(N, D)
    if velora:
        apply_velora(stage, ["*.0"], sub_token_size=S)
        calibrate(stage, x)
    return stage, x.requires_grad_()


@pytest.mark.parametrize("kind", PLAIN)
def test_two_stages_give_the_gradients_of_one(kind):
    stage, x = stage_of(kind)
    dy = torch.randn_like(stage(x))
    dx, *dws = torch.autograd.grad(stage(x), [x, *stage.parameters()], dy)

    dinputs, groups = stage_backward_input((stage(x),), [dy], [x], stage.parameters())
    assert all(p.grad is None for p in stage.parameters())
    stage_backward_weight(stage.parameters(), groups)

    assert torch.equal(dinputs[0], dx)
    for parameter, dw in zip(stage.parameters(), dws, strict=True):
        assert torch.equal(parameter.grad, dw)


@pytest.mark.parametrize("lean", [False, True])
def test_a_language_model_in_two_stages(lean):
    model = tiny_llama()
    apply_velora(model, ["value", "down"], sub_token_size=S)
    if lean:
        apply_lean(model)
    x = torch.randn(2, 8, 32)
    calibrate(model, {"inputs_embeds": x})
    x.requires_grad_()
    parameters = list(model.parameters())
    dy = torch.randn(2, 8, 64)
    expected = torch.autograd.grad(model(inputs_embeds=x).logits, [x, *parameters], dy, allow_unused=True)

    dinputs, groups = stage_backward_input((model(inputs_embeds=x).logits,), [dy], [x], iter(parameters))
    stage_backward_weight(iter(parameters), groups)
    for found, wished in zip([dinputs[0], *(p.grad for p in parameters)], expected, strict=True):
        assert (found is None and wished is None) or torch.equal(found, wished)


@pytest.mark.parametrize("kind", PLAIN)
def test_deferred_gradients_are_those_of_an_ordinary_backward(kind):
    stage, x = stage_of(kind)
    dy = torch.randn_like(stage(x))
    dx, *dws = torch.autograd.grad(stage(x), [x, *stage.parameters()], dy)

    deferred = defer_weight_gradients(stage)
    for _ in range(2):  # microbatches; the second is added to the first
        stage(x).backward(dy)
        put_off = deferred()
        put_off()
    assert torch.equal(x.grad, dx + dx)
    for parameter, dw in zip(stage.parameters(), dws, strict=True):
        assert torch.equal(parameter.grad, dw + dw)


def test_deferring_ends_with_velora_and_starts_afresh():
    stage, x = stage_of("linear")
    deferred = defer_weight_gradients(stage)
    stage(x).sum().backward()
    assert all(p.grad is None for p in stage.parameters())
    defer_weight_gradients(stage)()()  # another one, which knows of nothing
    assert all(p.grad is None for p in stage.parameters())
    deferred()()
    assert all(p.grad is not None for p in stage.parameters())
    remove_velora(stage)
    assert not any("deferred" in vars(module) for module in stage.modules())


def test_each_product_is_computed_once():
    stage, x = stage_of("linear")
    y = stage(x)
    with FlopCounterMode(display=False) as first:
        _, groups = stage_backward_input((y,), [torch.ones_like(y)], [x], stage.parameters())
    with FlopCounterMode(display=False) as second:
        stage_backward_weight(stage.parameters(), groups)
    assert first.get_total_flops() == DEPTH * 2 * N * D * D  # dy W
    assert second.get_total_flops() == DEPTH * 2 * N * D * (D // S)  # dyᵀ z


@pytest.mark.parametrize("asked", ["input", "parameters"])
def test_autograd_grad_computes_what_it_is_asked_for(asked):
    stage, x = stage_of("linear")
    loss, sizes = stage(x).sum(), {"input": D, "parameters": D // S}
    names = [x] if asked == "input" else list(stage[0].parameters())
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(loss, names)
    to_the_first = 0 if asked == "input" else (DEPTH - 1) * D
    assert counter.get_total_flops() == 2 * N * D * (to_the_first + sizes[asked] * (DEPTH if asked == "input" else 1))


@pytest.mark.parametrize("velora", [False, True])
def test_bytes_between_the_stages(velora):
    stage, x = stage_of("linear without bias", velora)
    figures = kept(stage, x)
    # each ReLU keeps its output, which is the input of the next layer, and x lived before: DEPTH tensors of N D numbers
    codes = DEPTH * N * (D // S) * 4 if velora else 0
    assert figures.forward == (DEPTH - 1) * N * D * 4 + codes  # the last output is the caller's
    assert figures.waiting == DEPTH * N * D * 4
    assert figures.between == figures.forward + figures.waiting
    if velora:
        assert kept_where_deferred(stage, x) == figures.waiting + codes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The gradients that two processes have left there, schedule by schedule."""
    folder = tmp_path_factory.mktemp("pipeline")
    run_in_two_processes("pipeline_worker.py", folder)
    return folder


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("schedule", STAGES_OF_RANK)
def test_a_pipeline_of_two_processes_gives_the_gradients_of_one(folder, schedule, deferred):
    model, x, target = network()
    for some_x, some_target in zip(x.chunk(NUM_MICROBATCHES), target.chunk(NUM_MICROBATCHES), strict=True):
        loss_of(model(some_x), some_target).backward()
    expected = {name: grad / NUM_MICROBATCHES for name, grad in gradients(model).items()}
    left = [torch.load(folder / file_name(schedule, deferred, rank)) for rank in range(2)]
    found, asked = zip(*left, strict=True)
    assert sorted([*found[0], *found[1]]) == sorted(expected)  # each process has those of its own stages
    for name, grad in (found[0] | found[1]).items():
        # microbatches are summed in the same order: nothing is rounded differently
        assert torch.equal(grad, expected[name]), name
    layers = 2 * NUM_MICROBATCHES  # of one stage, in all microbatches; the very first stage never has two
    for indices, flags in zip(STAGES_OF_RANK[schedule], asked, strict=True):
        others = layers * sum(index != 0 for index in indices)
        if deferred:
            assert flags[True, True] == layers * len(indices)
        else:
            assert flags[False, True] == others
            assert flags.get((True, True), 0) == layers * (0 in indices)
            assert flags[True, False] >= others  # newer releases of torch ask once more, for shapes
