"""Trained weights in eight bits: against nn.Linear with the weight that the codes stand for, and a step without rounding."""

from __future__ import annotations

import copy

import adapters
import optim_helpers as helpers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from velora import apply_lean, apply_velora, calibrate, remove_velora
from velora.config.weights import Int8
from velora.errors import ConfigError
from velora.memory.ledger import measure_saved_bytes
from velora.memory.paper import accounting
from velora.nn.adapter_state import save_network
from velora.nn.grouped import num_bytes
from velora.nn.int8 import CHUNK, Int8Linear, VeloraInt8Linear, int8_layers
from velora.nn.linear import VeloraLinear
from velora.optim import QGaLoreAdamW
from velora.run.checkpoints import non_finite_tensors


def linear(in_features=96, out_features=64, dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)


def pair(dtype=torch.float32, **sizes):
    """A layer with int8 weights, and the plain one with the weight that they stand for."""
    plain = linear(**sizes)
    layer = Int8Linear(plain, dtype).to(dtype)
    plain = plain.to(dtype)
    plain.weight.data = layer.dense()
    plain.bias = nn.Parameter(layer.bias.detach().clone())
    return layer, plain


def gradients(layer, x, autocast=None):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        y = layer(x)
    y.float().square().sum().backward()
    return y.detach(), x.grad, layer.weight.grad, layer.bias.grad


def int8_network(family, dtype="fp32"):
    model = Int8(kind="int8", dtype=dtype).apply(adapters.network(family), adapters.config())
    return model.requires_grad_(True)


def tiny_int8(seed=0, dtype=torch.float32):
    model = helpers.tiny_network(dtype, seed)
    model[0], model[3] = Int8Linear(model[0], dtype), Int8Linear(model[3], dtype)
    return model


def build(model, **options):
    low_rank = {"rank": 4, "update_proj_gap": options.pop("update_proj_gap", 2), "scale": 0.5}
    matrices, vectors = helpers.matrices_and_vectors(model)
    groups = [{"params": matrices, **low_rank}, {"params": vectors, "weight_decay": 0.0}]
    settings = {"lr": 1e-2, "weight_decay": 0.1, "bits": 32, "int8": int8_layers(model)}
    return QGaLoreAdamW(groups, **{**settings, **options})


def weights_of(model):
    return {
        name: module.dense(torch.float64) for name, module in model.named_modules() if isinstance(module, Int8Linear)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_output_and_gradients_are_those_of_the_dense_weight(dtype):
    layer, plain = pair(dtype)
    x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, expected = gradients(layer, x), gradients(plain, x)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)  # the same products of the same numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype):
    layer, plain = pair(dtype)
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    found, expected = gradients(layer, x, torch.bfloat16), gradients(plain, x, torch.bfloat16)
    assert found[0].dtype == torch.bfloat16
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        # W goes from its codes to bfloat16 at once, there by way of its own type; sums in bfloat16 are rounded to 2^-8
        torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-6)


def test_evaluation_and_frozen_weights():
    layer, plain = pair()
    x = torch.randn(3, 96)
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))
    layer.weight.requires_grad_(False)
    assert measure_saved_bytes(lambda: layer(x + 0).sum()) == 0  # the bias alone needs nothing
    found = gradients(layer, x)
    assert found[2] is None
    assert torch.equal(found[1], gradients(plain, x)[1])


def test_it_keeps_its_input_and_nothing_of_the_weight():
    layer, _ = pair()
    x = torch.randn(3, 96)
    assert measure_saved_bytes(lambda: layer(x + 0).sum()) == x.nbytes


def test_bytes_and_the_stand_in():
    layer, _ = pair(torch.bfloat16, in_features=100, out_features=60)
    tensors = [layer.weight, *layer.code_tensors()]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == num_bytes(6000, 8) + 2
    assert num_bytes(6000, 8) == 6000 + 5 * 24  # 23.4 groups of 256
    assert layer.weight.shape == (60, 100)
    assert layer.weight.isnan().all()
    for moved in (layer.half(), layer.to(torch.float32), layer.to("meta")):
        assert moved.weight.untyped_storage().nbytes() <= 4
        assert moved.weight.shape == (60, 100)
        assert moved.weight_scale.dtype == torch.float32
    assert layer.weight.device.type == "meta"


