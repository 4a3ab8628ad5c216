"""Splitting, projecting and finding a direction, against float64 loops and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch

from velora.errors import ConfigError
from velora.nn.projection import (
    SubTokenStatistics,
    code_unit,
    compress,
    random_direction,
    reconstruct,
    split,
    split_width,
    sum_over_tokens,
)

CPU = torch.device("cpu")


def unit(size: int, seed: int = 0) -> torch.Tensor:
    v = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return v / v.norm()


def statistics(*batches: torch.Tensor, size: int, with_moment: bool = False) -> SubTokenStatistics:
    gathered = SubTokenStatistics(size, CPU, with_moment)
    for batch in batches:
        gathered.add(batch)
    return gathered


@pytest.mark.parametrize(
    ("width", "given", "expected"),
    [(512, {"num_groups": 64}, (64, 8)), (1376, {"num_groups": 86}, (86, 16)), (4096, {"sub_token_size": 128}, (32, 128)),
     (6, {"sub_token_size": 6}, (1, 6)), (6, {"num_groups": 6}, (6, 1))],
)  # fmt: skip
def test_split_width(width, given, expected):
    assert split_width(width, **given) == expected


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "give exactly one"),
        ({"num_groups": 2, "sub_token_size": 6}, "give exactly one"),
        ({"num_groups": 5}, r"num_groups=5 does not divide the width 12 \(4 or 6 would\)"),
        ({"sub_token_size": 24}, r"sub_token_size=24 does not divide the width 12 \(12 would\)"),
        ({"num_groups": 0}, "num_groups=0 must be a positive integer"),
        ({"num_groups": 2.0}, "num_groups=2.0 must be a positive integer"),
        ({"sub_token_size": True}, "sub_token_size=True must be a positive integer"),
    ],
)
def test_split_width_refuses(given, sentence):
    with pytest.raises(ConfigError, match=sentence):
        split_width(12, **given)


def test_split_is_a_view_of_a_contiguous_input():
    x = torch.arange(24.0).view(2, 3, 4)
    assert split(x, 2).data_ptr() == x.data_ptr()
    assert torch.equal(split(x, 2)[:3], torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))


def test_unit_of_codes_is_a_power_of_two_that_keeps_float16_in_range():
    assert [code_unit(torch.float16, size) for size in (1, 2, 4, 8, 16, 128, 4096)] == [1, 2, 2, 4, 4, 16, 64]
    assert {code_unit(dtype, 4096) for dtype in (torch.float32, torch.bfloat16, torch.float64)} == {1}
    v = torch.full((4096,), 2.0**-6)
    x = torch.full((1, 4096), 60_000.0, dtype=torch.float16)
    z = compress(x, v)
    assert torch.equal(z, torch.full((1, 1), 60_000.0, dtype=torch.float16))
    assert torch.equal(reconstruct(z, v), x)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
def test_sums_over_tokens_are_in_float32(shape):
    *batch, _, p = shape
    a, b = (torch.rand(*batch, 600, width, generator=torch.Generator().manual_seed(width)) for width in (p, 4))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        got = sum_over_tokens(a.to(dtype), b.to(dtype))
        assert got.dtype == torch.promote_types(dtype, torch.float32)
        expected = torch.einsum("...np,...nq->...pq", a.to(dtype).double(), b.to(dtype).double())
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)  # fp32 sums of 600 terms
    assert torch.equal(sum_over_tokens(torch.empty(0, 2).bfloat16(), torch.empty(0, 3).bfloat16()), torch.zeros(2, 3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(65_536, 64), (3, 65_536, 8)])
def test_sums_over_tokens_are_in_float32_on_cuda(shape, dtype):
    a = torch.rand(shape, device="cuda").to(dtype)
    b = torch.rand(*shape[:-1], 16, device="cuda").to(dtype)
    with torch.autocast("cuda", dtype=dtype):
        got = sum_over_tokens(a, b)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), a.double().mT @ b.double(), rtol=1e-4, atol=0
    )  # a half would be off by 1e-3


def test_compress_and_reconstruct_equal_the_loops():
    x, v = torch.randn(5, 12, dtype=torch.float64), unit(4)
    z = compress(x, v)
    np.testing.assert_allclose(z, reference.compress(x.numpy(), v.numpy()), rtol=0, atol=1e-14)  # float64, 4 terms
    np.testing.assert_allclose(reconstruct(z, v), reference.reconstruct(z.numpy(), v.numpy()), rtol=0, atol=1e-15)


def test_compress_takes_any_strides():
    x, v = torch.randn(12, 7, 5, dtype=torch.float64).permute(2, 1, 0), unit(4)
    assert not x.is_contiguous()
    assert torch.equal(compress(x, v), compress(x.contiguous(), v))
    assert compress(x, v).shape == (35, 3)


def test_projection_keeps_what_lies_on_the_direction():
    v = unit(4)
    x = torch.kron(torch.randn(5, 3, dtype=torch.float64), v)
    torch.testing.assert_close(reconstruct(compress(x, v), v), x, rtol=0, atol=1e-15)


def test_mean_direction_equals_the_loops_and_is_taken_over_all_batches():
    first, second = torch.randn(3, 12) + 0.3, torch.randn(2, 4, 12)
    got = statistics(first, second, size=4).mean_direction()
    both = np.concatenate([reference.array(first), reference.array(second)])
    np.testing.assert_allclose(got, reference.fixed_average(both, 4), rtol=0, atol=1e-6)  # fp32 sums within a batch
    assert got.norm() == pytest.approx(1.0, abs=1e-15)
    got = statistics(first.double(), second.double(), size=4).mean_direction()
    np.testing.assert_allclose(got, reference.fixed_average(both, 4), rtol=0, atol=1e-14)  # float64 sums of 33 terms


def test_statistics_do_not_depend_on_the_order_of_batches():
    a, b = torch.randn(64, 12, dtype=torch.bfloat16), 1e3 * torch.randn(32, 12, dtype=torch.bfloat16)
    one, two = statistics(a, b, size=4).mean_direction(), statistics(b, a, size=4).mean_direction()
    torch.testing.assert_close(one, two, rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_principal_direction_is_the_first_right_singular_vector(seed):
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(seed)) + torch.linspace(-2, 1, 4).repeat(3)
    got = statistics(x[:10], x[10:], size=4, with_moment=True).principal_direction().numpy()
    right = np.linalg.svd(x.double().reshape(-1, 4).numpy())[2][0]
    np.testing.assert_allclose(got, right * np.sign(right @ got), rtol=0, atol=1e-12)  # eigenvectors of the square
    assert got[np.abs(got).argmax()] > 0


def test_random_direction_is_a_unit_vector_that_belongs_to_its_seed():
    v = random_direction(8, seed=0)
    assert v.norm() == pytest.approx(1.0, abs=1e-15)
    assert torch.equal(v, random_direction(8, seed=0))
    assert not torch.equal(v, random_direction(8, seed=1))
    state = torch.get_rng_state()
    random_direction(8, seed=3)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.empty(0, 12), "no sub-token reached the layer"),
        (torch.full((2, 12), torch.nan), "not finite"),
        (torch.zeros(2, 12), "zero everywhere"),
        (torch.tensor([[1.0, 2.0, 3.0, 4.0, -1.0, -2.0, -3.0, -4.0]]), "mean of its sub-tokens is zero"),
    ],
)
def test_inputs_without_a_direction_are_refused(x, sentence):
    with pytest.raises(ConfigError, match=sentence):
        statistics(x, size=4).mean_direction()


def test_a_small_mean_still_is_a_direction():
    u = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    x = torch.cat([u, -u + 1e-3 * torch.tensor([1.0, 0, 0, 0])])
    assert statistics(x, size=4).mean_direction() @ torch.tensor([1.0, 0, 0, 0], dtype=torch.float64) > 0.999
