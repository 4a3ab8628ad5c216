"""timm's fused qkv layer taken apart: the same network, the same saved weights, and a place for an adapter on q or v alone."""

from __future__ import annotations

import adapters
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from velora import apply_velora, calibrate
from velora.errors import ConfigError
from velora.nn.adapter_state import merge_adapter, save_adapter, save_network
from velora.nn.image_classifier import ImageClassifier
from velora.nn.split_qkv import split_qkv

PARTS = ("query", "key", "value")


def network(split: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    vit = tiny.tiny_vit(seed).to(dtype)
    if split:
        split_qkv(vit)
    return vit


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_the_fused_layer(bias):
    fused = tiny.tiny_vit(qkv_bias=bias).double()
    model = tiny.tiny_vit(qkv_bias=bias).double()
    split_qkv(model)
    images = tiny.image_batch().double()
    ours, theirs = model(images), fused(images)
    # float64, sums of 32 products through two blocks: the order of the sums may differ
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name in ("weight", "bias") if bias else ("weight",):
        for block, reference in zip(model.blocks, fused.blocks, strict=True):
            parts = [getattr(getattr(block.attn.qkv, part), name).grad for part in PARTS]
            expected = getattr(reference.attn.qkv, name).grad
            torch.testing.assert_close(torch.cat(parts), expected, rtol=0, atol=1e-12)


def test_saved_weights_are_timms(tmp_path):
    fused, model = network(split=False, seed=1), network()
    assert model.state_dict().keys() == fused.state_dict().keys()
    model.load_state_dict(fused.state_dict())  # strict: nothing missing, nothing unexpected
    again = network(split=False)
    again.load_state_dict(model.state_dict())
    for name, tensor in fused.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
        assert torch.equal(again.state_dict()[name], tensor)
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # refuses tensors that share memory
    assert load_file(tmp_path / "model.safetensors").keys() == fused.state_dict().keys()
    fused.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_a_missing_or_wrong_weight_is_reported():
    model, state = network(), network(split=False).state_dict()
    missing = {k: v for k, v in state.items() if k != "blocks.0.attn.qkv.weight"}
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn\.qkv\.query\.weight"):
        model.load_state_dict(missing)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state | {"blocks.0.attn.qkv.weight": torch.zeros(96, 16)})


def test_velora_on_value_alone_and_its_state(tmp_path):
    model = ImageClassifier(network())
    batch = {"pixel_values": tiny.image_batch(), "labels": torch.tensor([0, 1])}
    summary = apply_velora(model, ["value"], sub_token_size=8)
    assert [(x.name, x.role, x.width) for x in summary.layers] == [
        (f"vit.blocks.{i}.attn.qkv.value", "value", 32) for i in (0, 1)
    ]
    calibrate(model, batch)
    model(**batch).loss.backward()
    gradients = [getattr(model.vit.blocks[0].attn.qkv, part).weight.grad for part in PARTS]
    ranks = [int(torch.linalg.matrix_rank(g.view(32, 4, 8).flatten(0, 1))) for g in gradients]
    assert ranks[2] == 1 < min(ranks[:2])  # every sub-token of the gradient is a multiple of one direction
    again = ImageClassifier(network(seed=1))
    apply_velora(again, ["value"], sub_token_size=8)
    again.load_state_dict(model.state_dict())
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    name = "vit.blocks.1.attn.qkv.value.direction"
    assert torch.equal(again.get_buffer(name), model.get_buffer(name))
    save_network(model, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == ImageClassifier(network(split=False)).state_dict().keys()


def test_lora_on_query_and_value_merges_into_timms_network():
    model = adapters.lora(targets=["query", "value"]).apply(network(), adapters.config())
    adapters.perturb(model)
    inputs = adapters.batch("vit")
    before = adapters.logits(model.eval(), inputs)
    assert sum("lora_A" in n for n in adapters.trained(model)) == 4  # q and v of two blocks
    merged = merge_adapter(model)
    plain = network(split=False).eval()
    start = plain.state_dict()
    moved = {n for n, t in merged.state_dict().items() if not torch.equal(t, start[n])}
    assert moved == {
        "head.weight", "head.bias", "blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"
    }  # fmt: skip
    key_rows = slice(32, 64)
    assert torch.equal(
        merged.state_dict()["blocks.0.attn.qkv.weight"][key_rows], start["blocks.0.attn.qkv.weight"][key_rows]
    )
    plain.load_state_dict(merged.state_dict())
    # float32: one rounding of each folded weight
    torch.testing.assert_close(adapters.logits(plain, inputs), before, rtol=0, atol=1e-6)


def test_four_bits_keep_the_three_names(tmp_path):
    model = adapters.nf4().apply(network(), adapters.config())
    assert {"blocks.0.attn.qkv.query.weight", "blocks.0.attn.qkv.key.bias"} <= model.state_dict().keys()
    assert "blocks.0.attn.qkv.weight" not in model.state_dict()
    model = adapters.lora(targets=["query", "value"]).apply(model, adapters.config())
    apply_velora(model, ["query", "value"], sub_token_size=8)
    calibrate(model, (tiny.image_batch(),))
    adapters.loss(model, adapters.batch("vit")).backward()
    assert all(p.grad is not None for p in adapters.trained(model).values())
    save_adapter(model, tmp_path)


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {"pixel_values": tiny.image_batch(1, seed=index)[0], "labels": index % 4}


def test_resume_is_exact(tmp_path):
    from transformers import Trainer, TrainingArguments

    def train(folder, resume=None):
        model = ImageClassifier(network(seed=0))
        apply_velora(model, ["value"], sub_token_size=8)
        if resume is None:
            calibrate(model, {"pixel_values": tiny.image_batch(4)})
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, save_steps=2, learning_rate=1e-2,
            report_to=[], use_cpu=True, disable_tqdm=True, label_names=["labels"], logging_steps=1000, seed=0,
        )  # fmt: skip
        Trainer(model=model, args=arguments, train_dataset=Images()).train(resume_from_checkpoint=resume)
        return model

    whole = train(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-2"
    saved = load_file(checkpoint / "model.safetensors").keys()
    assert {n for n in saved if "direction" not in n} == ImageClassifier(network(split=False)).state_dict().keys()
    resumed = train(tmp_path / "again", resume=str(checkpoint))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_network_without_a_fused_layer_is_refused():
    with pytest.raises(ConfigError, match=r"model\.split_qkv=true: Sequential has no fused layer `qkv`"):
        split_qkv(nn.Sequential(nn.Linear(2, 2)))
