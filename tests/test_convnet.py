"""Convolutional networks of timm, and Mamba: built as timm and transformers build them, with every axis of a method."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from text_helpers import composed
from torch import Tensor, nn

from velora.config.model import ConvNet
from velora.config.parts import Head
from velora.config.roles import find_architecture, roles_by_module
from velora.errors import ConfigError
from velora.memory.estimate import estimate
from velora.memory.ledger import measure_saved_bytes
from velora.memory.meter import measure, training_loss
from velora.models.build import build_network
from velora.nn.apply import apply_velora, calibrate, velora_layers
from velora.nn.blocks import checkpoint_blocks
from velora.nn.ssf import SSF

HEAD = Head("image_classification", num_labels=5)
SMALL = {"layers": [1, 1, 1, 1], "channels": [16, 16, 32, 32]}
KEYS = {
    "kind": "convnet", "name": "resnet_tiny", "path": None, "pretrained": False, "roles": None,
    "timm_name": "resnet18.a1_in1k", "image_size": 32, "drop_path": 0.0, "normalization": "timm", "overrides": SMALL,
}  # fmt: skip
CONVNEXT = {
    "timm_name": "convnext_tiny.in12k",
    "overrides": {"depths": [1] * 4, "dims": [16, 16, 32, 32], "kernel_sizes": 3},
}


def convnet(**changes) -> ConvNet:
    return ConvNet.model_validate(KEYS | changes)


def build(model: ConvNet, seed: int = 0) -> nn.Module:
    return model.build(HEAD, None, SimpleNamespace(seed=seed))


def images(num: int = 3) -> Tensor:
    return torch.randn(num, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network_of(*overrides: str) -> tuple[nn.Module, object]:
    config = composed("experiment=smoke", *overrides)
    network, _ = build_network(config, config.task.head(config), config.model.preprocessor(config))
    return network.train(), config


@pytest.mark.parametrize("changes", [{}, CONVNEXT], ids=["resnet", "convnext"])
def test_loss_and_logits_are_those_of_timm(changes):
    model = build(convnet(**changes)).eval()
    settings = KEYS | changes
    theirs = timm.create_model(settings["timm_name"].split(".")[0], num_classes=5, **settings["overrides"]).eval()
    theirs.load_state_dict(model.net.state_dict())
    labels = torch.tensor([0, 4, 2])
    output = model(pixel_values=images(), labels=labels)
    assert torch.equal(output.logits, theirs(images()))
    assert torch.equal(output.loss, nn.CrossEntropyLoss()(theirs(images()), labels))


@pytest.mark.parametrize("changes", [{}, CONVNEXT], ids=["resnet", "convnext"])
def test_weights_from_files(tmp_path, changes):
    source = build(convnet(**changes), seed=3)
    head = source.velora_head[0].removeprefix("net.")
    state = {k: v.contiguous() for k, v in source.net.state_dict().items()}
    save_file(state, tmp_path / "timm.safetensors")
    save_file({f"net.{k}": v for k, v in state.items()}, tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith(head)}, tmp_path / "headless.safetensors")
    for name in ("timm.safetensors", ".", "headless.safetensors"):
        loaded = build(convnet(**changes, path=str(tmp_path / name), pretrained=None))
        for key, value in loaded.net.state_dict().items():
            if not key.startswith(head):
                assert torch.equal(value, state[key]), (name, key)
    (tmp_path / "other.npz").write_bytes(b"")
    (problem,) = convnet(**changes, path=str(tmp_path / "other.npz"), pretrained=None).problems(SimpleNamespace())
    assert "is no file with weights: give a .safetensors file" in problem
    with pytest.raises(ConfigError, match="is a checkpoint of another architecture"):
        build(
            convnet(
                timm_name="resnet26.bt_in1k", overrides={}, path=str(tmp_path / "timm.safetensors"), pretrained=None
            )
        )


def test_what_timm_does_not_take_is_one_sentence():
    with pytest.raises(
        ConfigError, match=r"model.overrides=\{'depth': 3\}: model.timm_name=resnet18.a1_in1k .*'depth'"
    ):
        build(convnet(overrides={"depth": 3}))
    with pytest.raises(ConfigError, match="is not a network of timm"):
        build(convnet(timm_name="resnet19"))


@pytest.mark.parametrize(
    ("name", "architecture", "roles"),
    [
        ("resnet18", "resnet", {"value+up", "output+down"}),
        ("resnet50", "resnet_bottleneck", {"value", "up", "output+down"}),
        ("resnet26d", "resnet_bottleneck", {"value", "up", "output+down"}),
        ("resnext50_32x4d", "resnet_bottleneck", {"value", "up", "output+down"}),
        ("convnext_tiny", "convnext", {"value+up", "output+down"}),
        ("convnextv2_atto", "convnext", {"value+up", "output+down"}),
    ],
)
def test_roles(name, architecture, roles):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert find_architecture(n for n, _ in model.named_modules()) == architecture
    found = roles_by_module(model)
    assert set(found.values()) == roles
    assert not any("conv_dw" in path or "downsample" in path or "stem" in path for path in found)
    size = 4 if name.startswith("resnext") else 8  # of 128 channels in 32 groups, each reads 4
    summary = apply_velora(model, ["all"], sub_token_size=size, init="random")
    assert len(summary.layers) == len(found)


def test_a_whole_network_trains_with_velora_as_without_where_sub_tokens_are_single_channels():
    """S = 1 loses nothing, so that every gradient is the plain network's up to rounding."""
    model = build(convnet()).train()
    other = copy.deepcopy(model)
    apply_velora(other, ["all"], sub_token_size=1)
    calibrate(other, {"pixel_values": images()})
    labels = torch.tensor([0, 4, 2])
    for each in (model, other):
        each(images(), labels).loss.backward()
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        scale = float(one.grad.abs().max())
        assert (one.grad - two.grad).abs().max() <= 1e-4 * scale + 1e-7, name  # fp32 through ten layers


