"""VeLoRA on PEFT's LoRA layers: against PEFT's own VeLoRA, and over a 4-bit base."""

from __future__ import annotations

import pytest
import reference
import tiny
import torch
from torch import nn

from velora import apply_velora, calibrate
from velora.errors import ConfigError
from velora.nn.apply import velora_layers

peft = pytest.importorskip("peft")

TARGETS = ["v_proj", "down_proj"]


def with_lora(model: nn.Module | None = None, dropout: float = 0.0, **options) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=TARGETS, r=4, lora_alpha=8, lora_dropout=dropout, **options)
    return peft.get_peft_model(model or tiny.tiny_llama(), config).train()


def open_up(model: nn.Module) -> None:
    """Make the B matrices, which start at zero, let gradients through to the A matrices."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def test_gradients_equal_pefts_own_velora():
    mine = with_lora()
    theirs = with_lora(velora_config=peft.VeloraConfig(num_groups=4, scale=0.5))
    for model in (mine, theirs):
        open_up(model)
    summary = apply_velora(mine, ["value", "down"], num_groups=4, scale=0.5)
    assert [layer.name for layer in summary.layers[:2]] == [
        "base_model.model.model.layers.0.self_attn.v_proj.lora_A.default",
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.default",
    ]
    assert [layer.role for layer in summary.layers[:2]] == ["value", "down"]
    batch = tiny.token_batch()
    calibrate(mine, batch)
    theirs(**batch).loss.backward()  # sets its directions from the first batch, too
    for name, layer in velora_layers(mine).items():
        lora = theirs.get_submodule(name.removesuffix(".lora_A.default"))
        embed = lora.lora_velora_embed["default"]
        torch.testing.assert_close(layer.direction, embed, rtol=0, atol=1e-6)  # their mean is summed in fp32
        layer.set_direction(embed)
    loss = mine(**batch).loss
    assert torch.equal(loss, theirs(**batch).loss)
    loss.backward()
    largest = 0.0
    for (name, one), (_, other) in zip(
        sorted(p for p in mine.named_parameters() if p[1].requires_grad),
        sorted(p for p in theirs.named_parameters() if p[1].requires_grad),
        strict=True,
    ):
        assert one.grad.abs().max() > 0, name
        largest = max(largest, float((one.grad - other.grad).abs().max() / other.grad.abs().max()))
    assert largest < 1e-6  # fp32: the factored product sums in another order


def test_dropped_copies_go_and_masks_stay():
    """Dropout gives each adapter an input of its own; VeLoRA on lora_A frees these copies."""
    batch, tokens = tiny.token_batch(), 2 * 8

    def kept(groups: int | None) -> int:
        model = with_lora(dropout=0.1)
        if groups:
            apply_velora(model, ["value", "down"], num_groups=groups)
            calibrate(model, batch)
        return reference.saved_bytes(lambda: model(**batch).loss, [*model.parameters(), *model.buffers()])

    blocks, codes = 2, 2 * tokens * 4 * 4
    assert kept(None) - kept(4) == blocks * (tokens * (32 + 48) * 4 - codes)


def test_directions_come_after_dropout_and_the_random_state_is_kept():
    model = with_lora(dropout=0.5)
    apply_velora(model, ["value"], num_groups=4)
    state = torch.get_rng_state()
    calibrate(model, tiny.token_batch())
    assert torch.equal(torch.get_rng_state(), state)
    layer = next(iter(velora_layers(model).values()))
    seen = []
    layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    model(**tiny.token_batch())  # with the same random numbers
    assert (seen[0] == 0).float().mean() > 0.3
    expected = torch.from_numpy(reference.fixed_average(reference.array(seen[0]), 8)).float()
    torch.testing.assert_close(layer.direction, expected, rtol=0, atol=1e-6)


def test_adapters_over_a_four_bit_base():
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def quantised() -> nn.Module:
        model = tiny.tiny_llama(hidden_size=64, intermediate_size=128)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name != "lm_head":
                four = bitsandbytes.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
                four.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
                model.set_submodule(name, four.to("cpu"))
        return model

    with pytest.raises(ConfigError, match="Linear4bit has no VeLoRA twin"):
        apply_velora(quantised(), ["value"], num_groups=4)
    plain, model = with_lora(quantised()), with_lora(quantised())
    for each in (plain, model):
        open_up(each)
    apply_velora(model, ["value", "down"], num_groups=4)
    batch = tiny.token_batch()
    calibrate(model, batch)
    for each in (plain, model):
        each(**batch).loss.backward()
    assert torch.equal(model(**batch).loss, plain(**batch).loss)
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if "lora_B" in name:
            assert torch.equal(one.grad, other.grad), name
        elif "lora_A" in name:
            assert torch.nn.functional.cosine_similarity(one.grad.flatten(), other.grad.flatten(), dim=0) > 0, name


def test_variants_of_lora_that_use_its_matrices_otherwise_are_refused():
    with pytest.raises(ConfigError, match=r"v_proj: the adapter 'default' uses PEFT's DoraLinearVariant"):
        apply_velora(with_lora(use_dora=True), ["value"], num_groups=4)


def test_an_inactive_adapter_stays_plain_until_it_is_calibrated():
    model = with_lora()
    model.add_adapter("second", peft.LoraConfig(target_modules=TARGETS, r=4))
    open_up(model)
    apply_velora(model, ["value"], num_groups=4)
    with pytest.warns(UserWarning, match=r"no batch reached .*layers\.0\.self_attn\.v_proj\.lora_A\.second, "):
        calibrate(model, tiny.token_batch())
    layers = velora_layers(model)
    assert {name.rpartition(".")[2]: layer.has_direction() for name, layer in layers.items()} == {
        "default": True, "second": False,
    }  # fmt: skip
    model.set_adapter("second")
    exact = with_lora()
    exact.add_adapter("second", peft.LoraConfig(target_modules=TARGETS, r=4))
    exact.set_adapter("second")
    exact.load_state_dict(model.state_dict(), strict=False)
    for each in (model, exact):
        each(**tiny.token_batch()).loss.backward()
    last = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.second"
    assert torch.equal(model.get_submodule(last).weight.grad, exact.get_submodule(last).weight.grad)
    calibrate(model, tiny.token_batch())
    assert all(layer.has_direction() for layer in layers.values())


def test_merged_adapters_are_not_reached():
    model = with_lora()
    apply_velora(model, ["value"], num_groups=4)
    model.merge_adapter()
    with pytest.raises(ConfigError, match=r"no sub-token reached a VeLoRA layer .* active and not merged"):
        calibrate(model, tiny.token_batch())
    model.unmerge_adapter()
    calibrate(model, tiny.token_batch())


@pytest.mark.filterwarnings(
    "ignore:.*invalid shape"
)  # PEFT 0.21 takes a one-dimensional tensor under lora_A for a shard
def test_a_saved_adapter_brings_its_directions(tmp_path):
    model = with_lora()
    apply_velora(model, ["value", "down"], num_groups=4)
    calibrate(model, tiny.token_batch())
    model.save_pretrained(tmp_path)
    again = with_lora()
    apply_velora(again, ["value", "down"], num_groups=4)
    again.load_adapter(tmp_path, "default", is_trainable=True)
    for name, layer in velora_layers(model).items():
        assert torch.equal(again.get_submodule(name).direction, layer.direction)
    again(**tiny.token_batch()).loss.backward()
