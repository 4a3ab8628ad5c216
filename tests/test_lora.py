"""The adapter lora against PEFT called directly; its targets, heads and refusals. VeLoRA on it: test_apply_peft.py."""

from __future__ import annotations

import adapters
import pytest
import tiny
import torch

from velora.errors import ConfigError
from velora.memory.storages import model_tensors, unique_bytes
from velora.nn.adapter_state import load_adapter, merge_adapter, save_adapter

peft = pytest.importorskip("peft")

PEFT_TARGETS = {
    "llama": (["v_proj", "down_proj"], None),
    "roberta": (["value", "encoder.layer.0.output.dense", "encoder.layer.1.output.dense"], ["classifier"]),
    "vit": (["attn.qkv", "mlp.fc2"], ["head"]),
}


@pytest.mark.parametrize("family", adapters.FAMILIES)
def test_equals_peft(family):
    targets, heads = PEFT_TARGETS[family]
    torch.manual_seed(5)
    theirs = peft.get_peft_model(
        adapters.network(family), peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=heads)
    )
    torch.manual_seed(123)  # must not matter
    mine = adapters.lora().apply(adapters.network(family), adapters.config(seed=5))
    # tiny networks draw from the global generator too, so PEFT's weights are compared after copying the network's
    mine_trained, their_trained = adapters.trained(mine), adapters.trained(theirs)
    assert mine_trained.keys() == their_trained.keys()
    for name, parameter in mine_trained.items():
        their_trained[name].data.copy_(parameter.data)
    adapters.perturb(mine)
    adapters.perturb(theirs)
    inputs = adapters.batch(family)
    losses = [adapters.loss(model.train(), inputs) for model in (mine, theirs)]
    assert torch.equal(*losses)
    for one in losses:
        one.backward()
    for name, parameter in mine_trained.items():
        assert torch.equal(parameter.grad, their_trained[name].grad), name


def test_the_seed_decides_and_the_global_state_stays():
    networks = [adapters.network("llama") for _ in range(3)]
    state = torch.get_rng_state()
    first, same, other = (
        adapters.lora().apply(network, adapters.config(seed)) for network, seed in zip(networks, (0, 0, 1), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)
    names = [name for name in adapters.trained(first) if "lora_A" in name]
    for name in names:
        assert torch.equal(first.get_parameter(name), same.get_parameter(name))
        assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_targets_are_roles_or_patterns():
    model = adapters.lora(targets=["query", "layers.1.mlp.*_proj"]).apply(adapters.network("llama"), adapters.config())
    found = {
        name.split(".lora_A")[0].removeprefix("base_model.model.model.")
        for name in adapters.trained(model)
        if "lora_A" in name
    }
    assert found == {
        "layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj",
        "layers.1.mlp.gate_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj",
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"has no gate layers; its roles are query, key, value, output, up, down"):
        adapters.lora(targets=["gate"]).apply(adapters.network("vit"), adapters.config())
    with pytest.raises(ConfigError, match="the pattern 'nothing' matches no module"):
        adapters.lora(targets=["nothing"]).apply(adapters.network("vit"), adapters.config())


def test_also_train_adds_whole_modules():
    model = adapters.lora(also_train=["embed_tokens"]).apply(adapters.network("llama"), adapters.config())
    assert [name for name in adapters.trained(model) if "lora_" not in name] == [
        "base_model.model.model.embed_tokens.modules_to_save.default.weight"
    ]


def test_half_precision_base_has_float32_adapters_and_a_float32_head():
    model = adapters.lora().apply(
        adapters.dense("bf16").apply(adapters.network("vit"), adapters.config()), adapters.config()
    )
    assert {p.dtype for p in adapters.trained(model).values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if not p.requires_grad and ".head." not in n} == {
        torch.bfloat16
    }
    output = model(adapters.batch("vit", torch.bfloat16)["x"])
    assert output.dtype == torch.float32
    output.sum().backward()
    assert all(p.grad is not None for p in adapters.trained(model).values())


def lora_layer(model):
    return model.get_submodule("base_model.model.model.layers.0.self_attn.v_proj")


@pytest.mark.parametrize(("scaling", "factor"), [("alpha", 3.0), ("alpha_over_rank", 0.75)])
def test_the_factor_is_alpha_or_alpha_over_rank(scaling, factor):
    model = adapters.lora(rank=4, alpha=3.0, scaling=scaling).apply(adapters.network("llama"), adapters.config())
    adapters.perturb(model)
    layer, x = lora_layer(model), torch.randn(5, 32)
    w, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x.double() @ (w.double() + factor * b.double() @ a.double()).T
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=1e-5)  # float32 against float64


