"""calibrate and update_directions: where the directions of a model come from."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference
import tiny
import torch
from torch import Tensor, nn

from velora import apply_velora, calibrate, update_directions
from velora.apply import velora_layers
from velora.errors import ConfigError
from velora.nn.twin import MOMENTUM


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*[module for layer in layers for module in (layer, nn.GELU())])


@pytest.mark.parametrize("form", ["mapping", "tuple", "tensor"])
def test_calibration_takes_the_mean_of_all_sub_tokens(form):
    model, x = mlp(8, 12, 4), torch.randn(3, 5, 8)
    inner = model[1](model[0](x))
    apply_velora(model, ["0", "2"], sub_token_size=4)
    calibrate(model, {"mapping": {"input": x}, "tuple": (x,), "tensor": x}[form])
    for layer, its_input in ((model[0], x), (model[2], inner)):
        expected = reference.fixed_average(reference.array(its_input), 4)
        np.testing.assert_allclose(layer.direction, expected, rtol=0, atol=1e-6)  # fp32 forward
    assert all(p.grad is None for p in model.parameters())


def test_svd_calibration():
    model, x = mlp(8, 4), torch.randn(20, 8)
    apply_velora(model, "0", sub_token_size=4, init="svd")
    calibrate(model, x)
    right = np.linalg.svd(x.double().view(-1, 4).numpy())[2][0]
    v = model[0].direction.double().numpy()
    np.testing.assert_allclose(v, right * np.sign(right @ v), rtol=0, atol=1e-7)  # stored in fp32


def test_random_directions_need_no_data_and_belong_to_seed_and_layer():
    first, second, other = (tiny.tiny_llama() for _ in range(3))
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        apply_velora(model, ["value"], sub_token_size=8, init="random", seed=seed)
    first(**tiny.token_batch()).loss.backward()  # without calibrate
    directions = [[layer.direction for layer in velora_layers(model).values()] for model in (first, second, other)]
    assert torch.equal(directions[0][0], directions[1][0])
    assert not torch.equal(directions[0][0], directions[0][1])
    assert not torch.equal(directions[0][0], directions[2][0])
    before = directions[0][0].clone()
    calibrate(first, None)  # no forward is made
    assert torch.equal(directions[0][0], before)


def test_calibration_leaves_no_trace():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 8))
    nn.init.ones_(model[1].bias)  # else the mean behind a batch norm is zero, and refused
    apply_velora(model, "2", sub_token_size=4)
    buffers = {name: value.clone() for name, value in model[1].named_buffers()}
    state = torch.get_rng_state()
    calibrate(model, torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) + 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, buffers[name]) for name, value in model[1].named_buffers())
    assert model.training
    assert not model[2]._forward_pre_hooks


def test_calibration_problems_name_the_layers_and_change_nothing():
    class TwoPaths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.dead = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + self.dead(0 * x)

    model = TwoPaths()
    with pytest.raises(ConfigError, match="has no VeLoRA layer; call apply_velora first"):
        calibrate(model, torch.ones(2, 8))
    apply_velora(model, ["used", "unused", "dead"], sub_token_size=4)
    with pytest.raises(ConfigError, match=r"unused: no sub-token reached.*dead: its input .* is zero everywhere"):
        calibrate(model, torch.ones(2, 8))
    assert model.used.direction.isnan().all()


def test_calibration_of_a_compiled_and_of_a_checkpointed_model():
    model, twin, x = mlp(8, 8), mlp(8, 8), torch.randn(3, 8)
    for each in (model, twin):
        apply_velora(each, "0", sub_token_size=4)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
    calibrate(compiled, x)
    calibrate(twin, x)
    assert torch.equal(model[0].direction, twin[0].direction)
    llama, same = tiny.tiny_llama(), tiny.tiny_llama()
    llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for each in (llama, same):
        apply_velora(each, ["value", "down"], sub_token_size=8)
        calibrate(each, tiny.token_batch())
        each(**tiny.token_batch()).loss.backward()
    for one, other in zip(llama.parameters(), same.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


# Running average


@pytest.mark.parametrize("checkpointing", [False, True])
def test_running_average_moves_once_a_step_by_the_mean_of_all_its_inputs(checkpointing):
    model = tiny.tiny_llama()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    apply_velora(model, ["value"], sub_token_size=8, init="running_average")
    layer = next(iter(velora_layers(model).values()))
    batches = [tiny.token_batch(num_sequences=n, seed=n) for n in (2, 1, 3)]

    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))

    def inputs(batch: dict[str, Tensor]) -> np.ndarray:
        """The layer's sub-tokens in one training step on the batch."""
        seen.clear()
        model(**batch).loss.backward()
        return reference.array(seen[0]).reshape(-1, 8)

    calibrate(model, batches[0])
    mean = inputs(batches[0]).mean(0)
    np.testing.assert_allclose(layer.average, mean, rtol=0, atol=1e-7)  # fp32
    start = layer.direction.clone()
    update_directions(model)  # takes the forward inside inputs(); it equals the calibration batch
    np.testing.assert_allclose(layer.average, mean, rtol=0, atol=1e-7)
    step = np.concatenate([inputs(batch) for batch in batches[1:]])  # two micro-batches of different size
    torch.testing.assert_close(layer.direction, start, rtol=0, atol=1e-6)  # unmoved within the step
    update_directions(model)
    mean = mean + MOMENTUM * (step.mean(0) - mean)
    np.testing.assert_allclose(layer.average, mean, rtol=0, atol=1e-7)
    np.testing.assert_allclose(layer.direction, mean / np.linalg.norm(mean), rtol=0, atol=1e-6)
    unmoved = layer.direction.clone()
    update_directions(model)  # no forward since
    assert torch.equal(layer.direction, unmoved)


def test_fixed_directions_do_not_move():
    model = mlp(8, 8)
    apply_velora(model, "0", sub_token_size=4)
    calibrate(model, torch.randn(4, 8))
    before = model[0].direction.clone()
    model(torch.randn(4, 8)).sum().backward()
    update_directions(model)
    assert torch.equal(model[0].direction, before)
