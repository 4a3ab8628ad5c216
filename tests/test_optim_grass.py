import itertools
import math

import numpy as np
import optim_helpers as helpers
import pytest
import torch
import torch.distributed.tensor
from reference_optim import ReferenceGrass
from torch import nn

from velora.errors import ConfigError, Diverged
from velora.optim import GrassAdamW
from velora.optim.grass import pick_rows

SHAPES = [(20, 12), (12, 20)]


def build(model, **options):
    low_rank = {"rank": 4, "update_gap": 3, "scale": 0.5}
    for key in ("rank", "update_gap", "scale", "selection"):
        if key in options:
            low_rank[key] = options.pop(key)
    matrices, vectors = helpers.matrices_and_vectors(model)
    groups = [{"params": matrices, **low_rank}, {"params": vectors, "weight_decay": 0.0}]
    return GrassAdamW(groups, **{"lr": 1e-2, "weight_decay": 0.1, **options})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("selection", ["top", "sampled"])
def test_float64_reference(selection, shape):
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    settings = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    optimizer = GrassAdamW(
        [{"params": [p], "rank": 5, "update_gap": 4, "scale": 0.7, "selection": selection}], **settings
    )
    reference = ReferenceGrass(p.detach().numpy(), rank=5, gap=4, scale=0.7, **settings)
    drawn_twice = False
    for step, gradient in enumerate(helpers.given_gradients(p, 14)):
        lr = optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)  # as a schedule sets it
        p.grad = gradient.clone()
        optimizer.step()
        drawn = optimizer.state[p]["rows"].tolist()
        drawn_twice |= len(set(drawn)) < 5
        reference.update(gradient.numpy(), lr, None if selection == "top" else drawn)
    assert drawn_twice == (selection == "sampled")  # so that the reference has seen a row with two copies
    # float64, fourteen steps: only the order of sums differs
    np.testing.assert_allclose(p.detach().numpy(), reference.weight, rtol=0, atol=1e-12)


