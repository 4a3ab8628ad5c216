"""Saving an adapter alone, loading it, and folding it in: every adapter, over dense and 4-bit weights, in every family."""

from __future__ import annotations

import adapters
import pytest
import torch
from safetensors.torch import load_file

from velora import apply_velora, calibrate
from velora.adapter.linear_probe import LinearProbe
from velora.adapter_state import load_adapter, merge_adapter, save_adapter
from velora.errors import ConfigError
from velora.nn.twin import VeloraTwin

ADAPTERS = {"lora": adapters.lora, "ssf": adapters.ssf, "hydra": adapters.hydra}
VELORA_LAYERS = {"lora": ["value", "down"], "ssf": ["value", "up"], "hydra": ["output", "down"]}


def adapted(family, name, weights=None, seed=0):
    config = adapters.config(seed)
    model = (weights or adapters.dense()).apply(adapters.network(family), config)
    return ADAPTERS[name]().apply(model, config)


@pytest.mark.parametrize("weights", ["dense", "nf4"])
@pytest.mark.parametrize("family", adapters.FAMILIES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_network_is_plain_and_has_the_same_outputs(name, family, weights):
    model = adapted(family, name, getattr(adapters, weights)())
    adapters.perturb(model)
    inputs = adapters.batch(family)
    apply_velora(model, VELORA_LAYERS[name], sub_token_size=8)
    calibrate(model, inputs)
    before = adapters.logits(model.eval(), inputs)
    unadapted = adapters.logits(
        getattr(adapters, weights)().apply(adapters.network(family), adapters.config()).eval(), inputs
    )
    assert (before - unadapted).abs().max() > 1e-3  # there is something to merge
    merged = merge_adapter(model)
    # float32: one rounding of each folded weight, through two blocks of outputs of size about 1
    torch.testing.assert_close(adapters.logits(merged, inputs), before, rtol=0, atol=1e-6)
    kinds = {type(module).__module__.split(".")[0] for module in merged.modules()}
    assert "peft" not in kinds
    assert not any(isinstance(module, VeloraTwin) or hasattr(module, "merged") for module in merged.modules())


def test_merging_in_bfloat16_rounds_once():
    model = adapted("llama", "lora", adapters.dense("bf16"))
    adapters.perturb(model)
    inputs = adapters.batch("llama")
    before = adapters.logits(model.eval(), inputs).float()
    after = adapters.logits(merge_adapter(model), inputs).float()
    torch.testing.assert_close(
        after, before, rtol=0, atol=2**-7 * float(before.detach().abs().max()) * 2
    )  # 8 bits of mantissa


@pytest.mark.parametrize("family", adapters.FAMILIES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_alone_and_loaded_into_a_fresh_network(name, family, tmp_path):
    model = adapted(family, name)
    adapters.perturb(model)
    inputs = adapters.batch(family)
    apply_velora(model, VELORA_LAYERS[name], sub_token_size=8)
    save_adapter(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    saved = load_file(file)
    numel = sum(p.numel() for p in adapters.trained(model).values())
    assert sum(t.numel() for t in saved.values()) == numel  # what trains and nothing else, no direction either
    again = adapted(family, name, seed=1)
    load_adapter(again, tmp_path)
    assert torch.equal(adapters.logits(again.eval(), inputs), adapters.logits(model.eval(), inputs))


def test_peft_reads_what_lora_saved(tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted("roberta", "lora")
    adapters.perturb(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(adapters.network("roberta"), tmp_path)
    inputs = adapters.batch("roberta")
    assert torch.equal(adapters.logits(theirs.eval(), inputs), adapters.logits(model.eval(), inputs))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_that_change_the_base_survive_saving_and_merging(init, tmp_path):
    def make():
        return adapters.lora(init=init).apply(adapters.network("llama"), adapters.config())

    model, inputs = make(), adapters.batch("llama")
    plain = adapters.logits(adapters.network("llama").eval(), inputs)
    torch.testing.assert_close(adapters.logits(model.eval(), inputs), plain, rtol=0, atol=1e-5)  # W = rest + BA, fp32
    adapters.perturb(model)
    before = adapters.logits(model, inputs)
    save_adapter(model, tmp_path)
    again = make()
    load_adapter(again, tmp_path)
    assert torch.equal(adapters.logits(again.eval(), inputs), before)
    torch.testing.assert_close(adapters.logits(merge_adapter(model), inputs), before, rtol=0, atol=1e-6)


def test_linear_probe_saves_its_head(tmp_path):
    probe = LinearProbe(kind="linear_probe")
    model = probe.apply(adapters.network("roberta"), adapters.config())
    probe.save(model, tmp_path)
    assert set(load_file(tmp_path / "adapter.safetensors")) == {
        "classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight", "classifier.out_proj.bias",
    }  # fmt: skip


def test_files_of_another_adapter_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no adapter_model\.safetensors"):
        load_adapter(adapted("llama", "lora"), tmp_path)
    save_adapter(
        adapted("llama", "hydra"), tmp_path
    )  # 4 layers of 8 parameters; SSF has 14 layers of 2 and 5 norms of 1
    with pytest.raises(ConfigError, match="belongs to another adapter or network: 65 of its parameters"):
        load_adapter(adapted("llama", "ssf"), tmp_path)
    with pytest.raises(ConfigError, match="another adapter or network"):
        load_adapter(adapters.hydra(rank=3).apply(adapters.network("llama"), adapters.config()), tmp_path)
