import math

import numpy as np
import optim_helpers as helpers
import pytest
import torch
import torch.distributed.tensor
from reference_optim import ReferenceGaLore
from torch import nn

from velora.errors import ConfigError, Diverged
from velora.optim import GaLoreAdamW

SIDES = {  # what the names mean for a tall (M >= D) and a wide weight; galore-torch's projector
    "std": ("right", "left"),
    "reverse_std": ("left", "right"),
    "left": ("left", "left"),
    "right": ("right", "right"),
    "full": ("full", "full"),
}
SHAPES = [(20, 12), (12, 20)]


def build(model, **options):
    low_rank = {"rank": 4, "update_proj_gap": 3, "scale": 0.5}
    for key in ("rank", "update_proj_gap", "scale", "proj_type", "svd"):
        if key in options:
            low_rank[key] = options.pop(key)
    matrices, vectors = helpers.matrices_and_vectors(model)
    groups = [{"params": matrices, **low_rank}, {"params": vectors, "weight_decay": 0.0}]
    return GaLoreAdamW(groups, **{"lr": 1e-2, "weight_decay": 0.1, **options})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("proj_type", list(SIDES))
def test_float64_reference(proj_type, shape):
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    settings = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    group = {"params": [p], "rank": 4, "update_proj_gap": 4, "scale": 0.7, "proj_type": proj_type}
    optimizer = GaLoreAdamW([group], lr=1.0, **settings)
    side = SIDES[proj_type][0 if shape[0] >= shape[1] else 1]
    reference = ReferenceGaLore(p.detach().numpy(), rank=4, gap=4, scale=0.7, side=side, **settings)
    for step, gradient in enumerate(helpers.given_gradients(p, 10)):
        lr = optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)  # as a schedule sets it
        p.grad = gradient.clone()
        optimizer.step()
        state = optimizer.state[p]
        signs = [None if side is None else side.numpy() for side in (state.get("left"), state.get("right"))]
        reference.update(gradient.numpy(), lr, signs_like=signs)
    # float64, ten steps of a 20 x 12 matrix: only the order of sums differs
    np.testing.assert_allclose(p.detach().numpy(), reference.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("proj_type", list(SIDES))
def test_equals_galore_torch_over_50_steps(proj_type):
    galore_torch = pytest.importorskip("galore_torch", reason="pip install --no-deps galore-torch")
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in [*SHAPES, (12,)]]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    low_rank = {"rank": 4, "update_proj_gap": 10, "scale": 0.25, "proj_type": proj_type}

    def groups(ps):
        return [{"params": ps[2:]}, {"params": ps[:2], **low_rank}]

    first = GaLoreAdamW(groups(ours), lr=1e-2)
    second = galore_torch.GaLoreAdamW(groups(theirs), lr=1e-2, no_deprecation_warning=True)
    gradients = [helpers.given_gradients(p, 50, seed=i) for i, p in enumerate(ours)]
    for step in range(50):
        for p, q, given in zip(ours, theirs, gradients, strict=True):
            p.grad, q.grad = given[step].clone(), given[step].clone()
        first.step()
        second.step()
    for p, q in zip(ours, theirs, strict=True):
        # fp32, 50 updates of up to 1e-2; differently laid out factors round differently, and Adam normalises, so that the
        # relative error of a small entry of the low-rank gradient becomes an error of the update
        torch.testing.assert_close(p, q, rtol=0, atol=3e-5)


def test_weight_decay_is_decoupled_and_galore_torch_decays_after_the_step():
    """Same to first order: galore-torch takes the decay from the weight after the update, AdamW's paper from the one before."""
    galore_torch = pytest.importorskip("galore_torch", reason="pip install --no-deps galore-torch")
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(12, 20, dtype=torch.float64))
    q = nn.Parameter(p.detach().clone())
    group = {"rank": 4, "update_proj_gap": 100, "scale": 0.25, "proj_type": "std"}
    lr, decay = 1e-2, 0.1
    first = GaLoreAdamW([{"params": [p], **group}], lr=lr, weight_decay=decay)
    second = galore_torch.GaLoreAdamW(
        [{"params": [q], **group}], lr=lr, weight_decay=decay, no_deprecation_warning=True
    )
    before = p.detach().clone()
    p.grad = torch.randn(12, 20, dtype=torch.float64)
    q.grad = p.grad.clone()
    first.step()
    second.step()
    update = p.detach() - before * (1 - lr * decay)
    # galore-torch works in fp32 for the projector of an fp64 gradient; its decay acts on the updated weight
    torch.testing.assert_close(q.detach(), (before + update) * (1 - lr * decay), rtol=0, atol=1e-8)


