"""VeLoRA on SSF and Hydra in a whole network: which layers, the same outputs, exact bytes, gradients of the equations."""

from __future__ import annotations

import adapters
import pytest
import reference
import tiny
import torch

from velora import apply_velora, calibrate
from velora.nn.apply import velora_layers

TOKENS = 2 * 5  # two images of four patches and the class token


def pair(name: str, layers: list[str], size: int):
    """The same adapted network without and with VeLoRA, and the images."""
    images, models = tiny.image_batch(), []
    for _ in range(2):
        model = getattr(adapters, name)().apply(adapters.network("vit"), adapters.config()).train()
        adapters.perturb(model)
        models.append(model)
    apply_velora(models[1], layers, sub_token_size=size)
    calibrate(models[1], images)
    return *models, images


def test_ssf_layers_are_the_scales_and_shifts():
    _, model, _ = pair("ssf", ["value", "up"], 8)
    names = [f"blocks.{i}.{name}.scale_shift" for i in range(2) for name in ("attn.qkv", "mlp.fc1")]
    assert list(velora_layers(model)) == names


def test_hydra_layers_are_the_down_projections():
    _, model, _ = pair("hydra", ["output", "down"], 8)
    assert list(velora_layers(model)) == [
        f"blocks.{i}.{name}.{branch}.down"
        for i in range(2)
        for name in ("attn.proj", "mlp.fc2")
        for branch in ("parallel", "sequential")
    ]


@pytest.mark.parametrize(
    ("name", "layers", "features", "shared"),
    [
        ("ssf", ["value", "up"], 96 + 64, 0),  # the outputs of qkv and of fc1, which only the gradient of γ needed
        # The inputs and the outputs of proj and fc2. The input of proj is the attention's output, which attention keeps
        # as well; in the first block nothing before proj trains, so there it goes away.
        ("hydra", ["output", "down"], 32 + 32 + 64 + 32, 32),
    ],
)
def test_bytes_kept_for_backward(name, layers, features, shared):
    plain, model, images = pair(name, layers, 8)
    kept = [
        reference.saved_bytes(lambda m=m: m(images).square().mean(), [*m.parameters(), *m.buffers()])
        for m in (plain, model)
    ]
    blocks, floats, codes = 2, 4, features // 8
    assert kept[0] - kept[1] == TOKENS * floats * (blocks * (features - codes) - shared)


@pytest.mark.parametrize(("name", "layers"), [("ssf", ["value", "up"]), ("hydra", ["output", "down"])])
def test_outputs_are_the_same_and_the_last_layers_gradient_is_the_equations(name, layers):
    plain, model, images = pair(name, layers, 8)
    seen = {}
    last = list(velora_layers(model))[-1]
    layer = model.get_submodule(last)
    layer.register_forward_hook(lambda _m, args, y: seen.update(x=args[0], y=y))
    outputs = model(images), plain(images)
    assert torch.equal(*outputs)
    seen["y"].retain_grad()
    for output in outputs:
        output.square().mean().backward()
    x, dy, v = (reference.array(t) for t in (seen["x"], seen["y"].grad, layer.direction))
    if name == "ssf":
        _, expected, bias = reference.scale_shift_gradients(x, reference.array(layer.weight), dy, v, 1.0)
    else:
        _, expected, bias = reference.linear_gradients(x, reference.array(layer.weight), dy, v, 1.0)
    # float32 sums over ten tokens
    torch.testing.assert_close(layer.weight.grad.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(layer.bias.grad.double(), torch.from_numpy(bias), rtol=1e-4, atol=1e-7)
    # what lies behind the last VeLoRA layer has exact gradients
    for parameter, other in zip(model.head.parameters(), plain.head.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
