"""VeloraLinear against float64 loops, nn.Linear and PEFT's VeLoRA. Half precision and autocast: test_linear_precision.py."""

from __future__ import annotations

import copy
import math

import pytest
import reference
import torch
from linear_helpers import D, G, M, N, S, pair
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from twin_helpers import ROUNDING, gradients, inputs

from velora import VeloraLinear
from velora.errors import ConfigError


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_gradients_equal_the_loops(dtype, scale, bias):
    _, layer = pair(dtype, bias, scale)
    x, dy = inputs(N, D, dtype=dtype), inputs(N, M, dtype=dtype, seed=2)
    got = gradients(layer, x, dy)
    v, weight = layer.direction.double().numpy(), reference.array(layer.weight)
    expected = reference.linear_gradients(reference.array(x), weight, reference.array(dy), v, scale)
    for mine, loops in zip(got, expected, strict=False):
        assert mine.dtype == dtype
        tolerance = 8 * ROUNDING[dtype] * max(1.0, abs(loops).max())
        torch.testing.assert_close(mine.double(), torch.from_numpy(loops), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(N, D), (2, N, D), (2, 2, N, D), (1, D), (D,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_all_but_the_weight_gradient_is_the_plain_layers_bit_for_bit(dtype, bias, shape):
    plain, layer = pair(dtype, bias)
    x = inputs(*shape, dtype=dtype)
    assert torch.equal(layer(x), plain(x))
    dy = inputs(*shape[:-1], M, dtype=dtype, seed=2)
    mine, theirs = gradients(layer, x, dy), gradients(plain, x, dy)
    assert mine[0].shape == x.shape
    assert torch.equal(mine[0], theirs[0])
    if bias:
        assert torch.equal(mine[2], theirs[2])


def test_input_of_any_rank_gives_the_gradient_of_its_tokens():
    _, layer = pair()
    x, dy = inputs(4, N, D), inputs(4, N, M, seed=2)
    flat = gradients(layer, x.reshape(-1, D), dy.reshape(-1, M))
    for one, other in zip(gradients(layer, x, dy), flat, strict=True):
        torch.testing.assert_close(one.view_as(other), other, rtol=0, atol=1e-6)  # another order of the same sums


@pytest.mark.parametrize("kind", ["transposed", "sliced", "expanded"])
def test_non_contiguous_input_and_gradient(kind):
    _, layer = pair()
    if kind == "transposed":
        x, dy = inputs(D, N, 2).permute(2, 1, 0), inputs(M, N, 2).permute(2, 1, 0)
    elif kind == "sliced":
        x, dy = inputs(2, N, 2 * D)[..., ::2], inputs(2, N, 2 * M)[..., ::2]
    else:
        x, dy = inputs(1, 1, D).expand(2, N, D), inputs(1, 1, 1).expand(2, N, M)
    assert not x.is_contiguous()
    for one, other in zip(gradients(layer, x, dy), gradients(layer, x.contiguous(), dy.contiguous()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, D), (2, 0, D)])
def test_empty_batch(shape):
    _, layer = pair()
    x = torch.empty(shape, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert torch.equal(layer.weight.grad, torch.zeros(M, D))
    assert torch.equal(layer.bias.grad, torch.zeros(M))


def test_frozen_input_and_frozen_bias():
    _, layer = pair()
    dy = inputs(N, M, seed=2)
    everything = gradients(layer, inputs(N, D), dy)
    layer.bias.requires_grad_(False)
    layer(inputs(N, D)).backward(dy)
    assert torch.equal(layer.weight.grad, everything[1])
    assert layer.bias.grad is None


def test_frozen_weight_is_the_plain_layer():
    plain, layer = pair()
    plain.weight.requires_grad_(False)
    layer.weight.requires_grad_(False)
    x = inputs(N, D).requires_grad_()
    assert reference.saved_bytes(lambda: layer(x), layer.parameters()) == 0
    y = layer(x)
    assert type(y.grad_fn) is type(plain(x).grad_fn)
    y.sum().backward()
    assert torch.equal(x.grad, torch.autograd.grad(plain(x).sum(), x)[0])
    assert torch.equal(layer.bias.grad, torch.full((M,), float(N)))


def test_eval_and_no_grad_are_the_plain_layer():
    plain, layer = pair()
    x, dy = inputs(N, D), inputs(N, M, seed=2)
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))
    layer.eval()
    assert type(layer(x).grad_fn) is type(plain(x).grad_fn)
    for mine, theirs in zip(gradients(layer, x, dy), gradients(plain, x, dy), strict=True):
        assert torch.equal(mine, theirs)


