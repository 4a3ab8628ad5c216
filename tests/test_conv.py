"""The twins of convolutions against float64 loops and the plain layers: over stride, padding, dilation and groups."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import reference
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from twin_helpers import ROUNDING, gradients, inputs, take_values

from velora.errors import ConfigError
from velora.memory.freed import layers_that_free_nothing, what_would_be_freed
from velora.memory.ledger import measure_saved_bytes, take_ledger
from velora.nn.apply import apply_velora, calibrate, remove_velora
from velora.nn.conv import VeloraConv1d, VeloraConv2d, VeloraConv3d
from velora.nn.lean import apply_lean

N, C, M, S = 2, 8, 6, 4
PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TWIN = {1: VeloraConv1d, 2: VeloraConv2d, 3: VeloraConv3d}
PIXELS = {1: (9,), 2: (6, 7), 3: (4, 5, 3)}
SETTINGS = [
    {},
    {"stride": 2},
    {"padding": 1},
    {"padding": 2, "stride": 2, "dilation": 2},
    {"groups": 2},
    {"groups": 2, "padding": 1, "stride": 3},
    {"padding": "same", "dilation": 2},
    {"padding": "same", "kernel_size": 2},
    {"padding": "valid", "bias": False},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect", "stride": 2},
    {"padding": "same", "padding_mode": "replicate", "kernel_size": 2},
    {"kernel_size": 1},
]


def pair(dims: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, **settings) -> tuple[nn.Module, nn.Module]:
    """A plain layer and its calibrated twin with the same values."""
    torch.manual_seed(0)
    settings = {"kernel_size": 3, **settings}
    plain = PLAIN[dims](C, M, dtype=dtype, **settings)
    twin = TWIN[dims](C, M, dtype=dtype, sub_token_size=S, scale=scale, init="random", **settings)
    take_values(twin, plain)
    return plain, twin


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_weight_gradient_equals_the_loops(dims, settings):
    plain, layer = pair(dims, torch.float64, 0.5, **settings)
    x = inputs(N, C, *PIXELS[dims], dtype=torch.float64)
    dy = inputs(*plain(x).shape, dtype=torch.float64, seed=2)
    expected = reference.conv_weight_gradient(plain, x, dy, layer.direction.double().numpy(), 0.5)
    # float64, and the direction rounded to it; sums of up to a few hundred terms of size 1
    np.testing.assert_allclose(gradients(layer, x, dy)[1].numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("dims", "dtype"), [(1, torch.float32), (2, torch.float32), (3, torch.float32), (2, torch.bfloat16)]
)
def test_forward_and_input_gradient_are_the_plain_layers_bit_for_bit(dims, dtype, settings):
    plain, layer = pair(dims, dtype, **settings)
    x = inputs(N, C, *PIXELS[dims], dtype=dtype)
    y = plain(x)
    assert torch.equal(layer(x), y)
    dy = inputs(*y.shape, dtype=dtype, seed=2)
    mine, theirs = gradients(layer, x, dy), gradients(plain, x, dy)
    assert torch.equal(mine[0], theirs[0])
    if plain.bias is not None:  # the same sum of up to 100 terms; torch may choose another kernel for fewer channels
        torch.testing.assert_close(mine[2], theirs[2], rtol=4 * ROUNDING[dtype], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(dtype, autocast):
    plain, layer = pair(2, torch.float32 if autocast else dtype, padding=1)
    x, dy = inputs(N, C, 6, 7, dtype=dtype), inputs(N, M, 6, 7, dtype=dtype, seed=2)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast and dtype != torch.float32):
        assert torch.equal(layer(x), plain(x))
        mine, theirs = gradients(layer, x, dy), gradients(plain, x, dy)
    assert [g.dtype for g in mine] == [g.dtype for g in theirs]
    assert torch.equal(mine[0], theirs[0])
    torch.testing.assert_close(mine[2], theirs[2], rtol=4 * ROUNDING[dtype], atol=1e-5)
    expected = reference.conv_weight_gradient(plain, x, dy, layer.direction.double().numpy(), 1.0)
    tolerance = 8 * ROUNDING[dtype] * abs(expected).max()
    np.testing.assert_allclose(mine[1].double().numpy(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("settings", [{}, {"padding": 1, "stride": 2}, {"groups": 2}, {"kernel_size": 1}], ids=str)
def test_channels_last(dims, settings):
    memory = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    plain, layer = pair(dims, **settings)
    x = inputs(N, C, *PIXELS[dims]).to(memory_format=memory)
    dy = inputs(*plain(x).shape, seed=2).to(memory_format=memory)
    assert torch.equal(layer(x), plain(x))
    assert layer(x).stride() == plain(x).stride()
    mine, theirs = gradients(layer, x, dy), gradients(plain, x, dy)
    assert torch.equal(mine[0], theirs[0])
    assert mine[0].stride() == theirs[0].stride()
    usual = gradients(layer, x.contiguous(), dy.contiguous())[1]
    torch.testing.assert_close(mine[1], usual, rtol=0, atol=1e-4)  # fp32: another order of the same sums, of size ~10
    own = [*layer.parameters(), *layer.buffers()]
    assert reference.saved_bytes(lambda: layer(x * 1), own) == x.nbytes // S
    layer.to(memory_format=memory)
    assert layer.weight.is_contiguous(memory_format=memory)
    torch.testing.assert_close(gradients(layer, x, dy)[1], usual, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["sliced", "expanded"])
def test_non_contiguous_input_and_gradient(kind):
    _, layer = pair(2)
    if kind == "sliced":
        x, dy = inputs(N, C, 6, 14)[..., ::2], inputs(N, 2 * M, 4, 5)[:, ::2]
    else:
        x, dy = inputs(1, C, 1, 1).expand(N, C, 6, 7), inputs(1, 1, 1, 1).expand(N, M, 4, 5)
    for one, other in zip(gradients(layer, x, dy), gradients(layer, x.contiguous(), dy.contiguous()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)  # fp32: sums of up to 40 terms in another order


def test_one_input_without_a_batch_and_an_empty_batch():
    plain, layer = pair(2)
    x, dy = inputs(C, 6, 7), inputs(M, 4, 5, seed=2)
    assert torch.equal(layer(x), plain(x))
    for one, other in zip(gradients(layer, x, dy), gradients(layer, x[None], dy[None]), strict=True):
        assert torch.equal(one, other.view_as(one))
    empty = torch.empty(0, C, 6, 7, requires_grad=True)
    layer(empty).sum().backward()
    assert empty.grad.shape == empty.shape
    assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))


@pytest.mark.parametrize("shape", [(N, C + 1, 6, 7), (6, 7), (1, N, C, 6, 7)], ids=str)
def test_inputs_that_do_not_fit_are_refused_as_by_the_plain_layer(shape):
    plain, layer = pair(2)
    messages = []
    for each in (plain, layer):
        with pytest.raises(RuntimeError) as error:
            each(torch.zeros(shape))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_eval_and_a_frozen_weight_are_the_plain_layer():
    plain, layer = pair(2)
    x = inputs(N, C, 6, 7)
    layer.eval()
    assert type(layer(x).grad_fn) is type(plain(x).grad_fn)
    layer.train().weight.requires_grad_(False)
    assert type(layer(x).grad_fn) is type(plain(x).grad_fn)


@pytest.mark.parametrize("groups", [1, 2])
def test_gradcheck_where_inputs_lie_on_the_direction(groups):
    """The projection is exact there, so that the twin's gradients belong to its forward."""
    _, layer = pair(2, torch.float64, groups=groups)
    z = inputs(N, C // S, 4, 4, dtype=torch.float64)
    x = (z.unsqueeze(2) * layer.direction.view(S, 1, 1)).flatten(1, 2)
    assert torch.autograd.gradcheck(
        lambda w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,)), (layer.weight, layer.bias)
    )


