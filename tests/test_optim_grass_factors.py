"""Grass on factors against Grass on the gradients that they stand for."""

import copy
import gc

import optim_helpers as helpers
import pytest
import torch
from torch import nn

from velora.errors import ConfigError
from velora.nn.linear import VeloraLinear
from velora.optim import FactoredGrassAdamW, GrassAdamW

SIZE = 4  # of a sub-token


def network(dtype=torch.float64, seed=0, init="random"):
    """12 -> 24 -> 6 as helpers.tiny_network, with VeLoRA in both linear layers."""
    model = helpers.tiny_network(dtype, seed)
    for layer in (model[0], model[3]):
        twin = VeloraLinear.convert_(
            layer,
            num_groups=layer.in_features // SIZE,
            sub_token_size=SIZE,
            scale=0.5,
            init=init,
            seed=layer.in_features,
        )
        if init != "random":
            twin.set_direction(torch.full((SIZE,), SIZE**-0.5), torch.ones(SIZE))
    return model


def build(model, factored=True, **options):
    low_rank = {"rank": 4, "update_gap": 3, "scale": 0.5, "selection": options.pop("selection", "top")}
    matrices, vectors = helpers.matrices_and_vectors(model)
    groups = [{"params": matrices, **low_rank}, {"params": vectors, "weight_decay": 0.0}]
    options = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3, "layerwise": True, **options}
    if not factored:
        return GrassAdamW(groups, **options)
    optimizer = FactoredGrassAdamW(groups, **options)
    assert optimizer.take_factors(model) == 2
    return optimizer


def assert_same(a, b, tolerance):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


@pytest.mark.parametrize("selection", ["top", "sampled"])
def test_the_trajectory_is_that_of_grass_on_the_full_gradient(selection):
    """Eleven steps, four selections, an ε that matters. The row norms differ in their last digits only, so the picks agree."""
    ours, theirs = network(), network()
    optimizer = build(ours, selection=selection)
    helpers.train(ours, optimizer, helpers.batches(11, torch.float64))
    reference = build(theirs, factored=False, selection=selection)
    helpers.train(theirs, reference, helpers.batches(11, torch.float64))
    for layer, other in ((ours[0], theirs[0]), (ours[3], theirs[3])):
        assert torch.equal(optimizer.state[layer.weight]["rows"], reference.state[other.weight]["rows"])
    assert_same(ours, theirs, 1e-12)  # float64: the order of the roundings
    assert (ours[0].weight - network()[0].weight).abs().max() > 1e-2  # so that something was to be compared


@pytest.mark.parametrize("selection", ["top", "sampled"])
def test_accumulated_factors_are_those_of_grass(selection):
    ours, theirs = network(), network()
    for model, factored in ((ours, True), (theirs, False)):
        optimizer = build(model, factored, selection=selection, accumulation_steps=3)
        data = helpers.batches(12, torch.float64)
        for start in range(0, 12, 3):
            for batch in data[start : start + 3]:
                helpers.loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(ours, theirs, 1e-12)


def test_clipping_knows_the_norm():
    ours, theirs = network(), network()
    for model, factored in ((ours, True), (theirs, False)):
        optimizer = build(model, factored, max_grad_norm=0.01)
        for batch in helpers.batches(5, torch.float64):
            loss = helpers.loss_of(model, batch)
            with optimizer.measure_norm():
                loss.backward(retain_graph=True)
            assert optimizer._factor < 1
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(ours, theirs, 1e-9)  # the norm is summed in fp32, in another order


def test_no_full_gradient_and_the_bytes_of_the_state():
    """24 x 12 and 6 x 24, S = 4, R = 4: moments of 4 x 3 and 4 x 6 numbers. At a refresh 24 x 3 of the first layer arrive."""
    model = network(torch.float32)
    optimizer = build(model)
    seen = []
    for layer in (model[0], model[3]):
        layer.weight.register_hook(lambda gradient: None if gradient is None else seen.append(gradient.shape))
    helpers.train(model, optimizer, helpers.batches(2))
    assert not seen
    assert optimizer.peak_gradient_bytes == 24 * 3 * 4
    for layer, groups in ((model[0], 3), (model[3], 6)):
        state = optimizer.state[layer.weight]
        moments = [value for name, value in state.items() if name.startswith("exp_avg")]
        assert sum(value.nbytes for value in moments) == 2 * 4 * groups * 4
        assert sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor)) == (
            8 * 4 * (groups + 1) + 4 * SIZE
        )


def test_the_sum_over_tokens_is_of_the_picked_rows_only(monkeypatch):
    import velora.optim.grass_factors as module

    shapes, plain = [], module.sum_over_tokens

    def spy(dy, z):
        shapes.append(dy.shape[1])
        return plain(dy, z)

    monkeypatch.setattr(module, "sum_over_tokens", spy)
    model = network()
    helpers.train(model, build(model), helpers.batches(4, torch.float64))
    assert shapes == [6, 24, 4, 4, 4, 4, 6, 24]  # all rows at the first step and at the fourth


@pytest.mark.parametrize("options", [{}, {"selection": "sampled"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(options, dtype):
    helpers.assert_resume_is_exact(lambda model: build(model, **options), dtype, network)


def test_a_layer_that_calibration_passed_by_trains_as_with_grass():
    ours, theirs = network(), network()
    for model, factored in ((ours, True), (theirs, False)):
        model[0].stay_plain()
        helpers.train(model, build(model, factored), helpers.batches(5, torch.float64))
    assert_same(ours, theirs, 1e-12)


def test_layers_make_gradients_again_without_the_optimizer_and_in_a_copy():
    model = network()
    optimizer = build(model)
    clone = copy.deepcopy(model)
    batch = helpers.batches(1, torch.float64)[0]
    helpers.loss_of(clone, batch).backward()
    assert clone[0].weight.grad is not None
    optimizer.remove_hooks()
    helpers.loss_of(model, batch).backward()
    torch.testing.assert_close(model[0].weight.grad, clone[0].weight.grad, rtol=0, atol=0)
    model.zero_grad()
    model[0].revert_()
    model[3].revert_()
    assert type(model[0]) is nn.Linear
    assert "factor_taker" not in vars(model[0])
    other = network()
    build(other)
    gc.collect()  # the optimiser is gone
    helpers.loss_of(other, batch).backward()
    torch.testing.assert_close(other[0].weight.grad, clone[0].weight.grad, rtol=0, atol=0)


def test_what_cannot_be():
    model = network(init="running_average")
    with pytest.raises(ConfigError, match=r"init=running_average.*fixed_average, svd or random"):
        build(model)
    matrices, _ = helpers.matrices_and_vectors(model)
    with pytest.raises(ConfigError, match="layerwise=True"):
        FactoredGrassAdamW([{"params": matrices, "rank": 4}])
    plain = helpers.tiny_network()
    matrices, _ = helpers.matrices_and_vectors(plain)
    with pytest.raises(ConfigError, match="none of the layers with a rank is a VeLoRA linear layer"):
        FactoredGrassAdamW([{"params": matrices, "rank": 4}], layerwise=True).take_factors(plain)
    tied = nn.Sequential(network()[0], network()[0])
    tied[1].weight = tied[0].weight
    with pytest.raises(ConfigError, match="2 VeLoRA layers share a weight"):
        FactoredGrassAdamW([{"params": [tied[0].weight], "rank": 4}], layerwise=True).take_factors(tied)
