"""Lean convolutional networks against the plain ones of timm: equal numbers, fewer bytes."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from velora import apply_lean, apply_velora, calibrate, remove_lean
from velora.errors import ConfigError
from velora.memory.freed import what_would_be_freed
from velora.memory.ledger import measure_saved_bytes, take_ledger
from velora.nn.blocks import checkpoint_blocks
from velora.nn.image_classifier import ConvNetClassifier
from velora.nn.lean_conv import _packed, _unpacked

NETWORKS = {
    "resnet": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32]}),
    "bottleneck": ("resnet50", {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}),
    "convnext": ("convnext_tiny", {"depths": [1] * 4, "dims": [16, 16, 32, 32], "kernel_sizes": 3}),
}
LABELS = torch.tensor([0, 4, 2, 1])


def network(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    kind, options = NETWORKS[name]
    return ConvNetClassifier(timm.create_model(kind, num_classes=5, **options)).to(dtype).train()


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def step(model: nn.Module, x: Tensor, autocast: bool = False) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(pixel_values=x, labels=LABELS).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("how", ["full", "velora", "checkpointed", "bf16 autocast", "channels last", "frozen norms"])
def test_the_same_loss_gradients_and_running_means(name: str, how: str) -> None:
    plain, x = network(name), images()
    if how == "velora":
        apply_velora(plain, ["net.layer*.conv*"] if name != "convnext" else ["*mlp.fc*"], sub_token_size=4)
        calibrate(plain, {"pixel_values": x, "labels": LABELS})
    if how == "checkpointed":
        checkpoint_blocks(plain)
    if how == "channels last":
        plain, x = plain.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    if how == "frozen norms":
        for module in plain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        plain.train()
    lean = copy.deepcopy(plain)
    apply_lean(lean)
    half = how == "bf16 autocast"
    (loss, gradients), (lean_loss, lean_gradients) = step(plain, x, half), step(lean, x, half)
    # what is made again has the same bits; of LayerNorm's gradients and of the products the order of sums may differ
    assert lean_loss == pytest.approx(loss, rel=1e-6)
    assert lean_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        largest = gradient.abs().max()
        assert (lean_gradients[key] - gradient).abs().max() <= (2e-2 if half else 1e-5) * largest + 1e-9, key
    for (key, ours), theirs in zip(lean.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("name", ["resnet", "bottleneck"])
def test_exact_in_float64(name: str) -> None:
    plain, x = network(name, torch.float64), images(torch.float64)
    lean = copy.deepcopy(plain)
    apply_lean(lean)
    gradients, lean_gradients = step(plain, x)[1], step(lean, x)[1]
    for key, gradient in gradients.items():
        assert (lean_gradients[key] - gradient).abs().max() <= 1e-12 * gradient.abs().max() + 1e-15, key
    remove_lean(lean)
    assert [type(m) for m in lean.modules()] == [type(m) for m in plain.modules()]


def stack(inplace: bool = True) -> nn.Sequential:
    """conv, norm, ReLU, conv, norm, ReLU, pooling on 8 channels of 16 x 16."""
    layers = [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace)]
    return nn.Sequential(*layers, *copy.deepcopy(layers), nn.MaxPool2d(2))


def test_bytes_of_a_stack() -> None:
    """Plain: x and y of both norms, their two numbers per channel and the indices; lean: no y."""
    x, num = torch.randn(2, 8, 16, 16), 2 * 8 * 16 * 16
    statistics, indices = 2 * 2 * 8 * 4, num // 4 * 8
    model = stack()
    plain = measure_saved_bytes(lambda: model(x).sum())
    assert plain == 4 * 4 * num + statistics + indices
    apply_lean(model)
    assert measure_saved_bytes(lambda: model(x).sum()) == 2 * 4 * num + statistics + indices


def test_behind_a_sum_velora_frees_what_relu_kept() -> None:
    """A ReLU without a recipe keeps one bit a number where there is a VeLoRA convolution, and y where there is none."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.conv = nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.relu(x + 1))

    x, num = torch.randn(2, 8, 16, 16, requires_grad=True), 2 * 8 * 16 * 16
    model = Block()
    assert measure_saved_bytes(lambda: model(x).sum()) == 4 * num
    with pytest.raises(ConfigError, match="has no norm, activation"):
        apply_lean(nn.Sequential(nn.Conv2d(8, 8, 1)))
    apply_velora(model, ["conv"], sub_token_size=4)
    calibrate(model, x)
    assert measure_saved_bytes(lambda: model(x).sum()) == 4 * num + num  # the codes beside y
    apply_lean(model)
    ledger = take_ledger(model, lambda: model(x).sum())
    assert ledger.total_bytes == num + num // 8
    plain = Block()
    plain.load_state_dict(model.state_dict(), strict=False)
    expected = torch.autograd.grad(plain(x).square().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), x)[0], expected, rtol=0, atol=0)


def test_the_prediction_knows_of_the_signs() -> None:
    """What the exact lean network's ledger says of VeLoRA in all convolutions is what then happens."""
    model = network("resnet")
    apply_lean(model)
    batch = {"pixel_values": images(), "labels": LABELS}
    ledger = take_ledger(model, lambda: model(**batch).loss)
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n != "net.conv1"]
    (freed,) = what_would_be_freed(ledger, {"all": convolutions}, dict.fromkeys(convolutions, 4))
    with_velora = network("resnet")
    apply_velora(with_velora, convolutions, sub_token_size=4)
    calibrate(with_velora, batch)
    apply_lean(with_velora)
    saved = ledger.total_bytes - take_ledger(with_velora, lambda: with_velora(**batch).loss).total_bytes
    last = (
        4 * 32 * 2 * 2
    )  # numbers of the last ReLU: no convolution reads them, and signs take their place all the same
    assert saved == freed.saved_bytes + 4 * last - last // 8
    assert freed.saved_bytes > 0


@pytest.mark.parametrize("num", [1, 7, 8, 9, 1000])
def test_signs_are_packed_eight_to_a_byte(num: int) -> None:
    flags = torch.rand(num, generator=torch.Generator().manual_seed(num)) > 0.5
    bits = _packed(flags)
    assert bits.nbytes == -(-num // 8)
    assert torch.equal(_unpacked(bits, flags.shape), flags)


def test_a_graph_that_is_used_twice_and_an_input_that_is_not_changed() -> None:
    plain = stack().double()
    lean = copy.deepcopy(plain)
    apply_lean(lean)
    x = torch.randn(2, 8, 16, 16, dtype=torch.float64)
    found = []
    for model in (plain, lean):
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    apply_lean(model)
    y = model[0](x.float())
    before = y.clone()
    model[1](y)
    assert torch.equal(y, before)  # out of place: a recipe on y stays true


def test_padding_of_other_modes_and_a_second_derivative() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect")).double()
    lean = copy.deepcopy(model)
    apply_lean(lean)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    gradients = [torch.autograd.grad(m(x).square().sum(), [x, *m.parameters()]) for m in (model, lean)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (dx,) = torch.autograd.grad(lean(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="remove_lean"):
        dx.sum().backward()
