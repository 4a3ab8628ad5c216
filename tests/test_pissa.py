"""PiSSA over four-bit weights against the published loop, written with bitsandbytes; dense: PEFT, in test_adapter_state.py."""

from __future__ import annotations

import adapters
import pytest
import tiny
import torch
from torch import Tensor, nn

from velora.errors import ConfigError
from velora.nn.adapter_state import load_adapter, merge_adapter, save_adapter
from velora.nn.pissa import principal_factors, quantise_residual, take_factors
from velora.nn.quantised import dense_linear, is_quantised, quantise_linear

bitsandbytes = pytest.importorskip("bitsandbytes")
SETTINGS = {"quant_type": "nf4", "double_quant": False, "compute_dtype": torch.float32}


def linear(in_features: int = 128, out_features: int = 96) -> nn.Linear:
    """A weight with a few large singular values, as trained ones have."""
    torch.manual_seed(0)
    layer = nn.Linear(in_features, out_features)
    with torch.no_grad():
        layer.weight.add_(torch.randn(out_features, 4) @ torch.randn(4, in_features), alpha=0.1)
    return layer


def round_trip(weight: Tensor, quant_type: str = "nf4") -> tuple[Tensor, Tensor]:
    codes, state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=False, quant_type=quant_type)
    return codes, bitsandbytes.functional.dequantize_4bit(codes, state)


