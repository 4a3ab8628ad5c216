import numpy as np
import optim_helpers as helpers
import pytest
import torch
from reference_optim import ReferenceFlora
from torch import nn

from velora.errors import ConfigError
from velora.optim import Flora
from velora.optim.subspace import derive_seed

RANK = 4


def build(model, **options):
    matrices, vectors = helpers.matrices_and_vectors(model)
    return Flora([{"params": matrices, "rank": RANK}, {"params": vectors}], **{"lr": 1e-2, "kappa": 3, **options})


@pytest.mark.parametrize("sketched", ["past", "all"])
@pytest.mark.parametrize("shape", [(10, 6), (6, 10)])
@pytest.mark.parametrize("scaled", [False, True])
def test_float64_reference(shape, sketched, scaled):
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    settings = {"eps": (1e-30, 1e-3), "weight_decay": 0.1, "beta1": 0.8, "kappa": 3, "sketched": sketched}
    optimizer = Flora(
        [{"params": [p], "rank": RANK}], lr=1.0, clip_threshold=0.9, decay_rate=-0.7, scale_parameter=scaled, **settings
    )

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(RANK, min(shape), generator=generator, dtype=torch.float64).numpy() / RANK**0.5

    reference = ReferenceFlora(
        p.detach().numpy(),
        seed=optimizer.state[p]["seed"],
        draw=draw,
        advance=derive_seed,  # any other number would do: it is only the name of the next matrix
        clip=0.9,
        decay=-0.7,
        scaled=scaled,
        **settings,
    )
    for step, gradient in enumerate(helpers.given_gradients(p, 10)):
        lr = optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        p.grad = gradient.clone()
        optimizer.step()
        reference.update(gradient.numpy(), lr)
    # float64, ten steps: only the order of sums differs
    np.testing.assert_allclose(p.detach().numpy(), reference.weight, rtol=0, atol=1e-12)


def test_equals_the_authors_program(monkeypatch):
    """With our matrices in the place of theirs, flora-opt takes the same 30 steps."""
    authors = pytest.importorskip("flora_opt.optimizers.torch.flora", reason="pip install --no-deps flora-opt")
    ours = [
        nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        for shape in [(10, 6), (6, 10), (7,)]
    ]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    first = Flora([{"params": ours[:2], "rank": RANK}, {"params": ours[2:]}], lr=1e-2, kappa=4, weight_decay=0.1)
    second = authors.Flora(theirs, lr=1e-2, rank=RANK, kappa=4, beta1=0.9, weight_decay=0.1)
    for p, q in zip(ours[:2], theirs[:2], strict=True):
        second.state[q]["seed"] = first.state[p]["seed"]

    def randn(shape, seed, device, dtype):
        sketch = torch.randn(RANK, max(shape), generator=torch.Generator().manual_seed(seed), dtype=dtype)
        return sketch if shape[0] == RANK else sketch.T  # theirs is drawn as its transpose for tall matrices

    monkeypatch.setattr(authors, "stable_randn", randn)
    monkeypatch.setattr(authors, "split_seed", lambda seed: (seed, seed))
    monkeypatch.setattr(authors, "next_seed", derive_seed)
    gradients = [helpers.given_gradients(p, 30, seed=i) for i, p in enumerate(ours)]
    for step in range(30):
        for p, q, given in zip(ours, theirs, gradients, strict=True):
            p.grad, q.grad = given[step].clone(), given[step].clone()
        first.step()
        second.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)  # fp32, 30 updates of at most 1e-2


def test_without_momentum_it_is_adafactor():
    """transformers' Adafactor is independent of this code."""
    from transformers.optimization import Adafactor

    ours, theirs = helpers.tiny_network(torch.float64), helpers.tiny_network(torch.float64)
    settings = {"lr": 1e-2, "beta1": None, "weight_decay": 0.1, "scale_parameter": True}
    helpers.train(ours, Flora(ours.parameters(), **settings), helpers.batches(10, torch.float64))
    other = Adafactor(theirs.parameters(), relative_step=False, **settings)
    helpers.train(theirs, other, helpers.batches(10, torch.float64))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        # theirs makes its state in fp32 first, even for fp64 weights: no more than rounding of zeros; sums in another order
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_state_bytes():
    for dtype in (torch.float32, torch.bfloat16):
        matrix, vector = nn.Parameter(torch.randn(24, 12, dtype=dtype)), nn.Parameter(torch.randn(7, dtype=dtype))
        optimizer = Flora([{"params": [matrix], "rank": RANK}, {"params": [vector]}])
        matrix.grad, vector.grad = torch.randn_like(matrix), torch.randn_like(vector)
        optimizer.step()
        assert helpers.state_bytes(optimizer) == 4 * (RANK * 24 + 24 + 12) + 2 * 4 * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"sketched": "all"}, {"layerwise": True}])
def test_resume_is_exact(options, dtype):
    helpers.assert_resume_is_exact(lambda model: build(model, **options), dtype)


def test_resume_is_exact_with_sketched_gradients():
    """With two micro-batches a step every gradient passes through the sketch, also where a step ends after the first."""
    helpers.assert_resume_is_exact(lambda model: build(model, layerwise=True, accumulation_steps=2))


def test_a_seed_decides_and_the_global_generator_does_not():
    helpers.assert_random_by_its_seed_only(lambda model, seed: build(model, seed=seed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sketched": "some"}, "must be past or all"),
        ({"kappa": 0}, "kappa=0"),
        ({"rank": 9}, "larger than the shorter side"),
    ],
)
def test_bad_settings_are_refused(options, message):
    group = {"params": [nn.Parameter(torch.zeros(8, 12))], "rank": options.pop("rank", 4)}
    with pytest.raises(ConfigError, match=message):
        Flora([group], **options)