# The projection is exact for S = 1, where v is 1 or -1, and for inputs whose sub-tokens lie on v.


def test_gradcheck_where_sub_tokens_are_single_features():
    plain, layer = pair(torch.float64, size=1)
    x = inputs(2, 3, D, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,)), (x, layer.weight, layer.bias)
    )
    dy = inputs(2, 3, M, dtype=torch.float64, seed=2)
    for mine, theirs in zip(gradients(layer, x, dy), gradients(plain, x, dy), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)  # float64


def test_gradcheck_where_inputs_lie_on_the_direction():
    plain, layer = pair(torch.float64)
    x = torch.kron(inputs(N, G, dtype=torch.float64), layer.direction)
    arguments = (layer.weight, layer.bias)
    assert torch.autograd.gradcheck(
        lambda w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,)), arguments
    )
    dy = inputs(N, M, dtype=torch.float64, seed=2)
    for mine, theirs in zip(gradients(layer, x, dy), gradients(plain, x, dy), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)  # float64


def test_equals_pefts_velora():
    peft_velora = pytest.importorskip("peft.tuners.lora.velora")
    _, layer = pair(scale=0.5, features=(48, 20), size=8)
    x, dy = inputs(2, 16, 48), inputs(2, 16, 20, seed=2)

    class Peft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = layer.weight, layer.bias

        def forward(self, x: Tensor) -> Tensor:
            return peft_velora.VeloraFunction.apply(x, self.weight, self.bias, layer.direction, 6, 0.5)

    for mine, theirs in zip(gradients(layer, x, dy), gradients(Peft(), x, dy), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=4e-6)  # 32 tokens: another order of sums of size ~10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_kept_for_backward_are_the_codes(dtype):
    plain, layer = pair(dtype)
    x = inputs(2, N, D, dtype=dtype).requires_grad_()
    own = [*layer.parameters(), *layer.buffers()]
    assert reference.saved_bytes(lambda: layer(x * 1), own) == 2 * N * G * dtype.itemsize
    assert reference.saved_bytes(lambda: plain(x * 1), plain.parameters()) == 2 * N * D * dtype.itemsize


class _Sizes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numels: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numels += [t.numel() for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)]
        return out


def test_weight_gradient_is_factored():
    """No tensor of N D elements is made for it, and its product costs 2 N M G operations."""
    tokens, width, out, groups = 64, 96, 4, 12
    _, layer = pair(size=width // groups, features=(width, out))
    x, dy = inputs(tokens, width), inputs(tokens, out, seed=2)
    y = layer(x)
    with _Sizes() as sizes, FlopCounterMode(display=False) as flops:
        y.backward(dy)
    assert max(sizes.numels) < tokens * width
    assert flops.get_total_flops() == 2 * tokens * out * groups
    y = layer(x.requires_grad_())
    with FlopCounterMode(display=False) as flops:
        y.backward(dy)
    assert flops.get_total_flops() == 2 * tokens * out * groups + 2 * tokens * out * width  # and dx


def test_accumulation_adds_up():
    _, layer = pair()
    x, dy = inputs(4, N, D), inputs(4, N, M, seed=2)
    for one, its in zip(x, dy, strict=True):
        layer(one).backward(its)
    accumulated = layer.weight.grad.clone()
    torch.testing.assert_close(
        accumulated, gradients(layer, x, dy)[1], rtol=0, atol=4e-6
    )  # sums of 24 in another order


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("init", ["fixed_average", "running_average"])
def test_checkpointing_gives_the_same_gradients(use_reentrant, init):
    _, first = pair(features=(D, D))
    model = nn.Sequential(first, nn.GELU(), VeloraLinear(D, M, sub_token_size=S, init=init))
    model[2].set_direction(model[0].direction, model[0].direction)
    x, dy = inputs(2, N, D), inputs(2, N, M, seed=2)
    direct = gradients(model, x, dy)
    again = x.detach().requires_grad_()
    y = checkpoint(model, again, use_reentrant=use_reentrant)
    y.backward(dy)
    recomputed = [again.grad, *(p.grad for p in model.parameters())]
    for one, other in zip(direct, recomputed, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("init", ["fixed_average", "running_average"])
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_in_one_graph(init, autocast):
    layer = VeloraLinear(D, M, sub_token_size=S, init=init)
    layer.set_direction(torch.full((S,), 0.5), torch.full((S,), 0.5))
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    x, dy = inputs(2, N, D), inputs(2, N, M, seed=2)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            one, two = layer(x), compiled(x)
        assert torch.equal(one, two)
        one.backward(dy.to(one.dtype))
        two.backward(dy.to(one.dtype))
    torch.testing.assert_close(other.weight.grad, layer.weight.grad, rtol=0, atol=1e-6)  # fp32; decompositions differ
    if init == "running_average":
        assert torch.equal(other._batch_statistics.flat, layer._batch_statistics.flat)
        assert layer._batch_statistics.count == 2 * 2 * N * G


@pytest.mark.slow
def test_compiles_with_inductor():
    _, layer = pair()
    compiled = torch.compile(layer, fullgraph=True)
    x, dy = inputs(2, N, D), inputs(2, N, M, seed=2)
    for one, other in zip(gradients(layer, x, dy), gradients(compiled, x, dy), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)  # inductor orders sums its own way


def test_second_derivative_is_refused():
    _, layer = pair()
    x = inputs(N, D).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="VeLoRA has no second derivative"):
        dx.sum().backward()
    (dw,) = torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="VeLoRA has no second derivative"):
        dw.sum().backward()