def test_the_sampled_projector_is_unbiased_and_of_least_variance():
    """All M^R draws of a 3 x 4 gradient: P of each is the code's, its probability is counted here from the norms."""
    gradient = torch.tensor([[3.0, 0, 4, 0], [0, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)  # norms 5, 1, 2
    q, rank, found = [5 / 8, 1 / 8, 2 / 8], 2, {}
    for seed in range(400):  # of the six sorted pairs the rarest has 1/64: missed with probability e^-6 in 400
        rows, rho = pick_rows(gradient, rank, "sampled", seed)
        projector = torch.zeros(3, rank, dtype=torch.float64)
        projector[rows, torch.arange(rank)] = rho.squeeze(1)
        found[tuple(rows.tolist())] = projector @ projector.T @ gradient
    pairs = list(itertools.product(range(3), repeat=rank))
    probability = {pair: math.prod(q[i] for i in pair) for pair in pairs}
    mean = sum(probability[pair] * found[tuple(sorted(pair))] for pair in pairs)
    torch.testing.assert_close(mean, gradient, rtol=0, atol=1e-14)
    variance = sum(probability[pair] * (found[tuple(sorted(pair))] - gradient).square().sum() for pair in pairs)
    squared = {5: 25 / 30, 1: 1 / 30, 2: 4 / 30}
    for other in (squared, dict.fromkeys((5, 1, 2), 1 / 3)):  # by the norm's square, and uniform
        assert variance < (sum(norm**2 / other[norm] for norm in other) - 30) / rank


def test_draws_have_the_probabilities_of_the_norms():
    gradient = torch.diag(torch.tensor([5.0, 1.0, 2.0, 0.0]))
    num, rank = 500, 8
    counts = sum(torch.bincount(pick_rows(gradient, rank, "sampled", s)[0], minlength=4) for s in range(num))
    for count, q in zip(counts.tolist(), (5 / 8, 1 / 8, 2 / 8, 0.0), strict=True):
        deviation = math.sqrt(q * (1 - q) / (num * rank))
        assert abs(count / (num * rank) - q) <= 5 * deviation  # five standard deviations; a row of zeros is never drawn


def test_top_takes_the_largest_rows_and_zeros_are_equally_likely():
    gradient = torch.diag(torch.tensor([1.0, 5.0, 0.0, 3.0]))
    assert pick_rows(gradient, 2, "top", 0)[0].tolist() == [1, 3]
    zeros = torch.zeros(4, 6)
    drawn = {row for seed in range(40) for row in pick_rows(zeros, 2, "sampled", seed)[0].tolist()}
    assert drawn == {0, 1, 2, 3}  # one row is missed with probability (3/4)^80
    assert torch.equal(pick_rows(zeros, 2, "sampled", 0)[1], torch.full((2, 1), 2.0**0.5))  # 1 / √(2 · 1/4)


@pytest.mark.parametrize("selection", ["top", "sampled"])
def test_a_refresh_forgets_the_moments(selection):
    """The step after it is that of a new optimiser at the same weight with the same rows, bit for bit."""
    p = nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    group = {"rank": 3, "update_gap": 2, "selection": selection}
    optimizer = GrassAdamW([{"params": [p], **group}], lr=0.1)
    gradients = helpers.given_gradients(p, 3)
    for gradient in gradients[:2]:
        p.grad = gradient.clone()
        optimizer.step()
    assert optimizer.state[p]["exp_avg"].abs().min() > 0
    q = nn.Parameter(p.detach().clone())
    fresh = GrassAdamW([{"params": [q], **group}], lr=0.1)
    fresh.state[q]["selections"] = 1  # so that it draws what the other one draws
    p.grad, q.grad = gradients[2].clone(), gradients[2].clone()
    optimizer.step(), fresh.step()
    assert optimizer.state[p]["step"] == fresh.state[q]["step"] == 1
    assert torch.equal(p, q)


def test_only_the_picked_rows_move_and_the_other_group_is_adamw():
    p = nn.Parameter(torch.zeros(8, 6))
    optimizer = GrassAdamW([{"params": [p], "rank": 3}])
    p.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    moved = p.detach().abs().sum(dim=1).nonzero().flatten()
    assert moved.tolist() == sorted(p.grad.norm(dim=1).argsort()[-3:].tolist())
    ours, theirs = helpers.tiny_network(torch.float64), helpers.tiny_network(torch.float64)
    data = helpers.batches(10, torch.float64)
    settings = {"lr": 1e-2, "eps": 0.0, "weight_decay": 0.1}  # with an epsilon, the two put it in different places
    helpers.train(ours, GrassAdamW(ours.parameters(), **settings), data)
    helpers.train(theirs, torch.optim.AdamW(theirs.parameters(), **settings), data)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"selection": "sampled"}, {"selection": "sampled", "layerwise": True}], ids=str
)
def test_resume_is_exact(options, dtype):
    """A checkpoint after five steps, in the middle of a gap of three."""
    helpers.assert_resume_is_exact(lambda model: build(model, **options), dtype)


@pytest.mark.parametrize("selection", ["top", "sampled"])
def test_layerwise_equals_the_ordinary_optimizer(selection):
    ordinary, layerwise = helpers.tiny_network(), helpers.tiny_network()
    helpers.train(ordinary, build(ordinary, selection=selection), helpers.batches(8))
    optimizer = build(layerwise, selection=selection, layerwise=True)
    helpers.train(layerwise, optimizer, helpers.batches(8))
    for p, q in zip(ordinary.parameters(), layerwise.parameters(), strict=True):
        assert torch.equal(p, q)
    assert optimizer.peak_gradient_bytes == 24 * 12 * 4  # the largest matrix