def test_orthogonal_factors_are_orthonormal_and_their_product_is_not_zero():
    def make(seed):
        return adapters.lora(init="orthogonal").apply(adapters.network("llama"), adapters.config(seed))

    model = make(0)
    for layer in (module for module in model.modules() if hasattr(module, "lora_A")):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # (4, D), (M, 4)
        torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=0, atol=1e-5)
        assert (b @ a).norm().item() == pytest.approx(2.0, abs=1e-4)  # four singular values of 1
    assert torch.equal(lora_layer(make(0)).lora_B["default"].weight, lora_layer(model).lora_B["default"].weight)
    assert not torch.equal(lora_layer(make(1)).lora_B["default"].weight, lora_layer(model).lora_B["default"].weight)


WHOLE = ["embed_tokens", "*norm", "lm_head"]


def test_what_trains_whole_is_held_once():
    plain = adapters.network("llama")
    plain_bytes = unique_bytes(model_tensors(plain))
    model = adapters.lora(also_train=WHOLE).apply(adapters.network("llama"), adapters.config())
    lora_bytes = sum(4 * p.numel() for n, p in adapters.trained(model).items() if "lora_" in n)
    assert unique_bytes(model_tensors(model)) == plain_bytes + lora_bytes
    # embedding and head of 64 words, five norms, all of width 32; two layers have adapters in each of two blocks
    whole = {n for n in adapters.trained(model) if "lora_" not in n}
    assert len(whole) == 7
    assert all(".modules_to_save.default." in n for n in whole)
    assert sum(adapters.trained(model)[n].numel() for n in whole) == 2 * 64 * 32 + 5 * 32
    assert unique_bytes(model_tensors(model.double())) == 2 * (plain_bytes + lora_bytes)  # a move keeps it so


def test_what_trains_whole_is_saved_loaded_and_merged(tmp_path):
    model = adapters.lora(also_train=WHOLE).apply(adapters.network("llama"), adapters.config())
    adapters.perturb(model)
    inputs = adapters.batch("llama")
    before = adapters.logits(model.eval(), inputs)
    save_adapter(model, tmp_path)
    again = adapters.lora(also_train=WHOLE).apply(adapters.network("llama"), adapters.config(1))
    load_adapter(again, tmp_path)
    assert torch.equal(adapters.logits(again.eval(), inputs), before)
    theirs = peft.PeftModel.from_pretrained(adapters.network("llama"), tmp_path)
    assert torch.equal(adapters.logits(theirs.eval(), inputs), before)
    trained = model.get_parameter("base_model.model.model.embed_tokens.modules_to_save.default.weight").clone()
    merged = merge_adapter(model)
    assert {type(module).__module__.split(".")[0] for module in merged.modules()} & {"peft"} == set()
    assert torch.equal(merged.model.embed_tokens.weight, trained)
    assert merged.state_dict().keys() == tiny.tiny_llama().state_dict().keys()
    torch.testing.assert_close(adapters.logits(merged, inputs), before, rtol=0, atol=1e-6)


def test_estimate_counts_what_trains_whole_once():
    """LLaMA-60M as table4/lora trains it; the sizes are GaLore's configs/llama_60m.json."""
    from text_helpers import composed
    from torch._subclasses.fake_tensor import FakeTensorMode

    from velora.memory.estimate import fake_network

    network = fake_network(composed("experiment=table4/lora"), FakeTensorMode())
    words, hidden, mlp, layers, rank = 32_000, 512, 1376, 8, 128
    whole = 2 * words * hidden + (2 * layers + 1) * hidden
    linear = layers * (4 * hidden * hidden + 3 * hidden * mlp)
    adapter = layers * rank * (4 * 2 * hidden + 3 * (hidden + mlp))
    assert sum(p.numel() for p in network.parameters()) == whole + linear + adapter
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == whole + adapter
    buffers = unique_bytes(network.buffers())
    assert unique_bytes(model_tensors(network)) == 4 * (whole + linear + adapter) + buffers