def test_calibration_leaves_batch_norm_alone():
    model = build(convnet()).train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    apply_velora(model, ["value"], sub_token_size=16)
    calibrate(model, {"pixel_values": images()})
    assert all(torch.equal(model.get_buffer(name), value) for name, value in before.items())


def test_checkpointed_blocks_have_the_same_gradients_and_move_batch_norm_once():
    model = build(convnet()).train()
    other = copy.deepcopy(model)
    text = checkpoint_blocks(other)
    assert text == "computed again in backward: 4 of 4 blocks (BasicBlock)"
    labels = torch.tensor([0, 4, 2])
    for each in (model, other):
        each(images(), labels).loss.backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)
    for (name, one), two in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(one, two), name
    assert {int(b) for n, b in other.named_buffers() if "num_batches" in n} == {1}
    kept = [measure_saved_bytes(lambda each=each: each(images(), labels).loss) for each in (model, other)]
    assert kept[1] < kept[0]


@pytest.mark.parametrize("method", ["linear_probe", "ssf"])
def test_a_frozen_batch_norm_does_not_move(method):
    network, _ = network_of(f"method={method}", "model=resnet_tiny")
    before = {n: b.clone() for n, b in network.named_buffers()}
    network(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)).loss.backward()
    assert all(torch.equal(b, before[n]) for n, b in network.named_buffers())
    full, _ = network_of("method=full", "model=resnet_tiny")
    full(torch.randn(4, 3, 32, 32))
    assert any(not torch.equal(b, before[n]) for n, b in full.named_buffers() if n in before)


@pytest.mark.parametrize("model", ["resnet_tiny", "convnext_tiny"])
def test_ssf_multiplies_and_adds_by_channel_and_merges(model):
    network, _ = network_of("method=ssf", f"model={model}")
    containers = [m for m in network.modules() if isinstance(m, SSF)]
    assert len(containers) == {"resnet_tiny": 13, "convnext_tiny": 25}[model]
    network.eval()
    before = network(images()).logits
    norms = [m for m in containers if isinstance(m.base, nn.LayerNorm) and m.channels_first]
    assert len(norms) == {"resnet_tiny": 0, "convnext_tiny": 5}[model]
    for container in norms:  # (batch, channels, height, width)
        x = torch.randn(2, container.base.weight.shape[0], 3, 5)
        gamma, beta = (p[:, None, None] for p in (container.scale_shift.weight, container.scale_shift.bias))
        torch.testing.assert_close(container(x), container.base(x) * gamma + beta)
    from velora import merge_adapter

    merged = merge_adapter(network).eval()
    assert not any(isinstance(m, SSF) for m in merged.modules())
    torch.testing.assert_close(merged(images()).logits, before, rtol=1e-4, atol=1e-5)  # fp32 through a dozen layers


