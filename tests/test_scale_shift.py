"""VeloraScaleShift against float64 loops and the plain scale and shift."""

from __future__ import annotations

import pytest
import reference
import torch
from torch.utils.checkpoint import checkpoint
from twin_helpers import ROUNDING, gradients, inputs, take_values

from velora import VeloraScaleShift
from velora.nn.scale_shift import ScaleShift

N, D, G, S = 6, 12, 3, 4


def pair(dtype: torch.dtype = torch.float32, scale: float = 1.0, size: int = S) -> tuple[ScaleShift, VeloraScaleShift]:
    torch.manual_seed(0)
    plain = ScaleShift(D, dtype=dtype)
    twin = VeloraScaleShift(D, dtype=dtype, sub_token_size=size, scale=scale, init="random")
    take_values(twin, plain)
    return plain, twin


def test_plain_layer_is_the_published_equation():
    layer = ScaleShift(2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([2.0, 3.0]))
        layer.bias.copy_(torch.tensor([0.5, -1.0]))
    assert torch.equal(layer(torch.tensor([[[1.0, 10.0]]])), torch.tensor([[[2.5, 29.0]]]))


def test_plain_layer_starts_near_the_identity():
    torch.manual_seed(0)
    layer = ScaleShift(10_000)
    assert layer.weight.mean().item() == pytest.approx(1.0, abs=1e-3)  # 5 standard errors of 0.02 / 100
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.bias.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert layer.bias.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_gradients_equal_the_loops(dtype, scale):
    _, layer = pair(dtype, scale)
    x, dy = inputs(N, D, dtype=dtype), inputs(N, D, dtype=dtype, seed=2)
    got = gradients(layer, x, dy)
    v, gamma = layer.direction.double().numpy(), reference.array(layer.weight)
    expected = reference.scale_shift_gradients(reference.array(x), gamma, reference.array(dy), v, scale)
    for mine, loops in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        tolerance = 8 * ROUNDING[dtype] * max(1.0, abs(loops).max())
        torch.testing.assert_close(mine.double(), torch.from_numpy(loops), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(N, D), (2, N, D), (2, 2, N, D), (0, D)])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_all_but_gammas_gradient_is_the_plain_layers(dtype, shape):
    plain, layer = pair(dtype)
    x, dy = inputs(*shape, dtype=dtype), inputs(*shape, dtype=dtype, seed=2)
    assert torch.equal(layer(x), plain(x))
    mine, theirs = gradients(layer, x, dy), gradients(plain, x, dy)
    assert torch.equal(mine[0], theirs[0])
    tolerance = 4 * ROUNDING[dtype] * 10  # sums of up to 24 terms in another order
    torch.testing.assert_close(mine[2], theirs[2], rtol=0, atol=tolerance)


def test_non_contiguous_input():
    _, layer = pair()
    x, dy = inputs(D, N, 2).permute(2, 1, 0), inputs(D, N, 2, seed=2).permute(2, 1, 0)
    for one, other in zip(gradients(layer, x, dy), gradients(layer, x.contiguous(), dy.contiguous()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=4e-6)  # sums of 12 in another order


def test_gradcheck_where_the_projection_is_exact():
    for layer, x in (
        (pair(torch.float64, size=1)[1], inputs(2, 3, D, dtype=torch.float64)),
        (on := pair(torch.float64)[1], torch.kron(inputs(N, G, dtype=torch.float64), on.direction)),
    ):
        assert torch.autograd.gradcheck(
            lambda w, b, layer=layer, x=x: torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,)),
            (layer.weight, layer.bias),
        )


def test_bytes_kept_for_backward_are_the_codes():
    plain, layer = pair()
    x = inputs(2, N, D).requires_grad_()
    assert reference.saved_bytes(lambda: layer(x * 1), [*layer.parameters(), *layer.buffers()]) == 2 * N * G * 4
    assert reference.saved_bytes(lambda: plain(x * 1), plain.parameters()) == 2 * N * D * 4


