"""MultiLoRA against its equation in float64 loops: outputs, gradients, start, what is kept, VeLoRA's one code for all branches."""

from __future__ import annotations

import math

import adapters
import numpy as np
import pytest
import reference
import torch
from torch import nn

from velora import apply_velora, calibrate
from velora.errors import ConfigError
from velora.nn.apply import velora_layers
from velora.nn.multilora import MultiLoRALinear

N, D, M, BRANCHES, RANK = 5, 16, 7, 3, 2


def layer(dropout: float = 0.0, *, perturbed: bool = True) -> MultiLoRALinear:
    torch.manual_seed(0)
    made = MultiLoRALinear(nn.Linear(D, M), num_branches=BRANCHES, rank=RANK, dropout=dropout)
    made.base.requires_grad_(False)
    if perturbed:
        adapters.perturb(made, size=0.5)
    return made


def factors(made: MultiLoRALinear) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """A_i, B_i and c_i of each branch."""
    a = reference.array(made.down.weight)
    return [
        (a[i * RANK : (i + 1) * RANK], reference.array(made.up[i]), reference.array(made.scale[i]))
        for i in range(BRANCHES)
    ]


def test_outputs_are_the_frozen_layers_and_the_scaled_branches():
    made, x = layer(), torch.randn(N, D)
    expected = reference.array(made.base(x))
    for a, b, c in factors(made):
        for n, token in enumerate(reference.array(x)):
            low = [sum(a[k, d] * token[d] for d in range(D)) for k in range(RANK)]
            for m in range(M):
                expected[n, m] += c[m] * sum(b[m, k] * low[k] for k in range(RANK))
    # float32 against float64, outputs of size about 5
    torch.testing.assert_close(made(x).detach().double(), torch.from_numpy(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("velora", [False, True])
def test_gradients_are_those_of_the_branches(velora):
    """With VeLoRA the A of every branch takes the same x̂ = v z, of one direction."""
    made, x = layer(), torch.randn(N, D, requires_grad=True)
    if velora:
        apply_velora(made, ["*down"], sub_token_size=4)
        calibrate(made, x)
    dy = torch.randn(N, M)
    made(x).backward(dy)
    x64, dy64 = reference.array(x), reference.array(dy)
    kept = x64
    if velora:
        v = reference.array(made.down.direction)
        kept = reference.reconstruct(reference.compress(x64, v), v)
    dx = dy64 @ reference.array(made.base.weight)
    for i, (a, b, c) in enumerate(factors(made)):
        dlow = np.zeros((N, RANK))
        db, dc = np.zeros((M, RANK)), np.zeros(M)
        for n in range(N):
            for k in range(RANK):
                low = sum(a[k, d] * x64[n, d] for d in range(D))
                for m in range(M):
                    dlow[n, k] += dy64[n, m] * c[m] * b[m, k]
                    db[m, k] += dy64[n, m] * c[m] * low
                    dc[m] += dy64[n, m] * b[m, k] * low
        dx += dlow @ a
        da = made.down.weight.grad[i * RANK : (i + 1) * RANK]
        for found, expected in ((da, dlow.T @ kept), (made.up[i].grad, db), (made.scale[i].grad, dc)):
            # float32 sums of tens of terms of size about 5
            torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), torch.from_numpy(dx), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", adapters.FAMILIES)
@pytest.mark.parametrize("weights", ["dense", "nf4"])
def test_starts_as_the_frozen_network(weights, family):
    config, inputs = adapters.config(), adapters.batch(family)
    frozen, adapted = (getattr(adapters, weights)().apply(adapters.network(family), config).eval() for _ in range(2))
    adapted = adapters.multilora().apply(adapted, config)
    assert torch.equal(adapters.logits(adapted, inputs), adapters.logits(frozen, inputs))


def test_factors_are_kaiming_uniform_and_scales_zero():
    made = MultiLoRALinear(nn.Linear(64, 256), num_branches=BRANCHES, rank=16, dropout=0.0)
    for matrix in (made.down.weight, *made.up):
        bound = 1 / math.sqrt(matrix.shape[1])
        assert 0.9 * bound < matrix.abs().max() <= bound
        # of a uniform distribution; thousands of draws
        assert matrix.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert all(torch.equal(scale, torch.zeros(256)) for scale in made.scale)
    assert not torch.equal(made.up[0], made.up[1])


def test_kept_for_backward_are_the_input_and_the_features_of_all_branches():
    """Never an output of M features for the gradient of a scale; with VeLoRA the input is one code of D / S numbers."""
    many, made = 1000, layer()
    x = torch.randn(many, D)

    def kept() -> int:
        return reference.saved_bytes(lambda: made(x).sum(), [*made.parameters(), *made.buffers()])

    matrix = 4 * M * BRANCHES * RANK  # U, which is made anew in each forward
    assert kept() == 4 * many * (D + BRANCHES * RANK) + matrix
    apply_velora(made, ["*down"], sub_token_size=4)
    calibrate(made, x)
    assert list(velora_layers(made)) == ["down"]
    assert kept() == 4 * many * (D // 4 + BRANCHES * RANK) + matrix


def test_merged_over_a_layer_without_a_bias():
    torch.manual_seed(0)
    made = MultiLoRALinear(nn.Linear(D, M, bias=False), num_branches=BRANCHES, rank=RANK, dropout=0.3).eval()
    adapters.perturb(made, size=0.3)
    x = torch.randn(N, D)
    before = made(x)
    merged = made.merged()
    assert type(merged) is nn.Linear
    assert merged.bias is None
    torch.testing.assert_close(merged(x), before, rtol=0, atol=1e-5)  # float32, values of size about 3


def test_dropout_acts_once_for_all_branches():
    made, seen = layer(dropout=0.5).train(), []
    made.down.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    made(torch.ones(100, D))
    (dropped,) = seen
    assert set(dropped.unique().tolist()) == {0.0, 2.0}


def test_half_precision():
    """A bfloat16 network has float32 branches; under autocast the products are bfloat16."""
    config = adapters.config()
    model = adapters.multilora().apply(adapters.dense("bf16").apply(adapters.network("llama"), config), config)
    adapters.perturb(model)
    assert {p.dtype for p in adapters.trained(model).values()} == {torch.float32}
    adapters.loss(model, adapters.batch("llama")).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters.trained(model).values())
    made, x = layer(), torch.randn(N, D)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == torch.bfloat16


def test_refuses_what_is_no_linear_layer():
    with pytest.raises(ConfigError, match="norm1: a LayerNorm takes no MultiLoRA branches"):
        adapters.multilora(targets=["norm1"]).apply(adapters.network("vit"), adapters.config())