def test_a_copy_has_codes_of_its_own_and_takes_no_more():
    layer, _ = pair()
    layer.weight.requires_grad_()
    clone = copy.deepcopy(nn.Sequential(layer, layer))
    assert clone[0].weight is clone[1].weight
    assert clone[0].weight.untyped_storage().nbytes() == layer.weight.element_size()
    assert clone[0].weight.requires_grad
    x = torch.randn(3, 96)
    assert torch.equal(clone[0](x), layer(x))
    clone[0].weight_codes.zero_()
    assert not torch.equal(clone[0](x), layer(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_in_a_checkpointed_region(reentrant):
    layer, plain = pair()
    x = torch.randn(4, 96)
    results = []
    for module in (layer, plain):
        given = x.clone().requires_grad_()
        y = checkpoint(lambda t, m=module: torch.tanh(m(t)), given, use_reentrant=reentrant)
        y.square().sum().backward()
        results.append((y.detach(), given.grad, module.weight.grad, module.bias.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_second_derivative_is_refused():
    layer, _ = pair()
    x = torch.randn(2, 96, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="use weights=dense"):
        dx.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_velora_on_it_is_velora_on_the_dense_weight(dtype):
    layer, plain = pair(dtype)
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(1)).to(dtype) + 1
    for holder in (model := nn.Sequential(layer)), (dense := nn.Sequential(plain)):
        apply_velora(holder, ["0"], sub_token_size=8)
        calibrate(holder, (x,))
    assert type(layer) is VeloraInt8Linear
    assert type(plain) is VeloraLinear
    for ours, theirs in zip(gradients(layer, x), gradients(plain, x), strict=True):
        assert torch.equal(ours, theirs)
    assert measure_saved_bytes(lambda: layer(x + 0).sum()) == x.nbytes / 8
    assert layer.half().weight_scale.dtype == layer.direction.dtype == torch.float32
    remove_velora(model), remove_velora(dense)
    assert type(layer) is Int8Linear
    assert layer(x.half()).dtype == torch.float16


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_lean_reads_its_recipes(family):
    model, inputs = int8_network(family), adapters.batch(family)
    before = measure_saved_bytes(lambda: adapters.loss(model, inputs))
    adapters.loss(model, inputs).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    apply_lean(model)
    assert measure_saved_bytes(lambda: adapters.loss(model, inputs)) < before
    adapters.loss(model, inputs).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)  # fp32: norms sum in another order


def test_the_state_has_codes_and_goes_through_safetensors(tmp_path):
    model = tiny_int8()
    state = model.state_dict()
    assert {"0.weight_codes", "0.weight_scale", "0.weight_zero", "0.bias"} <= state.keys()
    assert not {"0.weight", "3.weight"} & state.keys()
    save_file(state, tmp_path / "model.safetensors")
    assert non_finite_tensors(tmp_path) == []
    other = tiny_int8(seed=9)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    for name, weight in weights_of(model).items():
        assert torch.equal(weights_of(other)[name], weight)
    with pytest.raises(RuntimeError, match="weight_codes"):
        other.load_state_dict(helpers.tiny_network().state_dict())


@pytest.mark.parametrize("family", adapters.FAMILIES)
def test_a_saved_network_has_plain_weights(family, tmp_path):
    model = int8_network(family)
    layers = weights_of(model)
    save_network(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == adapters.network(family).state_dict().keys()
    assert len(layers) == {"llama": 14, "roberta": 12, "vit": 8}[family]  # all of the backbone
    for name, weight in layers.items():
        assert torch.equal(saved[f"{name}.weight"], weight.float())
    assert not any(name.endswith("weight") for name in model.state_dict() if name.removesuffix(".weight") in layers)


def test_timms_fused_layer_is_saved_as_one(tmp_path):
    from velora.nn.split_qkv import split_qkv

    model = adapters.network("vit")
    split_qkv(model)
    model = Int8(kind="int8", dtype="fp32").apply(model, adapters.config())
    assert "blocks.0.attn.qkv.query.weight_codes" in model.state_dict()
    save_network(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == adapters.network("vit").state_dict().keys()
    key = model.blocks[0].attn.qkv.key
    assert torch.equal(saved["blocks.0.attn.qkv.weight"][32:64], key.dense())


def test_a_step_is_the_dense_one_but_for_the_rounding():
    """One step of the same optimiser on the dense weights: each entry within one quantum of it, and on average closer."""
    model, dense = tiny_int8(), helpers.tiny_network()
    for name, weight in weights_of(model).items():
        dense.get_submodule(name).weight.data = weight.float()
    batch = helpers.batches(1)[0]
    for network in (model, dense):
        helpers.train(network, build(network), [batch])
    for name, weight in weights_of(model).items():
        layer, exact = model.get_submodule(name), dense.get_submodule(name).weight.detach().double()
        quantum = layer.weight_scale.double().repeat_interleave(256)[: weight.numel()].view(weight.shape)
        # beside chance, the zero point is rounded by half a quantum, which an extreme may feel
        assert ((weight - exact).abs() <= 1.001 * quantum).all()
        assert (weight - exact).abs().mean() < 0.5 * quantum.mean()
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        if name not in ("0.weight", "3.weight"):
            assert torch.equal(p, q)


def test_steps_far_below_a_quantum_add_up():
    """400 steps of a hundredth of a quantum: rounding to the nearest would stay where it is; by chance, the mean goes along."""
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(64, 64))
    start, quantum = layer.dense(torch.float64), layer.weight_scale.mean().item()
    generator = torch.Generator().manual_seed(1)
    for _ in range(400):
        layer.write(layer.dense(torch.float32) + 0.01 * quantum, generator)
    moved = (layer.dense(torch.float64) - start).mean().item() / quantum
    # 4 quanta; a step's variance is at most a quarter of a quantum squared, and there are 400 steps and 4096 entries
    assert moved == pytest.approx(4, abs=5 * (400 / 4 / 4096) ** 0.5 + 0.1)  # 0.1: extremes are cut off


def test_write_rounds_in_parts_as_it_does_at_once(monkeypatch):
    layer = Int8Linear(linear(40, 30))  # 1200 numbers: five groups, the last one short
    target = torch.randn(30, 40)
    written = []
    for chunk in (CHUNK, 256, 512):
        monkeypatch.setattr("velora.nn.int8.CHUNK", chunk)
        layer.write(target, torch.Generator().manual_seed(0))
        written.append({name: tensor.clone() for name, tensor in layer.state_dict().items()})
    # the scales and zero points depend on no chance; the draws come in the same order
    for other in written[1:]:
        assert all(torch.equal(other[name], written[0][name]) for name in other)
    assert (layer.dense() - target).abs().max() <= 1.001 * layer.weight_scale.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"layerwise": True}, {"bits": 8}], ids=str)