@pytest.mark.parametrize("selection", ["top", "sampled"])
def test_layerwise_accumulates_the_picked_rows(selection):
    """Between micro-batches R x D numbers wait; the moments are those of the sum of the micro-batches' rows."""
    model = helpers.tiny_network(torch.float64)
    optimizer = build(model, selection=selection, layerwise=True, accumulation_steps=3, betas=(0.0, 0.0))
    weight, total = model[0].weight, torch.zeros(24, 12, dtype=torch.float64)
    for batch in helpers.batches(3, torch.float64):
        total += torch.autograd.grad(helpers.loss_of(model, batch), weight)[0]
        helpers.loss_of(model, batch).backward()
        if weight in optimizer.held_gradients():
            assert optimizer.held_gradients()[weight].shape == (4, 12)
            assert weight.grad is None
    optimizer.step()
    state = optimizer.state[weight]
    expected = total[state["rows"]] * state.get("rho", 1.0)
    torch.testing.assert_close(state["exp_avg"], expected, rtol=0, atol=1e-14)  # float64: the order of two sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes(dtype):
    rows, columns, rank, width = 24, 12, 4, dtype.itemsize
    expected = {
        "top": 2 * rank * columns * width + 8 * rank,
        "sampled": 2 * rank * columns * width + (8 + width) * rank,
    }
    for selection, num_bytes in expected.items():
        p = nn.Parameter(torch.randn(rows, columns, dtype=dtype))
        optimizer = GrassAdamW([{"params": [p], "rank": rank, "selection": selection}])
        p.grad = torch.randn(rows, columns, dtype=dtype)
        optimizer.step()
        assert helpers.state_bytes(optimizer) == num_bytes


def test_draws_depend_on_the_seed_only():
    helpers.assert_random_by_its_seed_only(lambda model, seed: build(model, selection="sampled", seed=seed))


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"rank": 13}, (12, 20), r"rank=13 is larger than the number of rows .* choose at most 12"),
        ({"rank": 4}, (3, 4, 5), "not a matrix"),
        ({"rank": 0}, (12, 20), "at least 1"),
        ({"rank": 4, "selection": "best"}, (12, 20), "selection=best must be top or sampled"),
        ({"rank": 4, "update_gap": 0}, (12, 20), "update_gap=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(options, shape, message):
    with pytest.raises(ConfigError, match=message):
        GrassAdamW([{"params": [nn.Parameter(torch.zeros(shape))], **options}])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows(value):
    gradient = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    gradient[1, 2] = value
    p, q = nn.Parameter(torch.zeros(4, 8)), nn.Parameter(torch.zeros(4, 8))
    p.grad, q.grad = gradient.clone(), gradient.clone()
    GrassAdamW([{"params": [p], "rank": 2}]).step()
    assert not torch.isfinite(p).all()  # as with any optimiser
    with pytest.raises(Diverged, match=r"shape \(4, 8\) is not finite"):
        GrassAdamW([{"params": [q], "rank": 2, "selection": "sampled"}]).step()


def _one_step_of_a_rank(rank, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, store=torch.distributed.FileStore(store, 2))
    picked = []
    for selection in ("top", "sampled"):
        p = nn.Parameter(torch.zeros(6, 10))
        optimizer = GrassAdamW([{"params": [p], "rank": 2, "selection": selection}])
        p.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(rank))  # as no rounding could make them
        optimizer.step()
        picked.append({key: optimizer.state[p][key] for key in ("rows", "rho") if key in optimizer.state[p]})
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    sharded = nn.Parameter(torch.distributed.tensor.distribute_tensor(torch.zeros(6, 10), mesh))
    optimizer = GrassAdamW([{"params": [sharded], "rank": 2}])
    sharded.grad = torch.distributed.tensor.distribute_tensor(torch.ones(6, 10), mesh)
    with pytest.raises(ConfigError, match="is sharded over several processes"):
        optimizer.step()
    torch.save(picked, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_all_ranks_share_rank_zeros_rows_and_shards_are_refused(tmp_path):
    torch.multiprocessing.spawn(_one_step_of_a_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