def test_second_group_is_plain_adamw():
    """torch.optim.AdamW with epsilon 0 in both: with it, the two put it in different places (see the module)."""
    ours, theirs = helpers.tiny_network(torch.float64), helpers.tiny_network(torch.float64)
    data = helpers.batches(10, torch.float64)
    helpers.train(ours, GaLoreAdamW(ours.parameters(), lr=1e-2, eps=0.0, weight_decay=0.1), data)
    helpers.train(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2, eps=0.0, weight_decay=0.1), data)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11)


def test_randomized_svd_finds_the_exact_subspace():
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(60, 40, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(50, 40, generator=generator, dtype=torch.float64)).Q
    gradient = left @ torch.diag(0.5 ** torch.arange(40, dtype=torch.float64)) @ right.T
    span = {}
    for svd in ("exact", "randomized"):
        p = nn.Parameter(torch.zeros(60, 50, dtype=torch.float64))
        optimizer = GaLoreAdamW([{"params": [p], "rank": 5, "proj_type": "full", "svd": svd}])
        p.grad = gradient.clone()
        optimizer.step()
        state = optimizer.state[p]
        assert state["left"].shape == (60, 5)
        assert state["right"].shape == (5, 50)
        span[svd] = state["left"] @ state["left"].T, state["right"].T @ state["right"]
    for exact, found in zip(span["exact"], span["randomized"], strict=True):
        # singular values halve: with 8 extra columns and 2 power iterations the angle is below 2^-(5 * 8)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)


def test_randomized_svd_depends_on_its_seed_only():
    helpers.assert_random_by_its_seed_only(lambda model, seed: build(model, svd="randomized", seed=seed))


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({"proj_type": "full"}, torch.float32),
        ({"svd": "randomized"}, torch.float32),
        ({"layerwise": True}, torch.float32),
    ],
)
def test_resume_is_exact(options, dtype):
    helpers.assert_resume_is_exact(lambda model: build(model, **options), dtype)


def test_state_bytes():
    rows, columns, rank = 24, 12, 4
    expected = {
        "std": 2 * rank * rows + rank * columns,
        "reverse_std": 2 * rank * columns + rank * rows,
        "full": 2 * rank * rank + rank * (rows + columns),
    }
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        for proj_type, entries in expected.items():
            p = nn.Parameter(torch.randn(rows, columns, dtype=dtype))
            optimizer = GaLoreAdamW([{"params": [p], "rank": rank, "proj_type": proj_type}])
            p.grad = torch.randn(rows, columns, dtype=dtype)
            optimizer.step()
            assert helpers.state_bytes(optimizer) == width * entries