@pytest.mark.parametrize("settings", [{}, {"groups": 2}, {"padding": "same", "kernel_size": 2}], ids=str)
def test_bytes_kept_for_backward_are_the_codes(settings):
    plain, layer = pair(2, **settings)
    x = inputs(N, C, 6, 7).requires_grad_()
    own = [*layer.parameters(), *layer.buffers()]
    assert reference.saved_bytes(lambda: layer(x * 1), own) == x.nbytes // S
    assert reference.saved_bytes(lambda: plain(x * 1), plain.parameters()) >= x.nbytes


def test_weight_gradient_costs_s_times_less():
    _, layer = pair(2)
    x, dy = inputs(N, C, 6, 7), inputs(N, M, 4, 5, seed=2)
    y = layer(x)
    with FlopCounterMode(display=False) as flops:
        y.backward(dy)
    assert flops.get_total_flops() == 2 * (N * 4 * 5) * M * (C // S) * 9


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("init", ["fixed_average", "running_average"])
def test_checkpointing_gives_the_same_gradients_and_computes_no_last_product_again(use_reentrant, init):
    model = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.GELU(), nn.Conv2d(C, M, 3, padding="same", stride=1))
    apply_velora(model, ["0", "2"], sub_token_size=S, init=init)
    x, dy = inputs(N, C, 6, 7), inputs(N, M, 6, 7, seed=2)
    calibrate(model, x)
    direct = gradients(model, x, dy)
    again = x.detach().requires_grad_()
    with FlopCounterMode(display=False) as flops:
        y = checkpoint(model, again, use_reentrant=use_reentrant)
        forward = flops.get_total_flops()
        y.backward(dy)
    recomputed = [again.grad, *(p.grad for p in model.parameters())]
    for one, other in zip(direct, recomputed, strict=True):
        assert torch.equal(one, other)
    if not use_reentrant:
        products = [2 * N * 6 * 7 * out * C * 9 for out in (C, M)]
        codes = sum(products) // S
        assert flops.get_total_flops() - forward == products[0] + sum(products) + codes + 2 * (2 * x.numel())


