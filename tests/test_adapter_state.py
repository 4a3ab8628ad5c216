"""Saving an adapter alone, loading it, and folding it in: every adapter, over dense and 4-bit weights, in every family."""

from __future__ import annotations

import re

import adapters
import pytest
import torch
from safetensors.torch import load_file, save_file

from velora import apply_velora, calibrate
from velora.config.adapter import LinearProbe
from velora.errors import ConfigError
from velora.nn.adapter_state import load_adapter, merge_adapter, save_adapter, save_network
from velora.nn.apply import velora_layers
from velora.nn.twin import VeloraTwin

ADAPTERS = {"lora": adapters.lora, "ssf": adapters.ssf, "hydra": adapters.hydra, "multilora": adapters.multilora}
VELORA_LAYERS = {
    "lora": ["value", "down"],
    "ssf": ["value", "up"],
    "hydra": ["output", "down"],
    "multilora": ["value", "down"],
}


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


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="aot_eager"),
    "DataParallel": torch.nn.DataParallel,
    "both": lambda model: torch.nn.DataParallel(torch.compile(model, backend="aot_eager")),
}


def compiled_blocks(model: torch.nn.Module) -> torch.nn.Module:
    """Compile each block by itself, as accelerate does it to save time."""
    for name, module in list(model.named_modules()):
        if name.endswith(("layers.0", "layers.1")):
            model.set_submodule(name, torch.compile(module, backend="aot_eager"))
    return model


@pytest.mark.parametrize("wrapper", [*WRAPPERS, "blocks"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_wrappers_are_seen_through(name, wrapper, tmp_path):
    wrap = WRAPPERS.get(wrapper, compiled_blocks)
    model, inputs = adapted("llama", name), adapters.batch("llama")
    adapters.perturb(model)
    names = set(dict(model.named_parameters()))
    save_adapter(model, tmp_path / "plain")
    save_network(model, tmp_path / "network")
    outputs = adapters.logits(model.eval(), inputs)
    wrapped = wrap(model)
    save_adapter(wrapped, tmp_path / "wrapped")
    save_network(wrapped, tmp_path / "wrapped_network")
    for plain, other in (("plain", "wrapped"), ("network", "wrapped_network")):
        (file,) = (tmp_path / plain).glob("*.safetensors")
        mine, theirs = load_file(tmp_path / other / file.name), load_file(file)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    again = adapted("llama", name, seed=1)
    load_adapter(wrap(again), tmp_path / "plain")
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    if wrapper == "blocks":
        assert any("_orig_mod" in key for key, _ in wrapped.named_parameters())  # compiled as before
    merged = merge_adapter(wrapped)
    assert not any("_orig_mod" in key or key.startswith("module.") for key, _ in merged.named_parameters())
    assert names - set(dict(merged.named_parameters()))
    torch.testing.assert_close(adapters.logits(merged, inputs), outputs, rtol=0, atol=1e-6)  # fp32


@pytest.mark.filterwarnings("ignore:.*invalid shape")  # PEFT 0.21 takes a direction under lora_A for a shard
@pytest.mark.parametrize("velora", [False, True])
def test_directions_in_a_file_of_peft_are_passed_over(velora, tmp_path):
    model = adapted("llama", "lora")
    adapters.perturb(model)
    apply_velora(model, ["value", "down"], sub_token_size=8, init="running_average")
    calibrate(model, adapters.batch("llama"))
    model.save_pretrained(str(tmp_path))
    assert any(key.endswith("direction") for key in load_file(tmp_path / "adapter_model.safetensors"))
    again = adapted("llama", "lora", seed=1)
    if velora:
        apply_velora(again, ["value", "down"], sub_token_size=16)
    load_adapter(again, tmp_path)
    inputs = adapters.batch("llama")
    assert torch.equal(adapters.logits(again.eval(), inputs), adapters.logits(model.eval(), inputs))
    assert not any(layer.has_direction() for layer in velora_layers(again).values())
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(adapters.network("llama"), tmp_path)
    assert torch.equal(adapters.logits(theirs.eval(), inputs), adapters.logits(model.eval(), inputs))


def test_every_adapter_of_a_peft_model_is_saved_and_loaded(tmp_path):
    peft = pytest.importorskip("peft")

    def two(seed: int) -> torch.nn.Module:
        model = adapted("llama", "lora", seed=seed)
        torch.manual_seed(seed)
        model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"], r=2))
        adapters.perturb(model, seed)
        model.set_adapter("second")
        adapters.perturb(model, seed)
        return model

    model, again, inputs = two(1), two(2), adapters.batch("llama")
    save_adapter(model, tmp_path)
    load_adapter(again, tmp_path)
    for name in ("default", "second"):
        for each in (model, again):
            each.set_adapter(name)
        assert torch.equal(adapters.logits(again.eval(), inputs), adapters.logits(model.eval(), inputs))


@pytest.mark.parametrize("name", ["lora", "hydra"])
@pytest.mark.parametrize("damage", ["cut", "empty", "junk", "nan", "inf"])
def test_damaged_files_are_one_sentence_and_change_nothing(name, damage, tmp_path):
    model = adapted("llama", name)
    adapters.perturb(model)
    save_adapter(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    content = file.read_bytes()
    if damage in ("nan", "inf"):
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] = float(damage)
        save_file(tensors, file)
    else:
        file.write_bytes({"cut": content[:-7], "empty": b"", "junk": b"<html>" * 100}[damage])
    adapters.perturb(model, seed=2)
    before = {key: tensor.clone() for key, tensor in adapters.trained(model).items()}
    sentence = "holds inf or NaN in 1 of its parameters" if damage in ("nan", "inf") else "cannot be read"
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(file))} {sentence}") as refused:
        load_adapter(model, tmp_path)
    assert "\n" not in str(refused.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapters.trained(model).items())


@pytest.mark.parametrize("merged", [False, True])
def test_merging_over_four_bits_adds_each_adapter_once(merged):
    """PEFT may have folded the adapter in already."""
    model = adapted("llama", "lora", adapters.nf4())
    adapters.perturb(model)
    inputs = adapters.batch("llama")
    if merged:
        model.merge_adapter()
    before = adapters.logits(model.eval(), inputs)
    torch.testing.assert_close(adapters.logits(merge_adapter(model), inputs), before, rtol=0, atol=1e-6)  # fp32


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
