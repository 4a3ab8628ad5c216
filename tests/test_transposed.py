"""The twin of GPT-2's linear layer (transformers' Conv1D) against float64 loops, its plain layer and VeloraLinear."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D
from twin_helpers import ROUNDING, gradients, inputs

from velora import VeloraLinear, apply_velora, calibrate
from velora.nn.apply import remove_velora
from velora.nn.transposed import VeloraTransposedLinear

N, D, M, S = 6, 12, 5, 4


def pair(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[nn.Module, VeloraTransposedLinear]:
    torch.manual_seed(0)
    plain = Conv1D(M, D)
    nn.init.normal_(plain.bias)
    plain.to(dtype)
    model = nn.Sequential(copy.deepcopy(plain))
    apply_velora(model, ["0"], sub_token_size=S, init="random", scale=scale)
    assert type(model[0]) is VeloraTransposedLinear
    return plain, model[0]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_gradients(dtype, autocast):
    if autocast and dtype not in (torch.bfloat16, torch.float16):
        return
    plain, layer = pair(torch.float32 if autocast else dtype, scale=0.5)
    x, dy = inputs(2, N, D, dtype=dtype), inputs(2, N, M, dtype=dtype, seed=2)
    with torch.autocast("cpu", dtype=dtype if autocast else torch.bfloat16, enabled=autocast):
        assert torch.equal(layer(x), plain(x))
        mine, theirs = gradients(layer, x, dy), gradients(plain, x, dy)
    assert [g.dtype for g in mine] == [g.dtype for g in theirs]
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(mine[2], theirs[2])
    weight = reference.array(layer.weight.T)
    v = layer.direction.double().numpy()
    dw = reference.linear_gradients(reference.array(x), weight, reference.array(dy), v, 0.5)[1].T
    tolerance = 8 * ROUNDING[dtype] * abs(dw).max()
    torch.testing.assert_close(mine[1].double(), torch.from_numpy(dw.copy()), rtol=0, atol=tolerance)


def test_equals_velora_linear_with_the_weight_turned():
    _, layer = pair(torch.float64)
    other = VeloraLinear(D, M, dtype=torch.float64, sub_token_size=S, init="random")
    other.set_direction(layer.direction)
    other.weight.data = layer.weight.data.T.contiguous()
    x, dy = inputs(N, D, dtype=torch.float64), inputs(N, M, dtype=torch.float64, seed=2)
    turned = torch.autograd.grad(other(x), other.weight, dy)[0].T
    torch.testing.assert_close(gradients(layer, x, dy)[1], turned, rtol=0, atol=1e-14)  # float64


def test_bytes_kept_are_the_codes_and_checkpointing_changes_nothing():
    plain, layer = pair()
    x, dy = inputs(2, N, D).requires_grad_(), inputs(2, N, M, seed=2)
    assert reference.saved_bytes(lambda: layer(x * 1), [*layer.parameters(), *layer.buffers()]) == x.nbytes // S
    assert reference.saved_bytes(lambda: plain(x * 1), plain.parameters()) == x.nbytes
    direct = gradients(layer, x, dy)
    y = checkpoint(layer, x, use_reentrant=False)
    for one, other in zip(direct, torch.autograd.grad(y, [x, layer.weight, layer.bias], dy), strict=True):
        assert torch.equal(one, other)


def test_gpt2_by_roles():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(config).train()
    words = torch.arange(16).view(2, 8)
    batch = {"input_ids": words, "labels": words, "use_cache": False}
    names = list(model.state_dict())
    summary = apply_velora(model, ["value", "down"], sub_token_size=8)
    assert {layer.role: layer.width for layer in summary.layers} == {"query+key+value": 32, "down": 128}
    calibrate(model, batch)
    model(**batch).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    remove_velora(model)
    assert list(model.state_dict()) == names