@pytest.mark.parametrize("settings", [{"padding": 1}, {"padding": 1, "padding_mode": "circular", "groups": 2}], ids=str)
def test_compiles_in_one_graph(settings):
    _, layer = pair(2, **settings)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x, dy = inputs(N, C, 6, 7), inputs(N, M, 6, 7, seed=2)
    for one, other in zip(gradients(layer, x, dy), gradients(compiled, x, dy), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)  # fp32; decompositions differ


def test_second_derivative_is_refused():
    _, layer = pair(2)
    x = inputs(N, C, 6, 7).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="VeLoRA has no second derivative"):
        dx.sum().backward()


# On a model: the same swap, calibration and ledger as for linear layers


def net(inplace: bool = True) -> nn.Module:
    torch.manual_seed(0)
    block = [nn.BatchNorm2d(C), nn.ReLU(inplace=inplace), nn.Conv2d(C, C, 3, padding=1)]
    return nn.Sequential(nn.Conv2d(3, C, 3), *block, *copy.deepcopy(block), nn.Flatten(), nn.Linear(C * 36, 4))


def loss_of(model: nn.Module):
    x = inputs(N, 3, 8, 8)
    return lambda: nn.functional.cross_entropy(model(x), torch.zeros(N, dtype=torch.long))


@pytest.mark.parametrize("init", ["fixed_average", "svd", "running_average"])
def test_calibration_takes_the_channels_at_each_pixel(init):
    model, x = nn.Sequential(nn.Conv2d(C, M, 3)), inputs(N, C, 6, 7) + 0.3
    apply_velora(model, ["0"], num_groups=2, init=init)
    calibrate(model, x)
    rows = x.permute(0, 2, 3, 1).double().reshape(-1, S).numpy()
    expected = np.linalg.svd(rows)[2][0] if init == "svd" else reference.fixed_average(rows, S)
    found = model[0].direction.double().numpy()
    np.testing.assert_allclose(found, expected * np.sign(expected @ found), rtol=0, atol=1e-6)  # stored in float32
    model(x)
    if init == "running_average":
        mean = model[0].take_batch_statistics().mean().numpy()
        np.testing.assert_allclose(mean, rows.mean(0), rtol=0, atol=1e-6)  # float32 sums