class TestEightBit:
    """On the CPU through bitsandbytes' own CPU kernels (0.50 or newer)."""

    @pytest.fixture(autouse=True)
    def kernels(self):
        bnb = pytest.importorskip("bitsandbytes", minversion="0.50", reason="no 8-bit optimiser on a CPU before 0.50")
        return bnb

    def test_state_bytes(self):
        rows, columns, rank = 300, 200, 16  # 4800 low-rank entries: 19 blocks
        p = nn.Parameter(torch.randn(rows, columns))
        small = nn.Parameter(torch.randn(50))
        optimizer = GaLoreAdamW([{"params": [p], "rank": rank}, {"params": [small]}], bits=8)
        p.grad, small.grad = torch.randn(rows, columns), torch.randn(50)
        optimizer.step()
        entries = rank * rows
        blocks = math.ceil(entries / 256)
        assert helpers.state_bytes(optimizer) == 2 * (entries + 4 * blocks) + 4 * rank * columns + 2 * 4 * 50

    def test_equals_galore_torch(self, monkeypatch):
        galore_torch = pytest.importorskip("galore_torch", reason="pip install --no-deps galore-torch")
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # it synchronises the GPU on any device
        p = nn.Parameter(torch.randn(300, 200, generator=torch.Generator().manual_seed(0)))
        q = nn.Parameter(p.detach().clone())
        low_rank = {"rank": 16, "update_proj_gap": 5, "scale": 0.25, "proj_type": "std"}
        first = GaLoreAdamW([{"params": [p], **low_rank}], lr=1e-2, eps=1e-8, bits=8)
        second = galore_torch.GaLoreAdamW8bit([{"params": [q], **low_rank}], lr=1e-2, eps=1e-8, weight_decay=0.0)
        for gradient in helpers.given_gradients(p, 8):
            p.grad, q.grad = gradient.clone(), gradient.clone()
            first.step()
            second.step()
        # the same kernel; fp32 rounding of the projected gradient may move an entry over an edge between two 8-bit values
        difference = (p - q).abs()
        assert difference.mean() < 1e-6
        assert difference.max() < 1e-3

    def test_plain_group_equals_bitsandbytes(self, kernels):
        p = nn.Parameter(torch.randn(80, 80, generator=torch.Generator().manual_seed(0)))
        q = nn.Parameter(p.detach().clone())
        settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        first, second = GaLoreAdamW([p], bits=8, **settings), kernels.optim.AdamW8bit([q], **settings)
        for gradient in helpers.given_gradients(p, 10):
            p.grad, q.grad = gradient.clone(), gradient.clone()
            first.step()
            second.step()
        assert torch.equal(p, q)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_resume_is_exact(self, dtype, monkeypatch):
        monkeypatch.setattr("velora.optim.galore.MIN_8BIT_SIZE", 1)
        helpers.assert_resume_is_exact(lambda model: build(model, bits=8), dtype)


def test_bf16_weights_with_fp32_small_moments_resume():
    """With bits=8 the moments of small tensors are fp32 beside bf16 weights; torch's own loading would round them."""
    pytest.importorskip("bitsandbytes")
    helpers.assert_resume_is_exact(lambda model: build(model, bits=8), torch.bfloat16)


@pytest.mark.parametrize(
    ("rank", "shape", "message"),
    [(13, (12, 20), "larger than the shorter side"), (4, (3, 4, 5), "not a matrix"), (0, (12, 20), "at least 1")],
)
def test_a_rank_that_does_not_fit_is_refused(rank, shape, message):
    with pytest.raises(ConfigError, match=message):
        GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(shape))], "rank": rank}])


def test_the_refusal_names_the_parameter():
    with pytest.raises(ConfigError, match=r"rank=5 .* encoder.weight of shape \(4, 8\); choose at most 4"):
        GaLoreAdamW([{"params": [("encoder.weight", nn.Parameter(torch.zeros(4, 8)))], "rank": 5}])


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_shows(svd, value):
    """LAPACK refuses NaN; where it lets an infinity pass, the weight shows it, as with any optimiser."""
    p = nn.Parameter(torch.zeros(4, 8))
    optimizer = GaLoreAdamW([{"params": [p], "rank": 2, "svd": svd}])
    p.grad = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    p.grad[1, 2] = value
    try:
        optimizer.step()
    except Diverged as error:
        assert "not finite" in str(error)  # noqa: PT017
    else:
        assert value == float("inf")
        assert not torch.isfinite(p).all()


def _one_step_of_a_rank(rank, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, store=torch.distributed.FileStore(store, 2))
    p = nn.Parameter(torch.zeros(6, 10))
    optimizer = GaLoreAdamW([{"params": [p], "rank": 2}])
    p.grad = torch.randn(
        6, 10, generator=torch.Generator().manual_seed(rank)
    )  # as different as rounding could never make them
    optimizer.step()
    with pytest.raises(ConfigError, match="runs in one process, here are 2"):
        GaLoreAdamW([p], layerwise=True)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    sharded = nn.Parameter(torch.distributed.tensor.distribute_tensor(torch.zeros(6, 10), mesh))
    optimizer_of_a_part = GaLoreAdamW([{"params": [sharded], "rank": 2}])
    sharded.grad = torch.distributed.tensor.distribute_tensor(torch.ones(6, 10), mesh)
    with pytest.raises(ConfigError, match="is sharded over several processes"):
        optimizer_of_a_part.step()
    torch.save(optimizer.state[p]["left"], f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_all_ranks_share_rank_zeros_projector_and_refuse_what_needs_one(tmp_path):
    torch.multiprocessing.spawn(_one_step_of_a_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first, second)
