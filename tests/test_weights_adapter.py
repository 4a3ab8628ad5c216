"""Dense weights, full training, linear probing, and where the head is."""

from __future__ import annotations

import adapters
import pytest
import tiny
import torch
from torch import nn

from velora.config.adapter import Full, LinearProbe
from velora.errors import ConfigError
from velora.nn.head import head_names, new_head_names


@pytest.mark.parametrize("family", adapters.FAMILIES)
@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_dense_casts_all_parameters_and_no_buffer(name, dtype, family):
    network = adapters.network(family)
    buffers = {n: b.dtype for n, b in network.named_buffers()}
    model = adapters.dense(name).apply(network, adapters.config())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {n: b.dtype for n, b in model.named_buffers()} == buffers  # a LLaMA's rotary frequencies need float32
    assert adapters.dense(name).load_options() == {"dtype": dtype}


def test_dense_keeps_tied_weights_tied():
    model = adapters.dense("bf16").apply(tiny.tiny_llama(tie_word_embeddings=True), adapters.config())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_fp16_weights_with_loss_scaling_are_refused_where_they_train():
    def sentences(adapter, precision):
        trainer = type("Trainer", (), {"precision": precision})
        return list(adapters.dense("fp16").problems(adapters.config(adapter=adapter, trainer=trainer)))

    (sentence,) = sentences(Full(kind="full"), "fp16")
    assert sentence.startswith(
        "weights.dtype=fp16 with trainer.precision=fp16: loss scaling needs the trained weights in fp32"
    )
    assert not sentences(Full(kind="full"), "fp32")
    assert not sentences(adapters.lora(), "fp16")  # its weights are float32 in any case


@pytest.mark.parametrize("family", adapters.FAMILIES)
def test_full_trains_everything(family):
    model = Full(kind="full").apply(adapters.network(family).requires_grad_(False), adapters.config())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["lm_head.weight"]),
        ("roberta", [f"classifier.{n}.{p}" for n in ("dense", "out_proj") for p in ("weight", "bias")]),
        ("vit", ["head.weight", "head.bias"]),
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_linear_probe_trains_the_head_in_float32(family, names, dtype):
    config = adapters.config()
    model = LinearProbe(kind="linear_probe").apply(
        adapters.dense(dtype).apply(adapters.network(family), config), config
    )
    trained = adapters.trained(model)
    assert list(trained) == names
    assert {p.dtype for p in trained.values()} == {torch.float32}
    adapters.loss(
        model, adapters.batch(family, next(p for p in model.parameters() if not p.requires_grad).dtype)
    ).backward()
    assert all(p.grad.abs().max() > 0 for p in trained.values())


def test_a_probe_of_a_tied_language_model_leaves_the_embedding():
    model = tiny.tiny_llama(tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight
    LinearProbe(kind="linear_probe").apply(model, adapters.config())
    assert model.lm_head.weight is not embedding
    assert torch.equal(model.lm_head.weight, embedding)
    assert list(adapters.trained(model)) == ["lm_head.weight"]


def test_heads():
    assert new_head_names(adapters.network("llama")) == []
    assert head_names(adapters.network("llama")) == ["lm_head"]
    declared = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="the head of Sequential was not found"):
        head_names(declared)
    declared.velora_head = ["0"]
    assert head_names(declared) == ["0"]
