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
from velora.errors import ConfigError
from velora.nn.apply import velora_layers
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
    with pytest.raises(ConfigError, match=r"^dead: its input .* is zero everywhere"):
        calibrate(model, torch.ones(2, 8))
    assert all(layer.direction.isnan().all() for layer in velora_layers(model).values())


class Experts(nn.Module):
    """Two layers, of which a forward takes one or none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor, expert: int = 0) -> Tensor:
        return self.experts[expert](x) + self.experts[1 - expert](x[:0]).sum()


@pytest.mark.parametrize("init", ["fixed_average", "running_average", "svd"])
def test_layers_that_no_batch_reaches_stay_plain_until_one_does(init):
    model, exact, x = Experts(), Experts(), torch.randn(4, 8) + 1
    apply_velora(model, "experts.*", sub_token_size=4, init=init)
    with pytest.raises(RuntimeError, match="has no direction yet"):  # calibrate was forgotten
        model(x, 1)
    with pytest.warns(UserWarning, match=r"no batch reached experts\.1: these VeLoRA layers stay plain") as told:
        calibrate(model, x)
    assert len(told) == 1
    resumed = Experts()
    apply_velora(resumed, "experts.*", sub_token_size=4, init=init)
    resumed.load_state_dict(model.state_dict())
    exact(x, 1).square().mean().backward()
    for each in (model, resumed):
        each(x, 1).square().mean().backward()
        assert torch.equal(each.experts[1].weight.grad, exact.experts[1].weight.grad)
        update_directions(each)
        assert not each.experts[1].has_direction()
        own = [*each.parameters(), *each.buffers()]
        assert reference.saved_bytes(lambda each=each: each.experts[1](x * 1), own) == x.numel() * 4
        assert reference.saved_bytes(lambda each=each: each.experts[0](x * 1), own) == x.numel() // 4 * 4
    first = model.experts[0].direction.clone()
    calibrate(model, (2 * x + 1, 1))  # reaches the other one only
    assert torch.equal(model.experts[0].direction, first)
    v = model.experts[1].direction.double().numpy()
    if init != "svd":
        np.testing.assert_allclose(v, reference.fixed_average(reference.array(2 * x + 1), 4), rtol=0, atol=1e-6)  # fp32
    assert np.linalg.norm(v) == pytest.approx(1, abs=1e-6)
    with pytest.raises(
        ConfigError, match="no sub-token reached a VeLoRA layer of Experts; give a batch that is not empty"
    ):
        calibrate(model, x[:0])


def test_a_compiled_model_follows_from_plain_to_compressed():
    model, x = Experts(), torch.randn(4, 8) + 1
    apply_velora(model, "experts.*", sub_token_size=4)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.warns(UserWarning, match="no batch reached"):
        calibrate(compiled, x)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        compiled(x, 1).sum().backward()
        gradients.append(model.experts[1].weight.grad.clone())
        calibrate(compiled, (x, 1))
    exact = x.sum(0).expand(8, 8)
    torch.testing.assert_close(gradients[0], exact, rtol=0, atol=1e-5)  # fp32
    v = model.experts[1].direction
    projected = (exact.reshape(8, 2, 4) @ v).unsqueeze(-1) * v
    torch.testing.assert_close(gradients[1], projected.reshape(8, 8), rtol=0, atol=1e-5)


def test_several_batches_give_the_mean_over_all_their_sub_tokens():
    model, batches = Experts(), [torch.randn(n, 8) + n for n in (1, 2, 3)]
    apply_velora(model, "experts.*", sub_token_size=4)
    calibrate(model, batches[0], (batches[1], 1), {"x": batches[2]})
    for layer, its in zip(model.experts, ([batches[0], batches[2]], [batches[1]]), strict=True):
        expected = reference.fixed_average(reference.array(torch.cat(its)), 4)
        np.testing.assert_allclose(layer.direction, expected, rtol=0, atol=1e-6)  # fp32


def test_a_network_without_values_is_refused():
    with torch.device("meta"):
        model = mlp(8, 8)
    apply_velora(model, "0", sub_token_size=4)
    with pytest.raises(ConfigError, match="Sequential is on the meta device and has no values; load its weights first"):
        calibrate(model, torch.ones(2, 8))
    model.to_empty(device="cpu")
    model[0].reset_parameters()
    calibrate(model, torch.ones(2, 8))
    model(torch.ones(2, 8)).sum().backward()


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


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_step_with_inf_or_nan_leaves_the_running_average(value):
    model, x = mlp(8, 8), torch.randn(4, 8) + 1
    apply_velora(model, "0", sub_token_size=4, init="running_average")
    calibrate(model, x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bad = x.clone()
    bad[1, 3] = value
    model(bad)
    with pytest.warns(UserWarning, match="inf or NaN in the input of 0: this step moves no direction there"):
        update_directions(model)
    model(0 * x)  # says nothing about a direction either
    update_directions(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model(2 * x + 3)  # and it goes on
    update_directions(model)
    mean = reference.array(x).reshape(-1, 4).mean(0)
    mean += MOMENTUM * (reference.array(2 * x + 3).reshape(-1, 4).mean(0) - mean)
    np.testing.assert_allclose(model[0].average, mean, rtol=0, atol=1e-6)  # fp32


def test_a_running_average_of_half_precision_weights_moves_by_small_steps():
    """In bfloat16 a change below 0.4 % would be rounded away, a step after another."""
    model, x = mlp(8, 8).bfloat16(), torch.ones(4, 8)
    apply_velora(model, "0", sub_token_size=4, init="running_average")
    calibrate(model, x.bfloat16())
    mean = np.ones(4)
    for _ in range(20):
        model((x + 2**-6).bfloat16())
        update_directions(model)
        mean += MOMENTUM * (1 + 2**-6 - mean)
    np.testing.assert_allclose(model[0].average, mean, rtol=0, atol=1e-5)  # fp32


def test_fixed_directions_do_not_move():
    model = mlp(8, 8)
    apply_velora(model, "0", sub_token_size=4)
    calibrate(model, torch.randn(4, 8))
    before = model[0].direction.clone()
    model(torch.randn(4, 8)).sum().backward()
    update_directions(model)
    assert torch.equal(model[0].direction, before)