def test_lora_on_convolutions_and_velora_on_lora():
    """PEFT's A is a convolution with the same kernel: VeLoRA stands on it, and where all readers are adapters its input goes."""
    targets = "adapter.targets=[value,down]"
    plain, _ = network_of("method=lora", "model=resnet_tiny", targets)
    network, config = network_of("method=lora_velora", "model=resnet_tiny", targets)
    twins = velora_layers(network)
    assert len(twins) == 8
    assert {type(twin).__name__ for twin in twins.values()} == {"VeloraConv2d"}
    batch = {"pixel_values": images(), "labels": torch.tensor([0, 1, 2])}
    config.activations.calibrate(network, [batch])
    network(**batch).loss.backward()
    assert all(twin.weight.grad is not None for twin in twins.values())
    kept = [measure_saved_bytes(lambda each=each: each(**batch).loss) for each in (plain, network)]
    assert kept[1] < kept[0]


@pytest.mark.parametrize("overrides", [["weights.dtype=bf16"], ["trainer.precision=bf16"]], ids=" ".join)
def test_half_precision(overrides):
    """Batch norm stays in float32, what goes through it does not."""
    network, config = network_of("method=velora", "model=resnet_tiny", *overrides)
    batch = {"pixel_values": images(), "labels": torch.tensor([0, 1, 2])}
    config.activations.calibrate(network, [batch])
    loss = training_loss(network, batch, config)()
    loss.backward()
    assert loss.dtype == torch.float32
    half = torch.bfloat16 if overrides == ["weights.dtype=bf16"] else torch.float32
    assert network.net.layer1[0].conv1.weight.grad.dtype == half
    assert network.net.bn1.weight.grad.dtype == torch.float32


# Mamba


def test_mamba_keeps_codes_in_place_of_what_out_proj_reads():
    full, _ = network_of("method=full", "model=mamba_tiny")
    network, config = network_of("method=velora_all", "model=mamba_tiny")
    words = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": words, "labels": words}
    config.activations.calibrate(network, [batch])
    assert {name.rpartition(".")[2] for name in velora_layers(network)} == {"in_proj", "x_proj", "out_proj"}
    assert all(twin.has_direction() for twin in velora_layers(network).values())
    kept = [measure_saved_bytes(lambda each=each: each(**batch).loss) for each in (full, network)]
    tokens, layers = 24, 4
    # gone are what in_proj reads (128 wide), the copy that x_proj makes of a transposed tensor, and what out_proj reads (256 each)
    assert kept[0] - kept[1] == layers * tokens * 4 * (128 + 256 + 256) * 15 // 16
    losses = [each(**batch).loss for each in (full, network)]
    assert torch.equal(losses[0], losses[1])
    losses[1].backward()
    assert all(p.grad is not None for p in network.parameters())


def test_mamba_beside_the_fused_kernels_is_refused(monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "mamba_ssm" or found(name, *rest))
    with pytest.raises(ConfigError, match="fused kernel of the package mamba_ssm"):
        network_of("method=velora", "model=mamba_tiny")


def test_mamba_130m_has_the_published_size():
    config = composed("method=full", "model=mamba_130m", "task=c4", "model.architecture.vocab_size=50280")
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        from velora.models.pretrained import configuration

        model = AutoModelForCausalLM.from_config(configuration(config.model.architecture, {}))
    # the published 130 million have one matrix for words and logits (129,135,360); here two, of 50,280 x 768 each
    assert sum(p.numel() for p in model.parameters()) - 50_280 * 768 == 129_135_360


@pytest.mark.parametrize("model", ["resnet_tiny", "convnext_tiny", "mamba_tiny"])
@pytest.mark.parametrize("method", ["full", "velora", "checkpoint"])
def test_the_estimate_keeps_what_a_run_keeps(model, method):
    sizes = ["trainer.batch_size=2"] + (["task.options.manual.max_length=8"] if model == "mamba_tiny" else [])
    config = composed("experiment=smoke", f"method={method}", f"model={model}", "trainer.device=cpu", *sizes)
    estimated, measured = estimate(config), measure(config)
    assert estimated.saved_bytes == measured.saved_bytes
    assert estimated.peak == measured.peak