def published_loop(weight: Tensor, rank: int, rounds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, what they stand for, and the low-rank part, by eigenvectors of the Gram matrix in float64 in place of an SVD."""
    rest = weight
    for _ in range(rounds):
        e = rest.double()
        vectors = torch.linalg.eigh(e.T @ e).eigenvectors[
            :, -rank:
        ]  # (D, K): the right singular vectors of the largest
        low = (e @ vectors @ vectors.T).float()
        codes, stands_for = round_trip(weight - low)
        rest = weight - stands_for
    return codes, stands_for, low


@pytest.mark.parametrize("rounds", [1, 5])
def test_equals_the_published_loop(rounds):
    layer = linear()
    made = quantise_residual(layer, rank=8, rounds=rounds, **SETTINGS)
    left, right = take_factors(made)
    assert take_factors(made) is None
    codes, stands_for, low = published_loop(layer.weight.detach(), 8, rounds)
    # An entry between two of the sixteen levels may fall to the other one for a last bit; float32 SVD against float64.
    different = (made.weight.data != codes).float().mean().item()
    assert different < 0.005
    difference = (dense_linear(made).weight + left @ right - stands_for - low).norm()
    assert difference < 0.05 * (layer.weight - stands_for - low).norm()
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-4, atol=0)  # S is shared evenly
    assert made.bias is not None
    assert torch.equal(made.bias, layer.bias)


def test_the_error_falls_with_the_rounds_and_is_below_that_of_four_bits_alone():
    layer = linear()
    weight = layer.weight.detach()
    plain = (weight - dense_linear(quantise_linear(layer, **SETTINGS)).weight).norm().item()
    errors = []
    for rounds in (1, 2, 5):
        made = quantise_residual(layer, rank=8, rounds=rounds, **SETTINGS)
        left, right = take_factors(made)
        errors.append((weight - dense_linear(made).weight - left @ right).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert len(set(errors)) == 3
    assert errors[0] < 0.9 * plain


def test_principal_factors_are_the_best_approximation():
    matrix = linear().weight.detach()
    left, right = principal_factors(matrix, 8)
    rest = torch.linalg.svdvals(matrix.double())[8:].square().sum().sqrt()  # Eckart and Young
    torch.testing.assert_close((matrix - left @ right).double().norm(), rest, rtol=1e-4, atol=0)


def network() -> nn.Module:
    return tiny.tiny_llama(hidden_size=64, intermediate_size=96)


def built(**changes) -> nn.Module:
    adapter = adapters.lora(init="pissa", **changes)
    config = adapters.config(adapter=adapter, weights=adapters.nf4())
    return adapter.apply(config.weights.apply(network(), config), config)


@pytest.mark.parametrize(("alpha", "scaling"), [(8.0, "alpha_over_rank"), (3.0, "alpha")])
def test_the_adapted_network_is_nearer_to_the_dense_one_than_with_lora(alpha, scaling):
    model, dense = built(alpha=alpha, scaling=scaling), network()
    lora = adapters.config(adapter=adapters.lora(), weights=adapters.nf4())
    plain = lora.adapter.apply(lora.weights.apply(network(), lora), lora)
    names = [name for name, module in dense.named_modules() if name.endswith(("v_proj", "down_proj"))]
    assert len(names) == 4
    for name in names:
        weight = dense.get_submodule(name).weight
        errors = []
        for adapted in (model, plain):
            layer = adapted.get_submodule(f"base_model.model.{name}")
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert a.dtype == b.dtype == torch.float32
            factor = layer.scaling["default"]
            errors.append((weight - dense_linear(layer.base_layer).weight - factor * b @ a).norm())
            assert take_factors(layer.base_layer) is None
        assert errors[0] < errors[1]
    others = [name for name, module in dense.named_modules() if name.endswith(("q_proj", "up_proj"))]
    for name in others:
        ours, theirs = (m.get_submodule(f"base_model.model.{name}").weight.data for m in (model, plain))
        assert torch.equal(ours, theirs)


def test_saved_loaded_and_merged(tmp_path):
    """Built twice it is the same bit for bit, so that a run can be continued and an adapter loaded."""
    model, again, inputs = built(), built(), adapters.batch("llama")
    ours, theirs = model.state_dict(), again.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    adapters.perturb(model)
    before = adapters.logits(model.eval(), inputs)
    save_adapter(model, tmp_path)
    load_adapter(again, tmp_path)
    assert torch.equal(adapters.logits(again.eval(), inputs), before)
    torch.testing.assert_close(adapters.logits(merge_adapter(model), inputs), before, rtol=0, atol=1e-6)  # one rounding


def test_a_target_that_stays_dense_is_split_as_peft_does_it():
    """The head of a language model is not quantised; its remainder and its factors are those of PEFT's own PiSSA."""
    from peft import LoraConfig, get_peft_model

    model = built(targets=["value", "lm_head"])
    layer = model.get_submodule("base_model.model.lm_head")
    assert not is_quantised(layer.base_layer)
    peft_config = LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head"], init_lora_weights="pissa")
    theirs = get_peft_model(network(), peft_config).get_submodule("base_model.model.lm_head")
    torch.testing.assert_close(layer.base_layer.weight, theirs.base_layer.weight, rtol=0, atol=1e-5)  # float32 SVDs
    products = [m.lora_B["default"].weight @ m.lora_A["default"].weight for m in (layer, theirs)]
    torch.testing.assert_close(*products, rtol=0, atol=1e-5)


def test_read_from_a_checkpoint_it_is_the_same(tmp_path):
    """Quantised tensor by tensor as the file is read, and the whole dense network afterwards."""
    from text_helpers import composed

    from velora.models import pretrained
    from velora.models.build import build_network

    class Tokenizer:
        pad_token_id = 0

    network().save_pretrained(tmp_path)
    source = ("model=causal_lm", f"model.path={tmp_path}", "model.tokenizer=byte")
    config = composed(*source, "method=qpissa", "task.max_length=32", "adapter.pissa_rounds=2")
    streamed, _ = build_network(config, config.task.head(config), Tokenizer())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained, "read_quantised", lambda *_, **__: None)
        dense, _ = build_network(config, config.task.head(config), Tokenizer())
    ours, expected = streamed.state_dict(), dense.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_refused():
    with pytest.raises(
        ConfigError, match=r"adapter\.rank=97 with adapter\.init=pissa: .* 128 to 96 .* has 96 singular"
    ):
        quantise_residual(linear(), rank=97, rounds=1, **SETTINGS)
    config = adapters.config()  # as weights of another package would do it
    model = adapters.nf4().apply(network(), config)
    with pytest.raises(ConfigError, match=r"adapter\.init=pissa: .*v_proj was brought to four bits without it"):
        adapters.lora(init="pissa").apply(model, config)
