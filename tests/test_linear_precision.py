"""VeloraLinear in half precision and under autocast: where sums are float32, and that directions stay so."""

from __future__ import annotations

import pytest
import reference
import torch
from linear_helpers import D, G, M, N, S, pair
from torch import nn
from twin_helpers import ROUNDING, gradients, inputs

from velora import VeloraLinear


def test_autocast_keeps_codes_in_half_precision_and_no_copy_of_the_weight():
    plain, layer = pair()
    x = inputs(N, D).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert reference.saved_bytes(lambda: layer(x * 1), [*layer.parameters(), *layer.buffers()]) == N * G * 2
        halves = N * D * 2 + M * D * 2  # its input and its weight in bfloat16
        assert reference.saved_bytes(lambda: plain(x * 1), plain.parameters()) == halves


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_autocast(dtype, bias):
    plain, layer = pair(bias=bias)
    x, dy = inputs(2, N, D), inputs(2, N, M, dtype=dtype, seed=2)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        assert y.dtype == dtype
        assert torch.equal(y, plain(x))
        mine, theirs = gradients(layer, x, dy), gradients(plain, x, dy)
    assert [g.dtype for g in mine] == [torch.float32] * len(mine)
    assert torch.equal(mine[0], theirs[0])
    if bias:
        assert torch.equal(mine[2], theirs[2])
    v, weight = layer.direction.double().numpy(), reference.array(layer.weight)
    dw = reference.linear_gradients(reference.array(x), weight, reference.array(dy), v, 1.0)[1]
    tolerance = 8 * ROUNDING[dtype] * abs(dw).max()
    torch.testing.assert_close(mine[1].double(), torch.from_numpy(dw), rtol=0, atol=tolerance)


def test_autocast_leaves_float64_alone():
    plain, layer = pair(torch.float64)
    x = inputs(N, D, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain(x))
        assert layer(x).dtype == torch.float64


def test_dtypes_that_do_not_fit_are_refused_as_by_the_plain_layer():
    plain, layer = pair()
    for each in (plain, layer):
        with pytest.raises(RuntimeError, match="dtype"):
            each(inputs(N, D, dtype=torch.float64))


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.float16)])
def test_directions_stay_float32_where_weights_become_half(cast):
    layer = VeloraLinear(D, M, num_groups=G, init="running_average")
    v = torch.nn.functional.normalize(inputs(S), dim=0)
    layer.set_direction(v, 3 * v)
    model = cast(nn.Sequential(layer))
    assert layer.weight.dtype != torch.float32
    assert torch.equal(layer.direction, v)
    assert torch.equal(layer.average, 3 * v)
    assert model.double()[0].direction.dtype == torch.float64
    assert torch.equal(model.float()[0].direction, v)
    assert VeloraLinear(D, M, num_groups=G, dtype=torch.bfloat16).direction.dtype == torch.float32
    assert VeloraLinear(D, M, num_groups=G, dtype=torch.float64).direction.dtype == torch.float64


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_with_half_precision_directions_is_widened(assign):
    _, layer = pair(torch.bfloat16)
    state = {name: tensor.bfloat16() for name, tensor in layer.state_dict().items()}
    other = VeloraLinear(D, M, dtype=torch.bfloat16, num_groups=G)
    other.load_state_dict(state, assign=assign)
    assert other.direction.dtype == torch.float32
    assert torch.equal(other.direction, state["direction"].float())
    other(inputs(N, D, dtype=torch.bfloat16)).sum().backward()


@pytest.mark.parametrize("weights", ["half", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [64, 65_536])
def test_long_sums_lose_nothing_in_half_precision(dtype, weights, tokens):
    """All terms have one sign: float32 sums are off by its rounding, and sums in half would stall or overflow."""
    layer = VeloraLinear(8, 2, bias=False, sub_token_size=4)
    layer.set_direction(torch.full((4,), 0.5))
    x, dy = inputs(tokens, 8).abs().add(0.5).to(dtype), inputs(tokens, 2, seed=2).abs().add(0.5).div(64).to(dtype)
    z = x.double().view(tokens, 2, 4).sum(-1) / 2  # in the paper's words: u . v
    dw = (dy.double().T @ z).unsqueeze(-1).expand(2, 2, 4).reshape(2, 8) / 2
    with torch.autocast("cpu", dtype=dtype, enabled=weights == "float32"):
        if weights == "half":
            layer.to(dtype)
        layer(x).backward(dy)
    error = ((layer.weight.grad.double() - dw).abs() / dw).max()
    # The codes' roundings average out; beside them, the rounding of the result or of float32 sums
    allowed = 3 * ROUNDING[dtype] / tokens**0.5 + (ROUNDING[dtype] if weights == "half" else 2**-14)
    assert layer.weight.grad.dtype == (torch.float32 if weights == "float32" else dtype)
    assert error < allowed


@pytest.mark.parametrize("inside", [False, True])
def test_a_backward_inside_autocast_sums_in_float32_too(inside):
    _, layer = pair()
    x, dy = inputs(64, D), inputs(64, M, dtype=torch.bfloat16, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    z = (x.bfloat16().view(-1, S) @ layer.direction.bfloat16()).view(64, G)
    expected = torch.einsum("nm,ng,s->mgs", dy.double(), z.double(), layer.direction.double()).reshape(M, D)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
        y.backward(dy)
    torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=0, atol=1e-5)  # fp32; in bfloat16 1e-2


def test_codes_do_not_overflow_in_float16():
    """u . v is 3.8 million here, and float16 ends at 65504."""
    size = 4096
    layer = VeloraLinear(2 * size, 2, bias=False, sub_token_size=size)
    layer.set_direction(torch.full((size,), size**-0.5))
    nn.init.zeros_(layer.weight)
    x = torch.full((3, 2 * size), 60_000.0, dtype=torch.float16)
    x[1] *= -0.5
    dy = torch.tensor([[1.0, 1e-3], [0.5, 1e-3], [0.25, 1e-3]], dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.float16):
        layer(x).backward(dy)
    dw = dy.double().T @ x.double()  # the inputs lie on the direction, so that the projection loses nothing
    torch.testing.assert_close(layer.weight.grad.double(), dw, rtol=2 * ROUNDING[torch.float16], atol=0)