def test_swap_and_back_keeps_parameters_and_names():
    model = net()
    names, parameters = list(model.state_dict()), list(model.parameters())
    summary = apply_velora(model, ["3", "6"], sub_token_size=S)
    assert [(layer.width, layer.num_groups) for layer in summary.layers] == [(C, C // S)] * 2
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [name for name in model.state_dict() if "direction" not in name] == names
    remove_velora(model)
    assert type(model[3]) is nn.Conv2d
    assert list(model.state_dict()) == names


def test_what_cannot_have_channel_sub_tokens_is_refused_together():
    model = nn.ModuleDict(
        {"depthwise": nn.Conv2d(C, C, 3, groups=C), "stem": nn.Conv2d(3, C, 3), "good": nn.Conv2d(C, C, 1)}
    )
    with pytest.raises(ConfigError) as error:
        apply_velora(model, ["depthwise", "stem", "good"], sub_token_size=S)
    assert "depthwise: a depthwise convolution reads one channel at a time" in str(error.value)
    assert "stem: sub_token_size=4 does not divide the width 3" in str(error.value)
    assert type(model["good"]) is nn.Conv2d


def test_the_ledger_says_that_behind_batch_norm_and_relu_nothing_is_freed():
    model = net()
    before = measure_saved_bytes(loss_of(model))
    ledger = take_ledger(model, loss_of(model))
    (freed,) = what_would_be_freed(ledger, {"both": ["3", "6"]}, {"3": S, "6": S}, shared_codes=False)
    assert freed.freed_bytes == 0
    assert freed.never_let_go == ("ReLU (Relu)",)
    apply_velora(model, ["3", "6"], sub_token_size=S, init="random")
    codes = 2 * N * (C // S) * 6 * 6 * 4
    assert measure_saved_bytes(loss_of(model)) - before == codes == -freed.saved_bytes
    sentences = layers_that_free_nothing(model, take_ledger(model, loss_of(model)))
    assert len(sentences) == 2
    assert all(s.endswith("its input is also kept by ReLU (Relu); recompute=lean frees it") for s in sentences)
    apply_lean(model)
    assert not layers_that_free_nothing(model, take_ledger(model, loss_of(model)))


def test_behind_batch_norm_alone_the_whole_input_is_freed():
    model = nn.Sequential(
        nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.Conv2d(C, C, 3, padding=1), nn.Flatten(), nn.Linear(C * 36, 4)
    )
    before = measure_saved_bytes(loss_of(model))
    ledger = take_ledger(model, loss_of(model))
    (freed,) = what_would_be_freed(ledger, {"it": ["2"]}, {"2": S})
    apply_velora(model, ["2"], sub_token_size=S, init="random")
    after = measure_saved_bytes(loss_of(model))
    x_bytes = N * C * 6 * 6 * 4
    assert before - after == freed.saved_bytes == x_bytes - x_bytes // S
    assert take_ledger(model, loss_of(model)).grouped("term")["VeLoRA codes"] == x_bytes // S


def test_two_convolutions_on_one_input_share_their_codes():
    left, right = nn.Conv2d(C, M, 3, padding=1), nn.Conv2d(C, M, 1)
    model = nn.ModuleList([left, right])
    apply_velora(model, ["0", "1"], sub_token_size=S, init="random")
    right.set_direction(left.direction)
    x = inputs(N, C, 6, 7)
    own = [*model.parameters(), *model.buffers()]

    def forward() -> Tensor:
        shared = x * 1
        return (left(shared) + right(shared)).sum()

    assert reference.saved_bytes(forward, own) == x.nbytes // S


@pytest.mark.parametrize(("groups", "size"), itertools.product([1, 2], [1, 2]))
def test_dimensions_of_the_codes(groups, size):
    layer = nn.Conv2d(C, M, 3, groups=groups)
    apply_velora(nn.Sequential(layer), ["0"], sub_token_size=size, init="random")
    assert layer.num_groups == C // groups // size
    assert layer.codes(inputs(N, C, 6, 7)).shape == (N, C // size, 6, 7)
