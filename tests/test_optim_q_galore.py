import math

import numpy as np
import optim_helpers as helpers
import pytest
import torch
from reference_optim import ReferenceQGaLore
from torch import nn

from velora.errors import ConfigError, Diverged
from velora.nn.grouped import num_bytes, unpack
from velora.optim import GaLoreAdamW, QGaLoreAdamW

SHAPES = [(20, 12), (12, 20)]
needs_kernels = pytest.mark.usefixtures("kernels")


@pytest.fixture
def kernels():
    return pytest.importorskip("bitsandbytes", minversion="0.50", reason="no 8-bit optimiser on a CPU before 0.50")


def build(model, **options):
    low_rank = {"rank": 4, "update_proj_gap": 1, "scale": 0.5, "queue_size": 2}
    for key in (*low_rank, "svd", "cos_threshold"):
        if key in options:
            low_rank[key] = options.pop(key)
    matrices, vectors = helpers.matrices_and_vectors(model)
    groups = [{"params": matrices, **low_rank}, {"params": vectors, "weight_decay": 0.0}]
    return QGaLoreAdamW(groups, **{"lr": 1e-2, "weight_decay": 0.1, **options})


def calm_gradients(p, num, noise):
    """One matrix of rank one, which the first singular vector follows, and noise on it."""
    base = torch.outer(*(torch.linspace(-1, 2, side, dtype=torch.float64) for side in p.shape))
    return [(base + noise * given.double()).to(p.dtype) for given in helpers.given_gradients(p, num)]


def step_along(optimizer, p, gradient):
    p.grad = gradient.clone()
    optimizer.step()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("noise", "final_gap"), [(0.3, 8), (100.0, 1)])
def test_float64_reference(shape, noise, final_gap):
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    settings = {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    group = {"params": [p], "rank": 4, "update_proj_gap": 1, "scale": 0.7}
    optimizer = QGaLoreAdamW([group], bits=32, **settings)
    side = "right" if shape[0] >= shape[1] else "left"
    reference = ReferenceQGaLore(p.detach().numpy(), rank=4, gap=1, scale=0.7, side=side, **settings)
    for step, gradient in enumerate(calm_gradients(p, 14, noise)):
        lr = optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)  # as a schedule sets it
        step_along(optimizer, p, gradient)
        projector = optimizer._projector(p, optimizer.param_groups[0])
        reference.update(gradient.numpy(), lr, [None if side is None else side.numpy() for side in projector])
        assert optimizer.state[p].get("gap", 1) == reference.gap
    assert reference.gap == final_gap
    # float64, fourteen steps: only the order of sums differs; a code that falls on the other side would show as 1e-2
    np.testing.assert_allclose(p.detach().numpy(), reference.weight, rtol=0, atol=1e-11)


@needs_kernels
@pytest.mark.parametrize("shape", [(300, 256), (256, 300)])
def test_equals_the_projector_of_q_galore_torch_around_bitsandbytes(shape):
    """The package's own step does not run with bitsandbytes of today (0.50): here its projector stands around AdamW8bit."""
    package = pytest.importorskip("q_galore_torch", reason="pip install --no-deps q-galore-torch")
    from bitsandbytes.optim import AdamW8bit

    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    weight = p.detach().clone()
    group = {"rank": 16, "update_proj_gap": 2, "scale": 0.25}
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    ours = QGaLoreAdamW([{"params": [p], **group}], **settings)
    projector = package.q_galore_projector.GaLoreProjector(**group, quant=True, group_size=256, n_bit=4)
    update = nn.Parameter(torch.zeros((300, 16) if shape[0] > shape[1] else (16, 300)))
    theirs = AdamW8bit([update], **settings)
    for step, gradient in enumerate(calm_gradients(p, 18, noise=0.1)):
        step_along(ours, p, gradient)
        update.data.zero_()
        step_along(theirs, update, projector.project(gradient, step))
        weight += projector.project_back(update.detach())
    state = ours.state[p]
    assert min(projector.queue) > 0  # no vector has turned round, so that the cosine's sign makes no difference
    assert state["cosines"] == pytest.approx(projector.queue, abs=1e-5)  # fp32
    assert state["gap"] == projector.update_proj_gap == 16
    side = "right" if shape[0] > shape[1] else "left"
    codes = unpack(state[f"{side}_codes"], 16 * 256)
    assert torch.equal(codes, projector.ortho_matrix.flatten())
    assert torch.equal(state[f"{side}_scale"], projector.ortho_matrix_scales.flatten())
    # the same kernel; fp32 rounding of the projected gradient may move an entry over an edge between two 8-bit values
    difference = (p - weight).abs()
    assert difference.mean() < 1e-6
    assert difference.max() < 1e-3


