import math

import numpy as np
import pytest
import torch
from reference_optim import in_four_bits

from velora.nn.grouped import dequantise, num_bytes, pack, quantise, unpack


def sample(num, seed=0, dtype=torch.float64):
    return torch.randn(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("num", [1, 2, 255, 256, 1001])
def test_packing_is_exact_and_takes_half_a_byte(num):
    codes = torch.randint(0, 16, (num,), dtype=torch.uint8, generator=torch.Generator().manual_seed(num))
    packed = pack(codes)
    assert packed.nbytes == (num + 1) // 2
    assert torch.equal(unpack(packed, num), codes)
    assert packed[0] == codes[0] + 16 * (codes[1] if num > 1 else 0)  # the first one low


@pytest.mark.parametrize("shape", [(300,), (7, 64), (16, 16)])
def test_four_bits_are_those_of_the_loop(shape):
    x = sample(math.prod(shape)).reshape(shape)
    found = dequantise(quantise(x, 4), 4, x.shape, torch.float64)
    np.testing.assert_allclose(found.numpy(), in_four_bits(x.numpy()), rtol=0, atol=1e-15)  # float64, one product


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_error_is_at_most_half_a_step(bits, dtype):
    """Of groups of both signs, of one, of zeros, and of one that is shorter, in three scales."""
    x = torch.cat(
        [sample(256), sample(256, 1).abs() + 3, -sample(256, 2).abs(), torch.zeros(256), 1e-3 * sample(77, 3)]
    )
    x = x.to(dtype)
    grouped = quantise(x, bits)
    found = dequantise(grouped, bits, x.shape, torch.float64)
    step = grouped.scale.double().repeat_interleave(256)[: len(x)]
    # fp32 scales: x / s is rounded at 2^-24 of up to 255, 1e-5 of a step
    assert ((found - x.double()).abs() <= step * (0.5 + 3e-5)).all()
    assert torch.equal(found[768:1024], torch.zeros(256, dtype=torch.float64))
    kept = sum(part.nbytes for part in grouped)
    wide = 8 if dtype == torch.float64 else 4
    assert kept == {8: 1101, 4: 551}[bits] + 5 * (wide + 1)  # 1101 numbers in five groups
    assert wide == 8 or num_bytes(len(x), bits) == kept


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_on_the_grid_stays_where_it_is(bits):
    """To the nearest and by chance: a weight that does not move is not moved by being written again."""
    x = sample(1024, dtype=torch.float32)
    once = dequantise(quantise(x, bits), bits, x.shape, torch.float32)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    for again in (quantise(once, bits), quantise(once, bits, noise)):
        # x / s of a number on the grid is a whole number but for fp32's rounding: a step in 2^24 of 255
        moved = (dequantise(again, bits, x.shape, torch.float32) - once).abs()
        assert (moved > 1e-6).sum() <= 1


def test_rounding_by_chance_is_right_in_the_mean():
    """x̂ of 4000 draws: each entry's mean within five standard errors, and the mean of all of them within four of its own."""
    num, x = 4000, sample(256)
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(num):
        grouped = quantise(x, 8, torch.rand(x.shape, generator=generator, dtype=torch.float64))
        draws.append(dequantise(grouped, 8, x.shape, torch.float64))
    step = grouped.scale.item()
    down, up = -grouped.zero.item() * step, (255 - grouped.zero.item()) * step
    reached = (x >= down) & (x <= up)
    assert (~reached).sum() <= 1  # an extreme that the rounding of the zero point leaves out of reach
    fraction = x / step - (x / step).floor()
    variance = (fraction * (1 - fraction) * step**2)[reached]
    error = (torch.stack(draws).mean(0) - x)[reached]
    assert (error.abs() <= 5 * (variance / num).sqrt() + 1e-12).all()
    assert error.mean().abs() <= 4 * (variance.sum() / num).sqrt() / len(error)
    assert len(torch.stack(draws).unique(dim=0)) > 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(bits, value):
    x = sample(600, dtype=torch.float32)
    x[300] = value
    found = dequantise(quantise(x, bits), bits, x.shape, torch.float32)
    assert not torch.isfinite(found[300])
    assert torch.isfinite(found[:256]).all()


def test_stochastic_rounding_is_that_of_the_package():
    """With the same uniform numbers, for groups of both signs, bit for bit."""
    package = pytest.importorskip("q_galore_torch", reason="pip install --no-deps q-galore-torch")
    optimizer = package.QGaLoreAdamW8bit([torch.nn.Parameter(torch.zeros(1))])
    x = sample(4 * 256, dtype=torch.float32).reshape(8, 128)
    torch.manual_seed(3)
    codes, scales, zeros = optimizer._quantize_stochastic_round(x, q_group_size=256)
    torch.manual_seed(3)
    ours = quantise(x, 8, torch.rand(4, 256).reshape(8, 128))
    assert torch.equal(ours.codes, codes.reshape(-1))
    assert torch.equal(ours.scale, scales.squeeze(1))
    assert torch.equal(ours.zero, zeros.squeeze(1).to(torch.uint8))
    codes, scales, zeros = optimizer._quantize(x, q_group_size=256)
    nearest = quantise(x, 8)
    assert torch.equal(nearest.codes, codes.reshape(-1))
    float_weight = optimizer._dequantize(codes, torch.float32, 256, scales, zeros)
    assert torch.equal(dequantise(nearest, 8, x.shape, torch.float32), float_weight)


def test_one_sign_is_where_the_package_loses_values():
    """1 ... 2 with a zero point cut off at 0: there all above 15 steps of (2 - 1) / 15 becomes 1; here the range takes in 0."""
    package = pytest.importorskip("q_galore_torch", reason="pip install --no-deps q-galore-torch")
    projector = package.q_galore_projector.GaLoreProjector(1)
    x = torch.linspace(1, 2, 256)
    codes, scales, zeros, _ = projector._quantize(x.reshape(1, 256), q_group_size=256, n_bit=4)
    theirs = (scales * (codes - zeros)).flatten()
    ours = dequantise(quantise(x, 4), 4, x.shape, torch.float32)
    assert (theirs - x).abs().max() > 0.9
    assert (ours - x).abs().max() <= 2 / 15 / 2 + 1e-6