def test_resume_is_exact(options, dtype, monkeypatch):
    if options.get("bits") == 8:
        pytest.importorskip("bitsandbytes", minversion="0.50", reason="no 8-bit optimiser on a CPU before 0.50")
        monkeypatch.setattr("velora.optim.galore.MIN_8BIT_SIZE", 1)
    data = helpers.batches(10, dtype)
    straight, interrupted = tiny_int8(dtype=dtype), tiny_int8(dtype=dtype)
    helpers.train(straight, build(straight, **options), data)
    optimizer = build(interrupted, **options)
    helpers.train(interrupted, optimizer, data[:5])
    state, moments = (helpers.through_a_file(x.state_dict()) for x in (interrupted, optimizer))
    resumed = tiny_int8(seed=99, dtype=dtype)
    resumed.load_state_dict(state)
    optimizer = build(resumed, **options)
    optimizer.load_state_dict(moments)
    torch.manual_seed(5)  # nothing is drawn from the global generator
    helpers.train(resumed, optimizer, data[5:])
    for (name, a), b in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_seed_alone_decides():
    results = []
    for seed, noise in ((0, 5), (0, 6), (1, 5)):
        model = tiny_int8()
        torch.manual_seed(noise)
        helpers.train(model, build(model, seed=seed), helpers.batches(3))
        results.append(model[0].weight_codes)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_layerwise_has_one_full_gradient_at_a_time():
    ordinary, layerwise = tiny_int8(), tiny_int8()
    helpers.train(ordinary, build(ordinary), helpers.batches(5))
    optimizer = build(layerwise, layerwise=True)
    helpers.train(layerwise, optimizer, helpers.batches(5))
    for a, b in zip(ordinary.state_dict().values(), layerwise.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert optimizer.peak_gradient_bytes == 24 * 12 * 4  # the largest matrix


def test_matrices_without_a_rank_are_written_back_too():
    model = tiny_int8()
    before = weights_of(model)
    optimizer = QGaLoreAdamW(model.parameters(), lr=1e-2, bits=32, int8=int8_layers(model))
    helpers.train(model, optimizer, helpers.batches(2))
    assert all(not torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


def test_no_other_optimiser_moves_it_in_silence():
    model = tiny_int8()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    helpers.loss_of(model, helpers.batches(1)[0]).backward()
    with pytest.raises(RuntimeError, match="a single memory location"):
        optimizer.step()


def test_a_network_of_heads_alone_is_refused():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Linear(4, 2)

    with pytest.raises(ConfigError, match="has no linear layer outside its head; use weights=dense"):
        Int8(kind="int8", dtype="fp32").apply(Head(), adapters.config())


def test_the_papers_sum_counts_the_codes():
    model = int8_network("llama")
    dense = sum(p.nbytes for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name or "lm_head" in name)
    codes = sum(num_bytes(weight.numel(), 8) for weight in weights_of(model).values())
    found = accounting(model, num_tokens=16, bytes_per_feature=4)["trained weights"]
    assert found == dense + codes + 4 * 14  # and the stand-ins