def test_a_vector_that_turns_round_has_not_changed():
    """G and -G have one projector; the package takes their first vectors' cosine with the sign that the SVD gave them."""
    signed = []
    for shape in SHAPES:
        p = nn.Parameter(torch.zeros(shape))
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer = QGaLoreAdamW([{"params": [p], "rank": 4, "update_proj_gap": 1, "queue_size": 1}], bits=32)
        step_along(optimizer, p, gradient)
        before = optimizer.state[p]["first_direction"]
        step_along(optimizer, p, -gradient)
        signed.append(float(before @ optimizer.state[p]["first_direction"]))
        assert optimizer.state[p]["cosines"] == pytest.approx([1.0], abs=1e-5)
        assert optimizer.state[p]["gap"] == 2
    assert min(signed) < -0.99  # of the two sides, this SVD turns one


def test_the_gap_doubles_at_each_calm_projector_and_belongs_to_a_matrix():
    """Steps 0 and 2, 4 ... 10 give five cosines; then 12 (a multiple of 4), 16 (of 8), 32 (of 16)."""
    calm, restless = (nn.Parameter(torch.zeros(12, 20)) for _ in range(2))
    optimizer = QGaLoreAdamW([{"params": [calm, restless], "rank": 4, "update_proj_gap": 2}], bits=32)
    random = helpers.given_gradients(restless, 40)
    made, seen = [], None
    for step, gradient in enumerate(calm_gradients(calm, 40, noise=0.1)):
        calm.grad, restless.grad = gradient.clone(), random[step].clone()
        optimizer.step()
        if optimizer.state[calm]["first_direction"] is not seen:
            made.append(step)
            seen = optimizer.state[calm]["first_direction"]
    assert made == [0, 2, 4, 6, 8, 10, 12, 16, 32]
    assert optimizer.state[calm]["gap"] == 32
    assert "gap" not in optimizer.state[restless]
    assert len(optimizer.state[restless]["cosines"]) == 5


def test_without_a_threshold_it_is_galore_with_a_rounded_projector():
    p, q = (nn.Parameter(torch.zeros(12, 20, dtype=torch.float64)) for _ in range(2))
    group = {"rank": 4, "update_proj_gap": 3, "scale": 0.5}
    rounded = QGaLoreAdamW([{"params": [p], **group, "cos_threshold": None}], bits=32)
    exact = GaLoreAdamW([{"params": [q], **group}], betas=(0.9, 0.95), eps=1e-8)
    for gradient in helpers.given_gradients(p, 7):
        step_along(rounded, p, gradient)
        step_along(exact, q, gradient)
    assert rounded.state[p].keys() == {"step", "exp_avg", "exp_avg_sq", "left_codes", "left_scale", "left_zero"}
    left, _ = rounded._projector(p, rounded.param_groups[0])
    error = (left - exact.state[q]["left"]).abs().max()
    assert 0 < error <= rounded.state[p]["left_scale"].max() / 2 + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"svd": "randomized"}, {"layerwise": True}, {"bits": 32}], ids=str)
@needs_kernels
def test_resume_is_exact(options, dtype, monkeypatch):
    """The checkpoint after five steps holds a queue, a gap that has doubled and 8-bit moments."""
    monkeypatch.setattr("velora.optim.galore.MIN_8BIT_SIZE", 1)
    made = []

    def remembered(model):
        made.append(build(model, cos_threshold=0.05, **options))
        return made[-1]

    helpers.assert_resume_is_exact(remembered, dtype)
    assert max(state.get("gap", 1) for state in made[-1].state.values()) > 1


