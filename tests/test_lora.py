"""The adapter lora against PEFT called directly; its targets, heads and refusals. VeLoRA on it: test_apply_peft.py."""

from __future__ import annotations

import adapters
import pytest
import torch

from velora.errors import ConfigError

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


def test_pissa_over_four_bits_is_refused():
    sentences = list(adapters.lora(init="pissa").problems(adapters.config(weights=adapters.nf4())))
    assert len(sentences) == 1
    assert "adapter.init=pissa with weights=nf4" in sentences[0]
    assert not list(adapters.lora(init="olora").problems(adapters.config(weights=adapters.nf4())))
