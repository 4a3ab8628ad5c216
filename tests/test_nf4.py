"""Weights in four bits against bitsandbytes called directly; training, evaluation, and refusals."""

from __future__ import annotations

import adapters
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from velora.config.adapter import Full, LinearProbe
from velora.nn.adapter_state import merge_adapter
from velora.nn.quantised import dense_linear, is_quantised, own_gpu, quantise_linear

bitsandbytes = pytest.importorskip("bitsandbytes")


def linear(in_features=96, out_features=64, bias=True, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias).to(dtype)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_weight_is_what_bitsandbytes_dequantises(quant_type, double_quant):
    layer = linear()
    codes, state = bitsandbytes.functional.quantize_4bit(
        layer.weight.data, compress_statistics=double_quant, quant_type=quant_type
    )
    expected = bitsandbytes.functional.dequantize_4bit(codes, state)
    quantised = quantise_linear(layer, quant_type=quant_type, double_quant=double_quant, compute_dtype=torch.float32)
    assert torch.equal(quantised.weight.data, codes)
    assert torch.equal(dense_linear(quantised).weight, expected)
    assert quantised.weight.quant_state.nested == double_quant
    x = torch.randn(3, 96)
    torch.testing.assert_close(quantised(x), x @ expected.T + layer.bias, rtol=0, atol=1e-6)  # another order of sums


@pytest.mark.parametrize(
    ("environment", "num_visible", "expected"),
    [
        ({}, 0, None),
        ({"LOCAL_RANK": "1"}, 0, None),
        ({"LOCAL_RANK": "0"}, 2, 0),
        ({"LOCAL_RANK": "1"}, 2, 1),
        ({"LOCAL_RANK": "3"}, 1, 7),  # a device of its own is all that the process sees
        ({"LOCAL_RANK": "x"}, 2, 7),
        ({}, 2, 7),
    ],
)
def test_each_process_quantises_on_its_own_device(environment, num_visible, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 7)
    assert own_gpu(environment, num_visible) == expected


def test_bytes():
    quantised = quantise_linear(linear(), quant_type="nf4", double_quant=False, compute_dtype=torch.float32)
    assert quantised.weight.untyped_storage().nbytes() == 64 * 96 // 2
    assert quantised.weight.quant_state.absmax.untyped_storage().nbytes() == 64 * 96 // 64 * 4  # a float per 64 weights


def test_gradients_reach_the_input_and_not_the_weight():
    quantised = quantise_linear(linear(), compute_dtype=torch.float32)
    dense = dense_linear(quantised)
    x = torch.randn(3, 96, requires_grad=True)
    dy = torch.randn(3, 64)
    expected = dy @ dense.weight
    quantised(x).backward(dy)
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-6)
    assert not any(p.requires_grad for p in quantised.parameters())


def test_training_goes_on_after_an_evaluation():
    """On a CPU with AVX512-BF16 bitsandbytes repacks a weight in eval mode, for a kernel without a backward pass."""
    layer = quantise_linear(linear(64, 64), compute_dtype=torch.float32)
    x = torch.randn(2, 64)
    with torch.no_grad():
        evaluated = layer.eval()(x)
    trained = layer.train()(x.requires_grad_())
    assert trained.requires_grad
    torch.testing.assert_close(evaluated, trained.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", adapters.FAMILIES)
def test_all_linear_layers_but_the_head(family):
    model = adapters.nf4(dtype="bf16").apply(adapters.network(family), adapters.config())
    heads = {"llama": ("lm_head",), "roberta": ("classifier",), "vit": ("head",)}[family]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert is_quantised(module) == (not name.startswith(heads)), name
    dense = [p for n, p in model.named_parameters() if getattr(p, "quant_state", None) is None]
    assert {p.dtype for p in dense} == {torch.bfloat16}


@pytest.mark.parametrize("family", adapters.FAMILIES)
def test_training_with_lora_in_mixed_dtypes(family):
    config = adapters.config()
    model = adapters.lora().apply(adapters.nf4(dtype="bf16").apply(adapters.network(family), config), config)
    adapters.loss(model, adapters.batch(family, torch.bfloat16)).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters.trained(model).values())
    quantised = [module for module in model.modules() if is_quantised(module)]
    assert quantised
    merged = merge_adapter(model)
    assert sum(is_quantised(module) for module in merged.modules()) < len(quantised)


def test_peft_makes_its_four_bit_layers():
    config = adapters.config()
    model = adapters.lora().apply(adapters.nf4().apply(adapters.network("llama"), config), config)
    kinds = {type(m) for n, m in model.named_modules() if n.endswith("v_proj")}
    assert [f"{kind.__module__}.{kind.__name__}" for kind in kinds] == ["peft.tuners.lora.bnb.Linear4bit"]
    assert not hasattr(model.get_base_model(), "is_loaded_in_4bit")  # told to PEFT only


def test_full_training_is_refused_and_a_probe_is_not():
    full, probe = Full(kind="full"), LinearProbe(kind="linear_probe")
    (sentence,) = adapters.nf4().problems(adapters.config(adapter=full))
    assert sentence.startswith("weights=nf4 with adapter=full: weights in four bits do not train")
    assert not list(adapters.nf4().problems(adapters.config(adapter=probe)))
    with pytest.raises(ValidationError):
        adapters.nf4(quant_type="nf8")
