import optim_helpers as helpers
import pytest
import torch
from torch import nn

from velora.errors import ConfigError, Diverged
from velora.optim import Flora, GaLoreAdamW, Lomo


def galore(model, **options):
    matrices, vectors = helpers.matrices_and_vectors(model)
    groups = [{"params": matrices, "rank": 4, "update_proj_gap": options.pop("gap", 3)}, {"params": vectors}]
    return GaLoreAdamW(groups, lr=1e-2, weight_decay=0.1, **options)


def flora(model, **options):
    matrices, vectors = helpers.matrices_and_vectors(model)
    return Flora([{"params": matrices, "rank": 4}, {"params": vectors}], lr=1e-2, kappa=3, **options)


@pytest.mark.parametrize("build", [galore, flora])
def test_one_pass_a_step_equals_the_ordinary_optimizer(build):
    ordinary, layerwise = helpers.tiny_network(), helpers.tiny_network()
    helpers.train(ordinary, build(ordinary), helpers.batches(8))
    helpers.train(layerwise, build(layerwise, layerwise=True), helpers.batches(8))
    for p, q in zip(ordinary.parameters(), layerwise.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("build", [galore, flora, lambda model, layerwise: Lomo(model.parameters())])
def test_one_gradient_at_a_time(build):
    model = helpers.tiny_network()
    alive = []
    for p in model.parameters():  # registered first, so called before the optimiser's hook
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    optimizer = build(model, layerwise=True)
    helpers.loss_of(model, helpers.batches(1)[0]).backward()
    assert alive == [1] * len(list(model.parameters()))
    assert optimizer.peak_gradient_bytes == 24 * 12 * 4  # the largest matrix
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()


def test_galore_accumulates_the_projected_gradient():
    """Equal to the ordinary optimiser on the same micro-batches, once both have the same projector."""
    data = helpers.batches(9, torch.float64)
    warm = helpers.tiny_network(torch.float64)
    optimizer = galore(warm, gap=100)
    helpers.train(warm, optimizer, data[:1])
    state = helpers.through_a_file(optimizer.state_dict())
    models = [helpers.tiny_network(torch.float64), helpers.tiny_network(torch.float64)]
    for model, options in zip(models, ({}, {"layerwise": True, "accumulation_steps": 4}), strict=True):
        model.load_state_dict(warm.state_dict())
        optimizer = galore(model, gap=100, **options)
        optimizer.load_state_dict(state)
        for first in (1, 5):
            for batch in data[first : first + 4]:
                (helpers.loss_of(model, batch) / 4).backward()
                if options and batch is not data[first + 3]:
                    held = optimizer.held_gradients()
                    matrices, vectors = helpers.matrices_and_vectors(model)
                    assert [held[p].shape for p in matrices] == [(24, 4), (4, 24)]  # the longer side x rank
                    assert all(p.grad is None for p in matrices)
                    assert all(p.grad is not None for p in vectors)
            optimizer.step()
            optimizer.zero_grad()
    assert not optimizer.held_gradients()
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        # float64: the sum of projections and the projection of the sum
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_peak_of_the_gradients_under_accumulation():
    """In the second of three passes everything waits: two low-rank sums, all vectors; and the larger full gradient arrives."""
    model = helpers.tiny_network()
    optimizer = galore(model, layerwise=True, accumulation_steps=3)
    for batch in helpers.batches(3):
        helpers.loss_of(model, batch).backward()
    optimizer.step()
    vectors = 24 + 24 + 24 + 6  # biases, and the norm's scale and shift
    assert optimizer.peak_gradient_bytes == 4 * (24 * 4 + 4 * 24 + vectors + 24 * 12)


def test_galore_takes_the_projector_from_the_first_micro_batch():
    data = helpers.batches(3, torch.float64)
    alone, accumulated = helpers.tiny_network(torch.float64), helpers.tiny_network(torch.float64)
    projectors = []
    for model, num in ((alone, 1), (accumulated, 3)):
        optimizer = galore(model, layerwise=True, accumulation_steps=num)
        for batch in data[:num]:
            helpers.loss_of(model, batch).backward()
        optimizer.step()
        projectors.append(optimizer.state[model[0].weight]["right"])
    assert torch.equal(*projectors)


def test_flora_accumulates_a_sketch_of_the_gradients():
    """Algorithm 1: with momentum off, the step is that along B'B (G1 + G2), with B rebuilt here from the seed in the state."""
    data = helpers.batches(2, torch.float64)
    model, plain = helpers.tiny_network(torch.float64), helpers.tiny_network(torch.float64)
    optimizer = flora(model, layerwise=True, accumulation_steps=2, beta1=None)
    weight, other = model[3].weight, plain[3].weight  # 6 x 24: sketched from the left
    seed = optimizer.state[weight]["accumulation_seed"]
    for batch in data:
        helpers.loss_of(model, batch).backward()
        helpers.loss_of(plain, batch).backward()
    optimizer.step()
    sketch = (
        torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2
    )  # over sqrt(rank)
    other.grad = sketch.T @ (sketch @ other.grad)
    Flora([other], lr=1e-2, beta1=None).step()
    torch.testing.assert_close(weight, other, rtol=0, atol=1e-12)
    assert optimizer.state[weight]["accumulation_seed"] != seed


def test_sketches_are_unbiased():
    """The mean of A'A over many seeds is the identity; entries of one A'A have variance at most 2 / rank."""
    from velora.optim.subspace import sketch, unsketch

    gradient = torch.eye(8, 12, dtype=torch.float64)
    num, rank = 4000, 4
    mean = sum(unsketch(sketch(gradient, rank, seed), gradient.shape, rank, seed) for seed in range(num)) / num
    torch.testing.assert_close(mean, gradient, rtol=0, atol=5 * (2 / rank / num) ** 0.5)  # five standard deviations


def test_a_step_may_end_early():
    """The last step of an epoch can have fewer micro-batches; step() applies what came."""
    data = helpers.batches(2, torch.float64)
    ordinary, layerwise = helpers.tiny_network(torch.float64), helpers.tiny_network(torch.float64)
    helpers.train(ordinary, galore(ordinary), data)
    helpers.train(layerwise, galore(layerwise, layerwise=True, accumulation_steps=3), data)
    for p, q in zip(ordinary.parameters(), layerwise.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("build", [galore, flora, lambda model, layerwise: Lomo(model.parameters())])
def test_a_backward_pass_too_many_is_an_error(build):
    model = helpers.tiny_network()
    optimizer = build(model, layerwise=True)
    helpers.loss_of(model, helpers.batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match="backward pass 2 of a step, but accumulation_steps=1"):
        helpers.loss_of(model, helpers.batches(1)[0]).backward()
    del optimizer


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_clipping_by_the_global_norm(scale):
    """Two backward passes give what clip_grad_norm_ gives, also where nothing is clipped."""
    ordinary, layerwise = helpers.tiny_network(torch.float64), helpers.tiny_network(torch.float64)
    optimizer = torch.optim.SGD(ordinary.parameters(), lr=1e-2)
    fused = Lomo(layerwise.parameters(), lr=1e-2, max_grad_norm=0.5 * scale)
    for batch in helpers.batches(5, torch.float64):
        helpers.loss_of(ordinary, batch).backward()
        nn.utils.clip_grad_norm_(ordinary.parameters(), 0.5 * scale)
        optimizer.step()
        optimizer.zero_grad()
        loss = helpers.loss_of(layerwise, batch)
        before = [p.detach().clone() for p in layerwise.parameters()]
        with fused.measure_norm():
            loss.backward(retain_graph=True)
        assert all(torch.equal(p, b) for p, b in zip(layerwise.parameters(), before, strict=True))
        loss.backward()
        fused.step()
    for p, q in zip(ordinary.parameters(), layerwise.parameters(), strict=True):
        # the norm is summed in fp32 here, as the gradients are half precision where this is used
        torch.testing.assert_close(p, q, rtol=0, atol=1e-8)


def test_clipping_without_the_first_pass_is_an_error():
    """In every step: the norm of the step before does not serve."""
    model = helpers.tiny_network()
    optimizer = Lomo(model.parameters(), max_grad_norm=1.0)
    loss = helpers.loss_of(model, helpers.batches(1)[0])
    with optimizer.measure_norm():
        loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"inside measure_norm\(\)"):
        helpers.loss_of(model, helpers.batches(1)[0]).backward()
    del optimizer


def test_a_gradient_that_is_not_finite_ends_the_backward_pass():
    model = helpers.tiny_network()
    optimizer = galore(model, layerwise=True)
    inputs, targets = helpers.batches(1)[0]
    with pytest.raises(Diverged, match="not finite"):
        helpers.loss_of(model, (inputs / 0, targets)).backward()
    del optimizer


def test_shared_weights_are_updated_once():
    torch.manual_seed(0)
    layer = nn.Linear(6, 6, bias=False)
    twice = nn.Sequential(layer, nn.Tanh(), layer)
    data = torch.randn(5, 6)
    expected = layer.weight.detach() - 0.1 * torch.autograd.grad(twice(data).square().mean(), layer.weight)[0]
    optimizer = Lomo(twice.parameters(), lr=0.1)
    twice(data).square().mean().backward()
    optimizer.step()
    assert torch.equal(layer.weight, expected)


def test_checkpointed_blocks():
    plain, checkpointed = helpers.tiny_network(), helpers.tiny_network()
    first, second = Lomo(plain.parameters(), lr=0.1), Lomo(checkpointed.parameters(), lr=0.1)
    inputs, targets = helpers.batches(1)[0]
    helpers.loss_of(plain, (inputs, targets)).backward()
    hidden = torch.utils.checkpoint.checkpoint(checkpointed[:3], inputs, use_reentrant=False)
    (checkpointed[3](hidden) - targets).square().mean().backward()
    first.step(), second.step()
    for p, q in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_removed_hooks_and_dropped_optimizers_leave_the_gradients_alone():
    for forget in (lambda optimizer: optimizer.remove_hooks(), lambda optimizer: None):
        model = helpers.tiny_network()
        optimizer = Lomo(model.parameters())
        before = model[0].weight.detach().clone()
        forget(optimizer)
        del optimizer
        helpers.loss_of(model, helpers.batches(1)[0]).backward()
        assert torch.equal(model[0].weight, before)
        assert model[0].weight.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulation_steps": 0}, "at least 1"),
        ({"max_grad_norm": 1.0}, "clip the gradients before"),
        ({"max_grad_norm": 1.0, "layerwise": True, "accumulation_steps": 2}, "its norm is not known"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        galore(helpers.tiny_network(), **options)