def test_layerwise_equals_the_ordinary_optimizer():
    ordinary, layerwise = helpers.tiny_network(), helpers.tiny_network()
    helpers.train(ordinary, build(ordinary, bits=32), helpers.batches(8))
    optimizer = build(layerwise, bits=32, layerwise=True)
    helpers.train(layerwise, optimizer, helpers.batches(8))
    for p, q in zip(ordinary.parameters(), layerwise.parameters(), strict=True):
        assert torch.equal(p, q)
    assert optimizer.peak_gradient_bytes == 24 * 12 * 4  # the largest matrix


def test_layerwise_accumulates_projected_gradients():
    model = helpers.tiny_network(torch.float64)
    optimizer = build(model, bits=32, layerwise=True, accumulation_steps=3, betas=(0.0, 0.0))
    weight, total = model[0].weight, torch.zeros(24, 12, dtype=torch.float64)
    for batch in helpers.batches(3, torch.float64):
        total += torch.autograd.grad(helpers.loss_of(model, batch), weight)[0]
        helpers.loss_of(model, batch).backward()
        if weight in optimizer.held_gradients():
            assert optimizer.held_gradients()[weight].shape == (24, 4)
            assert weight.grad is None
    optimizer.step()
    _, right = optimizer._projector(weight, optimizer.param_groups[0])
    # float64: the order of two sums
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], total @ right.T, rtol=0, atol=1e-14)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes(dtype):
    rows, columns, rank, width = 300, 200, 16, dtype.itemsize
    p = nn.Parameter(torch.randn(rows, columns, dtype=dtype))
    optimizer = QGaLoreAdamW([{"params": [p], "rank": rank}])
    step_along(optimizer, p, torch.randn(rows, columns, dtype=dtype))
    moments = 2 * (rank * rows + 4 * math.ceil(rank * rows / 256))
    assert num_bytes(rank * columns, 4) == rank * columns / 2 + 5 * 13  # 12.5 groups of 256
    assert helpers.state_bytes(optimizer) == moments + num_bytes(rank * columns, 4) + width * columns


def test_randomized_svd_depends_on_its_seed_only():
    helpers.assert_random_by_its_seed_only(lambda model, seed: build(model, bits=32, svd="randomized", seed=seed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 13}, "larger than the shorter side"),
        ({"rank": 4, "proj_type": "full"}, "proj_type=full must be std"),
        ({"rank": 4, "queue_size": 0}, "queue_size=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        QGaLoreAdamW([{"params": [nn.Parameter(torch.zeros(12, 20))], **options}], bits=32)


def test_a_gradient_that_is_not_finite_shows():
    p = nn.Parameter(torch.zeros(4, 8))
    optimizer = QGaLoreAdamW([{"params": [p], "rank": 2}], bits=32)
    with pytest.raises(Diverged, match=r"shape \(4, 8\) is not finite"):
        step_along(optimizer, p, torch.full((4, 8), float("nan")))


def _steps_of_a_rank(rank, store, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, store=torch.distributed.FileStore(store, 2))
    p = nn.Parameter(torch.zeros(6, 10))
    optimizer = QGaLoreAdamW([{"params": [p], "rank": 2, "update_proj_gap": 1, "queue_size": 1}], bits=32)
    for gradient in helpers.given_gradients(p, 6, seed=rank):  # as different as no rounding could make them
        step_along(optimizer, p, gradient)
    state = optimizer.state[p]
    torch.save(
        {key: state[key] for key in ("left_codes", "left_scale", "left_zero", "cosines", "gap")}, f"{results}/{rank}.pt"
    )
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_all_ranks_share_rank_zeros_projector_and_gap(tmp_path):
    torch.multiprocessing.spawn(_steps_of_a_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["gap"] == second["gap"] > 1
    assert first["cosines"] == second["cosines"]
    assert all(torch.equal(first[key], second[key]) for key in ("left_codes", "left_scale", "left_zero"))