def test_training_without_a_direction_is_refused_until_there_is_one():
    layer = VeloraLinear(D, M, num_groups=G)
    x = inputs(N, D)
    with pytest.raises(RuntimeError, match=r"call velora.calibrate\(model, batch\)"):
        layer(x)
    with torch.no_grad():
        layer(x)
    _, calibrated = pair()
    layer.load_state_dict(calibrated.state_dict())
    layer(x).sum().backward()
    for forget in (
        layer.reset_parameters,
        lambda: layer.load_state_dict(VeloraLinear(D, M, num_groups=G).state_dict()),
    ):
        forget()
        with pytest.raises(RuntimeError, match="has no direction yet"):
            layer(x)
    layer.direction.copy_(calibrated.direction)  # as an in-place checkpoint loader does it
    layer(x).sum().backward()


def test_direction_survives_saving_bit_for_bit(tmp_path):
    _, layer = pair(torch.bfloat16)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = VeloraLinear(D, M, dtype=torch.bfloat16, num_groups=G)
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    assert torch.equal(other.direction, layer.direction)
    assert sorted(layer.state_dict()) == ["bias", "direction", "weight"]


def test_copy_and_dtype_move_carry_the_direction():
    _, layer = pair()
    assert torch.equal(copy.deepcopy(layer).direction, layer.direction)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(half.direction, layer.direction)
    half(inputs(N, D, dtype=torch.bfloat16)).sum().backward()


def test_built_on_meta_and_made_real():
    layer = VeloraLinear(D, M, num_groups=G, device="meta")
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    with pytest.raises(RuntimeError, match="has no direction yet"):
        layer(inputs(N, D))
    drawn = VeloraLinear(D, M, num_groups=G, device="meta", init="random", seed=3).to_empty(device="cpu")
    drawn.reset_parameters()
    assert torch.equal(drawn.direction, VeloraLinear(D, M, num_groups=G, init="random", seed=3).direction)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="does not divide the width 12"):
        VeloraLinear(D, M, num_groups=5)
    assert VeloraLinear(D, M, num_groups=G).sub_token_size == S
    assert "num_groups=3, sub_token_size=4" in repr(VeloraLinear(D, M, sub_token_size=S))


def test_a_unit_direction_never_enlarges_the_weight_gradient_of_one_token():
    """|x̂| <= |x| for a projection, so for one token |dW| <= |dy||x|."""
    _, layer = pair(torch.float64)
    x, dy = inputs(1, D, dtype=torch.float64), inputs(1, M, dtype=torch.float64, seed=2)
    assert gradients(layer, x, dy)[1].norm() <= dy.norm() * x.norm() * (1 + math.ulp(8.0))