def test_frozen_weight_eval_and_no_grad_are_the_plain_layer():
    plain, layer = pair()
    x = inputs(N, D)
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))
    layer.weight.requires_grad_(False)
    assert reference.saved_bytes(lambda: layer(x), layer.parameters()) == 0
    layer.weight.requires_grad_(True)
    layer.eval()
    dy = inputs(N, D, seed=2)
    for mine, theirs in zip(gradients(layer, x, dy), gradients(plain, x, dy), strict=True):
        assert torch.equal(mine, theirs)


def test_half_precision_input_of_a_full_precision_layer():
    """As after a linear layer under autocast: the element-wise operations promote to float32."""
    plain, layer = pair()
    x, dy = inputs(N, D, dtype=torch.bfloat16), inputs(N, D, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain(x))
        mine, theirs = gradients(layer, x, dy), gradients(plain, x, dy)
    assert [g.dtype for g in mine] == [g.dtype for g in theirs] == [torch.bfloat16, torch.float32, torch.float32]
    assert torch.equal(mine[0], theirs[0])
    v, gamma = layer.direction.double().numpy(), reference.array(layer.weight)
    loops = reference.scale_shift_gradients(reference.array(x), gamma, reference.array(dy), v, 1.0)[1]
    tolerance = 8 * ROUNDING[torch.bfloat16] * abs(loops).max()  # the codes are in bfloat16
    torch.testing.assert_close(mine[1].double(), torch.from_numpy(loops), rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [64, 65_536])
def test_long_sums_lose_nothing_in_half_precision(dtype, tokens):
    layer = VeloraScaleShift(8, sub_token_size=4, dtype=dtype)
    layer.set_direction(torch.full((4,), 0.5))
    x, dy = inputs(tokens, 8).abs().add(0.5).to(dtype), inputs(tokens, 8, seed=2).abs().add(0.5).div(64).to(dtype)
    z = x.double().view(tokens, 2, 4).sum(-1, keepdim=True) / 2
    expected = ((dy.double().view(tokens, 2, 4) * z).sum(0) / 2).flatten()
    layer(x).backward(dy)
    error = ((layer.weight.grad.double() - expected).abs() / expected).max()
    assert error < 2 * ROUNDING[dtype]  # the result, and what is left of the codes' roundings


def test_codes_do_not_overflow_in_float16():
    size = 4096
    layer = VeloraScaleShift(size, sub_token_size=size)
    layer.set_direction(torch.full((size,), size**-0.5))
    x, dy = torch.full((1, size), 60_000.0, dtype=torch.float16), torch.full((1, size), 0.25)
    layer(x).backward(dy)
    torch.testing.assert_close(layer.weight.grad, torch.full((size,), 15_000.0), rtol=2 * 2**-11, atol=0)


def test_directions_stay_float32_and_sums_stay_out_of_autocast():
    layer = VeloraScaleShift(8, sub_token_size=4)
    v = torch.full((4,), 0.5)
    layer.set_direction(v)
    x, dy = inputs(64, 8), inputs(64, 8, seed=2)
    expected = torch.einsum(
        "ngs,ngt,t,s->gs", dy.double().view(64, 2, 4), x.double().view(64, 2, 4), v.double(), v.double()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).backward(dy)
    torch.testing.assert_close(layer.weight.grad.double(), expected.flatten(), rtol=0, atol=1e-5)  # fp32
    assert layer.bfloat16().direction.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant):
    _, layer = pair()
    x, dy = inputs(N, D).requires_grad_(), inputs(N, D, seed=2)
    direct = gradients(layer, x, dy)
    checkpoint(layer, x, use_reentrant=use_reentrant).backward(dy)
    for one, other in zip(direct, [x.grad, layer.weight.grad, layer.bias.grad], strict=True):
        assert torch.equal(one, other)


def test_compiles_in_one_graph():
    _, layer = pair()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = inputs(2, N, D), inputs(2, N, D, seed=2)
    for one, other in zip(gradients(layer, x, dy), gradients(compiled, x, dy), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=4e-6)  # decompositions may order sums differently


def test_second_derivative_and_missing_direction_are_refused():
    _, layer = pair()
    x = inputs(N, D).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="VeLoRA has no second derivative"):
        dx.sum().backward()
    with pytest.raises(RuntimeError, match="has no direction yet"):
        VeloraScaleShift(D, num_groups=G)(x)
